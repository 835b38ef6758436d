// One pass over a row costs 4 bytes per logit and a handful of vector operations. Noise costs one Philox block (20
// 32-bit multiplications), two divisions and two polynomials per candidate.
//
// Compiled without contraction or reassociation (CMakeLists.txt): every operation below rounds once, in the order
// written, so all instruction sets give the same bits. Sums keep kLanes partial sums whatever the vector width.
#include <cstdint>
#include <cstring>

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int kLanes = 16;
constexpr float kLargest = 3.40282347e38f;  // finite
constexpr float kLn2High = 0.693359375f;    // 9 significant bits: products with an exponent are exact
constexpr float kLn2Low = -2.12194440e-4f;

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// exp(max(x, -87)) for x <= 0: 2^k exp(r) with |r| <= ln(2) / 2 and the Taylor polynomial of degree 7. (Below -87 the
// result would leave the normal floats, and 10^-38 adds nothing to any sum here.)
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const int32_t k = static_cast<int32_t>(clamped * 1.44269504f - 0.5f);
  const float kf = static_cast<float>(k);
  const float r = (clamped - kf * kLn2High) - kf * kLn2Low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * from_bits(static_cast<uint32_t>(k + 127) << 23);
}

// log(x) for normal x > 0: x = 2^e f with f in [sqrt(1/2), sqrt(2)), log f = 2 artanh((f - 1) / (f + 1)). Where e = 0,
// `below_one` (1 - x, known more exactly than x) supplies f - 1.
inline float log_positive(float x, float below_one) {
  const uint32_t offset = to_bits(x) - 0x3F3504F3u;  // bits of sqrt(1/2)
  const int32_t e = static_cast<int32_t>(offset) >> 23;
  const float f = from_bits((offset & 0x007FFFFFu) + 0x3F3504F3u);
  const float t = (e == 0 ? -below_one : f - 1.0f) / (f + 1.0f);
  const float t2 = t * t;
  float p = 2.0f / 9.0f;
  p = p * t2 + 2.0f / 7.0f;
  p = p * t2 + 2.0f / 5.0f;
  p = p * t2 + 2.0f / 3.0f;
  p = p * t2 + 2.0f;
  const float ef = static_cast<float>(e);
  return ef * kLn2High + (p * t + ef * kLn2Low);
}

// Philox4x32-10 as in rng.h, of which only x[0] is wanted; here so that the loop over candidates vectorises.
inline uint32_t philox_first(uint64_t seed, uint64_t position, uint32_t index) {
  uint32_t c0 = index, c1 = 0, c2 = static_cast<uint32_t>(position), c3 = static_cast<uint32_t>(position >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

inline float gumbel(uint32_t bits) {
  const float raw = (static_cast<float>(static_cast<int32_t>(bits >> 1)) + 0.5f) * 0x1p-31f;
  const float w = raw < 1.0f - 0x1p-24f ? raw : 1.0f - 0x1p-24f;
  const float exponential = -log_positive(1.0f - w, w);
  return -log_positive(exponential, 1.0f - exponential);
}

}  // namespace

// The largest of x [n]; NaN if any is NaN or +inf.
float row_max(const float* x, int64_t n) {
  constexpr int kWide = 4 * kLanes;  // several independent chains
  float most[kWide];
  uint32_t bad[kWide] = {};
  for (int j = 0; j < kWide; ++j) most[j] = -__builtin_inff();
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    for (int j = 0; j < kWide; ++j) {
      most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
      bad[j] |= x[i + j] <= kLargest ? 0u : 1u;
    }
  }
  for (; i < n; ++i) {
    most[0] = x[i] > most[0] ? x[i] : most[0];
    bad[0] |= x[i] <= kLargest ? 0u : 1u;
  }
  for (int j = 1; j < kWide; ++j) {
    most[0] = most[j] > most[0] ? most[j] : most[0];
    bad[0] |= bad[j];
  }
  return bad[0] != 0 ? __builtin_nanf("") : most[0];
}

// Sum of exp((x - max) / temperature) over x [n], x <= max.
double sum_exp(const float* x, int64_t n, float max, float temperature) {
  constexpr int kBlock = 64 * kLanes;  // float sums of 64 terms, then double
  double total[kLanes] = {};
  float terms[kBlock];
  for (int64_t block = 0; block < n; block += kBlock) {
    const int have = n - block < kBlock ? static_cast<int>(n - block) : kBlock;
    for (int i = 0; i < have; ++i) terms[i] = exp_nonpositive((x[block + i] - max) / temperature);
    for (int i = have; i < kBlock; ++i) terms[i] = 0.0f;
    float part[kLanes] = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) part[j] += terms[i + j];
    }
    for (int j = 0; j < kLanes; ++j) total[j] += part[j];
  }
  double sum = 0.0;
  for (int j = 0; j < kLanes; ++j) sum += total[j];
  return sum;
}

// y = exp(x) for x [n] <= 0.
void exp_all(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = exp_nonpositive(x[i]);
}

// Writes index and z = (x - max) / temperature of every element with x >= least and z >= floor, by ascending index,
// leaving out -inf. Returns how many. indices and z have room for n + 1.
int64_t collect(const float* x, int64_t n, float max, float temperature, float least, float floor, int32_t* indices,
                float* z) {
  constexpr int kBlock = 256;
  float scaled[kBlock];
  uint32_t keep[kBlock];
  int64_t count = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int have = n - block < kBlock ? static_cast<int>(n - block) : kBlock;
    uint32_t any = 0;
    for (int i = 0; i < have; ++i) {
      const float value = x[block + i];
      const float s = (value - max) / temperature;
      scaled[i] = s;
      keep[i] = static_cast<uint32_t>(value >= least) & static_cast<uint32_t>(s >= floor) &
                static_cast<uint32_t>(s >= -kLargest);
      any |= keep[i];
    }
    if (any == 0) continue;
    for (int i = 0; i < have; ++i) {
      indices[count] = static_cast<int32_t>(block + i);
      z[count] = scaled[i];
      count += keep[i];
    }
  }
  return count;
}

// Gumbel noise for the given token indices [n].
void gumbel_noise(const int32_t* indices, int64_t n, uint64_t seed, uint64_t position, float* noise) {
  for (int64_t i = 0; i < n; ++i) {
    noise[i] = gumbel(philox_first(seed, position, static_cast<uint32_t>(indices[i])));
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
