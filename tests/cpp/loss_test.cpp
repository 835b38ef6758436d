#include "fastsft/loss.h"

#include <algorithm>
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
    for (int64_t vocab : {1, 7, 31, 257, 1003, 5001}) {
      for (const LossCase& c : loss_cases()) {
        LossData data(5, vocab, c, 11);
        run(data);
        data.compare(isa_name(isa));
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
  many.logits[3 * 517 + 100] = NAN;
  run(many);
  for (int64_t i = 0; i < 9; ++i) {
    for (int64_t j = 0; j < 517; ++j) {
      const float a = one.logits[i * 517 + j], b = many.logits[i * 517 + j];
      CHECK(i == 3 ? std::isnan(b) : a == b);
    }
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
    for (int64_t j = 0; j < 40; ++j) CHECK(bias[j] == 0 ? std::isfinite(data.logits[j]) : data.logits[j] == 0);
  }
}

// The halves of a row, as blocks of the vocabulary: each with its own stats, and the gradient with the whole row's.
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
      for (int64_t j = 0; j < 40; ++j) CHECK((without.logits[j] == with.logits[j]) == (j != y));
    }
  }
}

TEST(rows_with_a_stride) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    LossData dense(3, 37, loss_cases().back(), 5);
    std::vector<float> apart(3 * 40, -7.0f), reference(3 * 40, 0.0f);
    const float* given = static_cast<const float*>(dense.tile().reference);
    for (int64_t i = 0; i < 3; ++i) {
      std::copy_n(dense.logits.data() + i * 37, 37, apart.data() + i * 40);
      std::copy_n(given + i * 37, 37, reference.data() + i * 40);
    }
    LossTile tile = dense.tile();
    tile.stride = 40;
    tile.logits = apart.data();
    tile.reference = reference.data();
    std::vector<float> values(18);
    float* row = values.data();
    const LossStats stats{row, row + 3, row + 6, row + 9, row + 12, row + 15};
    loss_stats(tile, dense.divergence(), stats);
    loss_gradient(tile, stats, dense.coefficients());
    run(dense);
    CHECK(values == dense.stats_values());
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t j = 0; j < 40; ++j) CHECK(apart[i * 40 + j] == (j < 37 ? dense.logits[i * 37 + j] : -7.0f));
    }
  }
}

TEST_MAIN()
