#include "shingle_sets.h"

namespace fastsft {

Fingerprint append_distinct(Shingles shingles, ShingleTable& table, std::vector<uint64_t>& sets) {
  table.clear(static_cast<int64_t>(shingles.size()));
  const std::size_t before = sets.size();
  sets.resize(before + shingles.size());
  uint64_t* out = sets.data() + before;
  Fingerprint print;
  for (const uint64_t shingle : shingles) {
    const uint64_t h = shingle | (shingle == 0);  // the table's empty slots are 0
    if (!table.insert(h)) continue;
    out[print.size++] = h;
    print.sum += h;
    print.products += (h >> 32) * (h & 0xFFFFFFFFu);
  }
  sets.resize(before + print.size);
  return print;
}

void SetPool::clear() {
  constexpr std::size_t kKept = std::size_t{1} << 20;
  shingler_.release_if_large();
  if (elements_.capacity() > kKept) {
    *this = SetPool();
    return;
  }
  in_table_ = -1;
  elements_.clear();
  begins_.clear();
  prints_.clear();
  by_print_.assign(8, 0);
}

uint32_t SetPool::add(std::string_view text, const ShingleOptions& options) {
  const int64_t count = shingler_.read(text, options);
  const int64_t begin = static_cast<int64_t>(elements_.size());
  const Fingerprint print =
      append_distinct(Shingles(shingler_.shingles(), static_cast<std::size_t>(count)), table_, elements_);
  const uint32_t number = find_or_append(print, size());
  if (number == size()) {
    begins_.push_back(begin);
    prints_.push_back(print);
  } else {
    elements_.resize(static_cast<std::size_t>(begin));
  }
  in_table_ = number;
  return number;
}

uint32_t SetPool::find_or_append(const Fingerprint& print, uint32_t number) {
  const auto slot = [&](const Fingerprint& wanted) {
    std::size_t at = wanted.sum & (by_print_.size() - 1);
    while (by_print_[at] != 0 && prints_[by_print_[at] - 1] != wanted) at = (at + 1) & (by_print_.size() - 1);
    return at;
  };
  if (by_print_.size() < 2 * prints_.size() + 2) {
    by_print_.assign(std::bit_ceil(4 * prints_.size() + 8), 0);
    for (uint32_t i = 0; i < size(); ++i) by_print_[slot(prints_[i])] = i + 1;
  }
  uint32_t& at = by_print_[slot(print)];
  if (at == 0) {
    at = number + 1;
    return number;
  }
  return at - 1;
}

double SetPool::similarity(uint32_t x, uint32_t y, double threshold) {
  const int64_t size_x = prints_[x].size, size_y = prints_[y].size, needed = least_common(size_x, size_y, threshold);
  if (needed > std::min(size_x, size_y)) return -1;
  if (in_table_ == y) std::swap(x, y);
  if (in_table_ != x) {
    const Shingles set = elements(x);
    table_.clear(static_cast<int64_t>(set.size()));
    for (const uint64_t h : set) table_.insert(h);
    in_table_ = x;
  }
  const int64_t common = count_common(table_, elements(y), needed);
  return common < needed ? -1 : jaccard(common, size_x, size_y);
}

}  // namespace fastsft
