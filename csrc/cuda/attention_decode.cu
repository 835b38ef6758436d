// Attention of a sequence's last queries over its block cache. Contract: fastsft/attention.h.
//
// Traffic: keys and values are read once, 4 D bytes per key and key head, by 16-byte cp.async; a segment of 256 keys
// adds its partial result, D + 2 floats per query head written and read again: with 4 query heads per key head 3 % of
// the segment's own bytes, which mostly stay in the L2 cache. Arithmetic: 4 D flop per key and query head, i.e. as many
// flop per byte as query heads share a key head (1 to 16). Scalar fused multiply-adds balance the memory at about 14
// flop per byte at their peak, before conversions and reductions; mma.sync m16n8k16 pads the query rows of a key head
// to 16, which is then the intensity whatever the group, an eighth of its rate. Hence matrix instructions throughout.
//
// In flight: 4.8 TB/s for 700 ns are 3.4 MB, 26 kB per multiprocessor of 132. A warp keeps three tiles of 16 keys or
// values in flight (12 kB at D = 128), a multiprocessor 8 warps at D >= 128, 12 at 80 and 96, 16 at 32 and 64: 96 kB at
// D = 128 and 256, 48 kB at D = 64.
//
// Decoding: one warp works alone on a unit: (sequence, segment of keys, 16 query rows, key head). Warps share nothing,
// so there are no barriers and one warp's waiting is another's work. Units are dealt out in turn, key heads first, so
// that what runs at one time reads neighbouring rows of the cache. Where the partial results would need too much memory
// (many query rows: chunked prefill), a unit is all segments of its rows, folded into one partial result in the same
// order.
//
// Chunked prefill: a sequence with 64 query rows per key head or more (32 at D = 256) is cut into units of so many,
// each a block's: its warps share the tiles of keys and values, which are read once per 64 rows instead of once per 16.
// That is 64 flop per byte from the L2, above the balance of an A100 (50), and the matrix instructions and ldmatrix
// bound it.
#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "attention_decode_worker.cuh"
#include "launch.h"

namespace fastsft::cuda {
namespace paged {
namespace {

constexpr int kMergeThreads = 128;
constexpr float kLog2e = 1.44269504088896341f;

template <typename T, int kDim>
__global__ void __launch_bounds__(Tiling<kDim>::kWarps* kWarp, Tiling<kDim>::kBlocks)
    decode_kernel(const __grid_constant__ Arguments a) {
  UnitList<1> units(a);
  Worker<T, kDim, 1> worker(a);
  Sequence sequence;
  int64_t within;
  const int64_t stride = int64_t{gridDim.x} * Tiling<kDim>::kWarps;
  for (int64_t unit = blockIdx.x + int64_t{gridDim.x} * warp_id(); units.find(unit, &sequence, &within);
       unit += stride) {
    worker.run(sequence, within);
  }
}

// One block per unit: every warp finds the same ones.
template <typename T, int kDim>
__global__ void __launch_bounds__(Tiling<kDim>::kWarps* kWarp, Tiling<kDim>::kBlocks)
    prefill_kernel(const __grid_constant__ Arguments a) {
  UnitList<Tiling<kDim>::kWarps> units(a);
  Worker<T, kDim, Tiling<kDim>::kWarps> worker(a);
  Sequence sequence;
  int64_t within;
  for (int64_t unit = blockIdx.x; units.find(unit, &sequence, &within); unit += gridDim.x) {
    worker.run(sequence, within);
  }
}

// One warp per query row: its segments' partial results, in order.
template <typename T, int kDim>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Arguments a) {
  constexpr int kMine = (kDim + kWarp - 1) / kWarp;
  const int64_t row = blockIdx.x * int64_t{kMergeThreads / kWarp} + warp_id();
  if (row >= int64_t{a.total_q} * a.shape.num_q_heads) return;
  const int count = min(a.counts[row], a.splits);
  const float* sums = a.sums + row * a.splits * kDim;
  Partial total{-INFINITY, 0.0f};
  float acc[kMine] = {};
#pragma unroll 4
  for (int split = 0; split < count; ++split) {
    const float2 stored = load<float2>(a.maxima + row * a.splits + split);
    float scale_total, scale_next;
    total = merge(total, {stored.x, stored.y}, &scale_total, &scale_next);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int column = i * kWarp + lane_id();
      if (column < kDim) acc[i] = merged(scale_total, acc[i], scale_next, sums[int64_t{split} * kDim + column]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int column = i * kWarp + lane_id();
    if (column < kDim) {
      static_cast<typename T::Word*>(a.out)[row * kDim + column] = T::from_float(normalised(acc[i], total.sum));
    }
  }
}

void check_aligned(const char* name, const void* data, std::initializer_list<std::pair<int64_t, int64_t>> sizes_strides,
                   int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % bytes == 0;
  for (const auto& [size, stride] : sizes_strides) aligned = aligned && (size <= 1 || stride * 2 % bytes == 0);
  FASTSFT_CHECK(aligned, "paged_attention: ", name, ": expected rows that start at multiples of ", bytes, " bytes");
}

template <typename T, int kDim>
void start(Arguments a, void* stream) {
  using Layout = Tiling<kDim>;
  constexpr int kTeamRows = Layout::kWarps * kRows;
  const int64_t rows = int64_t{a.total_q} * a.shape.num_q_heads, rows_per_head = rows / a.shape.num_kv_heads;
  const int64_t resident = int64_t{multiprocessor_count()} * Layout::kBlocks;
  const auto launch_units = [&]<auto kKernel>(int64_t blocks) {
    launch<kKernel>(dim3(static_cast<unsigned>(std::min(blocks, resident))), Layout::kWarps * kWarp,
                    Layout::kWarps * Layout::kWarpBytes, stream, a);
  };
  // The lengths are on the device. With a query for every sequence, the longest has at most these: in plain decoding,
  // one. Where sequences without queries make the bound too low, single warps do the work of teams.
  const bool has_teams = int64_t{a.total_q - a.batch + 1} * a.group >= kTeamRows;
  a.team_rows = has_teams ? kTeamRows : INT64_MAX;
  if (has_teams) {  // a tile that is not full only after full ones
    launch_units.template operator()<prefill_kernel<T, kDim>>(2 * (rows_per_head / kTeamRows) * a.shape.num_kv_heads *
                                                              a.splits);
  }
  const int64_t units = (rows_per_head / kRows + a.batch) * a.shape.num_kv_heads * a.splits;
  launch_units.template operator()<decode_kernel<T, kDim>>((units + Layout::kWarps - 1) / Layout::kWarps);
  if (a.splits == 1) return;
  constexpr int kPerBlock = kMergeThreads / kWarp;
  launch<merge_kernel<T, kDim>>(dim3(static_cast<unsigned>((rows + kPerBlock - 1) / kPerBlock)), kMergeThreads, 0,
                                stream, a);
}

template <typename T>
void start(const Arguments& a, void* stream) {
  switch (a.shape.head_dim) {
    case 32: return start<T, 32>(a, stream);
    case 64: return start<T, 64>(a, stream);
    case 80: return start<T, 80>(a, stream);
    case 96: return start<T, 96>(a, stream);
    case 128: return start<T, 128>(a, stream);
    case 256: return start<T, 256>(a, stream);
  }
  FASTSFT_CHECK(false, "paged_attention: q: expected a head size in 32, 64, 80, 96, 128, 256, got ", a.shape.head_dim);
}

}  // namespace
}  // namespace paged

void paged_attention_forward(const AttentionShape& shape, const int32_t* cu_q, int64_t batch, int64_t total_q,
                             const AttentionInput& q, const PagedCache& cache, void* out, float* scratch,
                             void* stream) {
  const int64_t rows = total_q * shape.num_q_heads;
  const int64_t splits = paged_scratch(rows, shape.head_dim, cache.max_blocks * cache.block_size).splits;
  FASTSFT_CHECK(rows < INT32_MAX, "paged_attention: q: expected fewer than 2^31 query rows, got ", rows);
  FASTSFT_CHECK(shape.num_kv_heads >= 1 && shape.num_q_heads % shape.num_kv_heads == 0,
                "paged_attention: q: expected a multiple of ", shape.num_kv_heads, " heads, got ", shape.num_q_heads);
  if (rows == 0) return;
  paged::check_aligned("q", q.data, {{total_q, q.token_stride}, {shape.num_q_heads, q.head_stride}}, 4);
  for (const auto& [name, data, strides] :
       {std::tuple{"k_cache", cache.k, cache.k_strides}, std::tuple{"v_cache", cache.v, cache.v_strides}}) {
    paged::check_aligned(
        name, data, {{cache.num_blocks, strides[0]}, {cache.block_size, strides[1]}, {shape.num_kv_heads, strides[2]}},
        16);
  }
  paged::Arguments a{};
  a.shape = shape;
  a.q = q;
  a.cache = cache;
  a.cu_q = cu_q;
  a.batch = static_cast<int>(batch);
  a.total_q = static_cast<int>(total_q);
  a.group = static_cast<int>(shape.num_q_heads / shape.num_kv_heads);
  a.window_left = shape.window_left;
  a.window_right = shape.causal ? 0 : shape.window_right;
  a.splits = static_cast<int>(splits);
  const bool capped = shape.softcap > 0.0f;
  a.score_scale = capped ? shape.scale / shape.softcap : shape.scale * paged::kLog2e;
  a.cap_scale = capped ? shape.softcap * paged::kLog2e : 0.0f;
  a.out = out;
  a.sums = scratch;
  a.maxima = reinterpret_cast<float2*>(scratch + rows * splits * shape.head_dim);
  a.counts = reinterpret_cast<int*>(scratch + rows * splits * (shape.head_dim + 2));
  switch (shape.dtype) {
    case DType::kBFloat16: return paged::start<BFloat16>(a, stream);
    case DType::kFloat16: return paged::start<Float16>(a, stream);
    case DType::kFloat32: break;
  }
  FASTSFT_CHECK(false, "paged_attention: q: expected bfloat16 or float16 on CUDA, got ", dtype_name(shape.dtype));
}

}  // namespace fastsft::cuda
