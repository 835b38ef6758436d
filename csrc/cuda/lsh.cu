// Clusters from MinHash signatures. Contract and order of the steps: fastsft/lsh.h.
//
// Traffic per row and band: the band's columns read once for its key (4 bytes each, in 32-byte sectors) and 8 bytes
// written; the sort, outside, about 200 bytes; per comparison two rows, 8 num_perm bytes, a warp each, 16 lanes' worth
// of compares per instruction. Comparisons are the candidates' number: one per row and band in lsh_link_neighbours, and
// in lsh_link_groups the pairs of a bucket that are not connected yet, for which 32 lookups of components are made at a
// time. The forest is ECL-CC's (Jaiganesh, Burtscher: "A high-performance connected components implementation for
// GPUs", HPDC 2018): roots are hooked under smaller roots by compare-and-swap, paths are halved by atomic minima.
#include <cstdint>

#include "fastsft/lsh.h"
#include "launch.h"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kLeftOut = INT64_MAX;  // the key of rows that are in no bucket; hashes are below 2^62

__device__ int32_t find(int32_t* parent, int32_t x) {
  for (int32_t above = atomic_load(parent + x); above != x;) {
    const int32_t next = atomic_load(parent + above);
    if (next == above) return above;
    atomic_min(parent + x, next);
    x = next;
    above = atomic_load(parent + x);
  }
  return x;
}

__device__ void join(int32_t* parent, int32_t x, int32_t y) {
  while (true) {
    x = find(parent, x);
    y = find(parent, y);
    if (x == y) return;
    const int32_t larger = max(x, y), smaller = min(x, y);
    if (atomic_cas(parent + larger, larger, smaller) == larger) return;
  }
}

// A warp's answer: are the two rows equal in the band's columns, and in `needed` of all?
__device__ bool similar(const LshRows& rows, LshColumns band, int64_t needed, int64_t i, int64_t j) {
  const uint32_t *x = rows.signatures + i * rows.num_perm, *y = rows.signatures + j * rows.num_perm;
  int64_t equal = 0;
  bool differs = false;
  for (int64_t c = lane_id(); c - lane_id() < rows.num_perm; c += kWarp) {
    const bool same = c < rows.num_perm && x[c] == y[c];
    equal += popcount(warp_ballot(same));
    differs = differs || (!same && c >= band.first && c < band.first + band.count);
  }
  return equal >= needed && !warp_any(differs);
}

__global__ void keys_kernel(LshRows rows, LshColumns columns, int64_t* keys) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows.n) return;
  if (rows.duplicate[i]) {
    keys[i] = kLeftOut;
    return;
  }
  const uint32_t* values = rows.signatures + i * rows.num_perm + columns.first;
  uint64_t h = 0x9E3779B97F4A7C15u;
  for (int64_t c = 0; c < columns.count; ++c) {
    h = (h ^ values[c]) * 0xBF58476D1CE4E5B9u;
    h ^= h >> 31;
  }
  keys[i] = static_cast<int64_t>((h * 0x94D049BB133111EBu) >> 2);
}

// One warp per sorted place: its row and the one before. Equal rows become duplicates of the first of their run.
__global__ void neighbours_kernel(LshRows rows, LshColumns columns, int64_t needed, LshOrder sorted,
                                  bool mark_duplicates) {
  const int64_t at = int64_t{blockIdx.x} * kWarps + warp_id() + 1;
  if (at >= rows.n || sorted.keys[at] != sorted.keys[at - 1] || sorted.keys[at] == kLeftOut) return;
  const int64_t i = sorted.order[at - 1], j = sorted.order[at];
  if (!similar(rows, columns, needed, i, j) || lane_id() != 0) return;
  join(rows.parent, static_cast<int32_t>(i), static_cast<int32_t>(j));
  if (mark_duplicates) rows.duplicate[j] = true;
}

// The first place from `at` on whose (key, label) is above; sorted by both. With any_label, whose key is.
__device__ int64_t past_run(const LshOrder& sorted, int64_t n, int64_t at, bool any_label) {
  const int64_t key = sorted.keys[at], label = sorted.labels[at];
  int64_t below = at, above = n;  // below is in the run
  while (above - below > 1) {
    const int64_t middle = below + (above - below) / 2;
    const bool inside = sorted.keys[middle] == key && (any_label || sorted.labels[middle] == label);
    (inside ? below : above) = middle;
  }
  return above;
}

// One warp per sorted place: its row against the later rows of its bucket that had another label.
__global__ void groups_kernel(LshRows rows, LshColumns band, int64_t needed, LshOrder sorted) {
  const int64_t at = int64_t{blockIdx.x} * kWarps + warp_id();
  if (at + 1 >= rows.n || sorted.keys[at] == kLeftOut || sorted.keys[at + 1] != sorted.keys[at]) return;
  const int64_t bucket_end = past_run(sorted, rows.n, at, true);
  const auto i = static_cast<int32_t>(sorted.order[at]);
  for (int64_t from = past_run(sorted, rows.n, at, false); from < bucket_end; from += kWarp) {
    const int64_t mine = from + lane_id();
    const bool apart =
        mine < bucket_end && find(rows.parent, static_cast<int32_t>(sorted.order[mine])) != find(rows.parent, i);
    for (uint32_t todo = warp_ballot(apart); todo != 0; todo &= todo - 1) {
      const auto j = static_cast<int32_t>(sorted.order[from + lowest_bit(todo)]);
      if (similar(rows, band, needed, i, j) && lane_id() == 0) join(rows.parent, i, j);
    }
  }
}

__global__ void labels_kernel(LshRows rows, int64_t* labels) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows.n) labels[i] = find(rows.parent, static_cast<int32_t>(i));
}

dim3 blocks_for(int64_t items, int per_block) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block));
}

}  // namespace

void lsh_keys(const LshRows& rows, LshColumns columns, int64_t* keys, void* stream) {
  launch<keys_kernel>(blocks_for(rows.n, kThreads), kThreads, 0, stream, rows, columns, keys);
}

void lsh_merge_duplicates(const LshRows& rows, const LshOrder& sorted, void* stream) {
  launch<neighbours_kernel>(blocks_for(rows.n, kWarps), kThreads, 0, stream, rows, LshColumns{0, rows.num_perm},
                            rows.num_perm, sorted, true);
}

void lsh_link_neighbours(const LshRows& rows, LshColumns band, const LshOrder& sorted, double threshold, void* stream) {
  launch<neighbours_kernel>(blocks_for(rows.n, kWarps), kThreads, 0, stream, rows, band,
                            lsh_needed(rows.num_perm, threshold), sorted, false);
}

void lsh_link_groups(const LshRows& rows, LshColumns band, const LshOrder& sorted, double threshold, void* stream) {
  launch<groups_kernel>(blocks_for(rows.n, kWarps), kThreads, 0, stream, rows, band,
                        lsh_needed(rows.num_perm, threshold), sorted);
}

void lsh_labels(const LshRows& rows, int64_t* labels, void* stream) {
  launch<labels_kernel>(blocks_for(rows.n, kThreads), kThreads, 0, stream, rows, labels);
}

}  // namespace fastsft::cuda
