// Forward attention on mma.sync. A block owns 128 packed query rows of one head (64 for head size 256), four warps of
// two (one) times 16 rows each, and walks the keys that any of its rows sees, 64 (32) at a time, with an online
// softmax.
//
// Per token and query head, n visible keys: 2 n D multiply-adds on the tensor cores, n exp2; q read and out written
// once (4 D bytes), k and v read once per block: 4 D n / 128 bytes, which the L2 serves. Per pair of key and value tile
// a warp with 32 rows and D = 128 issues 256 mma for 80 ldmatrix.
//
// Copies run one phase ahead: the values of a tile arrive under its scores, the keys of the next tile under softmax and
// values. Two blocks share a multiprocessor, so that one's softmax runs under the other's products.
#pragma once

#include "attention_launch.cuh"

namespace fastsft::cuda {

template <int kDim_>
struct ForwardTile {
  static constexpr int kDim = kDim_;
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kRows = kAttentionWarps * 16 * kBlocks;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kMinBlocks = 2;  // per multiprocessor

  uint16_t q[kRows * kPitch<kDim>];
  uint16_t k[kKeys * kPitch<kDim>];
  uint16_t v[kKeys * kPitch<kDim>];
  TileMask<kRows> mask;
  Work work;
};

// The running softmax of a warp's rows. max is that of the scores before they are scaled.
template <int kBlocks>
struct Softmax {
  float max[kBlocks][2], sum[kBlocks][2];  // sum: of this lane's columns
};

// Turns the scores of keys first .. into probabilities relative to the running maximum; rescales what came before.
template <bool kMasked, int kBlocks, int kKeys, int kColumns, int kRows>
__device__ __forceinline__ void softmax_step(Accumulator<kBlocks, kKeys>& s, Accumulator<kBlocks, kColumns>& out,
                                             Softmax<kBlocks>& state, const ScoreScale& scale,
                                             const TileMask<kRows>& mask, int warp_row, int first) {
  const int lane = lane_id();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kMasked) {
        const AttentionInterval seen = mask.rows[warp_row + block * 16 + half * 8 + lane / 4];
        const int lo = seen.lo - first - lane % 4 * 2, hi = seen.hi - first - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (n * 8 + i < lo || n * 8 + i >= hi) s.at[block][n][2 * half + i] = -INFINITY;
          }
        }
      }
      float top = state.max[block][half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        top = fmaxf(top, fmaxf(s.at[block][n][2 * half], s.at[block][n][2 * half + 1]));
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      // A row that has seen nothing yet has maximum -inf: 0 in its place, or exp2(-inf + inf) would be NaN.
      const float base = kMasked && top == -INFINITY ? 0.0f : top * scale.multiplier;
      const float shrink = exp2_approx(state.max[block][half] * scale.multiplier - base);
      state.max[block][half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s.at[block][n][i] = exp2_approx(fmaf(s.at[block][n][i], scale.multiplier, -base));
          sum += s.at[block][n][i];
        }
      }
      state.sum[block][half] = state.sum[block][half] * shrink + sum;
      if (warp_any(shrink != 1.0f)) {  // after a few tiles maxima seldom grow
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          out.at[block][n][2 * half] *= shrink;
          out.at[block][n][2 * half + 1] *= shrink;
        }
      }
    }
  }
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, ForwardTile<kDim>::kMinBlocks)
    attention_forward_kernel(const ForwardArguments a) {
  using Tile = ForwardTile<kDim>;
  constexpr int kBlocks = Tile::kBlocks, kKeys = Tile::kKeys, kRows = Tile::kRows;
  Tile& tile = *shared_memory<Tile>();
  const int warp = warp_id(), lane = lane_id();
  if (!find_work<kRows>(tile.work, a.order, a.total_q, a.section, false)) return;
  const Work& work = tile.work;
  const int end = static_cast<int>(a.total_q);
  tile.mask.load(a.rows, work.first, end, false);
  const AttentionInterval range = tile.mask.range;
  const HeadRows q(a.q, work.head), k(a.k, work.head / a.group), v(a.v, work.head / a.group);
  if (range.lo < range.hi) {
    copy_rows<kDim, kRows>(tile.q, q, work.first, end);
    copy_rows<kDim, kKeys>(tile.k, k, range.lo, a.total_k);
  }
  copy_async_commit();

  const int warp_row = warp * 16 * kBlocks;
  uint16_t* const own_q = tile.q + warp_row * kPitch<kDim>;
  Accumulator<kBlocks, kDim> out;
  out.clear();
  Softmax<kBlocks> state;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    state.max[block][0] = state.max[block][1] = -INFINITY;
    state.sum[block][0] = state.sum[block][1] = 0.0f;
  }

  for (int first = range.lo; first < range.hi; first += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // the keys are there, and every warp is done with the values before
    copy_rows<kDim, kKeys>(tile.v, v, first, a.total_k);
    copy_async_commit();
    const Meeting met = meet<kBlocks, kKeys>(tile.mask, warp * kBlocks, first);
    Accumulator<kBlocks, kKeys> s;
    if (met.whole) {
      multiply_transposed<Element, kDim, false>(s, own_q, tile.k, met.live);
    } else if (met.live != 0) {
      multiply_transposed<Element, kDim, true>(s, own_q, tile.k, met.live);
    }
    copy_async_wait<0>();
    __syncthreads();  // the values are there, and every warp is done with the keys
    if (first + kKeys < range.hi) copy_rows<kDim, kKeys>(tile.k, k, first + kKeys, a.total_k);
    copy_async_commit();
    if (a.scale.is_transformed && met.live != 0) a.scale.transform(s);
    if (met.whole) {
      softmax_step<false>(s, out, state, a.scale, tile.mask, warp_row, first);
      multiply<Element, kDim, false>(out, s, tile.v, met.live);
    } else if (met.live != 0) {
      softmax_step<true>(s, out, state, a.scale, tile.mask, warp_row, first);
      multiply<Element, kDim, true>(out, s, tile.v, met.live);
    }
  }
  copy_async_wait<0>();

#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = state.sum[block][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int row = work.first + warp_row + block * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < end) {
        a.lse[work.head * a.total_q + row] =
            sum == 0.0f ? -INFINITY : state.max[block][half] * a.scale.multiplier * kLn2 + logf(sum);
      }
    }
  }
  store_rows<Element, kDim>(
      own_q, out, a.out, a.num_q_heads, work.head, 0, work.first + warp_row, end,
      [&](int block, int half) { return state.sum[block][half] == 0.0f ? 0.0f : 1.0f / state.sum[block][half]; },
      [](int) { return true; });
}

template <typename Element>
void launch_attention_forward(const ForwardArguments& a, int64_t head_dim, void* stream) {
  with_head_dim(head_dim, [&](auto dim) {
    using Tile = ForwardTile<decltype(dim)::value>;
    launch<attention_forward_kernel<Element, Tile::kDim>>(grid_of(a.total_q, Tile::kRows, a.num_q_heads),
                                                          kAttentionThreads, sizeof(Tile), stream, a);
  });
}

}  // namespace fastsft::cuda
