#include "fastsft/loss.h"

#include <cmath>

#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"
#include "loss_cases.h"

using namespace fastsft;

TEST(every_objective_and_option_against_float64) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (int64_t vocab : {1, 7, 31, 257, 1003, 5001}) {
      for (const LossCase& c : loss_cases()) {
        LossData data(5, vocab, c, 11);
        loss_rows(data.rows());
        data.compare(isa_name(isa));
      }
    }
  }
}

TEST(rows_do_not_depend_on_threads_or_neighbours) {
  set_isa(available_isas().back());
  LossData one(9, 517, loss_cases()[7], 5), many(9, 517, loss_cases()[7], 5);
  set_num_threads(1);
  loss_rows(one.rows());
  set_num_threads(4);
  many.logits[3 * 517 + 100] = NAN;
  loss_rows(many.rows());
  for (int64_t i = 0; i < 9; ++i) {
    for (int64_t j = 0; j < 517; ++j) {
      const float a = one.logits[i * 517 + j], b = many.logits[i * 517 + j];
      CHECK(i == 3 ? std::isnan(b) : a == b);
    }
  }
}

TEST(a_target_out_of_range_is_refused) {
  LossData data(2, 8, {}, 1);
  LossRows rows = data.rows();
  const int64_t bad[] = {0, 8};
  rows.targets = bad;
  CHECK_THROWS(loss_rows(rows), Error);
}

TEST_MAIN()
