// Private to attention.cpp and attention_*.isa.cpp: one unit of work of each kernel and the arguments all units share.
#pragma once

#include <atomic>
#include <cstdint>

#include "fastsft/attention.h"
#include "fastsft/isa.h"

namespace fastsft {

// Keys per block of the backward pass, at most: a sequence that fits into one shares no sums between blocks. A longer
// one is cut finer, so that there is work for more threads.
inline constexpr int64_t kGradientBlock = 256;
static inline int64_t gradient_block(int64_t num_k) { return num_k <= kGradientBlock ? kGradientBlock : 128; }
// Both are part of the forward pass's rounding, see attention.h. Segments are summed on their own and then folded, so
// that several threads can share one sequence's keys.
inline constexpr int64_t kKeyBlock = 64;
inline constexpr int64_t kKeySegment = 512;

// The positions a query at key position p sees: [p - left, p + right], already cut to what can occur.
struct AttentionMask {
  int64_t left;
  int64_t right;
};

// Where a sequence's keys and values are. table == nullptr: row j is at base + (first + j) * stride[1].
struct KeySource {
  const void* data;
  int64_t stride[3];  // block, slot (token), head; in elements
};

struct ForwardArgs {
  AttentionShape shape;
  AttentionMask mask;
  int64_t group;  // query heads per key head
  int64_t total_q;
  AttentionInput q;
  KeySource k, v;
  int64_t block_size;  // of the paged cache
  void* out;
  float* lse;
};

// Queries [q_first, q_first + num_q) of one sequence, all query heads of key heads [kv_head, kv_head + kv_heads).
struct ForwardItem {
  int64_t q_first;  // token index into q
  int64_t num_q;
  int64_t position;           // key position of query q_first
  int64_t k_first;            // token index of the sequence's key 0 (not paged)
  int64_t num_k;              // keys of the sequence
  const int32_t* table;       // the sequence's row of the block table, or null
  int64_t kv_head, kv_heads;  // attention_forward_item: one
  int64_t cost;               // in multiply-adds, about
};

// Few queries on many keys: one segment of those that a tile sees, counted from the first. states: one for each of the
// tile's segments; attention_decode_fold puts them together.
struct DecodeItem {
  ForwardItem tile;
  int64_t segment;
  float* states;
};

struct KeyRange {
  int64_t begin, end;
};
static inline KeyRange keys_seen(const AttentionMask& mask, const ForwardItem& item) {
  const int64_t begin = item.position - mask.left, end = item.position + item.num_q + mask.right;
  return {begin < 0 ? 0 : begin, end < item.num_k ? end : item.num_k};
}
static inline int64_t segments_seen(const KeyRange& keys) {
  if (keys.end <= keys.begin) return 0;
  return (keys.end - 1) / kKeySegment - keys.begin / kKeySegment + 1;
}

static inline KeyRange segment_of(const KeyRange& keys, int64_t i) {
  const int64_t begin = (keys.begin / kKeySegment + i) * kKeySegment, end = begin + kKeySegment;
  return {begin < keys.begin ? keys.begin : begin, end < keys.end ? end : keys.end};
}

struct BackwardArgs {
  AttentionShape shape;
  AttentionMask mask;
  int64_t group;
  int64_t total_q;
  int64_t tile_tokens;  // queries per tile
  AttentionInput q, k, v, out, dout;
  const float* lse;
  const float* dlse;
  float* delta;  // [Hq, Tq]: rowsum(dout * out) - dlse; set for sequences of several key blocks only
  void *dq, *dk, *dv;
  float* dq_sums;                      // float32 sums of the query tiles that several key blocks contribute to
  std::atomic<int32_t>* blocks_done;   // per tile in dq_sums: key blocks added so far
  const std::atomic<bool>* abandoned;  // another task failed: stop waiting for its tiles
};

// One block of keys of one sequence and key head, with all queries that see it.
struct BackwardItem {
  int64_t q_first, num_q;  // the sequence
  int64_t k_first, num_k;
  int64_t first_tile;  // the sequence's first tile of this key head in dq_sums and blocks_done; meaningless if there is
                       // a single block
  int64_t block;
  int64_t kv_head;
};

// What the units need of their caller. Static, like everything that an x.isa.cpp might instantiate (see the hazard in
// isa.h).
//
// What `rows` rows of a tile occupy in scratch: the last register tile may reach up to 15 rows beyond those in use.
static inline int64_t tile_rows(int64_t rows) { return (rows + 30) / 16 * 16; }
// Bounds, for any instruction set, of the scratch memory in floats.
static inline int64_t states_size(int64_t rows, int64_t dim) { return rows * (dim + 4); }
static inline int64_t forward_scratch(int64_t rows, int64_t dim) {
  return 2 * kKeyBlock * dim + 16 * kKeyBlock + rows * ((dim <= 64 ? 64 : 256) + 16) + 2 * states_size(rows, dim);
}
static inline int64_t decode_scratch(int64_t rows, int64_t dim) {
  return 16 * dim + rows * (256 + 16 + dim + kKeyBlock + 2);
}
static inline int64_t backward_scratch(int64_t rows, int64_t dim) {
  constexpr int64_t kPitch = kGradientBlock + 16;
  return 5 * kPitch * dim + rows * (2 * ((dim <= 64 ? 64 : 256) + 16) + 2 * dim + 2 * kPitch + 2) + 32 * kPitch;
}

// Blocks until `turns` key blocks have been added to a tile; false if the call was abandoned meanwhile.
bool wait_for_turn(const std::atomic<int32_t>& done, int32_t turns, const std::atomic<bool>& abandoned);
void finish_turn(std::atomic<int32_t>& done);

FASTSFT_ISA_DECLARE(void, attention_forward_item, const ForwardArgs& args, const ForwardItem& item, float* scratch)
// The same for few rows and one segment, into the item's states.
FASTSFT_ISA_DECLARE(void, attention_decode_item, const ForwardArgs& args, const DecodeItem& item, float* scratch)
// Folds the states of a tile whose segments are all done and writes its output.
FASTSFT_ISA_DECLARE(void, attention_decode_fold, const ForwardArgs& args, const DecodeItem& item)
FASTSFT_ISA_DECLARE(void, attention_backward_item, const BackwardArgs& args, const BackwardItem& item, float* scratch)
// delta of queries [begin, end)
FASTSFT_ISA_DECLARE(void, attention_backward_delta, const BackwardArgs& args, int64_t begin, int64_t end)

}  // namespace fastsft
