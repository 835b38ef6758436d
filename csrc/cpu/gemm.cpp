#include "fastsft/gemm.h"

#include <algorithm>

#include "fastsft/parallel.h"
#include "gemm_kernels.h"
#include "scratch.h"

namespace fastsft {
namespace {

constexpr int64_t kMaxRows = 512;           // of a task: its block of A then fits half the L2 cache
constexpr int64_t kMaxTileBytes = 2 << 20;  // of a task's part of C in float32, which is visited once per depth block
constexpr int64_t kPackCost = 24;           // multiply-adds that take as long as packing one element
constexpr int64_t kSerialCost = 1 << 20;    // multiply-adds that take about as long as waking a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
  int64_t rows, columns;  // of C in a task
};

// Equal tasks that keep all threads busy and pack as little as possible twice.
Grid choose_grid(const Gemm& g, const GemmBlocking& tile, int threads) {
  const int64_t row_panels = ceil_div(g.m, tile.rows), column_panels = ceil_div(g.n, tile.columns);
  const bool many_blocks = g.k > tile.depth;
  Grid best{g.m, g.n};
  double best_cost = -1;
  for (int64_t parts = 1; parts <= row_panels; parts = parts < 16 ? parts + 1 : parts * 5 / 4) {
    const int64_t rows = ceil_div(row_panels, parts) * tile.rows;
    if (rows > kMaxRows && parts < row_panels) continue;
    for (int64_t cuts = 1; cuts <= column_panels; cuts = cuts < 16 ? cuts + 1 : cuts * 5 / 4) {
      const int64_t columns = ceil_div(column_panels, cuts) * tile.columns;
      if (many_blocks && rows * columns * 4 > kMaxTileBytes && cuts < column_panels) continue;
      const int64_t tasks = ceil_div(g.m, rows) * ceil_div(g.n, columns);
      const double task = static_cast<double>(rows * columns + kPackCost * (rows + columns));
      const double cost = task * static_cast<double>(ceil_div(tasks, threads));
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best = {rows, columns};
      }
    }
  }
  return best;
}

void check_matrix(const char* name, const Matrix& matrix) {
  FASTSFT_CHECK(matrix.row_stride == 1 || matrix.column_stride == 1, "gemm: ", name,
                ": expected a stride of 1 in one dimension, got strides ", matrix.row_stride, " and ",
                matrix.column_stride);
}

}  // namespace

void gemm(const Gemm& g) {
  check_matrix("a", g.a);
  check_matrix("b", g.b);
  if (g.m <= 0 || g.n <= 0 || (g.k <= 0 && g.accumulate)) return;
  const auto task = FASTSFT_ISA_SELECT(gemm_task);
  const auto scratch_bytes = FASTSFT_ISA_SELECT(gemm_scratch_bytes);
  const bool serial = static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(g.k) < kSerialCost;
  const Grid grid = choose_grid(g, FASTSFT_ISA_SELECT(gemm_blocking)(g), serial ? 1 : num_threads());
  const int64_t down = ceil_div(g.m, grid.rows), along = ceil_div(g.n, grid.columns);
  const int64_t bytes = scratch_bytes(g, std::min(grid.rows, g.m), std::min(grid.columns, g.n));
  parallel_for(down * along, serial ? down * along : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % down * grid.rows, column = i / down * grid.columns;
      const GemmTask part{row, std::min(row + grid.rows, g.m), column, std::min(column + grid.columns, g.n)};
      task(g, part, static_cast<char*>(thread_scratch(bytes)));
    }
  });
}

}  // namespace fastsft
