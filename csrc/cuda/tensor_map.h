// Tensor maps: what the bulk copy engine (primitives_sm90.cuh) knows of a tensor in global memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastsft/common.h"
#include "primitives_sm90.cuh"

#if !defined(FASTSFT_CUDA_HOST)
#include <cuda_runtime.h>
#endif

namespace fastsft::cuda {

struct TensorMapArguments {
  DType dtype;
  const void* data;             // device memory, aligned to 16 bytes
  std::vector<int64_t> size;    // elements per dimension, the innermost (contiguous) one first: 2 or 3 of them
  std::vector<int64_t> stride;  // bytes from one index to the next of dimensions 1 and up, multiples of 16
  std::vector<int> box;         // elements per dimension that one copy moves, at most 256 each
  Swizzle swizzle = Swizzle::kNone;
};

inline int swizzle_bytes(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128Bytes: return 128;
    case Swizzle::k64Bytes: return 64;
    case Swizzle::k32Bytes: return 32;
    case Swizzle::kNone: break;
  }
  return 0;
}

// Throws fastsft::Error naming what the hardware does not take.
inline void check_tensor_map(const TensorMapArguments& a) {
  const std::size_t rank = a.size.size();
  FASTSFT_CHECK((rank == 2 || rank == 3) && a.stride.size() + 1 == rank && a.box.size() == rank,
                "tensor map: expected 2 or 3 sizes, as many box sides and one stride less, got ", rank, ", ",
                a.box.size(), " and ", a.stride.size());
  FASTSFT_CHECK(reinterpret_cast<uintptr_t>(a.data) % 16 == 0, "tensor map: data: expected an address aligned to 16");
  for (std::size_t i = 0; i < rank; ++i) {
    FASTSFT_CHECK(a.size[i] > 0 && a.size[i] <= int64_t{1} << 32, "tensor map: size[", i, "]: expected 1 to 2^32, got ",
                  a.size[i]);
    FASTSFT_CHECK(a.box[i] > 0 && a.box[i] <= 256, "tensor map: box[", i, "]: expected 1 to 256, got ", a.box[i]);
  }
  for (int64_t stride : a.stride) {
    FASTSFT_CHECK(stride % 16 == 0 && stride > 0 && stride < int64_t{1} << 40,
                  "tensor map: stride: expected a multiple of 16 below 2^40, got ", stride);
  }
  const int64_t row = a.box[0] * static_cast<int64_t>(dtype_size(a.dtype)), span = swizzle_bytes(a.swizzle);
  FASTSFT_CHECK(row % 16 == 0 && (span == 0 || row <= span), "tensor map: box[0]: expected a multiple of 16 bytes",
                span == 0 ? "" : " no longer than the swizzle's row", ", got ", row);
}

#if defined(FASTSFT_CUDA_HOST)

inline TensorMap make_tensor_map(const TensorMapArguments& a) {
  check_tensor_map(a);
  TensorMap map{};
  map.data = static_cast<std::byte*>(const_cast<void*>(a.data));
  map.rank = static_cast<int>(a.size.size());
  map.element_bytes = static_cast<int>(dtype_size(a.dtype));
  map.swizzle_bytes = swizzle_bytes(a.swizzle);
  for (int i = 0; i < map.rank; ++i) {
    map.size[i] = a.size[i];
    map.box[i] = a.box[i];
    map.stride[i] = i == 0 ? map.element_bytes : a.stride[i - 1];
  }
  return map;
}

#else

// The driver's encoder, without linking against libcuda.
inline auto tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled (12.0 or newer is needed)");
    }
    return reinterpret_cast<Encoder>(found);
  }();
  return encoder;
}

inline TensorMap make_tensor_map(const TensorMapArguments& a) {
  check_tensor_map(a);
  const auto type = a.dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : a.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = a.swizzle == Swizzle::k128Bytes  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : a.swizzle == Swizzle::k64Bytes ? CU_TENSOR_MAP_SWIZZLE_64B
                       : a.swizzle == Swizzle::k32Bytes ? CU_TENSOR_MAP_SWIZZLE_32B
                                                        : CU_TENSOR_MAP_SWIZZLE_NONE;
  const std::vector<cuuint64_t> size(a.size.begin(), a.size.end()), stride(a.stride.begin(), a.stride.end());
  const std::vector<cuuint32_t> box(a.box.begin(), a.box.end()), every(a.box.size(), 1);
  TensorMap map{};
  const CUresult result =
      tensor_map_encoder()(&map, type, static_cast<cuuint32_t>(size.size()), const_cast<void*>(a.data), size.data(),
                           stride.data(), box.data(), every.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

#endif

}  // namespace fastsft::cuda
