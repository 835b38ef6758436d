// One block per row. loss_stats reads the logits once (and the reference's), loss_gradient reads and writes them: 12 V
// bytes in all in float32, 6 V in 16 bits, two exp per element: memory-bound. Contract and formulas: fastsft/loss.h.
#include "fastsft/loss.h"
#include "launch.h"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLowest = -3.0e38f;  // instead of -inf, so that max - max is 0 and not NaN

struct Sums {
  float max, exps, moment, crossing, total;  // as in csrc/cpu/loss.isa.cpp
};

// Combines two partial rows: sums are relative to their own maximum.
__device__ Sums merge(const Sums& a, const Sums& b) {
  const float max = fmaxf(a.max, b.max);
  const float sa = a.max - max, sb = b.max - max;
  const float fa = expf(sa), fb = expf(sb);
  return {max, fa * a.exps + fb * b.exps, fa * (a.moment + sa * a.exps) + fb * (b.moment + sb * b.exps),
          fa * a.crossing + fb * b.crossing, a.total + b.total};
}

__device__ Sums merge_lanes(Sums s) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Sums other{shuffle_xor(s.max, mask), shuffle_xor(s.exps, mask), shuffle_xor(s.moment, mask),
                     shuffle_xor(s.crossing, mask), shuffle_xor(s.total, mask)};
    s = merge(s, other);
  }
  return s;
}

// Reads u, the capped and tempered logits of a row.
template <typename T>
struct Row {
  const typename T::Word* data;
  const float* bias;
  float cap, inverse_temperature;

  __device__ Row(const LossTile& t, const void* logits, const float* bias_, int64_t i)
      : data(static_cast<const typename T::Word*>(logits) + i * t.stride),
        bias(bias_),
        cap(t.softcap),
        inverse_temperature(1.0f / t.temperature) {}

  __device__ float at(int64_t j, float* slope) const {
    const float z = T::to_float(data[j]) + (bias == nullptr ? 0.0f : bias[j]);
    if (cap <= 0) {
      *slope = inverse_temperature;
      return z * inverse_temperature;
    }
    const float t = tanhf(z / cap);
    *slope = (1.0f - t * t) * inverse_temperature;
    return t * cap * inverse_temperature;
  }
};

// 0 * -inf is 0 in these sums; a NaN factor stays.
__device__ float weighted(float factor, float value) { return factor == 0.0f ? 0.0f : factor * value; }

// Sums over the row u; with kCross, v is the other model's row. Every thread of the block gets the result.
template <bool kCross, typename T>
__device__ Sums sums_of(const Row<T>& u_row, const Row<T>& v_row, int64_t vocab, Sums* partial) {
  const int thread = static_cast<int>(threadIdx.x);
  float slope;
  Sums s{kLowest, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t j = thread; j < vocab; j += kThreads) {
    const float u = u_row.at(j, &slope);
    if (u > s.max) {
      const float shift = s.max - u, factor = expf(shift);
      s.moment = factor * (s.moment + shift * s.exps);
      s.exps *= factor;
      s.crossing *= factor;
      s.max = u;
    }
    const float d = u - s.max, e = expf(d);
    s.exps += e;
    s.moment += weighted(e, d);
    if constexpr (kCross) s.crossing += weighted(e, v_row.at(j, &slope));
    s.total += u;
  }
  s = merge_lanes(s);
  if (thread % kWarp == 0) partial[thread / kWarp] = s;
  __syncthreads();
  s = partial[0];  // every thread merges in the same order: the same bits everywhere, no second broadcast
  for (int w = 1; w < kThreads / kWarp; ++w) s = merge(s, partial[w]);
  __syncthreads();  // `partial` may be written again
  return s;
}

template <typename T>
__global__ void loss_stats_kernel(LossTile t, Divergence divergence, LossStats out) {
  Sums* const partial = shared_memory<Sums>();
  const int64_t i = blockIdx.x;
  const bool has_reference = t.reference != nullptr, reverse = divergence == Divergence::kReverse;
  const Row<T> row(t, t.logits, t.bias, i), reference(t, has_reference ? t.reference : t.logits, nullptr, i);
  const Sums p = has_reference && reverse ? sums_of<true>(row, reference, t.vocab, partial)
                                          : sums_of<false>(row, row, t.vocab, partial);
  const float log_p = logf(p.exps), lse = p.max + log_p, entropy = log_p - p.moment / p.exps;
  float kl = 0.0f, reference_lse = 0.0f;
  if (has_reference) {
    const Sums q = reverse ? sums_of<false>(reference, reference, t.vocab, partial)
                           : sums_of<true>(reference, row, t.vocab, partial);
    const float log_q = logf(q.exps);
    reference_lse = q.max + log_q;
    kl = reverse ? reference_lse - p.crossing / p.exps - entropy
                 : lse - q.crossing / q.exps - (log_q - q.moment / q.exps);
  }
  if (threadIdx.x != 0) return;
  float slope;
  const int64_t y = t.targets[i];
  out.logprob[i] = y >= 0 && y < t.vocab ? (row.at(y, &slope) - p.max) - log_p : -INFINITY;
  out.entropy[i] = entropy;
  out.lse[i] = lse;
  out.mean_logprob[i] = p.total / static_cast<float>(t.vocab) - lse;
  out.divergence[i] = kl;
  out.reference_lse[i] = reference_lse;
}

template <typename T>
__global__ void loss_gradient_kernel(LossTile t, LossStats s, LossCoefficients c) {
  const int64_t i = blockIdx.x, y = t.targets[i];
  const bool has_reference = t.reference != nullptr;
  const Row<T> row(t, t.logits, t.bias, i), reference(t, has_reference ? t.reference : t.logits, nullptr, i);
  auto* const out = static_cast<typename T::Word*>(t.logits) + i * t.stride;
  const float lse = s.lse[i], reference_lse = s.reference_lse[i];
  const float on_p = c.on_p[i], on_target = c.on_target[i], uniform = c.uniform[i];
  const float on_plogp = c.on_plogp[i], on_plogq = c.on_plogq[i], on_q = c.on_q[i];
  for (int64_t j = threadIdx.x; j < t.vocab; j += kThreads) {
    float slope, unused;
    const float log_p = row.at(j, &slope) - lse, p = expf(log_p);
    float gradient = p * on_p + uniform + on_plogp * weighted(p, log_p);
    if (has_reference) {
      const float log_q = reference.at(j, &unused) - reference_lse;
      gradient += on_plogq * weighted(p, log_q) + on_q * expf(log_q);
    }
    if (j == y) gradient += on_target;
    out[j] = T::from_float(gradient * slope);
  }
}

// Calls launch_for with the tile's element type.
template <typename Launch>
void with_element_type(DType dtype, Launch&& launch_for) {
  switch (dtype) {
    case DType::kFloat32: return launch_for(Float32{});
    case DType::kBFloat16: return launch_for(BFloat16{});
    case DType::kFloat16: return launch_for(Float16{});
  }
}

}  // namespace

void loss_stats(const LossTile& tile, Divergence divergence, const LossStats& stats, void* stream) {
  with_element_type(tile.dtype, [&](auto type) {
    launch<loss_stats_kernel<decltype(type)>>(static_cast<unsigned>(tile.rows), kThreads,
                                              kThreads / kWarp * sizeof(Sums), stream, tile, divergence, stats);
  });
}

void loss_gradient(const LossTile& tile, const LossStats& stats, const LossCoefficients& coefficients, void* stream) {
  with_element_type(tile.dtype, [&](auto type) {
    launch<loss_gradient_kernel<decltype(type)>>(static_cast<unsigned>(tile.rows), kThreads, 0, stream, tile, stats,
                                                 coefficients);
  });
}

}  // namespace fastsft::cuda
