// Products of a few rows with a weight that is packed once and read many times: out = x W^T + bias, the linear layers
// of decoding. The weight is float32, bfloat16, or quantised and symmetric: 8 bits with one scale per output channel
// (int8, and W8A8, which quantises x too), 4 bits with one scale per group of input channels (int4).
//
// Exact in x: products and sums are float32, or bfloat16 dot products with float32 sums (subnormals flushed to zero)
// where the CPU has them and x is bfloat16. Except in W8A8: there a row of x is rounded to 8 bits on
// scale = max(largest magnitude / 127, 2^-126) per run of 128 input channels, to the integer nearest x * (1 / scale),
// ties to even, and the sum of a run is exact. A NaN or infinity makes its row NaN.
//
// A row of the result is a fixed sequence of sums over its row of x: its bits depend neither on the number of rows nor
// on the other rows nor on the number of threads.
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

enum class WeightFormat : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3, kW8A8 = 4 };

// A line is 64 bytes: 16 output channels (a panel; zero past n) times 1, 2, 4 or 8 input channels, by format. The lines
// stand in the order a product reads them: slabs of 4 panels, in a slab a line of each panel in turn.
// The layout is the same for every instruction set.
struct PackedWeight {
  WeightFormat format;
  int64_t n, k;      // output and input channels
  int64_t group;     // int4: input channels that share a scale, 32 or 64
  const void* data;  // packed_bytes(...), aligned to 64 for speed
  // int8, W8A8: float32 [slabs, 64]; int4: bfloat16 [slabs, groups, 64]; null otherwise
  const void* scales;
};

int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k);

// The rows of a weight as a model holds them, each contiguous.
struct WeightRows {
  DType dtype;
  const void* const* rows;  // [n]
};

// Fills the memory behind to.data and to.scales. int8 and W8A8: a channel's scale is its largest magnitude / 127, and
// values are rounded to v / scale. int4: a group's scale is its element of largest magnitude (the negative one of two)
// / -8, rounded to bfloat16, and values are rounded to v / scale and clamped to [-8, 7]. Ties go to even; a scale of 0
// stands for zeros. Throws Error for a NaN or infinity where values are quantised; the memory is then undefined.
void pack_weight(const PackedWeight& to, const WeightRows& from);

// The row-major values [n, k] behind `data`, without their scales: float, bfloat16 words, or int8_t.
void unpack_weight(WeightFormat format, int64_t n, int64_t k, const void* data, void* values);

struct PackedLinear {
  PackedWeight weight;
  DType dtype;  // of x and the residual
  int64_t rows;
  const void* x;         // [rows, k]
  const float* bias;     // [n] or null
  const void* residual;  // [rows, n] or null: added to the rounded product, then rounded again
  DType out_dtype;
  void* out;  // [rows, n], must not overlap x; may be the residual
};

// The weight is read from memory once per call up to 16 rows, beyond that 16 rows at a time. k = 0 gives the bias.
// Throws Error for a group that is neither 32 nor 64.
void packed_linear(const PackedLinear& call);

}  // namespace fastsft
