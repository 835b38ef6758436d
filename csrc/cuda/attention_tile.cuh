// Tiles, fragments and masks shared by the mma.sync attention kernels (sm_80 and up).
//
// Shared memory: a row of a tile holds kDim 16-bit words and 16 bytes of padding. Its length in 16-byte units is then
// odd for every head size, so that eight consecutive rows begin in eight different groups of banks: ldmatrix and the
// 4-byte stores of accumulators are free of conflicts, as with an XOR swizzle, and an address is a lane's base plus a
// compile-time constant.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"): lane l holds, of a 16 x 8 accumulator, rows
// l / 4 and l / 4 + 8, columns 2 (l % 4) and the next one. Packed in pairs, two accumulators side by side are the A
// operand of the next product: probabilities never leave the registers.
#pragma once

#include "fastsft/attention.h"
#include "primitives.cuh"

namespace fastsft::cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline constexpr int kAttentionThreads = 128, kAttentionWarps = 4;

template <int kDim>
inline constexpr int kPitch = kDim + 8;  // words from one row of a tile to the next

// --- rows of q, k, v, ... -------------------------------------------------------------------------------------------

// One head of a [tokens, heads, D] tensor.
struct HeadRows {
  const uint16_t* data;
  int64_t stride;  // words from one token to the next

  __device__ HeadRows(const AttentionInput& x, int head)
      : data(static_cast<const uint16_t*>(x.data) + head * x.head_stride), stride(x.token_stride) {}
};

// Begins the copy of rows first .. first + kRows - 1; those at or beyond `end` become 0. A thread stays in its column:
// with 12 or 10 columns of 16 bytes (head sizes 96 and 80) the last 8 threads have none.
template <int kDim, int kRows>
__device__ __forceinline__ void copy_rows(uint16_t* tile, const HeadRows& from, int first, int end) {
  constexpr unsigned kChunks = kDim / 8;
  constexpr int kStep = kAttentionThreads / kChunks;
  const int row = static_cast<int>(threadIdx.x / kChunks), column = static_cast<int>(threadIdx.x % kChunks * 8);
  if (kAttentionThreads % kChunks != 0 && row >= kStep) return;
  const uint16_t* source = from.data + (first + row) * from.stride + column;
  uint16_t* const target = tile + row * kPitch<kDim> + column;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    if (kRows % kStep == 0 || row + r < kRows) {
      copy_async(target + r * kPitch<kDim>, source, first + row + r < end);
    }
    source += kStep * from.stride;
  }
}

// --- which keys a row sees ------------------------------------------------------------------------------------------

// The mask of kRows stationary rows (queries, or keys in the transposed products): what each row sees, and per block of
// 16 rows what any (outer) and what all of them see (inner).
template <int kRows>
struct TileMask {
  AttentionInterval rows[kRows];
  AttentionInterval outer[kRows / 16], inner[kRows / 16];
  AttentionInterval range;  // what any row of the tile sees; lo >= hi: nothing

  // Rows beyond `total`, and with `skip` those of short sequences, see nothing. Ends with a barrier.
  __device__ void load(const AttentionInterval* intervals, int first, int total, bool skip) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int row = thread; row < kRows; row += kAttentionThreads) {
      AttentionInterval seen{0, 0};
      if (first + row < total) {
        seen = intervals[first + row];
        if (seen.hi < 0) seen = skip ? AttentionInterval{0, 0} : AttentionInterval{seen.lo, ~seen.hi};
      }
      rows[row] = seen;
    }
    __syncthreads();
    if (thread < kRows / 16) {
      AttentionInterval any{INT32_MAX, 0}, all{0, INT32_MAX};
      for (int row = thread * 16; row < thread * 16 + 16; ++row) {
        const AttentionInterval seen = rows[row];
        if (seen.lo < seen.hi) any = {min(any.lo, seen.lo), max(any.hi, seen.hi)};
        all = {max(all.lo, seen.lo), min(all.hi, seen.hi)};
      }
      outer[thread] = any;
      inner[thread] = all;
    }
    __syncthreads();
    if (thread == 0) {
      range = outer[0];
      for (int block = 1; block < kRows / 16; ++block) {
        range = {min(range.lo, outer[block].lo), max(range.hi, outer[block].hi)};
      }
    }
    __syncthreads();
  }
};

// How a warp meets kColumns columns from `first`: bit kColumns / 16 * block + c of `live` is set when some row of its
// row block `block` may see some of the 16 columns from first + 16 c; `whole` when every row sees every column.
struct Meeting {
  uint32_t live;
  bool whole;
};

template <int kBlocks, int kColumns, int kRows>
__device__ __forceinline__ Meeting meet(const TileMask<kRows>& mask, int warp_block, int first) {
  Meeting m{0, true};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const AttentionInterval outer = mask.outer[warp_block + block], inner = mask.inner[warp_block + block];
    m.whole = m.whole && inner.lo <= first && first + kColumns <= inner.hi;
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      const bool is_live = outer.lo < first + 16 * c + 16 && first + 16 * c < outer.hi;
      m.live |= static_cast<uint32_t>(is_live) << (kColumns / 16 * block + c);
    }
  }
  return m;
}

// --- products -------------------------------------------------------------------------------------------------------

// Where lane l reads its 8 words in a 16 x 16 corner of a tile. Tall: an A operand, and with .trans a B operand whose
// rows are the inner dimension. Wide: a B operand whose rows are the columns of the result, and with .trans an A
// operand stored the other way round.
template <int kDim>
__device__ __forceinline__ int tall_offset(int lane) {
  return lane % 16 * kPitch<kDim> + lane / 16 * 8;
}
template <int kDim>
__device__ __forceinline__ int wide_offset(int lane) {
  return (lane % 8 + lane / 16 * 8) * kPitch<kDim> + lane / 8 % 2 * 8;
}

template <int kBlocks, int kColumns>
struct Accumulator {
  float at[kBlocks][kColumns / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& block : at) {
#pragma unroll
      for (auto& part : block) part[0] = part[1] = part[2] = part[3] = 0.0f;
    }
  }
};

// c = a b^T over kDim: `a` points at this warp's rows, `b` at kColumns rows. With kMasked, corners that `live` (see
// Meeting) has no bit for are left 0.
template <typename Element, int kDim, bool kMasked, int kBlocks, int kColumns>
__device__ __forceinline__ void multiply_transposed(Accumulator<kBlocks, kColumns>& c, const uint16_t* a,
                                                    const uint16_t* b, uint32_t live) {
  const int lane = lane_id();
  a += tall_offset<kDim>(lane);
  b += wide_offset<kDim>(lane);
  c.clear();
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    uint32_t left[kBlocks][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) load_matrix_x4(left[block], a + block * 16 * kPitch<kDim> + d);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t right[4];
      if (!kMasked || (live >> n & 1u) || (kBlocks == 2 && (live >> (kColumns / 16 + n) & 1u))) {
        load_matrix_x4(right, b + n * 16 * kPitch<kDim> + d);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          if (kMasked && !(live >> (kColumns / 16 * block + n) & 1u)) continue;
          mma_m16n8k16<Element>(c.at[block][2 * n], left[block], right[0], right[1]);
          mma_m16n8k16<Element>(c.at[block][2 * n + 1], left[block], right[2], right[3]);
        }
      }
    }
  }
}

// The A operand for columns 16 n .. 16 n + 15 of p.
template <typename Element, int kColumns>
__device__ __forceinline__ void pack_left(uint32_t (&left)[4], const float (&p)[kColumns][4], int n) {
  left[0] = Element::pack(p[2 * n][0], p[2 * n][1]);
  left[1] = Element::pack(p[2 * n][2], p[2 * n][3]);
  left[2] = Element::pack(p[2 * n + 1][0], p[2 * n + 1][1]);
  left[3] = Element::pack(p[2 * n + 1][2], p[2 * n + 1][3]);
}

// c += p x: `x` points at kInner rows of kDim words, of which kColumns columns are taken.
template <typename Element, int kDim, bool kMasked, int kBlocks, int kInner, int kColumns>
__device__ __forceinline__ void multiply(Accumulator<kBlocks, kColumns>& c, const Accumulator<kBlocks, kInner>& p,
                                         const uint16_t* x, uint32_t live) {
  x += tall_offset<kDim>(lane_id());
#pragma unroll
  for (int n = 0; n < kInner / 16; ++n) {
    if (kMasked && !(live >> n & 1u) && !(kBlocks == 2 && (live >> (kInner / 16 + n) & 1u))) continue;
    uint32_t left[kBlocks][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) pack_left<Element>(left[block], p.at[block], n);
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      uint32_t right[4];
      load_matrix_x4_transposed(right, x + n * 16 * kPitch<kDim> + d * 16);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (kMasked && !(live >> (kInner / 16 * block + n) & 1u)) continue;
        mma_m16n8k16<Element>(c.at[block][2 * d], left[block], right[0], right[1]);
        mma_m16n8k16<Element>(c.at[block][2 * d + 1], left[block], right[2], right[3]);
      }
    }
  }
}

// --- scores ---------------------------------------------------------------------------------------------------------

// tanh to float32's precision relative to 1 (tanh.approx has 11 bits).
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - 2.0f * reciprocal_approx(exp2_approx(2.0f * kLog2e * x) + 1.0f);
}

// A probability is exp2(f(score) * multiplier - log2 of the sum), multiplier > 0. f is the identity, a change of sign
// for a negative scale, or tanh(inner * score).
struct ScoreScale {
  float multiplier, inner, scale;
  bool is_capped, is_transformed;

  explicit ScoreScale(const AttentionShape& shape)
      : inner(shape.softcap > 0 ? shape.scale / shape.softcap : 0.0f),
        scale(shape.scale),
        is_capped(shape.softcap > 0),
        is_transformed(is_capped || shape.scale < 0) {
    const float size = is_capped ? shape.softcap : shape.scale < 0 ? -shape.scale : shape.scale;
    multiplier = size * kLog2e > 1e-37f ? size * kLog2e : 1e-37f;  // with 0, a masked score of -inf would become NaN
  }

  template <int kBlocks, int kColumns>
  __device__ __forceinline__ void transform(Accumulator<kBlocks, kColumns>& s) const {
#pragma unroll
    for (auto& block : s.at) {
#pragma unroll
      for (auto& part : block) {
#pragma unroll
        for (float& x : part) x = is_capped ? tanh_of(x * inner) : -x;
      }
    }
  }
};

// --- which tile and head a block works on ---------------------------------------------------------------------------

struct Work {
  int first, head;  // first row of the tile
  bool is_short;    // the plan's tile has rows of short sequences only
};

// Number `number` of a schedule that holds, for each section of neighbouring heads (whose keys and values the L2 can
// hold together), every tile of kRows rows in the plan's order, for each tile the section's heads.
template <int kRows>
__device__ __forceinline__ Work work_at(int number, const int32_t* order, int64_t total, int section) {
  constexpr int kParts = kPlanTile / kRows;
  const int tiles = static_cast<int>((total + kPlanTile - 1) / kPlanTile) * kParts;
  const int per_section = tiles * section;
  const int in_section = number % per_section, part = in_section / section;
  const int entry = order[part / kParts], tile = entry < 0 ? ~entry : entry;
  return {tile * kPlanTile + part % kParts * kRows, number / per_section * section + in_section % section, entry < 0};
}

// The block's work. False if there is nothing to do. `work` is in shared memory, to be read where it is needed:
// registers are scarce. Ends with a barrier.
template <int kRows>
__device__ __forceinline__ bool find_work(Work& work, const int32_t* order, int64_t total, int section,
                                          bool skip_short) {
  const Work found = work_at<kRows>(static_cast<int>(blockIdx.x), order, total, section);
  if (found.first >= total || (skip_short && found.is_short)) return false;
  if (threadIdx.x == 0) work = found;
  __syncthreads();
  return true;
}

// Stores 16 rows of `values` per block, each times its factor, as rows first .. of [tokens, heads, kDim], by way of
// `tile`, shared memory that only this warp uses: in it every lane writes pairs, to global memory 16 bytes. Rows at or
// beyond `end` and rows that `keep(row of the warp)` refuses are not written.
template <typename Element, int kDim, int kBlocks, int kColumns, typename Factor, typename Keep>
__device__ __forceinline__ void store_rows(uint16_t* tile, const Accumulator<kBlocks, kColumns>& values, void* to,
                                           int64_t heads, int head, int column, int first, int end, Factor&& factor,
                                           Keep&& keep) {
  const int lane = lane_id();
  sync_warp();  // every lane has read what it needed from `tile`
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block * 16 + half * 8 + lane / 4;
      const float f = factor(block, half);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float* pair = values.at[block][n] + 2 * half;
        store<uint32_t>(tile + row * kPitch<kDim> + n * 8 + lane % 4 * 2, Element::pack(pair[0] * f, pair[1] * f));
      }
    }
  }
  sync_warp();
  constexpr int kChunks = kColumns / 8;
  for (int chunk = lane; chunk < kBlocks * 16 * kChunks; chunk += kWarp) {
    const int row = chunk / kChunks, from = chunk % kChunks * 8;
    if (first + row >= end || !keep(row)) continue;
    auto* out = static_cast<uint16_t*>(to) + ((first + row) * heads + head) * kDim + column + from;
    store<uint4>(out, load<uint4>(tile + row * kPitch<kDim> + from));
  }
}

}  // namespace fastsft::cuda
