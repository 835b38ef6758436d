// Vectors that may be cut short by the end of a row. Included by *.isa.cpp only.
#pragma once

#include "simd.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

FASTSFT_INLINE std::size_t bytes_of(DType dtype, int64_t n) {
  return static_cast<std::size_t>(n) * (dtype == DType::kFloat32 ? 4 : 2);
}

// Elements i .. i + kLanes of a row of n; past its end 0, or nothing.
FASTSFT_INLINE Vec load_until(DType dtype, const void* row, int64_t i, int64_t n) {
  if (n - i >= kLanes) return load_as_float(dtype, row, i);
  alignas(64) char buffer[kLanes * 4] = {};
  std::memcpy(buffer, element(dtype, row, i), bytes_of(dtype, n - i));
  return load_as_float(dtype, buffer, 0);
}
FASTSFT_INLINE void store_until(DType dtype, void* row, int64_t i, int64_t n, Vec v) {
  if (n - i >= kLanes) return store_from_float(dtype, row, i, v);
  alignas(64) char buffer[kLanes * 4];
  store_from_float(dtype, buffer, 0, v);
  std::memcpy(element(dtype, row, i), buffer, bytes_of(dtype, n - i));
}

// fn with the type as a template argument: the loops inside then have no branch on it.
template <typename Fn>
FASTSFT_INLINE void with_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn.template operator()<DType::kFloat32>();
    case DType::kBFloat16: return fn.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return fn.template operator()<DType::kFloat16>();
  }
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
