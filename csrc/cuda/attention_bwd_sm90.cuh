// Backward attention on Hopper (sm_90a): wgmma, the bulk copy engine (TMA), warps with roles of their own. Head sizes
// 64 and 128; formulas, and results up to rounding, of attention_bwd_sm80.cuh, whose delta kernel it uses.
//
// Two passes of one kernel: dk and dv keep a tile of 128 keys (attention_sm90.cuh) and walk the queries, of every query
// head that reads the key head; dq keeps 128 queries and walks their keys. Either way a warpgroup has 64 rows and two
// products against them, scores and dp, in registers; probabilities and ds go from there into the sums.
//
// Per token and query head, n visible keys: seven products of n D multiply-adds, 2 n exp2. With one query head per key
// head q, k, v are read twice, dout three times, out once, dq, dk, dv written once (26 D bytes); every 128 keys read q
// and dout, every 128 queries k and v: 8 D n / 128 bytes, which the L2 serves. On an H100, D = 128, the four products
// of 64 keys with 64 queries take 1024 cycles of the tensor cores, their operands 768 of shared memory, the
// exponentials 256; the three of 64 queries with 96 keys 1152, 832 and 384. So the products are the limit as long as
// one warpgroup's run under the other's arithmetic; within a warpgroup, exponentials run under the product for dp.
//
// A single pass needs five products, but adds dq up across blocks: 4 D bytes to and from float32 per row and 128 keys,
// a buffer of 4 D bytes per row and two more kernels to clear and convert it; for the same bits on every run the blocks
// must also wait for one another (FlashAttention-3, D = 128, causal: 474 instead of 575 TFLOP/s by its authors, pull
// request 1893), and the products of dq need registers and a tile of ds in shared memory beside dk and dv. Here every
// sum stays in registers from its first to its last term, and no block waits.
//
//   D    rows     columns per tile  stages  slots  shared memory  sums, scores and dp, weights: registers per thread
//   64   keys     128               4       2      198 KB         64 + 128 + 64
//        queries  96                4       2      162 KB         32 + 96 + 24
//   128  keys     64                2       2      195 KB         128 + 64 + 32
//        queries  96                2       2      226 KB         64 + 96 + 24
// of 232 registers; weights take over those of the scores that they are made from. Head size 256 is left to
// attention_bwd_sm80.cuh: dk and dv of 64 keys alone would take 256.
#pragma once

#include "attention_sm90.cuh"

namespace fastsft::cuda {

// Two tensors on either side: k and v against q and dout, or q and dout against k and v. Scores are rows[0]
// columns[0]^T, dp is rows[1] columns[1]^T; ds times columns[0] gives dk or dq, the probabilities times columns[1] dv.
struct HopperBackwardArguments {
  TensorMap rows[2], columns[2], gradients[2];
  BackwardArguments base;
  HopperSchedule schedule;
};

template <int kDim_, bool kOfKeys_>
struct HopperBackwardTile {
  static constexpr int kDim = kDim_;
  static constexpr bool kOfKeys = kOfKeys_;  // rows are keys
  static constexpr int kColumns = !kOfKeys ? 96 : kDim == 64 ? 128 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : 2, kSlots = 2;

  uint16_t rows[kSlots][2][kPlanTile * kDim];  // afterwards the gradients
  uint16_t columns[kStages][2][kColumns * kDim];
  // Of the queries, where these are the columns. lse in units of log2, inf in place of -inf (a query that sees nothing)
  // and beyond the tensor: exp2(score - lse) is 0 there.
  static constexpr int kStats = kOfKeys ? kColumns : 1;
  float lse[kStages][kStats], delta[kStages][kStats];
  HopperSlots<kSlots> slots;
  uint64_t full[kStages], empty[kStages];
};

__device__ __forceinline__ float finite_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

#if FASTSFT_SM90A

// --- copies ---------------------------------------------------------------------------------------------------------

// Warp 0.
template <typename Tile>
__device__ __forceinline__ void load_backward(Tile& tile, const HopperBackwardArguments& a) {
  constexpr int kDim = Tile::kDim, kColumns = Tile::kColumns, kPerLane = kColumns / kWarp;
  const BackwardArguments& base = a.base;
  const int lane = lane_id();
  Cursor<Tile::kStages> stage;
  produce_items(tile.slots, a.schedule, [&](const HopperItem& item, int slot) {
    const AttentionInterval range = item.range;
    const bool is_empty = range.lo >= range.hi;
    if (lane == 0) {
      uint64_t* const full = &tile.slots.full[slot];
      mbarrier_arrive_expect(full, is_empty ? 0 : sizeof(tile.rows[0]));
      if (!is_empty) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_tile<kDim, kPlanTile>(tile.rows[slot][i], a.rows[i], full, item.head, item.first);
        }
      }
    }
    if (is_empty) return;
    const int heads = Tile::kOfKeys ? base.group : 1;
    for (int i = 0; i < heads; ++i) {
      const int head = Tile::kOfKeys ? item.head * base.group + i : item.head / base.group;
      for (int first = range.lo; first < range.hi; first += kColumns) {
        float lse[kPerLane], delta[kPerLane];
        if constexpr (Tile::kOfKeys) {  // asked for before the wait
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            const int column = first + j * kWarp + lane;
            const bool is_valid = column < base.total_q;
            const int64_t at = static_cast<int64_t>(head) * base.total_q + column;
            lse[j] = is_valid ? base.lse[at] : -INFINITY;
            delta[j] = is_valid ? base.delta[at] : 0.0f;
          }
        }
        mbarrier_wait(&tile.empty[stage.at], stage.parity ^ 1);
        if constexpr (Tile::kOfKeys) {
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            tile.lse[stage.at][j * kWarp + lane] = finite_lse(lse[j]);
            tile.delta[stage.at][j * kWarp + lane] = delta[j];
          }
        }
        sync_warp();  // also where nothing was written: a lane two phases behind would take the parity for its own
        if (lane == 0) {
          uint64_t* const full = &tile.full[stage.at];
          mbarrier_arrive_expect(full, sizeof(tile.columns[0]));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            load_tile<kDim, kColumns>(tile.columns[stage.at][j], a.columns[j], full, head, first);
          }
        }
        stage.advance();
      }
    }
  });
}

// --- probabilities and score gradients ------------------------------------------------------------------------------

// lse and delta of the query of a score: of columns n, n + 1 (keys are the rows), or of rows lane / 4 and 8 further.
template <typename Tile>
struct QueryStats {
  const float *lse_at, *delta_at;
  float lse_of[2], delta_of[2];

  __device__ __forceinline__ float2 lse(int half, int n) const {
    if constexpr (Tile::kOfKeys) return load<float2>(lse_at + n);
    return make_float2(lse_of[half], lse_of[half]);
  }
  __device__ __forceinline__ float2 delta(int half, int n) const {
    if constexpr (Tile::kOfKeys) return load<float2>(delta_at + n);
    return make_float2(delta_of[half], delta_of[half]);
  }
};

// Calls f(i, half, n) for each pair of neighbouring scores, i and i + 1: their half of the rows, their column.
template <int kColumns, typename F>
__device__ __forceinline__ void for_each_pair(F&& f) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) f(n * 4 + half * 2, half, n * 8);
  }
}

template <int kColumns, typename Stats>
__device__ __forceinline__ void exponentiate(float (&s)[kColumns / 2], const Stats& stats, float multiplier) {
  for_each_pair<kColumns>([&](int i, int half, int n) {
    const float2 lse = stats.lse(half, n);
    s[i] = exp2_approx(fmaf(s[i], multiplier, -lse.x));
    s[i + 1] = exp2_approx(fmaf(s[i + 1], multiplier, -lse.y));
  });
}

// dp becomes delta + (1 - t^2) (dp - delta), t the capped scores: their slope, so that ds = p (dp - delta) holds.
template <int kColumns, typename Stats>
__device__ __forceinline__ void apply_slope(float (&dp)[kColumns / 2], const float (&t)[kColumns / 2],
                                            const Stats& stats) {
  for_each_pair<kColumns>([&](int i, int half, int n) {
    const float2 delta = stats.delta(half, n);
    dp[i] = fmaf(1.0f - t[i] * t[i], dp[i] - delta.x, delta.x);
    dp[i + 1] = fmaf(1.0f - t[i + 1] * t[i + 1], dp[i + 1] - delta.y, delta.y);
  });
}

template <int kColumns, typename Stats>
__device__ __forceinline__ void score_gradients(float (&dp)[kColumns / 2], const float (&p)[kColumns / 2],
                                                const Stats& stats) {
  for_each_pair<kColumns>([&](int i, int half, int n) {
    const float2 delta = stats.delta(half, n);
    dp[i] = p[i] * (dp[i] - delta.x);
    dp[i + 1] = p[i + 1] * (dp[i + 1] - delta.y);
  });
}

template <typename Element, typename Tile>
__device__ __forceinline__ void consume_backward(Tile& tile, const HopperBackwardArguments& a) {
  constexpr int kDim = Tile::kDim, kColumns = Tile::kColumns;
  const int group = warp_id() / 4 - 1, warp_row = group * kGroupRows + warp_id() % 4 * 16, lane = lane_id();
  const BackwardArguments& base = a.base;
  const ScoreScale scale = base.scale;
  Cursor<Tile::kStages> stage;
  // Both warpgroups take part in the release of all tiles, also of those that they see nothing of.
  const auto skip = [&](int count) {
    for (int i = 0; i < count; ++i) {
      mbarrier_wait(&tile.full[stage.at], stage.parity);
      release(&tile.empty[stage.at]);
      stage.advance();
    }
  };
  for_each_item(tile.slots, [&](const HopperItem& item, int slot) {
    const HopperWalk<kColumns> walk(item, group);
    const uint16_t* const rows[2] = {tile.rows[slot][0] + group * kGroupRows * kSlabColumns,
                                     tile.rows[slot][1] + group * kGroupRows * kSlabColumns};
    QueryStats<Tile> stats{};
    if constexpr (!Tile::kOfKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = item.first + warp_row + half * 8 + lane / 4;
        const int64_t at = static_cast<int64_t>(item.head) * base.total_q + row;
        stats.lse_of[half] = row < base.total_q ? finite_lse(base.lse[at]) : INFINITY;
        stats.delta_of[half] = row < base.total_q ? base.delta[at] : 0.0f;
      }
    }
    float sum[kDim / 2], value_sum[kDim / 2];  // dk or dq before scaling, dv
#pragma unroll
    for (float& x : sum) x = 0.0f;
#pragma unroll
    for (float& x : value_sum) x = 0.0f;

    const int heads = Tile::kOfKeys ? base.group : 1;
    for (int head = 0; head < heads; ++head) {
      skip(walk.begin);
      for (int i = walk.begin; i < walk.end; ++i) {
        float s[kColumns / 2], dp[kColumns / 2];
        uint32_t ds[kColumns / 16][4];
        const auto mask = [&] {
          if (!walk.is_whole(i)) mask_scores<kColumns>(s, item.rows + warp_row, walk.first(i));
        };
        const uint16_t* const columns[2] = {tile.columns[stage.at][0], tile.columns[stage.at][1]};
        if constexpr (Tile::kOfKeys) {
          stats.lse_at = tile.lse[stage.at] + lane % 4 * 2;
          stats.delta_at = tile.delta[stage.at] + lane % 4 * 2;
        }
        mbarrier_wait(&tile.full[stage.at], stage.parity);
        wgmma_fence(s, dp);
        start_scores<Element, kDim, kColumns>(s, rows[0], columns[0]);
        start_scores<Element, kDim, kColumns>(dp, rows[1], columns[1]);
        wgmma_wait<1>(s);
        // Under the product for dp, past whose wait ptxas does not move what is inside a branch. With softcap the slope
        // comes first, and needs dp.
        if (scale.is_capped) {
          cap_scores(s, scale);
        } else {
          if (scale.is_transformed) negate_scores(s);
          mask();
          exponentiate<kColumns>(s, stats, scale.multiplier);
        }
        wgmma_wait<0>(dp);
        if (scale.is_capped) {
          apply_slope<kColumns>(dp, s, stats);
          mask();
          exponentiate<kColumns>(s, stats, scale.multiplier);
        }
        if constexpr (Tile::kOfKeys) {
          uint32_t p[kColumns / 16][4];
          pack_weights<Element>(p, s);
          score_gradients<kColumns>(dp, s, stats);
          pack_weights<Element>(ds, dp);
          wgmma_fence(sum, value_sum, ds, p);
          start_sum<Element, kDim>(value_sum, p, columns[1]);
          start_sum<Element, kDim>(sum, ds, columns[0]);
          wgmma_wait<0>(sum, value_sum);
        } else {
          score_gradients<kColumns>(dp, s, stats);
          pack_weights<Element>(ds, dp);
          wgmma_fence(sum, ds);
          start_sum<Element, kDim>(sum, ds, columns[0]);
          wgmma_wait<0>(sum);
        }
        release(&tile.empty[stage.at]);
        stage.advance();
      }
      skip(walk.tiles - walk.end);
    }

    put_rows<Element, kDim>(tile.rows[slot][0], sum, {scale.scale, scale.scale}, warp_row);
    if constexpr (Tile::kOfKeys) put_rows<Element, kDim>(tile.rows[slot][1], value_sum, {1.0f, 1.0f}, warp_row);
    release(&tile.slots.done[slot]);
  });
}

#endif

// Rows of short sequences that share an item with others are written too, as 0: attention_short_sm80.cuh comes after.
template <typename Element, int kDim, bool kOfKeys>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ HopperBackwardArguments a) {
#if FASTSFT_SM90A
  using Tile = HopperBackwardTile<kDim, kOfKeys>;
  Tile& tile = *shared_memory<Tile>();
  if (threadIdx.x == 0) {
    init_slots(tile.slots);
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(&tile.full[i], 1);
      mbarrier_init(&tile.empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp_id() < 4) {
    registers_decrease<kProducerRegisters>();
    if (warp_id() == 0) {
      load_backward(tile, a);
    } else if (warp_id() == 1 && lane_id() == 0) {
      store_items(tile.slots, [&](const HopperItem& item, int slot) {
#pragma unroll
        for (int i = 0; i < (kOfKeys ? 2 : 1); ++i) {
          store_tile<kDim>(a.gradients[i], tile.rows[slot][i], item.head, item.first);
        }
      });
    }
  } else {
    registers_increase<kConsumerRegisters>();
    consume_backward<Element>(tile, a);
  }
#endif
}

// --- launches -------------------------------------------------------------------------------------------------------

// Whether the kernel serves the head size, and the copy engine the tensors.
inline bool has_hopper_backward(const BackwardArguments& a, const AttentionShape& shape) {
  return (shape.head_dim == 64 || shape.head_dim == 128) && has_tensor_map(a.q) && has_tensor_map(a.k) &&
         has_tensor_map(a.v) && has_tensor_map(a.dout);
}

template <typename Element, bool kOfKeys>
void launch_attention_backward_sm90(const BackwardArguments& a, const AttentionShape& shape, void* stream) {
  const int64_t total = kOfKeys ? a.total_k : a.total_q, heads = kOfKeys ? a.num_kv_heads : a.num_q_heads;
  const int64_t other_total = kOfKeys ? a.total_q : a.total_k, other_heads = kOfKeys ? a.num_q_heads : a.num_kv_heads;
  if (total == 0) return;
  const auto launch_dim = [&](auto dim) {
    using Tile = HopperBackwardTile<decltype(dim)::value, kOfKeys>;
    static_assert(sizeof(Tile) <= 227 * 1024);
    const AttentionInput keys[2] = {a.k, a.v}, queries[2] = {a.q, a.dout};
    uint16_t* const gradients[2] = {kOfKeys ? a.dk : a.dq, kOfKeys ? a.dv : nullptr};
    HopperBackwardArguments arguments{
        .rows = {},
        .columns = {},
        .gradients = {},
        .base = a,
        .schedule =
            kOfKeys ? hopper_schedule(a.plan.dkv_order, a.plan.columns, total, heads, a.section, a.skip_short)
                    : hopper_schedule(a.plan.dq_order, a.plan.rows, total, heads, a.section * a.group, a.skip_short)};
    for (int i = 0; i < 2; ++i) {
      arguments.rows[i] = head_map(shape, (kOfKeys ? keys : queries)[i], total, heads, kPlanTile);
      if (other_total > 0) {  // or they are not used
        arguments.columns[i] = head_map(shape, (kOfKeys ? queries : keys)[i], other_total, other_heads, Tile::kColumns);
      }
      if (gradients[i] != nullptr) {
        const AttentionInput gradient{gradients[i], heads * Tile::kDim, Tile::kDim};
        arguments.gradients[i] = head_map(shape, gradient, total, heads, kPlanTile);
      }
    }
    launch<attention_backward_sm90_kernel<Element, Tile::kDim, kOfKeys>>(
        hopper_grid(arguments.schedule), kHopperThreads, sizeof(Tile), stream, arguments);
  };
  if (shape.head_dim == 64) {
    launch_dim(std::integral_constant<int, 64>{});
  } else {
    launch_dim(std::integral_constant<int, 128>{});  // has_hopper_backward
  }
}

}  // namespace fastsft::cuda
