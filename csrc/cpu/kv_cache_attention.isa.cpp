// Memory traffic per (sequence, key head) and task: its K and V once per 256 keys, from memory the first time, from the
// second-level cache for the further strips of rows. Arithmetic: 2 D multiply-adds and an exp per (row, key): at one
// row a quarter to one flop per byte, memory-bound; from about 30 rows on bound by the multiply-adds.
//
// The layout makes both products the same one: sums[row][column] += a[row][step] * b[step][column], where the columns
// of b are 16 keys and its steps the elements of K, then its columns the elements of V and its steps the keys. Steps
// come in lines of two. A sum is one chain in ascending order, whatever rows and columns go together; keys that a row
// does not see have probability 0 and leave its sums as they are. Compiled without -fassociative-math and contraction,
// and with signed zeros (CMakeLists.txt).
#include <cmath>
#include <type_traits>

#include "kv_cache_kernels.h"
#include "lane_sums.h"
#include "prefetch.h"
#include "register_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int64_t kPitch = kWorkPitch;

FASTSFT_INLINE Vec multiply_word(Vec sum, float word, Vec b) { return fused_multiply_add(splat(word), b, sum); }
FASTSFT_INLINE Vec multiply_word(Vec sum, uint32_t word, Vec b) { return multiply_add<Pair>(sum, spread(word), b); }

// --- lines of two steps ------------------------------------------------------------------------------------------

// How b is stored: as the product multiplies it, or as the cache has it.
enum class Stored { kReady, kBFloat16, kInt8 };

template <Stored kStored>
constexpr int64_t kColumnBytes = kStored == Stored::kInt8 ? 2 : 4;
template <typename Format, Stored kStored>
constexpr int64_t kLineRows = kStored == Stored::kReady && Format::kSteps == 1 ? 2 : 1;  // of columns

// Words of the columns from `line` on: of step `step` of the line, or of both as a pair.
template <typename Format, Stored kStored>
FASTSFT_INLINE Vec load_line(const char* line, int64_t row_bytes, int step) {
  if constexpr (kStored == Stored::kReady) {
    return load(reinterpret_cast<const float*>(line + step * row_bytes));
  } else if constexpr (kStored == Stored::kBFloat16) {
    VecBits word;
    std::memcpy(&word, line, sizeof(word));
    return reinterpret_cast<Vec>(step == 0 ? word << 16 : word & 0xffff0000u);
  } else {
#if defined(__AVX512BF16__)
    if constexpr (Format::kSteps == 2) {
      const auto as_float = [&](int64_t i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line) + i);
        return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
      };
      return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(as_float(1), as_float(0)));  // integers of 8 bits are exact
    }
#endif
    VecHalf halves;
    std::memcpy(&halves, line, sizeof(halves));
    const VecBits word = widen(halves) << (step == 0 ? 24 : 16);
    return __builtin_convertvector(reinterpret_cast<VecInt>(word) >> 24, Vec);
  }
}

// sum[r][j] += over `lines` lines of a[r] times the columns from base[j] on; asks for as many bytes of each ahead[j].
template <typename Format, Stored kStored, int kRows, int kVecs>
FASTSFT_INLINE void multiply_lines(const typename Format::Word* a, const char* const (&base)[kVecs],
                                   const char* const (&ahead)[kVecs], int64_t row_bytes, int64_t lines, Prefetch fetch,
                                   Vec (&sum)[kRows][kVecs]) {
  constexpr int kSteps = 2 / Format::kSteps;
  const int64_t line_bytes = row_bytes * kLineRows<Format, kStored>;
  for (int64_t at = 0; at < lines * line_bytes; at += line_bytes) {
#pragma GCC unroll 2
    for (int step = 0; step < kSteps; ++step) {
      Vec b[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        const int64_t row = kLineRows<Format, kStored> == 2 ? step * row_bytes : 0;
        if (step == 0 || kLineRows<Format, kStored> == 2) fetch(ahead[j] + at + row);
        b[j] = load_line<Format, kStored>(base[j] + at, row_bytes, step);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[r][j] = multiply_word(sum[r][j], a[r * kPitch + step], b[j]);
      }
    }
    a += kSteps;
  }
}

// --- a part of 256 keys ------------------------------------------------------------------------------------------

// Its groups of 16 keys, those that some row of the task sees.
struct Part {
  const char* k[kPartGroups];
  const char* v[kPartGroups];
  const float* k_scales[kPartGroups];
  const float* v_scales[kPartGroups];
  const char* const* k_ahead;  // [kPartGroups] places to ask for meanwhile, each as long as K of a group
  const char* const* v_ahead;
  Prefetch fetch;
};

// Rows of a task that are multiplied together.
struct Strip {
  int64_t rows, group_begin, group_end;  // groups that any of them sees
  float* scores;                         // [rows, kPitch]
};

template <typename Format, Stored kStored, int kRows, int kVecs>
FASTSFT_NOINLINE void score_keys(const Part& part, const Strip& strip, const typename Format::Word* queries,
                                 int64_t dim, int64_t vector, float factor) {
  const char *base[kVecs], *ahead[kVecs];
  for (int j = 0; j < kVecs; ++j) {
    const int64_t column = (vector + j) * kLanes, offset = column % kGroupKeys * kColumnBytes<kStored>;
    base[j] = part.k[column / kGroupKeys] + offset;
    ahead[j] = part.k_ahead[column / kGroupKeys] + offset;
  }
  Vec sum[kRows][kVecs] = {};
  multiply_lines<Format, kStored>(queries, base, ahead, kGroupKeys * kColumnBytes<kStored>, dim / 2, part.fetch, sum);
#pragma GCC unroll 8
  for (int j = 0; j < kVecs; ++j) {
    const int64_t column = (vector + j) * kLanes;
    Vec scale = splat(factor);
    const float* scales = part.k_scales[column / kGroupKeys];
    if (scales != nullptr) scale *= load(scales + column % kGroupKeys);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(strip.scores + r * kPitch + column, sum[r][j] * scale);
  }
}

// scores = factor * queries x keys
template <typename Format, Stored kStored, int kRows>
FASTSFT_NOINLINE void score(const Part& part, const Strip& strip, const typename Format::Word* queries, int64_t dim,
                            float factor) {
  constexpr int kFit = kLanes >= 16 ? 28 / kRows : 12 / kRows, kVecs = kFit >= 4 ? 4 : 2;
  constexpr int64_t kPerGroup = kGroupKeys / kLanes;
  int64_t vector = strip.group_begin * kPerGroup;
  const int64_t end = strip.group_end * kPerGroup;
  for (; vector + kVecs <= end; vector += kVecs) {
    score_keys<Format, kStored, kRows, kVecs>(part, strip, queries, dim, vector, factor);
  }
  for (; vector < end; ++vector) score_keys<Format, kStored, kRows, 1>(part, strip, queries, dim, vector, factor);
}

// sums[row] = sums[row] * keep[row] + take[row] * (probabilities x values) for the columns from `column` on
template <typename Format, Stored kStored, int kRows, int kVecs>
FASTSFT_NOINLINE void add_columns(const Part& part, const Strip& strip, int64_t dim, int64_t column, const float* keep,
                                  const float* take, float* sums) {
  constexpr int64_t kGroupWords = kGroupKeys / Format::kSteps;
  const auto* probabilities = reinterpret_cast<const typename Format::Word*>(strip.scores);
  Vec sum[kRows][kVecs] = {};
  for (int64_t g = strip.group_begin; g < strip.group_end; ++g) {
    const char *base[kVecs], *ahead[kVecs];
    for (int j = 0; j < kVecs; ++j) {
      const int64_t offset = (column + j * kLanes) * kColumnBytes<kStored>;
      base[j] = part.v[g] + offset;
      ahead[j] = part.v_ahead[g] + offset;
    }
    multiply_lines<Format, kStored>(probabilities + g * kGroupWords, base, ahead, dim * kColumnBytes<kStored>,
                                    kGroupKeys / 2, part.fetch, sum);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= strip.rows) return;
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* place = sums + r * dim + column + j * kLanes;
      store(place, fused_multiply_add(sum[r][j], splat(take[r]), load(place) * keep[r]));
    }
  }
}

template <typename Format, Stored kStored, int kRows>
FASTSFT_NOINLINE void add_values(const Part& part, const Strip& strip, int64_t dim, const float* keep,
                                 const float* take, float* sums) {
  constexpr int kFit = kLanes >= 16 ? 28 / kRows : 12 / kRows, kVecs = kFit >= 4 ? 4 : 2;
  int64_t column = 0;
  for (; column + kVecs * kLanes <= dim; column += kVecs * kLanes) {
    add_columns<Format, kStored, kRows, kVecs>(part, strip, dim, column, keep, take, sums);
  }
  for (; column < dim; column += kLanes) {
    add_columns<Format, kStored, kRows, 1>(part, strip, dim, column, keep, take, sums);
  }
}

struct Band {
  int64_t first, last;  // keys of the part [first, last) that a row sees
};
FASTSFT_INLINE VecInt inside(const Band& band, int64_t column) {
  VecInt index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  index += static_cast<int32_t>(column);
  return (index >= static_cast<int32_t>(band.first)) & (index < static_cast<int32_t>(band.last));
}

// Turns rows of scores (in units of log 2) into probabilities relative to each row's maximum, in the form the product
// wants, times the scales of the values. Gives the maxima and the totals.
template <typename Format>
FASTSFT_NOINLINE void softmax(const Part& part, const Strip& strip, const Band* bands, float* maxima, float* totals) {
  const int64_t begin = strip.group_begin * kGroupKeys, end = strip.group_end * kGroupKeys;
  const bool scaled = part.v_scales[0] != nullptr;
  Vec of_row[kLanes] = {};
  for (int64_t r = 0; r < strip.rows; ++r) {
    float* const row = strip.scores + r * kPitch;
    const Band band = bands[r];
    Vec most = splat(-INFINITY);
    for (int64_t j = begin; j < end; j += kLanes) {
      Vec score = load(row + j);
      if (j < band.first || j + kLanes > band.last) {
        score = select(inside(band, j), score, splat(-INFINITY));
        store(row + j, score);
      }
      most = max_of(most, score);
    }
    of_row[r] = most;
  }
  reduce_lanes<true>(of_row, strip.rows, maxima);
  for (int64_t r = 0; r < strip.rows; ++r) {
    float* const row = strip.scores + r * kPitch;
    const Vec reference = splat(maxima[r] == -INFINITY ? 0.0f : maxima[r]);
    Vec total{};
    for (int64_t j = begin; j < end; j += kLanes) {
      Vec p = exp2_nonpositive < Format::kSteps == 1 ? 6 : 4 > (load(row + j) - reference);
      total += p;
      if (scaled) p *= load(part.v_scales[j / kGroupKeys] + j % kGroupKeys);
#if defined(__AVX512BF16__)
      if constexpr (Format::kSteps == 2) {
        const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(p));
        std::memcpy(reinterpret_cast<uint16_t*>(row) + j, &halves, sizeof(halves));
        continue;
      }
#endif
      store(row + j, p);
    }
    of_row[r] = total;
  }
  reduce_lanes<false>(of_row, strip.rows, totals);
}

// --- merging -----------------------------------------------------------------------------------------------------

// Takes a part's maxima and totals into those of the parts before it, a row per lane; `keep` and `take` are what the
// sums of both are then multiplied by. A row that saw nothing of the part keeps its bits.
FASTSFT_INLINE void merge_stats(float* maxima, float* totals, const float* part_maxima, const float* part_totals,
                                float* keep, float* take) {
  const Vec before = load(maxima), other = load(part_maxima), now = max_of(before, other);
  const Vec reference = select(now == -INFINITY, Vec{}, now);
  const Vec kept = exp2_nonpositive<6>(before - reference), taken = exp2_nonpositive<6>(other - reference);
  store(maxima, now);
  store(totals, fused_multiply_add(load(part_totals), taken, load(totals) * kept));
  store(keep, kept);
  store(take, taken);
}

// out = sums / total; 0 where a row saw no key
FASTSFT_NOINLINE void store_row(const CachedAttention& call, const AttentionTask& task, int64_t kv_head, int64_t row,
                                const float* sums, float total) {
  const int64_t dim = call.layout.head_dim, group = call.q_heads / call.layout.heads;
  const int64_t head = (task.head_begin + kv_head) * group + row % group;
  void* out = element(call.dtype, call.out, (task.row_begin + row / group) * call.out_stride + head * dim);
  const Vec factor = splat(total == 0 ? 0 : 1 / total);
  // Adding 0 makes -0 into 0: whether a key that is not seen took part shows in the sign of a zero alone.
  for (int64_t d = 0; d < dim; d += kLanes) store_from_float(call.dtype, out, d, load(sums + d) * factor + Vec{});
}

// --- a task ------------------------------------------------------------------------------------------------------

template <int kRows = kTileRows, typename Run>
FASTSFT_INLINE void with_rows(int64_t rows, Run run) {
  constexpr int kFewer = kRows > 8 ? 8 : kRows == 8 ? 7 : kRows > 4 ? 4 : kRows - 1;
  if constexpr (kRows > 1) {
    if (rows <= kFewer) return with_rows<kFewer>(rows, run);
  }
  run(std::integral_constant<int, kRows>{});
}

// `lines` lines of `columns` columns as the product multiplies them.
template <typename Format, Stored kStored>
FASTSFT_NOINLINE void make_ready(const char* from, int64_t lines, int64_t columns, char* to) {
  constexpr int kSteps = 2 / Format::kSteps;
  for (int64_t line = 0; line < lines; ++line, from += columns * kColumnBytes<kStored>) {
    for (int step = 0; step < kSteps; ++step, to += columns * 4) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vec word = load_line<Format, kStored>(from + c * kColumnBytes<kStored>, 0, step);
        store(reinterpret_cast<float*>(to) + c, word);
      }
    }
  }
}

// One or several key heads, part by part. What is asked for ahead is the next part of all heads, in the order of
// memory: the processor itself sees far ahead in long runs only.
template <typename Format, Stored kStored>
class Task {
  using Word = typename Format::Word;

 public:
  Task(const CachedAttention& call, const AttentionTask& task, char* work)
      : call_(call),
        task_(task),
        places_(call.layout),
        dim_(call.layout.head_dim),
        group_(call.q_heads / call.layout.heads),
        heads_(task.head_end - task.head_begin),
        rows_(task_rows(call, task)),
        strips_((rows_ + kTileRows - 1) / kTileRows),
        strip_rows_((rows_ + strips_ - 1) / strips_) {
    const CacheRows& rows = call.rows;
    first_ = rows.context_lens[task.sequence] - rows.cu_seqlens[task.sequence + 1] + task.row_begin;
    end_ = first_ + task.row_end - task.row_begin;
    begin_ = seen_from(first_);
    const auto take = [&](int64_t bytes) {
      work += bytes;
      return work - bytes;
    };
    scores_ = reinterpret_cast<float*>(take(16 * kPitch * 4));
    queries_ = reinterpret_cast<Word*>(take((heads_ * rows_ + 16) * kPitch * 4));
    maxima_ = reinterpret_cast<float*>(take(heads_ * strips_ * 64));
    totals_ = reinterpret_cast<float*>(take(heads_ * strips_ * 64));
    sums_ = reinterpret_cast<float*>(take(heads_ * rows_ * dim_ * 4));
    ahead_ = reinterpret_cast<const char**>(take(heads_ * 2 * kPartGroups * static_cast<int64_t>(sizeof(char*))));
    ready_ = work;
  }

  void run(float* scratch) {
    pack_queries();
    clear();
    list_ahead(task_.part_begin);
    ask_at_once();
    for (int64_t index = task_.part_begin; index < task_.part_end; ++index) {
      if (index + 1 < task_.part_end) list_ahead(index + 1);
      for (int64_t head = 0; head < heads_; ++head) {
        Part part = part_of(index, head);
        if (kStored != Stored::kReady && strips_ > 1) {
          make_part_ready(part);
          run_part<Stored::kReady>(part, index, head, scratch);
        } else {
          run_part<kStored>(part, index, head, scratch);
        }
      }
    }
    if (scratch != nullptr) return;
    for (int64_t row = 0; row < heads_ * rows_; ++row) {
      const int64_t in_head = row % rows_, strip = row / rows_ * strips_ + in_head / strip_rows_;
      store_row(call_, task_, row / rows_, in_head, sums_ + row * dim_, totals_[strip * 16 + in_head % strip_rows_]);
    }
  }

 private:
  int64_t seen_from(int64_t position) const {
    return call_.window_left < 0 ? 0 : larger<int64_t>(0, position - call_.window_left);
  }

  void pack_queries() {
    Word* to = queries_;
    for (int64_t h = task_.head_begin; h < task_.head_end; ++h) {
      for (int64_t row = 0; row < rows_; ++row, to += kPitch) {
        const int64_t at = (task_.row_begin + row / group_) * call_.q_stride + (h * group_ + row % group_) * dim_;
        const void* q = element(call_.dtype, call_.q, at);
        if constexpr (Format::kSteps == 2) {
          std::memcpy(to, q, static_cast<std::size_t>(dim_) * 2);
        } else {
          for (int64_t d = 0; d < dim_; d += kLanes) store(to + d, load_as_float(call_.dtype, q, d));
        }
      }
    }
    // Register tiles may have more rows than there are.
    std::memset(to, 0, static_cast<std::size_t>(16 * kPitch) * 4);
  }

  void clear() {
    fill_zero(sums_, sums_ + heads_ * rows_ * dim_);
    for (int64_t i = 0; i < heads_ * strips_ * 16; i += kLanes) {
      store(maxima_ + i, splat(-INFINITY));
      store(totals_ + i, Vec{});
    }
  }

  // --- where a part lies; groups that the task does not see stand for the nearest one that it does

  struct Place {
    const char* block;
    int64_t slot;
  };
  Place place_of(int64_t group) const {
    const int64_t seen = smaller(larger(group, begin_ / kGroupKeys), (end_ - 1) / kGroupKeys);
    const int64_t per_block = call_.layout.block_size / kGroupKeys, block = seen / per_block;
    const int32_t* table = call_.rows.block_table + task_.sequence * call_.rows.table_stride;
    return {call_.layer_blocks + table[block] * places_.block, (seen - block * per_block) * kGroupKeys};
  }

  Part part_of(int64_t index, int64_t head) const {
    Part part;
    part.k_ahead = ahead_ + head * 2 * kPartGroups;
    part.v_ahead = part.k_ahead + kPartGroups;
    for (int64_t g = 0; g < kPartGroups; ++g) {
      const Place place = place_of(index * kPartGroups + g);
      const char* const base = place.block + (task_.head_begin + head) * places_.head;
      part.k[g] = base + place.slot / kGroupKeys * places_.group;
      part.v[g] = part.k[g] + places_.half;
      part.k_scales[g] = part.v_scales[g] = nullptr;
      if (places_.scale == 0) continue;
      part.k_scales[g] = reinterpret_cast<const float*>(base + 2 * places_.half) + place.slot;
      part.v_scales[g] = part.k_scales[g] + call_.layout.block_size;
    }
    return part;
  }

  // K and V of the part's groups in the order of memory.
  void list_ahead(int64_t index) {
    const Prefetch fetch;
    int64_t count = 0;
    for (int64_t g = 0; g < kPartGroups;) {
      const Place place = place_of(index * kPartGroups + g);
      int64_t run = 1;  // of neighbours
      for (; g + run < kPartGroups; ++run) {
        const Place next = place_of(index * kPartGroups + g + run);
        if (next.block != place.block || next.slot != place.slot + run * kGroupKeys) break;
      }
      for (int64_t head = 0; head < heads_; ++head) {
        const char* const base = place.block + (task_.head_begin + head) * places_.head;
        for (const int64_t half : {int64_t{0}, places_.half}) {
          const char* const first = base + half + place.slot / kGroupKeys * places_.group;
          for (int64_t i = 0; i < run; ++i) ahead_[count++] = first + i * places_.group;
        }
        if (places_.scale == 0) continue;
        const char* const scales = base + 2 * places_.half + place.slot * 4;
        for (int64_t i = 0; i < run; ++i) fetch(scales + i * kGroupKeys * 4);
        for (int64_t i = 0; i < run; ++i) fetch(scales + places_.scale + i * kGroupKeys * 4);
      }
      g += run;
    }
  }

  void ask_at_once() const {
    const Prefetch fetch;
    for (int64_t i = 0; i < heads_ * 2 * kPartGroups; ++i) {
      for (int64_t at = 0; at < places_.group; at += 64) fetch(ahead_[i] + at);
    }
  }

  void make_part_ready(Part& part) {
    const int64_t bytes = kGroupKeys * dim_ * (Format::kSteps == 1 ? 4 : 2);
    char* room = ready_;
    for (int64_t g = 0; g < kPartGroups; ++g, room += 2 * bytes) {
      make_ready<Format, kStored>(part.k[g], dim_ / 2, kGroupKeys, room);
      make_ready<Format, kStored>(part.v[g], kGroupKeys / 2, dim_, room + bytes);
      part.k[g] = room;
      part.v[g] = room + bytes;
    }
    part.k_ahead = part.k;
    part.v_ahead = part.v;
  }

  // --- a part of one head

  template <Stored kAs>
  void run_part(const Part& part, int64_t index, int64_t head, float* scratch) {
    const int64_t start = index * kPartKeys, stats = partial_stats(rows_), size = partial_floats(rows_, dim_);
    float* partial = nullptr;
    if (scratch != nullptr) {
      partial = scratch + task_.partials + ((index - task_.part_begin) * heads_ + head) * size;
    }
    for (int64_t s = head * strips_, row = 0; row < rows_; ++s, row += strip_rows_) {
      Strip strip{.rows = smaller(strip_rows_, rows_ - row), .group_begin = 0, .group_end = 0, .scores = scores_};
      const Band low = band_of(row, start), high = band_of(row + strip.rows - 1, start);
      const bool is_blind = high.last <= low.first;
      alignas(64) float part_maxima[16], part_totals[16], keep[16], take[16];
      for (int i = 0; i < 16; ++i) part_maxima[i] = -INFINITY, part_totals[i] = 0, keep[i] = 0, take[i] = 1;
      if (!is_blind) {
        strip.group_begin = low.first / kGroupKeys;
        strip.group_end = (high.last + kGroupKeys - 1) / kGroupKeys;
        const float factor = call_.scale * kLog2e;
        const Word* queries = queries_ + (head * rows_ + row) * kPitch;
        with_rows(strip.rows,
                  [&](auto rows) { score<Format, kAs, decltype(rows)::value>(part, strip, queries, dim_, factor); });
        Band bands[kTileRows];
        for (int64_t r = 0; r < strip.rows; ++r) bands[r] = band_of(row + r, start);
        softmax<Format>(part, strip, bands, part_maxima, part_totals);
      }
      float* sums = sums_ + (head * rows_ + row) * dim_;
      if (partial != nullptr) {
        sums = partial + row * dim_;
        fill_zero(sums, sums + strip.rows * dim_);
        std::memcpy(partial + rows_ * dim_ + row, part_maxima, static_cast<std::size_t>(strip.rows) * 4);
        std::memcpy(partial + rows_ * dim_ + stats + row, part_totals, static_cast<std::size_t>(strip.rows) * 4);
      } else if (!is_blind) {
        for (int i = 0; i < kTileRows; i += kLanes) {
          merge_stats(maxima_ + s * 16 + i, totals_ + s * 16 + i, part_maxima + i, part_totals + i, keep + i, take + i);
        }
      }
      if (is_blind) continue;
      with_rows(strip.rows, [&](auto rows) {
        add_values<Format, kAs, decltype(rows)::value>(part, strip, dim_, keep, take, sums);
      });
    }
  }

  Band band_of(int64_t row, int64_t start) const {
    const int64_t position = first_ + row / group_;
    return {larger<int64_t>(0, seen_from(position) - start), smaller<int64_t>(kPartKeys, position + 1 - start)};
  }

  const CachedAttention& call_;
  const AttentionTask& task_;
  const KVPlaces places_;
  const int64_t dim_, group_, heads_, rows_, strips_, strip_rows_;  // rows of one key head
  int64_t first_, end_, begin_;  // positions of the rows; the first key that one of them sees
  float* scores_;                // [16, kPitch]
  Word* queries_;                // [heads, rows, kPitch]
  float* maxima_;                // [heads, strips, 16]
  float* totals_;
  float* sums_;         // [heads, rows, D]
  const char** ahead_;  // [heads, 2, kPartGroups]
  char* ready_;         // K and V of a part
};

}  // namespace

void kv_attention_task(const CachedAttention& call, const AttentionTask& task, char* work, float* scratch) {
#if defined(__AVX512BF16__)
  if (call.dtype == DType::kBFloat16) {
    if (call.layout.format == KVFormat::kInt8) return Task<Pair, Stored::kInt8>(call, task, work).run(scratch);
    return Task<Pair, Stored::kReady>(call, task, work).run(scratch);
  }
#endif
  switch (call.layout.format) {
    case KVFormat::kFloat32: return Task<Single, Stored::kReady>(call, task, work).run(scratch);
#if !defined(__AVX512BF16__)
    case KVFormat::kBFloat16: return Task<Single, Stored::kBFloat16>(call, task, work).run(scratch);
#else
    case KVFormat::kBFloat16: return;  // multiplied in pairs, above
#endif
    case KVFormat::kInt8: return Task<Single, Stored::kInt8>(call, task, work).run(scratch);
  }
}

void kv_attention_merge(const CachedAttention& call, const AttentionTask& merge, char* work, const float* scratch) {
  const int64_t dim = call.layout.head_dim, rows = task_rows(call, merge), stats = partial_stats(rows);
  const int64_t heads = merge.head_end - merge.head_begin, size = partial_floats(rows, dim);
  float* sums = reinterpret_cast<float*>(work);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t row = 0; row < rows; row += 16) {
      const int64_t have = smaller<int64_t>(16, rows - row);
      alignas(64) float maxima[16], totals[16], keep[16], take[16];
      for (int i = 0; i < 16; ++i) maxima[i] = -INFINITY, totals[i] = 0;
      fill_zero(sums, sums + have * dim);
      for (int64_t index = 0; index < merge.part_end - merge.part_begin; ++index) {
        const float* partial = scratch + merge.partials + (index * heads + head) * size;
        const float* part_maxima = partial + rows * dim + row;
        for (int i = 0; i < 16; i += kLanes) {
          merge_stats(maxima + i, totals + i, part_maxima + i, part_maxima + stats + i, keep + i, take + i);
        }
        for (int64_t r = 0; r < have; ++r) {
          for (int64_t d = 0; d < dim; d += kLanes) {
            float* place = sums + r * dim + d;
            store(place,
                  fused_multiply_add(load(partial + (row + r) * dim + d), splat(take[r]), load(place) * keep[r]));
          }
        }
      }
      for (int64_t r = 0; r < have; ++r) store_row(call, merge, head, row + r, sums + r * dim, totals[r]);
    }
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
