// Per token of N heads of K elements: x read, the result written, the token's K angles from cache: 8 N K bytes in
// float32, 4 N K in 16 bits; 3 flops an element. Memory-bound.
#include "fastsft/rope.h"

#include "partial.h"

namespace fastsft::FASTSFT_ISA_NS {

void rope_tokens(const Rope& rope, bool inverse, void* out, int64_t begin, int64_t end) {
  with_dtype(rope.dtype, [&]<DType kDType>() {
    const int64_t half = rope.size / 2;
    const float turn = inverse ? -1.0f : 1.0f;
    for (int64_t t = begin; t < end; ++t) {
      const void *const cos = element(kDType, rope.cos, t * half), *const sin = element(kDType, rope.sin, t * half);
      for (int64_t h = 0; h < rope.heads; ++h) {
        const int64_t at = (t * rope.heads + h) * rope.size;
        const void *const a = element(kDType, rope.x, at), *const b = element(kDType, rope.x, at + half);
        void *const out_a = element(kDType, out, at), *const out_b = element(kDType, out, at + half);
        for (int64_t j = 0; j < half; j += kLanes) {
          const Vec c = load_until(kDType, cos, j, half), s = load_until(kDType, sin, j, half) * turn;
          const Vec u = load_until(kDType, a, j, half), v = load_until(kDType, b, j, half);
          store_until(kDType, out_a, j, half, u * c - v * s);
          store_until(kDType, out_b, j, half, v * c + u * s);
        }
      }
    }
  });
}

}  // namespace fastsft::FASTSFT_ISA_NS
