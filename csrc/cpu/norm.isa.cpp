// Per row of D elements, forward: x read twice, the second time from cache, y written: 8 D bytes in float32, 4 D in 16
// bits, 4 D flops. Backward: x and the gradient read, dx written, 12 D or 6 D. Memory-bound.
#include "fastsft/norm.h"

#include <cmath>

#include "partial.h"

namespace fastsft::FASTSFT_ISA_NS {

void rms_norm_rows(const RmsNorm& norm, void* out, float* scale, int64_t begin, int64_t end) {
  with_dtype(norm.dtype, [&]<DType kDType>() {
    const int64_t n = norm.size;
    for (int64_t i = begin; i < end; ++i) {
      const void* const x = element(kDType, norm.x, i * n);
      void* const y = element(kDType, out, i * n);
      Vec squares{};
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec v = load_until(kDType, x, j, n);
        squares += v * v;
      }
      const float s = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(n) + norm.eps);
      scale[i] = s;
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec w = load_until(DType::kFloat32, norm.weight, j, n);
        store_until(kDType, y, j, n, rounded(kDType, load_until(kDType, x, j, n) * s) * w);
      }
    }
  });
}

// Adds to d_weight [size].
void rms_norm_backward_rows(const RmsNorm& norm, const float* scale, const void* grad, void* d_x, float* d_weight,
                            int64_t begin, int64_t end) {
  with_dtype(norm.dtype, [&]<DType kDType>() {
    const int64_t n = norm.size;
    for (int64_t i = begin; i < end; ++i) {
      const void *const x = element(kDType, norm.x, i * n), *const g = element(kDType, grad, i * n);
      const float s = scale[i];
      Vec products{};
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec dy = load_until(kDType, g, j, n), normal = load_until(kDType, x, j, n) * s;
        products += dy * load_until(DType::kFloat32, norm.weight, j, n) * normal;
        const Vec sum = load_until(DType::kFloat32, d_weight, j, n) + dy * rounded(kDType, normal);
        store_until(DType::kFloat32, d_weight, j, n, sum);
      }
      const float mean = sum_lanes(products) / static_cast<float>(n);
      void* const dx = element(kDType, d_x, i * n);
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec dy = load_until(kDType, g, j, n), normal = load_until(kDType, x, j, n) * s;
        store_until(kDType, dx, j, n, (dy * load_until(DType::kFloat32, norm.weight, j, n) - normal * mean) * s);
      }
    }
  });
}

}  // namespace fastsft::FASTSFT_ISA_NS
