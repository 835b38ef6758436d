// Per row: the logits are read twice and written once (12 V bytes in float32, 6 V in bfloat16; a row stays in L2), two
// exp per element. Pass 1 keeps a running maximum per block and rescales the sums when it grows; pass 2 recomputes exp.
#include "fastsft/loss.h"

#include <cmath>

#include "simd.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int64_t kBlock = 512;      // elements between two looks at the maximum
constexpr float kLowest = -3.0e38f;  // instead of -inf, so that max - max is 0 and not NaN

struct Cap {
  float cap, inverse_cap, inverse_temperature;

  explicit Cap(const LossRows& a)
      : cap(a.softcap),
        inverse_cap(a.softcap > 0 ? 1.0f / a.softcap : 0.0f),
        inverse_temperature(1.0f / a.temperature) {}
  // u = cap(z) / temperature; slope = du/dz
  FASTSFT_INLINE Vec apply(Vec z, Vec* slope) const {
    if (cap <= 0) {
      *slope = splat(inverse_temperature);
      return z * inverse_temperature;
    }
    const Vec t = tanh_of(z * inverse_cap);
    *slope = (1.0f - t * t) * inverse_temperature;
    return t * (cap * inverse_temperature);
  }
};

// u for kLanes elements from column i; past the row's end (tail < kLanes of them exist) it is -inf, which adds nothing.
FASTSFT_INLINE Vec load_scaled(const LossRows& a, const Cap& cap, const void* row, int64_t i, Vec* slope) {
  const int64_t have = a.vocab - i;
  Vec z;
  if (have >= kLanes) {
    z = load_as_float(a.dtype, row, i);
    if (a.bias != nullptr) z += load(a.bias + i);
    return cap.apply(z, slope);
  }
  alignas(64) char buffer[kLanes * 4] = {};
  std::memcpy(buffer, element(a.dtype, row, i), static_cast<std::size_t>(have) * (a.dtype == DType::kFloat32 ? 4 : 2));
  z = load_as_float(a.dtype, buffer, 0);
  if (a.bias != nullptr) {
    for (int64_t j = 0; j < have; ++j) z[j] += a.bias[i + j];
  }
  Vec u = cap.apply(z, slope);
  for (int64_t j = have; j < kLanes; ++j) u[j] = -INFINITY;
  return u;
}

FASTSFT_INLINE void store_gradient(const LossRows& a, void* row, int64_t i, Vec v) {
  const int64_t have = a.vocab - i;
  if (have >= kLanes) return store_from_float(a.dtype, row, i, v);
  alignas(64) char buffer[kLanes * 4];
  store_from_float(a.dtype, buffer, 0, v);
  std::memcpy(element(a.dtype, row, i), buffer, static_cast<std::size_t>(have) * (a.dtype == DType::kFloat32 ? 4 : 2));
}

struct Sums {
  float max = kLowest;
  float exps = 0;      // sum exp(u - max)
  float weighted = 0;  // sum exp(u - max) (u - max)
  float total = 0;     // sum u, for label smoothing
};

Sums first_pass(const LossRows& a, const Cap& cap, const void* row) {
  Sums s;
  alignas(64) float block[kBlock];
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = smaller(kBlock, round_up(a.vocab - begin, kLanes));
    Vec peak = splat(s.max), slope;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec u = load_scaled(a, cap, row, begin + i, &slope);
      store(block + i, u);
      peak = max_of(u, peak);  // a NaN is not larger than anything; it reaches the sums below
    }
    const float max = max_lanes(peak);
    const float shift = s.max - max, factor = std::exp(shift);
    Vec exps{}, weighted{}, total{};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec u = load(block + i);
      const Vec d = u - max;
      const Vec e = exp_nonpositive(d);
      exps += e;
      weighted += select(e > 0.0f, e * d, e);  // 0 * -inf would be NaN; a NaN e stays
      total += select(u == -INFINITY, Vec{}, u);
    }
    s.weighted = factor * (s.weighted + shift * s.exps) + sum_lanes(weighted);
    s.exps = factor * s.exps + sum_lanes(exps);
    s.total += sum_lanes(total);
    s.max = max;
  }
  return s;
}

struct Term {
  float psi, weight;
};

Term objective_term(const LossRows& a, int64_t i, float l, float entropy) {
  const float p = std::exp(l), x = a.argument;
  switch (a.objective) {
    case Objective::kNll: return {-l, 1.0f};
    case Objective::kDft: return {-p * l, p};
    case Objective::kPower: return {-std::expm1(x * l) / x, std::exp(x * l)};
    case Objective::kThreshold: return p >= x ? Term{-l, 1.0f} : Term{0.0f * l, 0.0f * l};
    case Objective::kFocal: {
      const float w = std::pow(-std::expm1(l), x);
      return {-w * l, w};
    }
    case Objective::kEntropyGate: {
      const float w = std::exp(-entropy);
      return {-w * l, w};
    }
    case Objective::kRatioClip: {
      const float ratio = std::exp(l - a.ref_logprobs[i]);
      return ratio <= 1 + x ? Term{-ratio, ratio} : Term{-(1 + x) + 0.0f * l, 0.0f * l};
    }
    case Objective::kK3: {
      const float d = a.ref_logprobs[i] - l;
      return {-l + x * (std::expm1(d) - d), 1 + x * std::expm1(d)};
    }
  }
  return {NAN, NAN};
}

void one_row(const LossRows& a, const Cap& cap, int64_t i) {
  void* row = element(a.dtype, a.logits, i * a.stride);
  const Sums s = first_pass(a, cap, row);
  const float log_sum = std::log(s.exps), lse = s.max + log_sum;
  const int64_t y = a.targets[i];
  Vec slope;
  // The vector that holds the target, so that it goes through the same arithmetic as in the passes.
  const int64_t y_vector = y / kLanes * kLanes;
  const float u_y = load_scaled(a, cap, row, y_vector, &slope)[y - y_vector];
  const float l = (u_y - s.max) - log_sum;
  const float entropy = log_sum - s.weighted / s.exps;
  const Term term = objective_term(a, i, l, entropy);
  const float smooth = a.label_smoothing, vocab = static_cast<float>(a.vocab);
  float loss = term.psi + a.z_loss * lse * lse;
  if (smooth > 0) loss += smooth * (l - (s.total / vocab - lse));
  a.loss[i] = a.token_weights[i] * loss;
  a.logprob[i] = l;
  a.entropy[i] = entropy;
  a.weight[i] = a.token_weights[i] * term.weight;
  if (!a.write_gradient) return;

  const float g = a.grad_weights[i], h = a.entropy_grads == nullptr ? 0.0f : a.entropy_grads[i];
  const float inverse = 1.0f / s.exps;
  const float per_p = g * (term.weight + 2 * a.z_loss * lse) - h * (entropy - log_sum);  // multiplies p
  const float constant = -g * smooth / vocab;
  const float at_target = -g * (term.weight - smooth);
  for (int64_t j = 0; j < a.vocab; j += kLanes) {
    const Vec d = load_scaled(a, cap, row, j, &slope) - s.max;
    const Vec p = exp_nonpositive(d) * inverse;
    Vec gradient = p * per_p + constant;
    if (h != 0.0f) gradient -= h * select(p > 0.0f, p * d, p);
    if (j == y_vector) gradient[y - y_vector] += at_target;
    store_gradient(a, row, j, gradient * slope);
  }
}

}  // namespace

void loss_rows_range(const LossRows& a, int64_t begin, int64_t end) {
  const Cap cap(a);
  for (int64_t i = begin; i < end; ++i) one_row(a, cap, i);
}

}  // namespace fastsft::FASTSFT_ISA_NS
