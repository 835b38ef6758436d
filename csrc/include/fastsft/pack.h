// Packing of sequences into bins of fixed capacity: best-fit decreasing, in O(n log(bins)).
//
// Sequences are taken longest first (equal lengths by ascending index). Each goes into the bin that it leaves fullest,
// the lowest-numbered one if several tie, or opens a new bin if it fits nowhere. The result depends on nothing else.
#pragma once

#include <cstdint>

namespace fastsft {

// lengths [n]; order [n] and offsets [n + 1] are written: bin b holds the indices order[offsets[b] .. offsets[b + 1]),
// in the order in which they were placed. Returns the number of bins; offsets beyond it are left alone. A sequence of
// length 0 is legal and takes no room. Throws Error for capacity < 1 and for a length that is negative or above the
// capacity, naming its index.
int64_t pack_best_fit(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* order, int64_t* offsets);

}  // namespace fastsft
