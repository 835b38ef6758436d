// The running softmax of Milakov and Gimelshein (2018) by strips of rows, and how segments of keys are put together.
// Included by attention_forward.isa.cpp and attention_decode.isa.cpp, whose results have to be the same bits.
#pragma once

#include <cmath>

#include "attention_kernels.h"
#include "attention_tile.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

// Where keys [start, start + count) of the item's first key head are.
FASTSFT_INLINE void find_rows(const ForwardArgs& args, const ForwardItem& item, const KeySource& source, int64_t start,
                              int64_t count, const void** rows) {
  const DType dtype = args.shape.dtype;
  const int64_t head = item.kv_head * source.stride[2];
  if (item.table == nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = element(dtype, source.data, head + (item.k_first + start + j) * source.stride[1]);
    }
    return;
  }
  int64_t block = start / args.block_size, slot = start % args.block_size;
  for (int64_t j = 0; j < count; ++block, slot = 0) {
    const void* row =
        element(dtype, source.data, head + item.table[block] * source.stride[0] + slot * source.stride[1]);
    for (const int64_t last = smaller(j + args.block_size - slot, count); j < last; ++j) {
      rows[j] = row;
      row = element(dtype, row, source.stride[1]);
    }
  }
}

// What is known of each row after some keys.
struct States {
  float* sums;             // [rows, D]
  float *maxima, *totals;  // [strips, kLanes]; maxima in units of log 2
};
FASTSFT_INLINE States states_at(float* memory, int64_t dim, int64_t rows) {
  return {memory, memory + rows * dim, memory + rows * (dim + 2)};
}
// Scores of one strip, columns [begin, end), in units of log 2 -> probabilities relative to each row's running
// maximum, in the scores' place. factors: what each row's past must be scaled by.
template <typename Format>
FASTSFT_NOINLINE void online_softmax(float* scores, int64_t have, int64_t begin, int64_t end, float* maxima,
                                     float* totals, float* factors) {
  Vec rows[kLanes]{};
  for (int64_t i = 0; i < have; ++i) {
    const float* row = scores + i * kKeyBlock;
    Vec most = load(row + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) most = max_of(most, load(row + j));
    rows[i] = most;
  }
  const Vec before = load(maxima), now = max_of(reduce_rows<true>(rows), before);
  const Vec reference = select(now == -INFINITY, Vec{}, now);  // no key seen yet: 2^(-inf - 0) = 0, not NaN
  const Vec past = exp2_nonpositive<6>(before - reference);
  float references[kLanes];
  store(references, reference);
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    const Vec own = splat(references[i]);
    Vec sum{};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Vec p = exp2_nonpositive<kExpDegree<Format>>(load(row + j) - own);
      sum += p;
      store_along_columns<Format>(p, row, j);
    }
    rows[i] = sum;
  }
  store(maxima, now);
  store(totals, load(totals) * past + reduce_rows<false>(rows));
  store(factors, past);
}

FASTSFT_NOINLINE void cap_scores(float* scores, int64_t have, int64_t begin, int64_t end, float softcap) {
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    for (int64_t j = begin; j < end; j += kLanes) store(row + j, tanh_of(load(row + j)) * (softcap * kLog2e));
  }
}

// Hides the columns of a strip that lie outside its rows' bands. Most of them lie in the last vector.
FASTSFT_NOINLINE void hide(float* scores, const Band* bands, int64_t have, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < have; ++i) {
    float* row = scores + i * kKeyBlock;
    for (int64_t j = begin; j < end; j += kLanes) {
      if (bands[i].first <= j && j + kLanes <= bands[i].last) continue;
      store(row + j, select(inside(bands[i], j), load(row + j), splat(-INFINITY)));
    }
  }
}

FASTSFT_NOINLINE void clear(const States& states, int64_t rows, int64_t dim) {
  fill_zero(states.sums, states.sums + rows * dim);
  for (int64_t strip = 0; strip * kTileRows < rows; ++strip) {
    store(states.maxima + strip * kLanes, splat(-INFINITY));
    store(states.totals + strip * kLanes, Vec{});
  }
}

// A row that saw no key of the segment stays as it is.
FASTSFT_NOINLINE void fold(const States& whole, const States& segment, int64_t rows, int64_t dim) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t stats = row / kTileRows * kLanes;
    const Vec before = load(whole.maxima + stats), other = load(segment.maxima + stats);
    const Vec now = max_of(other, before), reference = select(now == -INFINITY, Vec{}, now);
    const Vec factor = exp2_nonpositive<6>(before - reference), other_factor = exp2_nonpositive<6>(other - reference);
    store(whole.maxima + stats, now);
    store(whole.totals + stats, load(whole.totals + stats) * factor + load(segment.totals + stats) * other_factor);
    for (int64_t i = 0; i < smaller<int64_t>(kTileRows, rows - row); ++i) {
      float* sums = whole.sums + (row + i) * dim;
      const float* others = segment.sums + (row + i) * dim;
      for (int64_t d = 0; d < dim; d += kLanes) {
        store(sums + d, load(sums + d) * factor[i] + load(others + d) * other_factor[i]);
      }
    }
  }
}

// One strip, from `row` on, of which the states are final. The rows of the item's first key head come first.
FASTSFT_NOINLINE void store_strip(const ForwardArgs& args, const ForwardItem& item, int64_t row, int64_t have,
                                  const float* sums, Vec maxima, Vec totals) {
  const DType dtype = args.shape.dtype;
  const int64_t dim = args.shape.head_dim, group = args.group;
  const VecInt is_blind = totals == 0.0f;  // saw no key
  float factors[kLanes], lse[kLanes];
  store(factors, select(is_blind, Vec{}, 1.0f / totals));
  store(lse, select(is_blind, splat(-INFINITY), (maxima + log2_of(totals)) * kLn2));
  void* rows[kTileRows];
  int64_t kv_head = item.kv_head;
  for (; row >= item.num_q * group; row -= item.num_q * group) ++kv_head;
  RowPlace place = place_of(row, group);
  for (int64_t i = 0; i < have; ++i, advance(place, group)) {
    if (place.token == item.num_q) place.token = 0, ++kv_head;
    const int64_t token = item.q_first + place.token, head = kv_head * group + place.head;
    rows[i] = element(dtype, args.out, (token * args.shape.num_q_heads + head) * dim);
    if (args.lse != nullptr) args.lse[head * args.total_q + token] = lse[i];
  }
  store_rows(dtype, sums, dim, have, dim, factors, rows);
}

FASTSFT_NOINLINE void store_tile(const ForwardArgs& args, const ForwardItem& item, const States& states) {
  const int64_t rows = item.num_q * args.group * item.kv_heads;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t stats = row / kTileRows * kLanes;
    store_strip(args, item, row, smaller<int64_t>(kTileRows, rows - row), states.sums + row * args.shape.head_dim,
                load(states.maxima + stats), load(states.totals + stats));
  }
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
