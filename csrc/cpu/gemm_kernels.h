// Private to gemm.cpp and gemm.isa.cpp: one task of a product and the blocking that the instruction set asks for.
#pragma once

#include <cstdint>

#include "fastsft/gemm.h"
#include "fastsft/isa.h"

namespace fastsft {

struct GemmBlocking {
  int64_t rows, columns;  // of a register tile
  int64_t depth;          // products between two visits to C: a panel of B then fills two thirds of the L1 cache
};

// Rows [row, row_end) and columns [column, column_end) of C.
struct GemmTask {
  int64_t row, row_end, column, column_end;
};

FASTSFT_ISA_DECLARE(GemmBlocking, gemm_blocking, const Gemm& gemm)
// Bytes a task needs; `scratch` must be aligned to 64 bytes.
FASTSFT_ISA_DECLARE(int64_t, gemm_scratch_bytes, const Gemm& gemm, int64_t rows, int64_t columns)
FASTSFT_ISA_DECLARE(void, gemm_task, const Gemm& gemm, const GemmTask& task, char* scratch)

}  // namespace fastsft
