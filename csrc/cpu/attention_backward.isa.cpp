// Memory traffic per token and layer: q and dout are read once per key block that they see (from cache), k and v once,
// dk and dv are written once; dq is written once, and its float32 sums are read and written once per key block when a
// sequence has more than kKeyBlock keys. Arithmetic per visible (query head, key) pair: 5 * D multiply-adds (S = Q K^T,
// dP = dO V^T, dV += P^T dO, dK += dS^T Q, dQ += dS K) and one exp; P is recomputed from lse.
//
// One item is a block of keys with all queries that see it, so dk and dv are summed in one place and in one order. The
// items of a sequence also add to the sums of its query tiles, each in its turn: ascending key block, whatever the
// number of threads. An item waits only for items handed out before it, so the waiting always ends.
#include <cmath>

#include "attention_kernels.h"
#include "attention_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

struct Block {
  float *keys, *keys_t, *values_t;    // [kKeyBlock, D] and twice [D, kKeyBlock]
  float *dkeys, *dvalues;             // [kKeyBlock, D]
  float *queries, *douts, *dqueries;  // [rows, D]
  float *probs, *dscores;             // [rows, kKeyBlock]
  float *lse, *delta;                 // [rows]
};

Block carve(float* scratch, int64_t dim, int64_t rows) {
  Block b;
  float* next = scratch;
  for (float** panel : {&b.keys, &b.keys_t, &b.values_t, &b.dkeys, &b.dvalues}) {
    *panel = next;
    next += kKeyBlock * dim;
  }
  for (float** panel : {&b.queries, &b.douts, &b.dqueries}) {
    *panel = next;
    next += rows * dim;
  }
  for (float** panel : {&b.probs, &b.dscores}) {
    *panel = next;
    next += rows * kKeyBlock;
  }
  b.lse = next;
  b.delta = next + rows;
  return b;
}

FASTSFT_NOINLINE void load_queries(const BackwardArgs& args, int64_t kv_head, int64_t first_token, int64_t tokens,
                                   float query_factor, bool is_whole, const Block& b) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group, used = tokens * group;
  const void *q_rows[kKeyBlock], *dout_rows[kKeyBlock];
  for (int64_t begin = 0; begin < used; begin += kKeyBlock) {
    const int64_t n = smaller(used - begin, kKeyBlock);
    int64_t token = first_token + begin / group, member = begin % group;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t head = kv_head * group + member;
      q_rows[i] = element(dtype, args.q.data, token * args.q.token_stride + head * args.q.head_stride);
      dout_rows[i] = element(dtype, args.dout.data, token * args.dout.token_stride + head * args.dout.head_stride);
      const float lse = args.lse[head * args.total_q + token];
      b.lse[begin + i] = lse == -INFINITY ? INFINITY : lse;  // exp(s - inf) = 0: a row that sees no key
      const int64_t index = head * args.total_q + token;
      const float dlse = args.dlse == nullptr ? 0.0f : args.dlse[index];
      b.delta[begin + i] = is_whole ? -dlse : args.delta[index];
      if (++member == group) {
        member = 0;
        ++token;
      }
    }
    load_rows(dtype, q_rows, n, dim, query_factor, b.queries + begin * dim);
    load_rows(dtype, dout_rows, n, dim, 1.0f, b.douts + begin * dim);
  }
  const int64_t rows = round_up(used, kStrip);
  fill_zero(b.queries + used * dim, b.queries + rows * dim);
  fill_zero(b.douts + used * dim, b.douts + rows * dim);
  for (int64_t r = used; r < rows; ++r) {
    b.lse[r] = INFINITY;
    b.delta[r] = 0;
  }
}

// From S and dP to P and dS for one strip, columns [begin, end). bands: what each row sees, or null if every column.
// kWhole: the columns are all the keys there are, so delta = sum(P * dP) - dlse, and `delta` holds -dlse.
template <bool kCapped, bool kWhole>
FASTSFT_NOINLINE void score_gradients(float* probs, float* dscores, int64_t begin, int64_t end, const float* lse,
                                      const float* delta, float softcap, const Band* bands) {
  float slopes[kKeyBlock];  // of the cap at each score
  for (int i = 0; i < kStrip; ++i) {
    float *prob = probs + i * kKeyBlock, *dscore = dscores + i * kKeyBlock;
    Vec sum{};
    for (int64_t j = begin; j < end; j += kLanes) {
      Vec score = load(prob + j), dp = load(dscore + j), slope = splat(1.0f);
      if (kCapped) {
        const Vec t = tanh_of(score);
        score = t * softcap;
        slope = 1.0f - t * t;
      }
      Vec p = exp_nonpositive(score - lse[i]);
      if (bands != nullptr) {
        const VecInt visible = inside(bands[i], j);
        p = select(visible, p, Vec{});
        dp = select(visible, dp, Vec{});
      }
      store(prob + j, p);
      if (kWhole) {
        sum += p * dp;
        store(dscore + j, dp);
        if (kCapped) store(slopes + j, slope);
      } else {
        const Vec ds = p * (dp - delta[i]);
        store(dscore + j, kCapped ? ds * slope : ds);
      }
    }
    if (!kWhole) continue;
    const float offset = delta[i] + sum_lanes(sum);
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec ds = load(prob + j) * (load(dscore + j) - offset);
      store(dscore + j, kCapped ? ds * load(slopes + j) : ds);
    }
  }
}

template <DType kDType>
void delta_as(const BackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.shape.head_dim, heads = args.shape.num_q_heads;
  for (int64_t row = begin * heads; row < end * heads; row += kLanes) {
    const int64_t have = smaller<int64_t>(kLanes, end * heads - row);
    const void *outs[kLanes], *douts[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t used = row + smaller(i, have - 1), token = used / heads, head = used % heads;
      outs[i] = element(kDType, args.out.data, token * args.out.token_stride + head * args.out.head_stride);
      douts[i] = element(kDType, args.dout.data, token * args.dout.token_stride + head * args.dout.head_stride);
    }
    // Summed in the order of the product dP = dO V^T, so that dP - delta is exactly 0 where a row sees a single key.
    Vec sum{};
    for (int64_t start = 0; start < dim; start += kChain) {
      Vec chain{};
      for (int64_t d = start; d < smaller(start + kChain, dim); d += kLanes) {
        float x[kLanes * kLanes], y[kLanes * kLanes];
        load_transposed_as<kDType>(outs, kLanes, d, kLanes, x, kLanes);
        load_transposed_as<kDType>(douts, kLanes, d, kLanes, y, kLanes);
#pragma GCC unroll 1  // straight-line sums would be reassociated
        for (int64_t i = 0; i < kLanes; ++i) chain += load(x + i * kLanes) * load(y + i * kLanes);
      }
      sum += chain;
    }
    for (int64_t i = 0; i < have; ++i) {
      const int64_t token = (row + i) / heads, head = (row + i) % heads, index = head * args.total_q + token;
      args.delta[index] = sum[i] - (args.dlse == nullptr ? 0.0f : args.dlse[index]);
    }
  }
}

}  // namespace

void attention_backward_delta(const BackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kFloat32: return delta_as<DType::kFloat32>(args, begin, end);
    case DType::kBFloat16: return delta_as<DType::kBFloat16>(args, begin, end);
    case DType::kFloat16: return delta_as<DType::kFloat16>(args, begin, end);
  }
}

void attention_backward_item(const BackwardArgs& args, const BackwardItem& item, float* scratch) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group, heads = args.shape.num_q_heads;
  const int64_t max_rows = tile_rows(args.tile_tokens, group);
  const Block b = carve(scratch, dim, max_rows);
  const float softcap = args.shape.softcap, scale = args.shape.scale;
  const float query_factor = softcap > 0 ? scale / softcap : scale;
  const int64_t left = args.mask.left, right = args.mask.right;
  const int64_t start = item.block * kKeyBlock;
  const int64_t n = smaller<int64_t>(kKeyBlock, item.num_k - start);
  const bool is_whole = item.num_k <= kKeyBlock;  // this block is all there is
  const int64_t shift = item.num_k - item.num_q;  // key position of query 0

  const void* addresses[kKeyBlock];
  for (const bool is_key : {true, false}) {
    const AttentionInput& source = is_key ? args.k : args.v;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t token = item.k_first + start + j;
      addresses[j] = element(dtype, source.data, token * source.token_stride + item.kv_head * source.head_stride);
    }
    load_transposed(dtype, addresses, n, 0, dim, is_key ? b.keys_t : b.values_t, kKeyBlock);
    if (is_key) load_rows(dtype, addresses, n, dim, 1.0f, b.keys);
  }
  fill_zero(b.dkeys, b.dkeys + kKeyBlock * dim);
  fill_zero(b.dvalues, b.dvalues + kKeyBlock * dim);

  const int64_t queries_begin = larger<int64_t>(start - right - shift, 0);
  const int64_t queries_end = smaller<int64_t>(start + n + left - shift, item.num_q);
  for (int64_t tile = queries_begin / args.tile_tokens; tile * args.tile_tokens < queries_end; ++tile) {
    const int64_t token0 = tile * args.tile_tokens;
    const int64_t tokens = smaller(args.tile_tokens, item.num_q - token0);
    const int64_t position = token0 + shift, used = tokens * group, rows = round_up(used, kStrip);
    load_queries(args, item.kv_head, item.q_first + token0, tokens, query_factor, is_whole, b);

    // The tile's key blocks, and whose turn this item's is.
    const int64_t first_block = larger<int64_t>(position - left, 0) / kKeyBlock;
    const int64_t last_block = (smaller(position + tokens + right, item.num_k) - 1) / kKeyBlock;
    const bool is_first = item.block == first_block, is_last = item.block == last_block;
    const bool is_shared = !(is_first && is_last);
    const int64_t slot = item.first_tile + tile;
    float* dqueries = is_shared ? args.dq_sums + slot * max_rows * dim : b.dqueries;

    for (int64_t row = 0; row < rows; row += kStrip) {
      const Band top = visible_band(position + row / group, left, right, start, n);
      const int64_t last_token = smaller(row + kStrip - 1, used - 1) / group;
      const Band bottom = visible_band(position + last_token, left, right, start, n);
      if (top.first >= bottom.last) continue;
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Start::kZero, Left::kRows>(b.queries + row * dim, dim, b.keys_t + begin, kKeyBlock,
                                         b.probs + row * kKeyBlock + begin, kKeyBlock, nullptr, dim, end - begin);
      product<Start::kZero, Left::kRows>(b.douts + row * dim, dim, b.values_t + begin, kKeyBlock,
                                         b.dscores + row * kKeyBlock + begin, kKeyBlock, nullptr, dim, end - begin);
      float *probs = b.probs + row * kKeyBlock, *dscores = b.dscores + row * kKeyBlock;
      Band bands[kStrip];
      for (int i = 0; i < kStrip; ++i) {
        bands[i] = visible_band(position + smaller(row + i, used - 1) / group, left, right, start, n);
      }
      const bool is_cut = bottom.first > begin || top.last < end;
      const auto gradients = softcap > 0 ? (is_whole ? score_gradients<true, true> : score_gradients<true, false>)
                                         : (is_whole ? score_gradients<false, true> : score_gradients<false, false>);
      gradients(probs, dscores, begin, end, b.lse + row, b.delta + row, softcap, is_cut ? bands : nullptr);
    }

    // Keys in strips; the rows that see any key of a strip are those of a contiguous range of tokens.
    for (int64_t key = 0; key < n; key += kStrip) {
      const int64_t last_key = smaller(key + kStrip, n) - 1;
      const int64_t from = larger<int64_t>(start + key - right - position, 0) * group;
      const int64_t to = smaller(start + last_key + left - position + 1, tokens) * group;
      if (from >= to) continue;
      product<Start::kAdd, Left::kColumns>(b.probs + from * kKeyBlock + key, kKeyBlock, b.douts + from * dim, dim,
                                           b.dvalues + key * dim, dim, nullptr, to - from, dim);
      product<Start::kAdd, Left::kColumns>(b.dscores + from * kKeyBlock + key, kKeyBlock, b.queries + from * dim, dim,
                                           b.dkeys + key * dim, dim, nullptr, to - from, dim);
    }

    if (is_shared && !is_first) {
      const auto turn = static_cast<int32_t>(item.block - first_block);
      if (!wait_for_turn(args.blocks_done[slot], turn, *args.abandoned)) return;
    }
    for (int64_t row = 0; row < rows; row += kStrip) {
      const Band top = visible_band(position + row / group, left, right, start, n);
      const int64_t last_token = smaller(row + kStrip - 1, used - 1) / group;
      const Band bottom = visible_band(position + last_token, left, right, start, n);
      const int64_t depth = larger<int64_t>(bottom.last - top.first, 0);
      const float* dscores = b.dscores + row * kKeyBlock + top.first;
      if (is_first) {
        product<Start::kZero, Left::kRows>(dscores, kKeyBlock, b.keys + top.first * dim, dim, dqueries + row * dim, dim,
                                           nullptr, depth, dim);
      } else if (depth > 0) {
        product<Start::kAdd, Left::kRows>(dscores, kKeyBlock, b.keys + top.first * dim, dim, dqueries + row * dim, dim,
                                          nullptr, depth, dim);
      }
    }
    if (is_last) {
      for (int64_t r = 0; r < used; ++r) {
        const int64_t token = item.q_first + token0 + r / group, head = item.kv_head * group + r % group;
        store_row(dtype, dqueries + r * dim, dim, scale, element(dtype, args.dq, (token * heads + head) * dim));
      }
    } else {
      finish_turn(args.blocks_done[slot]);
    }
  }

  for (int64_t j = 0; j < n; ++j) {
    const int64_t index = ((item.k_first + start + j) * args.shape.num_kv_heads + item.kv_head) * dim;
    store_row(dtype, b.dkeys + j * dim, dim, softcap > 0 ? softcap : 1.0f, element(dtype, args.dk, index));
    store_row(dtype, b.dvalues + j * dim, dim, 1.0f, element(dtype, args.dv, index));
  }
}

}  // namespace fastsft::FASTSFT_ISA_NS
