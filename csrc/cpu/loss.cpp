#include "fastsft/loss.h"

#include "fastsft/isa.h"
#include "fastsft/parallel.h"

namespace fastsft {

FASTSFT_ISA_DECLARE(void, loss_stats_row, const LossTile&, Divergence, const LossStats&, int64_t row)
FASTSFT_ISA_DECLARE(void, loss_gradient_row, const LossTile&, const LossStats&, const LossCoefficients&, int64_t row)

void loss_stats(const LossTile& tile, Divergence divergence, const LossStats& stats) {
  FASTSFT_CHECK(tile.temperature > 0, "linear_cross_entropy: temperature: expected more than 0, got ",
                tile.temperature);
  const auto row = FASTSFT_ISA_SELECT(loss_stats_row);
  parallel_for(tile.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(tile, divergence, stats, i);
  });
}

void loss_gradient(const LossTile& tile, const LossStats& stats, const LossCoefficients& coefficients) {
  const auto row = FASTSFT_ISA_SELECT(loss_gradient_row);
  parallel_for(tile.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(tile, stats, coefficients, i);
  });
}

}  // namespace fastsft
