// The mask of a tile, the packed forms of its operands and their register-blocked product.
// Included by attention_*.isa.cpp only.
//
// Every product is C[i, j] += sum_k a(i, k) b(k, j) over words (register_tile.h). A's words are broadcast from where
// they lie, so only B has to be rearranged.
#pragma once

#include "register_tile.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fastsft::FASTSFT_ISA_NS {
namespace {

inline constexpr int64_t kCacheLine = 64;
// Where the rows of a product are keys: a strip that never straddles two vectors of columns.
inline constexpr int kKeyStrip = kTileRows > 8 ? 8 : 4;

#if defined(__AVX512BF16__)
using Bfloat16Format = Pair;
#else
using Bfloat16Format = Single;  // converted to float32
#endif
// Probabilities in pairs are rounded to bfloat16 (4e-3): there a relative error of 3e-6 is enough.
template <typename Format>
inline constexpr int kExpDegree = Format::kSteps == 1 ? 6 : 4;

// --- masks -------------------------------------------------------------------------------------------------------

// Rows of a query tile are (token, query head of the group), token first, so that a strip of rows covers few tokens and
// a causal mask cuts it close. Columns are keys of one block. Both are counted from the tile's and the block's start.
struct RowPlace {
  int64_t token, head;
};
FASTSFT_INLINE RowPlace place_of(int64_t row, int64_t group) { return {row / group, row % group}; }
// Stepping on costs a comparison where another division would cost ten of them.
FASTSFT_INLINE void advance(RowPlace& place, int64_t group) {
  if (++place.head == group) place = {place.token + 1, 0};
}

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

// --- prefetching -------------------------------------------------------------------------------------------------

// Asks for one row ahead of its use. A call's tensors exceed the second-level cache, and the rows of one key head are
// too short for the processor to see the next ones coming.
FASTSFT_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// Rows to ask for, a line in each step of the products that follow: asked for all at once, they would fill the
// processor's queue of misses, and it would stand still until they are there.
class RowQueue {
 public:
  explicit RowQueue(int64_t row_bytes) : row_bytes_(row_bytes) {}

  void add(const void* row) { rows_[end_++ % kRoom] = static_cast<const char*>(row); }
  FASTSFT_INLINE void step() {
    if (next_ == end_) return;
    __builtin_prefetch(rows_[next_ % kRoom] + offset_);
    offset_ += kCacheLine;
    if (offset_ < row_bytes_) return;
    offset_ = 0;
    ++next_;
  }
  // The rest at once.
  void finish() {
    while (next_ != end_) step();
  }

 private:
  static constexpr uint32_t kRoom = 256;  // a longer queue forgets rows, which costs time only
  const char* rows_[kRoom];
  uint32_t next_ = 0, end_ = 0;
  int64_t row_bytes_, offset_ = 0;
};

// --- packing -----------------------------------------------------------------------------------------------------

// Distance of rows whose words lie along k (pack_rows), for head sizes up to kMaxDim. A constant, so that a register
// tile's rows share one address register; an odd number of cache lines, so that they do not share cache sets.
template <typename Format, int64_t kMaxDim>
inline constexpr int64_t kRowPitch = kMaxDim / Format::kSteps + 16;

template <typename Format, int64_t kMaxDim>
FASTSFT_INLINE void pack_rows(DType dtype, const void* const* rows, int64_t n, int64_t dim,
                              typename Format::Word* panel) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>;
  if constexpr (Format::kSteps == 1) return load_rows(dtype, rows, n, dim, panel, kPitch);
  for (int64_t i = 0; i < n; ++i) std::memcpy(panel + i * kPitch, rows[i], static_cast<std::size_t>(dim) * 2);
}

// panel[word * stride + j] = word of row j, for j < n rounded up to whole vectors; rows past n count as zeros.
template <typename Format>
FASTSFT_NOINLINE void pack_columns(DType dtype, const void* const* rows, int64_t n, int64_t dim,
                                   typename Format::Word* panel, int64_t stride) {
  if constexpr (Format::kSteps == 1) {
    load_transposed(dtype, rows, n, 0, dim, panel, stride);
  } else {
    load_transposed_as<DType::kFloat32>(rows, n, 0, dim / 2, reinterpret_cast<float*>(panel), stride);
  }
}

// panel[k * dim + d] = element d of row k, or of rows 2 k and 2 k + 1; an odd last row's partner counts as zeros.
template <typename Format>
FASTSFT_NOINLINE void pack_stack(DType dtype, const void* const* rows, int64_t n, int64_t dim,
                                 typename Format::Word* panel) {
  if constexpr (Format::kSteps == 1) {
    load_rows(dtype, rows, n, dim, panel, dim);
  } else {
    for (int64_t k = 0; k < n; k += 2, panel += dim) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        VecHalf low, high{};
        std::memcpy(&low, static_cast<const uint16_t*>(rows[k]) + d, sizeof(low));
        if (k + 1 < n) std::memcpy(&high, static_cast<const uint16_t*>(rows[k + 1]) + d, sizeof(high));
        const VecBits words = widen(low) | widen(high) << 16;
        std::memcpy(panel + d, &words, sizeof(words));
      }
    }
  }
}

// Probabilities and their gradients in the two forms that products want: words along the columns, here those of one
// row from an even `column` on ...
template <typename Format>
FASTSFT_INLINE void store_along_columns(Vec values, void* row, int64_t column) {
#if defined(__AVX512BF16__)
  if constexpr (Format::kSteps == 2) {
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(values));
    std::memcpy(static_cast<uint16_t*>(row) + column, &halves, sizeof(halves));
    return;
  }
#endif
  store(static_cast<float*>(row) + column, values);
}
// ... and words along the rows: `values` are kSteps neighbouring rows.
template <typename Format>
FASTSFT_INLINE void store_along_rows(const Vec* values, typename Format::Word* words) {
#if defined(__AVX512BF16__)
  if constexpr (Format::kSteps == 2) {
    const auto low = reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(values[0])));
    const auto high = reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(values[1])));
    const VecBits zipped = widen(low) | widen(high) << 16;
    std::memcpy(words, &zipped, sizeof(zipped));
    return;
  }
#endif
  store(reinterpret_cast<float*>(words), values[0]);
}

// --- the product -------------------------------------------------------------------------------------------------

// C = factor * product, C + factor * product, or factors[i] * C + product
enum class Into { kStore, kAdd, kRescale };

// kRows rows and kVecs * kLanes columns. Starting the chain from zero, not from C, keeps the rounding error of long
// sums low.
template <typename Format, Left kLeft, int64_t kPitch, Into kInto, int kVecs, int kRows, typename Word>
FASTSFT_NOINLINE void multiply(const Word* a, const Word* b, int64_t ldb, int64_t words, float* c, int64_t ldc,
                               const float* factors, RowQueue& queue) {
  Vec sum[kRows][kVecs];
  multiply_tile<Format, kLeft, kPitch>(a, b, ldb, words, sum, [&] { queue.step(); });
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const float factor = factors[kInto == Into::kRescale ? i : 0];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* place = c + i * ldc + j * kLanes;
      if (kInto == Into::kStore) store(place, sum[i][j] * factor);
      if (kInto == Into::kAdd) store(place, load(place) + sum[i][j] * factor);
      if (kInto == Into::kRescale) store(place, load(place) * factor + sum[i][j]);
    }
  }
}

// One strip of at most kTileRows rows and a multiple of kLanes columns. The register tile used has as many rows or a
// few more: what A holds below the strip is read, and what C holds below it is overwritten with sums of its own.
template <typename Format, Left kLeft, int64_t kPitch, Into kInto, int kRows = kTileRows, typename Word>
FASTSFT_INLINE void product_chain(int64_t rows, int64_t width, const Word* a, const Word* b, int64_t ldb, int64_t words,
                                  float* c, int64_t ldc, const float* factors, RowQueue& queue) {
  constexpr int kFewer = kRows > 8 ? 8 : kRows > 4 ? 4 : 2;
  if constexpr (kRows > 2) {
    if (rows <= kFewer) {
      return product_chain<Format, kLeft, kPitch, kInto, kFewer>(rows, width, a, b, ldb, words, c, ldc, factors, queue);
    }
  }
  int64_t n = 0;
  for (; n + kTileVecs * kLanes <= width; n += kTileVecs * kLanes) {
    multiply<Format, kLeft, kPitch, kInto, kTileVecs, kRows>(a, b + n, ldb, words, c + n, ldc, factors, queue);
  }
  for (; n < width; n += kLanes) {
    multiply<Format, kLeft, kPitch, kInto, 1, kRows>(a, b + n, ldb, words, c + n, ldc, factors, queue);
  }
}

// The same; chains longer than kChain are cut, which bounds their error.
inline constexpr int64_t kChain = 64;
template <typename Format, Left kLeft, int64_t kPitch, Into kInto, typename Word = typename Format::Word>
FASTSFT_NOINLINE void product(int64_t rows, int64_t width, const Word* a, const Word* b, int64_t ldb, int64_t words,
                              float* c, int64_t ldc, const float* factors, RowQueue& queue) {
  product_chain<Format, kLeft, kPitch, kInto>(rows, width, a, b, ldb, smaller(words, kChain), c, ldc, factors, queue);
  if constexpr (kInto != Into::kRescale) {  // whose words are the keys of one block
    for (int64_t k = kChain; k < words; k += kChain) {
      product_chain<Format, kLeft, kPitch, Into::kAdd>(rows, width, a + k * (kLeft == Left::kRows ? 1 : kPitch),
                                                       b + k * ldb, ldb, smaller(words - k, kChain), c, ldc, factors,
                                                       queue);
    }
  }
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
