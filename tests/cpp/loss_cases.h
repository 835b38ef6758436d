// Rows of random logits with every option of the row kernels, and the formulas of fastsft/loss.h in float64 to hold
// them against.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "fastsft/loss.h"

struct LossCase {
  float softcap = 0, temperature = 1;
  bool bias = false, reference = false, uniform = false, on_plogp = false;
  fastsft::Divergence divergence = fastsft::Divergence::kReverse;
};

inline std::vector<LossCase> loss_cases() {
  return {{},
          {.softcap = 5.0f},
          {.temperature = 0.7f},
          {.bias = true},
          {.uniform = true},
          {.on_plogp = true},
          {.reference = true},
          {.reference = true, .divergence = fastsft::Divergence::kForward},
          {.softcap = 3.0f, .temperature = 1.3f, .bias = true, .reference = true, .uniform = true, .on_plogp = true}};
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
        reference_(draw(rows * vocab, 3.0f)),
        stats_(6 * rows, NAN),
        coefficients_(draw(6 * rows, 1.0f)),
        original_(logits) {
    for (int64_t i = 0; i < rows; ++i) targets_.push_back(static_cast<int64_t>(random_() % vocab));
    const bool used[] = {true, true, c.uniform, c.on_plogp, c.reference, c.reference};
    for (int64_t k = 0; k < 6 * rows; ++k) coefficients_[k] *= used[k / rows];
  }

  fastsft::LossTile tile() { return view(fastsft::DType::kFloat32, logits.data(), reference_.data()); }

  fastsft::LossTile as(fastsft::DType dtype) {
    words = truncated(logits, dtype);
    reference_words_ = truncated(reference_, dtype);
    return view(dtype, words.data(), reference_words_.data());
  }

  fastsft::LossStats stats() {
    float* row = stats_.data();
    return {row, row + rows_, row + 2 * rows_, row + 3 * rows_, row + 4 * rows_, row + 5 * rows_};
  }
  const std::vector<float>& stats_values() const { return stats_; }

  fastsft::LossCoefficients coefficients() const {
    const float* row = coefficients_.data();
    return {row, row + rows_, row + 2 * rows_, row + 3 * rows_, row + 4 * rows_, row + 5 * rows_};
  }
  fastsft::Divergence divergence() const { return case_.divergence; }

  void compare(const char* which) const {
    for (int64_t i = 0; i < rows_; ++i) {
      const Exact e = exact(i);
      for (int k = 0; k < 6; ++k) close(which, "stat", stats_[k * rows_ + i], e.stats[k], 1e-5);
      for (int64_t j = 0; j < vocab_; ++j) close(which, "gradient", logits[i * vocab_ + j], e.gradient[j], 4e-6);
    }
  }

 private:
  struct Row {
    std::vector<double> log_p, slope;
    double lse;
  };
  struct Exact {
    double stats[6];
    std::vector<double> gradient;
  };

  std::vector<float> draw(int64_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(n);
    for (float& v : values) v = normal(random_);
    return values;
  }

  // Truncation will do: both kernels get the same words.
  static std::vector<uint16_t> truncated(const std::vector<float>& values, fastsft::DType dtype) {
    std::vector<uint16_t> words;
    for (float x : values) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      words.push_back(dtype == fastsft::DType::kBFloat16 ? static_cast<uint16_t>(bits >> 16)
                                                         : static_cast<uint16_t>(0x3800u | (bits >> 16 & 0x83ffu)));
    }
    return words;
  }

  fastsft::LossTile view(fastsft::DType dtype, void* data, const void* reference) {
    return {.dtype = dtype,
            .logits = data,
            .rows = rows_,
            .vocab = vocab_,
            .stride = vocab_,
            .targets = targets_.data(),
            .bias = case_.bias ? bias_.data() : nullptr,
            .reference = case_.reference ? reference : nullptr,
            .softcap = case_.softcap,
            .temperature = case_.temperature};
  }

  Row softmax(const std::vector<float>& values, int64_t i, bool with_bias) const {
    const int64_t n = vocab_;
    Row row{std::vector<double>(n), std::vector<double>(n), 0};
    double max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double z = static_cast<double>(values[i * n + j]) + (with_bias ? bias_[j] : 0.0f);
      const double t = case_.softcap > 0 ? std::tanh(z / case_.softcap) : 0;
      row.log_p[j] = (case_.softcap > 0 ? case_.softcap * t : z) / case_.temperature;
      row.slope[j] = (case_.softcap > 0 ? 1 - t * t : 1) / case_.temperature;
      max = std::max(max, row.log_p[j]);
    }
    for (double v : row.log_p) sum += std::exp(v - max);
    row.lse = max + std::log(sum);
    for (double& v : row.log_p) v -= row.lse;
    return row;
  }

  Exact exact(int64_t i) const {
    const Row p = softmax(original_, i, case_.bias), q = softmax(reference_, i, false);
    Exact e{{p.log_p[targets_[i]], 0, p.lse, 0, 0, case_.reference ? q.lse : 0}, std::vector<double>(vocab_)};
    const bool reverse = case_.divergence == fastsft::Divergence::kReverse;
    const auto c = [&](int k) { return static_cast<double>(coefficients_[k * rows_ + i]); };
    for (int64_t j = 0; j < vocab_; ++j) {
      const double lp = p.log_p[j], lq = q.log_p[j];
      e.stats[1] -= std::exp(lp) * lp;
      e.stats[3] += lp / static_cast<double>(vocab_);
      if (case_.reference) e.stats[4] += reverse ? std::exp(lp) * (lp - lq) : std::exp(lq) * (lq - lp);
      const double u = c(0) * std::exp(lp) + c(1) * (j == targets_[i]) + c(2) + c(3) * std::exp(lp) * lp +
                       c(4) * std::exp(lp) * lq + c(5) * std::exp(lq);
      e.gradient[j] = u * p.slope[j];
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
  std::vector<float> bias_, reference_, stats_, coefficients_, original_;
  std::vector<uint16_t> reference_words_;
  std::vector<int64_t> targets_;
};
