// Checks the arguments, cuts a call into units of work (attention_kernels.h) and hands them to the thread pool, the
// most expensive first. What the units are follows from the shapes alone, never from the number of threads.
#include "fastsft/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "attention_kernels.h"
#include "fastsft/parallel.h"
#include "scratch.h"

namespace fastsft {

bool wait_for_turn(const std::atomic<int32_t>& done, int32_t turns, const std::atomic<bool>& abandoned) {
  while (done.load(std::memory_order_acquire) < turns) {
    if (abandoned.load(std::memory_order_relaxed)) return false;
    std::this_thread::yield();
  }
  return true;
}

void finish_turn(std::atomic<int32_t>& done) { done.fetch_add(1, std::memory_order_release); }

namespace {

constexpr int64_t kUnbounded = int64_t{1} << 40;
constexpr int64_t kForwardRows = 224;              // rows that share one packing of a key block
constexpr int64_t kDecodeRows = 64;                // of an item, at most: states and scores stay in the L2 cache
constexpr int64_t kSerialCost = int64_t{1} << 21;  // multiply-adds that take about as long as waking a thread
constexpr int64_t kDeltaTokens = 32;               // queries per unit of the first backward pass
constexpr int64_t kBackwardRows = 126;             // of a query tile of the backward pass: whole strips of AVX-512,
constexpr int64_t kBackwardRowsOfWideHeads = 70;   // fewer where a row is longer than 128 elements

float* scratch_floats(int64_t n) {
  return static_cast<float*>(thread_scratch(n * static_cast<int64_t>(sizeof(float))));
}

void check_shape(const char* op, const AttentionShape& shape) {
  FASTSFT_CHECK(shape.num_q_heads > 0 && shape.num_kv_heads > 0 && shape.num_q_heads % shape.num_kv_heads == 0, op,
                ": q: expected a number of heads that is a multiple of the key heads (", shape.num_kv_heads, "), got ",
                shape.num_q_heads);
  constexpr int64_t kHeadDims[] = {32, 64, 80, 96, 128, 256};
  FASTSFT_CHECK(std::find(std::begin(kHeadDims), std::end(kHeadDims), shape.head_dim) != std::end(kHeadDims), op,
                ": q: expected a head size in {32, 64, 80, 96, 128, 256}, got ", shape.head_dim);
  FASTSFT_CHECK(shape.softcap >= 0, op, ": softcap: expected >= 0, got ", shape.softcap);
  FASTSFT_CHECK(shape.window_left >= -1 && shape.window_right >= -1, op, ": window: expected values >= -1, got (",
                shape.window_left, ", ", shape.window_right, ")");
}

void check_offsets(const char* op, const char* name, const int32_t* offsets, int64_t batch, int64_t total) {
  FASTSFT_CHECK(offsets[0] == 0, op, ": ", name, ": expected the first offset to be 0, got ", offsets[0]);
  for (int64_t b = 0; b < batch; ++b) {
    FASTSFT_CHECK(offsets[b + 1] >= offsets[b], op, ": ", name, ": expected ascending offsets, got ", offsets[b + 1],
                  " after ", offsets[b], " at index ", b + 1);
  }
  FASTSFT_CHECK(offsets[batch] == total, op, ": ", name, ": expected the last offset to be the number of tokens (",
                total, "), got ", offsets[batch]);
}

AttentionMask mask_of(const AttentionShape& shape) {
  AttentionMask mask{shape.window_left < 0 ? kUnbounded : shape.window_left,
                     shape.window_right < 0 ? kUnbounded : shape.window_right};
  if (shape.causal) mask.right = 0;
  return mask;
}

// Cuts one sequence into tiles of about kForwardRows rows for each key head.
void add_tiles(const ForwardArgs& args, int64_t q_first, int64_t num_q, int64_t k_first, int64_t num_k,
               const int32_t* table, std::vector<ForwardItem>& tiles) {
  const int64_t tokens = std::max<int64_t>(kForwardRows / args.group, 1);
  for (int64_t begin = 0; begin < num_q; begin += tokens) {
    ForwardItem tile{};
    tile.num_q = std::min(tokens, num_q - begin);
    tile.q_first = q_first + begin;
    tile.position = num_k - num_q + begin;
    tile.k_first = k_first;
    tile.num_k = num_k;
    tile.table = table;
    tiles.push_back(tile);
  }
}

// Few queries on many keys wait for memory and have a kernel of their own; the bits are the same.
bool is_decoding(const ForwardArgs& args, const ForwardItem& tile) {
  return tile.num_q * args.group <= kDecodeRows && tile.num_q * 8 <= tile.num_k;
}

// The segments of a tile are items, for there may be only one tile; an item takes several key heads, which are
// neighbours in memory, where that leaves enough items. left: for each group of heads, its segments not yet done.
struct DecodeWork {
  std::vector<DecodeItem> items;
  std::vector<int64_t> groups;  // per item, its index in left
  std::unique_ptr<float[]> states;
  std::unique_ptr<std::atomic<int32_t>[]> left;
};

DecodeWork cut_for_decoding(const ForwardArgs& args, const std::vector<ForwardItem>& tiles) {
  const int64_t heads = args.shape.num_kv_heads, dim = args.shape.head_dim;
  const auto segments_of = [&](const ForwardItem& tile) { return segments_seen(keys_seen(args.mask, tile)); };
  int64_t all_segments = 0, num_groups = 0, room = 0;
  for (const ForwardItem& tile : tiles) all_segments += segments_of(tile);
  DecodeWork work;
  std::vector<int32_t> counts;
  std::vector<int64_t> places;
  for (ForwardItem tile : tiles) {
    const int64_t rows = tile.num_q * args.group, segments = segments_of(tile);
    const int64_t at_once = all_segments >= num_threads() ? std::max<int64_t>(kDecodeRows / rows, 1) : 1;
    for (tile.kv_head = 0; tile.kv_head < heads; tile.kv_head += tile.kv_heads, ++num_groups) {
      tile.kv_heads = std::min(at_once, heads - tile.kv_head);
      counts.push_back(static_cast<int32_t>(segments));
      for (int64_t segment = 0; segment < segments; ++segment) {
        work.items.push_back({tile, segment, nullptr});
        work.groups.push_back(num_groups);
        places.push_back(room);
      }
      room += segments * states_size(tile_rows(rows * tile.kv_heads), dim);
    }
  }
  work.states = std::make_unique_for_overwrite<float[]>(room);
  work.left = std::make_unique<std::atomic<int32_t>[]>(num_groups);
  for (int64_t i = 0; i < num_groups; ++i) work.left[i] = counts[i];
  for (std::size_t i = 0; i < work.items.size(); ++i) work.items[i].states = work.states.get() + places[i];
  return work;
}

ForwardArgs forward_args(const AttentionShape& shape, int64_t total_q, const AttentionInput& q, void* out) {
  ForwardArgs args{};
  args.shape = shape;
  args.mask = mask_of(shape);
  args.group = shape.num_q_heads / shape.num_kv_heads;
  args.total_q = total_q;
  args.q = q;
  args.out = out;
  return args;
}

void run_forward(const ForwardArgs& args, const std::vector<ForwardItem>& tiles) {
  const int64_t dim = args.shape.head_dim;
  const auto seen = [&](const ForwardItem& item) {
    const KeyRange keys = keys_seen(args.mask, item);
    return std::max<int64_t>(keys.end - keys.begin, 0);
  };
  std::vector<ForwardItem> items, few;
  int64_t cost = 0;
  for (ForwardItem item : tiles) {
    if (is_decoding(args, item)) {
      few.push_back(item);
      cost += seen(item) * item.num_q * args.shape.num_q_heads * 2 * dim;
      continue;
    }
    item.kv_heads = 1;
    item.cost = (seen(item) * (tile_rows(item.num_q * args.group) + 2) + 16) * 2 * dim;
    for (item.kv_head = 0; item.kv_head < args.shape.num_kv_heads; ++item.kv_head) {
      items.push_back(item);
      cost += item.cost;
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const ForwardItem& a, const ForwardItem& b) { return a.cost > b.cost; });
  const DecodeWork decode = cut_for_decoding(args, few);
  const auto run_item = FASTSFT_ISA_SELECT(attention_forward_item);
  const auto run_segment = FASTSFT_ISA_SELECT(attention_decode_item);
  const auto run_fold = FASTSFT_ISA_SELECT(attention_decode_fold);
  const auto run = [&](std::size_t i) {
    if (i < items.size()) {
      run_item(args, items[i], scratch_floats(forward_scratch(tile_rows(items[i].num_q * args.group), dim)));
      return;
    }
    i -= items.size();
    const DecodeItem& item = decode.items[i];
    const int64_t rows = tile_rows(item.tile.num_q * args.group * item.tile.kv_heads);
    run_segment(args, item, scratch_floats(decode_scratch(rows, dim)));
    if (decode.left[decode.groups[i]].fetch_sub(1, std::memory_order_acq_rel) == 1) run_fold(args, item);
  };
  const auto count = static_cast<int64_t>(items.size() + decode.items.size());
  parallel_for(count, cost < kSerialCost ? std::max<int64_t>(count, 1) : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

// The queries before key 0's reach are in no item.
void zero_unseen_queries(const BackwardArgs& args, int64_t q_first, int64_t num_q, int64_t num_k) {
  const int64_t unseen = num_k == 0 ? num_q : std::clamp<int64_t>(num_q - num_k - args.mask.right, 0, num_q);
  const auto row =
      static_cast<std::size_t>(args.shape.num_q_heads * args.shape.head_dim) * dtype_size(args.shape.dtype);
  std::memset(static_cast<char*>(args.dq) + q_first * row, 0, unseen * row);
}

}  // namespace

void varlen_attention_forward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionInput& q,
                              const AttentionInput& k, const AttentionInput& v, void* out, float* lse) {
  constexpr const char* kOp = "varlen_attention";
  check_shape(kOp, shape);
  check_offsets(kOp, "cu_seqlens_q", batch.cu_q, batch.batch, batch.total_q);
  check_offsets(kOp, "cu_seqlens_k", batch.cu_k, batch.batch, batch.total_k);
  ForwardArgs args = forward_args(shape, batch.total_q, q, out);
  args.k = {k.data, {0, k.token_stride, k.head_stride}};
  args.v = {v.data, {0, v.token_stride, v.head_stride}};
  args.lse = lse;
  std::vector<ForwardItem> tiles;
  for (int64_t b = 0; b < batch.batch; ++b) {
    add_tiles(args, batch.cu_q[b], batch.cu_q[b + 1] - batch.cu_q[b], batch.cu_k[b], batch.cu_k[b + 1] - batch.cu_k[b],
              nullptr, tiles);
  }
  run_forward(args, tiles);
}

void paged_attention_forward(const AttentionShape& shape, const int32_t* cu_q, int64_t batch, int64_t total_q,
                             const AttentionInput& q, const PagedCache& cache, void* out) {
  constexpr const char* kOp = "paged_attention";
  check_shape(kOp, shape);
  check_offsets(kOp, "cu_seqlens_q", cu_q, batch, total_q);
  ForwardArgs args = forward_args(shape, total_q, q, out);
  args.k = {cache.k, {cache.k_strides[0], cache.k_strides[1], cache.k_strides[2]}};
  args.v = {cache.v, {cache.v_strides[0], cache.v_strides[1], cache.v_strides[2]}};
  args.block_size = cache.block_size;
  std::vector<ForwardItem> tiles;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t num_q = cu_q[b + 1] - cu_q[b], length = cache.context_lens[b];
    FASTSFT_CHECK(length >= num_q && length <= cache.max_blocks * cache.block_size, kOp, ": context_lens[", b,
                  "]: expected between the sequence's ", num_q, " queries and the table's room for ",
                  cache.max_blocks * cache.block_size, " keys, got ", length);
    if (num_q == 0) continue;
    const int32_t* table = cache.block_table + b * cache.max_blocks;
    for (int64_t i = 0; i * cache.block_size < length; ++i) {
      FASTSFT_CHECK(table[i] >= 0 && table[i] < cache.num_blocks, kOp, ": block_table[", b, ", ", i,
                    "]: expected a block id in [0, ", cache.num_blocks, "), got ", table[i]);
    }
    add_tiles(args, cu_q[b], num_q, 0, length, table, tiles);
  }
  run_forward(args, tiles);
}

void varlen_attention_backward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionInput& dout,
                               const AttentionInput& q, const AttentionInput& k, const AttentionInput& v,
                               const AttentionInput& out, const float* lse, const float* dlse, void* dq, void* dk,
                               void* dv) {
  constexpr const char* kOp = "varlen_attention_bwd";
  check_shape(kOp, shape);
  check_offsets(kOp, "cu_seqlens_q", batch.cu_q, batch.batch, batch.total_q);
  check_offsets(kOp, "cu_seqlens_k", batch.cu_k, batch.batch, batch.total_k);
  const int64_t dim = shape.head_dim, group = shape.num_q_heads / shape.num_kv_heads;
  const auto delta = std::make_unique_for_overwrite<float[]>(shape.num_q_heads * batch.total_q);
  std::atomic<bool> abandoned{false};
  BackwardArgs args{};
  args.shape = shape;
  args.mask = mask_of(shape);
  args.group = group;
  args.total_q = batch.total_q;
  args.tile_tokens = std::max<int64_t>((dim <= 128 ? kBackwardRows : kBackwardRowsOfWideHeads) / group, 1);
  args.q = q, args.k = k, args.v = v, args.out = out, args.dout = dout;
  args.lse = lse, args.dlse = dlse, args.delta = delta.get();
  args.dq = dq, args.dk = dk, args.dv = dv;
  args.abandoned = &abandoned;

  // Longest sequences first. Within a sequence key blocks ascend, since each waits for the one before; the key heads
  // come innermost, which keeps threads that start together out of each other's way.
  std::vector<int64_t> order(batch.batch);
  for (int64_t b = 0; b < batch.batch; ++b) order[b] = b;
  const auto pairs = [&](int64_t b) {
    return int64_t{batch.cu_q[b + 1] - batch.cu_q[b]} * (batch.cu_k[b + 1] - batch.cu_k[b]);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return pairs(a) > pairs(b); });
  std::vector<BackwardItem> items;
  std::vector<std::pair<int64_t, int64_t>> delta_ranges;
  int64_t shared_tiles = 0;
  for (const int64_t b : order) {
    BackwardItem item{};
    item.q_first = batch.cu_q[b], item.num_q = batch.cu_q[b + 1] - batch.cu_q[b];
    item.k_first = batch.cu_k[b], item.num_k = batch.cu_k[b + 1] - batch.cu_k[b];
    const int64_t block = gradient_block(item.num_k);
    const int64_t tiles = item.num_k > block ? (item.num_q + args.tile_tokens - 1) / args.tile_tokens : 0;
    for (item.block = 0; item.block * block < item.num_k; ++item.block) {
      for (item.kv_head = 0; item.kv_head < shape.num_kv_heads; ++item.kv_head) {
        item.first_tile = shared_tiles + item.kv_head * tiles;
        items.push_back(item);
      }
    }
    shared_tiles += tiles * shape.num_kv_heads;
    for (int64_t begin = 0; tiles > 0 && begin < item.num_q; begin += kDeltaTokens) {
      delta_ranges.emplace_back(item.q_first + begin, item.q_first + std::min(begin + kDeltaTokens, item.num_q));
    }
    zero_unseen_queries(args, item.q_first, item.num_q, item.num_k);
  }
  const int64_t rows = tile_rows(args.tile_tokens * group);
  const auto dq_sums = std::make_unique_for_overwrite<float[]>(shared_tiles * rows * dim);
  const auto blocks_done = std::make_unique<std::atomic<int32_t>[]>(shared_tiles);
  args.dq_sums = dq_sums.get();
  args.blocks_done = blocks_done.get();

  const auto run_delta = FASTSFT_ISA_SELECT(attention_backward_delta);
  parallel_for(static_cast<int64_t>(delta_ranges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_delta(args, delta_ranges[i].first, delta_ranges[i].second);
  });
  const auto run_item = FASTSFT_ISA_SELECT(attention_backward_item);
  int64_t cost = 0;
  for (const int64_t b : order) cost += pairs(b) * shape.num_q_heads * dim * 5;
  const int64_t count = static_cast<int64_t>(items.size());
  const int64_t scratch = backward_scratch(rows, dim);
  parallel_for(count, cost < kSerialCost ? std::max<int64_t>(count, 1) : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* buffer;
      try {
        buffer = scratch_floats(scratch);
      } catch (...) {
        abandoned = true;  // else the items that wait for this one would never end
        throw;
      }
      run_item(args, items[i], buffer);
    }
  });
}

}  // namespace fastsft
