// One block per row, 16 bytes per load and store. With E bytes per element, loss_stats reads E V bytes a row (and as
// much of the reference), loss_gradient reads and writes 2 E V (and reads the reference): memory-bound, at about ten
// instructions and one exp2 per element and pass. Exponents are in base 2, and each difference to a maximum or to lse
// comes out of one fma, so that large logits lose nothing. Contract and formulas: fastsft/loss.h.
#include "fastsft/loss.h"
#include "launch.h"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kLowest = -3.0e38f;  // instead of -inf, so that max - max is 0 and not NaN
constexpr float kFar = -1.0e30f;     // instead of -inf, so that a probability of 0 times its logarithm is 0

template <typename T>
inline constexpr int kPack = 16 / sizeof(typename T::Word);  // elements of 16 bytes

// To 1e-7 absolute: all that is left of a logit's precision once it is capped.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2e * x));
}

// Reads a row as values x, the logits plus bias or their tanh where there is a cap: u log2(e) = scale x.
template <typename T, bool kCap>
struct Row {
  const typename T::Word* data;
  const float* bias;
  float inverse_cap, scale;

  __device__ Row(const LossTile& t, const void* logits, const float* bias_, int64_t i)
      : data(static_cast<const typename T::Word*>(logits) + i * t.stride),
        bias(bias_),
        inverse_cap(kCap ? 1.0f / t.softcap : 0.0f),
        scale((kCap ? t.softcap : 1.0f) * kLog2e / t.temperature) {}

  // n is kPack, or 1 near the row's end.
  template <int n>
  __device__ __forceinline__ void read(int64_t j, float (&x)[n]) const {
    if constexpr (n == 1) {
      x[0] = T::to_float(data[j]);
    } else {
      const uint4 words = load<uint4>(data + j);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (n == 4) {
          x[k] = bits_float(word[k]);
        } else {
          x[2 * k] = T::low(word[k]);
          x[2 * k + 1] = T::high(word[k]);
        }
      }
    }
    if (bias != nullptr) {
#pragma unroll
      for (int k = 0; k < n; ++k) x[k] += bias[j + k];
    }
    if constexpr (kCap) {
#pragma unroll
      for (int k = 0; k < n; ++k) x[k] = tanh_of(x[k] * inverse_cap);
    }
  }
};

template <typename T, int n>
__device__ __forceinline__ void write(typename T::Word* out, const float (&x)[n]) {
  if constexpr (n == 1) {
    *out = T::from_float(x[0]);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (n == 4) {
        word[k] = float_bits(x[k]);
      } else {
        word[k] = T::pack(x[2 * k], x[2 * k + 1]);
      }
    }
    store(out, uint4{word[0], word[1], word[2], word[3]});
  }
}

// Calls fn<packs, n>(j) for this thread's columns: n from j, and from every kThreads n behind it, `packs` times. First
// kFlight packs at a time, which are all to be read before the first is used; then one; then single elements.
template <int kElements, int kFlight, typename Fn>
__device__ __forceinline__ void for_each_pack(int64_t vocab, Fn&& fn) {
  const int64_t packs = vocab / kElements;
  int64_t at = threadIdx.x;
  for (; at + (kFlight - 1) * kThreads < packs; at += kFlight * kThreads) {
    fn.template operator()<kFlight, kElements>(at * kElements);
  }
  for (; at < packs; at += kThreads) fn.template operator()<1, kElements>(at * kElements);
  for (int64_t j = packs * kElements + threadIdx.x; j < vocab; j += kThreads) fn.template operator()<1, 1>(j);
}

// As in csrc/cpu/loss.isa.cpp, in base 2; crossing and total are still to be scaled.
struct Sums {
  float max = kLowest;
  float exps = 0.0f;      // sum_j exp2(scale x_j - max)
  float moment = 0.0f;    // sum_j exp2(scale x_j - max) (scale x_j - max)
  float crossing = 0.0f;  // sum_j exp2(scale x_j - max) y_j, y the other model's row
  float total = 0.0f;     // sum_j x_j

  template <bool kCross, int n>
  __device__ __forceinline__ void add(const float (&x)[n], const float (&y)[n], float scale) {
    float peak = x[0];
#pragma unroll
    for (int k = 1; k < n; ++k) peak = fmaxf(peak, x[k]);  // a NaN is passed over; it reaches the sums below
    raise(fmaxf(max, peak * scale));
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float d = fmaf(x[k], scale, -max), e = exp2_approx(d);
      exps += e;
      moment = fmaf(e, fmaxf(d, kFar), moment);
      if constexpr (kCross) crossing += e == 0.0f ? 0.0f : e * y[k];
      total += x[k];
    }
  }

  __device__ __forceinline__ void raise(float to) {
    const float shift = max - to, factor = exp2_approx(shift);
    moment = factor * fmaf(shift, exps, moment);
    exps *= factor;
    crossing *= factor;
    max = to;
  }

  __device__ __forceinline__ void merge(Sums other) {
    const float to = fmaxf(max, other.max);
    raise(to);
    other.raise(to);
    exps += other.exps;
    moment += other.moment;
    crossing += other.crossing;
    total += other.total;
  }

  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      merge({shuffle_xor(max, mask), shuffle_xor(exps, mask), shuffle_xor(moment, mask), shuffle_xor(crossing, mask),
             shuffle_xor(total, mask)});
    }
  }
};

template <typename T, bool kCap, bool kReference>
__global__ void __launch_bounds__(kThreads) loss_stats_kernel(LossTile t, Divergence divergence, LossStats out) {
  constexpr int kFlight = 16 / kPack<T> / (kReference ? 2 : 1);
  const int64_t i = blockIdx.x;
  const Row<T, kCap> p_row(t, t.logits, t.bias, i), q_row(t, kReference ? t.reference : t.logits, nullptr, i);
  const float scale = p_row.scale;
  Sums p, q;
  for_each_pack<kPack<T>, kFlight>(t.vocab, [&]<int packs, int n>(int64_t j) {
    float x[packs][n], y[packs][n];
#pragma unroll
    for (int f = 0; f < packs; ++f) {
      p_row.read(j + f * kThreads * n, x[f]);
      if constexpr (kReference) q_row.read(j + f * kThreads * n, y[f]);
    }
#pragma unroll
    for (int f = 0; f < packs; ++f) {
      p.template add<kReference>(x[f], y[f], scale);
      if constexpr (kReference) q.template add<true>(y[f], x[f], scale);
    }
  });

  Sums* const of_warps = shared_memory<Sums>();
  p.merge_lanes();
  if (lane_id() == 0) of_warps[warp_id()] = p;
  if constexpr (kReference) {
    q.merge_lanes();
    if (lane_id() == 0) of_warps[kWarps + warp_id()] = q;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) p.merge(of_warps[w]);

  const float log_p = log2f(p.exps), lse = (p.max + log_p) * kLn2, entropy = (log_p - p.moment / p.exps) * kLn2;
  const int64_t y = t.targets[i];
  float at_target[1] = {0.0f};
  if (y >= 0 && y < t.vocab) p_row.read(y, at_target);
  out.logprob[i] = y >= 0 && y < t.vocab ? (fmaf(at_target[0], scale, -p.max) - log_p) * kLn2 : -INFINITY;
  out.entropy[i] = entropy;
  out.lse[i] = lse;
  out.mean_logprob[i] = p.total / static_cast<float>(t.vocab) * (scale * kLn2) - lse;
  float kl = 0.0f, reference_lse = 0.0f;
  if constexpr (kReference) {
    for (int w = 1; w < kWarps; ++w) q.merge(of_warps[kWarps + w]);
    const float log_q = log2f(q.exps);
    reference_lse = (q.max + log_q) * kLn2;
    kl = divergence == Divergence::kReverse
             ? reference_lse - p.crossing / p.exps * (scale * kLn2) - entropy
             : lse - q.crossing / q.exps * (scale * kLn2) - (log_q - q.moment / q.exps) * kLn2;
  }
  out.divergence[i] = kl;
  out.reference_lse[i] = reference_lse;
}

template <typename T, bool kCap, bool kReference>
__global__ void __launch_bounds__(kThreads) loss_gradient_kernel(LossTile t, LossStats s, LossCoefficients c) {
  constexpr int kFlight = 16 / kPack<T> / (kReference ? 2 : 1);
  const int64_t i = blockIdx.x, y = t.targets[i];
  const Row<T, kCap> p_row(t, t.logits, t.bias, i), q_row(t, kReference ? t.reference : t.logits, nullptr, i);
  auto* const out = static_cast<typename T::Word*>(t.logits) + i * t.stride;
  const float scale = p_row.scale, lse = s.lse[i] * kLog2e;
  const float slope = 1.0f / t.temperature;  // and 1 - x^2 where there is a cap
  const float on_p = c.on_p[i] * slope, on_target = c.on_target[i] * slope, uniform = c.uniform[i] * slope;
  const float on_plogp = c.on_plogp[i] * slope * kLn2;
  const float reference_lse = kReference ? s.reference_lse[i] * kLog2e : 0.0f;
  const float on_plogq = kReference ? c.on_plogq[i] * slope * kLn2 : 0.0f, on_q = kReference ? c.on_q[i] * slope : 0.0f;
  for_each_pack<kPack<T>, kFlight>(t.vocab, [&]<int packs, int n>(int64_t j) {
    float x[packs][n];
    [[maybe_unused]] float v[kReference ? packs : 1][n];
#pragma unroll
    for (int f = 0; f < packs; ++f) {
      p_row.read(j + f * kThreads * n, x[f]);
      if constexpr (kReference) q_row.read(j + f * kThreads * n, v[f]);
    }
#pragma unroll
    for (int f = 0; f < packs; ++f) {
      const int64_t first = j + f * kThreads * n;
      float gradient[n];
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float log_p = fmaf(x[f][k], scale, -lse), p = exp2_approx(log_p);
        float on_p_j = fmaf(on_plogp, fmaxf(log_p, kFar), on_p);
        float rest = uniform;
        if constexpr (kReference) {
          const float log_q = fmaf(v[f][k], scale, -reference_lse);
          on_p_j = fmaf(on_plogq, fmaxf(log_q, kFar), on_p_j);
          rest = fmaf(on_q, exp2_approx(log_q), rest);
        }
        gradient[k] = fmaf(p, on_p_j, rest);
      }
      if (y >= first && y < first + n) {
#pragma unroll
        for (int k = 0; k < n; ++k) gradient[k] += y == first + k ? on_target : 0.0f;
      }
      if constexpr (kCap) {
#pragma unroll
        for (int k = 0; k < n; ++k) gradient[k] *= fmaf(-x[f][k], x[f][k], 1.0f);
      }
      write<T>(out + first, gradient);
    }
  });
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Calls start<element type, whether there is a cap, a reference>().
template <typename Start>
void with_options(const LossTile& tile, Start&& start) {
  const int64_t row = tile.stride * (tile.dtype == DType::kFloat32 ? 4 : 2);
  FASTSFT_CHECK(aligned(tile.logits) && aligned(tile.reference) && (tile.rows <= 1 || row % 16 == 0),
                "linear_cross_entropy: logits: expected rows at multiples of 16 bytes, got ", row, " bytes a row");
  const bool cap = tile.softcap > 0, reference = tile.reference != nullptr;
  const auto with_type = [&]<typename T>() {
    if (reference)
      return cap ? start.template operator()<T, true, true>() : start.template operator()<T, false, true>();
    return cap ? start.template operator()<T, true, false>() : start.template operator()<T, false, false>();
  };
  switch (tile.dtype) {
    case DType::kFloat32: return with_type.template operator()<Float32>();
    case DType::kBFloat16: return with_type.template operator()<BFloat16>();
    case DType::kFloat16: return with_type.template operator()<Float16>();
  }
}

}  // namespace

void loss_stats(const LossTile& tile, Divergence divergence, const LossStats& stats, void* stream) {
  with_options(tile, [&]<typename T, bool kCap, bool kReference>() {
    launch<loss_stats_kernel<T, kCap, kReference>>(static_cast<unsigned>(tile.rows), kThreads,
                                                   2 * kWarps * sizeof(Sums), stream, tile, divergence, stats);
  });
}

void loss_gradient(const LossTile& tile, const LossStats& stats, const LossCoefficients& coefficients, void* stream) {
  with_options(tile, [&]<typename T, bool kCap, bool kReference>() {
    launch<loss_gradient_kernel<T, kCap, kReference>>(static_cast<unsigned>(tile.rows), kThreads, 0, stream, tile,
                                                      stats, coefficients);
  });
}

}  // namespace fastsft::cuda
