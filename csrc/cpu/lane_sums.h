// Maxima and sums over the lanes of several vectors at a time. Included by *.isa.cpp only.
#pragma once

#include "simd.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

// reduced[i] = the maximum or the sum over the lanes of vectors[i], for i < count <= kLanes: one tree, however many
// vectors there are. The other vectors' contents are taken along; the vectors are overwritten, `reduced` has kLanes.
template <bool kMax>
FASTSFT_INLINE void reduce_lanes(Vec* vectors, int64_t count, float* reduced) {
  if (count > 4) return store(reduced, reduce_rows<kMax>(vectors));
  for (int64_t i = 0; i < count; ++i) reduced[i] = kMax ? max_lanes(vectors[i]) : sum_lanes(vectors[i]);
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
