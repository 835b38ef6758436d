// Clusters of near-duplicate texts with exact similarities: candidates share a band of their MinHash signatures
// (lsh.h), and a pair is linked where the Jaccard similarity of the two sets of shingles (shingles.h, hashes of 64
// bits) is at least the threshold. Two texts without shingles have similarity 1.
//
// Texts with the same set of shingles are one in everything below. Clusters are the connected components of the links,
// the same for any order of the texts, number of threads and instruction set. Where max_cluster > 0, a component of
// more than max_cluster distinct sets is made anew, as stars: in the order of the sets' hashes, each joins the most
// similar centre among its candidates (the first of equally similar ones) that it is linked with and whose star has
// fewer than max_cluster distinct sets, or else becomes a centre. A set is then linked with its centre directly, and is
// compared with centres whose stars have room, of which there is one at a time where all are similar.
#pragma once

#include <cstdint>
#include <string_view>

#include "fastsft/lsh.h"
#include "fastsft/minhash.h"
#include "fastsft/shingles.h"

namespace fastsft {

struct LinkOptions {
  double threshold = 0.7;
  ShingleOptions shingles;
  bool verify = true;       // false: every candidate pair is linked
  int64_t max_cluster = 0;  // 0: no limit
};

// Groups of candidates: bucket b holds the texts members[offsets[b] .. offsets[b + 1]), each pair of them a candidate.
struct Buckets {
  const int64_t* members;
  const int64_t* offsets;  // [count + 1]
  int64_t count;
};

// Joins, in the forest parent [num_rows], the linked pairs among the candidates. Text i is row rows[i] of the forest,
// or row i where rows is null; rows does not repeat. parent[r] <= r leads to the root of r's component, which is its
// smallest row; rows connected already are not compared, so that candidates may come in several calls, in any order.
// With max_cluster, one call must have all candidates of its rows, none of them connected before.
// Throws Error for members, offsets, rows or parents out of range or order, a threshold outside [0, 1], an ngram < 1, a
// max_cluster < 0, a text of 2^32 - 64 bytes or more and 2^32 - 1 texts or more.
void link_similar(const std::string_view* texts, int64_t n, const Buckets& buckets, const LinkOptions& options,
                  const int64_t* rows, int64_t* parent, int64_t num_rows);

// Texts to clusters: labels [n] becomes the smallest index in each text's cluster. minhash.ngram and minhash.unit are
// those of the links too. Throws as minhash_signatures, lsh_keys and link_similar do.
void near_duplicates(const std::string_view* texts, int64_t n, const MinHashOptions& minhash, LshShape shape,
                     const LinkOptions& options, int64_t* labels);

}  // namespace fastsft
