// Cost per byte of text: one read, one write of the lower-cased copy, about one vector operation to classify and one
// bit of mask. Per word: one 16-byte load and two 64-bit multiplications. Per shingle: n + 2 multiplications to form it
// and num_perm multiply-add-min, all in 32-bit lanes with the running minima in registers. Scratch stays in the cache.
#include <cstdint>
#include <cstring>

namespace fastsft::FASTSFT_ISA_NS {
namespace {

// The compiler's vector extension: arithmetic on these is lane by lane. The width is the
// target's own: wider types are correct too, but are taken apart element by element.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
typedef uint32_t Vec __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));

constexpr int kBlock = 64;  // bytes classified at a time
constexpr uint64_t kTopBit = uint64_t{1} << 63;

inline Vec load(const uint32_t* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline uint64_t load8(const uint8_t* from) {
  uint64_t v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline uint32_t fmix32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// Lower-cases 64 bytes in place and returns one bit per byte: is it part of a word?
inline uint64_t classify(uint8_t* bytes) {
  uint8_t bits[kBlock];
  for (int at = 0; at < kBlock; at += kVectorBytes) {
    Bytes c;
    std::memcpy(&c, bytes + at, sizeof(c));
    c |= reinterpret_cast<Bytes>(c - 'A' < 26) & 0x20;  // a comparison gives 0 or -1 in each byte
    const Bytes word = reinterpret_cast<Bytes>((c - 'a' < 26) | (c - '0' < 10) | (c == '_') | (c >= 0x80)) & 1;
    std::memcpy(bytes + at, &c, sizeof(c));
    std::memcpy(bits + at, &word, sizeof(word));
  }
  uint64_t mask = 0;
  for (int q = 0; q < 8; ++q) {
    // Gathers the low bits of 8 bytes into one byte: byte i times 2^(56 - 7i) puts its bit at 56 + i.
    mask |= ((load8(bits + 8 * q) * 0x0102040810204080u) >> 56) << (8 * q);
  }
  return mask;
}

struct Masks {
  uint64_t low[17] = {}, high[17] = {};  // which bytes of a 16-byte block a word of this many bytes fills
  constexpr Masks() {
    for (int n = 1; n <= 16; ++n) {
      low[n] = n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
      high[n] = n <= 8 ? 0 : n == 16 ? ~uint64_t{0} : (uint64_t{1} << (8 * n - 64)) - 1;
    }
  }
};
constexpr Masks kMasks;

inline uint64_t mix_block(uint64_t s, const uint8_t* from, int64_t bytes) {
  s = (s ^ (load8(from) & kMasks.low[bytes])) * 0xBF58476D1CE4E5B9u;
  s ^= s >> 32;
  s = (s ^ (load8(from + 8) & kMasks.high[bytes])) * 0x94D049BB133111EBu;
  return s ^ (s >> 29);
}

inline uint32_t word_hash(const uint8_t* from, int64_t bytes) {
  uint64_t s = 0x9E3779B97F4A7C15u * static_cast<uint64_t>(bytes);
  for (; bytes > 16; bytes -= 16, from += 16) s = mix_block(s, from, 16);
  return static_cast<uint32_t>(mix_block(s, from, bytes) >> 32);
}

inline bool is_space(uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

}  // namespace

// lower [length + 80] and edges [length + 72] are scratch; units [length / 2 + 1]. Returns the number of words.
int64_t hash_words(const char* text, int64_t length, uint8_t* lower, uint32_t* edges, uint32_t* units) {
  // Pass 1: positions where a run of word bytes begins or ends, alternately.
  int64_t num_edges = 0;
  uint64_t last = 0;                                  // was the byte before this block part of a word?
  for (int64_t at = 0; at <= length; at += kBlock) {  // <=: the zeros after the text end the last word
    const int64_t have = length - at < kBlock ? length - at : kBlock;
    if (have == kBlock) {
      std::memcpy(lower + at, text + at, kBlock);  // a constant size, hence no call
    } else {
      std::memset(lower + at, 0, kBlock);
      if (have > 0) std::memcpy(lower + at, text + at, static_cast<size_t>(have));
    }
    const uint64_t mask = classify(lower + at);
    uint64_t changed = mask ^ ((mask << 1) | last);
    last = mask >> 63;
    const int count = __builtin_popcountll(changed);
    // Eight at a time whether or not there are so many: a mispredicted branch costs more than the spare stores.
    for (int done = 0; done < count; done += 8) {
      for (int j = 0; j < 8; ++j) {
        const int bit = __builtin_ctzll(changed | kTopBit);  // defined, if meaningless, once `changed` is used up
        edges[num_edges + done + j] = static_cast<uint32_t>(at + bit);
        changed &= changed - 1;
      }
    }
    num_edges += count;
  }
  // Pass 2: the words. Loads may run up to 15 bytes past a word, hence the room after `lower`.
  const int64_t words = num_edges / 2;
  for (int64_t w = 0; w < words; ++w) {
    const uint32_t begin = edges[2 * w];
    units[w] = word_hash(lower + begin, edges[2 * w + 1] - begin);
  }
  return words;
}

// units [length]. Returns the number of characters.
int64_t hash_chars(const char* text, int64_t length, uint32_t* units) {
  int64_t count = 0;
  bool space = false;
  for (int64_t i = 0; i < length; ++i) {
    const uint8_t c = static_cast<uint8_t>(text[i]);
    if ((c & 0xC0) == 0x80 && count > 0 && !space) {
      units[count - 1] = (units[count - 1] << 6) | (c & 0x3F);
    } else if (is_space(c)) {
      space = true;
    } else {
      if (space && count > 0) units[count++] = ' ';
      space = false;
      units[count++] = static_cast<uint8_t>(c - 'A') < 26 ? c | 0x20u : c;
    }
  }
  for (int64_t i = 0; i < count; ++i) units[i] = fmix32(units[i]);
  return count;
}

void hash_tokens32(const int32_t* tokens, int64_t count, uint32_t* units) {
  for (int64_t i = 0; i < count; ++i) units[i] = fmix32(static_cast<uint32_t>(tokens[i]));
}

void hash_tokens64(const int64_t* tokens, int64_t count, uint32_t* units) {
  for (int64_t i = 0; i < count; ++i) units[i] = fmix32(static_cast<uint32_t>(tokens[i]));
}

// shingles [max(count - ngram + 1, 1)] from units [count], count >= 1. Returns the number of shingles.
int64_t hash_shingles(const uint32_t* units, int64_t count, int64_t ngram, uint32_t* shingles) {
  if (ngram > count) ngram = count;
  const int64_t n = count - ngram + 1;
  for (int64_t i = 0; i < n; ++i) shingles[i] = 0;
  uint32_t coefficient = 1;
  for (int64_t k = 0; k < ngram; ++k) {
    coefficient *= 0x1B873593u;
    for (int64_t i = 0; i < n; ++i) shingles[i] += units[i + k] * coefficient;
  }
  for (int64_t i = 0; i < n; ++i) shingles[i] = fmix32(shingles[i]);
  return n;
}

// signature [padded] = min over shingles of a * h + b, for a, b [padded], padded a multiple of 64.
void sketch(const uint32_t* shingles, int64_t n, const uint32_t* a, const uint32_t* b, int64_t padded,
            uint32_t* signature) {
  constexpr int kGroup = 4;  // vectors at a time: with their factors they fill, but do not exceed, 16 registers
  for (int64_t j = 0; j < padded; j += kGroup * kLanes) {
    Vec va[kGroup], vb[kGroup], least[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      va[g] = load(a + j + g * kLanes);
      vb[g] = load(b + j + g * kLanes);
      least[g] = ~Vec{};
    }
    for (int64_t i = 0; i < n; ++i) {
      const Vec h = shingles[i] - Vec{};
      for (int g = 0; g < kGroup; ++g) {
        const Vec x = va[g] * h + vb[g];
        least[g] = x < least[g] ? x : least[g];
      }
    }
    for (int g = 0; g < kGroup; ++g) std::memcpy(signature + j + g * kLanes, &least[g], sizeof(Vec));
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
