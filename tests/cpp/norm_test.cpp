#include "fastsft/norm.h"

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

std::vector<float> normal(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(n);
  for (float& v : values) v = draw(random);
  return values;
}

struct Results {
  std::vector<float> out, scale, d_x, d_weight;
};

Results run(const std::vector<float>& x, const std::vector<float>& w, const std::vector<float>& g) {
  const int64_t size = static_cast<int64_t>(w.size()), rows = static_cast<int64_t>(x.size()) / size;
  Results r{std::vector<float>(x.size()), std::vector<float>(rows), std::vector<float>(x.size()), w};
  const RmsNorm norm{DType::kFloat32, x.data(), w.data(), rows, size, 1e-6f};
  rms_norm(norm, r.out.data(), r.scale.data());
  rms_norm_backward(norm, r.scale.data(), g.data(), r.d_x.data(), r.d_weight.data());
  return r;
}

void close(double got, double expected) { CHECK(std::fabs(got - expected) <= 2e-5 * (1 + std::fabs(expected))); }

}  // namespace

TEST(formulas_in_float64) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (int64_t size : {1, 5, 64, 77}) {
      const int64_t rows = 41;
      const auto x = normal(rows * size, 1), w = normal(size, 2), g = normal(rows * size, 3);
      const Results r = run(x, w, g);
      std::vector<double> d_weight(size, 0.0);
      for (int64_t i = 0; i < rows; ++i) {
        double squares = 0, products = 0;
        for (int64_t j = 0; j < size; ++j) squares += static_cast<double>(x[i * size + j]) * x[i * size + j];
        const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + 1e-6);
        for (int64_t j = 0; j < size; ++j) products += scale * x[i * size + j] * w[j] * g[i * size + j];
        for (int64_t j = 0; j < size; ++j) {
          const double hat = scale * x[i * size + j], dy = g[i * size + j];
          close(r.out[i * size + j], hat * w[j]);
          close(r.d_x[i * size + j], scale * (dy * w[j] - hat * products / static_cast<double>(size)));
          d_weight[j] += dy * hat;
        }
      }
      for (int64_t j = 0; j < size; ++j) close(r.d_weight[j], d_weight[j]);
    }
  }
}

TEST(bits_do_not_depend_on_threads) {
  set_isa(available_isas().back());
  const auto x = normal(3000 * 65, 1), w = normal(65, 2), g = normal(3000 * 65, 3);
  set_num_threads(1);
  const Results one = run(x, w, g);
  set_num_threads(5);
  const Results five = run(x, w, g);
  CHECK(one.out == five.out && one.d_x == five.d_x && one.d_weight == five.d_weight);
}

TEST_MAIN()
