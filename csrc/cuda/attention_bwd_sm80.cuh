// Backward attention on mma.sync: three kernels without atomics, so that the gradients are the same bits on every run.
//
//   delta_i = sum_d dout_id out_id - dlse_i             p_ij = exp(s_ij - lse_i)    dp_ij = dout_i . v_j
//   ds_ij = p_ij (dp_ij - delta_i) s'_ij                dv_j = sum_i p_ij dout_i
//   dk_j = scale sum_i ds_ij q_i                        dq_i = scale sum_j ds_ij k_j
//
// The dk, dv kernel keeps a tile of keys and walks the queries that see any of them, of every query head that reads the
// key head: dk and dv stay in registers, and no float32 copy of them exists. It works on the transposed scores, which
// are then the left operands of dv and dk as they lie in the registers. The dq kernel keeps a tile of queries and walks
// their keys. Both recompute the scores: seven products of n D multiply-adds per token, query head and n visible keys
// where a single kernel with atomics needs five, but none of its 4 D bytes of additions to float32 per tile.
// Memory: q, k, v, dout twice, out once, per head 8 D bytes more per pass over the L2 for every 64 keys or 128 queries.
#pragma once

#include <algorithm>

#include "attention_launch.cuh"

namespace fastsft::cuda {

// --- delta: 4 D bytes read per token and head, bound by memory ------------------------------------------------------

// Lanes that share a row, 16 bytes each.
template <int kDim>
inline constexpr int kRowLanes = kDim <= 64    ? 8
                                 : kDim <= 128 ? 16
                                               : 32;

// The sum over a row of x y, in all of its kRowLanes lanes; every lane of the warp takes part.
template <typename Element, int kDim>
__device__ __forceinline__ float row_dot(const uint16_t* x, const uint16_t* y, bool is_valid) {
  const int column = lane_id() % kRowLanes<kDim> * 8;
  float sum = 0.0f;
  if (is_valid && column < kDim) {
    const uint4 a = load<uint4>(x + column), b = load<uint4>(y + column);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(Element::low(left[i]), Element::low(right[i]), sum);
      sum = fmaf(Element::high(left[i]), Element::high(right[i]), sum);
    }
  }
#pragma unroll
  for (int mask = kRowLanes<kDim> / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kAttentionThreads) attention_delta_kernel(const BackwardArguments a) {
  constexpr int kPerBlock = kAttentionThreads / kRowLanes<kDim>;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kPerBlock + threadIdx.x / kRowLanes<kDim>;
  const int64_t token = pair / a.num_q_heads;
  const int head = static_cast<int>(pair % a.num_q_heads);
  const bool is_valid = token < a.total_q && !(a.skip_short && a.plan.rows[token].hi < 0);
  const HeadRows dout(a.dout, head), out(a.out, head);
  const float sum = row_dot<Element, kDim>(dout.data + token * dout.stride, out.data + token * out.stride, is_valid);
  if (token < a.total_q && lane_id() % kRowLanes<kDim> == 0) {
    const int64_t at = static_cast<int64_t>(head) * a.total_q + token;
    // 0 for short sequences: on sm_90a their neighbours multiply it with probabilities of 0.
    a.delta[at] = sum - (is_valid && a.dlse != nullptr ? a.dlse[at] : 0.0f);
  }
}

// --- probabilities and score gradients ------------------------------------------------------------------------------

// Applies f of ScoreScale to the scores s, and its slope f' to dp: dp becomes delta + f' (dp - delta).
// delta(block, half, n, i) is that of the query of s.at[block][n][2 * half + i].
template <int kBlocks, int kColumns, typename Delta>
__device__ __forceinline__ void transform_scores(Accumulator<kBlocks, kColumns>& s, Accumulator<kBlocks, kColumns>& dp,
                                                 const ScoreScale& scale, Delta&& delta) {
  scale.transform(s);
  if (!scale.is_capped) return;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float t = s.at[block][n][i], base = delta(block, i / 2, n, i % 2);
        dp.at[block][n][i] = fmaf(1.0f - t * t, dp.at[block][n][i] - base, base);
      }
    }
  }
}

// Turns scores into probabilities and dp into ds. first: the first column's number, for the mask; lse in units of ln.
template <bool kMasked, int kBlocks, int kColumns, int kRows, typename Lse, typename Delta>
__device__ __forceinline__ void probabilities(Accumulator<kBlocks, kColumns>& s, Accumulator<kBlocks, kColumns>& dp,
                                              const ScoreScale& scale, const TileMask<kRows>& mask, int warp_row,
                                              int first, Lse&& lse, Delta&& delta) {
  const int lane = lane_id();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int lo = 0, hi = 0;
      if constexpr (kMasked) {
        const AttentionInterval seen = mask.rows[warp_row + block * 16 + half * 8 + lane / 4];
        lo = seen.lo - first - lane % 4 * 2, hi = seen.hi - first - lane % 4 * 2;
      }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& p = s.at[block][n][2 * half + i];
          float& ds = dp.at[block][n][2 * half + i];
          p = exp2_approx(fmaf(p, scale.multiplier, -kLog2e * lse(block, half, n, i)));
          ds = p * (ds - delta(block, half, n, i));
          if (kMasked && (n * 8 + i < lo || n * 8 + i >= hi)) p = ds = 0.0f;
        }
      }
    }
  }
}

// --- dk and dv ------------------------------------------------------------------------------------------------------

template <int kDim_>
struct KeyTile {
  static constexpr int kDim = kDim_;
  static constexpr int kSplit = kDim <= 128 ? 1 : 2;  // warps that share 16 keys, each with its columns of dk and dv
  static constexpr int kBlocks = kDim <= 64 ? 2 : 1;  // of 16 keys, per warp
  static constexpr int kRows = kAttentionWarps / kSplit * 16 * kBlocks;
  static constexpr int kQueries = kDim <= 128 ? 64 : 32;
  static constexpr int kStep = kDim <= 64 ? 32 : kQueries;  // queries whose scores are in registers
  static constexpr int kColumns = kDim / kSplit;

  struct alignas(16) Stage {
    uint16_t q[kQueries * kPitch<kDim>];
    uint16_t dout[kQueries * kPitch<kDim>];
    float lse[kQueries], delta[kQueries];
  };
  uint16_t k[kRows * kPitch<kDim>];
  uint16_t v[kRows * kPitch<kDim>];
  TileMask<kRows> mask;
  Work work;
  Stage stages[2];  // the second only where the launch says so
};

// Begins the copy of `count` floats, 0 at and beyond `end`.
__device__ __forceinline__ void copy_floats(float* to, const float* from, int count, int first, int end) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) copy_async<4>(to + i, from + min(first + i, end - 1), first + i < end);
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_dkv_kernel(const BackwardArguments a, const int num_stages) {
  using Tile = KeyTile<kDim>;
  constexpr int kBlocks = Tile::kBlocks, kRows = Tile::kRows, kQueries = Tile::kQueries, kStep = Tile::kStep;
  Tile& tile = *shared_memory<Tile>();
  const Work& work = tile.work;
  if (!find_work<kRows>(tile.work, a.plan.dkv_order, a.total_k, a.section, a.skip_short)) return;
  tile.mask.load(a.plan.columns, work.first, a.total_k, a.skip_short);
  const AttentionInterval& range = tile.mask.range;
  const int tiles = range.lo < range.hi ? (range.hi - range.lo + kQueries - 1) / kQueries : 0, steps = tiles * a.group;

  const auto prefetch = [&](int step) {
    if (step < steps) {
      typename Tile::Stage& stage = tile.stages[step % num_stages];
      const int head = work.head * a.group + step / tiles, first = range.lo + step % tiles * kQueries;
      const int64_t row = static_cast<int64_t>(head) * a.total_q;
      copy_rows<kDim, kQueries>(stage.q, HeadRows(a.q, head), first, a.total_q);
      copy_rows<kDim, kQueries>(stage.dout, HeadRows(a.dout, head), first, a.total_q);
      copy_floats(stage.lse, a.lse + row, kQueries, first, a.total_q);
      copy_floats(stage.delta, a.delta + row, kQueries, first, a.total_q);
    }
    copy_async_commit();
  };
  if (steps > 0) {
    copy_rows<kDim, kRows>(tile.k, HeadRows(a.k, work.head), work.first, a.total_k);
    copy_rows<kDim, kRows>(tile.v, HeadRows(a.v, work.head), work.first, a.total_k);
  }
  prefetch(0);

  const int warp_block = warp_id() / Tile::kSplit * kBlocks, warp_row = warp_block * 16, lane = lane_id();
  const int column = warp_id() % Tile::kSplit * Tile::kColumns;
  uint16_t* const own_k = tile.k + warp_row * kPitch<kDim>;
  uint16_t* const own_v = tile.v + warp_row * kPitch<kDim>;
  Accumulator<kBlocks, Tile::kColumns> dk, dv;
  dk.clear();
  dv.clear();
  for (int step = 0; step < steps; ++step) {
    if (num_stages == 2) {
      prefetch(step + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const typename Tile::Stage& stage = tile.stages[step % num_stages];
    const int first = range.lo + step % tiles * kQueries;
#pragma unroll 1
    for (int sub = 0; sub < kQueries; sub += kStep) {
      const Meeting met = meet<kBlocks, kStep>(tile.mask, warp_block, first + sub);
      if (met.live == 0) continue;
      const uint16_t *const q = stage.q + sub * kPitch<kDim>, *const dout = stage.dout + sub * kPitch<kDim>;
      const auto lse = [&](int, int, int n, int i) { return stage.lse[sub + n * 8 + lane % 4 * 2 + i]; };
      const auto delta = [&](int, int, int n, int i) { return stage.delta[sub + n * 8 + lane % 4 * 2 + i]; };
      Accumulator<kBlocks, kStep> p, ds;
      if (met.whole) {
        multiply_transposed<Element, kDim, false>(p, own_k, q, met.live);
        multiply_transposed<Element, kDim, false>(ds, own_v, dout, met.live);
      } else {
        multiply_transposed<Element, kDim, true>(p, own_k, q, met.live);
        multiply_transposed<Element, kDim, true>(ds, own_v, dout, met.live);
      }
      if (a.scale.is_transformed) transform_scores(p, ds, a.scale, delta);
      if (met.whole) {
        probabilities<false>(p, ds, a.scale, tile.mask, warp_row, first + sub, lse, delta);
        multiply<Element, kDim, false>(dv, p, dout + column, met.live);
        multiply<Element, kDim, false>(dk, ds, q + column, met.live);
      } else {
        probabilities<true>(p, ds, a.scale, tile.mask, warp_row, first + sub, lse, delta);
        multiply<Element, kDim, true>(dv, p, dout + column, met.live);
        multiply<Element, kDim, true>(dk, ds, q + column, met.live);
      }
    }
    __syncthreads();  // every warp is done with the stage, after the last step with k and v
    if (num_stages == 1) prefetch(step + 1);
  }
  copy_async_wait<0>();

  const auto keep = [&](int row) { return !(a.skip_short && a.plan.columns[work.first + warp_row + row].hi < 0); };
  store_rows<Element, kDim>(
      own_k + column, dk, a.dk, a.num_kv_heads, work.head, column, work.first + warp_row, a.total_k,
      [&](int, int) { return a.scale.scale; }, keep);
  store_rows<Element, kDim>(
      own_v + column, dv, a.dv, a.num_kv_heads, work.head, column, work.first + warp_row, a.total_k,
      [](int, int) { return 1.0f; }, keep);
}

// --- dq -------------------------------------------------------------------------------------------------------------

template <int kDim_>
struct QueryTile {
  static constexpr int kDim = kDim_;
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;
  static constexpr int kRows = kAttentionWarps * 16 * kBlocks;
  static constexpr int kKeys = kDim <= 96 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kStep = kDim <= 128 ? 32 : 16;

  struct alignas(16) Stage {
    uint16_t k[kKeys * kPitch<kDim>];
    uint16_t v[kKeys * kPitch<kDim>];
  };
  uint16_t q[kRows * kPitch<kDim>];
  uint16_t dout[kRows * kPitch<kDim>];
  float lse[kRows], delta[kRows];
  TileMask<kRows> mask;
  Work work;
  Stage stages[2];
};

template <typename Element, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_dq_kernel(const BackwardArguments a, const int num_stages) {
  using Tile = QueryTile<kDim>;
  constexpr int kBlocks = Tile::kBlocks, kRows = Tile::kRows, kKeys = Tile::kKeys, kStep = Tile::kStep;
  Tile& tile = *shared_memory<Tile>();
  const Work& work = tile.work;
  if (!find_work<kRows>(tile.work, a.plan.dq_order, a.total_q, a.section * a.group, a.skip_short)) return;
  tile.mask.load(a.plan.rows, work.first, a.total_q, a.skip_short);
  const AttentionInterval range = tile.mask.range;
  const int steps = range.lo < range.hi ? (range.hi - range.lo + kKeys - 1) / kKeys : 0;

  const auto prefetch = [&](int step) {
    if (step < steps) {
      typename Tile::Stage& stage = tile.stages[step % num_stages];
      const int head = work.head / a.group, first = range.lo + step * kKeys;
      copy_rows<kDim, kKeys>(stage.k, HeadRows(a.k, head), first, a.total_k);
      copy_rows<kDim, kKeys>(stage.v, HeadRows(a.v, head), first, a.total_k);
    }
    copy_async_commit();
  };
  if (steps > 0) {
    const int64_t row = static_cast<int64_t>(work.head) * a.total_q;
    copy_rows<kDim, kRows>(tile.q, HeadRows(a.q, work.head), work.first, a.total_q);
    copy_rows<kDim, kRows>(tile.dout, HeadRows(a.dout, work.head), work.first, a.total_q);
    copy_floats(tile.lse, a.lse + row, kRows, work.first, a.total_q);
    copy_floats(tile.delta, a.delta + row, kRows, work.first, a.total_q);
  }
  prefetch(0);

  const int warp_block = warp_id() * kBlocks, warp_row = warp_block * 16, lane = lane_id();
  uint16_t* const own_q = tile.q + warp_row * kPitch<kDim>;
  const uint16_t* const own_dout = tile.dout + warp_row * kPitch<kDim>;
  const auto lse = [&](int block, int half, int, int) { return tile.lse[warp_row + block * 16 + half * 8 + lane / 4]; };
  const auto delta = [&](int block, int half, int, int) {
    return tile.delta[warp_row + block * 16 + half * 8 + lane / 4];
  };
  Accumulator<kBlocks, kDim> dq;
  dq.clear();
  for (int step = 0; step < steps; ++step) {
    if (num_stages == 2) {
      prefetch(step + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const typename Tile::Stage& stage = tile.stages[step % num_stages];
#pragma unroll 1
    for (int sub = 0; sub < kKeys; sub += kStep) {
      const int first = range.lo + step * kKeys + sub;
      const Meeting met = meet<kBlocks, kStep>(tile.mask, warp_block, first);
      if (met.live == 0) continue;
      const uint16_t *const k = stage.k + sub * kPitch<kDim>, *const v = stage.v + sub * kPitch<kDim>;
      Accumulator<kBlocks, kStep> s, ds;
      if (met.whole) {
        multiply_transposed<Element, kDim, false>(s, own_q, k, met.live);
        multiply_transposed<Element, kDim, false>(ds, own_dout, v, met.live);
      } else {
        multiply_transposed<Element, kDim, true>(s, own_q, k, met.live);
        multiply_transposed<Element, kDim, true>(ds, own_dout, v, met.live);
      }
      if (a.scale.is_transformed) transform_scores(s, ds, a.scale, delta);
      if (met.whole) {
        probabilities<false>(s, ds, a.scale, tile.mask, warp_row, first, lse, delta);
        multiply<Element, kDim, false>(dq, ds, k, met.live);
      } else {
        probabilities<true>(s, ds, a.scale, tile.mask, warp_row, first, lse, delta);
        multiply<Element, kDim, true>(dq, ds, k, met.live);
      }
    }
    __syncthreads();  // every warp is done with the stage
    if (num_stages == 1) prefetch(step + 1);
  }
  copy_async_wait<0>();
  store_rows<Element, kDim>(
      own_q, dq, a.dq, a.num_q_heads, work.head, 0, work.first + warp_row, a.total_q,
      [&](int, int) { return a.scale.scale; },
      [&](int row) { return !(a.skip_short && a.plan.rows[work.first + warp_row + row].hi < 0); });
}

// --- launches -------------------------------------------------------------------------------------------------------

// Two stages unless one lets more blocks share a multiprocessor (two at most: registers), or two do not fit.
template <typename Tile>
struct StagedTile {
  int num_stages;
  std::size_t bytes;

  StagedTile() {
    constexpr std::size_t kTwo = sizeof(Tile), kOne = kTwo - sizeof(typename Tile::Stage);
    const std::size_t shared = shared_per_multiprocessor();
    const auto blocks = [shared](std::size_t size) {
      return std::min<std::size_t>(2, shared / (size + kSharedPerBlock));
    };
    num_stages = blocks(kTwo) < blocks(kOne) ? 1 : 2;
    bytes = num_stages == 2 ? kTwo : kOne;
  }
};

template <typename Element>
void launch_attention_delta(const BackwardArguments& a, int64_t head_dim, void* stream) {
  with_head_dim(head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value, kPerBlock = kAttentionThreads / kRowLanes<kDim>;
    const int64_t pairs = static_cast<int64_t>(a.total_q) * a.num_q_heads;
    launch<attention_delta_kernel<Element, kDim>>(static_cast<unsigned>((pairs + kPerBlock - 1) / kPerBlock),
                                                  kAttentionThreads, 0, stream, a);
  });
}

template <typename Element>
void launch_attention_dkv(const BackwardArguments& a, int64_t head_dim, void* stream) {
  with_head_dim(head_dim, [&](auto dim) {
    using Tile = KeyTile<decltype(dim)::value>;
    const StagedTile<Tile> staged;
    launch<attention_dkv_kernel<Element, Tile::kDim>>(grid_of(a.total_k, Tile::kRows, a.num_kv_heads),
                                                      kAttentionThreads, staged.bytes, stream, a, staged.num_stages);
  });
}

template <typename Element>
void launch_attention_dq(const BackwardArguments& a, int64_t head_dim, void* stream) {
  with_head_dim(head_dim, [&](auto dim) {
    using Tile = QueryTile<decltype(dim)::value>;
    const StagedTile<Tile> staged;
    launch<attention_dq_kernel<Element, Tile::kDim>>(grid_of(a.total_q, Tile::kRows, a.num_q_heads), kAttentionThreads,
                                                     staged.bytes, stream, a, staged.num_stages);
  });
}

}  // namespace fastsft::cuda
