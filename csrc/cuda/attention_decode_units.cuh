// The work of attention over a block cache, cut into units, and the partial results that its parts leave.
#pragma once

#include "fastsft/attention.h"
#include "primitives.cuh"

namespace fastsft::cuda::paged {

inline constexpr int kSegment = kPagedSegment;  // keys whose partial result is formed in registers
inline constexpr int kStep = 16;                // keys per step: the depth of one matrix instruction
inline constexpr int kRows = 16;                // query rows of a unit: the height of one matrix instruction
inline constexpr int kStages = 2;

template <int kDim>
struct Tiling {
  static constexpr int kWarps = kDim > 128 ? 2 : 4;
  static constexpr int kBlocks = kDim <= 64 ? 4 : 2;  // per multiprocessor
  static constexpr int kStride = kDim + 8;  // an odd number of 16-byte chunks: no bank conflicts in load_matrix
  static constexpr int kTile = kStep * kStride;
  static constexpr bool kQueryInShared = kDim > 128;  // where the accumulators leave too few registers
  static constexpr int kTilesBytes = 2 * kStages * kTile * 2;
  static constexpr int kQueryBytes = kQueryInShared ? kRows * kDim * 2 : 0;
  static constexpr int kSlotBytes = kSegment * static_cast<int>(sizeof(int2));
  static constexpr int kOwnBytes = kQueryBytes + kSlotBytes;  // what the warps of a team do not share
  static constexpr int kWarpBytes = kTilesBytes + kOwnBytes;
};

struct Arguments {
  AttentionShape shape;
  AttentionInput q;
  PagedCache cache;
  const int32_t* cu_q;
  int batch, total_q, group;
  int64_t window_left, window_right;  // causal counted in; -1: unbounded
  int splits;                         // partial results per query row; 1: a unit is all segments of its rows
  int64_t team_rows;                  // sequences with so many query rows per key head are left to teams
  float score_scale, cap_scale;       // score * score_scale, or, with a cap, tanh(score * score_scale) * cap_scale
  void* out;
  float* sums;     // [total_q * num_q_heads, splits, head_dim]
  float2* maxima;  // [total_q * num_q_heads, splits]: maximum in base 2 and sum of exponentials
  int* counts;     // [total_q * num_q_heads]: segments of the row's sequence
};

struct Sequence {
  int index, begin, queries, context;
  int first_segment, segments;
  bool broken;  // its length is outside the contract
};

__device__ inline Sequence sequence_at(const Arguments& a, int b) {
  Sequence s;
  s.index = b;
  s.begin = min(max(a.cu_q[b], 0), a.total_q);
  s.queries = min(max(a.cu_q[b + 1], s.begin), a.total_q) - s.begin;
  const int length = a.cache.context_lens[b];
  const int64_t room = a.cache.max_blocks * a.cache.block_size;
  s.broken = length < s.queries || length > room;
  s.context = s.broken ? 0 : length;
  const int64_t oldest = a.window_left < 0 || s.broken ? 0 : s.context - s.queries - a.window_left;
  s.first_segment = static_cast<int>(max(oldest, int64_t{0}) / kSegment);
  s.segments = max(1, (s.context + kSegment - 1) / kSegment - s.first_segment);
  return s;
}

// The keys [begin, end) that a query sees; none for rows that pad a tile.
struct Range {
  int begin, end;
};

__device__ inline Range keys_of(const Arguments& a, const Sequence& s, int query) {
  if (query >= s.queries) return {0, 0};
  const int64_t position = s.context - s.queries + query, context = s.context;
  const int64_t begin = a.window_left < 0 ? 0 : max(int64_t{0}, position - a.window_left);
  const int64_t end = a.window_right < 0 ? context : min(context, position + 1 + a.window_right);
  return {static_cast<int>(begin), static_cast<int>(end)};
}

// Finds the unit of a number in the list of all units of single warps (kTeam = 1) or of teams. The numbers asked for
// must ascend. Every lane of a warp calls and gets the same answer.
template <int kTeam>
class UnitList {
 public:
  static constexpr int kTileRows = kTeam * kRows;

  __device__ explicit UnitList(const Arguments& a) : a_(a) {}

  __device__ static int tiles(const Arguments& a, const Sequence& s) {
    const int rows = s.queries * a.group;
    return (rows >= a.team_rows) == (kTeam > 1) ? (rows + kTileRows - 1) / kTileRows : 0;
  }

  // False after the last unit; else its sequence and its number within that.
  __device__ bool find(int64_t unit, Sequence* sequence, int64_t* within) {
    while (unit >= first_ + count_) {  // on to the next 32 sequences, one for each lane
      first_ += count_;
      chunk_ += kWarp;
      if (chunk_ >= a_.batch) return false;
      const int b = chunk_ + lane_id();
      int64_t mine = 0;
      if (b < a_.batch) {
        const Sequence s = sequence_at(a_, b);
        mine = static_cast<int64_t>(tiles(a_, s)) * a_.shape.num_kv_heads * (a_.splits > 1 ? s.segments : 1);
      }
      int64_t sum = mine;
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const int64_t other = shuffle_up(sum, delta);
        if (lane_id() >= delta) sum += other;
      }
      before_ = sum - mine;
      count_ = shuffle(sum, kWarp - 1);
    }
    // A sequence without units has the same `before_` as the next one, so that the last lane to qualify has some.
    const int owner = kWarp - 1 - leading_zeros(warp_ballot(before_ <= unit - first_));
    *within = unit - first_ - shuffle(before_, owner);
    *sequence = sequence_at(a_, chunk_ + owner);
    return true;
  }

 private:
  const Arguments& a_;
  int chunk_ = -kWarp;
  int64_t first_ = 0, count_ = 0;  // units before these 32 sequences, and in them
  int64_t before_ = 0;             // in them, before this lane's
};

// A partial softmax: maximum (base 2) and sum relative to it; sum 0: no key seen.
struct Partial {
  float max, sum;
};

// Merges `next` into `total`; accumulators become scale_total * total + scale_next * next. Both ways of splitting the
// work go through here, and a partial result without keys changes no bit.
__device__ inline Partial merge(const Partial& total, const Partial& next, float* scale_total, float* scale_next) {
  *scale_total = next.sum == 0.0f ? 1.0f : 0.0f;
  *scale_next = 1.0f - *scale_total;
  if (next.sum == 0.0f) return total;
  if (total.sum == 0.0f) return next;
  const float most = fmaxf(total.max, next.max);
  *scale_total = exp2_approx(total.max - most);
  *scale_next = exp2_approx(next.max - most);
  return {most, fmaf(*scale_total, total.sum, *scale_next * next.sum)};
}

__device__ inline float merged(float scale_total, float total, float scale_next, float next) {
  if (scale_next == 0.0f) return total;
  if (scale_total == 0.0f) return next;
  return fmaf(scale_total, total, scale_next * next);
}

// acc / sum; + 0 makes the sign of a zero a matter of its value and not of how the sum was split.
__device__ inline float normalised(float acc, float sum) { return sum == 0.0f ? 0.0f : acc / sum + 0.0f; }

}  // namespace fastsft::cuda::paged
