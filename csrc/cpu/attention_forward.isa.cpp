// Memory traffic per token and layer: q, k, v read and out written once per query tile that needs them (k and v again
// for every tile of ~192 rows, from cache), plus 4 bytes of lse per query head. Arithmetic: 4 * D multiply-adds per
// visible (query head, key) pair on paper 2 * D for Q K^T and 2 * D for P V, and one exp. Scores never leave a strip
// of rows.
//
// One item is a tile of queries with all query heads of one key head (so a key block is converted and transposed once
// for the whole group), swept over the key blocks with the running maximum and sum of Milakov and Gimelshein (2018).
// A row's result depends on nothing but its own data and the block boundaries: every row goes through the same register
// block, padded rows included, a masked key adds an exact zero, and a block that a row does not see changes nothing.
#include <cmath>

#include "attention_kernels.h"
#include "attention_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

template <typename Format>
struct Tile {
  typename Format::Word *keys, *values;  // words of [D, kKeyBlock] and of [kKeyBlock, D]
  typename Format::Word* queries;        // [rows, kRowPitch]
  float* sums;                           // [rows, D]
  float *maxima, *totals;                // [strips, kLanes]; maxima in units of log 2
  float* scores;                         // [kTileRows, kKeyBlock]
};

template <typename Format>
Tile<Format> carve(float* scratch, int64_t dim, int64_t rows, int64_t pitch) {
  using Word = typename Format::Word;
  Tile<Format> t;
  t.keys = reinterpret_cast<Word*>(scratch);
  t.values = t.keys + kKeyBlock * dim / Format::kSteps;
  t.queries = t.values + kKeyBlock * dim / Format::kSteps;
  t.sums = reinterpret_cast<float*>(t.queries + rows * pitch);
  t.maxima = t.sums + rows * dim;
  t.totals = t.maxima + 2 * rows;
  t.scores = t.totals + 2 * rows;
  return t;
}

void row_addresses(const ForwardArgs& args, const ForwardItem& item, const KeySource& source, int64_t first, int64_t n,
                   const void** rows) {
  const DType dtype = args.shape.dtype;
  const int64_t head = item.kv_head * source.stride[2];
  if (item.table == nullptr) {
    for (int64_t j = 0; j < n; ++j) {
      rows[j] = element(dtype, source.data, head + (item.k_first + first + j) * source.stride[1]);
    }
    return;
  }
  int64_t block = first / args.block_size, slot = first % args.block_size;
  for (int64_t j = 0; j < n; ++j) {
    rows[j] = element(dtype, source.data, head + item.table[block] * source.stride[0] + slot * source.stride[1]);
    if (++slot == args.block_size) {
      slot = 0;
      ++block;
    }
  }
}

// Scores of one strip, columns [begin, end), in units of log 2 -> probabilities relative to each row's running
// maximum, in the scores' place. factors: what each row's past must be scaled by.
template <typename Format>
FASTSFT_NOINLINE void online_softmax(float* scores, int64_t have, int64_t begin, int64_t end, float* maxima,
                                     float* totals, float* factors) {
  Vec rows[kLanes]{};
  for (int64_t i = 0; i < have; ++i) {
    const float* row = scores + i * kKeyBlock;
    rows[i] = load(row + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) rows[i] = max_of(rows[i], load(row + j));
  }
  const Vec before = load(maxima), now = max_of(reduce_rows<true>(rows), before);
  const Vec reference = select(now == -INFINITY, Vec{}, now);  // no key seen yet: 2^(-inf - 0) = 0, not NaN
  const Vec past = exp2_nonpositive<6>(before - reference);
  float references[kLanes];
  store(references, reference);
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    rows[i] = Vec{};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec p = exp2_nonpositive<Format::kExpDegree>(load(row + j) - references[i]);
      rows[i] += p;
      store_along_columns<Format>(p, row, j);
    }
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
FASTSFT_NOINLINE void load_queries(const ForwardArgs& args, const ForwardItem& item, int64_t row, int64_t have,
                                   typename Format::Word* panel) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const void* rows[kTileRows];
  for (int64_t i = 0; i < have + kTileRows; ++i) {
    const int64_t r = row + i, token = item.q_first + r / group, head = item.kv_head * group + r % group;
    if (r >= item.num_q * group) break;
    const void* query = element(dtype, args.q.data, token * args.q.token_stride + head * args.q.head_stride);
    if (i < have) {
      rows[i] = query;
      const int64_t index = (token * args.shape.num_q_heads + head) * dim;
      prefetch_row<For::kWriting>(dtype, element(dtype, args.out, index), dim);
    } else {
      prefetch_row<For::kReading>(dtype, query, dim);
    }
  }
  pack_rows<Format, kMaxDim>(dtype, rows, have, dim, panel + row * kRowPitch<Format, kMaxDim>);
}

template <typename Format>
FASTSFT_NOINLINE void store_tile(const ForwardArgs& args, const ForwardItem& item, const Tile<Format>& tile) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim;
  for (int64_t r = 0; r < item.num_q * args.group; ++r) {
    const int64_t token = item.q_first + r / args.group, head = item.kv_head * args.group + r % args.group;
    const int64_t lane = r / kTileRows * kLanes + r % kTileRows;
    const float total = tile.totals[lane];
    store_row(dtype, tile.sums + r * dim, dim, total == 0 ? 0.0f : 1.0f / total,
              element(dtype, args.out, (token * args.shape.num_q_heads + head) * dim));
    if (args.lse != nullptr) {
      args.lse[head * args.total_q + token] = total == 0 ? -INFINITY : tile.maxima[lane] * kLn2 + std::log(total);
    }
  }
}

template <typename Format, int64_t kMaxDim>
void forward_item(const ForwardArgs& args, const ForwardItem& item, float* scratch) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>, kSteps = Format::kSteps;
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group, rows = item.num_q * group;
  const Tile<Format> tile = carve<Format>(scratch, dim, tile_rows(item.num_q, group), kPitch);
  const float softcap = args.shape.softcap;
  const float score_factor = softcap > 0 ? args.shape.scale / softcap : args.shape.scale * kLog2e;
  const int64_t left = args.mask.left, right = args.mask.right;

  fill_zero(tile.sums, tile.sums + rows * dim);
  for (int64_t strip = 0; strip * kTileRows < rows; ++strip) {
    store(tile.maxima + strip * kLanes, splat(-INFINITY));
    store(tile.totals + strip * kLanes, Vec{});
  }

  const int64_t keys_begin = larger<int64_t>(item.position - left, 0);
  const int64_t keys_end = smaller<int64_t>(item.position + item.num_q + right, item.num_k);
  const void* addresses[kKeyBlock];
  const int64_t first_start = keys_begin / kKeyBlock * kKeyBlock;
  for (int64_t start = first_start; start < keys_end; start += kKeyBlock) {
    const int64_t n = smaller<int64_t>(kKeyBlock, keys_end - start);
    row_addresses(args, item, args.k, start, n, addresses);
    pack_columns<Format>(dtype, addresses, n, dim, tile.keys, kKeyBlock);
    row_addresses(args, item, args.v, start, n, addresses);
    pack_stack<Format>(dtype, addresses, n, dim, tile.values);

    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t have = smaller<int64_t>(kTileRows, rows - row);
      if (start == first_start) load_queries<Format, kMaxDim>(args, item, row, have, tile.queries);
      const Band top = visible_band(item.position + row / group, left, right, start, n);
      const Band bottom = visible_band(item.position + (row + have - 1) / group, left, right, start, n);
      if (top.first >= bottom.last) continue;
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Format, Left::kRows, kPitch, Into::kStore>(have, end - begin, tile.queries + row * kPitch,
                                                         tile.keys + begin, kKeyBlock, dim / kSteps,
                                                         tile.scores + begin, kKeyBlock, &score_factor);
      if (softcap > 0) cap_scores(tile.scores, have, begin, end, softcap);
      if (bottom.first > begin || top.last < end) {
        for (int64_t i = 0; i < have; ++i) {
          float* scores = tile.scores + i * kKeyBlock;
          const Band band = visible_band(item.position + (row + i) / group, left, right, start, n);
          for (int64_t j = begin; j < end; j += kLanes) {
            store(scores + j, select(inside(band, j), load(scores + j), splat(-INFINITY)));
          }
        }
      }
      float factors[kLanes];
      const int64_t stats = row / kTileRows * kLanes;
      online_softmax<Format>(tile.scores, have, begin, end, tile.maxima + stats, tile.totals + stats, factors);
      const int64_t first = top.first / kSteps, last = (bottom.last + kSteps - 1) / kSteps;
      const auto* probs = reinterpret_cast<const typename Format::Word*>(tile.scores);
      product<Format, Left::kRows, kKeyBlock, Into::kRescale>(have, dim, probs + first, tile.values + first * dim, dim,
                                                              last - first, tile.sums + row * dim, dim, factors);
    }
  }
  store_tile(args, item, tile);
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
