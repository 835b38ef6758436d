// What the product with a packed weight and the packing of its input agree on, and how a line of a weight is decoded.
// Once per instruction set, in internal linkage.
#pragma once

#include <cstring>
#include <type_traits>

#include "matvec_kernels.h"
#include "partial.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int64_t kBlockLines = 32;  // of each panel: 8 KB of a slab

// Two bfloat16 operands go through dot products of pairs; x in float32 is never rounded.
FASTSFT_INLINE bool in_pairs(const PackedLinear& call) {
#if defined(__AVX512BF16__)
  const WeightFormat format = call.weight.format;
  return call.dtype == DType::kBFloat16 && format != WeightFormat::kFloat32 && format != WeightFormat::kW8A8;
#else
  (void)call;
  return false;
#endif
}

// W8A8: dot products of four where the CPU has them; in float32, where not, the sum of a run is exact too: < 2^24.
#if defined(__AVX512VNNI__)
constexpr bool kHasDots = true;
typedef int32_t RunSum;
typedef VecInt RunSums;
#else
constexpr bool kHasDots = false;
typedef float RunSum;
typedef Vec RunSums;
#endif

template <typename T>
FASTSFT_INLINE T load_bits(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// --- decoding a line ---------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// Pair `pair` of the line's input channels as bfloat16, the odd one in the high half: the table is indexed by the low 5
// bits of each 16-bit lane, and its two halves are the same.
FASTSFT_INLINE VecBits int4_pair(const char* line, int pair) {
  alignas(64) static constexpr uint16_t kTable[32] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                      0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
  const __m512i bits = _mm512_srli_epi16(_mm512_loadu_si512(line), static_cast<unsigned>(4 * pair));
  return reinterpret_cast<VecBits>(_mm512_permutexvar_epi16(bits, _mm512_load_si512(kTable)));
}
#endif

// Vector v of a line's input channel `step`, as float32 and without its scale.
template <WeightFormat kFormat>
FASTSFT_INLINE Vec weight_at(const char* line, int step, int v) {
  if constexpr (kFormat == WeightFormat::kFloat32) return load_bits<Vec>(line + v * kVectorBytes);
  if constexpr (kFormat == WeightFormat::kBFloat16) {
    const VecBits word = load_bits<VecBits>(line + v * kVectorBytes);
    return reinterpret_cast<Vec>(step == 0 ? word << 16 : word & 0xffff0000u);
  }
  if constexpr (kFormat == WeightFormat::kInt8) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes bytes = load_bits<Bytes>(line + step * kPanelColumns + v * kLanes);
#if defined(__AVX512F__)  // the compiler's own conversion goes element by element
    const auto wide = reinterpret_cast<VecInt>(_mm512_maskz_cvtepi8_epi32(0xffff, reinterpret_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
    const auto wide =
        reinterpret_cast<VecInt>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
#else
    const VecInt wide = __builtin_convertvector(bytes, VecInt);
#endif
    return __builtin_convertvector(wide, Vec);
  }
  if constexpr (kFormat == WeightFormat::kW8A8) {
    const VecBits word = load_bits<VecBits>(line + v * kVectorBytes) << (24 - 8 * step);
    return __builtin_convertvector(reinterpret_cast<VecInt>(word) >> 24, Vec);
  }
  if constexpr (kFormat == WeightFormat::kInt4) {
#if defined(__AVX512F__)
    const VecBits word = int4_pair(line, step / 2);
    return reinterpret_cast<Vec>(step % 2 == 0 ? word << 16 : word & 0xffff0000u);
#else
    const VecBits word = load_bits<VecBits>(line + v * kVectorBytes) << (28 - step % 2 * 16 - step / 2 * 4);
    return __builtin_convertvector(reinterpret_cast<VecInt>(word) >> 28, Vec);
#endif
  }
}

#if defined(__AVX512BF16__)
// Input channels 2 pair and 2 pair + 1 as bfloat16. Integers of 8 bits are exact in it: their low half is 0.
template <WeightFormat kFormat>
FASTSFT_INLINE VecBits pair_at(const char* line, int pair) {
  if constexpr (kFormat == WeightFormat::kBFloat16) return load_bits<VecBits>(line);
  if constexpr (kFormat == WeightFormat::kInt4) return int4_pair(line, pair);
  return reinterpret_cast<VecBits>(weight_at<kFormat>(line, 2 * pair, 0)) >> 16 |
         reinterpret_cast<VecBits>(weight_at<kFormat>(line, 2 * pair + 1, 0));
}
#endif

FASTSFT_INLINE Vec as_float(Vec v) { return v; }
FASTSFT_INLINE Vec as_float(VecInt v) { return __builtin_convertvector(v, Vec); }

// Of a row of x, per line of the weight.
template <WeightFormat kFormat, bool kPairs>
constexpr int words_of_line() {
  constexpr int kDepth = static_cast<int>(line_depth(kFormat));
  return kFormat == WeightFormat::kW8A8 && kHasDots ? 1 : kPairs ? kDepth / 2 : kDepth;
}

// Ahead of the words of a run, W8A8: where the sum starts, which undoes the weights' offset, and the scale. A block is
// a run.
constexpr int kRunWords = 2;
static_assert(kBlockLines * line_depth(WeightFormat::kW8A8) == kRunChannels);

// Of a row of x, for `lines` lines from a block's first on.
template <WeightFormat kFormat, bool kPairs>
constexpr int64_t words_of_lines(int64_t lines) {
  const int64_t runs = kFormat == WeightFormat::kW8A8 ? (lines + kBlockLines - 1) / kBlockLines : 0;
  return lines * words_of_line<kFormat, kPairs>() + runs * kRunWords;
}

// Rows of the pass that serves `rows` of them: the next power of two.
FASTSFT_INLINE int pass_rows(int64_t rows) {
  int n = 1;
  while (n < rows && n < kMaxRows) n *= 2;
  return n;
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
