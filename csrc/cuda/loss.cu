// One block per row. The logits are read twice and written once (12 V bytes in float32, 6 V in 16 bits; the second read
// hits L2 for a tile that fits it), two exp per element: memory-bound. Contract and formulas: fastsft/loss.h.
#include "fastsft/loss.h"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLowest = -3.0e38f;  // instead of -inf, so that max - max is 0 and not NaN

struct Float32 {
  using Word = float;
  static __device__ float load(const Word* p) { return *p; }
  static __device__ void store(Word* p, float v) { *p = v; }
};

struct BFloat16 {
  using Word = uint16_t;
  static __device__ float load(const Word* p) { return __uint_as_float(static_cast<uint32_t>(*p) << 16); }
  static __device__ void store(Word* p, float v) {
    const uint32_t bits = __float_as_uint(v);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    *p = static_cast<uint16_t>((is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Word = uint16_t;
  static __device__ float load(const Word* p) { return half_to_float(*p); }
  static __device__ void store(Word* p, float v) { *p = float_to_half(v); }
};

struct Sums {
  float max, exps, weighted, total;
};

// Combines two partial rows: sums are relative to their own maximum.
__device__ Sums merge(const Sums& a, const Sums& b) {
  const float max = fmaxf(a.max, b.max);
  const float sa = a.max - max, sb = b.max - max;
  const float fa = expf(sa), fb = expf(sb);
  return {max, fa * a.exps + fb * b.exps, fa * (a.weighted + sa * a.exps) + fb * (b.weighted + sb * b.exps),
          a.total + b.total};
}

__device__ Sums merge_lanes(Sums s) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Sums other{shuffle_xor(s.max, mask), shuffle_xor(s.exps, mask), shuffle_xor(s.weighted, mask),
                     shuffle_xor(s.total, mask)};
    s = merge(s, other);
  }
  return s;
}

template <typename T>
__device__ float scaled(const LossRows& a, const typename T::Word* row, int64_t j, float* slope) {
  const float z = T::load(row + j) + (a.bias == nullptr ? 0.0f : a.bias[j]);
  const float inverse_temperature = 1.0f / a.temperature;
  if (a.softcap <= 0) {
    *slope = inverse_temperature;
    return z * inverse_temperature;
  }
  const float t = tanhf(z / a.softcap);
  *slope = (1.0f - t * t) * inverse_temperature;
  return t * a.softcap * inverse_temperature;
}

struct Term {
  float psi, weight;
};

__device__ Term objective_term(const LossRows& a, int64_t i, float l, float entropy) {
  const float p = expf(l), x = a.argument;
  switch (a.objective) {
    case Objective::kNll: return {-l, 1.0f};
    case Objective::kDft: return {-p * l, p};
    case Objective::kPower: return {-expm1f(x * l) / x, expf(x * l)};
    case Objective::kThreshold:
      if (p >= x) return {-l, 1.0f};
      return {0.0f * l, 0.0f * l};
    case Objective::kFocal: {
      const float w = powf(-expm1f(l), x);
      return {-w * l, w};
    }
    case Objective::kEntropyGate: {
      const float w = expf(-entropy);
      return {-w * l, w};
    }
    case Objective::kRatioClip: {
      const float ratio = expf(l - a.ref_logprobs[i]);
      if (ratio <= 1 + x) return {-ratio, ratio};
      return {-(1 + x) + 0.0f * l, 0.0f * l};
    }
    case Objective::kK3: {
      const float d = a.ref_logprobs[i] - l;
      return {-l + x * (expm1f(d) - d), 1 + x * expm1f(d)};
    }
  }
  return {0.0f, 0.0f};
}

template <typename T>
__global__ void loss_rows_kernel(LossRows a) {
  __shared__ Sums partial[kThreads / kWarp];
  const int64_t i = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  auto* row = static_cast<typename T::Word*>(a.logits) + i * a.stride;
  float slope;

  Sums s{kLowest, 0.0f, 0.0f, 0.0f};
  for (int64_t j = thread; j < a.vocab; j += kThreads) {
    const float u = scaled<T>(a, row, j, &slope);
    if (u > s.max) {
      const float shift = s.max - u, factor = expf(shift);
      s.weighted = factor * (s.weighted + shift * s.exps);
      s.exps *= factor;
      s.max = u;
    }
    const float d = u - s.max, e = expf(d);
    s.exps += e;
    if (e != 0.0f) s.weighted += e * d;  // 0 * -inf would be NaN; a NaN e comes in
    if (u != -INFINITY) s.total += u;
  }
  s = merge_lanes(s);
  if (thread % kWarp == 0) partial[thread / kWarp] = s;
  __syncthreads();
  s = partial[0];  // every thread merges in the same order: the same bits everywhere, no second broadcast
  for (int w = 1; w < kThreads / kWarp; ++w) s = merge(s, partial[w]);

  const float log_sum = logf(s.exps), lse = s.max + log_sum;
  const int64_t y = a.targets[i];
  const float l = (scaled<T>(a, row, y, &slope) - s.max) - log_sum;
  const float entropy = log_sum - s.weighted / s.exps;
  const Term term = objective_term(a, i, l, entropy);
  const float smooth = a.label_smoothing, vocab = static_cast<float>(a.vocab);
  if (thread == 0) {
    float loss = term.psi + a.z_loss * lse * lse;
    if (smooth > 0) loss += smooth * (l - (s.total / vocab - lse));
    a.loss[i] = a.token_weights[i] * loss;
    a.logprob[i] = l;
    a.entropy[i] = entropy;
    a.weight[i] = a.token_weights[i] * term.weight;
  }
  if (!a.write_gradient) return;
  __syncthreads();  // every thread has read the target's logit before one of them overwrites it

  const float g = a.grad_weights[i], h = a.entropy_grads == nullptr ? 0.0f : a.entropy_grads[i];
  const float inverse = 1.0f / s.exps;
  const float per_p = g * (term.weight + 2 * a.z_loss * lse) - h * (entropy - log_sum);
  const float constant = -g * smooth / vocab;
  for (int64_t j = thread; j < a.vocab; j += kThreads) {
    const float d = scaled<T>(a, row, j, &slope) - s.max;
    const float p = expf(d) * inverse;
    float gradient = p * per_p + constant;
    if (h != 0.0f && p != 0.0f) gradient -= h * p * d;
    if (j == y) gradient -= g * (term.weight - smooth);
    T::store(row + j, gradient * slope);
  }
}

}  // namespace

#if !defined(FASTSFT_CUDA_HOST)
void loss_rows(const LossRows& rows, void* stream) {
  if (rows.rows == 0) return;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(rows.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rows);
  };
  switch (rows.dtype) {
    case DType::kFloat32: launch(loss_rows_kernel<Float32>); break;
    case DType::kBFloat16: launch(loss_rows_kernel<BFloat16>); break;
    case DType::kFloat16: launch(loss_rows_kernel<Float16>); break;
  }
  const cudaError_t error = cudaGetLastError();
  FASTSFT_CHECK(error == cudaSuccess, "loss_rows: launch of ", rows.rows, " x ", kThreads,
                " threads failed: ", cudaGetErrorString(error));
}
#endif

}  // namespace fastsft::cuda
