// Memory traffic per token and layer: q, k, v read and out written once per query tile that needs them (k and v again
// for every tile of ~192 rows, from cache), plus 4 bytes of lse per query head. Arithmetic: 4 * D multiply-adds per
// visible (query head, key) pair on paper 2 * D for Q K^T and 2 * D for P V, and one exp. Scores never leave a strip
// of rows.
//
// One item is a tile of queries with all query heads of a key head (so a key block is converted and transposed once for
// the whole group), swept over the key blocks with a running maximum and sum. Every segment of keys starts afresh and
// is folded into those before it, as in attention_decode.isa.cpp, where the segments are items of their own.
// A row's result depends on nothing but its own data and the block and segment boundaries: every row goes through the
// same register block, padded rows included, a masked key adds an exact zero, and a block or a segment that a row does
// not see changes nothing.
#include "attention_softmax.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

template <typename Format>
struct Tile {
  typename Format::Word *keys, *values;  // words of [D, kKeyBlock] and of [kKeyBlock, D]
  float* scores;                         // [kTileRows, kKeyBlock]
  typename Format::Word* queries;        // [rows, kRowPitch]
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

  const void* const* now() const { return now_; }

  // Asks for part `part` of `parts` of the next block.
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
    for (int64_t j = part * kKeyBlock / parts; j < end; ++j) visit(next_[j]);
  }
  void find_next() {
    next_count_ = smaller(kKeyBlock, end_ - start_);
    find_rows(args_, item_, source_, start_, next_count_, next_);
    start_ += kKeyBlock;
  }

  const ForwardArgs& args_;
  const ForwardItem& item_;
  const KeySource& source_;
  int64_t end_, start_, next_count_ = 0;
  const void* rows_[2][kKeyBlock]{};
  const void **now_ = rows_[0], **next_ = rows_[1];
};

// Packs one strip of queries from `row` on and asks for the next strip and for this one's place in the output.
template <typename Format, int64_t kMaxDim>
FASTSFT_NOINLINE void load_queries(const ForwardArgs& args, const ForwardItem& item, int64_t row, int64_t have,
                                   typename Format::Word* panel, RowQueue& queue) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const int64_t end = item.num_q * group, heads = args.shape.num_q_heads;
  const void* rows[kTileRows];
  RowPlace place = place_of(row, group);
  for (int64_t r = row; r < smaller(row + 2 * kTileRows, end); ++r, advance(place, group)) {
    const int64_t token = item.q_first + place.token, head = item.kv_head * group + place.head;
    const void* query = element(dtype, args.q.data, token * args.q.token_stride + head * args.q.head_stride);
    if (r < row + have) {
      rows[r - row] = query;
      queue.add(element(dtype, args.out, (token * heads + head) * dim));
    } else {
      queue.add(query);
    }
  }
  pack_rows<Format, kMaxDim>(dtype, rows, have, dim, panel);
}

// One block of keys, [start, start + n), for all queries of one key head. packs: the queries are packed on the way.
// is_whole: there are no other keys, and the strips' results go straight to the output.
template <typename Format, int64_t kMaxDim>
FASTSFT_NOINLINE void attend(const ForwardArgs& args, const ForwardItem& item, int64_t start, int64_t n, bool packs,
                             bool is_whole, const Tile<Format>& tile, const States& states, RowQueue& queue) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>, kSteps = Format::kSteps;
  const int64_t dim = args.shape.head_dim, group = args.group, rows = item.num_q * group;
  const float softcap = args.shape.softcap;
  const float score_factor = softcap > 0 ? args.shape.scale / softcap : args.shape.scale * kLog2e;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t have = smaller<int64_t>(kTileRows, rows - row);
    const int64_t strip = is_whole ? 0 : row;  // strips that nothing comes back to share the place of the first
    auto* panel = tile.queries + strip * kPitch;
    if (packs) load_queries<Format, kMaxDim>(args, item, row, have, panel, queue);
    Band bands[kTileRows];
    RowPlace place = place_of(row, group);
    for (int64_t i = 0; i < have; ++i, advance(place, group)) {
      bands[i] = visible_band(item.position + place.token, args.mask.left, args.mask.right, start, n);
    }
    const Band top = bands[0], bottom = bands[have - 1];
    float* sums = states.sums + strip * dim;
    const int64_t stats = strip / kTileRows * kLanes;
    if (is_whole) {
      store(states.maxima, splat(-INFINITY));
      store(states.totals, Vec{});
    }
    if (top.first < bottom.last) {
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Format, Left::kRows, kPitch, Into::kStore>(have, end - begin, panel, tile.keys + begin, kKeyBlock,
                                                         dim / kSteps, tile.scores + begin, kKeyBlock, &score_factor,
                                                         queue);
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
      store_strip(args, item, row, have, sums, load(states.maxima), load(states.totals));
    }
  }
}

// Sweeps the queries over `keys`, which lie in one segment.
template <typename Format, int64_t kMaxDim>
void sweep(const ForwardArgs& args, const ForwardItem& item, const KeyRange& keys, bool are_queries_packed,
           const Tile<Format>& tile, const States& states) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim;
  const bool is_whole = item.num_k <= kKeyBlock;
  RowQueue queue(dim * static_cast<int64_t>(dtype_size(dtype)));
  if (!is_whole) clear(states, item.num_q * args.group, dim);
  const int64_t first_start = keys.begin / kKeyBlock * kKeyBlock;
  BlockRows key_rows(args, item, args.k, keys, first_start), value_rows(args, item, args.v, keys, first_start);
  for (int64_t start = first_start; start < keys.end; start += kKeyBlock) {
    const int64_t n = smaller<int64_t>(kKeyBlock, keys.end - start);
    key_rows.advance();
    value_rows.advance();
    for (int64_t i = 0; i < kKeyBlock / kLanes; ++i) {
      const int64_t j = i * kLanes, have = smaller<int64_t>(kLanes, n - j);
      if (have > 0) pack_columns<Format>(dtype, key_rows.now() + j, have, dim, tile.keys + j, kKeyBlock);
      key_rows.prefetch(i, 2 * kKeyBlock / kLanes);
    }
    for (int64_t i = 0; i < kKeyBlock / kLanes; ++i) {
      const int64_t j = i * kLanes, have = smaller<int64_t>(kLanes, n - j);
      if (have > 0) pack_stack<Format>(dtype, value_rows.now() + j, have, dim, tile.values + j / Format::kSteps * dim);
      value_rows.prefetch(i, 2 * kKeyBlock / kLanes);
    }
    key_rows.prefetch(1, 2, queue);
    value_rows.prefetch(1, 2, queue);
    const bool packs = start == first_start && !are_queries_packed;
    attend<Format, kMaxDim>(args, item, start, n, packs, is_whole, tile, states, queue);
  }
}

template <typename Format, int64_t kMaxDim>
void forward_item(const ForwardArgs& args, const ForwardItem& item, float* scratch) {
  const int64_t dim = args.shape.head_dim, rows = item.num_q * args.group, max_rows = tile_rows(rows);
  const Tile<Format> tile = carve<Format>(scratch, dim, max_rows * kRowPitch<Format, kMaxDim>);
  const States whole = states_at(tile.states, dim, max_rows);
  const States next = states_at(tile.states + states_size(max_rows, dim), dim, max_rows);
  const KeyRange keys = keys_seen(args.mask, item);
  const int64_t segments = segments_seen(keys);
  if (segments == 0) clear(whole, rows, dim);
  for (int64_t i = 0; i < segments; ++i) {
    sweep<Format, kMaxDim>(args, item, segment_of(keys, i), i > 0, tile, i == 0 ? whole : next);
    if (i > 0) fold(whole, next, rows, dim);
  }
  if (segments == 0 || item.num_k > kKeyBlock) store_tile(args, item, whole);
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

}  // namespace fastsft::FASTSFT_ISA_NS
