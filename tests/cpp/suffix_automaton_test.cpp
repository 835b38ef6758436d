// Against a search through the text, whose definition of every answer is the obvious one.
#include "fastsft/suffix_automaton.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/rng.h"

using namespace fastsft;

namespace {

using Text = std::vector<int32_t>;

Text random_text(int64_t n, uint32_t vocab, uint64_t seed) {
  Text text(n);
  for (int64_t i = 0; i < n; ++i) text[i] = static_cast<int32_t>(uniform_below(philox(seed, 0, i).x[0], vocab));
  return text;
}

bool equal_at(const Text& text, int64_t at, const Text& other, int64_t from, int64_t length) {
  return std::equal(other.begin() + from, other.begin() + from + length, text.begin() + at);
}

// Length of the longest end of the text that also begins at an earlier index.
int64_t longest_repeated(const Text& text) {
  const auto n = static_cast<int64_t>(text.size());
  for (int64_t length = n - 1; length > 0; --length) {
    for (int64_t at = 0; at < n - length; ++at) {
      if (equal_at(text, at, text, n - length, length)) return length;
    }
  }
  return 0;
}

// Whether `guess` is what follows one of the earlier places of the text's last `length` tokens, periodically where the
// place reaches the end.
bool follows_some_place(const Text& text, int64_t length, const Text& guess) {
  const auto n = static_cast<int64_t>(text.size());
  for (int64_t at = 0; at < n - length; ++at) {
    if (!equal_at(text, at, text, n - length, length)) continue;
    Text ahead = text;
    for (std::size_t j = 0; j < guess.size(); ++j) ahead.push_back(ahead[at + length + j]);
    if (std::equal(guess.begin(), guess.end(), ahead.begin() + n)) return true;
  }
  return false;
}

Text proposed(const SuffixAutomaton& automaton, int64_t limit) {
  Text out(limit);
  out.resize(automaton.propose(limit, out.data()));
  return out;
}

Text proposed(const SuffixAutomaton& automaton, SuffixAutomaton::Match at, int64_t limit) {
  Text out(limit);
  out.resize(automaton.propose(at, limit, out.data()));
  return out;
}

}  // namespace

TEST(every_append_against_a_search) {
  for (const uint32_t vocab : {1, 2, 3, 7}) {
    const Text text = random_text(70, vocab, vocab);
    SuffixAutomaton automaton;
    Text so_far;
    for (const int32_t token : text) {
      so_far.push_back(token);
      automaton.extend(&token, 1);
      const int64_t length = longest_repeated(so_far);
      CHECK(automaton.repeated() == length);
      const Text guess = proposed(automaton, 6);
      CHECK(guess.size() == (length > 0 ? 6 : 0));
      CHECK(length == 0 || follows_some_place(so_far, length, guess));
    }
    CHECK(automaton.size() == 70);
    CHECK(automaton.states() <= 2 * automaton.size());
  }
}

TEST(the_latest_known_place_is_taken) {
  const Text text{1, 2, 3, 9, 1, 2, 4, 8, 1, 2};
  SuffixAutomaton automaton;
  automaton.extend(text.data(), 10);
  CHECK(proposed(automaton, 2) == (Text{4, 8}));
}

TEST(pieces_do_not_matter) {
  const Text text = random_text(3000, 40, 3);
  SuffixAutomaton whole, pieces;
  whole.extend(text.data(), 3000);
  for (int64_t at = 0; at < 3000; at += 300) pieces.extend(text.data() + at, 300);
  CHECK(whole.states() == pieces.states());
  CHECK(whole.repeated() == pieces.repeated());
  CHECK(proposed(whole, 20) == proposed(pieces, 20));
}

TEST(another_text_is_followed) {
  const Text text = random_text(60, 3, 1), other = random_text(60, 4, 2);  // token 3 occurs in the other alone
  SuffixAutomaton automaton;
  automaton.extend(text.data(), 60);
  SuffixAutomaton::Match at;
  for (int64_t n = 1; n <= 60; ++n) {
    at = automaton.follow(at, other[n - 1]);
    int64_t longest = 0;
    bool continued = false;
    for (int64_t length = n; length > 0 && longest == 0; --length) {
      for (int64_t place = 0; place + length <= 60; ++place) {
        if (!equal_at(text, place, other, n - length, length)) continue;
        longest = length;
        const Text guess = proposed(automaton, at, 3);
        const auto known = std::min<int64_t>(3, 60 - place - length);
        continued |= static_cast<int64_t>(guess.size()) >= known && equal_at(text, place + length, guess, 0, known);
      }
    }
    CHECK(at.length == longest);
    CHECK(longest == 0 || continued);
    CHECK(longest > 0 || proposed(automaton, at, 3).empty());
  }
}

TEST(a_guess_ends_before_a_separator) {
  const Text text{1, 2, 3, -1, 1, 5, -1};
  SuffixAutomaton automaton;
  automaton.extend(text.data(), 7);
  SuffixAutomaton::Match at = automaton.follow({}, 2);
  CHECK(proposed(automaton, at, 4) == Text{3});
  at = automaton.follow(at, 3);
  CHECK(proposed(automaton, at, 4).empty());
}

TEST(memory_stays_within_what_the_header_says) {
  constexpr int64_t kTokens = 200000;
  const Text text = random_text(kTokens, 2, 9);
  SuffixAutomaton automaton;
  automaton.extend(text.data(), kTokens);
  CHECK(automaton.states() <= 2 * kTokens);
  CHECK(automaton.bytes() <= 220 * kTokens);
}

TEST(wrong_arguments) {
  SuffixAutomaton automaton;
  CHECK_THROWS(automaton.follow({1, 0}, 0), Error);
  CHECK_THROWS(automaton.follow({-1, 0}, 0), Error);
  CHECK_THROWS(automaton.extend(nullptr, (int64_t{1} << 30) + 1), Error);
  CHECK(automaton.size() == 0);
  CHECK(proposed(automaton, 3).empty());
}

TEST_MAIN()
