// The row kernel of the fused linear cross-entropy: from a tile of logits to losses and, over the logits themselves,
// their gradient. The matrix products around it (logits = hidden W^T; d_hidden = dlogits W; dW += dlogits^T hidden)
// belong to the caller, who passes tiles of rows so that the [T, V] logits never exist.
//
// With z the logits (plus bias), u = cap(z) / temperature, cap(z) = softcap tanh(z / softcap), p = softmax(u),
// l = log p[target], H the entropy of p, and s the label smoothing, a row's loss is
//
//   token_weight * (psi(l) + s (l - mean_j log p_j) + z_loss lse(u)^2)
//
// psi is the objective's function (see Objective); its weight is w = -psi'(l), with what is detached taken as constant.
// The gradient written over the row is, with g = grad_weight and a = entropy_grad,
//
//   dz_j = cap'(z_j) / temperature * (g (w (p_j - e_j) + s (e_j - 1/V) + 2 z_loss lse p_j) - a p_j (log p_j + H))
//
// where e_j is 1 at the target. Sources: docs/ops.md. Computed in float32; the target's entry is formed before
// rounding.
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

enum class Objective : int32_t {
  kNll = 0,          // psi = -l
  kDft = 1,          // psi = -sg(p) l                         w = p
  kPower = 2,        // psi = (1 - p^a) / a                    w = p^a
  kThreshold = 3,    // psi = -1[p >= a] l                     w = 1[p >= a]
  kFocal = 4,        // psi = -sg((1 - p)^a) l                 w = (1 - p)^a
  kEntropyGate = 5,  // psi = -sg(exp(-H)) l                   w = exp(-H)
  kRatioClip = 6,    // psi = -min(r, 1 + a), r = exp(l - ref) w = r 1[r <= 1 + a]
  kK3 = 7,           // psi = -l + a (1/r - 1 + l - ref)       w = 1 + a (1/r - 1)
};

// Row-major logits [rows, vocab] with `stride` elements between rows; every other array has one element per row. Null:
// `bias` (else [vocab]), `entropy_grads`, `ref_logprobs` (needed by kRatioClip and kK3).
struct LossRows {
  DType dtype;
  void* logits;
  int64_t rows, vocab, stride;
  const float* bias;
  const int64_t* targets;  // in [0, vocab)
  const float* token_weights;
  const float* grad_weights;
  const float* entropy_grads;
  const float* ref_logprobs;
  Objective objective;
  float argument;  // the objective's a
  float softcap;   // 0: none
  float temperature;
  float label_smoothing;
  float z_loss;
  bool write_gradient;  // false: the logits stay as they are
  float* loss;
  float* logprob;
  float* entropy;
  float* weight;  // token_weight * w
};

// On the CPU. Deterministic; rows are independent, so a NaN stays in its row. Throws Error for a target out of range.
void loss_rows(const LossRows& rows);

namespace cuda {
// On the current CUDA device, all pointers on it, asynchronously on `stream` (a cudaStream_t). Targets are not checked.
void loss_rows(const LossRows& rows, void* stream);
}  // namespace cuda

}  // namespace fastsft
