// One task of a matrix product, in the manner of Goto and van de Geijn (Anatomy of high-performance matrix
// multiplication, 2008): a block of A is packed into L2, a panel of B into L1, and a register tile of C is the sum over
// `depth` of outer products. Per tile of R x C and step of the depth: R + C elements from L1 and L2, R C fused
// multiply-adds (AVX-512: 14 x 32, so 28 FMAs on 16 loads). Two bfloat16 operands are packed in pairs along the depth,
// and one dot-product instruction does two steps.
#include <cstring>

#include "gemm_kernels.h"
#include "register_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int kTileColumns = kTileVecs * kLanes;
constexpr int64_t kTileSize = kTileRows * kTileColumns;
constexpr int64_t kPanelBytes = 32 << 10;  // of B

bool in_pairs(const Gemm& g) {
#if defined(__AVX512BF16__)
  return g.a.dtype == DType::kBFloat16 && g.b.dtype == DType::kBFloat16;
#else
  (void)g;
  return false;
#endif
}

// --- packing -----------------------------------------------------------------------------------------------------
// An operand seen from its panels: `across` runs over the panel's width (rows of A, columns of B), `along` the depth.
struct Source {
  DType dtype;
  const void* data;
  int64_t across_stride, along_stride;
  int64_t across_end;  // elements in the operand
  const void* at(int64_t across, int64_t along) const {
    return element(dtype, data, across * across_stride + along * along_stride);
  }
};

// One vector of the panel's words from memory that is contiguous along the depth: kLanes words, the first `have` exist.
template <typename Format>
FASTSFT_INLINE Vec words_along(DType dtype, const void* p, int64_t have) {
  alignas(64) char buffer[kLanes * 4];
  const int64_t all = kLanes * Format::kSteps;
  if (have < all) {
    std::memset(buffer, 0, sizeof(buffer));
    std::memcpy(buffer, p, static_cast<std::size_t>(have) * (dtype == DType::kFloat32 ? 4 : 2));
    p = buffer;
  }
  if constexpr (Format::kSteps == 2) return load(static_cast<const float*>(p));
  return load_as_float(dtype, p, 0);
}

// The same from memory that is contiguous across: `have` of the kLanes words exist, `steps` of a pair's two halves.
FASTSFT_INLINE VecHalf halves(const void* p, int64_t have) {
  VecHalf h{};
  std::memcpy(&h, p, static_cast<std::size_t>(smaller<int64_t>(have, kLanes)) * 2);
  return h;
}
template <typename Format>
FASTSFT_INLINE Vec words_across(const Source& s, int64_t across, int64_t along, int64_t steps) {
  const int64_t have = s.across_end - across;
  const void* p = s.at(across, along);
  if constexpr (Format::kSteps == 2) {
    const VecHalf none{};
    const VecHalf low = have >= kLanes ? halves(p, kLanes) : halves(p, have);
    const void* q = element(s.dtype, p, s.along_stride);
    const VecHalf high = steps < 2 ? none : have >= kLanes ? halves(q, kLanes) : halves(q, have);
    return reinterpret_cast<Vec>(widen(low) | (widen(high) << 16));
  } else {
    if (have >= kLanes) return load_as_float(s.dtype, p, 0);
    alignas(64) char buffer[kLanes * 4] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(have) * (s.dtype == DType::kFloat32 ? 4 : 2));
    return load_as_float(s.dtype, buffer, 0);
  }
}

// panel[word * kWidth + i] = the words of elements across + i, i < kWidth, over `depth` steps; zeros past the operand's
// end and past the depth. Vectors are stored whole and in ascending order, so where kWidth is no multiple of kLanes
// the lanes too many are overwritten by what follows; the panel needs a vector's room behind its end.
template <typename Format, int kWidth>
FASTSFT_NOINLINE void pack(const Source& s, int64_t across, int64_t along, int64_t depth,
                           typename Format::Word* panel) {
  constexpr int kSteps = Format::kSteps;
  float* const out = reinterpret_cast<float*>(panel);
  const int64_t words = (depth + kSteps - 1) / kSteps;
  if (s.along_stride == 1) {
    for (int64_t i = 0; i < kWidth; i += kLanes) {
      for (int64_t w = 0; w < words; w += kLanes) {
        const int64_t have = depth - w * kSteps;
        Vec block[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          const bool exists = i + j < kWidth && across + i + j < s.across_end;
          block[j] = exists ? words_along<Format>(s.dtype, s.at(across + i + j, along + w * kSteps), have) : Vec{};
        }
        transpose(block);
        const int64_t rows = smaller<int64_t>(kLanes, words - w);
        for (int64_t j = 0; j < rows; ++j) store(out + (w + j) * kWidth + i, block[j]);
      }
    }
    return;
  }
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t i = 0; i < kWidth; i += kLanes) {
      const bool exists = across + i < s.across_end;
      store(out + w * kWidth + i,
            exists ? words_across<Format>(s, across + i, along + w * kSteps, depth - w * kSteps) : Vec{});
    }
  }
}

// --- the register tile -------------------------------------------------------------------------------------------
// tile[i][j] = (tile[i][j] if `add`) + sum over words of a[word][i] b[word][j]
template <typename Format>
FASTSFT_NOINLINE void multiply(const typename Format::Word* a, const typename Format::Word* b, int64_t words, bool add,
                               float* tile) {
  Vec sum[kTileRows][kTileVecs];
  multiply_tile<Format, Left::kColumns, kTileRows>(a, b, kTileColumns, words, sum, [] {});
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVecs; ++j) {
      float* place = tile + i * kTileColumns + j * kLanes;
      store(place, add ? sum[i][j] + load(place) : sum[i][j]);
    }
  }
}

// The part of the tile that lies in C, in C's type.
FASTSFT_NOINLINE void store_tile(const Gemm& g, const float* tile, int64_t row, int64_t column, int64_t row_end,
                                 int64_t column_end) {
  const int64_t rows = smaller<int64_t>(kTileRows, row_end - row);
  const int64_t columns = smaller<int64_t>(kTileColumns, column_end - column);
  for (int64_t i = 0; i < rows; ++i) {
    void* out = element(g.c_dtype, g.c, (row + i) * g.c_stride + column);
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v = load(tile + i * kTileColumns + j);
      if (columns - j >= kLanes) {
        if (g.accumulate) v += load_as_float(g.c_dtype, out, j);
        store_from_float(g.c_dtype, out, j, v);
        continue;
      }
      alignas(64) char buffer[kLanes * 4] = {};
      const auto bytes = static_cast<std::size_t>(columns - j) * (g.c_dtype == DType::kFloat32 ? 4 : 2);
      if (g.accumulate) {
        std::memcpy(buffer, element(g.c_dtype, out, j), bytes);
        v += load_as_float(g.c_dtype, buffer, 0);
      }
      store_from_float(g.c_dtype, buffer, 0, v);
      std::memcpy(element(g.c_dtype, out, j), buffer, bytes);
    }
  }
}

// --- the task ----------------------------------------------------------------------------------------------------
template <typename Format>
constexpr int64_t max_depth() {
  return kPanelBytes / (kTileColumns * 4) * Format::kSteps;
}

// The depth cut into equal parts of at most max_depth, each a whole number of words.
template <typename Format>
int64_t block_depth(int64_t k) {
  const int64_t blocks = larger<int64_t>(1, (k + max_depth<Format>() - 1) / max_depth<Format>());
  return round_up(larger<int64_t>(1, (k + blocks - 1) / blocks), Format::kSteps);
}

struct Scratch {
  int64_t a_panel, a_words, b_words, tiles;  // sizes in 4-byte words
};

template <typename Format>
Scratch layout(const Gemm& g, int64_t rows, int64_t columns) {
  const int64_t words = block_depth<Format>(g.k) / Format::kSteps;
  const int64_t row_panels = (rows + kTileRows - 1) / kTileRows;
  const int64_t tiles = row_panels * ((columns + kTileColumns - 1) / kTileColumns);
  const bool one_block = block_depth<Format>(g.k) >= g.k;
  return {.a_panel = words * kTileRows,
          .a_words = round_up(row_panels * words * kTileRows + kLanes, 16),
          .b_words = round_up(words * kTileColumns + kLanes, 16),
          .tiles = (one_block ? 1 : tiles) * kTileSize};
}

template <typename Format>
void task_as(const Gemm& g, const GemmTask& t, char* scratch) {
  using Word = typename Format::Word;
  const Scratch size = layout<Format>(g, t.row_end - t.row, t.column_end - t.column);
  Word* const a = reinterpret_cast<Word*>(scratch);
  Word* const b = a + size.a_words;
  float* const tiles = reinterpret_cast<float*>(b + size.b_words);
  const Source rows{g.a.dtype, g.a.data, g.a.row_stride, g.a.column_stride, t.row_end};
  const Source columns{g.b.dtype, g.b.data, g.b.column_stride, g.b.row_stride, t.column_end};
  const int64_t depth = block_depth<Format>(g.k);
  for (int64_t k = 0; k == 0 || k < g.k; k += depth) {
    const int64_t steps = smaller(depth, g.k - k), words = (steps + Format::kSteps - 1) / Format::kSteps;
    const bool is_last = k + depth >= g.k;
    Word* panel = a;
    for (int64_t i = t.row; i < t.row_end; i += kTileRows, panel += size.a_panel) {
      pack<Format, kTileRows>(rows, i, k, steps, panel);
    }
    float* tile = tiles;
    for (int64_t j = t.column; j < t.column_end; j += kTileColumns) {
      pack<Format, kTileColumns>(columns, j, k, steps, b);
      panel = a;
      for (int64_t i = t.row; i < t.row_end; i += kTileRows, panel += size.a_panel) {
        multiply<Format>(panel, b, words, k > 0, tile);
        if (is_last) store_tile(g, tile, i, j, t.row_end, t.column_end);
        if (depth < g.k) tile += kTileSize;
      }
    }
  }
}

}  // namespace

GemmBlocking gemm_blocking(const Gemm& g) {
  return {kTileRows, kTileColumns, in_pairs(g) ? max_depth<Pair>() : max_depth<Single>()};
}

int64_t gemm_scratch_bytes(const Gemm& g, int64_t rows, int64_t columns) {
  const Scratch s = in_pairs(g) ? layout<Pair>(g, rows, columns) : layout<Single>(g, rows, columns);
  return (s.a_words + s.b_words + s.tiles) * 4;
}

void gemm_task(const Gemm& g, const GemmTask& task, char* scratch) {
#if defined(__AVX512BF16__)
  if (in_pairs(g)) return task_as<Pair>(g, task, scratch);
#endif
  task_as<Single>(g, task, scratch);
}

}  // namespace fastsft::FASTSFT_ISA_NS
