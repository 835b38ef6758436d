// Memory traffic per token and layer: q, k, v read and out written once per query tile that needs them (k and v again
// for every tile of ~192 rows, from cache), plus 4 bytes of lse per query head. Arithmetic: 4 * D multiply-adds per
// visible (query head, key) pair on paper 2 * D for Q K^T and 2 * D for P V, and one exp. Scores never leave a strip
// of rows.
//
// One item is a tile of queries with all query heads of a key head (so a key block is converted and transposed once for
// the whole group), swept over the key blocks with the running maximum and sum of Milakov and Gimelshein (2018). Every
// segment of keys starts afresh and is folded into those before it, so that the segments of a tile of few queries can
// be items of their own. Such items wait for memory: they take all key heads, whose rows are neighbours there, and ask
// for the next block of keys all the while they compute.
// A row's result depends on nothing but its own data and the block and segment boundaries: every row goes through the
// same register block, padded rows included, a masked key adds an exact zero, and a block or a segment that a row does
// not see changes nothing.
#include <cmath>

#include "attention_kernels.h"
#include "attention_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

// What is known of each row after some keys.
struct States {
  float* sums;             // [rows, D]
  float *maxima, *totals;  // [strips, kLanes]; maxima in units of log 2
};
States states_at(float* memory, int64_t dim, int64_t rows) {
  return {memory, memory + rows * dim, memory + rows * (dim + 2)};
}
float* states_of(const ForwardItem& item, int64_t kv_head, int64_t segments, int64_t segment, int64_t size) {
  return item.states + (kv_head * segments + segment) * size;
}

template <typename Format>
struct Tile {
  typename Format::Word *keys, *values;  // words of [D, kKeyBlock] and of [kKeyBlock, D]
  float* scores;                         // [kTileRows, kKeyBlock]
  typename Format::Word* queries;        // [key heads, rows, kRowPitch]
  float* states;                         // two times
};

template <typename Format>
Tile<Format> carve(float* scratch, int64_t dim, int64_t queries) {
  using Word = typename Format::Word;
  Tile<Format> t;
  t.keys = reinterpret_cast<Word*>(scratch);
  t.values = t.keys + kKeyBlock * dim / Format::kSteps;
  t.scores = reinterpret_cast<float*>(t.values + kKeyBlock * dim / Format::kSteps);
  t.queries = reinterpret_cast<Word*>(t.scores + kTileRows * kKeyBlock);
  t.states = reinterpret_cast<float*>(t.queries + queries);
  return t;
}

// Where the rows of one block of keys or values are, and those of the next, which are asked for ahead of their use: a
// cache's rows are too short and too scattered for the processor to see them coming.
class BlockRows {
 public:
  BlockRows(const ForwardArgs& args, const ForwardItem& item, const KeySource& source, const KeyRange& keys,
            int64_t start)
      : args_(args), item_(item), source_(source), end_(keys.end), start_(start) {
    find_next();
    prefetch(0, 1);
  }

  void advance() {
    const void** const later = now_;
    now_ = next_;
    next_ = later;
    find_next();
  }

  // The block's rows of the item's key head `head`, until the next call.
  const void* const* of_head(int64_t head) {
    if (head == 0) return now_;
    const int64_t offset = head * source_.stride[2];
    for (int64_t j = 0; j < kKeyBlock; ++j) of_head_[j] = element(args_.shape.dtype, now_[j], offset);
    return of_head_;
  }

  // Asks for part `part` of `parts` of the next block, all of the item's heads: they are neighbours in memory.
  void prefetch(int64_t part, int64_t parts) const {
    const int64_t bytes = args_.shape.head_dim * static_cast<int64_t>(dtype_size(args_.shape.dtype));
    for_each_row(part, parts, [&](const void* row) { prefetch_row(row, bytes); });
  }
  void prefetch(int64_t part, int64_t parts, RowQueue& queue) const {
    for_each_row(part, parts, [&](const void* row) { queue.add(row); });
  }

 private:
  template <typename Visit>
  FASTSFT_INLINE void for_each_row(int64_t part, int64_t parts, Visit visit) const {
    const int64_t end = smaller((part + 1) * kKeyBlock / parts, next_count_);
    for (int64_t j = part * kKeyBlock / parts; j < end; ++j) {
      for (int64_t head = 0; head < item_.kv_heads; ++head) {
        visit(element(args_.shape.dtype, next_[j], head * source_.stride[2]));
      }
    }
  }
  void find_next() {
    next_count_ = smaller(kKeyBlock, end_ - start_);
    const DType dtype = args_.shape.dtype;
    const int64_t head = item_.kv_head * source_.stride[2];
    if (item_.table == nullptr) {
      for (int64_t j = 0; j < next_count_; ++j) {
        next_[j] = element(dtype, source_.data, head + (item_.k_first + start_ + j) * source_.stride[1]);
      }
    } else {
      int64_t block = start_ / args_.block_size, slot = start_ % args_.block_size;
      for (int64_t j = 0; j < next_count_; ++block, slot = 0) {
        const void* row =
            element(dtype, source_.data, head + item_.table[block] * source_.stride[0] + slot * source_.stride[1]);
        for (const int64_t last = smaller(j + args_.block_size - slot, next_count_); j < last; ++j) {
          next_[j] = row;
          row = element(dtype, row, source_.stride[1]);
        }
      }
    }
    start_ += kKeyBlock;
  }

  const ForwardArgs& args_;
  const ForwardItem& item_;
  const KeySource& source_;
  int64_t end_, start_, next_count_ = 0;
  const void *rows_[2][kKeyBlock]{}, *of_head_[kKeyBlock];
  const void **now_ = rows_[0], **next_ = rows_[1];
};

// Scores of one strip, columns [begin, end), in units of log 2 -> probabilities relative to each row's running
// maximum, in the scores' place. factors: what each row's past must be scaled by.
template <typename Format>
FASTSFT_NOINLINE void online_softmax(float* scores, int64_t have, int64_t begin, int64_t end, float* maxima,
                                     float* totals, float* factors) {
  Vec rows[kLanes]{};
  for (int64_t i = 0; i < have; ++i) {
    const float* row = scores + i * kKeyBlock;
    Vec most = load(row + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) most = max_of(most, load(row + j));
    rows[i] = most;
  }
  const Vec before = load(maxima), now = max_of(reduce_rows<true>(rows), before);
  const Vec reference = select(now == -INFINITY, Vec{}, now);  // no key seen yet: 2^(-inf - 0) = 0, not NaN
  const Vec past = exp2_nonpositive<6>(before - reference);
  float references[kLanes];
  store(references, reference);
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    const Vec own = splat(references[i]);
    Vec sum{};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec p = exp2_nonpositive<kExpDegree<Format>>(load(row + j) - own);
      sum += p;
      store_along_columns<Format>(p, row, j);
    }
    rows[i] = sum;
  }
  store(maxima, now);
  store(totals, load(totals) * past + reduce_rows<false>(rows));
  store(factors, past);
}

FASTSFT_NOINLINE void cap_scores(float* scores, int64_t have, int64_t begin, int64_t end, float softcap) {
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    for (int64_t j = begin; j < end; j += kLanes) store(row + j, tanh_of(load(row + j)) * (softcap * kLog2e));
  }
}

// Packs one strip of queries from `row` on and asks for the next strip and for this one's place in the output.
template <typename Format, int64_t kMaxDim>
FASTSFT_NOINLINE void load_queries(const ForwardArgs& args, const ForwardItem& item, int64_t kv_head, int64_t row,
                                   int64_t have, typename Format::Word* panel, RowQueue& queue) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const int64_t end = item.num_q * group, heads = args.shape.num_q_heads;
  const void* rows[kTileRows];
  RowPlace place = place_of(row, group);
  for (int64_t r = row; r < smaller(row + 2 * kTileRows, end); ++r, advance(place, group)) {
    const int64_t token = item.q_first + place.token, head = kv_head * group + place.head;
    const void* query = element(dtype, args.q.data, token * args.q.token_stride + head * args.q.head_stride);
    if (r < row + have) {
      rows[r - row] = query;
      queue.add(element(dtype, args.out, (token * heads + head) * dim));
    } else {
      queue.add(query);
    }
  }
  pack_rows<Format, kMaxDim>(dtype, rows, have, dim, panel + row * kRowPitch<Format, kMaxDim>);
}

FASTSFT_NOINLINE void clear(const States& states, int64_t rows, int64_t dim) {
  fill_zero(states.sums, states.sums + rows * dim);
  for (int64_t strip = 0; strip * kTileRows < rows; ++strip) {
    store(states.maxima + strip * kLanes, splat(-INFINITY));
    store(states.totals + strip * kLanes, Vec{});
  }
}

// A row that saw no key of the segment stays as it is.
FASTSFT_NOINLINE void fold(const States& whole, const States& segment, int64_t rows, int64_t dim) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t stats = row / kTileRows * kLanes;
    const Vec before = load(whole.maxima + stats), other = load(segment.maxima + stats);
    const Vec now = max_of(other, before), reference = select(now == -INFINITY, Vec{}, now);
    const Vec factor = exp2_nonpositive<6>(before - reference), other_factor = exp2_nonpositive<6>(other - reference);
    store(whole.maxima + stats, now);
    store(whole.totals + stats, load(whole.totals + stats) * factor + load(segment.totals + stats) * other_factor);
    for (int64_t i = 0; i < smaller<int64_t>(kTileRows, rows - row); ++i) {
      float* sums = whole.sums + (row + i) * dim;
      const float* others = segment.sums + (row + i) * dim;
      for (int64_t d = 0; d < dim; d += kLanes) {
        store(sums + d, load(sums + d) * factor[i] + load(others + d) * other_factor[i]);
      }
    }
  }
}

// One strip, from `row` on, of which the states are final.
FASTSFT_NOINLINE void store_strip(const ForwardArgs& args, const ForwardItem& item, int64_t kv_head, int64_t row,
                                  int64_t have, const float* sums, Vec maxima, Vec totals) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const VecInt is_blind = totals == 0.0f;  // saw no key
  float factors[kLanes], lse[kLanes];
  store(factors, select(is_blind, Vec{}, 1.0f / totals));
  store(lse, select(is_blind, splat(-INFINITY), (maxima + log2_of(totals)) * kLn2));
  void* rows[kTileRows];
  RowPlace place = place_of(row, group);
  for (int64_t i = 0; i < have; ++i, advance(place, group)) {
    const int64_t token = item.q_first + place.token, head = kv_head * group + place.head;
    rows[i] = element(dtype, args.out, (token * args.shape.num_q_heads + head) * dim);
    if (args.lse != nullptr) args.lse[head * args.total_q + token] = lse[i];
  }
  store_rows(dtype, sums, dim, have, dim, factors, rows);
}

FASTSFT_NOINLINE void store_tile(const ForwardArgs& args, const ForwardItem& item, int64_t kv_head,
                                 const States& states) {
  const int64_t rows = item.num_q * args.group;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t stats = row / kTileRows * kLanes;
    store_strip(args, item, kv_head, row, smaller<int64_t>(kTileRows, rows - row),
                states.sums + row * args.shape.head_dim, load(states.maxima + stats), load(states.totals + stats));
  }
}

// Hides the columns of a strip that lie outside its rows' bands. Most of them lie in the last vector.
FASTSFT_NOINLINE void hide(float* scores, const Band* bands, int64_t have, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    for (int64_t j = begin; j < end; j += kLanes) {
      if (bands[i].first <= j && j + kLanes <= bands[i].last) continue;
      store(row + j, select(inside(bands[i], j), load(row + j), splat(-INFINITY)));
    }
  }
}

// One block of keys, [start, start + n), for all queries of one key head. packs: the queries are packed on the way.
// is_whole: there are no other keys, and the strips' results go straight to the output.
template <typename Format, int64_t kMaxDim>
FASTSFT_NOINLINE void attend(const ForwardArgs& args, const ForwardItem& item, int64_t start, int64_t n, bool packs,
                             bool is_whole, const Tile<Format>& tile, typename Format::Word* queries,
                             const States& states, RowQueue& queue) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>, kSteps = Format::kSteps;
  const int64_t dim = args.shape.head_dim, group = args.group, rows = item.num_q * group;
  const float softcap = args.shape.softcap;
  const float score_factor = softcap > 0 ? args.shape.scale / softcap : args.shape.scale * kLog2e;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t have = smaller<int64_t>(kTileRows, rows - row);
    if (packs) load_queries<Format, kMaxDim>(args, item, item.kv_head, row, have, queries, queue);
    Band bands[kTileRows];
    RowPlace place = place_of(row, group);
    for (int64_t i = 0; i < have; ++i, advance(place, group)) {
      bands[i] = visible_band(item.position + place.token, args.mask.left, args.mask.right, start, n);
    }
    const Band top = bands[0], bottom = bands[have - 1];
    float* sums = states.sums + (is_whole ? 0 : row * dim);
    const int64_t stats = is_whole ? 0 : row / kTileRows * kLanes;
    if (is_whole) {
      store(states.maxima, splat(-INFINITY));
      store(states.totals, Vec{});
    }
    if (top.first < bottom.last) {
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Format, Left::kRows, kPitch, Into::kStore>(have, end - begin, queries + row * kPitch, tile.keys + begin,
                                                         kKeyBlock, dim / kSteps, tile.scores + begin, kKeyBlock,
                                                         &score_factor, queue);
      if (softcap > 0) cap_scores(tile.scores, have, begin, end, softcap);
      if (bottom.first > begin || top.last < end) hide(tile.scores, bands, have, begin, end);
      float factors[kLanes];
      online_softmax<Format>(tile.scores, have, begin, end, states.maxima + stats, states.totals + stats, factors);
      const int64_t first = top.first / kSteps, last = (bottom.last + kSteps - 1) / kSteps;
      const auto* probs = reinterpret_cast<const typename Format::Word*>(tile.scores) + first;
      const auto* values = tile.values + first * dim;
      const float one = 1.0f;
      if (is_whole) {
        product<Format, Left::kRows, kKeyBlock, Into::kStore>(have, dim, probs, values, dim, last - first, sums, dim,
                                                              &one, queue);
      } else {
        product<Format, Left::kRows, kKeyBlock, Into::kRescale>(have, dim, probs, values, dim, last - first, sums, dim,
                                                                factors, queue);
      }
    } else if (is_whole) {
      fill_zero(sums, sums + have * dim);
    }
    queue.finish();
    if (is_whole) {
      store_strip(args, item, item.kv_head, row, have, sums, load(states.maxima), load(states.totals));
    }
  }
}

// Sweeps the queries over `keys`, which lie in one segment. The states of the item's key heads are `stride` apart.
template <typename Format, int64_t kMaxDim>
void sweep(const ForwardArgs& args, const ForwardItem& item, const KeyRange& keys, bool are_queries_packed,
           const Tile<Format>& tile, float* states, int64_t stride) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>;
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, rows = item.num_q * args.group;
  const int64_t max_rows = tile_rows(item.num_q, args.group), heads = item.kv_heads;
  const bool is_whole = item.states == nullptr && item.num_k <= kKeyBlock;
  RowQueue queue(dim * static_cast<int64_t>(dtype_size(dtype)));
  for (int64_t head = 0; head < heads; ++head) {
    if (!is_whole) clear(states_at(states + head * stride, dim, max_rows), rows, dim);
    for (int64_t row = 0; row < rows && item.states != nullptr; row += kTileRows) {
      load_queries<Format, kMaxDim>(args, item, item.kv_head + head, row, smaller<int64_t>(kTileRows, rows - row),
                                    tile.queries + head * max_rows * kPitch, queue);
    }
  }
  const int64_t first_start = keys.begin / kKeyBlock * kKeyBlock;
  BlockRows key_rows(args, item, args.k, keys, first_start), value_rows(args, item, args.v, keys, first_start);
  for (int64_t start = first_start; start < keys.end; start += kKeyBlock) {
    const int64_t n = smaller<int64_t>(kKeyBlock, keys.end - start);
    key_rows.advance();
    value_rows.advance();
    for (int64_t head = 0; head < heads; ++head) {
      const void* const* addresses = key_rows.of_head(head);
      for (int64_t i = 0; i < kKeyBlock / kLanes; ++i) {
        const int64_t j = i * kLanes, have = smaller<int64_t>(kLanes, n - j);
        if (have > 0) pack_columns<Format>(dtype, addresses + j, have, dim, tile.keys + j, kKeyBlock);
        key_rows.prefetch(2 * head * kKeyBlock / kLanes + i, 2 * heads * kKeyBlock / kLanes);
      }
      addresses = value_rows.of_head(head);
      for (int64_t i = 0; i < kKeyBlock / kLanes; ++i) {
        const int64_t j = i * kLanes, have = smaller<int64_t>(kLanes, n - j);
        if (have > 0) pack_stack<Format>(dtype, addresses + j, have, dim, tile.values + j / Format::kSteps * dim);
        value_rows.prefetch(2 * head * kKeyBlock / kLanes + i, 2 * heads * kKeyBlock / kLanes);
      }
      auto* queries = tile.queries + head * max_rows * kPitch;
      const bool packs = item.states == nullptr && start == first_start && !are_queries_packed;
      const States state = states_at(states + head * stride, dim, max_rows);
      key_rows.prefetch(2 * head + 1, 2 * heads, queue);
      value_rows.prefetch(2 * head + 1, 2 * heads, queue);
      attend<Format, kMaxDim>(args, item, start, n, packs, is_whole, tile, queries, state, queue);
    }
  }
}

template <typename Format, int64_t kMaxDim>
void forward_item(const ForwardArgs& args, const ForwardItem& item, float* scratch) {
  const int64_t dim = args.shape.head_dim, rows = item.num_q * args.group, max_rows = tile_rows(item.num_q, args.group);
  const int64_t size = states_size(max_rows, dim);
  const Tile<Format> tile = carve<Format>(scratch, dim, item.kv_heads * max_rows * kRowPitch<Format, kMaxDim>);
  const KeyRange keys = keys_seen(args.mask, item);
  const int64_t first = keys.begin / kKeySegment, segments = segments_seen(keys);
  const auto part = [&](int64_t i) {
    return KeyRange{larger(keys.begin, (first + i) * kKeySegment), smaller(keys.end, (first + i + 1) * kKeySegment)};
  };
  if (item.states != nullptr) {
    return sweep<Format, kMaxDim>(args, item, part(item.segment), false, tile,
                                  states_of(item, item.kv_head, segments, item.segment, size), segments * size);
  }
  const States whole = states_at(tile.states, dim, max_rows), next = states_at(tile.states + size, dim, max_rows);
  if (segments == 0) clear(whole, rows, dim);
  for (int64_t i = 0; i < segments; ++i) {
    sweep<Format, kMaxDim>(args, item, part(i), i > 0, tile, i == 0 ? whole.sums : next.sums, 0);
    if (i > 0) fold(whole, next, rows, dim);
  }
  if (segments == 0 || item.num_k > kKeyBlock) store_tile(args, item, item.kv_head, whole);
}

}  // namespace

void attention_forward_item(const ForwardArgs& args, const ForwardItem& item, float* scratch) {
  const bool is_small = args.shape.head_dim <= 64;
  if (args.shape.dtype == DType::kBFloat16) {
    using Format = Bfloat16Format;
    return is_small ? forward_item<Format, 64>(args, item, scratch) : forward_item<Format, 256>(args, item, scratch);
  }
  return is_small ? forward_item<Single, 64>(args, item, scratch) : forward_item<Single, 256>(args, item, scratch);
}

void attention_forward_fold(const ForwardArgs& args, const ForwardItem& item) {
  const int64_t dim = args.shape.head_dim, rows = tile_rows(item.num_q, args.group);
  const int64_t segments = segments_seen(keys_seen(args.mask, item)), size = states_size(rows, dim);
  for (int64_t head = item.kv_head; head < item.kv_head + item.kv_heads; ++head) {
    const auto state = [&](int64_t i) { return states_at(states_of(item, head, segments, i, size), dim, rows); };
    for (int64_t i = 1; i < segments; ++i) fold(state(0), state(i), item.num_q * args.group, dim);
    store_tile(args, item, head, state(0));
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
