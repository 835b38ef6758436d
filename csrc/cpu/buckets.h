// Private to csrc/cpu: rows with equal keys.
#pragma once

#include <cstdint>
#include <vector>

namespace fastsft {

struct BucketList {
  std::vector<int64_t> members;
  std::vector<int64_t> offsets{0};
};

// The groups of two or more equal keys [n]: members ascend within a bucket, and buckets by their first member.
BucketList equal_keys(const int64_t* keys, int64_t n);

}  // namespace fastsft
