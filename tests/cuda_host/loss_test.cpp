// csrc/cuda/loss.cu in the emulator, against the float64 formula and against the CPU kernel.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "loss_cases.h"

using namespace fastsft;

namespace {

void run_cuda(const LossTile& tile, LossData& data) {
  cuda::loss_stats(tile, data.divergence(), data.stats(), nullptr);
  cuda::loss_gradient(tile, data.stats(), data.coefficients(), nullptr);
}

}  // namespace

TEST(every_option_against_float64) {
  for (int64_t vocab : {31, 1003}) {
    for (const LossCase& c : loss_cases()) {
      LossData data(2, vocab, c, 7);
      run_cuda(data.tile(), data);
      data.compare("cuda");
    }
  }
}

TEST(sixteen_bit_logits_agree_with_the_cpu_kernel) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    LossData gpu(4, 301, loss_cases().back(), 3), cpu(4, 301, loss_cases().back(), 3);
    const LossTile g = gpu.as(dtype), c = cpu.as(dtype);
    run_cuda(g, gpu);
    loss_stats(c, cpu.divergence(), cpu.stats());
    loss_gradient(c, cpu.stats(), cpu.coefficients());
    for (std::size_t i = 0; i < 24; ++i) {
      const float a = gpu.stats_values()[i], b = cpu.stats_values()[i];
      CHECK(std::fabs(a - b) < 1e-5f * std::fabs(b) + 1e-5f);
    }
    int different = 0;  // by more than one unit in the last place, or around 0
    for (std::size_t i = 0; i < gpu.words.size(); ++i) {
      const bool tiny = (gpu.words[i] & 0x7fff) < 0x2000 && (cpu.words[i] & 0x7fff) < 0x2000;
      different += !tiny && std::abs(gpu.words[i] - cpu.words[i]) > 1;
    }
    CHECK(different <= 2);
  }
}

TEST_MAIN()
