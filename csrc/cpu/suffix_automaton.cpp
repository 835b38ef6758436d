// Edges of all states share one hash table, keyed by (state, token): a state of code has one edge or two, but the root
// has one for each token of the vocabulary. A clone copies its original's edges, which a list through them enumerates.
#include "fastsft/suffix_automaton.h"

#include "fastsft/common.h"

namespace fastsft {

SuffixAutomaton::SuffixAutomaton() {
  states_.push_back({0, -1, -1, -1});
  rebuild_table(64);
}

void SuffixAutomaton::extend(const int32_t* tokens, int64_t count) {
  FASTSFT_CHECK(size() + count <= int64_t{1} << 30, "SuffixAutomaton: expected at most 2^30 tokens, got ",
                size() + count);
  for (int64_t i = 0; i < count; ++i) append(tokens[i]);
}

int64_t SuffixAutomaton::bytes() const {
  return static_cast<int64_t>(sizeof(*this) + text_.capacity() * sizeof(int32_t) + states_.capacity() * sizeof(State) +
                              edges_.capacity() * sizeof(Edge) + table_.capacity() * sizeof(int32_t));
}

void SuffixAutomaton::append(int32_t token) {
  const auto place = static_cast<int32_t>(text_.size());
  text_.push_back(token);
  const int32_t added = add_state(states_[last_].length + 1, 0, place);
  int32_t at = last_, edge = -1;
  last_ = added;
  for (; at >= 0 && (edge = find(at, token)) < 0; at = states_[at].link) add_edge(at, token, added);
  if (at >= 0) {
    const int32_t target = edges_[edge].target;
    if (states_[target].length == states_[at].length + 1) {
      states_[added].link = target;
    } else {
      const int32_t clone = add_state(states_[at].length + 1, states_[target].link, states_[target].end);
      for (int32_t e = states_[target].first_edge; e >= 0; e = edges_[e].next) {
        add_edge(clone, edges_[e].token, edges_[e].target);
      }
      for (; at >= 0 && (edge = find(at, token)) >= 0 && edges_[edge].target == target; at = states_[at].link) {
        edges_[edge].target = clone;
      }
      states_[target].link = states_[added].link = clone;
    }
  }
  // The link of the whole text is its longest end that occurred before. Its place moves on to this one: the latest.
  State& before = states_[states_[added].link];
  repeated_ = before.length;
  repeated_end_ = before.end;
  before.end = place;
}

int32_t SuffixAutomaton::add_state(int32_t length, int32_t link, int32_t end) {
  states_.push_back({length, link, end, -1});
  return static_cast<int32_t>(states_.size()) - 1;
}

void SuffixAutomaton::add_edge(int32_t state, int32_t token, int32_t target) {
  if (2 * (edges_.size() + 1) > table_.size()) rebuild_table(2 * table_.size());
  edges_.push_back({state, token, target, states_[state].first_edge});
  states_[state].first_edge = static_cast<int32_t>(edges_.size()) - 1;
  table_[slot_of(state, token)] = static_cast<int32_t>(edges_.size());
}

int32_t SuffixAutomaton::find(int32_t state, int32_t token) const { return table_[slot_of(state, token)] - 1; }

std::size_t SuffixAutomaton::slot_of(int32_t state, int32_t token) const {
  const std::size_t mask = table_.size() - 1;
  uint64_t key = (static_cast<uint64_t>(static_cast<uint32_t>(state)) << 32 | static_cast<uint32_t>(token));
  key *= 0x9E3779B97F4A7C15u;
  key ^= key >> 29;
  key *= 0xBF58476D1CE4E5B9u;
  for (std::size_t slot = (key >> 20) & mask;; slot = (slot + 1) & mask) {
    const int32_t entry = table_[slot];
    if (entry == 0 || (edges_[entry - 1].state == state && edges_[entry - 1].token == token)) return slot;
  }
}

void SuffixAutomaton::rebuild_table(std::size_t slots) {
  table_.assign(slots, 0);
  for (std::size_t e = 0; e < edges_.size(); ++e) {
    table_[slot_of(edges_[e].state, edges_[e].token)] = static_cast<int32_t>(e) + 1;
  }
}

SuffixAutomaton::Match SuffixAutomaton::follow(Match at, int32_t token) const {
  FASTSFT_CHECK(at.state >= 0 && at.state < states(), "SuffixAutomaton: state: expected one of ", states(), ", got ",
                at.state);
  for (int32_t state = at.state; state >= 0; state = states_[state].link) {
    if (const int32_t edge = find(state, token); edge >= 0) {
      return {edges_[edge].target, (state == at.state ? at.length : states_[state].length) + 1};
    }
  }
  return {};
}

int64_t SuffixAutomaton::copy(int64_t end, int64_t limit, int32_t* out) const {
  const int64_t from = end + 1, period = size() - from;
  if (end < 0 || period <= 0) return 0;
  for (int64_t i = 0; i < limit; ++i) {
    out[i] = i < period ? text_[from + i] : out[i - period];
    if (out[i] < 0) return i;
  }
  return limit;
}

}  // namespace fastsft
