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

struct Tile {
  float *keys, *values;    // [D, kKeyBlock] and [kKeyBlock, D]
  float *queries, *sums;   // [rows, D]
  float *maxima, *totals;  // [rows]
  float* scores;           // [kStrip, kKeyBlock]
};

Tile carve(float* scratch, int64_t dim, int64_t rows) {
  Tile t;
  t.keys = scratch;
  t.values = t.keys + kKeyBlock * dim;
  t.queries = t.values + kKeyBlock * dim;
  t.sums = t.queries + rows * dim;
  t.maxima = t.sums + rows * dim;
  t.totals = t.maxima + rows;
  t.scores = t.totals + rows;
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

// Scores of one strip, columns [begin, end), in softcap's units -> probabilities relative to each row's running
// maximum. factors: what each row's past must be scaled by.
FASTSFT_NOINLINE void online_softmax(float* scores, int64_t begin, int64_t end, float* maxima, float* totals,
                                     float* factors) {
  float tops[kStrip], references[kStrip];
  for (int i = 0; i < kStrip; ++i) {
    const float* row = scores + i * kKeyBlock;
    Vec top = load(row + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) top = max_of(top, load(row + j));
    tops[i] = max_lanes(top);
  }
  Vec past{};
  for (int i = 0; i < kStrip; ++i) {
    const float now = maxima[i] < tops[i] ? tops[i] : maxima[i];
    references[i] = now == -INFINITY ? 0.0f : now;  // no key seen yet: exp(-inf - 0) = 0, not NaN
    past[i % kLanes] = maxima[i] - references[i];
    maxima[i] = now;
  }
  past = exp_nonpositive(past);
  for (int i = 0; i < kStrip; ++i) {
    float* row = scores + i * kKeyBlock;
    Vec sum{};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec p = exp_nonpositive(load(row + j) - references[i]);
      store(row + j, p);
      sum += p;
    }
    factors[i] = past[i % kLanes];
    totals[i] = totals[i] * factors[i] + sum_lanes(sum);
  }
}

FASTSFT_NOINLINE void cap_scores(float* scores, int64_t begin, int64_t end, float softcap) {
  for (int i = 0; i < kStrip; ++i) {
    float* row = scores + i * kKeyBlock;
    for (int64_t j = begin; j < end; j += kLanes) store(row + j, tanh_of(load(row + j)) * softcap);
  }
}

FASTSFT_NOINLINE void load_queries(const ForwardArgs& args, const ForwardItem& item, float factor, float* panel) {
  const int64_t dim = args.shape.head_dim, group = args.group;
  const void* rows[kKeyBlock];
  for (int64_t t = 0; t < item.num_q; ++t) {
    for (int64_t g = 0; g < group; g += kKeyBlock) {
      const int64_t n = smaller(group - g, kKeyBlock);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t head = item.kv_head * group + g + i;
        rows[i] = element(args.shape.dtype, args.q.data,
                          (item.q_first + t) * args.q.token_stride + head * args.q.head_stride);
      }
      load_rows(args.shape.dtype, rows, n, dim, factor, panel + (t * group + g) * dim);
    }
  }
}

FASTSFT_NOINLINE void store_tile(const ForwardArgs& args, const ForwardItem& item, const Tile& tile) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim;
  for (int64_t r = 0; r < item.num_q * args.group; ++r) {
    const int64_t token = item.q_first + r / args.group, head = item.kv_head * args.group + r % args.group;
    const float total = tile.totals[r];
    store_row(dtype, tile.sums + r * dim, dim, total == 0 ? 0.0f : 1.0f / total,
              element(dtype, args.out, (token * args.shape.num_q_heads + head) * dim));
    if (args.lse != nullptr) {
      args.lse[head * args.total_q + token] = total == 0 ? -INFINITY : tile.maxima[r] + std::log(total);
    }
  }
}

}  // namespace

void attention_forward_item(const ForwardArgs& args, const ForwardItem& item, float* scratch) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const int64_t used_rows = item.num_q * group, rows = round_up(used_rows, kStrip);
  const Tile tile = carve(scratch, dim, rows);
  const float softcap = args.shape.softcap;
  const int64_t left = args.mask.left, right = args.mask.right;

  load_queries(args, item, softcap > 0 ? args.shape.scale / softcap : args.shape.scale, tile.queries);
  fill_zero(tile.queries + used_rows * dim, tile.queries + rows * dim);
  fill_zero(tile.sums, tile.sums + rows * dim);
  for (int64_t r = 0; r < rows; ++r) {
    tile.maxima[r] = -INFINITY;
    tile.totals[r] = 0;
  }

  const int64_t keys_begin = larger<int64_t>(item.position - left, 0);
  const int64_t keys_end = smaller<int64_t>(item.position + item.num_q + right, item.num_k);
  const void* addresses[kKeyBlock];
  for (int64_t start = keys_begin / kKeyBlock * kKeyBlock; start < keys_end; start += kKeyBlock) {
    const int64_t n = smaller<int64_t>(kKeyBlock, keys_end - start);
    row_addresses(args, item, args.k, start, n, addresses);
    load_transposed(dtype, addresses, n, 0, dim, tile.keys, kKeyBlock);
    row_addresses(args, item, args.v, start, n, addresses);
    load_rows(dtype, addresses, n, dim, 1.0f, tile.values);

    for (int64_t row = 0; row < rows; row += kStrip) {
      const int64_t first_token = row / group, last_token = smaller(row + kStrip - 1, used_rows - 1) / group;
      const Band top = visible_band(item.position + first_token, left, right, start, n);
      const Band bottom = visible_band(item.position + last_token, left, right, start, n);
      if (top.first >= bottom.last) continue;
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Start::kZero, Left::kRows>(tile.queries + row * dim, dim, tile.keys + begin, kKeyBlock,
                                         tile.scores + begin, kKeyBlock, nullptr, dim, end - begin);
      if (softcap > 0) cap_scores(tile.scores, begin, end, softcap);
      if (bottom.first > begin || top.last < end) {
        for (int64_t i = 0; i < kStrip; ++i) {
          float* scores = tile.scores + i * kKeyBlock;
          const int64_t token = smaller(row + i, used_rows - 1) / group;
          const Band band = visible_band(item.position + token, left, right, start, n);
          for (int64_t j = begin; j < end; j += kLanes) {
            store(scores + j, select(inside(band, j), load(scores + j), splat(-INFINITY)));
          }
        }
      }
      float factors[kStrip];
      online_softmax(tile.scores, begin, end, tile.maxima + row, tile.totals + row, factors);
      product<Start::kScale, Left::kRows>(tile.scores + top.first, kKeyBlock, tile.values + top.first * dim, dim,
                                          tile.sums + row * dim, dim, factors, bottom.last - top.first, dim);
    }
  }
  store_tile(args, item, tile);
}

}  // namespace fastsft::FASTSFT_ISA_NS
