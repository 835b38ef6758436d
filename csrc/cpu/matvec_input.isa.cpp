// x as matvec.isa.cpp takes it: read once, written once with the rows of a pass side by side, rounded to 8 bits for
// W8A8. 4 M K bytes beside the weight's K N. Compiled with the flags of matvec.isa.cpp.
#include <cmath>

#include "lane_sums.h"
#include "matvec_line.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

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

// A run of each row of a pass: integers as the product takes them, their sums, their scales (NaN if one of the row's
// elements was not finite).
struct Runs {
  alignas(64) char values[kMaxRows][kRunChannels * (kHasDots ? 1 : 4)];
  alignas(64) float sums[kMaxRows], scales[kMaxRows];
};

// Of `rows` rows of x from `first` on, channels from `begin` on.
template <DType kDType>
FASTSFT_NOINLINE void quantise(const PackedLinear& call, int64_t first, int64_t rows, int64_t begin, Runs& runs) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  constexpr int32_t kInfinity = 0x7f800000;
  const int64_t k = call.weight.k, end = smaller(begin + kRunChannels, k);
  alignas(64) float inverses[kMaxRows];
  Vec of_row[kMaxRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const void* const x = element(kDType, call.x, (first + r) * k);
    VecInt most{};  // the bits of a magnitude, which order as it does; infinity and NaN above all
    for (int64_t i = begin; i < end; i += kLanes) {
      const VecInt magnitude = reinterpret_cast<VecInt>(load_until(kDType, x, i, k)) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    of_row[r] = reinterpret_cast<Vec>(most > kInfinity ? VecInt{} + kInfinity : most);
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    reduce_lanes<true>(of_row + r, smaller<int64_t>(kLanes, rows - r), runs.scales + r);
    const Vec largest = load(runs.scales + r), scale = max_of(largest / 127, splat(0x1p-126f));
    store(runs.scales + r, select(largest == INFINITY, splat(__builtin_nanf("")), scale));
    store(inverses + r, 1 / scale);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const void* const x = element(kDType, call.x, (first + r) * k);
    const Vec inverse = splat(inverses[r]);
    const bool finite = inverses[r] > 0;
    VecInt sum{};
    for (int64_t i = 0; i < kRunChannels; i += kLanes) {
      VecInt value{};
      if (finite && begin + i < k) {
        // Added to 1.5 * 2^23, an integer is in the low bits: rounded to the nearest, ties to even.
        value = reinterpret_cast<VecInt>(load_until(kDType, x, begin + i, k) * inverse + 0x1.8p23f) - 0x4b400000;
      }
      if constexpr (kHasDots) {
        const Bytes bytes = __builtin_convertvector(value, Bytes);
        std::memcpy(runs.values[r] + i, &bytes, sizeof(bytes));
      } else {
        const Vec floats = as_float(value);
        std::memcpy(runs.values[r] + i * 4, &floats, sizeof(floats));
      }
      sum += value;
    }
    of_row[r] = __builtin_convertvector(sum, Vec);  // exact, as the sum over the lanes is: below 2^24
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    reduce_lanes<false>(of_row + r, smaller<int64_t>(kLanes, rows - r), runs.sums + r);
  }
}

// Rows [row, row + rows) as words[run][kRunWords + words of its lines][width].
void pack_runs(const PackedLinear& call, int64_t row, int64_t rows, int64_t width, uint32_t* words) {
  constexpr WeightFormat kFormat = WeightFormat::kW8A8;
  Runs runs;
  for (int64_t begin = 0; begin < call.weight.k; begin += kRunChannels) {
    const int64_t lines = smaller(kBlockLines, panel_lines(kFormat, call.weight.k - begin));
    const int64_t count = lines * words_of_line<kFormat, false>();
    std::memset(words, 0, static_cast<std::size_t>(kRunWords * width * 4));
    with_dtype(call.dtype, [&]<DType kDType>() { quantise<kDType>(call, row, rows, begin, runs); });
    for (int64_t r = 0; r < rows; ++r) {
      if (kHasDots) words[r] = static_cast<uint32_t>(-128 * static_cast<int32_t>(runs.sums[r]));
      words[width + r] = load_bits<uint32_t>(runs.scales + r);
    }
    interleave(rows, width, count, words + kRunWords * width,
               [&](int64_t r, int64_t word) { return load_bits<Vec>(runs.values[r] + word * 4); });
    words += (kRunWords + count) * width;
  }
}

}  // namespace

int64_t matvec_input_words(const PackedLinear& call) {
  const int64_t last = call.rows % kMaxRows;
  return (call.rows - last + (last ? pass_rows(last) : 0)) * words_of_row(call);
}

// words[pass][word][row of the pass]: elements as float32, or pairs in bfloat16; zero past the last row and column.
void matvec_pack_input(const PackedLinear& call, uint32_t* words, int64_t begin, int64_t end) {
  const int64_t k = call.weight.k, count = words_of_row(call);
  if (count == 0) return;
  for (int64_t row = begin * kMaxRows; row < smaller(call.rows, end * kMaxRows); row += kMaxRows) {
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

}  // namespace fastsft::FASTSFT_ISA_NS
