// Drawing one token per row of logits, with random numbers keyed by (seed, position): a draw is a pure function of its
// row, its parameters, its seed and its position. It depends neither on the other rows of the batch nor on threads or
// instruction set, bit for bit.
//
// For a row l of V logits with maximum m:
//   temperature T = 0:  id = argmax l, the lowest index on ties
//   T > 0:              z_v = (l_v - m) / T, and the kept set is narrowed in this order
//     top_k > 0   l_v >= the k-th largest logit (all that tie with it stay)
//     top_p < 1   the shortest prefix of the survivors, by descending z and then ascending index, whose share of
//                 sum exp(z) over the survivors is at least top_p
//     min_p > 0   exp(z_v) >= min_p, that is at least min_p times the highest probability
//                       id = argmax over the kept set of z_v + g_v, the lowest index on ties
//   logprob = l_id - m - log(sum exp(l - m)): of the raw logits, whatever the parameters
//
// g_v is Gumbel noise, so that id is a draw from softmax(z) over the kept set (Gumbel 1954; Maddison et al., "A*
// sampling", 2014):
//   x = philox(seed, stream = position, index = v).x[0]
//   w = min((float(x >> 1) + 0.5) * 2^-31, 1 - 2^-24)          in (0, 1), fine near 0
//   g = -log(-log(1 - w))                                      from -2.8 to 22.2
// in float32 with the logarithms of sampling.isa.cpp, which use correctly rounded operations only. Taking 1 - w rather
// than a uniform number directly puts the fine grid at the upper tail, where the draws of rare tokens are decided.
//
// exp and log are accurate to a few units in the last place; sums over a row are in double.
#pragma once

#include <cstdint>

namespace fastsft {

struct SamplingRows {
  const float* temperature;  // >= 0
  const int32_t* top_k;      // >= 0, 0 for off
  const float* top_p;        // in (0, 1], 1 for off
  const float* min_p;        // in [0, 1], 0 for off
  const int64_t* seeds;      // read as uint64
  const int64_t* positions;  // read as uint64
};

// logits [rows, vocab] -> ids [rows], logprobs [rows]. -inf is a forbidden token. Throws Error, naming the first such
// row, for a parameter out of range, for a NaN or +inf and for a row that is -inf throughout; and for vocab < 1 or
// >= 2^31.
void sample(const float* logits, int64_t rows, int64_t vocab, const SamplingRows& parameters, int64_t* ids,
            float* logprobs);

}  // namespace fastsft
