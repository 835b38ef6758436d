#include "fastsft/loss.h"

#include <cmath>

#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "loss_cases.h"

using namespace fastsft;

namespace {

void run(LossData& data) {
  loss_stats(data.tile(), data.divergence(), data.stats());
  loss_gradient(data.tile(), data.stats(), data.coefficients());
}

}  // namespace

TEST(every_option_against_float64) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (int64_t vocab : {1, 7, 31, 257, 1003, 5001}) {
        for (const LossCase& c : loss_cases()) {
          LossData data(5, vocab, c, 11, dtype);
          run(data);
          data.compare(isa_name(isa));
        }
      }
    }
  }
}

TEST(rows_do_not_depend_on_threads_or_neighbours) {
  set_isa(available_isas().back());
  LossData one(9, 517, loss_cases().back(), 5), many(9, 517, loss_cases().back(), 5);
  set_num_threads(1);
  run(one);
  set_num_threads(4);
  many.set(3, 100, NAN);
  run(many);
  for (int64_t i = 0; i < 9; ++i) {
    for (int64_t j = 0; j < 517; ++j) CHECK(i == 3 ? std::isnan(many.at(i, j)) : one.at(i, j) == many.at(i, j));
  }
}

TEST(a_class_that_the_bias_excludes_has_no_part) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    LossData data(1, 40, {.bias = true, .on_plogp = true}, 3);
    LossTile tile = data.tile();
    std::vector<float> bias(40, 0.0f);
    const int64_t target = 5;
    bias[7] = bias[39] = -INFINITY;
    tile.bias = bias.data();
    tile.targets = &target;
    loss_stats(tile, data.divergence(), data.stats());
    CHECK(std::isfinite(data.stats_values()[0]) && std::isfinite(data.stats_values()[1]));
    loss_gradient(tile, data.stats(), data.coefficients());
    for (int64_t j = 0; j < 40; ++j) CHECK(bias[j] == 0 ? std::isfinite(data.at(0, j)) : data.at(0, j) == 0);
  }
}

TEST(a_target_among_other_columns) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (int64_t target : {-1, 40, 41, -1000}) {
      LossData with(1, 40, {.uniform = true}, 3), without(1, 40, {.uniform = true}, 3);
      LossTile tile = without.tile();
      tile.targets = &target;
      loss_stats(tile, without.divergence(), without.stats());
      run(with);
      CHECK(without.stats_values()[0] == -INFINITY);
      for (std::size_t k = 1; k < 6; ++k) CHECK(without.stats_values()[k] == with.stats_values()[k]);
      loss_gradient(tile, without.stats(), without.coefficients());
      const int64_t y = with.tile().targets[0];
      for (int64_t j = 0; j < 40; ++j) CHECK((without.at(0, j) == with.at(0, j)) == (j != y));
    }
  }
}

TEST_MAIN()
