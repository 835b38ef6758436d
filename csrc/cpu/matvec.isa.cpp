// Per call of M rows: the weight is read once (4, 2, 1 or about 0.56 bytes per element), 2 M flops per element. At one
// row memory-bound by far; the arithmetic of a core with AVX-512 draws level with its memory at about 16 rows (float32;
// bfloat16 in dot products; W8A8), 8 rows (int8) and 4 (int4).
//
// A pass multiplies up to 16 rows with a slab, block by block: both then stay in L1 while some panels and up to 8 rows
// at a time go by, their sums in registers. A sum runs over the input channels of a block (int4: over 32) in ascending
// order and is folded into the total, however many rows and panels go together. Compiled without -fassociative-math and
// contraction (CMakeLists.txt): a row's sums must not depend on the pass it is in.
#include <type_traits>

#include "matvec_line.h"
#include "prefetch.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int kVecs = kPanelColumns / kLanes, kSlabVecs = kSlabPanels * kVecs;
constexpr int64_t kSlabScales = kSlabPanels * kPanelColumns * 2;  // bytes of a group, int4
#if defined(__AVX512F__)
constexpr int kSums = 16;  // vectors of sums in registers
#else
constexpr int kSums = 8;
#endif
// Bytes fetched ahead: a block, so that while some panels of one go by theirs of the next are on the way.
constexpr int64_t kAhead = kBlockLines * kSlabPanels * kLineBytes;

FASTSFT_INLINE Vec scale_at(const char* bfloat16) {
#if defined(__AVX512F__)  // one instruction, where widen_bfloat16 becomes five
  const __m256i half = load_bits<__m256i>(bfloat16);
  return reinterpret_cast<Vec>(reinterpret_cast<VecBits>(_mm512_maskz_cvtepu16_epi32(0xffff, half)) << 16);
#else
  return widen_bfloat16(load_bits<VecHalf>(bfloat16));
#endif
}

// A block of a slab, from some panel on.
struct Block {
  const char* data;     // the panel's first line
  int64_t lines, step;  // of each panel; bytes from one to the next
  const char* scales;   // int4: of the panel's first group
  int group_shift;      // int4: lines of a group, as a power of two
  bool first;           // of the slab: nothing is in the total yet
  int64_t ahead;        // bytes from a line to the first one to ask for meanwhile
  Prefetch fetch;
};

// total[row][panel] += x[row] times kPanels panels, scales of groups included; x holds kWidth rows, of which kRows
// count.
template <WeightFormat kFormat, bool kPairs, int kWidth, int kRows, int kPanels>
FASTSFT_NOINLINE void multiply(const Block& block, const uint32_t* x, Vec* total) {
  constexpr int kSteps = words_of_line<kFormat, kPairs>(), kVectors = kPanels * kVecs;
  constexpr int64_t kFold = kFormat == WeightFormat::kInt4 ? 32 / line_depth(kFormat) : kBlockLines;
  constexpr bool kRuns = kFormat == WeightFormat::kW8A8;
  constexpr int kAsked = kPanels * kRows / kWidth > 0 ? kPanels * kRows / kWidth : 1;
  const uint32_t* const scale_of_run = x + kWidth;
  const char* line = block.data;
  for (int64_t begin = 0; begin < block.lines; begin += kFold) {
    std::conditional_t<kRuns, RunSums, Vec> sum[kRows][kVectors] = {};
    if constexpr (kRuns) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum[r][i] += load_bits<RunSum>(x + r);
      }
      x += kRunWords * kWidth;
    }
    for (int64_t left = smaller(kFold, block.lines - begin); left > 0; --left) {
#pragma GCC unroll 4
      for (int p = 0; p < kAsked; ++p) block.fetch(line + p * kLineBytes + block.ahead);
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
          const char* const source = line + i / kVecs * kLineBytes;
          if constexpr (kRuns && kHasDots) {
#if defined(__AVX512VNNI__)
            // The first operand has no sign: the weights go in 128 too high.
            const __m512i high = _mm512_xor_si512(_mm512_loadu_si512(source), _mm512_set1_epi8(-128));
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
              const __m512i four = _mm512_set1_epi32(static_cast<int>(x[s * kWidth + r]));
              sum[r][i] =
                  reinterpret_cast<VecInt>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[r][i]), high, four));
            }
#endif
          } else if constexpr (kPairs) {
#if defined(__AVX512BF16__)
            const auto pair = reinterpret_cast<__m512bh>(pair_at<kFormat>(source, s));
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
              const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[s * kWidth + r])));
              sum[r][i] = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[r][i]), pair, both));
            }
#endif
          } else {
            const Vec weight = weight_at<kFormat>(source, s, i % kVecs);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
              sum[r][i] = fused_multiply_add(weight, splat(load_bits<float>(x + s * kWidth + r)), sum[r][i]);
            }
          }
        }
      }
      line += block.step;
      x += kSteps * kWidth;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kFormat == WeightFormat::kInt4) {
        const char* const scales = block.scales + (begin >> block.group_shift) * kSlabScales + i * kLanes * 2;
        if (i == 0) __builtin_prefetch(scales + kLineBytes * 16);
        const Vec scale = scale_at(scales);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec before = block.first && begin == 0 ? Vec{} : total[r * kSlabVecs + i];
          total[r * kSlabVecs + i] = fused_multiply_add(sum[r][i], scale, before);
        }
      } else if constexpr (kRuns) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec scale = splat(load_bits<float>(scale_of_run + r));
          const Vec before = block.first && begin == 0 ? Vec{} : total[r * kSlabVecs + i];
          total[r * kSlabVecs + i] = fused_multiply_add(as_float(sum[r][i]), scale, before);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          total[r * kSlabVecs + i] = block.first ? sum[r][i] : total[r * kSlabVecs + i] + sum[r][i];
        }
      }
    }
  }
}

// kCount vectors of columns from `column` on, of rows [row, row + rows), from their totals. Several are whole.
template <DType kIn, DType kOut, bool kAdd, int kCount>
FASTSFT_INLINE void write_columns(const PackedLinear& call, const Vec* total, int64_t row, int64_t rows,
                                  int64_t column) {
  const PackedWeight& w = call.weight;
  const int64_t have = kCount > 1 ? kCount * kLanes : w.n - column;
  const bool scaled = w.format == WeightFormat::kInt8 || w.format == WeightFormat::kW8A8;
  Vec scale[kCount], bias[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    scale[i] = scaled ? load(static_cast<const float*>(w.scales) + column + i * kLanes) : splat(1);
    bias[i] = call.bias ? load_until(DType::kFloat32, call.bias + column, i * kLanes, have) : Vec{};
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * w.n + column;
    void* const out = element(kOut, call.out, at);
    const void* const residual = kAdd ? element(kIn, call.residual, at) : nullptr;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      Vec value = fused_multiply_add(total[r * kSlabVecs + i], scale[i], bias[i]);
      if (kAdd) value = rounded(kIn, value) + load_until(kIn, residual, i * kLanes, have);
      store_until(kOut, out, i * kLanes, have, value);
    }
  }
}

template <DType kIn, DType kOut, bool kAdd>
FASTSFT_NOINLINE void write_slab(const PackedLinear& call, const Vec* total, int64_t row, int64_t rows, int64_t slab) {
  const int64_t first = slab * kSlabPanels * kPanelColumns;
  if (call.weight.n - first >= kSlabPanels * kPanelColumns) {
    return write_columns<kIn, kOut, kAdd, kSlabVecs>(call, total, row, rows, first);
  }
  for (int i = 0; first + i * kLanes < call.weight.n; ++i) {
    write_columns<kIn, kOut, kAdd, 1>(call, total + i, row, rows, first + i * kLanes);
  }
}

FASTSFT_INLINE void write_out(const PackedLinear& call, const Vec* total, int64_t row, int64_t rows, int64_t slab) {
  with_dtype(call.out_dtype, [&]<DType kOut>() {
    if (!call.residual) return write_slab<kOut, kOut, false>(call, total, row, rows, slab);
    with_dtype(call.dtype, [&]<DType kIn>() { write_slab<kIn, kOut, true>(call, total, row, rows, slab); });
  });
}

// Asks for rows of what a pass writes: a large result is in no near cache, and the pieces of its rows are too short for
// the CPU to see the next ones coming.
FASTSFT_INLINE void ask_for_out(const PackedLinear& call, int64_t row, int64_t rows, int64_t slab) {
  constexpr int64_t kChannels = kSlabPanels * kPanelColumns;
  const int64_t have = smaller(kChannels, call.weight.n - slab * kChannels);
  const auto bytes = static_cast<int64_t>(bytes_of(call.out_dtype, have));
  for (int64_t r = row; r < row + rows; ++r) {
    const char* const out =
        static_cast<const char*>(element(call.out_dtype, call.out, r * call.weight.n + slab * kChannels));
    for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(out + at, 1);
  }
}

// Rows [row, row + kRows) that exist, of slab `slab`; x are their words.
template <WeightFormat kFormat, bool kPairs, int kRows>
FASTSFT_NOINLINE void pass(const PackedLinear& call, const uint32_t* x, int64_t row, int64_t slab) {
  constexpr int kWanted = kFormat == WeightFormat::kInt8 ? 8 : 4;  // a conversion of int8 serves more rows then
  constexpr int kMost = kSums / kVecs < kWanted ? kSums / kVecs : kWanted, kPart = kRows < kMost ? kRows : kMost;
  constexpr int kFit = kSums / kVecs / kPart, kPanels = kFit < kSlabPanels ? kFit : kSlabPanels;
  const PackedWeight& w = call.weight;
  const int64_t first = slab * kSlabPanels, panels = smaller(kSlabPanels, panel_count(w.n) - first);
  const int64_t lines = panel_lines(kFormat, w.k);
  const char* data = static_cast<const char*>(w.data) + slab * slab_bytes(kFormat, w.k);
  Block block{.data = nullptr,
              .lines = 0,
              .step = panels * kLineBytes,
              .scales = nullptr,
              .group_shift = 0,
              .first = true,
              .ahead = 0,
              .fetch = {}};
  // A CPU that streams by itself does so in a block's first part; while the others read it again nothing would come.
  const int64_t ahead = !block.fetch.into_second ? kAhead : kPart < kRows ? kAhead * 3 / 2 : 0;
  if (kFormat == WeightFormat::kInt4) block.group_shift = w.group == 32 ? 2 : 3;
  const char* const scales = static_cast<const char*>(w.scales) +
                             slab * (kFormat == WeightFormat::kInt4 ? (w.k + w.group - 1) / w.group * kSlabScales : 0);
  const int64_t rows = smaller<int64_t>(kRows, call.rows - row);
  Vec total[kRows * kSlabVecs];
  if (lines == 0)  // k = 0
    fill_zero(reinterpret_cast<float*>(total), reinterpret_cast<float*>(total + kRows * kSlabVecs));
  for (int64_t begin = 0; begin < lines; begin += kBlockLines) {
    block.lines = smaller(kBlockLines, lines - begin);
    block.first = begin == 0;
    if (call.rows > kMaxRows) {
      const int64_t asked = rows * begin / lines;
      ask_for_out(call, row + asked, rows * (begin + block.lines) / lines - asked, slab);
    }
    for (int64_t panel = 0; panel < panels;) {
      block.data = data + panel * kLineBytes;
      if (kFormat == WeightFormat::kInt4) {
        block.scales = scales + (begin >> block.group_shift) * kSlabScales + panel * kPanelColumns * 2;
      }
      Vec* const sums = total + panel * kVecs;
      const bool several = panel + kPanels <= panels;
      const auto part =
          several ? multiply<kFormat, kPairs, kRows, kPart, kPanels> : multiply<kFormat, kPairs, kRows, kPart, 1>;
      for (int r = 0; r < kRows; r += kPart) {
        block.ahead = ahead + (several ? kPanels * r / kRows * kLineBytes : 0);
        part(block, x + r, sums + r * kSlabVecs);
      }
      panel += several ? kPanels : 1;
    }
    data += block.lines * block.step;
    x += words_of_lines<kFormat, kPairs>(block.lines) * kRows;
  }
  write_out(call, total, row, rows, slab);
}

template <WeightFormat kFormat, bool kPairs>
void all_rows(const PackedLinear& call, const uint32_t* x, int64_t slab) {
  const int64_t words = words_of_lines<kFormat, kPairs>(panel_lines(kFormat, call.weight.k));
  for (int64_t row = 0; row < call.rows; row += kMaxRows) {
    const uint32_t* const mine = x + row * words;
    switch (pass_rows(call.rows - row)) {
      case 1: pass<kFormat, kPairs, 1>(call, mine, row, slab); break;
      case 2: pass<kFormat, kPairs, 2>(call, mine, row, slab); break;
      case 4: pass<kFormat, kPairs, 4>(call, mine, row, slab); break;
      case 8: pass<kFormat, kPairs, 8>(call, mine, row, slab); break;
      case 16: pass<kFormat, kPairs, 16>(call, mine, row, slab); break;
    }
  }
}

template <WeightFormat kFormat>
void either_input(const PackedLinear& call, const uint32_t* x, int64_t slab) {
#if defined(__AVX512BF16__)
  constexpr bool kPairs = kFormat != WeightFormat::kFloat32 && kFormat != WeightFormat::kW8A8;
  if (in_pairs(call)) return all_rows<kFormat, kPairs>(call, x, slab);
#endif
  all_rows<kFormat, false>(call, x, slab);
}

}  // namespace

void matvec_slabs(const PackedLinear& call, const uint32_t* words, int64_t begin, int64_t end) {
  for (int64_t slab = begin; slab < end; ++slab) {
    switch (call.weight.format) {
      case WeightFormat::kFloat32: either_input<WeightFormat::kFloat32>(call, words, slab); break;
      case WeightFormat::kBFloat16: either_input<WeightFormat::kBFloat16>(call, words, slab); break;
      case WeightFormat::kInt8: either_input<WeightFormat::kInt8>(call, words, slab); break;
      case WeightFormat::kInt4: either_input<WeightFormat::kInt4>(call, words, slab); break;
      case WeightFormat::kW8A8: all_rows<WeightFormat::kW8A8, false>(call, words, slab); break;
    }
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
