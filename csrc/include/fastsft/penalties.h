// Penalties on the tokens that a text already has, in place on the logits of the rows that continue it. Only the tokens
// that occur are touched: O(tokens), not O(vocabulary).
//
// Row r continues tokens[0, first + r), of which the first `prompt` are the prompt. For each distinct token v of it, of
// whose occurrences c are past the prompt:
//   l = l > 0 ? l / repetition : l * repetition        prompt included (Keskar et al., CTRL, 1909.05858)
//   l -= frequency * c,  l -= presence where c > 0     generated tokens alone
// in this order, in float32. A row's result depends on its text alone, not on the rows beside it.
#pragma once

#include <cstdint>

namespace fastsft {

struct Penalties {
  float repetition = 1;  // > 0, 1 for off
  float frequency = 0, presence = 0;
};

// logits [rows, vocab]; tokens holds first + rows - 1. Throws Error for a token outside the vocabulary, for
// repetition <= 0 and where prompt > first.
void penalise(float* logits, int64_t rows, int64_t vocab, const int32_t* tokens, int64_t count, int64_t prompt,
              int64_t first, const Penalties& penalties);

}  // namespace fastsft
