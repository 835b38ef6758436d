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

// Rows lie apart: behind each there is padding, which must stay as it is.
class LossData {
 public:
  LossData(int64_t rows, int64_t vocab, const LossCase& c, unsigned seed,
           fastsft::DType dtype = fastsft::DType::kFloat32)
      : rows_(rows),
        vocab_(vocab),
        stride_(vocab / 8 * 8 + 8),
        dtype_(dtype),
        case_(c),
        random_(seed),
        logits_(draw_rows()),
        bias_(draw(vocab, 1.0f)),
        reference_(draw_rows()),
        stats_(6 * rows, NAN),
        coefficients_(draw(6 * rows, 1.0f)),
        original_(logits_) {
    for (int64_t i = 0; i < rows; ++i) targets_.push_back(static_cast<int64_t>(random_() % vocab));
    const bool used[] = {true, true, c.uniform, c.on_plogp, c.reference, c.reference};
    for (int64_t k = 0; k < 6 * rows; ++k) coefficients_[k] *= used[k / rows];
  }

  fastsft::LossTile tile() {
    return {.dtype = dtype_,
            .logits = logits_.data(),
            .rows = rows_,
            .vocab = vocab_,
            .stride = stride_,
            .targets = targets_.data(),
            .bias = case_.bias ? bias_.data() : nullptr,
            .reference = case_.reference ? reference_.data() : nullptr,
            .softcap = case_.softcap,
            .temperature = case_.temperature};
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

  // A logit, or what the gradient put in its place.
  float at(int64_t i, int64_t j) const { return value(logits_, i, j); }
  void set(int64_t i, int64_t j, float logit) {
    const uint32_t word = encoded(logit);
    std::memcpy(logits_.data() + (i * stride_ + j) * size(), &word, size());
  }

  void compare(const char* which) const {
    const double rounding = dtype_ == fastsft::DType::kFloat32    ? 4e-6
                            : dtype_ == fastsft::DType::kBFloat16 ? 0x1p-8
                                                                  : 0x1p-10;  // the smallest halves are coarser
    for (int64_t i = 0; i < rows_; ++i) {
      const Exact e = exact(i);
      for (int k = 0; k < 6; ++k) close(which, "stat", stats_[k * rows_ + i], e.stats[k], 1e-5, 1e-5);
      for (int64_t j = 0; j < vocab_; ++j) close(which, "gradient", at(i, j), e.gradient[j], rounding, 4e-6);
      const std::size_t end = (i * stride_ + vocab_) * size(), next = (i + 1) * stride_ * size();
      for (std::size_t b = end; b < next; ++b) CHECK(logits_[b] == kPadding);
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
  static constexpr unsigned char kPadding = 0xff;  // NaN in every type

  std::vector<float> draw(int64_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(n);
    for (float& v : values) v = normal(random_);
    return values;
  }

  std::vector<unsigned char> draw_rows() {
    const std::vector<float> values = draw(rows_ * vocab_, 3.0f);
    std::vector<unsigned char> bytes(rows_ * stride_ * size(), kPadding);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < vocab_; ++j) {
        const uint32_t word = encoded(values[i * vocab_ + j]);
        std::memcpy(bytes.data() + (i * stride_ + j) * size(), &word, size());
      }
    }
    return bytes;
  }

  std::size_t size() const { return dtype_ == fastsft::DType::kFloat32 ? 4 : 2; }

  // Truncated, and in float16 to normal numbers: which logits they are does not matter.
  uint32_t encoded(float x) const {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype_ == fastsft::DType::kFloat32) return bits;
    if (dtype_ == fastsft::DType::kBFloat16) return bits >> 16;
    if (std::isnan(x)) return 0x7e00;
    const uint32_t sign = bits >> 16 & 0x8000;
    return std::fabs(x) < 0x1p-14f ? sign : sign | ((bits & 0x7fffffff) - (112u << 23)) >> 13;
  }

  float value(const std::vector<unsigned char>& bytes, int64_t i, int64_t j) const {
    uint32_t word = 0;
    std::memcpy(&word, bytes.data() + (i * stride_ + j) * size(), size());
    if (dtype_ == fastsft::DType::kBFloat16) word <<= 16;
    if (dtype_ == fastsft::DType::kFloat16) {
      const int exponent = static_cast<int>(word >> 10 & 31), fraction = static_cast<int>(word & 1023);
      const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                         : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                         : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
      return word & 0x8000 ? -size : size;
    }
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }

  Row softmax(const std::vector<unsigned char>& bytes, int64_t i, bool with_bias) const {
    const int64_t n = vocab_;
    Row row{std::vector<double>(n), std::vector<double>(n), 0};
    double max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double z = static_cast<double>(value(bytes, i, j)) + (with_bias ? bias_[j] : 0.0f);
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

  static void close(const char* which, const char* what, double got, double expected, double relative,
                    double absolute) {
    const bool ok = std::fabs(got - expected) <= absolute + relative * std::fabs(expected);
    if (!ok) std::printf("%s %s: got %.9g, expected %.9g\n", which, what, got, expected);
    CHECK(ok);
  }

  int64_t rows_, vocab_, stride_;
  fastsft::DType dtype_;
  LossCase case_;
  std::mt19937 random_;
  std::vector<unsigned char> logits_;  // as they lie in memory
  std::vector<float> bias_;
  std::vector<unsigned char> reference_;
  std::vector<float> stats_, coefficients_;
  std::vector<unsigned char> original_;
  std::vector<int64_t> targets_;
};
