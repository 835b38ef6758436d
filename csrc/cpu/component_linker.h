// Private to csrc/cpu: links the similar texts of one connected component of candidates (duplicates.h).
//
// Per text of a bucket that is not connected yet: one pass of the shingler and one insertion per shingle. In a small
// bucket, per pair not yet connected: at most one probe per shingle. A large bucket is joined by an index of rare
// shingles (set_join.h): texts that share a header, but too little for the threshold, are not compared with each other.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "fastsft/duplicates.h"
#include "forest.h"
#include "shingle_sets.h"
#include "stars.h"

namespace fastsft {

// What every thread sees. Entries of set_of and of the links' parents belong to one component each.
struct LinkJob {
  const std::string_view* texts;
  const Buckets& buckets;
  const LinkOptions& options;
  Forest<uint32_t> links;
  uint32_t* set_of;  // [n]: number of the text's set in its component's pool, or kNoSet
};

constexpr uint32_t kNoSet = ~uint32_t{0};

// One component at a time, given by the numbers of its buckets.
class ComponentLinker {
 public:
  void run(const LinkJob& job, std::span<const int64_t> buckets);
  void run_with_all_threads(const LinkJob& job, std::span<const int64_t> buckets);
  void release_if_large();

 private:
  void link(const LinkJob& job, std::span<const int64_t> buckets, bool all_threads);
  void own(const LinkJob& job, uint32_t text, uint32_t set);
  void read(const LinkJob& job, uint32_t text);
  void read_all(const LinkJob& job, std::span<const int64_t> buckets);
  void distinct_sets(const LinkJob& job, int64_t bucket, std::vector<uint32_t>& sets);
  std::vector<int64_t> join_large(const LinkJob& job, std::span<const int64_t> buckets);
  bool compare_all(const LinkJob& job, int64_t bucket, SetComparer& comparer, std::vector<uint32_t>& sets,
                   int64_t& failures);
  void cap(const LinkJob& job, std::span<const int64_t> buckets);
  Stars make_stars(const LinkJob& job, std::span<const int64_t> buckets, const std::vector<uint32_t>& order,
                   const std::vector<uint32_t>& place);

  SetPool pool_;
  std::vector<uint32_t> owners_;  // for each set the first text that was found to have it
  std::vector<uint32_t> sets_, texts_;
};

}  // namespace fastsft
