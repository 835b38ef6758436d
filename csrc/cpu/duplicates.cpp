// Texts to clusters. Of the signatures only the band keys are kept: 8 bytes for each band and text.
#include "fastsft/duplicates.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "buckets.h"
#include "fastsft/common.h"
#include "fastsft/memory.h"
#include "fastsft/parallel.h"
#include "forest.h"

namespace fastsft {
namespace {

struct Free {
  void operator()(int64_t* data) const { std::free(data); }
};

// Written once, read once: most of the cost of a large array of small pages is getting the pages.
std::unique_ptr<int64_t[], Free> huge_pages(int64_t count) {
  constexpr std::size_t kPage = std::size_t{2} << 20;
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(int64_t) + kPage) / kPage * kPage;
  void* data = std::aligned_alloc(kPage, bytes);
  if (data == nullptr) throw std::bad_alloc();
  advise_huge_pages(data, static_cast<int64_t>(bytes));
  return std::unique_ptr<int64_t[], Free>(static_cast<int64_t*>(data));
}

}  // namespace

void near_duplicates(const std::string_view* texts, int64_t n, const MinHashOptions& minhash, LshShape shape,
                     const LinkOptions& options, int64_t* labels) {
  const auto keys = huge_pages(shape.bands * n);
  minhash_lsh_keys(texts, n, minhash, shape, keys.get());
  std::vector<BucketList> bands(shape.bands);
  parallel_for(shape.bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) bands[b] = equal_keys(keys.get() + b * n, n);
  });
  BucketList all;
  for (const BucketList& band : bands) {
    const int64_t before = static_cast<int64_t>(all.members.size());
    all.members.insert(all.members.end(), band.members.begin(), band.members.end());
    for (std::size_t b = 1; b < band.offsets.size(); ++b) all.offsets.push_back(before + band.offsets[b]);
  }
  std::iota(labels, labels + n, int64_t{0});
  const Buckets buckets{all.members.data(), all.offsets.data(), static_cast<int64_t>(all.offsets.size()) - 1};
  link_similar(texts, n, buckets, options, nullptr, labels, n);
  for (int64_t i = 0; i < n; ++i) labels[i] = labels[labels[i]];  // parents before i are roots already
}

}  // namespace fastsft
