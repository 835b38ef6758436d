#include "fastsft/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "fastsft/rng.h"

namespace fastsft {
FASTSFT_ISA_DECLARE(void, gumbel_noise, const int32_t* indices, int64_t n, uint64_t seed, uint64_t position,
                    float* noise)
FASTSFT_ISA_DECLARE(void, exp_all, const float* x, int64_t n, float* y)
}  // namespace fastsft

using namespace fastsft;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Draw {
  std::vector<int64_t> ids;
  std::vector<float> logprobs;
  bool operator==(const Draw&) const = default;
};

// `rows` draws from copies of one row, at positions 0, 1, ...
Draw draw(const std::vector<float>& row, int64_t rows, float temperature, int32_t k = 0, float p = 1.0f,
          float min_p = 0.0f) {
  std::vector<float> logits, t(rows, temperature), top_p(rows, p), least(rows, min_p);
  std::vector<int32_t> top_k(rows, k);
  std::vector<int64_t> seeds(rows, 17), positions(rows);
  for (int64_t r = 0; r < rows; ++r) {
    logits.insert(logits.end(), row.begin(), row.end());
    positions[r] = r;
  }
  Draw out{std::vector<int64_t>(rows), std::vector<float>(rows)};
  sample(logits.data(), rows, static_cast<int64_t>(row.size()),
         {t.data(), top_k.data(), top_p.data(), least.data(), seeds.data(), positions.data()}, out.ids.data(),
         out.logprobs.data());
  return out;
}

std::vector<float> some_row(int64_t n) {
  std::vector<float> row(n);
  for (int64_t v = 0; v < n; ++v) row[v] = 8.0f * uniform_open(philox(2, 0, v).x[0]);
  return row;
}

}  // namespace

TEST(noise_is_the_formula_of_the_header) {
  std::vector<int32_t> indices(100000);
  for (std::size_t v = 0; v < indices.size(); ++v) indices[v] = static_cast<int32_t>(v);
  std::vector<float> noise(indices.size());
  FASTSFT_ISA_SELECT(gumbel_noise)(indices.data(), static_cast<int64_t>(indices.size()), 5, ~uint64_t{0}, noise.data());
  double worst = 0.0;
  for (std::size_t v = 0; v < indices.size(); ++v) {
    const uint32_t bits = philox(5, ~uint64_t{0}, v).x[0];
    const float w = std::min((static_cast<float>(static_cast<int32_t>(bits >> 1)) + 0.5f) * 0x1p-31f, 1 - 0x1p-24f);
    const double exact = -std::log(-std::log1p(-static_cast<double>(w)));
    worst = std::max(worst, std::abs(noise[v] - exact) / std::max(1.0, std::abs(exact)));
  }
  CHECK(worst < 4e-7);
}

TEST(exponential) {
  std::vector<float> x, y;
  for (float v = 0.0f; v > -95.0f; v -= 0.01f) x.push_back(v);
  x.push_back(-kInf);
  y.resize(x.size());
  FASTSFT_ISA_SELECT(exp_all)(x.data(), static_cast<int64_t>(x.size()), y.data());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(std::max(x[i], -87.0f)));
    CHECK(std::abs(y[i] - exact) <= 3e-7 * exact);
  }
}

TEST(instruction_sets_and_threads_do_not_matter) {
  for (const int64_t vocab : {1, 15, 16, 17, 1000, 5003}) {
    const std::vector<float> row = some_row(vocab);
    set_isa(Isa::kBase);
    set_num_threads(1);
    const Draw plain = draw(row, 50, 0.9f), filtered = draw(row, 50, 1.3f, 40, 0.8f, 0.01f);
    for (const Isa isa : available_isas()) {
      set_isa(isa);
      set_num_threads(3);
      CHECK(draw(row, 50, 0.9f) == plain);
      CHECK(draw(row, 50, 1.3f, 40, 0.8f, 0.01f) == filtered);
    }
  }
}

TEST(filters) {
  const std::vector<float> row{1.0f, 3.0f, 3.0f, -kInf, 2.0f};
  for (const int64_t id : draw(row, 300, 1.0f).ids) CHECK(id != 3);
  for (const int64_t id : draw(row, 300, 1.0f, 1).ids) CHECK(id == 1 || id == 2);  // both tie with the first
  for (const int64_t id : draw(row, 300, 1.0f, 0, 1e-6f).ids) CHECK(id == 1);
  for (const int64_t id : draw(row, 300, 1.0f, 0, 1.0f, 1.0f).ids) CHECK(id == 1 || id == 2);
  for (const int64_t id : draw(row, 5, 0.0f).ids) CHECK(id == 1);
  for (const int64_t id : draw(row, 5, 1e-30f).ids) CHECK(id == 1 || id == 2);
}

TEST(wrong_arguments) {
  CHECK_THROWS(draw({1.0f, std::numeric_limits<float>::quiet_NaN()}, 1, 1.0f), Error);
  CHECK_THROWS(draw({1.0f, kInf}, 1, 1.0f), Error);
  CHECK_THROWS(draw({-kInf, -kInf}, 1, 1.0f), Error);
  CHECK_THROWS(draw({1.0f}, 1, -1.0f), Error);
  CHECK_THROWS(draw({1.0f}, 1, 1.0f, -1), Error);
  CHECK_THROWS(draw({1.0f}, 1, 1.0f, 0, 0.0f), Error);
  CHECK_THROWS(draw({1.0f}, 1, 1.0f, 0, 1.0f, 1.1f), Error);
  CHECK(draw({1.0f}, 0, 1.0f).ids.empty());
}

TEST_MAIN()
