// Building costs one pass over the references and a sort of 16 bytes for each word and n.
#include "ngram_tables.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace fastsft {
namespace {

struct Place {
  uint64_t hash;
  uint32_t word;
};

bool same_words(const NgramIndex::Tables& tables, uint32_t a, uint32_t b, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    if (tables.word(a + k) != tables.word(b + k)) return false;
  }
  return true;
}

// Places of equal hash become n-grams: as a rule one, more where hashes collide.
void split(const NgramIndex::Tables& tables, std::vector<uint32_t> words, uint64_t hash, NgramLevel& level) {
  while (!words.empty()) {
    const uint32_t leader = words[0];
    const auto others = std::stable_partition(words.begin(), words.end(),
                                              [&](uint32_t w) { return same_words(tables, leader, w, level.n); });
    level.places.insert(level.places.end(), words.begin(), others);
    level.first.push_back(static_cast<uint32_t>(level.places.size()));
    level.hashes.push_back(hash);
    words.erase(words.begin(), others);
  }
}

NgramLevel make_level(const NgramIndex::Tables& tables, int64_t n, std::vector<Place> places) {
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.hash != b.hash ? a.hash < b.hash : a.word < b.word; });
  NgramLevel level{.n = n, .places = {}, .first = {0}, .hashes = {}, .slots = {}, .filter = {}};
  for (auto at = places.begin(); at != places.end();) {
    std::vector<uint32_t> words;
    const uint64_t hash = at->hash;
    for (; at != places.end() && at->hash == hash; ++at) words.push_back(at->word);
    split(tables, std::move(words), hash, level);
  }
  level.add_slots();
  return level;
}

}  // namespace

uint32_t NgramLevel::find(uint64_t hash, const Shingler<uint64_t>& text, int64_t i,
                          const NgramIndex::Tables& tables) const {
  const std::size_t mask = slots.size() - 1;
  for (std::size_t at = (hash >> 32) & mask; slots[at] != 0; at = (at + 1) & mask) {
    const uint32_t gram = slots[at] - 1;
    if (hashes[gram] != hash) continue;
    const uint32_t first_word = places[first[gram]];
    int64_t k = 0;
    while (k < n && text.word(i + k) == tables.word(static_cast<uint32_t>(first_word + k))) ++k;
    if (k == n) return gram;
  }
  return kNoGram;
}

void NgramLevel::add_slots() {
  slots.assign(std::bit_ceil(2 * hashes.size() + 2), 0);
  filter.assign(std::max<std::size_t>(std::bit_ceil(16 * hashes.size()) / 64, 1), 0);
  const std::size_t mask = slots.size() - 1;
  for (std::size_t gram = 0; gram < hashes.size(); ++gram) {
    std::size_t at = (hashes[gram] >> 32) & mask;
    while (slots[at] != 0) at = (at + 1) & mask;
    slots[at] = static_cast<uint32_t>(gram) + 1;
    filter[hashes[gram] & (filter.size() - 1)] |= filter_bits(hashes[gram]);
  }
}

int64_t NgramIndex::Tables::reference_of(uint32_t word) const {
  return std::upper_bound(first_word.begin(), first_word.end(), word) - first_word.begin() - 1;
}

NgramIndex::NgramIndex(const std::string_view* references, int64_t n, std::vector<int64_t> ngrams)
    : ngrams_(std::move(ngrams)) {
  FASTSFT_CHECK(!ngrams_.empty(), "ngram_index: ngrams: expected at least one length");
  for (std::size_t k = 0; k < ngrams_.size(); ++k) {
    FASTSFT_CHECK(ngrams_[k] > (k == 0 ? 0 : ngrams_[k - 1]),
                  "ngram_index: ngrams: expected different lengths >= 1 in ascending order, got ", ngrams_[k],
                  " at place ", k);
  }
  check_lengths("ngram_index", references, n);
  auto tables = std::make_unique<Tables>();
  tables->word_at.push_back(0);
  tables->first_word.push_back(0);
  std::vector<std::vector<Place>> places(ngrams_.size());
  Shingler<uint64_t> shingler;
  for (int64_t r = 0; r < n; ++r) {
    shingler.read(references[r], {ngrams_[0], ShingleUnit::kWord});
    const int64_t count = shingler.num_units(), before = tables->first_word.back();
    FASTSFT_CHECK(before + count < 0xFFFFFFFF, "ngram_index: references: expected fewer than 2^32 - 1 words in all");
    for (int64_t w = 0; w < count; ++w) {
      const std::string_view word = shingler.word(w);
      tables->letters.insert(tables->letters.end(), word.begin(), word.end());
      tables->word_at.push_back(static_cast<int64_t>(tables->letters.size()));
      tables->word_begin.push_back(static_cast<uint32_t>(shingler.word_begin(w)));
      tables->word_end.push_back(static_cast<uint32_t>(shingler.word_begin(w) + word.size()));
    }
    for (std::size_t k = 0; k < ngrams_.size(); ++k) {
      if (count < ngrams_[k]) break;
      const int64_t grams = shingler.read_units(count, ngrams_[k]);
      for (int64_t i = 0; i < grams; ++i) {
        places[k].push_back({shingler.shingles()[i], static_cast<uint32_t>(before + i)});
      }
    }
    tables->first_word.push_back(static_cast<uint32_t>(before + count));
    num_words_.push_back(count);
  }
  for (std::size_t k = 0; k < ngrams_.size(); ++k) {
    tables->levels.push_back(make_level(*tables, ngrams_[k], std::move(places[k])));
  }
  tables_ = std::move(tables);
}

NgramIndex::~NgramIndex() = default;

}  // namespace fastsft
