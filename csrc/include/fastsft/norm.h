// Root mean square norm (arXiv 1910.07467) of rows, as the published models compute it: normalised in float32, rounded
// to the type of x, multiplied by the weight and rounded again.
//
//   x^ = x / sqrt(mean(x^2) + eps), y = round(x^) * w
//   dx = (g w - x^ mean(g w x^)) / sqrt(mean(x^2) + eps), dw = sum over rows of g round(x^)
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

struct RmsNorm {
  DType dtype;  // of x, the result and their gradients
  const void* x;
  const float* weight;  // [size]
  int64_t rows, size;
  float eps;
};

// `scale` [rows] gets 1 / sqrt(mean(x^2) + eps). Deterministic; a NaN stays in its row (and in dw).
void rms_norm(const RmsNorm& norm, void* out, float* scale);
void rms_norm_backward(const RmsNorm& norm, const float* scale, const void* grad, void* d_x, float* d_weight);

}  // namespace fastsft
