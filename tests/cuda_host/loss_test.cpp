// csrc/cuda/loss.cu in the emulator, against the float64 formula.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "loss_cases.h"

using namespace fastsft;

namespace {

void run(LossData& data) {
  cuda::loss_stats(data.tile(), data.divergence(), data.stats(), nullptr);
  cuda::loss_gradient(data.tile(), data.stats(), data.coefficients(), nullptr);
}

}  // namespace

// Fewer elements than threads, packs that do not fill the last round, single elements behind the last pack.
TEST(every_option_against_float64) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t vocab : {1, 31, 1003, 5003}) {
      for (const LossCase& c : loss_cases()) {
        LossData data(2, vocab, c, 7, dtype);
        run(data);
        data.compare("cuda");
      }
    }
  }
}

TEST(large_logits_lose_nothing) {
  LossData data(1, 300, {.temperature = 0.5f}, 3), shifted(1, 300, {.temperature = 0.5f}, 3);
  for (int64_t j = 0; j < 300; ++j) {
    data.set(0, j, std::round(data.at(0, j) * 64) / 64);
    shifted.set(0, j, data.at(0, j) + 4096);  // exact
  }
  run(data);
  run(shifted);
  for (int k : {0, 1}) CHECK(std::fabs(data.stats_values()[k] - shifted.stats_values()[k]) < 1e-5f);
}

TEST(a_nan_stays_in_its_row) {
  LossData clean(3, 1003, loss_cases().back(), 5), dirty(3, 1003, loss_cases().back(), 5);
  dirty.set(1, 100, NAN);
  run(clean);
  run(dirty);
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t j = 0; j < 1003; ++j) CHECK(i == 1 ? std::isnan(dirty.at(i, j)) : clean.at(i, j) == dirty.at(i, j));
    for (int k : {0, 1, 2, 3, 4}) CHECK(std::isnan(dirty.stats_values()[k * 3 + i]) == (i == 1));
  }
}

TEST(a_class_that_the_bias_excludes_has_no_part) {
  LossData data(1, 4000, {.bias = true, .on_plogp = true}, 3);
  LossTile tile = data.tile();
  std::vector<float> bias(4000, 0.0f);
  const int64_t target = 5;
  for (int64_t j = 7; j < 3500; ++j) bias[j] = -INFINITY;  // all that some threads see
  tile.bias = bias.data();
  tile.targets = &target;
  cuda::loss_stats(tile, data.divergence(), data.stats(), nullptr);
  for (int k : {0, 1, 2}) CHECK(std::isfinite(data.stats_values()[k]));
  cuda::loss_gradient(tile, data.stats(), data.coefficients(), nullptr);
  for (int64_t j = 0; j < 4000; ++j) CHECK(bias[j] == 0 ? std::isfinite(data.at(0, j)) : data.at(0, j) == 0);
}

TEST(a_target_among_other_columns) {
  for (int64_t target : {std::numeric_limits<int64_t>::min(), int64_t{-1}, int64_t{1003}, int64_t{1004}}) {
    LossData with(1, 1003, {.uniform = true}, 3), without(1, 1003, {.uniform = true}, 3);
    LossTile tile = without.tile();
    tile.targets = &target;
    cuda::loss_stats(tile, without.divergence(), without.stats(), nullptr);
    run(with);
    CHECK(without.stats_values()[0] == -INFINITY);
    for (std::size_t k = 1; k < 6; ++k) CHECK(without.stats_values()[k] == with.stats_values()[k]);
    cuda::loss_gradient(tile, without.stats(), without.coefficients(), nullptr);
    const int64_t y = with.tile().targets[0];
    for (int64_t j = 0; j < 1003; ++j) CHECK((without.at(0, j) == with.at(0, j)) == (j != y));
  }
}

TEST(no_rows_are_nothing_to_do_and_rows_elsewhere_than_at_16_bytes_are_refused) {
  LossData data(2, 31, {}, 1);
  LossTile tile = data.tile();
  tile.rows = 0;
  cuda::loss_stats(tile, data.divergence(), data.stats(), nullptr);
  CHECK(std::isnan(data.stats_values()[0]));
  tile = data.tile();
  tile.stride = 31;
  CHECK_THROWS(cuda::loss_stats(tile, data.divergence(), data.stats(), nullptr), Error);
  tile = data.tile();
  tile.logits = static_cast<char*>(tile.logits) + 4;
  CHECK_THROWS(cuda::loss_gradient(tile, data.stats(), data.coefficients(), nullptr), Error);
}

TEST_MAIN()
