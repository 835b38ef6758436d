// What the launches of the attention kernels share. One .cu file per kernel family and element type instantiates its
// kernels, so that no file takes long to compile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_tile.cuh"
#include "launch.h"

namespace fastsft::cuda {

struct ForwardArguments {
  AttentionInput q, k, v;
  uint16_t* out;
  float* lse;
  const AttentionInterval* rows;
  const int32_t* order;
  int64_t total_q;
  int total_k, num_q_heads, group;  // group: query heads per key head
  int section;                      // query heads whose blocks are neighbours in the grid
  ScoreScale scale;
};

struct BackwardArguments {
  AttentionInput dout, q, k, v, out;
  const float *lse, *dlse;  // dlse may be null
  float* delta;
  uint16_t *dq, *dk, *dv;
  AttentionPlan plan;
  int total_q, total_k, num_q_heads, num_kv_heads, group;
  int section;      // key heads whose blocks are neighbours in the grid
  bool skip_short;  // short sequences are handled by attention_short_sm80.cuh
  ScoreScale scale;
};

// Calls launch(std::integral_constant<int, D>) with the head size.
template <typename Launch>
void with_head_dim(int64_t head_dim, Launch&& launch) {
  switch (head_dim) {
    case 64: return launch(std::integral_constant<int, 64>{});
    case 80: return launch(std::integral_constant<int, 80>{});
    case 96: return launch(std::integral_constant<int, 96>{});
    case 128: return launch(std::integral_constant<int, 128>{});
    case 256: return launch(std::integral_constant<int, 256>{});
    default: detail::fail("varlen_attention: q: expected a head size of 64, 80, 96, 128 or 256, got ", head_dim);
  }
}

inline constexpr std::size_t kSharedPerBlock = 1024;  // what the driver takes for itself

// Bytes of shared memory of the current device's multiprocessors.
inline std::size_t shared_per_multiprocessor() {
#if defined(FASTSFT_CUDA_HOST)
  return cuda_host::shared_per_multiprocessor;
#else
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("current device: ") + cudaGetErrorString(error));
  return static_cast<std::size_t>(bytes);
#endif
}

// The blocks that find_work<rows_per_block> shares the work out to.
inline unsigned grid_of(int64_t total, int rows_per_block, int64_t heads) {
  const int64_t blocks = (total + kPlanTile - 1) / kPlanTile * (kPlanTile / rows_per_block) * heads;
  FASTSFT_CHECK(blocks <= INT32_MAX, "varlen_attention: q: ", total, " tokens of ", heads, " heads are too many");
  return static_cast<unsigned>(blocks);
}

}  // namespace fastsft::cuda
