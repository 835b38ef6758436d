// What the tests of the emulated instructions of csrc/cuda/primitives_sm90.cuh share.
#pragma once

#include <vector>

#include "kernel_cases.h"
#include "primitives_sm90.cuh"
#include "tensor_map.h"

namespace fastsft::cuda {

// One thread makes `count` mbarriers for one arrival each at `barriers`.
inline void make_mbarriers(uint64_t* barriers, int count) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) mbarrier_init(barriers + i, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
}

inline TensorMap matrix_map(const std::vector<uint16_t>& data, int rows, int columns, int box_rows, int box_columns,
                            Swizzle swizzle) {
  return make_tensor_map({.dtype = DType::kBFloat16,
                          .data = data.data(),
                          .size = {columns, rows},
                          .stride = {2 * columns},
                          .box = {box_columns, box_rows},
                          .swizzle = swizzle});
}

}  // namespace fastsft::cuda
