// Matrix product on the CPU: C = A B or C += A B, every operand row-major or transposed, accumulated in float32.
//
// The operands may be float32, bfloat16 or float16, also mixed. Two bfloat16 operands go through bfloat16 dot products
// where the CPU has them (exact products, float32 sums, subnormals flushed to zero); everything else is widened to
// float32. Element (i, j) of C is a fixed sequence of sums, whatever the number of threads; it is rounded to C's type
// once. C must not overlap A or B. Empty sizes are legal: with k = 0, C becomes 0 (or stays, if accumulating).
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

// Element (i, j) is data[i * row_stride + j * column_stride]; one of the strides is 1.
struct Matrix {
  DType dtype;
  const void* data;
  int64_t row_stride, column_stride;
};

struct Gemm {
  int64_t m, n, k;
  Matrix a;  // [m, k]
  Matrix b;  // [k, n]
  DType c_dtype;
  void* c;  // [m, n], columns contiguous
  int64_t c_stride;
  bool accumulate;  // C += A B; C's own value is read in its own type
};

// Throws Error if neither stride of an operand is 1.
void gemm(const Gemm& gemm);

}  // namespace fastsft
