#include "fastsft/rope.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "fastsft/isa.h"

using namespace fastsft;

TEST(turns_pairs_and_back) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (int64_t half : {1, 5, 16, 33}) {
      const int64_t tokens = 300, heads = 3, size = 2 * half;
      std::vector<float> x(tokens * heads * size), cos(tokens * half), sin(tokens * half), turned(x), back(x);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
      for (std::size_t i = 0; i < cos.size(); ++i) {
        cos[i] = std::cos(static_cast<float>(i));
        sin[i] = std::sin(static_cast<float>(i));
      }
      Rope turn{DType::kFloat32, x.data(), cos.data(), sin.data(), tokens, heads, size};
      rope(turn, false, turned.data());
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t j = 0; j < half; ++j) {
            const int64_t a = (t * heads + h) * size + j, b = a + half, at = t * half + j;
            CHECK(std::fabs(turned[a] - (x[a] * cos[at] - x[b] * sin[at])) < 1e-6f);
            CHECK(std::fabs(turned[b] - (x[b] * cos[at] + x[a] * sin[at])) < 1e-6f);
          }
        }
      }
      turn.x = turned.data();
      rope(turn, true, back.data());
      for (std::size_t i = 0; i < x.size(); ++i) CHECK(std::fabs(back[i] - x[i]) < 1e-6f);
    }
  }
}

TEST_MAIN()
