// Rows of random logits with every objective and option, and the float64 formula of fastsft/loss.h to hold kernels
// against.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "fastsft/loss.h"

struct LossCase {
  fastsft::Objective objective = fastsft::Objective::kNll;
  float argument = 0, softcap = 0, temperature = 1, smoothing = 0, z_loss = 0;
  bool bias = false, entropy_grads = false;
};

inline std::vector<LossCase> loss_cases() {
  using fastsft::Objective;
  return {
      {},
      {.softcap = 5.0f},
      {.temperature = 0.7f},
      {.smoothing = 0.1f},
      {.z_loss = 0.01f},
      {.bias = true},
      {.entropy_grads = true},
      {.softcap = 3.0f, .temperature = 1.3f, .smoothing = 0.2f, .z_loss = 0.02f, .bias = true, .entropy_grads = true},
      {.objective = Objective::kDft},
      {.objective = Objective::kPower, .argument = 0.5f},
      {.objective = Objective::kThreshold, .argument = 0.01f},
      {.objective = Objective::kFocal, .argument = 2.0f},
      {.objective = Objective::kEntropyGate},
      {.objective = Objective::kRatioClip, .argument = 0.2f},
      {.objective = Objective::kK3, .argument = 0.3f}};
}

class LossData {
 public:
  LossData(int64_t rows, int64_t vocab, const LossCase& c, unsigned seed)
      : rows_(rows),
        vocab_(vocab),
        case_(c),
        random_(seed),
        logits(draw(rows * vocab, 3.0f)),
        bias_(draw(vocab, 1.0f)),
        token_weights_(draw(rows, 1.0f)),
        grad_weights_(draw(rows, 1.0f)),
        entropy_grads_(draw(rows, 0.5f)),
        outputs_(4 * rows, NAN),
        original_(logits) {
    for (int64_t i = 0; i < rows; ++i) targets_.push_back(static_cast<int64_t>(random_() % vocab));
    // Near the row's own log-probability, so that the ratio is clipped in some rows only.
    for (int64_t i = 0; i < rows; ++i)
      ref_.push_back(static_cast<float>(exact(i).l) + 0.3f * static_cast<float>(i - 1));
  }

  fastsft::LossRows rows() { return view(fastsft::DType::kFloat32, logits.data()); }

  fastsft::LossRows as(fastsft::DType dtype) {
    words.clear();
    for (float x : logits) {  // truncation will do: both kernels get the same words
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      words.push_back(dtype == fastsft::DType::kBFloat16 ? static_cast<uint16_t>(bits >> 16)
                                                         : static_cast<uint16_t>(0x3800u | (bits >> 16 & 0x83ffu)));
    }
    return view(dtype, words.data());
  }

  // Losses, log-probabilities, entropies, weights and gradients against float64.
  void compare(const char* which) const {
    for (int64_t i = 0; i < rows_; ++i) {
      const Exact e = exact(i);
      const double expected[] = {token_weights_[i] * e.loss, e.l, e.entropy, token_weights_[i] * e.weight};
      for (int k = 0; k < 4; ++k) close(which, "output", outputs_[k * rows_ + i], expected[k], 1e-5);
      for (int64_t j = 0; j < vocab_; ++j) close(which, "gradient", logits[i * vocab_ + j], e.gradient[j], 2e-6);
    }
  }

 private:
  struct Exact {
    double l, entropy, loss, weight;
    std::vector<double> gradient;
  };

  std::vector<float> draw(int64_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(n);
    for (float& v : values) v = normal(random_);
    return values;
  }

  fastsft::LossRows view(fastsft::DType dtype, void* data) {
    float* out = outputs_.data();
    return {.dtype = dtype,
            .logits = data,
            .rows = rows_,
            .vocab = vocab_,
            .stride = vocab_,
            .bias = case_.bias ? bias_.data() : nullptr,
            .targets = targets_.data(),
            .token_weights = token_weights_.data(),
            .grad_weights = grad_weights_.data(),
            .entropy_grads = case_.entropy_grads ? entropy_grads_.data() : nullptr,
            .ref_logprobs = ref_.data(),
            .objective = case_.objective,
            .argument = case_.argument,
            .softcap = case_.softcap,
            .temperature = case_.temperature,
            .label_smoothing = case_.smoothing,
            .z_loss = case_.z_loss,
            .write_gradient = true,
            .loss = out,
            .logprob = out + rows_,
            .entropy = out + 2 * rows_,
            .weight = out + 3 * rows_};
  }

  Exact exact(int64_t i) const {
    using fastsft::Objective;
    const int64_t n = vocab_, y = targets_[i];
    std::vector<double> u(n), slope(n), log_p(n);
    double max = -INFINITY, sum = 0, mean = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double z = static_cast<double>(original_[i * n + j]) + (case_.bias ? bias_[j] : 0.0f);
      const double t = case_.softcap > 0 ? std::tanh(z / case_.softcap) : 0;
      u[j] = (case_.softcap > 0 ? case_.softcap * t : z) / case_.temperature;
      slope[j] = (case_.softcap > 0 ? 1 - t * t : 1) / case_.temperature;
      max = std::max(max, u[j]);
    }
    for (double v : u) sum += std::exp(v - max);
    const double lse = max + std::log(sum);
    Exact e{.l = u[y] - lse, .entropy = 0, .loss = 0, .weight = 0, .gradient = std::vector<double>(n)};
    for (int64_t j = 0; j < n; ++j) {
      log_p[j] = u[j] - lse;
      e.entropy -= std::exp(log_p[j]) * log_p[j];
      mean += log_p[j] / n;
    }
    const double l = e.l, p = std::exp(l), a = case_.argument, r = i < static_cast<int64_t>(ref_.size()) ? ref_[i] : 0,
                 s = case_.smoothing;
    double psi = -l;
    e.weight = 1;
    switch (case_.objective) {
      case Objective::kNll: break;
      case Objective::kDft: psi = -p * l, e.weight = p; break;
      case Objective::kPower: psi = (1 - std::pow(p, a)) / a, e.weight = std::pow(p, a); break;
      case Objective::kThreshold: e.weight = p >= a, psi = -e.weight * l; break;
      case Objective::kFocal: e.weight = std::pow(1 - p, a), psi = -e.weight * l; break;
      case Objective::kEntropyGate: e.weight = std::exp(-e.entropy), psi = -e.weight * l; break;
      case Objective::kRatioClip:
        e.weight = std::exp(l - r) <= 1 + a ? std::exp(l - r) : 0;
        psi = -std::min(std::exp(l - r), 1 + a);
        break;
      case Objective::kK3:
        psi = -l + a * (std::exp(r - l) - (r - l) - 1), e.weight = 1 + a * (std::exp(r - l) - 1);
        break;
    }
    e.loss = psi + s * (l - mean) + case_.z_loss * lse * lse;
    for (int64_t j = 0; j < n; ++j) {
      const double pj = std::exp(log_p[j]), target = j == y;
      double g = e.weight * (pj - target) + s * (target - 1.0 / n) + 2 * case_.z_loss * lse * pj;
      g *= grad_weights_[i];
      if (case_.entropy_grads) g -= entropy_grads_[i] * pj * (log_p[j] + e.entropy);
      e.gradient[j] = g * slope[j];
    }
    return e;
  }

  static void close(const char* which, const char* what, double got, double expected, double tolerance) {
    const bool ok = std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected));
    if (!ok) std::printf("%s %s: got %.9g, expected %.9g\n", which, what, got, expected);
    CHECK(ok);
  }

  int64_t rows_, vocab_;
  LossCase case_;
  std::mt19937 random_;

 public:
  std::vector<float> logits;
  std::vector<uint16_t> words;

 private:
  std::vector<float> bias_, token_weights_, grad_weights_, entropy_grads_, ref_, outputs_, original_;
  std::vector<int64_t> targets_;
};
