// Clusters of near-duplicates from MinHash signatures, by banding: Leskovec, Rajaraman, Ullman, "Mining of Massive
// Datasets", chapter 3.
#pragma once

#include <cstdint>
#include <string_view>

#include "fastsft/minhash.h"

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

// One key for each band and row of signatures [n, num_perm]: equal where the columns of the band are. keys [bands, n]
// is written. A key is part of what an index on disk holds, and never changes: of columns c_0, c_1 .. as 64-bit words
// w_0 = c_0 + 2^32 c_1, w_1 = c_2 + 2^32 c_3 .., modulo 2^64:
//   h = 0x9E3779B97F4A7C15;  for each word: h = (h ^ w) * 0xBF58476D1CE4E5B9, h ^= h >> 31;
//   for a column left over: h = (h ^ c) * 0x94D049BB133111EB;  key = h ^ (h >> 29)
// Throws Error for bands or rows < 1 and bands * rows > num_perm.
void lsh_keys(const uint32_t* signatures, int64_t n, int64_t num_perm, LshShape shape, int64_t* keys);

// The same of minhash_signatures(texts [n], options), which are not kept.
void minhash_lsh_keys(const std::string_view* texts, int64_t n, const MinHashOptions& options, LshShape shape,
                      int64_t* keys);

// Two rows of signatures [n, num_perm] are a pair if they agree in all of some band (columns band * rows ..) and in at
// least threshold * num_perm columns. labels [n] becomes, for each row, the smallest index in its connected component.
// The result is exact: it depends on nothing but the definition. Identical rows are merged first, and two rows already
// connected are not compared, so duplicates cost linear time; rows that share a band but are not similar are compared
// pair by pair. Throws Error for bands or rows < 1, bands * rows > num_perm, n >= 2^32 - 1 or a threshold outside [0,
// 1].
void lsh_clusters(const uint32_t* signatures, int64_t n, int64_t num_perm, double threshold, LshShape shape,
                  int64_t* labels);

// The steps of lsh_clusters on the device `stream` (a cudaStream_t) belongs to, all pointers in its memory. The caller
// sorts between them; the labels come out the same whatever the sort does with equal keys:
//   1. parent = 0..n-1, duplicate = 0; sort rows by the keys of all columns; lsh_merge_duplicates
//   2. for each band: sort rows by its keys; lsh_link_neighbours
//   3. lsh_labels; for each band: sort rows by its keys and, among equal ones, by label; lsh_link_groups
//   4. lsh_labels
// Step 2 costs linear time and leaves few components in a band's bucket where rows are near-duplicates; step 3 compares
// every pair of a bucket whose rows have different labels, and so makes the result exact. Keys are 62 bits of a hash;
// what they bring together is compared column by column. Starts kernels only. Throws std::runtime_error for a launch
// that failed.
namespace cuda {

struct LshRows {
  const uint32_t* signatures;  // [n, num_perm]
  int64_t n, num_perm;         // n < 2^31
  int32_t* parent;             // [n]: union-find forest, each root the smallest of its component
  bool* duplicate;             // [n]: equal to another row, and left out of the bands
};

struct LshColumns {
  int64_t first, count;
};

// Rows in sorted order: keys [n] ascending, order [n] the rows they belong to, labels [n] (for lsh_link_groups)
// likewise.
struct LshOrder {
  const int64_t* keys;
  const int64_t* order;
  const int64_t* labels;
};

void lsh_keys(const LshRows& rows, LshColumns columns, int64_t* keys, void* stream);
void lsh_merge_duplicates(const LshRows& rows, const LshOrder& sorted, void* stream);
void lsh_link_neighbours(const LshRows& rows, LshColumns band, const LshOrder& sorted, double threshold, void* stream);
void lsh_link_groups(const LshRows& rows, LshColumns band, const LshOrder& sorted, double threshold, void* stream);
void lsh_labels(const LshRows& rows, int64_t* labels, void* stream);

}  // namespace cuda

// Columns of num_perm that have to be equal for a share of at least `threshold`.
inline int64_t lsh_needed(int64_t num_perm, double threshold) {
  int64_t needed = static_cast<int64_t>(threshold * static_cast<double>(num_perm));
  while (static_cast<double>(needed) / static_cast<double>(num_perm) < threshold) ++needed;
  return needed;
}

}  // namespace fastsft
