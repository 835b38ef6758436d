#include "shingle_sets.h"

namespace fastsft {

Fingerprint append_distinct(std::string_view text, const ShingleOptions& options, Shingler<uint64_t>& shingler,
                            ShingleTable& table, std::vector<uint64_t>& sets) {
  const std::size_t before = sets.size();
  Fingerprint print;
  table.clear(0);
  shingler.start(text, options);
  for (Shingles piece = shingler.next(); !piece.empty(); piece = shingler.next()) {
    const int64_t room = static_cast<int64_t>(print.size + piece.size());
    print.size == 0 ? table.clear(room) : table.grow(room);
    sets.resize(before + print.size + piece.size());
    uint64_t* out = sets.data() + before;
    for (const uint64_t shingle : piece) {
      const uint64_t h = shingle | (shingle == 0);  // the table's empty slots are 0
      if (!table.insert(h)) continue;
      out[print.size++] = h;
      print.sum += h;
      print.products += (h >> 32) * (h & 0xFFFFFFFFu);
    }
  }
  sets.resize(before + print.size);
  return print;
}

double SetComparer::similarity(SetView x, SetView y, double threshold) {
  const int64_t needed = least_common(x.size, y.size, threshold);
  if (needed > std::min(x.size, y.size)) return -1;
  if (in_table_ == y.id) std::swap(x, y);
  if (in_table_ != x.id) {
    table_.clear(static_cast<int64_t>(x.elements.size()));
    for (const uint64_t h : x.elements) table_.insert(h);
    in_table_ = x.id;
  }
  const int64_t common = count_common(table_, y.elements, needed);
  return common < needed ? -1 : jaccard(common, x.size, y.size);
}

void PrintIndex::clear() {
  prints_.clear();
  slots_.assign(8, 0);
}

uint32_t PrintIndex::add(const Fingerprint& print) {
  if (slots_.size() < 2 * prints_.size() + 2) {
    slots_.assign(std::bit_ceil(4 * prints_.size() + 8), 0);
    for (uint32_t i = 0; i < size(); ++i) slots_[slot(prints_[i])] = i + 1;
  }
  uint32_t& at = slots_[slot(print)];
  if (at == 0) {
    prints_.push_back(print);
    at = size();
  }
  return at - 1;
}

std::size_t PrintIndex::slot(const Fingerprint& print) const {
  const std::size_t mask = slots_.size() - 1;
  std::size_t at = print.sum & mask;
  while (slots_[at] != 0 && prints_[slots_[at] - 1] != print) at = (at + 1) & mask;
  return at;
}

void SetPool::clear() {
  if (large()) *this = SetPool();
  comparer_.forget();
  elements_.clear();
  begins_.clear();
  prints_.clear();
}

uint32_t SetPool::add(std::string_view text, const ShingleOptions& options) {
  const std::size_t begin = elements_.size();
  comparer_.forget();
  const uint32_t set = prints_.add(append_distinct(text, options, shingler_, comparer_.table(), elements_));
  comparer_.holds(set);
  if (set == begins_.size()) {
    begins_.push_back(begin);
  } else {
    elements_.resize(begin);
  }
  return set;
}

uint32_t SetPool::add(const Fingerprint& print, Shingles elements) {
  const uint32_t set = prints_.add(print);
  if (set == begins_.size()) {
    begins_.push_back(elements_.size());
    elements_.insert(elements_.end(), elements.begin(), elements.end());
  }
  return set;
}

}  // namespace fastsft
