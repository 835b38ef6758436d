// Per call of M rows: the weight is read once (4, 2, 1 or about 0.56 bytes per element), 2 M flops per element. At one
// row memory-bound by far; the arithmetic of a core with AVX-512 draws level with its memory at about 16 rows (float32;
// bfloat16 in dot products; W8A8), 8 rows (int8) and 4 (int4).
//
// A pass multiplies up to 16 rows with a slab, block by block: both then stay in L1 while some panels and up to 8 rows
// at a time go by, their sums in registers. A sum runs over the input channels of a block (int4: over 32) in ascending
// order and is folded into the total, however many rows and panels go together. Compiled without -fassociative-math and
// contraction (CMakeLists.txt): a row's sums must not depend on the pass it is in.
#include "fastsft/matvec.h"

#include <type_traits>

#include "matvec_kernels.h"
#include "partial.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int kVecs = kPanelColumns / kLanes, kSlabVecs = kSlabPanels * kVecs;
constexpr int64_t kSlabScales = kSlabPanels * kPanelColumns * 2;  // bytes of a group, int4
#if defined(__AVX512F__)
constexpr int kSums = 16;  // vectors of sums in registers
#else
constexpr int kSums = 8;
#endif
constexpr int kMaxRows = 16;         // of a pass
constexpr int64_t kBlockLines = 32;  // of each panel: 8 KB of a slab
// Bytes fetched ahead: a block, so that while some panels of one go by theirs of the next are on the way.
constexpr int64_t kAhead = kBlockLines * kSlabPanels * kLineBytes;

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

// One rounding where the instruction set has it. Spelt out, and contraction is off: of two products added, which of
// them the compiler fuses would differ between passes.
FASTSFT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
#else
  return sum + a * b;
#endif
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

FASTSFT_INLINE Vec scale_at(const char* bfloat16) {
#if defined(__AVX512F__)  // one instruction, where widen_bfloat16 becomes five
  const __m256i half = load_bits<__m256i>(bfloat16);
  return reinterpret_cast<Vec>(reinterpret_cast<VecBits>(_mm512_maskz_cvtepu16_epi32(0xffff, half)) << 16);
#else
  return widen_bfloat16(load_bits<VecHalf>(bfloat16));
#endif
}

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

// --- a pass ------------------------------------------------------------------------------------------------------

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

// A block of a slab, from some panel on.
struct Block {
  const char* data;     // the panel's first line
  int64_t lines, step;  // of each panel; bytes from one to the next
  const char* scales;   // int4: of the panel's first group
  int group_shift;      // int4: lines of a group, as a power of two
};

// total[row][panel] += x[row] times kPanels panels, scales of groups included; x holds kWidth rows, of which kRows
// count.
template <WeightFormat kFormat, bool kPairs, int kWidth, int kRows, int kPanels>
FASTSFT_NOINLINE void multiply(const Block& block, const uint32_t* x, Vec* total) {
  constexpr int kSteps = words_of_line<kFormat, kPairs>(), kVectors = kPanels * kVecs;
  constexpr int64_t kFold = kFormat == WeightFormat::kInt4 ? 32 / line_depth(kFormat) : kBlockLines;
  constexpr bool kRuns = kFormat == WeightFormat::kW8A8;
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
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(line + p * kLineBytes + kAhead);
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
              sum[r][i] = multiply_add(weight, splat(load_bits<float>(x + s * kWidth + r)), sum[r][i]);
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
          total[r * kSlabVecs + i] = multiply_add(sum[r][i], scale, total[r * kSlabVecs + i]);
        }
      } else if constexpr (kRuns) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec scale = splat(load_bits<float>(scale_of_run + r));
          total[r * kSlabVecs + i] = multiply_add(as_float(sum[r][i]), scale, total[r * kSlabVecs + i]);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) total[r * kSlabVecs + i] += sum[r][i];
      }
    }
  }
}

// Rows [row, row + kRows) that exist, of slab `slab`; x are their words.
template <WeightFormat kFormat, bool kPairs, int kRows>
FASTSFT_NOINLINE void pass(const PackedLinear& call, const uint32_t* x, int64_t row, int64_t slab) {
  constexpr int kMost = kSums / kVecs < 8 ? kSums / kVecs : 8, kPart = kRows < kMost ? kRows : kMost;
  constexpr int kFit = kSums / kVecs / kPart, kPanels = kFit < kSlabPanels ? kFit : kSlabPanels;
  const PackedWeight& w = call.weight;
  const int64_t first = slab * kSlabPanels, panels = smaller(kSlabPanels, panel_count(w.n) - first);
  const int64_t lines = panel_lines(kFormat, w.k);
  const char* data = static_cast<const char*>(w.data) + slab * slab_bytes(kFormat, w.k);
  Block block{.data = nullptr, .lines = 0, .step = panels * kLineBytes, .scales = nullptr, .group_shift = 0};
  if (kFormat == WeightFormat::kInt4) block.group_shift = w.group == 32 ? 2 : 3;
  const char* const scales = static_cast<const char*>(w.scales) +
                             slab * (kFormat == WeightFormat::kInt4 ? (w.k + w.group - 1) / w.group * kSlabScales : 0);
  Vec total[kRows * kSlabVecs] = {};
  for (int64_t begin = 0; begin < lines; begin += kBlockLines) {
    block.lines = smaller(kBlockLines, lines - begin);
    for (int64_t panel = 0; panel < panels;) {
      block.data = data + panel * kLineBytes;
      if (kFormat == WeightFormat::kInt4) {
        block.scales = scales + (begin >> block.group_shift) * kSlabScales + panel * kPanelColumns * 2;
      }
      Vec* const sums = total + panel * kVecs;
      const bool several = panel + kPanels <= panels;
      const auto part =
          several ? multiply<kFormat, kPairs, kRows, kPart, kPanels> : multiply<kFormat, kPairs, kRows, kPart, 1>;
      for (int r = 0; r < kRows; r += kPart) part(block, x + r, sums + r * kSlabVecs);
      panel += several ? kPanels : 1;
    }
    data += block.lines * block.step;
    x += words_of_lines<kFormat, kPairs>(block.lines) * kRows;
  }
  const int64_t rows = smaller<int64_t>(kRows, call.rows - row);
  for (int64_t i = 0; i < panels * kVecs; ++i) {
    const int64_t column = first * kPanelColumns + i * kLanes;
    if (column >= w.n) return;
    Vec scale = splat(1), bias{};
    if (kFormat == WeightFormat::kInt8 || kFormat == WeightFormat::kW8A8)
      scale = load(static_cast<const float*>(w.scales) + column);
    if (call.bias) bias = load_until(DType::kFloat32, call.bias, column, w.n);
    for (int64_t r = 0; r < rows; ++r) {
      store_until(call.dtype, element(call.dtype, call.out, (row + r) * w.n), column, w.n,
                  multiply_add(total[r * kSlabVecs + i], scale, bias));
    }
  }
}

// Rows of the pass that serves `rows` of them: the next power of two.
FASTSFT_INLINE int pass_rows(int64_t rows) {
  int n = 1;
  while (n < rows && n < kMaxRows) n *= 2;
  return n;
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

FASTSFT_INLINE int64_t words_of_row(const PackedLinear& call) {
  const WeightFormat format = call.weight.format;
  const int64_t lines = panel_lines(format, call.weight.k);
  if (format == WeightFormat::kW8A8) return words_of_lines<WeightFormat::kW8A8, false>(lines);
  return lines * line_depth(format) / (in_pairs(call) ? 2 : 1);
}

// The first `count` lanes; the usual counts are constants, one instruction each.
FASTSFT_INLINE void store_words(uint32_t* out, Vec v, int64_t count) {
  if (count == kLanes) {
    std::memcpy(out, &v, kVectorBytes);
  } else if (count == kLanes / 2) {
    std::memcpy(out, &v, kVectorBytes / 2);
  } else if (count == kLanes / 4) {
    std::memcpy(out, &v, kVectorBytes / 4);
  } else {
    std::memcpy(out, &v, static_cast<std::size_t>(count) * 4);
  }
}

// out[word * width + row] = word `word` of `row` for words [0, count); 0 from row `rows` on. load(row, word) gives the
// kLanes words from `word` on, 0 past the row's end.
template <typename Load>
FASTSFT_INLINE void interleave(int64_t rows, int64_t width, int64_t count, uint32_t* out, Load&& load) {
  for (int64_t word = 0; word < count; word += kLanes) {
    const int64_t words = smaller<int64_t>(kLanes, count - word);
    if (width == 1) {
      store_words(out + word, load(0, word), words);
      continue;
    }
    for (int64_t first = 0; first < width; first += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = first + i < rows ? load(first + i, word) : Vec{};
      transpose(block);
      for (int64_t i = 0; i < words; ++i) {
        store_words(out + (word + i) * width + first, block[i], smaller<int64_t>(kLanes, width - first));
      }
    }
  }
}

// --- x of W8A8 ---------------------------------------------------------------------------------------------------

// A run of a row of x: integers as the product takes them, their sum, their scale (NaN if one of them was not finite).
struct Run {
  alignas(64) char values[kRunChannels * (kHasDots ? 1 : 4)];
  int32_t sum;
  float scale;
};

template <typename Of>
FASTSFT_INLINE int32_t reduce_lanes(VecInt v, Of&& of) {
  const auto moved = [](Vec other) { return reinterpret_cast<VecInt>(other); };
  if constexpr (kLanes >= 16) v = of(v, moved(exchange<8>(reinterpret_cast<Vec>(v))));
  if constexpr (kLanes >= 8) v = of(v, moved(exchange<4>(reinterpret_cast<Vec>(v))));
  v = of(v, moved(exchange<2>(reinterpret_cast<Vec>(v))));
  return of(v, moved(exchange<1>(reinterpret_cast<Vec>(v))))[0];
}

FASTSFT_INLINE Run quantise(const PackedLinear& call, int64_t row, int64_t begin) {
  constexpr int kParts = kRunChannels / kLanes;
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const void* const all = element(call.dtype, call.x, row * call.weight.k);
  Vec x[kParts] = {};
  VecInt most{};  // the bits of a magnitude, which order as it does; infinity and NaN above all
  for (int i = 0; i < kParts && begin + i * kLanes < call.weight.k; ++i) {
    x[i] = load_until(call.dtype, all, begin + i * kLanes, call.weight.k);
    const VecInt magnitude = reinterpret_cast<VecInt>(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  Run run{};
  const int32_t largest = reduce_lanes(most, [](VecInt a, VecInt b) { return a > b ? a : b; });
  if (largest >= 0x7f800000) {
    run.scale = __builtin_nanf("");
    return run;
  }
  run.scale = larger(load_bits<float>(&largest) / 127, 0x1p-126f);
  const Vec inverse = splat(1 / run.scale);
  VecInt sum{};
  for (int i = 0; i < kParts; ++i) {
    // Added to 1.5 * 2^23, an integer is in the low bits: rounded to the nearest, ties to even.
    const VecInt value = reinterpret_cast<VecInt>(x[i] * inverse + 0x1.8p23f) - 0x4b400000;
    if constexpr (kHasDots) {
      const Bytes bytes = __builtin_convertvector(value, Bytes);
      std::memcpy(run.values + i * kLanes, &bytes, sizeof(bytes));
    } else {
      const Vec floats = as_float(value);
      std::memcpy(run.values + i * kVectorBytes, &floats, sizeof(floats));
    }
    sum += value;
  }
  run.sum = reduce_lanes(sum, [](VecInt a, VecInt b) { return a + b; });
  return run;
}

// Rows [row, row + rows) as words[run][kRunWords + words of its lines][width].
void pack_runs(const PackedLinear& call, int64_t row, int64_t rows, int64_t width, uint32_t* words) {
  constexpr WeightFormat kFormat = WeightFormat::kW8A8;
  Run runs[kMaxRows];
  for (int64_t begin = 0; begin < call.weight.k; begin += kRunChannels) {
    const int64_t lines = smaller(kBlockLines, panel_lines(kFormat, call.weight.k - begin));
    const int64_t count = lines * words_of_line<kFormat, false>();
    std::memset(words, 0, static_cast<std::size_t>(kRunWords * width * 4));
    for (int64_t r = 0; r < rows; ++r) {
      runs[r] = quantise(call, row + r, begin);
      if (kHasDots) words[r] = static_cast<uint32_t>(-128 * runs[r].sum);
      words[width + r] = load_bits<uint32_t>(&runs[r].scale);
    }
    interleave(rows, width, count, words + kRunWords * width,
               [&](int64_t r, int64_t word) { return load_bits<Vec>(runs[r].values + word * 4); });
    words += (kRunWords + count) * width;
  }
}

}  // namespace

int64_t matvec_input_words(const PackedLinear& call) {
  const int64_t last = call.rows % kMaxRows;
  return (call.rows - last + (last ? pass_rows(last) : 0)) * words_of_row(call);
}

// words[pass][word][row of the pass]: elements as float32, or pairs in bfloat16; zero past the last row and column.
void matvec_pack_input(const PackedLinear& call, uint32_t* words) {
  const int64_t k = call.weight.k, count = words_of_row(call);
  if (count == 0) return;
  for (int64_t row = 0; row < call.rows; row += kMaxRows) {
    const int64_t width = pass_rows(call.rows - row), rows = smaller(width, call.rows - row);
    uint32_t* const out = words + row * count;
    if (call.weight.format == WeightFormat::kW8A8) {
      pack_runs(call, row, rows, width, out);
      continue;
    }
    const bool as_it_is = call.dtype == DType::kFloat32 || in_pairs(call);
    const int64_t bytes = static_cast<int64_t>(bytes_of(call.dtype, k));
    interleave(rows, width, count, out, [&](int64_t r, int64_t word) {
      const char* const x = static_cast<const char*>(call.x) + (row + r) * bytes;
      if (!as_it_is) return word < k ? load_until(call.dtype, x, word, k) : Vec{};
      const int64_t left = bytes - word * 4;
      if (left >= kVectorBytes) return load_bits<Vec>(x + word * 4);
      Vec v{};
      if (left > 0) std::memcpy(&v, x + word * 4, static_cast<std::size_t>(left));
      return v;
    });
  }
}

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
