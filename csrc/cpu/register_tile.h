// The register tile under every matrix product: sum[i][j] += sum_k a(i, k) b(k, j) over words, where a word is one
// float or, where the CPU multiplies bfloat16 in pairs, two bfloat16 that are neighbours along k. R x C vectors cost R
// broadcasts, C loads and R C multiply-adds per word, so the tile fills the register file (AVX-512: 28 sums, 2 columns
// and a broadcast of 32 registers).
// Included by *.isa.cpp only.
#pragma once

#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fastsft::FASTSFT_ISA_NS {
namespace {

#if defined(__AVX512F__)
inline constexpr int kTileRows = 14;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 6;
#else
inline constexpr int kTileRows = 4;
#endif
inline constexpr int kTileVecs = 2;
static_assert(kTileRows <= kLanes && kTileRows % 2 == 0);  // one lane per row; pairs of rows never straddle two strips

struct Single {
  using Word = float;
  static constexpr int kSteps = 1;
};
struct Pair {
  using Word = uint32_t;
  static constexpr int kSteps = 2;
};

FASTSFT_INLINE Vec spread(float word) { return splat(word); }
FASTSFT_INLINE Vec spread(uint32_t word) { return reinterpret_cast<Vec>(VecBits{} + word); }

// sum + a * b by lanes of one word each
template <typename Format>
FASTSFT_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (Format::kSteps == 2) {
    return reinterpret_cast<Vec>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a)));
  }
#endif
  return sum + a * b;
}

enum class Left { kRows, kColumns };  // a(i, k) is a[i * kPitch + k] or a[k * kPitch + i]

// One fused chain per element from zero, in ascending k; b's rows are ldb words apart. before_step() is called once per
// word.
template <typename Format, Left kLeft, int64_t kPitch, int kRows, int kVecs, typename Word, typename BeforeStep>
FASTSFT_INLINE void multiply_tile(const Word* a, const Word* b, int64_t ldb, int64_t words, Vec (&sum)[kRows][kVecs],
                                  BeforeStep before_step) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec{};
  }
  for (int64_t k = 0; k < words; ++k) {
    before_step();
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) row[j] = load(reinterpret_cast<const float*>(b) + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = spread(a[kLeft == Left::kRows ? i * kPitch : i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j] = multiply_add<Format>(sum[i][j], x, row[j]);
    }
    a += kLeft == Left::kRows ? 1 : kPitch;
    b += ldb;
  }
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
