// Search in ascending offsets, such as cu_seqlens.
#pragma once

#include <cstdint>

namespace fastsft::cuda {

// The last i in [from, n) with offsets[i] <= value, `from` if there is none. Steps that double, then halve: near `from`
// it takes one or two loads. Where offsets repeat (empty sequences) it is the last of them, the one that has `value`.
__device__ __forceinline__ int64_t last_not_above(const int64_t* offsets, int64_t n, int64_t from, int64_t value) {
  int64_t step = 1;
  while (from + step < n && offsets[from + step] <= value) {
    from += step;
    step *= 2;
  }
  for (step /= 2; step > 0; step /= 2) {
    if (from + step < n && offsets[from + step] <= value) from += step;
  }
  return from;
}

}  // namespace fastsft::cuda
