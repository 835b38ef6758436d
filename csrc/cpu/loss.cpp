#include "fastsft/loss.h"

#include "fastsft/isa.h"
#include "fastsft/parallel.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(void, loss_rows_range, const LossRows&, int64_t begin, int64_t end)

void loss_rows(const LossRows& rows) {
  FASTSFT_CHECK(rows.temperature > 0, "loss_rows: temperature: expected more than 0, got ", rows.temperature);
  for (int64_t i = 0; i < rows.rows; ++i) {
    FASTSFT_CHECK(rows.targets[i] >= 0 && rows.targets[i] < rows.vocab,
                  "linear_cross_entropy: targets: expected ids in [0, ", rows.vocab, "), got ", rows.targets[i]);
  }
  const auto range = FASTSFT_ISA_SELECT(loss_rows_range);
  parallel_for(rows.rows, 4, [&](int64_t begin, int64_t end) { range(rows, begin, end); });
}

}  // namespace fastsft
