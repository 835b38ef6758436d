// Traffic per token: about 4 bytes of text read, the id written twice, once to the task's store and once to its place.
// The time is that of splitting into pretokens and, for those not in the cache, the look-ups in the merge table.
#include "fastsft/bpe_texts.h"

#include <algorithm>
#include <memory>
#include <mutex>

#include "fastsft/parallel.h"

namespace fastsft {
namespace {

constexpr int64_t kTextsPerTask = 8;

}  // namespace

BpeTexts::BpeTexts(const ByteBpe& encoder, const std::vector<std::string_view>& texts)
    : stores_((texts.size() + kTextsPerTask - 1) / kTextsPerTask), cu_seqlens_(texts.size() + 1), exact_(texts.size()) {
  std::mutex mutex;
  std::vector<std::unique_ptr<BpeCache>> idle;
  parallel_for(static_cast<int64_t>(texts.size()), kTextsPerTask, [&](int64_t first, int64_t last) {
    std::vector<int32_t>& store = stores_[static_cast<std::size_t>(first / kTextsPerTask)];
    std::vector<uint32_t> unknown;
    std::unique_ptr<BpeCache> cache;
    {
      const std::lock_guard lock(mutex);
      if (!idle.empty()) {
        cache = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!cache) cache = std::make_unique<BpeCache>();
    for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last); ++i) {
      const std::size_t before = store.size();
      exact_[i] = encoder.encode(texts[i], store, unknown, cache.get());
      cu_seqlens_[i + 1] = static_cast<int64_t>(store.size() - before);
    }
    const std::lock_guard lock(mutex);
    unknown_.insert(unknown_.end(), unknown.begin(), unknown.end());
    idle.push_back(std::move(cache));
  });
  for (std::size_t i = 0; i < texts.size(); ++i) cu_seqlens_[i + 1] += cu_seqlens_[i];
  std::sort(unknown_.begin(), unknown_.end());
  unknown_.erase(std::unique(unknown_.begin(), unknown_.end()), unknown_.end());
}

void BpeTexts::write(int32_t* ids, int64_t* cu_seqlens, uint8_t* exact) const {
  parallel_for(static_cast<int64_t>(exact_.size()), kTextsPerTask, [&](int64_t first, int64_t) {
    const std::vector<int32_t>& store = stores_[static_cast<std::size_t>(first / kTextsPerTask)];
    std::copy(store.begin(), store.end(), ids + cu_seqlens_[static_cast<std::size_t>(first)]);
  });
  std::copy(cu_seqlens_.begin(), cu_seqlens_.end(), cu_seqlens);
  std::copy(exact_.begin(), exact_.end(), exact);
}

}  // namespace fastsft
