// Keys and values of generated text in blocks of `block_size` tokens, laid out for the kernels, and attention over
// them: one call for decoding, chunked prefill and the verification of drafts.
//
// A layer's blocks are `num_blocks` times kv_block_bytes bytes. A block is position-independent: it may be copied or
// handed over as bytes, and sequences may share it. In a block, per key head, with D = head_dim:
//   K            [block_size / 16][D / 2][16 keys][2] elements; float32: [block_size / 16][D][16 keys]
//   V            [block_size / 2][D][2 keys] elements;          float32: [block_size][D]
//   int8 only:   float32 scales of the keys [block_size], then of the values [block_size]: the largest magnitude of the
//                token's head / 127 (values are rounded to nearest, ties to even; zeros have scale 0)
// The same for every instruction set. Blocks need no initialisation, and start at multiples of 64 bytes for speed.
//
// Bits: a row (token, query head) is computed from its query and the keys it sees, in parts of 256 keys counted from
// position 0: a part has its own maximum and its own sum, and parts are merged in ascending order. The bits depend on
// the instruction set, but neither on the other rows and sequences of the call, nor on the split of a prompt into
// calls, the physical blocks or the threads. Scores, sums and the softmax are float32; where the CPU has bfloat16 dot
// products and the rows are bfloat16, queries, keys, values and probabilities are multiplied as bfloat16.
#pragma once

#include <cstdint>
#include <vector>

#include "fastsft/common.h"

namespace fastsft {

enum class KVFormat : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

struct KVLayout {
  KVFormat format;
  int64_t heads;       // key heads
  int64_t head_dim;    // a multiple of 16, at most 256
  int64_t block_size;  // tokens; a multiple of 16
};

// Throws Error for a head_dim or block_size outside the above.
int64_t kv_block_bytes(const KVLayout& layout);

// The rows of a step. Row i of sequence b, cu_seqlens[b] <= i < cu_seqlens[b + 1], is the token at position
// context_lens[b] - cu_seqlens[b + 1] + i; the last row of a sequence is its last token. A sequence may have no rows.
struct CacheRows {
  int64_t rows, sequences;
  const int32_t* cu_seqlens;    // [sequences + 1], from 0 ascending to rows
  const int32_t* context_lens;  // [sequences]: tokens in the cache, the step's included
  const int32_t* block_table;  // [sequences, table_stride]: token p is slot p % block_size of block [b, p / block_size]
  int64_t table_stride;
};

// Throws Error unless offsets ascend from 0 to rows, contexts hold their rows and fit the table, and the blocks of the
// contexts lie in [0, num_blocks). Reads the table; neither function below checks again.
void check_cache_rows(const KVLayout& layout, const CacheRows& rows, int64_t num_blocks);

// Some rows of a step as a step of their own, whose keys and values are in the cache. Rows of a sequence that follow
// each other stay together. Choosing again reuses the memory.
struct ChosenRows {
  CacheRows rows;
  std::vector<int32_t> cu_seqlens, context_lens, block_table;  // behind `rows`
  std::vector<int64_t> origins;                                // of each sequence, that of the step

  void choose(const CacheRows& step, const int64_t* which, int64_t count);
};

// Writes K and V of rows [row_begin, row_end) of the step to one layer's blocks. k and v are [rows, heads, D] of
// `dtype`, rows k_stride and v_stride elements apart: kFloat32 for a float32 cache, kBFloat16 for a bfloat16 one,
// either for int8. Ranges of a step may be written by several threads at once: no two rows write the same byte. A
// sequence's last row also clears the slots behind it up to a multiple of 16, so a block's bytes up to there follow
// from the tokens alone.
void kv_write(const KVLayout& layout, char* layer_blocks, const CacheRows& rows, DType dtype, const void* k,
              const void* v, int64_t k_stride, int64_t v_stride, int64_t row_begin, int64_t row_end);

// Rows see the keys up to their own position, of those the last window_left + 1 if that is not -1. K and V of all rows
// of the step must have been written. A NaN or infinity in a value may also reach rows of its sequence that do not see
// it, if they stand in the same part.
struct CachedAttention {
  KVLayout layout;
  const char* layer_blocks;
  CacheRows rows;
  DType dtype;       // of q and out; as for kv_write
  const void* q;     // [rows, q_heads, D]; query head h reads key head h / (q_heads / heads)
  int64_t q_stride;  // elements between rows
  int64_t q_heads;   // a multiple of heads
  void* out;         // [rows, q_heads, D], must not overlap q
  int64_t out_stride;
  int64_t window_left;  // -1: none
  float scale;          // of the scores
};

// How a step's attention is divided. It depends on layout, rows, q_heads, window_left and `threads` alone: the same
// plan serves every layer that has them. It holds no pointers. Bits do not depend on it.
struct AttentionTask {
  int32_t sequence;
  int32_t head_begin, head_end;  // key heads
  int32_t row_begin, row_end;    // of the step
  int32_t part_begin, part_end;  // of 256 keys
  int64_t partials;              // where the parts go in the scratch memory, in floats; -1: straight to out
};
struct CachedAttentionPlan {
  std::vector<AttentionTask> tasks;   // of a prompt the costliest first
  std::vector<AttentionTask> merges;  // of rows whose parts were spread over several tasks
  int64_t scratch_bytes = 0;          // 0 where there are no merges, as always with one thread
};

// Rewrites `plan`, reusing its memory.
void plan_cached_attention(const KVLayout& layout, const CacheRows& rows, int64_t q_heads, int64_t window_left,
                           int threads, CachedAttentionPlan& plan);

// To run a call within a team of threads of one's own: each task once, in any order, on any threads; then, after all of
// them, each merge, likewise. A task and a merge write rows of `out` of their own. `scratch`: plan.scratch_bytes,
// aligned to 64, shared by the team, not needed after the merges. A task also uses the memory of its thread's
// thread_scratch (csrc/cpu/scratch.h): `scratch` must not be that.
void cached_attention_task(const CachedAttention& call, const AttentionTask& task, float* scratch);
void cached_attention_merge(const CachedAttention& call, const AttentionTask& merge, const float* scratch);

// All of it, on the package's threads.
void cached_attention(const CachedAttention& call);

}  // namespace fastsft
