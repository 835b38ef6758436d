// Clusters of near-duplicates from MinHash signatures, by banding: Leskovec, Rajaraman, Ullman, "Mining of Massive
// Datasets", chapter 3.
#pragma once

#include <cstdint>

namespace fastsft {

struct LshShape {
  int64_t bands;
  int64_t rows;
};

// The bands and rows, bands * rows <= num_perm, that minimise the sum of the areas of false candidates below and missed
// pairs above the threshold, weighted equally (datasketch's rule):
//   1/2 * integral 0..t of P(s) ds + 1/2 * integral t..1 of (1 - P(s)) ds,   P(s) = 1 - (1 - s^rows)^bands
// Throws Error for num_perm < 1 and a threshold outside [0, 1].
LshShape lsh_shape(int64_t num_perm, double threshold);

// Two rows of signatures [n, num_perm] are a pair if they agree in all of some band (columns band * rows ..) and in at
// least threshold * num_perm columns. labels [n] becomes, for each row, the smallest index in its connected component.
// The result is exact: it depends on nothing but the definition. Identical rows are merged first, and two rows already
// connected are not compared, so duplicates cost linear time; rows that share a band but are not similar are compared
// pair by pair. Throws Error for bands or rows < 1, bands * rows > num_perm, n >= 2^32 - 1 or a threshold outside [0,
// 1].
void lsh_clusters(const uint32_t* signatures, int64_t n, int64_t num_perm, double threshold, LshShape shape,
                  int64_t* labels);

}  // namespace fastsft
