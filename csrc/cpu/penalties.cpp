// One pass over the text for its distinct tokens and their counts, which the rows after the first extend by one token
// each; then a few operations per distinct token and row. The table of counts is kept by the thread: 4 bytes for each
// token of the vocabulary, of which a call clears what it set.
#include "fastsft/penalties.h"

#include <vector>

#include "fastsft/common.h"

namespace fastsft {
namespace {

// 0: not in the text; 1 + the number of occurrences past the prompt otherwise.
class Counts {
 public:
  explicit Counts(int64_t vocab) {
    if (static_cast<int64_t>(table().size()) < vocab) table().resize(vocab, 0);
  }
  ~Counts() {
    for (int32_t token : distinct_) table()[token] = 0;
  }
  Counts(const Counts&) = delete;
  Counts& operator=(const Counts&) = delete;

  void add(int32_t token, bool generated) {
    int32_t& entry = table()[token];
    if (entry == 0) {
      entry = 1;
      distinct_.push_back(token);
    }
    entry += generated;
  }

  void apply(const Penalties& p, float* logits) const {
    for (int32_t token : distinct_) {
      const int32_t count = table()[token] - 1;
      float l = logits[token];
      l = l > 0 ? l / p.repetition : l * p.repetition;
      l -= p.frequency * static_cast<float>(count);
      if (count > 0) l -= p.presence;
      logits[token] = l;
    }
  }

 private:
  static std::vector<int32_t>& table() {
    thread_local std::vector<int32_t> entries;
    return entries;
  }
  std::vector<int32_t> distinct_;
};

}  // namespace

void penalise(float* logits, int64_t rows, int64_t vocab, const int32_t* tokens, int64_t count, int64_t prompt,
              int64_t first, const Penalties& penalties) {
  FASTSFT_CHECK(penalties.repetition > 0, "penalise: repetition: expected > 0, got ", penalties.repetition);
  FASTSFT_CHECK(prompt >= 0 && prompt <= first, "penalise: prompt: expected 0 to first (", first, "), got ", prompt);
  FASTSFT_CHECK(rows == 0 || count == first + rows - 1,
                "penalise: tokens: expected first + rows - 1 = ", first + rows - 1, " of them, got ", count);
  for (int64_t i = 0; i < count; ++i) {
    FASTSFT_CHECK(tokens[i] >= 0 && tokens[i] < vocab, "penalise: tokens[", i, "]: expected an id in [0, ", vocab,
                  "), got ", tokens[i]);
  }
  Counts counts(vocab);
  for (int64_t i = 0; i < first && rows > 0; ++i) counts.add(tokens[i], i >= prompt);
  for (int64_t r = 0; r < rows; ++r) {
    if (r > 0) counts.add(tokens[first + r - 1], true);
    counts.apply(penalties, logits + r * vocab);
  }
}

}  // namespace fastsft
