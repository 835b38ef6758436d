// Memory traffic per token and layer: q and dout are read once per key block that they see (from cache), k and v once,
// dk and dv are written once; dq is written once, and its float32 sums are read and written once per key block when a
// sequence has several. Arithmetic per visible (query head, key) pair: 5 * D multiply-adds (S = Q
// K^T, dP = dO V^T, dV += P^T dO, dK += dS^T Q, dQ += dS K) and one exp; P is recomputed from lse.
//
// One item is a block of keys with all queries that see it, so dk and dv are summed in one place and in one order. The
// items of a sequence also add to the sums of its query tiles, each in its turn: ascending key block, whatever the
// number of threads. An item waits only for items handed out before it, so the waiting always ends.
#include <cmath>

#include "attention_kernels.h"
#include "attention_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

// Words: one float, or two bfloat16 neighbours along the dimension that the product sums over.
template <typename Format>
struct Block {
  using Word = typename Format::Word;
  Word *keys, *keys_t, *values_t;       // words of [keys, D], and of [D, kScorePitch] twice
  float *dkeys, *dvalues;               // [keys, D]
  Word *queries, *douts;                // words along D: [rows, kRowPitch]
  Word *queries_stack, *douts_stack;    // words along the rows, stack_pitch apart
  Word *probs, *dscores;                // words along the rows: [rows / kSteps, kScorePitch]
  Word* dscores_t;                      // words along the keys: [rows, kScoreRowPitch]
  float* dqueries;                      // [kTileRows, D]
  float *lse, *delta;                   // [rows]; lse in units of log 2
  float *strip_scores, *strip_dscores;  // [kTileRows, kScorePitch]
  int64_t stack_pitch;
};

// Odd numbers of cache lines, so that neighbouring rows do not share cache sets.
inline constexpr int64_t kScorePitch = kGradientBlock + 16;
template <typename Format>
inline constexpr int64_t kScoreRowPitch = Format::kSteps == 1 ? kScorePitch : kGradientBlock / 2 + 16;

template <typename Format, int64_t kMaxDim>
Block<Format> carve(float* scratch, int64_t dim, int64_t rows) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>, kSteps = Format::kSteps;
  Block<Format> b;
  const auto take = [&](auto*& panel, int64_t words) {
    panel = reinterpret_cast<std::remove_reference_t<decltype(panel)>>(scratch);
    scratch += words;
  };
  take(b.keys, kGradientBlock * dim / kSteps);
  take(b.keys_t, kScorePitch * dim / kSteps);
  take(b.values_t, kScorePitch * dim / kSteps);
  take(b.dkeys, kGradientBlock * dim);
  take(b.dvalues, kGradientBlock * dim);
  take(b.queries, rows * kPitch);
  take(b.douts, rows * kPitch);
  take(b.probs, rows / kSteps * kScorePitch);
  take(b.dscores, rows / kSteps * kScorePitch);
  if constexpr (kSteps == 1) {  // floats along either dimension are the same
    b.queries_stack = b.queries;
    b.douts_stack = b.douts;
    b.stack_pitch = kPitch;
    b.dscores_t = b.dscores;
  } else {
    take(b.queries_stack, rows / kSteps * dim);
    take(b.douts_stack, rows / kSteps * dim);
    b.stack_pitch = dim;
    take(b.dscores_t, rows * kScoreRowPitch<Format>);
  }
  take(b.dqueries, kTileRows * dim);
  take(b.lse, rows);
  take(b.delta, rows);
  take(b.strip_scores, kTileRows * kScorePitch);
  take(b.strip_dscores, kTileRows * kScorePitch);
  return b;
}

// Packs one strip of a tile that starts at token `first`, rows [row, row + have), and asks for the strip after it, be
// it in the next tile.
template <typename Format, int64_t kMaxDim>
FASTSFT_NOINLINE void load_strip(const BackwardArgs& args, const BackwardItem& item, int64_t first, int64_t row,
                                 int64_t have, bool is_whole, const Block<Format>& b, RowQueue& queue) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>, kSteps = Format::kSteps;
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const int64_t last = item.q_first + item.num_q;
  const void *q_rows[kTileRows], *dout_rows[kTileRows];
  RowPlace place = place_of(row, group);
  for (int64_t i = 0; i < have + kTileRows; ++i, advance(place, group)) {
    const int64_t token = first + place.token, head = item.kv_head * group + place.head;
    if (token >= last) break;
    const void* query = element(dtype, args.q.data, token * args.q.token_stride + head * args.q.head_stride);
    const void* dout = element(dtype, args.dout.data, token * args.dout.token_stride + head * args.dout.head_stride);
    if (i >= have) {
      queue.add(query);
      queue.add(dout);
      continue;
    }
    q_rows[i] = query;
    dout_rows[i] = dout;
    const int64_t index = head * args.total_q + token;
    const float lse = args.lse[index] * kLog2e, dlse = args.dlse == nullptr ? 0.0f : args.dlse[index];
    b.lse[row + i] = lse == -INFINITY ? INFINITY : lse;  // 2^(s - inf) = 0: a row that sees no key
    b.delta[row + i] = is_whole ? -dlse : args.delta[index];
  }
  pack_rows<Format, kMaxDim>(dtype, q_rows, have, dim, b.queries + row * kPitch);
  pack_rows<Format, kMaxDim>(dtype, dout_rows, have, dim, b.douts + row * kPitch);
  if constexpr (kSteps > 1) {
    pack_stack<Format>(dtype, q_rows, have, dim, b.queries_stack + row / kSteps * dim);
    pack_stack<Format>(dtype, dout_rows, have, dim, b.douts_stack + row / kSteps * dim);
  }
  if (have % kSteps != 0) {  // the last row's partner: scores and gradients of 0
    std::memset(b.queries + (row + have) * kPitch, 0, static_cast<std::size_t>(dim) * 2);
    std::memset(b.douts + (row + have) * kPitch, 0, static_cast<std::size_t>(dim) * 2);
    b.lse[row + have] = INFINITY;
    b.delta[row + have] = 0;
  }
}

// From S and dP of one strip, `have` rows (a multiple of kSteps), to P and dS, columns [begin, end). is_whole: the
// columns are all the keys there are, so delta = sum(P * dP) - dlse, and `delta` holds -dlse.
template <typename Format, bool kCapped>
FASTSFT_NOINLINE void score_gradients(const Block<Format>& b, int64_t row, int64_t have, int64_t begin, int64_t end,
                                      float softcap, const Band* bands, bool is_whole) {
  constexpr int64_t kSteps = Format::kSteps;
  Vec sums[kLanes]{};
  for (int64_t i = 0; i < have; i += kSteps) {
    Vec sum[kSteps]{};
    for (int64_t j = begin; j < end; j += kLanes) {
      Vec probs[kSteps];
      for (int64_t step = 0; step < kSteps; ++step) {
        const int64_t at = (i + step) * kScorePitch + j;
        Vec score = load(b.strip_scores + at), dp = load(b.strip_dscores + at), slope;
        if (kCapped) {
          const Vec t = tanh_of(score);
          score = t * (softcap * kLog2e);
          slope = 1.0f - t * t;
        }
        Vec p = exp2_nonpositive<kExpDegree<Format>>(score - b.lse[row + i + step]);
        const Band& band = bands[i + step];
        if (band.first > j || j + kLanes > band.last) {
          const VecInt visible = inside(band, j);
          p = select(visible, p, Vec{});
          dp = select(visible, dp, Vec{});
          store(b.strip_dscores + at, dp);
        }
        store(b.strip_scores + at, kCapped ? p * slope : p);
        sum[step] += p * dp;
        probs[step] = p;
      }
      store_along_rows<Format>(probs, b.probs + (row + i) / kSteps * kScorePitch + j);
    }
    for (int64_t step = 0; step < kSteps; ++step) sums[i + step] = sum[step];
  }
  float offsets[kLanes];
  store(offsets, is_whole ? load(b.delta + row) + reduce_rows<false>(sums) : load(b.delta + row));
  for (int64_t i = 0; i < have; i += kSteps) {
    for (int64_t j = begin; j < end; j += kLanes) {
      Vec dscores[kSteps];
      for (int64_t step = 0; step < kSteps; ++step) {
        const int64_t at = (i + step) * kScorePitch + j;
        dscores[step] = load(b.strip_scores + at) * (load(b.strip_dscores + at) - offsets[i + step]);
        if (kSteps > 1) {
          store_along_columns<Format>(dscores[step], b.dscores_t + (row + i + step) * kScoreRowPitch<Format>, j);
        }
      }
      store_along_rows<Format>(dscores, b.dscores + (row + i) / kSteps * kScorePitch + j);
    }
  }
}

template <typename Format, DType kDType>
void delta_as(const BackwardArgs& args, int64_t begin, int64_t end) {
  constexpr DType kWordType = Format::kSteps == 1 ? kDType : DType::kFloat32;  // what has the width of a word
  const int64_t words = args.shape.head_dim / Format::kSteps, heads = args.shape.num_q_heads;
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
    for (int64_t start = 0; start < words; start += kChain) {
      Vec chain{};
      for (int64_t w = start; w < smaller(start + kChain, words); w += kLanes) {
        const int64_t at = smaller<int64_t>(w, words - kLanes);
        float x[kLanes * kLanes], y[kLanes * kLanes];
        load_transposed_as<kWordType>(outs, kLanes, at, kLanes, x, kLanes);
        load_transposed_as<kWordType>(douts, kLanes, at, kLanes, y, kLanes);
#pragma GCC unroll 1  // straight-line sums would be reassociated
        for (int64_t i = w - at; i < kLanes; ++i) {
          chain = multiply_add<Format>(chain, load(x + i * kLanes), load(y + i * kLanes));
        }
      }
      sum += chain;
    }
    for (int64_t i = 0; i < have; ++i) {
      const int64_t token = (row + i) / heads, head = (row + i) % heads, index = head * args.total_q + token;
      args.delta[index] = sum[i] - (args.dlse == nullptr ? 0.0f : args.dlse[index]);
    }
  }
}

template <typename Format, int64_t kMaxDim>
void backward_item(const BackwardArgs& args, const BackwardItem& item, float* scratch) {
  constexpr int64_t kPitch = kRowPitch<Format, kMaxDim>, kSteps = Format::kSteps;
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group, heads = args.shape.num_q_heads;
  const int64_t max_rows = tile_rows(args.tile_tokens * group);
  const Block<Format> b = carve<Format, kMaxDim>(scratch, dim, max_rows);
  const float softcap = args.shape.softcap, scale = args.shape.scale, one = 1.0f;
  const float score_factor = softcap > 0 ? scale / softcap : scale * kLog2e;
  float scales[kLanes], ones[kLanes];
  store(scales, splat(scale));
  store(ones, splat(1.0f));
  const int64_t left = args.mask.left, right = args.mask.right;
  const int64_t block = gradient_block(item.num_k), start = item.block * block;
  const int64_t n = smaller(block, item.num_k - start);
  const bool is_whole = item.num_k <= block;      // this block is all there is
  const int64_t shift = item.num_k - item.num_q;  // key position of query 0

  RowQueue queue(dim * static_cast<int64_t>(dtype_size(dtype)));
  const void* addresses[kGradientBlock];
  for (const bool is_key : {true, false}) {
    const AttentionInput& source = is_key ? args.k : args.v;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t token = item.k_first + start + j;
      addresses[j] = element(dtype, source.data, token * source.token_stride + item.kv_head * source.head_stride);
    }
    pack_columns<Format>(dtype, addresses, n, dim, is_key ? b.keys_t : b.values_t, kScorePitch);
    if (is_key) pack_stack<Format>(dtype, addresses, n, dim, b.keys);
  }
  fill_zero(b.dkeys, b.dkeys + round_up(n, kKeyStrip) * dim);
  fill_zero(b.dvalues, b.dvalues + round_up(n, kKeyStrip) * dim);

  const int64_t queries_begin = larger<int64_t>(start - right - shift, 0);
  const int64_t queries_end = smaller<int64_t>(start + n + left - shift, item.num_q);
  for (int64_t tile = queries_begin / args.tile_tokens; tile * args.tile_tokens < queries_end; ++tile) {
    const int64_t token0 = tile * args.tile_tokens;
    const int64_t tokens = smaller(args.tile_tokens, item.num_q - token0);
    const int64_t position = token0 + shift, rows = tokens * group;

    // The tile's key blocks, and whose turn this item's is.
    const int64_t first_block = larger<int64_t>(position - left, 0) / block;
    const int64_t last_block = (smaller(position + tokens + right, item.num_k) - 1) / block;
    const bool is_first = item.block == first_block, is_last = item.block == last_block;
    const bool is_shared = !(is_first && is_last);
    const int64_t slot = item.first_tile + tile;
    float* dqueries = is_shared ? args.dq_sums + slot * max_rows * dim : b.dqueries;
    const auto dq_row = [&](const RowPlace& place) {
      const int64_t token = item.q_first + token0 + place.token, head = item.kv_head * group + place.head;
      return element(dtype, args.dq, (token * heads + head) * dim);
    };

    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t have = smaller<int64_t>(kTileRows, rows - row);
      Band bands[kTileRows];
      RowPlace place = place_of(row, group);
      for (int64_t i = 0; i < kTileRows; ++i) {
        bands[i] = visible_band(position + place.token, left, right, start, n);
        if (i + 1 < have) advance(place, group);
      }
      const Band top = bands[0], bottom = bands[kTileRows - 1];
      if (top.first >= bottom.last) continue;
      load_strip<Format, kMaxDim>(args, item, item.q_first + token0, row, have, is_whole, b, queue);
      const int64_t begin = top.first / kLanes * kLanes, end = round_up(bottom.last, kLanes);
      product<Format, Left::kRows, kPitch, Into::kStore>(round_up(have, kSteps), end - begin, b.queries + row * kPitch,
                                                         b.keys_t + begin, kScorePitch, dim / kSteps,
                                                         b.strip_scores + begin, kScorePitch, &score_factor, queue);
      product<Format, Left::kRows, kPitch, Into::kStore>(round_up(have, kSteps), end - begin, b.douts + row * kPitch,
                                                         b.values_t + begin, kScorePitch, dim / kSteps,
                                                         b.strip_dscores + begin, kScorePitch, &one, queue);
      const auto gradients = softcap > 0 ? score_gradients<Format, true> : score_gradients<Format, false>;
      gradients(b, row, round_up(have, kSteps), begin, end, softcap, bands, is_whole);
      queue.finish();
    }
    RowPlace place{0, 0};
    for (int64_t r = 0; r < rows; ++r, advance(place, group)) {
      if (is_shared && !is_first) queue.add(dqueries + r * dim);
      if (is_last) queue.add(dq_row(place));
    }

    // Keys in strips; the rows that see any key of a strip are those of a contiguous range of tokens.
    for (int64_t key = 0; key < n; key += kKeyStrip) {
      const int64_t last_key = smaller(key + kKeyStrip, n) - 1;
      const int64_t from = larger<int64_t>(start + key - right - position, 0) * group / kSteps;
      const int64_t to = (smaller(start + last_key + left - position + 1, tokens) * group + kSteps - 1) / kSteps;
      if (from >= to) continue;
      product<Format, Left::kColumns, kScorePitch, Into::kAdd>(kKeyStrip, dim, b.probs + from * kScorePitch + key,
                                                               b.douts_stack + from * b.stack_pitch, b.stack_pitch,
                                                               to - from, b.dvalues + key * dim, dim, &one, queue);
      product<Format, Left::kColumns, kScorePitch, Into::kAdd>(kKeyStrip, dim, b.dscores + from * kScorePitch + key,
                                                               b.queries_stack + from * b.stack_pitch, b.stack_pitch,
                                                               to - from, b.dkeys + key * dim, dim, &one, queue);
    }

    if (is_shared && !is_first) {
      const auto turn = static_cast<int32_t>(item.block - first_block);
      if (!wait_for_turn(args.blocks_done[slot], turn, *args.abandoned)) return;
    }
    place = {0, 0};
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t have = smaller<int64_t>(kTileRows, rows - row);
      const Band top = visible_band(position + row / group, left, right, start, n);
      const Band bottom = visible_band(position + (row + have - 1) / group, left, right, start, n);
      const int64_t first = top.first / kSteps;
      const int64_t words = larger<int64_t>((bottom.last + kSteps - 1) / kSteps - first, 0);
      const auto* dscores = b.dscores_t + row * kScoreRowPitch<Format> + first;
      float* sums = is_shared ? dqueries + row * dim : dqueries;
      if (is_first) {
        product<Format, Left::kRows, kScoreRowPitch<Format>, Into::kStore>(have, dim, dscores, b.keys + first * dim,
                                                                           dim, words, sums, dim, &one, queue);
      } else if (words > 0) {
        product<Format, Left::kRows, kScoreRowPitch<Format>, Into::kAdd>(have, dim, dscores, b.keys + first * dim, dim,
                                                                         words, sums, dim, &one, queue);
      }
      if (!is_last) continue;
      void* dq_rows[kTileRows];
      for (int64_t i = 0; i < have; ++i, advance(place, group)) dq_rows[i] = dq_row(place);
      store_rows(dtype, sums, dim, have, dim, scales, dq_rows);
    }
    if (!is_last) finish_turn(args.blocks_done[slot]);
  }

  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t have = smaller<int64_t>(kLanes, n - j);
    void *dk_rows[kLanes], *dv_rows[kLanes];
    for (int64_t i = 0; i < have; ++i) {
      const int64_t index = (item.k_first + start + j + i) * args.shape.num_kv_heads + item.kv_head;
      dk_rows[i] = element(dtype, args.dk, index * dim);
      dv_rows[i] = element(dtype, args.dv, index * dim);
    }
    store_rows(dtype, b.dkeys + j * dim, dim, have, dim, scales, dk_rows);
    store_rows(dtype, b.dvalues + j * dim, dim, have, dim, ones, dv_rows);
  }
}

}  // namespace

void attention_backward_delta(const BackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kFloat32: return delta_as<Single, DType::kFloat32>(args, begin, end);
    case DType::kBFloat16: return delta_as<Bfloat16Format, DType::kBFloat16>(args, begin, end);
    case DType::kFloat16: return delta_as<Single, DType::kFloat16>(args, begin, end);
  }
}

void attention_backward_item(const BackwardArgs& args, const BackwardItem& item, float* scratch) {
  const bool is_small = args.shape.head_dim <= 64;
  if (args.shape.dtype == DType::kBFloat16) {
    using Format = Bfloat16Format;
    return is_small ? backward_item<Format, 64>(args, item, scratch) : backward_item<Format, 256>(args, item, scratch);
  }
  return is_small ? backward_item<Single, 64>(args, item, scratch) : backward_item<Single, 256>(args, item, scratch);
}

}  // namespace fastsft::FASTSFT_ISA_NS
