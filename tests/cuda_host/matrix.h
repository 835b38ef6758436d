// The arithmetic of warp operations, done once for all lanes by the last one that arrives. Sums over k are in float32,
// in ascending k, starting from the accumulator; a GPU adds the products of a step in an order and precision of its
// own.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace cuda_host {

inline float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the GPU's NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
  if (size >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  // Exponent and fraction in float32's places, times the difference of the biases: exact, subnormal or not.
  return std::copysign(std::bit_cast<float>(size << 13) * 0x1p112f, std::bit_cast<float>(sign));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), size = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above
  if (size < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the last bits
    const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f);
    return sign | static_cast<uint16_t>(sum - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
}

// D += A B of arrays of the emulator's own, which no sanitizer has to watch.
template <int kRows, int kDepth, int kColumns>
__attribute__((no_sanitize("address", "undefined"))) void multiply(const float (&a)[kRows][kDepth],
                                                                   const float (&b)[kDepth][kColumns],
                                                                   float (&d)[kRows][kColumns], int columns) {
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < columns; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
}

struct Shuffle {
  uint64_t value, result;
  int source;  // lane; outside the warp: own value
};
void shuffle_lanes(void* const* lanes);
void ballot_lanes(void* const* lanes);

struct MatrixRow {
  uint16_t row[8];
  uint32_t result[4];
};
void distribute_rows(void* const* lanes);
void transpose_rows(void* const* lanes);
void gather_rows(void* const* lanes);  // the inverses
void gather_columns(void* const* lanes);

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
void mma_bfloat16(void* const* lanes);
void mma_half(void* const* lanes);
void mma_tf32(void* const* lanes);

}  // namespace cuda_host
