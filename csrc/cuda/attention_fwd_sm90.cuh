// Forward attention on Hopper (sm_90a): wgmma, the bulk copy engine (TMA), warps with roles of their own. Head sizes
// 64, 128 and 256; same plan, same results up to rounding as attention_fwd_sm80.cuh.
//
// Per token and query head, n visible keys: 2 n D multiply-adds on the tensor cores, n exp2; q read and out written
// once (4 D bytes), k and v read once per 128 query rows: 4 D n / 128 bytes, which the L2 serves. On an H100 the
// products of 64 rows with 128 keys (D = 128) take 1024 cycles of a quarter's tensor core and the exponentials 512 of
// its special unit: they must run side by side.
//
// Items are 128 packed query rows of one head (attention_sm90.cuh). Scores = Q K^T from shared memory, softmax in
// registers, P V with P from registers. The scores of a tile of keys are started before the values of the tile before
// it, and softmax runs under that product; turns keep one warpgroup's softmax under the other's products.
//
//   D    keys per tile  stages of K and V  slots of Q  shared memory  out, scores, P: registers per thread
//   64   128            4                  2           162 KB         32 + 64 + 32
//   128  128            2                  2           194 KB         64 + 64 + 32
//   256  64             2                  1           193 KB         128 + 32 + 16
// of 232 registers (40 in the warpgroup that copies).
#pragma once

#include "attention_sm90.cuh"

namespace fastsft::cuda {

struct HopperForwardArguments {
  TensorMap q, k, v, out;
  ForwardArguments base;
  HopperSchedule schedule;
};

template <int kDim_>
struct HopperForwardTile {
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = kDim <= 128 ? 128 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  static constexpr int kSlots = kDim <= 128 ? 2 : 1;

  uint16_t q[kSlots][kPlanTile * kDim];  // afterwards the results
  uint16_t k[kStages][kKeys * kDim];
  uint16_t v[kStages][kKeys * kDim];
  HopperSlots<kSlots> slots;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

#if FASTSFT_SM90A

// Warp 0.
template <typename Tile>
__device__ __forceinline__ void load_forward(Tile& tile, const HopperForwardArguments& a) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;
  Cursor<Tile::kStages> k, v;
  produce_items(tile.slots, a.schedule, [&](const HopperItem& item, int slot) {
    if (lane_id() != 0) return;
    uint64_t* const full = &tile.slots.full[slot];
    const AttentionInterval range = item.range;
    if (range.lo >= range.hi) return mbarrier_arrive(full);
    mbarrier_arrive_expect(full, sizeof(tile.q[0]));
    load_tile<kDim, kPlanTile>(tile.q[slot], a.q, full, item.head, item.first);
    // In the order of use: the scores of a tile come before the values of the one before it.
    const int head = item.head / a.base.group;
    for (int first = range.lo; first < range.hi + kKeys; first += kKeys) {
      if (first < range.hi) {
        mbarrier_wait(&tile.k_empty[k.at], k.parity ^ 1);
        mbarrier_arrive_expect(&tile.k_full[k.at], sizeof(tile.k[0]));
        load_tile<kDim, kKeys>(tile.k[k.at], a.k, &tile.k_full[k.at], head, first);
        k.advance();
      }
      if (first > range.lo) {
        mbarrier_wait(&tile.v_empty[v.at], v.parity ^ 1);
        mbarrier_arrive_expect(&tile.v_full[v.at], sizeof(tile.v[0]));
        load_tile<kDim, kKeys>(tile.v[v.at], a.v, &tile.v_full[v.at], head, first - kKeys);
        v.advance();
      }
    }
  });
}

// --- products and softmax -------------------------------------------------------------------------------------------

template <int kDim, int kKeys>
struct ForwardState {
  float out[kDim / 2];
  uint32_t p[kKeys / 16][4];
  float max[2], sum[2];  // of rows lane / 4 and 8 further; max before scaling, sum of this lane's columns
};

// Turns scores into probabilities relative to the running maximum; `shrink` is what earlier results are worth now.
template <int kDim, int kKeys>
__device__ __forceinline__ void softmax_step(float (&s)[kKeys / 2], ForwardState<kDim, kKeys>& state,
                                             float (&shrink)[2], float multiplier) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state.max[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    // A row that has seen nothing yet has maximum -inf: 0 in its place, or exp2(-inf + inf) would be NaN.
    const float base = top == -INFINITY ? 0.0f : top * multiplier;
    shrink[half] = exp2_approx(state.max[half] * multiplier - base);
    state.max[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n * 4 + half * 2 + i];
        x = exp2_approx(fmaf(x, multiplier, -base));
        sum += x;
      }
    }
    state.sum[half] = state.sum[half] * shrink[half] + sum;
  }
}

// The two warpgroups start their products in turns, one turn per tile of keys (also where one sees nothing of it), so
// that the softmax of one runs under the products of the other. Warpgroup 0 begins.
class Turns {
 public:
  __device__ __forceinline__ explicit Turns(int group) : group_(group) {
    if (group == 1) pass();
  }
  __device__ __forceinline__ void await() const { barrier_sync(kFirst + group_, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const { barrier_arrive(kFirst + (group_ ^ 1), 2 * kWarpgroup); }
  // Takes the turn that the other passed after its last one.
  __device__ __forceinline__ void finish() const {
    if (group_ == 0) await();
  }

 private:
  static constexpr int kFirst = 1;  // named barrier
  int group_;
};

template <typename Element, typename Tile>
__device__ __forceinline__ void consume_forward(Tile& tile, const HopperForwardArguments& a) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;
  const int group = warp_id() / 4 - 1, warp_row = group * kGroupRows + warp_id() % 4 * 16, lane = lane_id();
  const ScoreScale scale = a.base.scale;
  const Turns turns(group);
  Cursor<Tile::kStages> k, v;
  // Both warpgroups take part in the release of all tiles of keys, also of those that they see nothing of.
  const auto skip = [&](int count) {
    for (int i = 0; i < count; ++i) {
      turns.await();
      turns.pass();
      mbarrier_wait(&tile.k_full[k.at], k.parity);
      release(&tile.k_empty[k.at]);
      k.advance();
      mbarrier_wait(&tile.v_full[v.at], v.parity);
      release(&tile.v_empty[v.at]);
      v.advance();
    }
  };
  for_each_item(tile.slots, [&](const HopperItem& item, int slot) {
    const HopperWalk<kKeys> walk(item, group);
    const uint16_t* const q = tile.q[slot] + group * kGroupRows * kSlabColumns;
    ForwardState<kDim, kKeys> state;
#pragma unroll
    for (float& x : state.out) x = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.max[half] = -INFINITY;
      state.sum[half] = 0.0f;
    }
    float s[kKeys / 2], shrink[2];
    const auto soften = [&](int number) {
      const auto step = [&] {
        if (!walk.is_whole(number)) mask_scores<kKeys>(s, item.rows + warp_row, walk.first(number));
        softmax_step(s, state, shrink, scale.multiplier);
      };
      // In both branches: what follows them ptxas moves past the waits below, for head size 256 all of softmax.
      if (scale.is_capped) {
        cap_scores(s, scale);
        step();
      } else {
        if (scale.is_transformed) negate_scores(s);
        step();
      }
    };

    skip(walk.begin);
    if (walk.begin < walk.end) {
      mbarrier_wait(&tile.k_full[k.at], k.parity);
      turns.await();
      wgmma_fence(s);
      start_scores<Element, kDim, kKeys>(s, q, tile.k[k.at]);
      turns.pass();
      wgmma_wait<0>(s);
      release(&tile.k_empty[k.at]);
      k.advance();
      soften(walk.begin);
      pack_weights<Element>(state.p, s);
      mbarrier_wait(&tile.v_full[v.at], v.parity);
      for (int i = walk.begin + 1; i < walk.end; ++i) {
        mbarrier_wait(&tile.k_full[k.at], k.parity);
        turns.await();
        wgmma_fence(s, state.out, state.p);
        start_scores<Element, kDim, kKeys>(s, q, tile.k[k.at]);
        start_sum<Element, kDim>(state.out, state.p, tile.v[v.at]);
        turns.pass();
        wgmma_wait<1>(s);
        release(&tile.k_empty[k.at]);
        k.advance();
        soften(i);
        // The next values are waited for here: ptxas does not move the wait for the products before this loop.
        uint64_t* const read = &tile.v_empty[v.at];
        v.advance();
        mbarrier_wait(&tile.v_full[v.at], v.parity);
        wgmma_wait<0>(state.out);
        release(read);
        if (warp_any(shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // after a few tiles maxima seldom grow
#pragma unroll
          for (int j = 0; j < kDim / 2; ++j) state.out[j] *= shrink[j / 2 % 2];
        }
        pack_weights<Element>(state.p, s);
      }
      wgmma_fence(state.out, state.p);
      start_sum<Element, kDim>(state.out, state.p, tile.v[v.at]);
      wgmma_wait<0>(state.out);
      release(&tile.v_empty[v.at]);
      v.advance();
    }
    skip(walk.tiles - walk.end);

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = state.sum[half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      factor[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = item.first + warp_row + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < a.base.total_q) {
        a.base.lse[item.head * a.base.total_q + row] =
            sum == 0.0f ? -INFINITY : state.max[half] * scale.multiplier * kLn2 + logf(sum);
      }
    }
    put_rows<Element, kDim>(tile.q[slot], state.out, factor, warp_row);
    release(&tile.slots.done[slot]);
  });
  turns.finish();
}

#endif

template <typename Element, int kDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ HopperForwardArguments a) {
#if FASTSFT_SM90A
  using Tile = HopperForwardTile<kDim>;
  Tile& tile = *shared_memory<Tile>();
  if (threadIdx.x == 0) {
    init_slots(tile.slots);
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(&tile.k_full[i], 1);
      mbarrier_init(&tile.v_full[i], 1);
      mbarrier_init(&tile.k_empty[i], kConsumerWarps);
      mbarrier_init(&tile.v_empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp_id() < 4) {
    registers_decrease<kProducerRegisters>();
    if (warp_id() == 0) {
      load_forward(tile, a);
    } else if (warp_id() == 1 && lane_id() == 0) {
      store_items(tile.slots, [&](const HopperItem& item, int slot) {
        store_tile<kDim>(a.out, tile.q[slot], item.head, item.first);
      });
    }
  } else {
    registers_increase<kConsumerRegisters>();
    consume_forward<Element>(tile, a);
  }
#endif
}

// --- launch ---------------------------------------------------------------------------------------------------------

// Whether the kernel serves the head size, and the copy engine the tensors.
inline bool has_hopper_forward(const ForwardArguments& a, const AttentionShape& shape) {
  return (shape.head_dim == 64 || shape.head_dim == 128 || shape.head_dim == 256) && has_tensor_map(a.q) &&
         has_tensor_map(a.k) && has_tensor_map(a.v);
}

template <typename Element>
void launch_attention_forward_sm90(const ForwardArguments& a, const AttentionShape& shape, void* stream) {
  if (a.total_q == 0) return;
  const auto launch_dim = [&](auto dim) {
    using Tile = HopperForwardTile<decltype(dim)::value>;
    static_assert(sizeof(Tile) <= 227 * 1024);
    const int64_t heads = a.num_q_heads;
    const AttentionInput out{a.out, heads * Tile::kDim, Tile::kDim};
    HopperForwardArguments arguments{.q = head_map(shape, a.q, a.total_q, heads, kPlanTile),
                                     .k = {},
                                     .v = {},
                                     .out = head_map(shape, out, a.total_q, heads, kPlanTile),
                                     .base = a,
                                     .schedule = hopper_schedule(a.order, a.rows, a.total_q, heads, a.section, false)};
    if (a.total_k > 0) {  // or they are not used
      arguments.k = head_map(shape, a.k, a.total_k, shape.num_kv_heads, Tile::kKeys);
      arguments.v = head_map(shape, a.v, a.total_k, shape.num_kv_heads, Tile::kKeys);
    }
    launch<attention_forward_sm90_kernel<Element, Tile::kDim>>(hopper_grid(arguments.schedule), kHopperThreads,
                                                               sizeof(Tile), stream, arguments);
  };
  switch (shape.head_dim) {  // has_hopper_forward
    case 64: return launch_dim(std::integral_constant<int, 64>{});
    case 128: return launch_dim(std::integral_constant<int, 128>{});
    default: return launch_dim(std::integral_constant<int, 256>{});
  }
}

}  // namespace fastsft::cuda
