// Against the formulas of the header over the whole vocabulary, in double.
#include "fastsft/penalties.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<double> expected(const float* logits, int64_t vocab, const int32_t* tokens, int64_t count, int64_t prompt,
                             const Penalties& p) {
  std::vector<double> out(logits, logits + vocab);
  for (int64_t v = 0; v < vocab; ++v) {
    int64_t all = 0, generated = 0;
    for (int64_t i = 0; i < count; ++i) {
      all += tokens[i] == v;
      generated += tokens[i] == v && i >= prompt;
    }
    if (all > 0) out[v] = out[v] > 0 ? out[v] / p.repetition : out[v] * p.repetition;
    out[v] -= static_cast<double>(p.frequency) * static_cast<double>(generated);
    if (generated > 0) out[v] -= p.presence;
  }
  return out;
}

bool close(double a, double b) { return a == b || std::abs(a - b) <= 2e-6 * (1 + std::abs(b)); }

}  // namespace

TEST(rows_are_the_formulas_and_do_not_depend_on_each_other) {
  for (const int64_t vocab : {1, 5, 300}) {
    for (const int64_t rows : {1, 2, 5}) {
      for (const int64_t prompt : {0, 3, 8}) {
        const int64_t first = 8, count = first + rows - 1;
        std::vector<int32_t> tokens(count);
        for (int64_t i = 0; i < count; ++i) {
          tokens[i] = static_cast<int32_t>(uniform_below(philox(1, vocab, i).x[0], static_cast<uint32_t>(vocab)));
        }
        std::vector<float> logits(rows * vocab);
        for (int64_t i = 0; i < rows * vocab; ++i) logits[i] = 6 * uniform_open(philox(2, rows, i).x[0]) - 3;
        logits[tokens[0]] = -kInf;
        std::vector<float> found = logits;
        const Penalties p{1.3f, 0.25f, -0.5f};
        penalise(found.data(), rows, vocab, tokens.data(), count, prompt, first, p);
        for (int64_t r = 0; r < rows; ++r) {
          const std::vector<double> want =
              expected(logits.data() + r * vocab, vocab, tokens.data(), first + r, prompt, p);
          std::vector<float> alone(logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab);
          penalise(alone.data(), 1, vocab, tokens.data(), first + r, prompt, first + r, p);
          for (int64_t v = 0; v < vocab; ++v) {
            CHECK(close(found[r * vocab + v], want[v]));
            CHECK(found[r * vocab + v] == alone[v]);
          }
        }
      }
    }
  }
}

TEST(nothing_stays_behind_from_another_call) {
  const std::vector<int32_t> many{0, 1, 2, 3, 3}, few{2};
  std::vector<float> big(1000, 1.0f), small(4, 1.0f);
  penalise(big.data(), 1, 1000, many.data(), 5, 0, 5, {2.0f, 1.0f, 1.0f});
  penalise(small.data(), 1, 4, few.data(), 1, 1, 1, {2.0f, 1.0f, 1.0f});
  CHECK(small == (std::vector<float>{1.0f, 1.0f, 0.5f, 1.0f}));
}

TEST(wrong_arguments) {
  std::vector<float> logits(4, 1.0f);
  const std::vector<int32_t> tokens{0, 3}, high{0, 4}, low{0, -1};
  CHECK_THROWS(penalise(logits.data(), 1, 4, high.data(), 2, 0, 2, {}), Error);
  CHECK_THROWS(penalise(logits.data(), 1, 4, low.data(), 2, 0, 2, {}), Error);
  CHECK_THROWS(penalise(logits.data(), 1, 4, tokens.data(), 2, 0, 2, {0.0f, 0.0f, 0.0f}), Error);
  CHECK_THROWS(penalise(logits.data(), 1, 4, tokens.data(), 2, 3, 2, {}), Error);
  CHECK_THROWS(penalise(logits.data(), 2, 4, tokens.data(), 2, 0, 2, {}), Error);
  penalise(logits.data(), 0, 4, nullptr, 0, 0, 0, {});
  CHECK(logits == std::vector<float>(4, 1.0f));
}

TEST_MAIN()
