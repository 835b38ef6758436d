// Cost per byte of text: one read, one write of the lower-cased copy, about one vector operation to classify and one
// bit of mask; per character outside ASCII a decoding and two binary searches. Per word: one 16-byte load and two
// 64-bit multiplications. Per shingle: n + 2 multiplications in 32-bit or 64-bit lanes. Scratch stays in the cache.
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "word_chars.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int kBlock = 64;  // bytes classified at a time
constexpr uint64_t kTopBit = uint64_t{1} << 63;

inline uint64_t load8(const uint8_t* from) {
  uint64_t v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// fmix32 and fmix64. T: the hash or a vector of them.
template <typename T>
inline T mix32(T h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}
template <typename T>
inline T mix64(T h) {
  h ^= h >> 33;
  h *= uint64_t{0xFF51AFD7ED558CCD};
  h ^= h >> 33;
  h *= uint64_t{0xC4CEB9FE1A85EC53};
  return h ^ (h >> 33);
}
template <typename Hash, typename T>
inline T finalise(T h) {
  if constexpr (sizeof(Hash) == 4) {
    return mix32(h);
  } else {
    return mix64(h);
  }
}

// Of 64 bytes, lower-cased in place, one bit per byte: is it part of a word, as all of those outside ASCII are here,
// and (wide) is it one of those? And of 64 bytes without a top bit: is it white space, which becomes a space?
// Intrinsics, because the compiler makes no mask register or movemask of a vector of truth values: with them the whole
// pass takes two thirds of the time.
#if defined(__AVX512BW__)
inline uint64_t within(__m512i c, char first, char count) {
  return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(c, _mm512_set1_epi8(first)), _mm512_set1_epi8(count));
}

inline uint64_t classify(uint8_t* bytes, uint64_t& wide) {
  __m512i c = _mm512_loadu_si512(bytes);
  c = _mm512_mask_add_epi8(c, within(c, 'A', 26), c, _mm512_set1_epi8('a' - 'A'));
  _mm512_storeu_si512(bytes, c);
  wide = _mm512_movepi8_mask(c);
  return within(c, 'a', 26) | within(c, '0', 10) | _mm512_cmpeq_epi8_mask(c, _mm512_set1_epi8('_')) | wide;
}

inline bool is_ascii(const uint8_t* bytes) { return _mm512_movepi8_mask(_mm512_loadu_si512(bytes)) == 0; }

inline uint64_t spaces_of(uint8_t* bytes) {
  __m512i c = _mm512_loadu_si512(bytes);
  const uint64_t spaces = within(c, '\t', 5) | _mm512_cmpeq_epi8_mask(c, _mm512_set1_epi8(' '));
  c = _mm512_mask_add_epi8(c, within(c, 'A', 26), c, _mm512_set1_epi8('a' - 'A'));
  _mm512_storeu_si512(bytes, _mm512_mask_mov_epi8(c, spaces, _mm512_set1_epi8(' ')));
  return spaces;
}
#else
#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// The compiler's vector extension: arithmetic is lane by lane, and a comparison gives 0 or -1 in each byte.
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));

inline uint64_t bits_of(Bytes truth) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(truth)));
#else
  uint64_t mask = 0, eight[kVectorBytes / 8];
  std::memcpy(eight, &truth, sizeof(truth));
  for (int q = 0; q < kVectorBytes / 8; ++q) {
    // Gathers the low bits of 8 bytes into one byte: byte i times 2^(56 - 7i) puts its bit at 56 + i.
    mask |= (((eight[q] & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << (8 * q);
  }
  return mask;
#endif
}

inline uint64_t top_bits_of(Bytes c) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(c)));
#else
  return bits_of(c >> 7);
#endif
}

// truth(c) of each vector c, which it may change.
template <typename Truth>
inline uint64_t each_vector(uint8_t* bytes, const Truth& truth) {
  uint64_t mask = 0;
  for (int at = 0; at < kBlock; at += kVectorBytes) {
    Bytes c;
    std::memcpy(&c, bytes + at, sizeof(c));
    mask |= bits_of(truth(c)) << at;
    std::memcpy(bytes + at, &c, sizeof(c));
  }
  return mask;
}

inline uint64_t classify(uint8_t* bytes, uint64_t& wide) {
  wide = 0;
  int at = 0;
  const uint64_t narrow = each_vector(bytes, [&](Bytes& c) {
    wide |= top_bits_of(c) << at;
    at += kVectorBytes;
    c |= reinterpret_cast<Bytes>(c - 'A' < 26) & 0x20;
    return reinterpret_cast<Bytes>((c - 'a' < 26) | (c - '0' < 10) | (c == '_'));
  });
  return narrow | wide;
}

inline bool is_ascii(const uint8_t* bytes) {
  uint64_t any = 0;
  for (int at = 0; at < kBlock; at += 8) any |= load8(bytes + at);
  return (any & 0x8080808080808080u) == 0;
}

inline uint64_t spaces_of(uint8_t* bytes) {
  return each_vector(bytes, [](Bytes& c) {
    const Bytes space = reinterpret_cast<Bytes>((c - '\t' < 5) | (c == ' '));
    c |= reinterpret_cast<Bytes>(c - 'A' < 26) & 0x20;
    c = (c & ~space) | (space & ' ');
    return space;
  });
}
#endif

// Writes first + the position of each bit set, in order, and returns their number. Up to 16 more entries are written.
inline int append_bits(uint64_t bits, uint32_t first, uint32_t* out) {
  const int count = __builtin_popcountll(bits);
#if defined(__AVX512BW__)
  __m512i at = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                _mm512_set1_epi32(static_cast<int>(first)));
  for (int q = 0; q < 4; ++q, bits >>= 16) {
    const __mmask16 mine = static_cast<__mmask16>(bits);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mine, at));
    out += __builtin_popcount(mine);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
  }
#else
  // Eight at a time whether or not there are so many: a mispredicted branch costs more than the spare stores. Volatile,
  // lest the compiler gather the eight in a vector, element by element.
  volatile uint32_t* to = out;
  for (int done = 0; done < count; done += 8) {
    for (int j = 0; j < 8; ++j) {
      to[done + j] = first + static_cast<uint32_t>(__builtin_ctzll(bits | kTopBit));  // meaningless once used up
      bits &= bits - 1;
    }
  }
#endif
  return count;
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

inline uint64_t word_hash(const uint8_t* from, int64_t bytes) {
  uint64_t s = 0x9E3779B97F4A7C15u * static_cast<uint64_t>(bytes);
  for (; bytes > 16; bytes -= 16, from += 16) s = mix_block(s, from, 16);
  return mix_block(s, from, bytes);
}

// Bytes of a block, or of the one behind it that characters reach into, that separate words, and those at which a word
// begins whatever is before.
struct Seams {
  uint64_t gaps = 0, cuts = 0;
};

// Of the characters outside ASCII that begin in the block at `at`. `next` receives what concerns the next block.
inline Seams find_seams(const uint8_t* text, int64_t length, int64_t at, uint64_t wide, Seams& next) {
  Seams found;
  for (; wide != 0; wide &= wide - 1) {
    const int i = __builtin_ctzll(wide);
    char32_t c;
    const int bytes = decode_char(text + at + i, text + length, c);
    const WordChar is = bytes ? word_char(c) : WordChar::kPart;
    if (is == WordChar::kPart) continue;
    const int behind = i + bytes - kBlock;  // bytes of it in the next block, if any
    if (is == WordChar::kSeparator) {
      found.gaps |= ((uint64_t{1} << bytes) - 1) << i;
      if (behind > 0) next.gaps |= (uint64_t{1} << behind) - 1;
    } else {
      found.cuts |= uint64_t{1} << i;
      (behind >= 0 ? next.cuts : found.cuts) |= uint64_t{1} << (behind >= 0 ? behind : i + bytes);
    }
  }
  return found;
}

// As append_bits, with those of `twice`, a subset, written two times.
inline int64_t append_edges(uint64_t bits, uint64_t twice, uint32_t first, uint32_t* out) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    const int i = __builtin_ctzll(bits);
    out[count++] = first + static_cast<uint32_t>(i);
    if (twice >> i & 1) out[count++] = first + static_cast<uint32_t>(i);
  }
  return count;
}

inline bool is_space(uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

template <typename Hash>
int64_t words_of(const char* text, int64_t length, uint8_t* lower, uint32_t* edges, Hash* units) {
  // Pass 1: positions where a word begins or ends, alternately.
  int64_t num_edges = 0;
  uint64_t last = 0;                                  // was the byte before this block part of a word?
  Seams carried;                                      // what characters of the block before say of this one
  for (int64_t at = 0; at <= length; at += kBlock) {  // <=: the zeros after the text end the last word
    const int64_t have = length - at < kBlock ? length - at : kBlock;
    if (have == kBlock) {
      std::memcpy(lower + at, text + at, kBlock);  // a constant size, hence no call
    } else {
      std::memset(lower + at, 0, kBlock);
      if (have > 0) std::memcpy(lower + at, text + at, static_cast<size_t>(have));
    }
    uint64_t wide;
    uint64_t mask = classify(lower + at, wide);
    if (__builtin_expect((wide | carried.cuts) != 0, 0)) {
      Seams next;
      const Seams found = find_seams(reinterpret_cast<const uint8_t*>(text), length, at, wide, next);
      mask &= ~(found.gaps | carried.gaps);
      const uint64_t before = (mask << 1) | last, cuts = (found.cuts | carried.cuts) & mask & before;
      num_edges += append_edges((mask ^ before) | cuts, cuts, static_cast<uint32_t>(at), edges + num_edges);
      carried = next;
    } else {
      num_edges += append_bits(mask ^ ((mask << 1) | last), static_cast<uint32_t>(at), edges + num_edges);
    }
    last = mask >> 63;
  }
  // Pass 2: the words. Loads may run up to 15 bytes past a word, hence the room after `lower`.
  const int64_t words = num_edges / 2;
  for (int64_t w = 0; w < words; ++w) {
    const uint32_t begin = edges[2 * w];
    units[w] = static_cast<Hash>(word_hash(lower + begin, edges[2 * w + 1] - begin) >> (64 - 8 * sizeof(Hash)));
  }
  return words;
}

// Writes those of the 64 bytes whose bits are set, in order, and returns their number. All 64 entries may be written.
template <typename Hash>
inline int64_t append_bytes(const uint8_t* bytes, uint64_t chosen, Hash* out) {
  if (chosen == ~uint64_t{0}) {
    for (int i = 0; i < kBlock; ++i) out[i] = bytes[i];
    return kBlock;
  }
  int64_t count = 0;
#if defined(__AVX512BW__)
  constexpr int kLanes = 64 / sizeof(Hash);
  for (int at = 0; at < kBlock; at += kLanes, chosen >>= kLanes) {
    if constexpr (sizeof(Hash) == 4) {
      const __m512i c =
          _mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at)));
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), c));
    } else {
      const __m512i c = _mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + at)));
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi64(static_cast<__mmask8>(chosen), c));
    }
    count += __builtin_popcountll(chosen & ((uint64_t{1} << kLanes) - 1));
  }
#else
  for (int i = 0; i < kBlock; ++i, chosen >>= 1) {  // a mispredicted branch costs more than the spare stores
    out[count] = bytes[i];
    count += chosen & 1;
  }
#endif
  return count;
}

// 64 bytes at a time where all are ASCII. Of a run of white space the first is kept, and at the end none.
template <typename Hash>
int64_t chars_of(const char* text, int64_t length, Hash* units) {
  int64_t count = 0;
  bool space = true;  // was the byte before white space, or is there none?
  for (int64_t at = 0; at < length; at += kBlock) {
    const int64_t have = length - at < kBlock ? length - at : kBlock;
    uint8_t block[kBlock] = {};
    if (have == kBlock) {
      std::memcpy(block, text + at, kBlock);
    } else {
      std::memcpy(block, text + at, static_cast<size_t>(have));
    }
    if (is_ascii(block)) {
      const uint64_t inside = ~uint64_t{0} >> (kBlock - have), spaces = spaces_of(block);
      count += append_bytes(block, inside & ~(spaces & ((spaces << 1) | space)), units + count);
      space = spaces >> (have - 1) & 1;
      continue;
    }
    for (int64_t i = 0; i < have; ++i) {
      const uint8_t c = block[i];
      if (is_space(c)) {
        if (!space) units[count++] = ' ';
        space = true;
      } else if ((c & 0xC0) == 0x80 && !space) {
        units[count - 1] = (units[count - 1] << 6) | (c & 0x3F);
      } else {
        units[count++] = static_cast<uint8_t>(c - 'A') < 26 ? c | 0x20u : c;
        space = false;
      }
    }
  }
  if (space && count > 0) --count;
  for (int64_t i = 0; i < count; ++i) units[i] = finalise<Hash>(units[i]);
  return count;
}

#if defined(__AVX512F__)
constexpr int kShingleBytes = 64;
#elif defined(__AVX2__)
constexpr int kShingleBytes = 32;
#else
constexpr int kShingleBytes = 16;
#endif
template <typename Hash>
struct Lanes {
  typedef Hash Type __attribute__((vector_size(kShingleBytes)));
};

// `count` vectors of shingles, of successive units from `units` on.
template <int count, typename Hash>
inline void shingle_vectors(Hash multiplier, const Hash* units, int64_t ngram, Hash* shingles) {
  using Vec = typename Lanes<Hash>::Type;
  constexpr int kLanes = kShingleBytes / sizeof(Hash);
  Vec sum[count] = {};
  Hash coefficient = 1;
  for (int64_t k = 0; k < ngram; ++k) {
    coefficient *= multiplier;
    for (int v = 0; v < count; ++v) {
      Vec unit;
      std::memcpy(&unit, units + k + v * kLanes, sizeof(unit));
      sum[v] += unit * coefficient;
    }
  }
  for (int v = 0; v < count; ++v) {
    const Vec hash = finalise<Hash>(sum[v]);
    std::memcpy(shingles + v * kLanes, &hash, sizeof(hash));
  }
}

template <typename Hash>
int64_t shingles_of(Hash multiplier, const Hash* units, int64_t count, int64_t ngram, Hash* shingles) {
  if (ngram > count) ngram = count;
  constexpr int kLanes = kShingleBytes / sizeof(Hash), kTogether = 4;
  const int64_t n = count - ngram + 1;
  int64_t i = 0;
  for (; i + kTogether * kLanes <= n; i += kTogether * kLanes) {
    shingle_vectors<kTogether>(multiplier, units + i, ngram, shingles + i);
  }
  for (; i + kLanes <= n; i += kLanes) shingle_vectors<1>(multiplier, units + i, ngram, shingles + i);
  for (; i < n; ++i) {
    Hash sum = 0, coefficient = 1;
    for (int64_t k = 0; k < ngram; ++k) sum += units[i + k] * (coefficient *= multiplier);
    shingles[i] = finalise<Hash>(sum);
  }
  return n;
}

}  // namespace

// lower [length + 80] and edges [length + 72] are scratch; units [length / 2 + 1]. Returns the number of words.
int64_t hash_words32(const char* text, int64_t length, uint8_t* lower, uint32_t* edges, uint32_t* units) {
  return words_of(text, length, lower, edges, units);
}
int64_t hash_words64(const char* text, int64_t length, uint8_t* lower, uint32_t* edges, uint64_t* units) {
  return words_of(text, length, lower, edges, units);
}

// units [length + 64]. Returns the number of characters.
int64_t hash_chars32(const char* text, int64_t length, uint32_t* units) { return chars_of(text, length, units); }
int64_t hash_chars64(const char* text, int64_t length, uint64_t* units) { return chars_of(text, length, units); }

void hash_tokens32(const int32_t* tokens, int64_t count, uint32_t* units) {
  for (int64_t i = 0; i < count; ++i) units[i] = finalise<uint32_t>(static_cast<uint32_t>(tokens[i]));
}

void hash_tokens64(const int64_t* tokens, int64_t count, uint32_t* units) {
  for (int64_t i = 0; i < count; ++i) units[i] = finalise<uint32_t>(static_cast<uint32_t>(tokens[i]));
}

// shingles [max(count - ngram + 1, 1)] from units [count], count >= 1. Returns the number of shingles.
int64_t hash_shingles32(const uint32_t* units, int64_t count, int64_t ngram, uint32_t* shingles) {
  return shingles_of(0x1B873593u, units, count, ngram, shingles);
}
int64_t hash_shingles64(const uint64_t* units, int64_t count, int64_t ngram, uint64_t* shingles) {
  return shingles_of(uint64_t{0xD6E8FEB86659FD93}, units, count, ngram, shingles);
}

}  // namespace fastsft::FASTSFT_ISA_NS
