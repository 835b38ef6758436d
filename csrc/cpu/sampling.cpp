// Rows are independent. Per row: one pass for the maximum, one for the log-probability, then passes and sorting only
// for the filters that are on. Only tokens that can still win get noise: those within the noise's range of the best.
#include "fastsft/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(float, row_max, const float* x, int64_t n)
FASTSFT_ISA_DECLARE(double, sum_exp, const float* x, int64_t n, float max, float temperature)
FASTSFT_ISA_DECLARE(void, exp_all, const float* x, int64_t n, float* y)
FASTSFT_ISA_DECLARE(int64_t, collect, const float* x, int64_t n, float max, float temperature, float least, float floor,
                    int32_t* indices, float* z)
FASTSFT_ISA_DECLARE(void, gumbel_noise, const int32_t* indices, int64_t n, uint64_t seed, uint64_t position,
                    float* noise)

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNoiseRange = 23.0f;                     // above the largest noise, 22.2
constexpr float kDepths[] = {4.0f, 12.0f, 36.0f, kInf};  // how far below the maximum to look for a filter's survivors

struct Candidate {
  float z;
  int32_t index;
};

// The candidates of one row, as parallel arrays for the kernels. Reused from row to row.
struct Candidates {
  std::vector<int32_t> index;
  std::vector<float> z, extra;
  std::vector<Candidate> sorted;
  int64_t count = 0;

  void fit(int64_t vocab) {
    if (static_cast<int64_t>(z.size()) >= vocab + 16) return;
    index.resize(vocab + 16);
    z.resize(vocab + 16);
    extra.resize(vocab + 16);
  }

  void sort() {
    sorted.resize(count);
    for (int64_t i = 0; i < count; ++i) sorted[i] = {z[i], index[i]};
    std::sort(sorted.begin(), sorted.end(),
              [](const Candidate& a, const Candidate& b) { return a.z != b.z ? a.z > b.z : a.index < b.index; });
    for (int64_t i = 0; i < count; ++i) {
      z[i] = sorted[i].z;
      index[i] = sorted[i].index;
    }
  }
};

// One row and its parameters; the methods narrow `kept` as sampling.h says.
class Row {
 public:
  Row(const float* logits, int64_t vocab, float max, float temperature, Candidates& kept)
      : logits_(logits), vocab_(vocab), max_(max), temperature_(temperature), kept_(kept) {
    kept_.fit(vocab);
  }

  void keep_above(float floor) { collect_from(-kInf, floor); }

  void keep_top_k(int64_t k) {
    for (const float depth : kDepths) {
      kept_.count = FASTSFT_ISA_SELECT(collect)(logits_, vocab_, max_, 1.0f, max_ - depth, -kInf, kept_.index.data(),
                                                kept_.z.data());
      if (kept_.count >= k) break;
    }
    if (kept_.count < k) return collect_from(-kInf, -kInf);  // fewer than k tokens are allowed at all
    for (int64_t i = 0; i < kept_.count; ++i) kept_.extra[i] = logits_[kept_.index[i]];
    std::nth_element(kept_.extra.begin(), kept_.extra.begin() + (k - 1), kept_.extra.begin() + kept_.count,
                     std::greater<>());
    collect_from(kept_.extra[k - 1], -kInf);
  }

  // Of the survivors of top-k, or of the whole row if there was none.
  void keep_top_p(float top_p, bool after_top_k) {
    if (after_top_k) {
      kept_.sort();
      FASTSFT_ISA_SELECT(exp_all)(kept_.z.data(), kept_.count, kept_.extra.data());
      double total = 0.0;
      for (int64_t i = 0; i < kept_.count; ++i) total += kept_.extra[i];
      take_prefix(static_cast<double>(top_p) * total);
      return;
    }
    const double wanted = static_cast<double>(top_p) * FASTSFT_ISA_SELECT(sum_exp)(logits_, vocab_, max_, temperature_);
    for (const float depth : kDepths) {
      collect_from(-kInf, -depth);
      kept_.sort();
      FASTSFT_ISA_SELECT(exp_all)(kept_.z.data(), kept_.count, kept_.extra.data());
      if (take_prefix(wanted)) break;
    }
  }

  void keep_min_p(float min_p) {
    FASTSFT_ISA_SELECT(exp_all)(kept_.z.data(), kept_.count, kept_.extra.data());
    int64_t count = 0;
    for (int64_t i = 0; i < kept_.count; ++i) {
      if (kept_.extra[i] < min_p) continue;
      kept_.z[count] = kept_.z[i];
      kept_.index[count++] = kept_.index[i];
    }
    kept_.count = count;
  }

  int64_t draw(uint64_t seed, uint64_t position) {
    FASTSFT_ISA_SELECT(gumbel_noise)(kept_.index.data(), kept_.count, seed, position, kept_.extra.data());
    float best = -kInf;
    int32_t id = std::numeric_limits<int32_t>::max();
    for (int64_t i = 0; i < kept_.count; ++i) {
      const float score = kept_.z[i] + kept_.extra[i];
      if (score > best || (score == best && kept_.index[i] < id)) {
        best = score;
        id = kept_.index[i];
      }
    }
    return id;
  }

 private:
  void collect_from(float least, float floor) {
    kept_.count = FASTSFT_ISA_SELECT(collect)(logits_, vocab_, max_, temperature_, least, floor, kept_.index.data(),
                                              kept_.z.data());
  }

  // Cuts the sorted candidates, with probabilities in `extra`, where their sum reaches `wanted`.
  bool take_prefix(double wanted) {
    double sum = 0.0;
    for (int64_t i = 0; i < kept_.count; ++i) {
      sum += kept_.extra[i];
      if (sum >= wanted) {
        kept_.count = i + 1;
        return true;
      }
    }
    return false;
  }

  const float* logits_;
  int64_t vocab_;
  float max_, temperature_;
  Candidates& kept_;
};

int64_t draw_row(const float* logits, int64_t vocab, float max, const SamplingRows& p, int64_t r,
                 Candidates& candidates) {
  const float temperature = p.temperature[r];
  const int64_t greedy = std::find(logits, logits + vocab, max) - logits;
  if (temperature == 0.0f) return greedy;
  const uint64_t seed = static_cast<uint64_t>(p.seeds[r]), position = static_cast<uint64_t>(p.positions[r]);
  Row row(logits, vocab, max, temperature, candidates);
  const bool top_k = p.top_k[r] > 0 && p.top_k[r] < vocab;
  const bool top_p = p.top_p[r] < 1.0f;
  if (top_k) row.keep_top_k(p.top_k[r]);
  if (top_p) row.keep_top_p(p.top_p[r], top_k);
  if (!top_k && !top_p) {
    const int32_t index = static_cast<int32_t>(greedy);
    float noise;
    FASTSFT_ISA_SELECT(gumbel_noise)(&index, 1, seed, position, &noise);
    row.keep_above(noise - kNoiseRange);  // the most likely token scores `noise`: no other wins from further below
  }
  if (p.min_p[r] > 0.0f) row.keep_min_p(p.min_p[r]);
  return row.draw(seed, position);
}

void check_parameters(const SamplingRows& p, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    FASTSFT_CHECK(p.temperature[r] >= 0.0f && p.temperature[r] < kInf,
                  "sample: temperature: expected a finite number >= 0 at row ", r, ", got ", p.temperature[r]);
    FASTSFT_CHECK(p.top_k[r] >= 0, "sample: top_k: expected an integer >= 0 at row ", r, ", got ", p.top_k[r]);
    FASTSFT_CHECK(p.top_p[r] > 0.0f && p.top_p[r] <= 1.0f, "sample: top_p: expected a number in (0, 1] at row ", r,
                  ", got ", p.top_p[r]);
    FASTSFT_CHECK(p.min_p[r] >= 0.0f && p.min_p[r] <= 1.0f, "sample: min_p: expected a number in [0, 1] at row ", r,
                  ", got ", p.min_p[r]);
  }
}

}  // namespace

void sample(const float* logits, int64_t rows, int64_t vocab, const SamplingRows& parameters, int64_t* ids,
            float* logprobs) {
  FASTSFT_CHECK(vocab >= 1 && vocab <= std::numeric_limits<int32_t>::max(),
                "sample: logits: expected 1 to 2^31 - 1 columns, got ", vocab);
  check_parameters(parameters, rows);
  std::vector<float> max(rows);
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    static thread_local Candidates candidates;
    for (int64_t r = begin; r < end; ++r) {
      const float* row = logits + r * vocab;
      max[r] = FASTSFT_ISA_SELECT(row_max)(row, vocab);
      if (!(max[r] > -kInf)) continue;  // reported below, in the order of the rows
      ids[r] = draw_row(row, vocab, max[r], parameters, r, candidates);
      const double log_sum = std::log(FASTSFT_ISA_SELECT(sum_exp)(row, vocab, max[r], 1.0f));
      logprobs[r] = static_cast<float>(static_cast<double>(row[ids[r]]) - static_cast<double>(max[r]) - log_sum);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    FASTSFT_CHECK(!std::isnan(max[r]), "sample: logits: expected finite numbers or -inf, got NaN or +inf in row ", r);
    FASTSFT_CHECK(max[r] > -kInf, "sample: logits: expected a token that is not -inf, got none in row ", r);
  }
}

}  // namespace fastsft
