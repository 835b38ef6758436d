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
#include "attention_simd.h"

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

// Turns one row of scores into probabilities relative to the row's running maximum; returns the factor for its past.
FASTSFT_INLINE float online_softmax(float* scores, int64_t begin, int64_t end, float* maximum, float* total) {
  Vec top = load(scores + begin);
  for (int64_t j = begin + kLanes; j < end; j += kLanes) top = max_of(top, load(scores + j));
  const float before = *maximum;
  const float row_top = max_lanes(top);
  const float now = before < row_top ? row_top : before;
  const float reference = now == -INFINITY ? 0.0f : now;  // no key seen yet: exp(-inf - 0) = 0, not NaN
  Vec sum{};
  for (int64_t j = begin; j < end; j += kLanes) {
    const Vec p = exp_nonpositive(load(scores + j) - reference);
    store(scores + j, p);
    sum += p;
  }
  const float factor = exp_nonpositive(splat(before - reference))[0];
  *maximum = now;
  *total = *total * factor + sum_lanes(sum);
  return factor;
}

}  // namespace

void attention_forward_item(const ForwardArgs& args, const ForwardItem& item, float* scratch) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const int64_t used_rows = item.num_q * group, rows = round_up(used_rows, kStrip);
  const Tile tile = carve(scratch, dim, rows);
  const float softcap = args.shape.softcap;
  // Scores leave the product in units of softcap when there is one.
  const float query_factor = softcap > 0 ? args.shape.scale / softcap : args.shape.scale;
  const int64_t left = args.mask.left, right = args.mask.right;

  for (int64_t t = 0; t < item.num_q; ++t) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t index = (item.q_first + t) * args.q.token_stride + (item.kv_head * group + g) * args.q.head_stride;
      load_row(dtype, element(dtype, args.q.data, index), dim, query_factor, tile.queries + (t * group + g) * dim);
    }
  }
  for (int64_t i = used_rows * dim; i < rows * dim; i += kLanes) store(tile.queries + i, Vec{});
  for (int64_t i = 0; i < rows * dim; i += kLanes) store(tile.sums + i, Vec{});
  for (int64_t r = 0; r < rows; ++r) {
    tile.maxima[r] = -INFINITY;
    tile.totals[r] = 0;
  }

  const int64_t last_position = item.position + item.num_q - 1;
  const int64_t keys_begin = larger<int64_t>(item.position - left, 0);
  const int64_t keys_end = smaller<int64_t>(last_position + right + 1, item.num_k);
  const void* addresses[kKeyBlock];
  for (int64_t start = keys_begin / kKeyBlock * kKeyBlock; start < keys_end; start += kKeyBlock) {
    const int64_t n = smaller<int64_t>(kKeyBlock, keys_end - start);
    row_addresses(args, item, args.k, start, n, addresses);
    load_transposed(dtype, addresses, n, 0, dim, tile.keys, kKeyBlock);
    row_addresses(args, item, args.v, start, n, addresses);
    for (int64_t j = 0; j < n; ++j) load_row(dtype, addresses[j], dim, 1.0f, tile.values + j * dim);

    for (int64_t row = 0; row < rows; row += kStrip) {
      const int64_t first_token = row / group, last_token = smaller(row + kStrip - 1, used_rows - 1) / group;
      const Band top = visible_band(item.position + first_token, left, right, start, n);
      const Band bottom = visible_band(item.position + last_token, left, right, start, n);
      if (top.first >= bottom.last) continue;
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Start::kZero>(tile.queries + row * dim, dim, 1, tile.keys + begin, kKeyBlock, tile.scores + begin,
                            kKeyBlock, nullptr, dim, end - begin);
      if (softcap > 0) {
        for (int64_t i = 0; i < kStrip; ++i) {
          float* scores = tile.scores + i * kKeyBlock;
          for (int64_t j = begin; j < end; j += kLanes) {
            store(scores + j, tanh_of(load(scores + j)) * softcap);
          }
        }
      }
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
      for (int64_t i = 0; i < kStrip; ++i) {
        factors[i] =
            online_softmax(tile.scores + i * kKeyBlock, begin, end, tile.maxima + row + i, tile.totals + row + i);
      }
      product<Start::kScale>(tile.scores + top.first, kKeyBlock, 1, tile.values + top.first * dim, dim,
                             tile.sums + row * dim, dim, factors, bottom.last - top.first, dim);
    }
  }

  for (int64_t r = 0; r < used_rows; ++r) {
    const int64_t token = item.q_first + r / group, head = item.kv_head * group + r % group;
    const float total = tile.totals[r];
    store_row(dtype, tile.sums + r * dim, dim, total == 0 ? 0.0f : 1.0f / total,
              element(dtype, args.out, (token * args.shape.num_q_heads + head) * dim));
    if (args.lse != nullptr) {
      args.lse[head * args.total_q + token] = total == 0 ? -INFINITY : tile.maxima[r] + std::log(total);
    }
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
