#include "fastsft/activation.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "fastsft/isa.h"

using namespace fastsft;

TEST(swiglu_and_its_gradient_in_float64) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (int64_t n : {1, 15, 40000}) {
      std::vector<float> gate(n), up(n), grad(n), out(n), d_gate(n), d_up(n);
      for (int64_t i = 0; i < n; ++i) {
        gate[i] = 20.0f * std::sin(static_cast<float>(i));
        up[i] = std::cos(static_cast<float>(i));
        grad[i] = std::sin(2.0f * static_cast<float>(i));
      }
      const SwiGlu unit{DType::kFloat32, gate.data(), up.data(), n};
      swiglu(unit, out.data());
      swiglu_backward(unit, grad.data(), d_gate.data(), d_up.data());
      for (int64_t i = 0; i < n; ++i) {
        const double x = gate[i], s = 1 / (1 + std::exp(-x)), g = grad[i];
        CHECK(std::fabs(out[i] - x * s * up[i]) < 4e-6);
        CHECK(std::fabs(d_gate[i] - g * up[i] * (s + x * s * (1 - s))) < 4e-6);
        CHECK(std::fabs(d_up[i] - g * x * s) < 4e-6);
      }
    }
  }
}

TEST_MAIN()
