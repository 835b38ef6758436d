// Attention over packed sequences, forward and backward, and forward over a paged key/value cache.
//
// Shapes: q, out, dq [Tq, Hq, D]; k, v, dk, dv [Tk, Hkv, D]; lse [Hq, Tq] float32, natural logarithm. Hq % Hkv == 0:
// query head h reads key head h / (Hq / Hkv). D is one of 32, 64, 80, 96, 128, 256.
// Element types: q, k, v, out and the gradients share one of float32, bfloat16, float16; everything is accumulated in
// float32 and rounded once, on store. One exception: with bfloat16 dot products (Isa::kAvx512Bf16) and bfloat16 inputs,
// probabilities and score gradients are rounded to bfloat16 before they are multiplied.
//
// Which keys a query sees: query i of a sequence with len_q queries and len_k keys stands at key position
// p = i + len_k - len_q (bottom-right alignment) and sees keys p - window_left .. p + window_right, -1 meaning
// unbounded; causal caps the right side at p. A query that sees no key has output 0, lse -infinity and gradient 0.
// softcap > 0 replaces a scaled score s by softcap * tanh(s / softcap).
//
// Determinism: the same bits on every run and for every number of threads (they do depend on the instruction set). In
// the forward functions a query row's bits depend on its own row, its sequence's keys and values and its position only:
// not on the other sequences, nor on how many queries of its sequence are in the call. Blocks and segments of keys, the
// units of rounding, are counted from key 0; how segments are shared out does not show. A NaN or infinity stays inside
// its own sequence.
//
// Aliasing: outputs must not overlap inputs or each other. Empty sequences, Tq = 0 and Tk = 0 are legal.
// Errors: Error for a head size, head count, offset or block id outside the contract.
#pragma once

#include <cstdint>

#include "fastsft/common.h"

namespace fastsft {

// A [tokens, heads, D] tensor whose last dimension is contiguous; strides in elements.
struct AttentionInput {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionShape {
  DType dtype;
  int64_t num_q_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float scale;
  float softcap;  // 0 = off
  bool causal;
  int64_t window_left;   // -1 = unbounded
  int64_t window_right;  // -1 = unbounded
};

// Sequence b owns queries [cu_q[b], cu_q[b+1]) and keys [cu_k[b], cu_k[b+1]); both arrays hold batch + 1 offsets.
struct AttentionBatch {
  const int32_t* cu_q;
  const int32_t* cu_k;
  int64_t batch;
  int64_t total_q;
  int64_t total_k;
};

// out is contiguous; lse may be null.
void varlen_attention_forward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionInput& q,
                              const AttentionInput& k, const AttentionInput& v, void* out, float* lse);

// dlse, the gradient of lse, may be null. dq, dk, dv are contiguous and are written in full.
void varlen_attention_backward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionInput& dout,
                               const AttentionInput& q, const AttentionInput& k, const AttentionInput& v,
                               const AttentionInput& out, const float* lse, const float* dlse, void* dq, void* dk,
                               void* dv);

// Key j of sequence b is slot j % block_size of block block_table[b * max_blocks + j / block_size].
struct PagedCache {
  const void* k;  // [num_blocks, block_size, Hkv, D], last dimension contiguous
  const void* v;
  int64_t k_strides[3];  // block, slot, head; in elements
  int64_t v_strides[3];
  int64_t num_blocks;
  int64_t block_size;
  const int32_t* block_table;   // [batch, max_blocks]
  const int32_t* context_lens;  // [batch]: keys per sequence, those of the current queries included
  int64_t max_blocks;
};

// Sequence b owns queries [cu_q[b], cu_q[b+1]), the last ones of its context. out is contiguous. Slots at or beyond
// context_lens[b] are not read, and may hold anything.
void paged_attention_forward(const AttentionShape& shape, const int32_t* cu_q, int64_t batch, int64_t total_q,
                             const AttentionInput& q, const PagedCache& cache, void* out);

namespace cuda {

inline constexpr int64_t kPagedSegment = 256;  // keys
inline constexpr int64_t kPagedScratchBytes = int64_t{128} << 20;

// Partial results per query row (query, head) of paged_attention_forward, and the floats of scratch memory they need:
// one per segment of keys, or, where those would need too much memory, one in all; none if there is one segment.
struct PagedScratch {
  int64_t splits, floats;
};

// max_keys = max_blocks * block_size
inline PagedScratch paged_scratch(int64_t query_rows, int64_t head_dim, int64_t max_keys) {
  const int64_t segments = (max_keys + kPagedSegment - 1) / kPagedSegment, size = head_dim + 2;
  if (segments <= 1) return {1, 0};
  if (query_rows * segments * size * 4 > kPagedScratchBytes) return {1, query_rows * size};
  return {segments, query_rows * (segments * size + 1)};
}

// The same on the device `stream` (a cudaStream_t) belongs to, all pointers in its memory; bfloat16 and float16. Starts
// kernels only: no allocation, no synchronisation, and grids that depend on the shapes alone, so that a CUDA graph may
// replay it with other offsets, tables and lengths. Blocks of 16 keys and segments of 256 are counted from key 0, hence
// the bits of a row depend on what they do on the CPU; they differ from the CPU's.
// Values are not checked on the host: a row whose context is shorter than its queries or longer than its blocks, or
// that sees a key of a block id outside [0, num_blocks), is NaN; with offsets that do not ascend from 0 to total_q the
// output is unspecified. Nothing outside the arguments is read or written in any case. Errors: Error for float32, a
// head size outside the contract, rows of q, k or v that do not start at multiples of 16 bytes (q: of 4), and Tq * Hq
// >= 2^31; std::runtime_error for a launch that failed.
void paged_attention_forward(const AttentionShape& shape, const int32_t* cu_q, int64_t batch, int64_t total_q,
                             const AttentionInput& q, const PagedCache& cache, void* out, float* scratch, void* stream);

// varlen_attention_* on the device, all pointers in its memory; bfloat16 and float16, head sizes 64, 80, 96, 128, 256.
// The contract above with these differences:
//   Probabilities and score gradients are rounded to the element type before they are multiplied.
//   A row's bits are the same on every run, but depend on where its sequence lies in the packed buffer.
//   Offsets are device data that nothing on the host reads: ones outside the contract give wrong results, but no access
//   outside the tensors.
//   A NaN or infinity also reaches rows of neighbouring sequences that share a block of 16 rows with its sequence; in
//   the kernels of sm_90a, which multiply 64 rows with up to 128 others at once, those that share such a tile.
//   q, k, v, out and dout are read 16 bytes at a time: data and strides (in bytes) are multiples of 16.
//   Kernels are started on `stream` (a cudaStream_t) and nothing else: no allocation, no synchronisation, and grids
//   that depend on the shapes alone, so that a CUDA graph may replay them with other offsets.

// Every query row sees an interval lo .. hi - 1 of packed key rows, every key row is seen by an interval of query rows,
// whatever the documents, the windows and the alignment. hi < 0 stands for ~hi and marks rows of sequences that the
// backward pass handles whole (at most kShortSequence queries and keys).
struct AttentionInterval {
  int32_t lo, hi;
};

inline constexpr int kPlanTile = 128;  // packed rows whose cost the plan counts together
inline constexpr int kShortSequence = 64;

// What the kernels know of a batch and its mask. One plan serves every layer, forward and backward. An order lists
// tiles of kPlanTile rows, the costliest first; ~tile where every row belongs to a short sequence.
struct AttentionPlan {
  AttentionInterval* rows;     // [total_q]
  AttentionInterval* columns;  // [total_k]
  int32_t* forward_order;      // [tiles of total_q]
  int32_t* dq_order;           // [tiles of total_q], short sequences cost nothing
  int32_t* dkv_order;          // [tiles of total_k], likewise
  int32_t* costs;              // of the tiles of the three orders, by number: rows seen; -1: all in short sequences
};

int64_t attention_plan_size(int64_t total_q, int64_t total_k);  // int32 words of a plan's memory
AttentionPlan attention_plan_at(int32_t* memory, int64_t total_q, int64_t total_k);

// Reads the mask (causal, windows) of `shape` alone. cu_q and cu_k are device pointers.
void make_attention_plan(const AttentionShape& shape, const AttentionBatch& batch, const AttentionPlan& plan,
                         void* stream);

// Whether these kernels serve the element type and head size.
bool has_varlen_attention(DType dtype, int64_t head_dim);

void varlen_attention_forward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionPlan& plan,
                              const AttentionInput& q, const AttentionInput& k, const AttentionInput& v, void* out,
                              float* lse, void* stream);

// delta [Hq, Tq] is scratch memory.
void varlen_attention_backward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionPlan& plan,
                               const AttentionInput& dout, const AttentionInput& q, const AttentionInput& k,
                               const AttentionInput& v, const AttentionInput& out, const float* lse, const float* dlse,
                               float* delta, void* dq, void* dk, void* dv, void* stream);

}  // namespace cuda

}  // namespace fastsft
