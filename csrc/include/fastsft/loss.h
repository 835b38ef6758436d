// The row kernels of the fused linear cross-entropy, around which the caller runs the matrix products (logits =
// hidden W^T; d_hidden = dlogits W; dW += dlogits^T hidden) on tiles of rows, so that the [T, V] logits never exist.
//
// They know no objective. loss_stats reduces each row of logits to a few numbers; from these, and from those of other
// rows where the objective looks at a whole sequence, the caller forms each row's loss and six coefficients; and
// loss_gradient writes the gradient over the logits. With z the logits plus bias, cap(z) = softcap tanh(z / softcap),
// u = cap(z) / temperature, p = softmax(u), e the one-hot vector of the target, and q the softmax of the reference
// logits under the same cap and temperature:
//
//   dz_j = cap'(z_j) / temperature * (on_p p_j + on_target e_j + uniform + on_plogp p_j log p_j + on_plogq p_j log q_j
//                                     + on_q q_j)
//
// Computed in float32; the target's entry is formed before it is rounded. Rows are independent: a NaN stays in its row.
//
// A tile may hold all columns of the vocabulary or a block of them. Stats are of the columns at hand, which the caller
// merges; a gradient takes its lse, whatever columns that is over. A target that is not among the columns has a
// log-probability of -inf, and no entry of the gradient is its own.
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

struct LossTile {
  DType dtype;
  void* logits;  // [rows, vocab], `stride` elements from row to row
  int64_t rows, vocab, stride;
  const int64_t* targets;  // [rows]: column numbers
  const float* bias;       // [vocab] or null
  const void* reference;   // logits of the reference model, laid out like `logits`, or null
  float softcap;           // 0: none
  float temperature;
};

// KL(p || q) or KL(q || p), where there is a reference.
enum class Divergence : int32_t { kReverse = 0, kForward = 1 };

// One float32 per row each.
struct LossStats {
  float* logprob;        // log p[target]
  float* entropy;        // of p, in nats
  float* lse;            // log sum_j exp(u_j)
  float* mean_logprob;   // over the vocabulary
  float* divergence;     // 0 without a reference
  float* reference_lse;  // 0 without a reference
};

struct LossCoefficients {
  const float *on_p, *on_target, *uniform, *on_plogp, *on_plogq, *on_q;
};

// On the CPU. Deterministic.
void loss_stats(const LossTile& tile, Divergence divergence, const LossStats& stats);
void loss_gradient(const LossTile& tile, const LossStats& stats, const LossCoefficients& coefficients);

namespace cuda {
// On the current CUDA device, all pointers on it, asynchronously on `stream` (a cudaStream_t). Rows start at multiples
// of 16 bytes; throws Error if they do not, or if a launch fails.
void loss_stats(const LossTile& tile, Divergence divergence, const LossStats& stats, void* stream);
void loss_gradient(const LossTile& tile, const LossStats& stats, const LossCoefficients& coefficients, void* stream);
}  // namespace cuda

}  // namespace fastsft
