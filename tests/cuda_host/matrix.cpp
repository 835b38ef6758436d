#include "matrix.h"

namespace cuda_host {
namespace {

constexpr int kWarp = 32;

template <typename T>
T& lane(void* const* lanes, int i) {
  return *static_cast<T*>(lanes[i]);
}

float half_element(uint32_t both, int i) { return half_to_float(static_cast<uint16_t>(both >> 16 * i)); }
float bfloat16_element(uint32_t both, int i) { return bfloat16_to_float(static_cast<uint16_t>(both >> 16 * i)); }
float tf32_element(uint32_t bits, int) { return std::bit_cast<float>(bits & 0xffffe000u); }

// kPair elements per register: 2 for 16 bits, 1 for tf32. The k index of element i of register halves 0 and 1 is
// kPair t + i and kPair t + i + 4 kPair.
template <int kPair, float (*kElement)(uint32_t, int)>
void mma(void* const* lanes) {
  float a[16][8 * kPair], b[8 * kPair][8], d[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const Mma& m = lane<Mma>(lanes, l);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < kPair; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int k = kPair * t + i + 4 * kPair * half;
        a[g][k] = kElement(m.a[2 * half], i);
        a[g + 8][k] = kElement(m.a[2 * half + 1], i);
        b[k][g] = kElement(m.b[half], i);
      }
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = m.d[i];
  }
  multiply(a, b, d, 8);
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) lane<Mma>(lanes, l).d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

}  // namespace

void shuffle_lanes(void* const* lanes) {
  for (int l = 0; l < kWarp; ++l) {
    Shuffle& self = lane<Shuffle>(lanes, l);
    const bool inside = self.source >= 0 && self.source < kWarp;
    self.result = lane<Shuffle>(lanes, inside ? self.source : l).value;
  }
}

void ballot_lanes(void* const* lanes) {
  uint32_t bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= static_cast<uint32_t>(lane<Shuffle>(lanes, l).value) << l;
  for (int l = 0; l < kWarp; ++l) lane<Shuffle>(lanes, l).result = bits;
}

void distribute_rows(void* const* lanes) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* const row = lane<MatrixRow>(lanes, 8 * i + l / 4).row + l % 4 * 2;
      lane<MatrixRow>(lanes, l).result[i] = row[0] | static_cast<uint32_t>(row[1]) << 16;
    }
  }
}

void transpose_rows(void* const* lanes) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * i + l % 4 * 2;
      lane<MatrixRow>(lanes, l).result[i] = lane<MatrixRow>(lanes, row).row[l / 4] |
                                            static_cast<uint32_t>(lane<MatrixRow>(lanes, row + 1).row[l / 4]) << 16;
    }
  }
}

void gather_rows(void* const* lanes) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      uint16_t* const row = lane<MatrixRow>(lanes, 8 * i + l / 4).row + l % 4 * 2;
      row[0] = static_cast<uint16_t>(lane<MatrixRow>(lanes, l).result[i]);
      row[1] = static_cast<uint16_t>(lane<MatrixRow>(lanes, l).result[i] >> 16);
    }
  }
}

void gather_columns(void* const* lanes) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * i + l % 4 * 2;
      lane<MatrixRow>(lanes, row).row[l / 4] = static_cast<uint16_t>(lane<MatrixRow>(lanes, l).result[i]);
      lane<MatrixRow>(lanes, row + 1).row[l / 4] = static_cast<uint16_t>(lane<MatrixRow>(lanes, l).result[i] >> 16);
    }
  }
}

void mma_bfloat16(void* const* lanes) { mma<2, bfloat16_element>(lanes); }
void mma_half(void* const* lanes) { mma<2, half_element>(lanes); }
void mma_tf32(void* const* lanes) { mma<1, tf32_element>(lanes); }

}  // namespace cuda_host
