#include "fastsft/norm.h"

#include <algorithm>
#include <vector>

#include "fastsft/parallel.h"
#include "row_kernels.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(void, rms_norm_backward_rows, const RmsNorm&, const float* scale, const void* grad, void* d_x,
                    float* d_weight, int64_t begin, int64_t end)

namespace {

constexpr int64_t kElements = 16384;  // per unit of work: tens of microseconds
constexpr int64_t kParts = 32;  // partial sums of dw, however many threads there are: the order is part of the bits

}  // namespace

void rms_norm(const RmsNorm& norm, void* out, float* scale) {
  const auto rows = FASTSFT_ISA_SELECT(rms_norm_rows);
  parallel_for(norm.rows, std::max<int64_t>(1, kElements / std::max<int64_t>(1, norm.size)),
               [&](int64_t begin, int64_t end) { rows(norm, out, scale, begin, end); });
}

void rms_norm_backward(const RmsNorm& norm, const float* scale, const void* grad, void* d_x, float* d_weight) {
  const auto rows = FASTSFT_ISA_SELECT(rms_norm_backward_rows);
  std::vector<float> parts(kParts * norm.size);
  const int64_t grain = norm.rows * norm.size < 2 * kElements ? kParts : 1;
  parallel_for(kParts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      rows(norm, scale, grad, d_x, parts.data() + p * norm.size, norm.rows * p / kParts, norm.rows * (p + 1) / kParts);
    }
  });
  std::fill(d_weight, d_weight + norm.size, 0.0f);
  for (int64_t p = 0; p < kParts; ++p) {
    for (int64_t j = 0; j < norm.size; ++j) d_weight[j] += parts[p * norm.size + j];
  }
}

}  // namespace fastsft
