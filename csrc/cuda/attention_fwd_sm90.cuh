// Forward attention on Hopper (sm_90a): wgmma, the bulk copy engine (TMA), warps with roles of their own. Head sizes
// 64, 128 and 256; same plan, same results up to rounding as attention_fwd_sm80.cuh.
//
// Per token and query head, n visible keys: 2 n D multiply-adds on the tensor cores, n exp2; q read and out written
// once (4 D bytes), k and v read once per 128 query rows: 4 D n / 128 bytes, which the L2 serves. On an H100 the
// products of 64 rows with 128 keys (D = 128) take 1024 cycles of a quarter's tensor core and the exponentials 512 of
// its special unit: they must run side by side.
//
// One block per multiprocessor walks items (128 packed query rows of one head) by a schedule that is known beforehand.
// Its first warpgroup copies: warp 0 writes down what the item is and loads queries, keys and values, warp 1 stores the
// results. The two others own 64 rows each: scores = Q K^T from shared memory, softmax in registers, P V with P from
// registers. The scores of a tile of keys are started before the values of the tile before it, and softmax runs under
// that product; turns keep one warpgroup's softmax under the other's products.
//
//   D    keys per tile  stages of K and V  slots of Q  shared memory  out, scores, P: registers per thread
//   64   128            4                  2           162 KB         32 + 64 + 32
//   128  128            2                  2           194 KB         64 + 64 + 32
//   256  64             2                  1           193 KB         128 + 32 + 16
// of 232 registers (40 in the warpgroup that copies).
#pragma once

#include "attention_launch.cuh"
#include "primitives_sm90.cuh"
#include "tensor_map.h"

namespace fastsft::cuda {

struct HopperForwardArguments {
  TensorMap q, k, v, out;
  ForwardArguments base;
  unsigned items;
};

// What the warpgroups know of an item.
struct ForwardItem {
  int first, head;
  AttentionInterval range;               // what any row of the tile sees
  AttentionInterval outer[2], inner[2];  // what any and what all of 64 rows see
  AttentionInterval rows[kPlanTile];
};

// Tiles in shared memory: slabs of 64 columns (128 bytes), swizzled.
template <int kDim_>
struct HopperForwardTile {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kPlanTile;
  static constexpr int kKeys = kDim <= 128 ? 128 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  static constexpr int kSlots = kDim <= 128 ? 2 : 1;

  uint16_t q[kSlots][kRows * kDim];  // afterwards the results
  uint16_t k[kStages][kKeys * kDim];
  uint16_t v[kStages][kKeys * kDim];
  ForwardItem items[kSlots];
  uint64_t slot_full[kSlots], slot_done[kSlots], slot_empty[kSlots];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

inline constexpr int kHopperThreads = 3 * kWarpgroup, kConsumerWarps = 8;
inline constexpr int kSlabColumns = 64, kSlabRow = 128;  // bytes
inline constexpr int kPattern = 8 * kSlabRow;

// A place in a ring of buffers, and the parity of the phases its mbarriers are in.
template <int kCount>
struct Cursor {
  int at = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++at == kCount) at = 0, parity ^= 1;
  }
};

// The items of a block: the grid goes through all of them, costliest first, and turns back at its ends, so that no
// block has the costlier item in every round. False after the last one.
__device__ __forceinline__ bool item_of_round(unsigned& item, unsigned round, unsigned items) {
  item = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  return item < items;
}

#if FASTSFT_SM90A

// --- copies ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ AttentionInterval hull(AttentionInterval a, AttentionInterval b) {
  return {min(a.lo, b.lo), max(a.hi, b.hi)};
}

// Writes an item down; the whole warp.
__device__ __forceinline__ void describe(ForwardItem& item, const ForwardArguments& a, int first, int head) {
  const int lane = lane_id();
  AttentionInterval any[2] = {{INT32_MAX, 0}, {INT32_MAX, 0}}, all[2] = {{0, INT32_MAX}, {0, INT32_MAX}};
#pragma unroll
  for (int part = 0; part < kPlanTile / kWarp; ++part) {
    const int row = part * kWarp + lane, half = part / 2;
    AttentionInterval seen{0, 0};
    if (first + row < a.total_q) seen = a.rows[first + row];
    if (seen.hi < 0) seen.hi = ~seen.hi;  // short sequences are nothing special here
    item.rows[row] = seen;
    if (seen.lo < seen.hi) any[half] = hull(any[half], seen);
    all[half] = {max(all[half].lo, seen.lo), min(all[half].hi, seen.hi)};
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      any[half] = hull(any[half], {shuffle_xor(any[half].lo, step), shuffle_xor(any[half].hi, step)});
      all[half] = {max(all[half].lo, shuffle_xor(all[half].lo, step)),
                   min(all[half].hi, shuffle_xor(all[half].hi, step))};
    }
    if (lane == 0) item.outer[half] = any[half], item.inner[half] = all[half];
  }
  if (lane == 0) item.first = first, item.head = head, item.range = hull(any[0], any[1]);
  sync_warp();
}

// Rows first .. first + kRows - 1 of a head; those beyond the tensor are 0.
template <int kDim, int kRows>
__device__ __forceinline__ void load_tile(uint16_t* tile, const TensorMap& map, uint64_t* full, int head, int first) {
  mbarrier_arrive_expect(full, kRows * kDim * 2);
#pragma unroll
  for (int d = 0; d < kDim; d += kSlabColumns) tensor_load(tile + d * kRows, map, full, d, head, first);
}

template <typename Tile>
__device__ __forceinline__ void load_items(Tile& tile, const HopperForwardArguments& a) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;
  const ForwardArguments& base = a.base;
  const int tiles = static_cast<int>((base.total_q + kPlanTile - 1) / kPlanTile), per_section = tiles * base.section;
  Cursor<Tile::kSlots> slot;
  Cursor<Tile::kStages> k, v;
  unsigned number;
  for (unsigned round = 0; item_of_round(number, round, a.items); ++round) {
    const int section = static_cast<int>(number) / per_section, in_section = static_cast<int>(number) % per_section;
    const int entry = base.order[in_section / base.section];
    ForwardItem& item = tile.items[slot.at];
    mbarrier_wait(&tile.slot_empty[slot.at], slot.parity ^ 1);
    describe(item, base, (entry < 0 ? ~entry : entry) * kPlanTile, section * base.section + in_section % base.section);
    if (lane_id() == 0) {
      const AttentionInterval range = item.range;
      if (range.lo < range.hi) {
        load_tile<kDim, Tile::kRows>(tile.q[slot.at], a.q, &tile.slot_full[slot.at], item.head, item.first);
      } else {
        mbarrier_arrive(&tile.slot_full[slot.at]);
      }
      // In the order of use: the scores of a tile come before the values of the one before it.
      const int head = item.head / base.group;
      for (int first = range.lo; first < range.hi + kKeys && range.lo < range.hi; first += kKeys) {
        if (first < range.hi) {
          mbarrier_wait(&tile.k_empty[k.at], k.parity ^ 1);
          load_tile<kDim, kKeys>(tile.k[k.at], a.k, &tile.k_full[k.at], head, first);
          k.advance();
        }
        if (first > range.lo) {
          mbarrier_wait(&tile.v_empty[v.at], v.parity ^ 1);
          load_tile<kDim, kKeys>(tile.v[v.at], a.v, &tile.v_full[v.at], head, first - kKeys);
          v.advance();
        }
      }
    }
    sync_warp();  // the next item's description may overwrite this one's only after it was read
    slot.advance();
  }
}

// One thread. Rows beyond the tensor are not written.
template <typename Tile>
__device__ __forceinline__ void store_items(Tile& tile, const HopperForwardArguments& a) {
  Cursor<Tile::kSlots> slot;
  unsigned number;
  for (unsigned round = 0; item_of_round(number, round, a.items); ++round) {
    mbarrier_wait(&tile.slot_done[slot.at], slot.parity);
    const ForwardItem& item = tile.items[slot.at];
#pragma unroll
    for (int d = 0; d < Tile::kDim; d += kSlabColumns) {
      tensor_store(a.out, tile.q[slot.at] + d * Tile::kRows, d, item.head, item.first);
    }
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(&tile.slot_empty[slot.at]);
    slot.advance();
  }
  bulk_wait<0>();
}

// --- products and softmax -------------------------------------------------------------------------------------------

template <int kDim, int kKeys>
struct ForwardState {
  float out[kDim / 2];
  uint32_t p[kKeys / 16][4];
  float max[2], sum[2];  // of rows lane / 4 and 8 further; max before scaling, sum of this lane's columns
};

template <typename Element, typename Tile>
__device__ __forceinline__ void start_scores(float (&s)[Tile::kKeys / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int d = 0; d < Tile::kDim; d += 16) {
    const int slab = d / kSlabColumns * kSlabRow, in_slab = d % kSlabColumns * 2;
    wgmma<Element, Tile::kKeys>(s, descriptor_advance(q, slab * Tile::kRows + in_slab),
                                descriptor_advance(k, slab * Tile::kKeys + in_slab), d > 0);
  }
  wgmma_commit();
}

template <typename Element, typename Tile>
__device__ __forceinline__ void start_values(float (&out)[Tile::kDim / 2], const uint32_t (&p)[Tile::kKeys / 16][4],
                                             uint64_t v) {
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 16; ++n) {
    wgmma<Element, Tile::kDim, Major::kMN>(out, p[n], descriptor_advance(v, n * 16 * kSlabRow), true);
  }
  wgmma_commit();
}

template <int kKeys>
__device__ __forceinline__ void mask_scores(float (&s)[kKeys / 2], const AttentionInterval* rows, int first) {
  const int column = first + lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const AttentionInterval seen = rows[half * 8 + lane_id() / 4];
    const int lo = seen.lo - column, hi = seen.hi - column;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (n * 8 + i < lo || n * 8 + i >= hi) s[n * 4 + half * 2 + i] = -INFINITY;
      }
    }
  }
}

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

template <typename Element, int kKeys>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = Element::pack(s[2 * i], s[2 * i + 1]);
}

template <typename Element, typename Tile>
__device__ __forceinline__ void store_results(uint16_t* to, const ForwardState<Tile::kDim, Tile::kKeys>& state,
                                              const float (&factor)[2], int warp_row) {
  const int lane = lane_id(), row = warp_row + lane % 16, unit = lane / 16;
#pragma unroll
  for (int n = 0; n < Tile::kDim / 16; ++n) {
    const float* const o = state.out + n * 8;
    const uint32_t words[4] = {
        Element::pack(o[0] * factor[0], o[1] * factor[0]), Element::pack(o[2] * factor[1], o[3] * factor[1]),
        Element::pack(o[4] * factor[0], o[5] * factor[0]), Element::pack(o[6] * factor[1], o[7] * factor[1])};
    uint16_t* const slab = to + n / 4 * kSlabColumns * Tile::kRows;
    store_matrix_x4(slab + row * kSlabColumns + ((n % 4 * 2 + unit) ^ row % 8) * 8, words);
  }
  fence_async_proxy();
  sync_warp();
}

// Called by a whole warp when it, and with it the products it was part of, has read what the mbarrier stands for.
__device__ __forceinline__ void release(uint64_t* barrier) {
  if (lane_id() == 0) mbarrier_arrive(barrier);
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
__device__ __forceinline__ void consume_items(Tile& tile, const HopperForwardArguments& a) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;
  const int group = warp_id() / 4 - 1, warp_row = group * 64 + warp_id() % 4 * 16, lane = lane_id();
  const ScoreScale scale = a.base.scale;
  const Turns turns(group);
  Cursor<Tile::kSlots> slot;
  Cursor<Tile::kStages> k, v;
  unsigned number;
  for (unsigned round = 0; item_of_round(number, round, a.items); ++round) {
    mbarrier_wait(&tile.slot_full[slot.at], slot.parity);
    const ForwardItem& item = tile.items[slot.at];
    const AttentionInterval range = item.range, outer = item.outer[group], inner = item.inner[group];
    // Tiles of keys: all, and those between that this warpgroup sees. Both warpgroups take part in the release of all.
    const int tiles = range.lo < range.hi ? (range.hi - range.lo + kKeys - 1) / kKeys : 0;
    const bool sees = outer.lo < outer.hi;
    const int begin = sees ? (outer.lo - range.lo) / kKeys : tiles;
    const int end = sees ? (outer.hi - range.lo + kKeys - 1) / kKeys : tiles;
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
    ForwardState<kDim, kKeys> state;
#pragma unroll
    for (float& x : state.out) x = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.max[half] = -INFINITY;
      state.sum[half] = 0.0f;
    }
    const uint64_t q = matrix_descriptor<Swizzle::k128Bytes>(tile.q[slot.at] + group * 64 * kSlabColumns, 16, kPattern);
    const auto k_tile = [&] { return matrix_descriptor<Swizzle::k128Bytes>(tile.k[k.at], 16, kPattern); };
    const auto v_tile = [&] { return matrix_descriptor<Swizzle::k128Bytes>(tile.v[v.at], kKeys * kSlabRow, kPattern); };
    float s[kKeys / 2], shrink[2];
    const auto soften = [&](int number_of_tile) {
      const int first = range.lo + number_of_tile * kKeys;
      if (scale.is_capped) {
#pragma unroll
        for (float& x : s) x = tanh_of(x * scale.inner);
      } else if (scale.is_transformed) {
#pragma unroll
        for (float& x : s) x = -x;
      }
      if (first < inner.lo || first + kKeys > inner.hi) mask_scores<kKeys>(s, item.rows + warp_row, first);
      softmax_step(s, state, shrink, scale.multiplier);
    };

    skip(begin);
    if (begin < end) {
      mbarrier_wait(&tile.k_full[k.at], k.parity);
      turns.await();
      wgmma_fence(s);
      start_scores<Element, Tile>(s, q, k_tile());
      turns.pass();
      wgmma_wait<0>(s);
      release(&tile.k_empty[k.at]);
      k.advance();
      soften(begin);
      pack_probabilities<Element, kKeys>(state.p, s);
      mbarrier_wait(&tile.v_full[v.at], v.parity);
      for (int i = begin + 1; i < end; ++i) {
        mbarrier_wait(&tile.k_full[k.at], k.parity);
        turns.await();
        wgmma_fence(s, state.out, state.p);
        start_scores<Element, Tile>(s, q, k_tile());
        start_values<Element, Tile>(state.out, state.p, v_tile());
        turns.pass();
        wgmma_wait<1>(s);
        release(&tile.k_empty[k.at]);
        k.advance();
        soften(i);
        // The next values are waited for here, since ptxas does not move the wait for the products before this loop; in
        // front of softmax it would end what softmax is to run under.
        uint64_t* const read = &tile.v_empty[v.at];
        v.advance();
        mbarrier_wait(&tile.v_full[v.at], v.parity);
        wgmma_wait<0>(state.out);
        release(read);
        if (warp_any(shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // after a few tiles maxima seldom grow
#pragma unroll
          for (int j = 0; j < kDim / 2; ++j) state.out[j] *= shrink[j / 2 % 2];
        }
        pack_probabilities<Element, kKeys>(state.p, s);
      }
      wgmma_fence(state.out, state.p);
      start_values<Element, Tile>(state.out, state.p, v_tile());
      wgmma_wait<0>(state.out);
      release(&tile.v_empty[v.at]);
      v.advance();
    }
    skip(tiles - end);

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
    store_results<Element, Tile>(tile.q[slot.at], state, factor, warp_row);
    release(&tile.slot_done[slot.at]);
    slot.advance();
  }
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
    for (int i = 0; i < Tile::kSlots; ++i) {
      mbarrier_init(&tile.slot_full[i], 1);
      mbarrier_init(&tile.slot_done[i], kConsumerWarps);
      mbarrier_init(&tile.slot_empty[i], 1);
    }
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
    registers_decrease<40>();
    if (warp_id() == 0) {
      load_items(tile, a);
    } else if (warp_id() == 1 && lane_id() == 0) {
      store_items(tile, a);
    }
  } else {
    registers_increase<232>();
    consume_items<Element>(tile, a);
  }
#endif
}

// --- launch ---------------------------------------------------------------------------------------------------------

// A box of 64 columns and `rows` tokens of one head.
inline TensorMap head_map(DType dtype, const AttentionInput& x, int64_t tokens, int64_t heads, int64_t head_dim,
                          int rows) {
  return make_tensor_map({.dtype = dtype,
                          .data = x.data,
                          .size = {head_dim, heads, tokens},
                          .stride = {2 * x.head_stride, 2 * x.token_stride},
                          .box = {kSlabColumns, 1, rows},
                          .swizzle = Swizzle::k128Bytes});
}

// Whether the kernel serves the head size, and the copy engine the tensors: it knows no strides of 0 (a head or token
// that was expanded).
inline bool has_hopper_forward(const ForwardArguments& a, const AttentionShape& shape) {
  const auto has_strides = [](const AttentionInput& x) { return x.head_stride > 0 && x.token_stride > 0; };
  return (shape.head_dim == 64 || shape.head_dim == 128 || shape.head_dim == 256) && has_strides(a.q) &&
         has_strides(a.k) && has_strides(a.v);
}

template <typename Element>
void launch_attention_forward_sm90(const ForwardArguments& a, const AttentionShape& shape, void* stream) {
  if (a.total_q == 0) return;
  const auto launch_dim = [&](auto dim) {
    using Tile = HopperForwardTile<decltype(dim)::value>;
    static_assert(sizeof(Tile) <= 227 * 1024);
    const int64_t heads = a.num_q_heads;
    const AttentionInput out{a.out, heads * Tile::kDim, Tile::kDim};
    HopperForwardArguments arguments{.q = head_map(shape.dtype, a.q, a.total_q, heads, Tile::kDim, Tile::kRows),
                                     .k = {},
                                     .v = {},
                                     .out = head_map(shape.dtype, out, a.total_q, heads, Tile::kDim, Tile::kRows),
                                     .base = a,
                                     .items = grid_of(a.total_q, Tile::kRows, heads)};
    if (a.total_k > 0) {  // or they are not used
      arguments.k = head_map(shape.dtype, a.k, a.total_k, shape.num_kv_heads, Tile::kDim, Tile::kKeys);
      arguments.v = head_map(shape.dtype, a.v, a.total_k, shape.num_kv_heads, Tile::kDim, Tile::kKeys);
    }
    const unsigned grid = std::min(arguments.items, static_cast<unsigned>(multiprocessor_count()));
    launch<attention_forward_sm90_kernel<Element, Tile::kDim>>(grid, kHopperThreads, sizeof(Tile), stream, arguments);
  };
  switch (shape.head_dim) {  // has_hopper_forward
    case 64: return launch_dim(std::integral_constant<int, 64>{});
    case 128: return launch_dim(std::integral_constant<int, 128>{});
    default: return launch_dim(std::integral_constant<int, 256>{});
  }
}

}  // namespace fastsft::cuda
