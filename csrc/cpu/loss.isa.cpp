// Per row: loss_stats reads the logits once (and the reference's), one exp per element; a running maximum per block
// rescales the sums when it grows. loss_gradient reads and writes them, one exp again. 12 V bytes in all in float32,
// 6 V in 16 bits: memory-bound.
#include "fastsft/loss.h"

#include <cmath>

#include "partial.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

constexpr int64_t kBlock = 512;      // elements between two looks at the maximum
constexpr float kLowest = -3.0e38f;  // instead of -inf, so that max - max is 0 and not NaN

// Reads u, the capped and tempered logits. kPlain: there is neither bias nor cap.
template <DType kDType, bool kPlain>
struct Row {
  const void* data;
  const float* bias;
  int64_t size;
  float cap, inverse_cap, inverse_temperature;

  Row(const LossTile& t, const void* logits, const float* bias_, int64_t i)
      : data(element(kDType, logits, i * t.stride)),
        bias(bias_),
        size(t.vocab),
        cap(t.softcap),
        inverse_cap(t.softcap > 0 ? 1.0f / t.softcap : 0.0f),
        inverse_temperature(1.0f / t.temperature) {}

  FASTSFT_INLINE Vec apply(Vec z, Vec* slope) const {
    if (kPlain || cap <= 0) {
      *slope = splat(inverse_temperature);
      return z * inverse_temperature;
    }
    const Vec t = tanh_of(z * inverse_cap);
    *slope = (1.0f - t * t) * inverse_temperature;
    return t * (cap * inverse_temperature);
  }
  FASTSFT_INLINE Vec whole(int64_t j, Vec* slope) const {
    Vec z = load_as_float(kDType, data, j);
    if (!kPlain && bias != nullptr) z += load(bias + j);
    return apply(z, slope);
  }
  // The last, incomplete vector: past the row's end u is -inf, which adds nothing.
  Vec tail(int64_t j, Vec* slope) const {
    const int64_t have = size - j;
    Vec z = load_until(kDType, data, j, size);
    if (!kPlain && bias != nullptr) {
      for (int64_t i = 0; i < have; ++i) z[i] += bias[j + i];
    }
    Vec u = apply(z, slope);
    for (int64_t i = have; i < kLanes; ++i) u[i] = -INFINITY;
    return u;
  }
  FASTSFT_INLINE Vec at(int64_t j, Vec* slope) const { return size - j >= kLanes ? whole(j, slope) : tail(j, slope); }
  float one(int64_t j) const {  // through the same arithmetic as the vectors; -inf where there is no such column
    if (j < 0 || j >= size) return -INFINITY;
    Vec slope;
    const int64_t first = j / kLanes * kLanes;
    return at(first, &slope)[j - first];
  }
};

// The terms of a sum that are 0 * -inf are 0; a NaN factor stays.
FASTSFT_INLINE Vec weighted(Vec factor, Vec value) {
  return select(factor > 0.0f, factor * value, select(factor == 0.0f, Vec{}, factor));
}

struct Sums {
  float max = kLowest;
  float exps = 0;      // sum_j exp(u_j - max)
  float moment = 0;    // sum_j exp(u_j - max) (u_j - max)
  float crossing = 0;  // sum_j exp(u_j - max) v_j
  float total = 0;     // sum_j u_j
};

// Sums over a row u; with kCross, v is the other model's row.
template <bool kCross, typename U>
FASTSFT_NOINLINE Sums sums_of(const U& u_row, const U& v_row) {
  Sums s;
  alignas(64) float block[kBlock], other[kCross ? kBlock : 1];
  for (int64_t begin = 0; begin < u_row.size; begin += kBlock) {
    const int64_t n = smaller(kBlock, u_row.size - begin);
    const int64_t whole = n / kLanes * kLanes;
    Vec peak = splat(s.max), total{}, slope;
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec u = u_row.whole(begin + j, &slope);
      store(block + j, u);
      total += u;
      peak = max_of(u, peak);  // a NaN is not larger than anything; it reaches the sums below
      if constexpr (kCross) store(other + j, v_row.whole(begin + j, &slope));
    }
    if (whole < n) {
      const Vec u = u_row.tail(begin + whole, &slope);
      store(block + whole, u);
      for (int64_t j = whole; j < n; ++j) s.total += block[j];
      peak = max_of(u, peak);
      if constexpr (kCross) store(other + whole, v_row.tail(begin + whole, &slope));
    }
    const float max = max_lanes(peak);
    const float shift = s.max - max, factor = std::exp(shift);
    Vec exps{}, moment{}, crossing{};
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec u = load(block + j), d = u - max, e = exp_nonpositive(d);
      exps += e;
      moment += weighted(e, d);
      if constexpr (kCross) crossing += weighted(e, load(other + j));
    }
    s.moment = factor * (s.moment + shift * s.exps) + sum_lanes(moment);
    s.exps = factor * s.exps + sum_lanes(exps);
    s.crossing = factor * s.crossing + sum_lanes(crossing);
    s.total += sum_lanes(total);
    s.max = max;
  }
  return s;
}

template <DType kDType, bool kPlain>
void stats_as(const LossTile& t, Divergence divergence, const LossStats& out, int64_t i) {
  using TheRow = Row<kDType, kPlain>;
  const TheRow row(t, t.logits, t.bias, i);
  if (t.reference == nullptr) {
    const Sums s = sums_of<false>(row, row);
    const float log_sum = std::log(s.exps);
    out.lse[i] = s.max + log_sum;
    out.logprob[i] = (row.one(t.targets[i]) - s.max) - log_sum;
    out.entropy[i] = log_sum - s.moment / s.exps;
    out.mean_logprob[i] = s.total / static_cast<float>(t.vocab) - out.lse[i];
    out.divergence[i] = out.reference_lse[i] = 0;
    return;
  }
  const TheRow reference(t, t.reference, nullptr, i);
  const bool reverse = divergence == Divergence::kReverse;
  const Sums p = reverse ? sums_of<true>(row, reference) : sums_of<false>(row, row);
  const Sums q = reverse ? sums_of<false>(reference, reference) : sums_of<true>(reference, row);
  const float log_p = std::log(p.exps), log_q = std::log(q.exps);
  out.lse[i] = p.max + log_p;
  out.reference_lse[i] = q.max + log_q;
  out.logprob[i] = (row.one(t.targets[i]) - p.max) - log_p;
  out.entropy[i] = log_p - p.moment / p.exps;
  out.mean_logprob[i] = p.total / static_cast<float>(t.vocab) - out.lse[i];
  const float reference_entropy = log_q - q.moment / q.exps;
  out.divergence[i] = reverse ? out.reference_lse[i] - p.crossing / p.exps - out.entropy[i]
                              : out.lse[i] - q.crossing / q.exps - reference_entropy;
}

struct Coefficients {
  float on_p, on_target, uniform, on_plogp, on_plogq, on_q;
};

template <DType kDType, bool kPlain>
FASTSFT_INLINE Vec gradient_at(const Row<kDType, kPlain>& row, const Row<kDType, kPlain>& reference, bool is_whole,
                               float lse, float reference_lse, const Coefficients& c, int64_t j) {
  Vec slope;
  const Vec log_p = (is_whole ? row.whole(j, &slope) : row.tail(j, &slope)) - lse;
  const Vec p = exp_nonpositive(log_p);
  Vec gradient = p * c.on_p + c.uniform;
  if constexpr (!kPlain) {
    gradient += c.on_plogp * weighted(p, log_p);
    if (reference.data != nullptr) {
      Vec unused;
      const Vec log_q = (is_whole ? reference.whole(j, &unused) : reference.tail(j, &unused)) - reference_lse;
      gradient += c.on_plogq * weighted(p, log_q) + c.on_q * exp_nonpositive(log_q);
    }
  }
  return gradient * slope;
}

template <DType kDType, bool kPlain>
void gradient_as(const LossTile& t, const LossStats& s, const Coefficients& c, int64_t i) {
  const Row<kDType, kPlain> row(t, t.logits, t.bias, i);
  Row<kDType, kPlain> reference(t, t.reference, nullptr, i);
  if (t.reference == nullptr) reference.data = nullptr;
  void* const out = element(kDType, t.logits, i * t.stride);
  const float lse = s.lse[i], reference_lse = s.reference_lse[i];
  const int64_t y = t.targets[i], whole = t.vocab / kLanes * kLanes;
  const bool has_target = y >= 0 && y < t.vocab;
  const int64_t y_vector = has_target ? y / kLanes * kLanes : t.vocab + kLanes;  // or one that is never reached
  float at_target = 0;
  if (has_target) {
    Vec target_slope;
    (void)row.at(y_vector, &target_slope);
    at_target = c.on_target * target_slope[y - y_vector];
  }
  const auto put = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += kLanes) {
      store_from_float(kDType, out, j, gradient_at<kDType, kPlain>(row, reference, true, lse, reference_lse, c, j));
    }
  };
  const auto put_with_target = [&](int64_t j, bool is_whole) {
    Vec gradient = gradient_at<kDType, kPlain>(row, reference, is_whole, lse, reference_lse, c, j);
    if (j == y_vector) gradient[y - y_vector] += at_target;
    store_until(kDType, out, j, t.vocab, gradient);
  };
  put(0, smaller(y_vector, whole));
  if (y_vector < whole) {
    put_with_target(y_vector, true);
    put(y_vector + kLanes, whole);
  }
  if (whole < t.vocab) put_with_target(whole, false);
}

}  // namespace

void loss_stats_row(const LossTile& t, Divergence divergence, const LossStats& stats, int64_t i) {
  const bool plain = t.bias == nullptr && t.softcap <= 0;
  with_dtype(t.dtype, [&]<DType kDType>() {
    plain ? stats_as<kDType, true>(t, divergence, stats, i) : stats_as<kDType, false>(t, divergence, stats, i);
  });
}

void loss_gradient_row(const LossTile& t, const LossStats& stats, const LossCoefficients& all, int64_t i) {
  const Coefficients c{all.on_p[i], all.on_target[i], all.uniform[i], all.on_plogp[i], all.on_plogq[i], all.on_q[i]};
  const bool plain = t.bias == nullptr && t.softcap <= 0 && t.reference == nullptr && c.on_plogp == 0;
  with_dtype(t.dtype, [&]<DType kDType>() {
    plain ? gradient_as<kDType, true>(t, stats, c, i) : gradient_as<kDType, false>(t, stats, c, i);
  });
}

}  // namespace fastsft::FASTSFT_ISA_NS
