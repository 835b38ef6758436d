// Backward attention for sequences of at most 64 queries and keys, head sizes up to 128: one block handles a sequence
// and key head from start to end, for every query head that reads it.
//
// q, k, v, dout and out are read once, dq, dk and dv written once: 8 D bytes per token and query head, 8 D per key
// head, where the general kernels read q, k, v, dout twice and out, dout once more for delta. Five products instead of
// seven: the score gradients, which the dk, dv side holds transposed in its registers, go to shared memory in 16 bits
// and come back, transposed by ldmatrix, as the left operand of dq. Bound by memory: about 5 n D multiply-adds, n <=
// 64, per 8 D bytes.
//
// Not up to 128: tiles of 128 rows take 111 kB of shared memory at D = 64, 143 kB at 96 and 176 kB at 128, one block
// per multiprocessor of an A100 or none, where two of these overlap copies with products (docs/LOG.md).
#pragma once

#include "attention_bwd_sm80.cuh"

namespace fastsft::cuda {

template <int kDim_>
struct ShortTile {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kShortSequence;

  uint16_t q[kRows * kPitch<kDim>];
  uint16_t dout[kRows * kPitch<kDim>];
  uint16_t k[kRows * kPitch<kDim>];
  uint16_t v[kRows * kPitch<kDim>];
  uint16_t ds[kRows * kPitch<kRows>];  // [key][query]
  float lse[kRows], delta[kRows];
  TileMask<kRows> mask;  // of the keys; columns are counted from 0 as the queries in the packed buffer are
};

// dq of 16 queries from `first`: ds holds their score gradients as columns.
template <typename Element, int kDim, int kKeys>
__device__ __forceinline__ void multiply_stored(Accumulator<1, kDim>& c, const uint16_t* ds, const uint16_t* k,
                                                int num_keys) {
  const int lane = lane_id();
  ds += wide_offset<kKeys>(lane);
  k += tall_offset<kDim>(lane);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    if (n * 16 >= num_keys) break;
    uint32_t left[1][4];
    load_matrix_x4_transposed(left[0], ds + n * 16 * kPitch<kKeys>);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t right[4];
      load_matrix_x4_transposed(right, k + n * 16 * kPitch<kDim> + d * 16);
      mma_m16n8k16<Element>(c.at[0][2 * d], left[0], right[0], right[1]);
      mma_m16n8k16<Element>(c.at[0][2 * d + 1], left[0], right[2], right[3]);
    }
  }
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_short_kernel(const BackwardArguments a, const int32_t* cu_q, const int32_t* cu_k) {
  using Tile = ShortTile<kDim>;
  constexpr int kRows = Tile::kRows;
  Tile& tile = *shared_memory<Tile>();
  const int sequence = static_cast<int>(blockIdx.x) / a.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) % a.num_kv_heads;
  const int first_q = max(0, min(cu_q[sequence], a.total_q)), first_k = max(0, min(cu_k[sequence], a.total_k));
  const int end_q = max(first_q, min(cu_q[sequence + 1], a.total_q)), num_q = end_q - first_q;
  const int end_k = max(first_k, min(cu_k[sequence + 1], a.total_k)), num_k = end_k - first_k;
  if (num_q > kRows || num_k > kRows) return;

  if (num_q > 0 && num_k > 0) {
    copy_rows<kDim, kRows>(tile.k, HeadRows(a.k, kv_head), first_k, end_k);
    copy_rows<kDim, kRows>(tile.v, HeadRows(a.v, kv_head), first_k, end_k);
  }
  tile.mask.load(a.plan.columns, first_k, end_k, false);

  const int warp_row = warp_id() * 16, lane = lane_id();
  uint16_t* const own_k = tile.k + warp_row * kPitch<kDim>;
  uint16_t* const own_v = tile.v + warp_row * kPitch<kDim>;
  uint16_t* const own_q = tile.q + warp_row * kPitch<kDim>;
  const auto lse = [&](int, int, int n, int i) { return tile.lse[n * 8 + lane % 4 * 2 + i]; };
  const auto delta = [&](int, int, int n, int i) { return tile.delta[n * 8 + lane % 4 * 2 + i]; };
  Accumulator<1, kDim> dk, dv;
  dk.clear();
  dv.clear();
  for (int head = kv_head * a.group; num_q > 0 && head < (kv_head + 1) * a.group; ++head) {
    const int64_t stats = static_cast<int64_t>(head) * a.total_q;
    copy_rows<kDim, kRows>(tile.q, HeadRows(a.q, head), first_q, end_q);
    copy_rows<kDim, kRows>(tile.dout, HeadRows(a.dout, head), first_q, end_q);
    copy_floats(tile.lse, a.lse + stats, kRows, first_q, end_q);
    copy_async_commit();
    // delta, from global memory while the copies are under way: a warp takes its 16 rows, 32 / kRowLanes at a time.
    const HeadRows dout(a.dout, head), out(a.out, head);
    for (int r = 0; r < 16; r += kWarp / kRowLanes<kDim>) {
      const int row = warp_row + r + lane / kRowLanes<kDim>;
      const int64_t token = first_q + row;
      const float sum =
          row_dot<Element, kDim>(dout.data + token * dout.stride, out.data + token * out.stride, row < num_q);
      if (lane % kRowLanes<kDim> == 0) {
        const bool has_dlse = a.dlse != nullptr && row < num_q;
        tile.delta[row] = sum - (has_dlse ? a.dlse[stats + token] : 0.0f);
      }
    }
    copy_async_wait<0>();
    __syncthreads();

    const Meeting met = meet<1, kRows>(tile.mask, warp_row / 16, first_q);
    Accumulator<1, kRows> p, ds;
    multiply_transposed<Element, kDim, true>(p, own_k, tile.q, met.live);
    multiply_transposed<Element, kDim, true>(ds, own_v, tile.dout, met.live);
    if (a.scale.is_transformed) transform_scores(p, ds, a.scale, delta);
    probabilities<true>(p, ds, a.scale, tile.mask, warp_row, first_q, lse, delta);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint16_t* const to = tile.ds + (warp_row + half * 8 + lane / 4) * kPitch<kRows> + n * 8 + lane % 4 * 2;
        store<uint32_t>(to, Element::pack(ds.at[0][n][2 * half], ds.at[0][n][2 * half + 1]));
      }
    }
    multiply<Element, kDim, true>(dv, p, tile.dout, met.live);
    multiply<Element, kDim, true>(dk, ds, tile.q, met.live);
    __syncthreads();  // ds is complete, and every warp is done with q and dout

    Accumulator<1, kDim> dq;
    dq.clear();
    if (warp_row < num_q) multiply_stored<Element, kDim, kRows>(dq, tile.ds + warp_row, tile.k, num_k);
    store_rows<Element, kDim>(
        own_q, dq, a.dq, a.num_q_heads, head, 0, first_q + warp_row, end_q, [&](int, int) { return a.scale.scale; },
        [](int) { return true; });
    __syncthreads();  // q, ds and after the last head k may be overwritten
  }
  const auto keep = [](int) { return true; };
  store_rows<Element, kDim>(
      own_k, dk, a.dk, a.num_kv_heads, kv_head, 0, first_k + warp_row, end_k, [&](int, int) { return a.scale.scale; },
      keep);
  store_rows<Element, kDim>(
      own_v, dv, a.dv, a.num_kv_heads, kv_head, 0, first_k + warp_row, end_k, [](int, int) { return 1.0f; }, keep);
}

inline bool has_short_kernel(int64_t head_dim) { return head_dim <= 128; }

template <typename Element>
void launch_attention_short(const BackwardArguments& a, const AttentionBatch& batch, int64_t head_dim, void* stream) {
  with_head_dim(head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if constexpr (kDim <= 128) {
      const int64_t blocks = batch.batch * a.num_kv_heads;
      FASTSFT_CHECK(blocks <= INT32_MAX, "varlen_attention: cu_seqlens_q: ", batch.batch, " sequences are too many");
      launch<attention_short_kernel<Element, kDim>>(static_cast<unsigned>(blocks), kAttentionThreads,
                                                    sizeof(ShortTile<kDim>), stream, a, batch.cu_q, batch.cu_k);
    }
  });
}

}  // namespace fastsft::cuda
