// Memory traffic per sequence: its keys and values once, nothing else of note. Arithmetic: 2 * D multiply-adds and an
// exp per (query head, key), 1/4 (float32) to 1/2 * group flops per byte: the memory sets the pace up to groups of
// about 8, if the next keys are on their way all the while.
//
// Few queries on many keys, as in decoding. Keys and values are used where they lie, a unit of kLanes rows at a time:
// keys are transposed in registers, values are multiplied as they come. A unit goes by once for all its key heads, in
// the order of memory, while the next ones are asked for: a cache's blocks are short and scattered, and the processor
// does not see them coming.
// Rounding follows attention_forward.isa.cpp operation by operation, so that a query gets the same bits from both.
#include "attention_softmax.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int kStripRows = kLanes >= 16 ? 8 : 4;  // rows whose scores of kLanes keys stay in registers
constexpr int64_t kAheadBytes = 8192;             // far enough for the memory, near enough to stay in the L1 cache

template <typename Run, int kRows = kStripRows>
FASTSFT_INLINE void with_rows(int64_t rows, Run run) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return with_rows<Run, kRows - 1>(rows, run);
  }
  run(std::integral_constant<int, kRows>{});
}

// Rows of keys or values of one key head, from byte `offset` on.
struct Stream {
  const void* const* rows;
  int64_t offset;

  FASTSFT_INLINE const char* row(int64_t i) const { return static_cast<const char*>(rows[i]) + offset; }
};

// --- scores ------------------------------------------------------------------------------------------------------

// sums[r] += query r * keys over the words [word + kFrom, word + kLanes). queries: [words, kRows].
template <typename Format, DType kDType, int kRows, int kFrom>
FASTSFT_INLINE void multiply_keys(const typename Format::Word* queries, const Stream& keys, int64_t word, Vec* sums,
                                  RowQueue& queue) {
  constexpr DType kAs = Format::kSteps == 2 ? DType::kFloat32 : kDType;  // a pair moves like a float
  Vec block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = load_as_float(kAs, keys.row(i), word);
  transpose(block);
#pragma GCC unroll 16
  for (int d = kFrom; d < kLanes; ++d) {
    queue.step();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r] = multiply_add<Format>(sums[r], spread(queries[(word + d) * kRows + r]), block[d]);
    }
  }
}

// scores[r * kKeyBlock + lane] = factor * product of query r and key `lane`; the chains of `product`.
template <typename Format, DType kDType, int kRows>
FASTSFT_NOINLINE void score(const typename Format::Word* queries, const Stream& keys, int64_t words, float factor,
                            float* scores, RowQueue& queue) {
  for (int64_t start = 0; start < words; start += kChain) {
    Vec sums[kRows]{};
    const int64_t end = smaller(start + kChain, words);
    int64_t word = start;
    for (; word + kLanes <= end; word += kLanes)
      multiply_keys<Format, kDType, kRows, 0>(queries, keys, word, sums, queue);
    // A width that ends in half a register: the last one is taken further left.
    if constexpr (Format::kSteps == 2) {
      if (word < end) multiply_keys<Format, kDType, kRows, kLanes / 2>(queries, keys, end - kLanes, sums, queue);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* place = scores + r * kKeyBlock;
      store(place, start == 0 ? sums[r] * factor : load(place) + sums[r] * factor);
    }
  }
}

// The same for more rows than that, for which the keys are transposed once. queries: [rows, kPitch].
template <typename Format>
constexpr int64_t kPitch = kRowPitch<Format, 256>;
template <typename Format>
FASTSFT_NOINLINE void score_many(DType dtype, const typename Format::Word* queries, int64_t rows, const Stream& keys,
                                 int64_t dim, float factor, typename Format::Word* panel, float* scores,
                                 RowQueue& queue) {
  const void* of_head[kLanes];
  for (int i = 0; i < kLanes; ++i) of_head[i] = keys.row(i);
  pack_columns<Format>(dtype, of_head, kLanes, dim, panel, kLanes);
  for (int64_t row = 0; row < rows; row += kTileRows) {
    product<Format, Left::kRows, kPitch<Format>, Into::kStore>(
        smaller<int64_t>(kTileRows, rows - row), kLanes, queries + row * kPitch<Format>, panel, kLanes,
        dim / Format::kSteps, scores + row * kKeyBlock, kKeyBlock, &factor, queue);
  }
}

// --- values ------------------------------------------------------------------------------------------------------

// Word vectors of step `step` from element d on: of one row, or of two neighbours zipped. Rows from `count` on count
// as zeros.
template <typename Format, DType kDType, int kVecs>
FASTSFT_INLINE void load_values(const Stream& values, int64_t step, int64_t count, int64_t d, Vec* out) {
#if defined(__AVX512BF16__)
  if constexpr (Format::kSteps == 2) {
    const auto* low = reinterpret_cast<const uint16_t*>(values.row(2 * step)) + d;
    const auto* high = reinterpret_cast<const uint16_t*>(values.row(2 * step + 1)) + d;
    const bool is_whole = 2 * step + 1 < count;
    alignas(64) static constexpr uint16_t kZip[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    for (int j = 0; j < kVecs; j += 2) {
      __m512i a, b = _mm512_setzero_si512();
      if constexpr (kVecs == 1) {
        a = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
        if (is_whole) b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
      } else {
        a = _mm512_loadu_si512(low + j * kLanes);
        if (is_whole) b = _mm512_loadu_si512(high + j * kLanes);
      }
      out[j] = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(a, _mm512_load_si512(kZip[0]), b));
      if (kVecs > 1) out[j + 1] = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(a, _mm512_load_si512(kZip[1]), b));
    }
    return;
  }
#endif
  (void)count;
  for (int j = 0; j < kVecs; ++j) out[j] = load_as_float(kDType, values.row(step), d + j * kLanes);
}

// sums[r * dim + d ...] += prob r * values over the steps [first, last); kVecs vectors wide
template <typename Format, DType kDType, int kRows, int kVecs>
FASTSFT_NOINLINE void accumulate(const typename Format::Word* probs, const Stream& values, int64_t first, int64_t last,
                                 int64_t count, int64_t d, int64_t dim, float* sums, RowQueue& queue) {
  constexpr int64_t kBytes = kVecs * kLanes * (kDType == DType::kFloat32 ? 4 : 2);
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = load(sums + r * dim + d + j * kLanes);
  }
  for (int64_t step = first; step < last; ++step) {
    Vec row[kVecs];
    load_values<Format, kDType, kVecs>(values, step, count, d, row);
#pragma GCC unroll 2
    for (int i = 0; i < Format::kSteps; ++i) {
#pragma GCC unroll 8
      for (int64_t byte = 0; byte < kBytes; byte += 64) queue.step();
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = spread(probs[r * kKeyBlock + step]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[r][j] = multiply_add<Format>(sum[r][j], x, row[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(sums + r * dim + d + j * kLanes, sum[r][j]);
  }
}

template <typename Format, DType kDType, int kRows>
FASTSFT_INLINE void accumulate_row(const typename Format::Word* probs, const Stream& values, int64_t first,
                                   int64_t last, int64_t count, int64_t dim, float* sums, RowQueue& queue) {
  constexpr int kVecs = kRows * 4 <= 2 * kStripRows ? 4 : 2;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes) {
    accumulate<Format, kDType, kRows, kVecs>(probs, values, first, last, count, d, dim, sums, queue);
  }
  if constexpr (kVecs > 2) {
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
      accumulate<Format, kDType, kRows, 2>(probs, values, first, last, count, d, dim, sums, queue);
    }
  }
  if (d < dim) accumulate<Format, kDType, kRows, 1>(probs, values, first, last, count, d, dim, sums, queue);
}

// --- one segment -------------------------------------------------------------------------------------------------

template <typename Format>
struct Scratch {
  typename Format::Word* queries;  // [key heads, words, rows], or [rows, kPitch] for more than kStripRows
  typename Format::Word* panel;    // [words, kLanes]: a unit of keys, transposed
  float* scores;                   // [rows, kKeyBlock]
  float* sums;                     // [rows, D]: of the values of one block
  float* factors;                  // [strips, kLanes]
};

template <typename Format>
FASTSFT_NOINLINE void load_queries(const ForwardArgs& args, const ForwardItem& tile, typename Format::Word* queries) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, rows = tile.num_q * args.group;
  typename Format::Word row[256];
  for (int64_t head = tile.kv_head; head < tile.kv_head + tile.kv_heads; ++head) {
    RowPlace place{0, 0};
    for (int64_t r = 0; r < rows; ++r, advance(place, args.group)) {
      const int64_t token = tile.q_first + place.token, query_head = head * args.group + place.head;
      const void* query = element(dtype, args.q.data, token * args.q.token_stride + query_head * args.q.head_stride);
      const bool is_one_strip = rows <= kStripRows;
      pack_rows<Format, 256>(dtype, &query, 1, dim, is_one_strip ? row : queries + r * kPitch<Format>);
      for (int64_t w = 0; is_one_strip && w < dim / Format::kSteps; ++w) queries[w * rows + r] = row[w];
    }
    queries += rows * (rows <= kStripRows ? dim / Format::kSteps : kPitch<Format>);
  }
}

// Keys [start, start + n), of which those from `first` on are seen, for all rows.
struct Block {
  int64_t start, first, n;
  const void *keys[kKeyBlock], *values[kKeyBlock];
};

FASTSFT_NOINLINE void find_block(const ForwardArgs& args, const ForwardItem& tile, const KeyRange& keys, int64_t start,
                                 Block* block) {
  block->start = start;
  block->n = smaller(kKeyBlock, keys.end - start);
  block->first = larger<int64_t>(keys.begin - start, 0);
  find_rows(args, tile, args.k, start, block->n, block->keys);
  find_rows(args, tile, args.v, start, block->n, block->values);
  // The translation of an address takes longer than the line: it is sought a block ahead.
  for (int64_t j = 0; j < block->n; j += kLanes / 2) {
    __builtin_prefetch(block->keys[j]);
    __builtin_prefetch(block->values[j]);
  }
  for (int64_t j = block->n; j < kKeyBlock; ++j) {  // any row that may be read
    block->keys[j] = block->keys[block->n - 1];
    block->values[j] = block->values[block->n - 1];
  }
}

template <typename Format>
FASTSFT_NOINLINE void mask_and_normalise(const ForwardArgs& args, const ForwardItem& tile, const Block& block,
                                         const Scratch<Format>& scratch, const States& states) {
  const int64_t rows = tile.num_q * args.group, total = rows * tile.kv_heads;
  const int64_t begin = block.first / kLanes * kLanes, end = round_up(block.n, kLanes);
  RowPlace place{0, 0};
  for (int64_t strip = 0; strip < total; strip += kTileRows) {
    const int64_t have = smaller<int64_t>(kTileRows, total - strip), stats = strip / kTileRows * kLanes;
    float* scores = scratch.scores + strip * kKeyBlock;
    if (args.shape.softcap > 0) cap_scores(scores, have, begin, end, args.shape.softcap);
    Band bands[kTileRows];
    for (int64_t i = 0; i < have; ++i, advance(place, args.group)) {
      if (place.token == tile.num_q) place.token = 0;
      bands[i] = visible_band(tile.position + place.token, args.mask.left, args.mask.right, block.start, block.n);
    }
    hide(scores, bands, have, begin, end);
    online_softmax<Format>(scores, have, begin, end, states.maxima + stats, states.totals + stats,
                           scratch.factors + stats);
  }
}

// states = factors * states + sums; the sums are taken back to zero.
FASTSFT_NOINLINE void add_block(float* sums, const float* factors, int64_t rows, int64_t dim, float* states) {
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = factors[r / kTileRows * kLanes + r % kTileRows];
    for (int64_t d = r * dim; d < (r + 1) * dim; d += kLanes) {
      store(states + d, load(states + d) * factor + load(sums + d));
      store(sums + d, Vec{});
    }
  }
}

template <typename Format, DType kDType>
void decode_item(const ForwardArgs& args, const DecodeItem& item, float* memory) {
  using Word = typename Format::Word;
  constexpr int64_t kSteps = Format::kSteps, kUnitSteps = kLanes / kSteps;
  const ForwardItem& tile = item.tile;
  const int64_t dim = args.shape.head_dim, rows = tile.num_q * args.group, total = rows * tile.kv_heads;
  const int64_t max_rows = tile_rows(total), words = dim / kSteps;
  const float softcap = args.shape.softcap;
  const float score_factor = softcap > 0 ? args.shape.scale / softcap : args.shape.scale * kLog2e;
  const auto element_bytes = static_cast<int64_t>(dtype_size(kDType));
  const int64_t key_bytes = args.k.stride[2] * element_bytes, value_bytes = args.v.stride[2] * element_bytes;
  Scratch<Format> scratch;
  scratch.panel = reinterpret_cast<Word*>(memory);
  scratch.scores = memory + kLanes * dim;
  scratch.sums = scratch.scores + max_rows * kKeyBlock;
  scratch.factors = scratch.sums + max_rows * dim;
  scratch.queries = reinterpret_cast<Word*>(scratch.factors + 2 * max_rows);
  const States states = states_at(item.states + item.segment * states_size(max_rows, dim), dim, max_rows);
  load_queries<Format>(args, tile, scratch.queries);
  clear(states, total, dim);
  fill_zero(scratch.sums, scratch.sums + total * dim);

  const KeyRange keys = segment_of(keys_seen(args.mask, tile), item.segment);
  // Ahead of a unit of keys come the block's next ones, then its values; ahead of values, the next block's keys.
  const bool are_neighbours = key_bytes == dim * element_bytes && value_bytes == key_bytes;
  const int64_t trails = are_neighbours ? 1 : tile.kv_heads, trail_bytes = dim * element_bytes * tile.kv_heads / trails;
  RowQueue queue(trail_bytes);
  const auto ask_for = [&](const void* const* of_rows, int64_t unit, int64_t n, int64_t head_bytes) {
    for (int64_t j = unit * kLanes; j < smaller((unit + 1) * kLanes, n); ++j) {
      for (int64_t i = 0; i < trails; ++i) queue.add(static_cast<const char*>(of_rows[j]) + i * head_bytes);
    }
  };
  const int64_t unit_bytes = kLanes * trails * trail_bytes;
  const int64_t lead = larger<int64_t>(smaller<int64_t>(kAheadBytes / unit_bytes, kKeyBlock / kLanes), 1);
  Block blocks[2], *now = &blocks[0], *next = &blocks[1];
  find_block(args, tile, keys, keys.begin / kKeyBlock * kKeyBlock, now);
  for (int64_t unit = 0; unit < lead; ++unit) ask_for(now->keys, now->first / kLanes + unit, now->n, key_bytes);
  queue.finish();
  for (;;) {
    const bool is_last = now->start + kKeyBlock >= keys.end;
    if (!is_last) find_block(args, tile, keys, now->start + kKeyBlock, next);
    const int64_t begin = now->first / kLanes, end = (now->n + kLanes - 1) / kLanes;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit * kLanes, then = unit + lead;
      if (then < end) {
        ask_for(now->keys, then, now->n, key_bytes);
      } else {
        ask_for(now->values, begin + then - end, now->n, value_bytes);
      }
      for (int64_t head = 0; head < tile.kv_heads; ++head) {
        const Stream stream{now->keys + j, head * key_bytes};
        float* scores = scratch.scores + head * rows * kKeyBlock + j;
        if (rows > kStripRows) {
          score_many<Format>(kDType, scratch.queries + head * rows * kPitch<Format>, rows, stream, dim, score_factor,
                             scratch.panel, scores, queue);
        } else {
          with_rows(rows, [&](auto count) {
            score<Format, kDType, decltype(count)::value>(scratch.queries + head * rows * words, stream, words,
                                                          score_factor, scores, queue);
          });
        }
      }
    }
    mask_and_normalise(args, tile, *now, scratch, states);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit * kLanes, then = unit + lead;
      if (then < end) {
        ask_for(now->values, then, now->n, value_bytes);
      } else if (!is_last) {
        ask_for(next->keys, then - end, next->n, key_bytes);
      }
      const int64_t first = larger<int64_t>(now->first - j, 0) / kSteps;
      const int64_t last = smaller(kUnitSteps, (now->n - j + kSteps - 1) / kSteps);
      for (int64_t head = 0; head < tile.kv_heads; ++head) {
        const Stream stream{now->values + j, head * value_bytes};
        for (int64_t r = 0; r < rows; r += kStripRows) {
          const int64_t row = head * rows + r;
          const auto* probs = reinterpret_cast<const Word*>(scratch.scores + row * kKeyBlock) + j / kSteps;
          with_rows(smaller<int64_t>(kStripRows, rows - r), [&](auto count) {
            accumulate_row<Format, kDType, decltype(count)::value>(probs, stream, first, last, now->n - j, dim,
                                                                   scratch.sums + row * dim, queue);
          });
        }
      }
    }
    add_block(scratch.sums, scratch.factors, total, dim, states.sums);
    if (is_last) return;
    Block* const done = now;
    now = next;
    next = done;
  }
}

}  // namespace

void attention_decode_item(const ForwardArgs& args, const DecodeItem& item, float* scratch) {
  switch (args.shape.dtype) {
    case DType::kFloat32: return decode_item<Single, DType::kFloat32>(args, item, scratch);
    case DType::kFloat16: return decode_item<Single, DType::kFloat16>(args, item, scratch);
    case DType::kBFloat16: return decode_item<Bfloat16Format, DType::kBFloat16>(args, item, scratch);
  }
}

void attention_decode_fold(const ForwardArgs& args, const DecodeItem& item) {
  const ForwardItem& tile = item.tile;
  const int64_t dim = args.shape.head_dim, rows = tile.num_q * args.group * tile.kv_heads, max_rows = tile_rows(rows);
  const auto state = [&](int64_t i) { return states_at(item.states + i * states_size(max_rows, dim), dim, max_rows); };
  for (int64_t i = 1; i < segments_seen(keys_seen(args.mask, tile)); ++i) fold(state(0), state(i), rows, dim);
  store_tile(args, tile, state(0));
}

}  // namespace fastsft::FASTSFT_ISA_NS
