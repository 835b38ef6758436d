// csrc/cuda/loss.cu, run on the host, against the float64 formula and against the CPU kernel.
#include "loss.cu"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "loss_cases.h"

using namespace fastsft;

namespace {

void run_cuda(const LossRows& rows) {
  cuda_host::launch(static_cast<unsigned>(rows.rows), cuda::kThreads, [&] {
    switch (rows.dtype) {
      case DType::kFloat32: return cuda::loss_rows_kernel<cuda::Float32>(rows);
      case DType::kBFloat16: return cuda::loss_rows_kernel<cuda::BFloat16>(rows);
      case DType::kFloat16: return cuda::loss_rows_kernel<cuda::Float16>(rows);
    }
  });
}

}  // namespace

TEST(every_objective_and_option_against_float64) {
  for (int64_t vocab : {31, 1003}) {
    for (const LossCase& c : loss_cases()) {
      LossData data(2, vocab, c, 7);
      run_cuda(data.rows());
      data.compare("cuda");
    }
  }
}

TEST(sixteen_bit_logits_agree_with_the_cpu_kernel) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    LossData gpu(4, 301, loss_cases()[0], 3), cpu(4, 301, loss_cases()[0], 3);
    LossRows g = gpu.as(dtype), c = cpu.as(dtype);
    run_cuda(g);
    loss_rows(c);
    for (int64_t i = 0; i < 4; ++i) CHECK(std::fabs(g.loss[i] - c.loss[i]) < 1e-5f * std::fabs(c.loss[i]) + 1e-6f);
    int different = 0;
    for (std::size_t i = 0; i < gpu.words.size(); ++i) different += std::abs(gpu.words[i] - cpu.words[i]) > 1;
    CHECK(different == 0);
  }
}

TEST(a_barrier_that_not_all_threads_reach_is_reported) {
  CHECK_THROWS(cuda_host::launch(1, 64,
                                 [] {
                                   if (threadIdx.x < 32) __syncthreads();
                                 }),
               std::logic_error);
  CHECK_THROWS(cuda_host::launch(1, 32,
                                 [] {
                                   if (threadIdx.x != 5) cuda::shuffle_xor(1.0f, 1);
                                 }),
               std::logic_error);
}

TEST(half_conversion_round_trips) {
  for (int bits = 0; bits < 65536; ++bits) {
    const float value = cuda::half_to_float(static_cast<uint16_t>(bits));
    if (!std::isnan(value)) CHECK(cuda::float_to_half(value) == bits);
  }
}

TEST_MAIN()
