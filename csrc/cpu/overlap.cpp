// Per text: its words and the hashes of its n-grams of the smallest n (shingles.isa.cpp), one word of a filter for each
// of these, and for the few that pass a probe of the table and a comparison of words. An n-gram of a larger n is looked
// up only where the smaller one at its place is shared. The filter has 16 to 32 bits for each n-gram of the index: for
// a few hundred evaluation instances it lies in the second-level cache, and about one in a hundred passes by chance.
#include "fastsft/overlap.h"

#include <algorithm>
#include <atomic>

#include "fastsft/parallel.h"
#include "ngram_tables.h"

namespace fastsft {
namespace {

constexpr int64_t kTextsPerTask = 64;

// Finds what one text after the other shares with the references.
class Matcher {
 public:
  // found: a flag for each reference, which the threads share.
  Matcher(const NgramIndex& index, const std::vector<double>* above, uint8_t* found)
      : tables_(index.tables()), above_(above), found_(found), shared_(tables_.levels.size()) {}

  void match(std::string_view text, int64_t number, Shingler<uint64_t>& shingler, Overlaps& out) {
    for (auto& places : shared_) places.clear();
    find_shared(text, shingler);
    if (shared_[0].empty()) return;
    for (std::size_t k = 0; k < shared_.size(); ++k) expand(tables_.levels[k], shared_[k]);
    append(number, out);
  }

 private:
  // The distinct n-grams of the index that occur in the text, by number, in no order and perhaps several times.
  void find_shared(std::string_view text, Shingler<uint64_t>& shingler) {
    const NgramLevel& smallest = tables_.levels[0];
    const int64_t count = shingler.read(text, {smallest.n, ShingleUnit::kWord});
    if (shingler.num_units() < smallest.n) return;
    const uint64_t* hashes = shingler.shingles();
    for (int64_t i = 0; i < count; ++i) {
      if (!smallest.may_have(hashes[i])) continue;
      uint32_t gram = smallest.find(hashes[i], shingler, i, tables_);
      for (std::size_t k = 0; gram != kNoGram;) {
        shared_[k].push_back(gram);
        if (++k == shared_.size()) break;
        const NgramLevel& level = tables_.levels[k];
        if (i + level.n > shingler.num_units()) break;
        gram = level.find(shingler.shingle_at(i, level.n), shingler, i, tables_);
      }
    }
  }

  // Numbers of n-grams -> all their places in the references, ascending.
  void expand(const NgramLevel& level, std::vector<uint32_t>& grams) {
    std::sort(grams.begin(), grams.end());
    grams.erase(std::unique(grams.begin(), grams.end()), grams.end());
    places_.clear();
    for (const uint32_t gram : grams) {
      places_.insert(places_.end(), level.places.begin() + level.first[gram],
                     level.places.begin() + level.first[gram + 1]);
    }
    std::sort(places_.begin(), places_.end());
    grams.swap(places_);
  }

  void append(int64_t number, Overlaps& out) {
    const std::size_t lengths = shared_.size(), before = out.shared.size();
    std::vector<std::size_t> at(lengths, 0);
    std::vector<Shared> row(lengths);
    double best = -1.0;
    while (at[0] < shared_[0].size()) {
      const int64_t reference = tables_.reference_of(shared_[0][at[0]]);
      const uint32_t end = tables_.first_word[reference + 1];
      for (std::size_t k = 0; k < lengths; ++k) {
        const std::size_t begin = at[k];
        while (at[k] < shared_[k].size() && shared_[k][at[k]] < end) ++at[k];
        row[k] = summarise(tables_.levels[k].n, shared_[k].data() + begin, shared_[k].data() + at[k]);
      }
      if (above_) {
        const double share = passing_share(row, end - tables_.first_word[reference]);
        if (share >= 0) mark(reference);
        if (share <= best) continue;
        best = share;
        out.pairs.resize(2 * (before / lengths));  // it takes the place of the text's best so far
        out.shared.resize(before);
      } else {
        mark(reference);
      }
      out.pairs.insert(out.pairs.end(), {number, reference});
      out.shared.insert(out.shared.end(), row.begin(), row.end());
    }
  }

  void mark(int64_t reference) { std::atomic_ref(found_[reference]).store(1, std::memory_order_relaxed); }

  // The largest share of a reference's words that is above the limit of its n; -1 if none is.
  double passing_share(const std::vector<Shared>& shared, int64_t num_words) const {
    double most = -1.0;
    for (std::size_t k = 0; k < shared_.size(); ++k) {
      const double share = static_cast<double>(shared[k].words) / static_cast<double>(num_words);
      if (share > (*above_)[k]) most = std::max(most, share);
    }
    return most;
  }

  // places: ascending, of one reference.
  Shared summarise(int64_t n, const uint32_t* place, const uint32_t* end) const {
    Shared result;
    result.ngrams = end - place;
    int64_t covered_to = -1, longest = 0;  // the word behind the last one counted; words of the longest passage
    while (place != end) {
      const int64_t first = *place;
      int64_t last = first;
      while (++place != end && *place == last + 1) ++last;
      result.words += last + n - std::max(first, covered_to);
      covered_to = last + n;
      if (covered_to - first > longest) {
        longest = covered_to - first;
        result.begin = tables_.word_begin[first];
        result.end = tables_.word_end[covered_to - 1];
      }
    }
    return result;
  }

  const NgramIndex::Tables& tables_;
  const std::vector<double>* above_;
  uint8_t* found_;
  std::vector<std::vector<uint32_t>> shared_;  // for each n
  std::vector<uint32_t> places_;
};

}  // namespace

Overlaps ngram_overlap(const std::string_view* texts, int64_t n, const NgramIndex& index,
                       const std::vector<double>* above) {
  check_lengths("ngram_overlap", texts, n);
  FASTSFT_CHECK(!above || above->size() == index.ngrams().size(), "ngram_overlap: above: expected a share for each of ",
                index.ngrams().size(), " lengths, got ", above ? above->size() : 0);
  Overlaps all;
  all.found.assign(index.size(), 0);
  std::vector<Overlaps> parts((n + kTextsPerTask - 1) / kTextsPerTask);
  parallel_for(n, kTextsPerTask, [&](int64_t begin, int64_t end) {
    static thread_local Shingler<uint64_t> shingler;
    Matcher matcher(index, above, all.found.data());
    Overlaps& part = parts[begin / kTextsPerTask];
    for (int64_t i = begin; i < end; ++i) matcher.match(texts[i], i, shingler, part);
    shingler.release_if_large();
  });
  for (const Overlaps& part : parts) {
    all.pairs.insert(all.pairs.end(), part.pairs.begin(), part.pairs.end());
    all.shared.insert(all.shared.end(), part.shared.begin(), part.shared.end());
  }
  return all;
}

}  // namespace fastsft
