// The mask of a tile and the register-blocked product of the attention kernels. Included by attention_*.isa.cpp only.
#pragma once

#include "simd.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

#if defined(__AVX512F__)
inline constexpr int kStrip = 8;
#else
inline constexpr int kStrip = 4;
#endif
// kStrip: rows of a register block. It divides kLanes, so a block of kStrip columns never straddles two vectors.

// Rows of a query tile are (token, query head of the group), token first, so that a strip of rows covers few tokens and
// a causal mask cuts it close. Columns are keys of one block. Both are counted from the tile's and the block's start.
struct Band {
  int64_t first, last;  // visible columns [first, last) of one row
};
FASTSFT_INLINE Band visible_band(int64_t position, int64_t left, int64_t right, int64_t block_start, int64_t keys) {
  return {larger<int64_t>(position - left - block_start, 0),
          smaller<int64_t>(position + right + 1 - block_start, keys)};
}
FASTSFT_INLINE VecInt inside(const Band& band, int64_t column) {
  VecInt index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  index += static_cast<int32_t>(column);
  return (index >= static_cast<int32_t>(band.first)) & (index < static_cast<int32_t>(band.last));
}

enum class Start { kZero, kAdd, kScale };
enum class Left { kRows, kColumns };  // a(i, k) is A[i * lda + k] or A[k * lda + i]

// C = product, C + product, or C * factors + product (factors per row), for kStrip rows and kVecs * kLanes columns;
// product[i, ...] = sum_k a(i, k) * B[k, ...], one fused chain per element in ascending k. Starting the chain from
// zero, not from C, keeps the rounding error of long sums low.
template <int kVecs, Start kStart, Left kLeft>
FASTSFT_INLINE void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                  const float* factors, int64_t depth) {
  Vec sum[kStrip][kVecs];
  for (int i = 0; i < kStrip; ++i) {
    for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + k * ldb + j * kLanes);
    for (int i = 0; i < kStrip; ++i) {
      const float x = kLeft == Left::kRows ? a[i * lda + k] : a[k * lda + i];
      for (int j = 0; j < kVecs; ++j) sum[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < kStrip; ++i) {
    for (int j = 0; j < kVecs; ++j) {
      float* place = c + i * ldc + j * kLanes;
      if (kStart == Start::kAdd) sum[i][j] += load(place);
      if (kStart == Start::kScale) sum[i][j] += load(place) * factors[i];
      store(place, sum[i][j]);
    }
  }
}

// The same for any width that is a multiple of kLanes. Chains longer than kChain are cut, which bounds their error.
inline constexpr int64_t kChain = 64;
template <Start kStart, Left kLeft>
FASTSFT_NOINLINE void product_links(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                    const float* factors, int64_t depth, int64_t width) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= width; n += 2 * kLanes) {
    product_block<2, kStart, kLeft>(a, lda, b + n, ldb, c + n, ldc, factors, depth);
  }
  if (n < width) product_block<1, kStart, kLeft>(a, lda, b + n, ldb, c + n, ldc, factors, depth);
}
template <Start kStart, Left kLeft>
FASTSFT_INLINE void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                            const float* factors, int64_t depth, int64_t width) {
  product_links<kStart, kLeft>(a, lda, b, ldb, c, ldc, factors, smaller(depth, kChain), width);
  for (int64_t k = kChain; k < depth; k += kChain) {
    product_links<Start::kAdd, kLeft>(a + k * (kLeft == Left::kRows ? 1 : lda), lda, b + k * ldb, ldb, c, ldc, nullptr,
                                      smaller(depth - k, kChain), width);
  }
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
