// The suffix automaton of a growing sequence of tokens (Blumer et al. 1985): every substring is a path from the root.
// It answers, after each token, what followed the last time that the end of the text occurred before; that is the guess
// with which speculative decoding continues (SAM decoding, 2411.10666; suffix decoding, 2411.04975).
//
// Appending is amortised O(1) for each token: at most 2n states and 3n edges for n tokens. A state takes 16 bytes, an
// edge 16 and 8 to 16 of the table that finds it, a token 4, and vectors grow by doubling: about 130 bytes for each
// token of code, 220 at the very worst, all of them freed with the object. Not safe to extend from two threads; reading
// from many is.
#pragma once

#include <cstdint>
#include <vector>

namespace fastsft {

class SuffixAutomaton {
 public:
  // Where a text that grows elsewhere stands in this one: its longest end that occurs here.
  struct Match {
    int32_t state = 0;
    int32_t length = 0;
  };

  SuffixAutomaton();

  // A negative token separates texts: a guess ends before it. Throws Error beyond 2^30 tokens.
  void extend(const int32_t* tokens, int64_t count);

  int64_t size() const { return static_cast<int64_t>(text_.size()); }
  int64_t states() const { return static_cast<int64_t>(states_.size()); }
  int64_t bytes() const;

  // The longest end of the text that also occurs earlier: its length (0: none).
  int64_t repeated() const { return repeated_; }

  // What followed there, the latest such place that is known: up to `limit` tokens into `out`; returns their number. A
  // place that overlaps the end goes on periodically.
  int64_t propose(int64_t limit, int32_t* out) const { return copy(repeated_ > 0 ? repeated_end_ : -1, limit, out); }

  // The same for a text that is not this one: follow each of its tokens, then ask.
  Match follow(Match at, int32_t token) const;
  int64_t propose(Match at, int64_t limit, int32_t* out) const {
    return copy(at.length > 0 ? states_[at.state].end : -1, limit, out);
  }

 private:
  struct State {
    int32_t length, link, end, first_edge;  // end: index of the last token of a place where the state's strings occur
  };
  struct Edge {
    int32_t state, token, target, next;  // next: another edge of the state
  };

  void append(int32_t token);
  int32_t add_state(int32_t length, int32_t link, int32_t end);
  void add_edge(int32_t state, int32_t token, int32_t target);
  int32_t find(int32_t state, int32_t token) const;  // an edge's index, or -1
  void rebuild_table(std::size_t slots);
  std::size_t slot_of(int32_t state, int32_t token) const;
  int64_t copy(int64_t end, int64_t limit, int32_t* out) const;

  std::vector<int32_t> text_;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int32_t> table_;  // open addressing: an edge's index + 1, 0 where empty; its size is a power of two
  int32_t last_ = 0;
  int32_t repeated_ = 0, repeated_end_ = -1;
};

}  // namespace fastsft
