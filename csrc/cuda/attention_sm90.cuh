// What the Hopper (sm_90a) attention kernels share: items of work and who handles them, copies, products, masks.
//
// One block per multiprocessor walks items (128 packed rows of one head, queries or keys) by a schedule that is known
// beforehand. Of its three warpgroups the first copies: warp 0 writes down what an item is and loads its tiles, warp 1
// stores the results. The two others own 64 rows each. Descriptions and the rows' own tiles lie in slots, what is
// multiplied with them passes through a ring of stages.
//
// Tiles in shared memory are slabs of 64 columns (128 bytes), swizzled: what TMA writes is what wgmma reads, along
// either index.
#pragma once

#include "attention_launch.cuh"
#include "primitives_sm90.cuh"
#include "tensor_map.h"

namespace fastsft::cuda {

inline constexpr int kHopperThreads = 3 * kWarpgroup, kConsumerWarps = 8, kGroupRows = 64;
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
inline constexpr int kSlabColumns = 64, kSlabRow = 128;  // bytes
inline constexpr int kPattern = 8 * kSlabRow;

// What the warpgroups know of an item. After the last one comes an item whose head is -1.
struct HopperItem {
  int first, head;
  AttentionInterval range;               // what any of the rows sees
  AttentionInterval outer[2], inner[2];  // what any and what all of 64 rows see
  AttentionInterval rows[kPlanTile];
};

struct HopperSchedule {
  const int32_t* order;
  const AttentionInterval* rows;  // what each row sees
  int total;                      // rows
  int section;                    // heads whose items are neighbours
  unsigned items;
  bool skip_short;  // rows of short sequences see nothing, and items of nothing else are left out
};

template <int kCount>
struct HopperSlots {
  HopperItem items[kCount];
  uint64_t full[kCount], done[kCount], empty[kCount];
};

// A place in a ring of buffers, and the parity of the phases its mbarriers are in.
template <int kCount>
struct Cursor {
  int at = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++at == kCount) at = 0, parity ^= 1;
  }
};

#if FASTSFT_SM90A

// --- items ----------------------------------------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void init_slots(HopperSlots<kCount>& slots) {
  for (int i = 0; i < kCount; ++i) {
    mbarrier_init(&slots.full[i], 1);
    mbarrier_init(&slots.done[i], kConsumerWarps);
    mbarrier_init(&slots.empty[i], 1);
  }
}

__device__ __forceinline__ AttentionInterval hull(AttentionInterval a, AttentionInterval b) {
  return {min(a.lo, b.lo), max(a.hi, b.hi)};
}

// Writes an item down; the whole warp.
__device__ __forceinline__ void describe(HopperItem& item, const HopperSchedule& a, const Work& work) {
  const int lane = lane_id();
  AttentionInterval any[2] = {{INT32_MAX, 0}, {INT32_MAX, 0}}, all[2] = {{0, INT32_MAX}, {0, INT32_MAX}};
#pragma unroll
  for (int part = 0; part < kPlanTile / kWarp; ++part) {
    const int row = part * kWarp + lane, half = part / 2;
    AttentionInterval seen{0, 0};
    if (work.first + row < a.total) seen = a.rows[work.first + row];
    if (seen.hi < 0) seen = a.skip_short ? AttentionInterval{0, 0} : AttentionInterval{seen.lo, ~seen.hi};
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
  if (lane == 0) item.first = work.first, item.head = work.head, item.range = hull(any[0], any[1]);
  sync_warp();
}

// Warp 0: describes the block's items one after the other and calls load(item, slot), which loads the tiles of the slot
// or arrives at its `full`. The grid goes through all items, costliest first, and turns back at its ends, so that no
// block has the costlier item in every round.
template <int kSlots, typename Load>
__device__ __forceinline__ void produce_items(HopperSlots<kSlots>& slots, const HopperSchedule& a, Load&& load) {
  Cursor<kSlots> slot;
  for (unsigned round = 0;; ++round) {
    const unsigned number = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    const bool is_over = number >= a.items;
    Work work{};
    if (!is_over) work = work_at<kPlanTile>(static_cast<int>(number), a.order, a.total, a.section);
    if (a.skip_short && work.is_short) continue;
    HopperItem& item = slots.items[slot.at];
    mbarrier_wait(&slots.empty[slot.at], slot.parity ^ 1);
    if (is_over) {
      if (lane_id() == 0) {
        item.head = -1;
        mbarrier_arrive(&slots.full[slot.at]);
      }
      return;
    }
    describe(item, a, work);
    load(item, slot.at);
    sync_warp();  // the next item's description may overwrite this one's only after it was read
    slot.advance();
  }
}

// Calls use(item, slot) for each item, once its slot is full.
template <int kSlots, typename Use>
__device__ __forceinline__ void for_each_item(HopperSlots<kSlots>& slots, Use&& use) {
  for (Cursor<kSlots> slot;; slot.advance()) {
    mbarrier_wait(&slots.full[slot.at], slot.parity);
    const HopperItem& item = slots.items[slot.at];
    if (item.head < 0) return;
    use(item, slot.at);
  }
}

// One thread of warp 1: store(item, slot) starts the bulk stores of the results, which the slot holds when it is done.
template <int kSlots, typename Store>
__device__ __forceinline__ void store_items(HopperSlots<kSlots>& slots, Store&& store) {
  Cursor<kSlots> done;
  for_each_item(slots, [&](const HopperItem& item, int slot) {
    mbarrier_wait(&slots.done[slot], done.parity);
    done.advance();
    store(item, slot);
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(&slots.empty[slot]);
  });
  bulk_wait<0>();
}

// The tiles of kColumns columns of an item, and those of them, begin .. end - 1, that a warpgroup's rows see.
template <int kColumns>
struct HopperWalk {
  AttentionInterval range, inner;
  int tiles, begin, end;

  __device__ __forceinline__ HopperWalk(const HopperItem& item, int group)
      : range(item.range), inner(item.inner[group]) {
    const AttentionInterval outer = item.outer[group];
    tiles = range.lo < range.hi ? (range.hi - range.lo + kColumns - 1) / kColumns : 0;
    begin = outer.lo < outer.hi ? (outer.lo - range.lo) / kColumns : tiles;
    end = outer.lo < outer.hi ? (outer.hi - range.lo + kColumns - 1) / kColumns : tiles;
  }
  __device__ __forceinline__ int first(int tile) const { return range.lo + tile * kColumns; }
  __device__ __forceinline__ bool is_whole(int tile) const {
    return inner.lo <= first(tile) && first(tile) + kColumns <= inner.hi;
  }
};

// Called by a whole warp when it, and with it the products it was part of, is done with what the mbarrier stands for.
__device__ __forceinline__ void release(uint64_t* barrier) {
  sync_warp();
  if (lane_id() == 0) mbarrier_arrive(barrier);
}

// --- copies ---------------------------------------------------------------------------------------------------------

// Rows first .. first + kRows - 1 of a head; those beyond the tensor are 0. The bytes must be expected at `full`.
template <int kDim, int kRows>
__device__ __forceinline__ void load_tile(uint16_t* tile, const TensorMap& map, uint64_t* full, int head, int first) {
#pragma unroll
  for (int d = 0; d < kDim; d += kSlabColumns) tensor_load(tile + d * kRows, map, full, d, head, first);
}

// kPlanTile rows; those beyond the tensor are not written.
template <int kDim>
__device__ __forceinline__ void store_tile(const TensorMap& map, const uint16_t* tile, int head, int first) {
#pragma unroll
  for (int d = 0; d < kDim; d += kSlabColumns) tensor_store(map, tile + d * kPlanTile, d, head, first);
}

// A warp's 16 rows of an accumulator, times a factor for the rows lane / 4 and one for those 8 further, to a tile.
template <typename Element, int kDim>
__device__ __forceinline__ void put_rows(uint16_t* tile, const float (&values)[kDim / 2], const float (&factor)[2],
                                         int warp_row) {
  const int lane = lane_id(), row = warp_row + lane % 16, unit = lane / 16;
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) {
    const float* const x = values + n * 8;
    const uint32_t words[4] = {
        Element::pack(x[0] * factor[0], x[1] * factor[0]), Element::pack(x[2] * factor[1], x[3] * factor[1]),
        Element::pack(x[4] * factor[0], x[5] * factor[0]), Element::pack(x[6] * factor[1], x[7] * factor[1])};
    uint16_t* const slab = tile + n / 4 * kSlabColumns * kPlanTile;
    store_matrix_x4(slab + row * kSlabColumns + ((n % 4 * 2 + unit) ^ row % 8) * 8, words);
  }
  fence_async_proxy();
  sync_warp();
}

// --- products -------------------------------------------------------------------------------------------------------

// scores [64, kColumns] = rows columns^T: a warpgroup's rows of a tile of kPlanTile rows, a tile of kColumns rows.
template <typename Element, int kDim, int kColumns>
__device__ __forceinline__ void start_scores(float (&scores)[kColumns / 2], const uint16_t* rows,
                                             const uint16_t* columns) {
  const uint64_t a = matrix_descriptor<Swizzle::k128Bytes>(rows, 16, kPattern);
  const uint64_t b = matrix_descriptor<Swizzle::k128Bytes>(columns, 16, kPattern);
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    const int slab = d / kSlabColumns * kSlabRow, in_slab = d % kSlabColumns * 2;
    wgmma<Element, kColumns>(scores, descriptor_advance(a, slab * kPlanTile + in_slab),
                             descriptor_advance(b, slab * kColumns + in_slab), d > 0);
  }
  wgmma_commit();
}

// sum [64, kDim] += weights columns, the weights [64, 16 kParts] in registers.
template <typename Element, int kDim, int kParts>
__device__ __forceinline__ void start_sum(float (&sum)[kDim / 2], const uint32_t (&weights)[kParts][4],
                                          const uint16_t* columns) {
  const uint64_t b = matrix_descriptor<Swizzle::k128Bytes>(columns, kParts * 16 * kSlabRow, kPattern);
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
    wgmma<Element, kDim, Major::kMN>(sum, weights[n], descriptor_advance(b, n * 16 * kSlabRow), true);
  }
  wgmma_commit();
}

template <typename Element, int kParts>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kParts][4], const float (&x)[kParts * 8]) {
#pragma unroll
  for (int i = 0; i < kParts * 4; ++i) weights[i / 4][i % 4] = Element::pack(x[2 * i], x[2 * i + 1]);
}

// --- scores ---------------------------------------------------------------------------------------------------------

// Scores of columns first .. that a row does not see become -inf. `rows`: of this warp.
template <int kColumns>
__device__ __forceinline__ void mask_scores(float (&s)[kColumns / 2], const AttentionInterval* rows, int first) {
  const int column = first + lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const AttentionInterval seen = rows[half * 8 + lane_id() / 4];
    const int lo = seen.lo - column, hi = seen.hi - column;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (n * 8 + i < lo || n * 8 + i >= hi) s[n * 4 + half * 2 + i] = -INFINITY;
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], const ScoreScale& scale) {
#pragma unroll
  for (float& x : s) x = tanh_of(x * scale.inner);
}

template <int kCount>
__device__ __forceinline__ void negate_scores(float (&s)[kCount]) {
#pragma unroll
  for (float& x : s) x = -x;
}

#endif

// --- launch ---------------------------------------------------------------------------------------------------------

// A box of 64 columns and `rows` tokens of one head.
inline TensorMap head_map(const AttentionShape& shape, const AttentionInput& x, int64_t tokens, int64_t heads,
                          int rows) {
  return make_tensor_map({.dtype = shape.dtype,
                          .data = x.data,
                          .size = {shape.head_dim, heads, tokens},
                          .stride = {2 * x.head_stride, 2 * x.token_stride},
                          .box = {kSlabColumns, 1, rows},
                          .swizzle = Swizzle::k128Bytes});
}

// The copy engine knows no strides of 0 (a head or token that was expanded).
inline bool has_tensor_map(const AttentionInput& x) { return x.head_stride > 0 && x.token_stride > 0; }

inline HopperSchedule hopper_schedule(const int32_t* order, const AttentionInterval* rows, int64_t total, int64_t heads,
                                      int section, bool skip_short) {
  return {order, rows, static_cast<int>(total), section, grid_of(total, kPlanTile, heads), skip_short};
}

inline unsigned hopper_grid(const HopperSchedule& schedule) {
  return std::min(schedule.items, static_cast<unsigned>(multiprocessor_count()));
}

}  // namespace fastsft::cuda
