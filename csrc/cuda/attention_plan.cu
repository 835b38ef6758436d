// The plan of a packed batch (fastsft/attention.h): one thread per row looks its sequence up (log2 B reads that the L2
// serves) and writes 8 bytes, a block of 128 its tile's cost; then one block per order sorts the tiles by cost. Once
// per batch.
#include "attention_tile.cuh"
#include "launch.h"

namespace fastsft::cuda {
namespace {

constexpr int kBuckets = 256;  // as many as threads of the sort

struct PlanArguments {
  const int32_t *cu_q, *cu_k;
  int batch, total_q, total_k;
  int64_t left, right;  // of the position; -1: unbounded
  AttentionPlan plan;
};

// Row i of sequences `own` sees rows of sequences `other`: those from `before` before to `after` after the row that has
// the same distance to its sequence's end.
__device__ AttentionInterval interval_of(int i, const int32_t* own, const int32_t* other, int batch, int other_total,
                                         int64_t before, int64_t after) {
  int b = 0, end = batch + 1;  // the first offset beyond i is in [b, end)
  while (b < end) {
    const int middle = (b + end) / 2;
    if (own[middle] <= i) {
      b = middle + 1;
    } else {
      end = middle;
    }
  }
  --b;
  if (b < 0 || b >= batch) return {0, 0};  // offsets that do not cover the rows
  const int start = max(0, min(other[b], other_total)), stop = max(start, min(other[b + 1], other_total));
  const int64_t length = stop - start, own_length = own[b + 1] - own[b], at = i - own[b] + length - own_length;
  const int64_t lo = before < 0 ? 0 : max(int64_t{0}, min(at - before, length));
  const int64_t hi = after < 0 ? length : max(int64_t{0}, min(at + after + 1, length));
  const AttentionInterval seen{start + static_cast<int>(lo), start + static_cast<int>(hi)};
  const bool is_short = own_length <= kShortSequence && length <= kShortSequence;
  return {seen.lo, is_short ? ~seen.hi : seen.hi};
}

// What the rows of a tile see, of any sequence and of those that are not short.
struct TileShared {
  AttentionInterval any, long_only;
  int has_long;
};

// Writes the intervals of a tile, one row per thread, and its costs; forward_cost may be null.
__device__ void plan_tile(TileShared& shared, AttentionInterval* intervals, int i, int total, AttentionInterval seen,
                          int32_t* forward_cost, int32_t* backward_cost) {
  if (threadIdx.x == 0) shared = {{INT32_MAX, 0}, {INT32_MAX, 0}, 0};
  __syncthreads();
  if (i < total) {
    intervals[i] = seen;
    const bool is_short = seen.hi < 0;
    const int hi = is_short ? ~seen.hi : seen.hi;
    if (!is_short) atomic_max(&shared.has_long, 1);
    if (seen.lo < hi) {
      atomic_min(&shared.any.lo, seen.lo);
      atomic_max(&shared.any.hi, hi);
      if (!is_short) {
        atomic_min(&shared.long_only.lo, seen.lo);
        atomic_max(&shared.long_only.hi, hi);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (forward_cost != nullptr) *forward_cost = max(0, shared.any.hi - shared.any.lo);
    *backward_cost = shared.has_long == 0 ? -1 : max(0, shared.long_only.hi - shared.long_only.lo);
  }
}

// A block per tile of queries, then one per tile of keys.
__global__ void attention_intervals_kernel(const PlanArguments a) {
  TileShared& shared = *shared_memory<TileShared>();
  const int tiles_q = (a.total_q + kPlanTile - 1) / kPlanTile, block = static_cast<int>(blockIdx.x);
  const bool of_keys = block >= tiles_q;
  const int i = (of_keys ? block - tiles_q : block) * kPlanTile + static_cast<int>(threadIdx.x);
  if (of_keys) {
    const AttentionInterval seen = interval_of(i, a.cu_k, a.cu_q, a.batch, a.total_q, a.right, a.left);
    plan_tile(shared, a.plan.columns, i, a.total_k, seen, nullptr, a.plan.costs + tiles_q + block);
  } else {
    const AttentionInterval seen = interval_of(i, a.cu_q, a.cu_k, a.batch, a.total_k, a.left, a.right);
    plan_tile(shared, a.plan.rows, i, a.total_q, seen, a.plan.costs + block, a.plan.costs + tiles_q + block);
  }
}

// Costs within an eighth of one another share a bucket; the costliest come first.
__device__ int bucket_of(int cost) {
  const uint32_t eighths = float_bits(static_cast<float>(max(cost, 0)) + 1.0f) >> 20;  // exponent and three bits
  return kBuckets - 1 - min(static_cast<int>(eighths - (127u << 3)), kBuckets - 1);
}

struct OrderShared {
  int counts[kBuckets];
};

// One block per order: a counting sort. The order inside a bucket may differ from run to run: results do not depend on
// it.
__global__ void attention_order_kernel(const PlanArguments a) {
  OrderShared& shared = *shared_memory<OrderShared>();
  const int tiles_q = (a.total_q + kPlanTile - 1) / kPlanTile, tiles_k = (a.total_k + kPlanTile - 1) / kPlanTile;
  const int which = static_cast<int>(blockIdx.x), tiles = which == 2 ? tiles_k : tiles_q;
  const int32_t* costs = a.plan.costs + which * tiles_q;
  int32_t* order = which == 0 ? a.plan.forward_order : which == 1 ? a.plan.dq_order : a.plan.dkv_order;
  const int thread = static_cast<int>(threadIdx.x);
  shared.counts[thread] = 0;
  __syncthreads();
  for (int tile = thread; tile < tiles; tile += kBuckets) atomic_add(&shared.counts[bucket_of(costs[tile])], 1);
  __syncthreads();
  if (thread == 0) {
    for (int i = 0, before = 0; i < kBuckets; ++i) {
      const int count = shared.counts[i];
      shared.counts[i] = before;
      before += count;
    }
  }
  __syncthreads();
  for (int tile = thread; tile < tiles; tile += kBuckets) {
    order[atomic_add(&shared.counts[bucket_of(costs[tile])], 1)] = costs[tile] < 0 ? ~tile : tile;
  }
}

int64_t tiles_of(int64_t total) { return (total + kPlanTile - 1) / kPlanTile; }

}  // namespace

int64_t attention_plan_size(int64_t total_q, int64_t total_k) {
  return 2 * (total_q + total_k) + 2 * (2 * tiles_of(total_q) + tiles_of(total_k));
}

AttentionPlan attention_plan_at(int32_t* memory, int64_t total_q, int64_t total_k) {
  AttentionPlan plan{};
  plan.rows = reinterpret_cast<AttentionInterval*>(memory);
  plan.columns = plan.rows + total_q;
  plan.forward_order = reinterpret_cast<int32_t*>(plan.columns + total_k);
  plan.dq_order = plan.forward_order + tiles_of(total_q);
  plan.dkv_order = plan.dq_order + tiles_of(total_q);
  plan.costs = plan.dkv_order + tiles_of(total_k);
  return plan;
}

void make_attention_plan(const AttentionShape& shape, const AttentionBatch& batch, const AttentionPlan& plan,
                         void* stream) {
  FASTSFT_CHECK(batch.total_q < INT32_MAX - kPlanTile && batch.total_k < INT32_MAX - kPlanTile,
                "attention_plan: total_q, total_k: expected less than 2^31 - 128, got ", batch.total_q, " and ",
                batch.total_k);
  const int64_t right = !shape.causal || shape.window_right == 0 ? shape.window_right : 0;
  const PlanArguments arguments{.cu_q = batch.cu_q,
                                .cu_k = batch.cu_k,
                                .batch = static_cast<int>(batch.batch),
                                .total_q = static_cast<int>(batch.total_q),
                                .total_k = static_cast<int>(batch.total_k),
                                .left = shape.window_left,
                                .right = right,
                                .plan = plan};
  const auto tiles = static_cast<unsigned>(tiles_of(batch.total_q) + tiles_of(batch.total_k));
  if (tiles == 0) return;
  launch<attention_intervals_kernel>(tiles, kPlanTile, sizeof(TileShared), stream, arguments);
  launch<attention_order_kernel>(3, kBuckets, sizeof(OrderShared), stream, arguments);
}

}  // namespace fastsft::cuda
