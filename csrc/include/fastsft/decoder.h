// A step of a decoder-only transformer over cached keys and values, all layers in one call: the next tokens of some
// sequences in, logits of the rows asked for out. Prompts, single tokens and drafts to be verified are the same to it.
//
// Each operation computes a row from that row's inputs in a fixed order (matvec.h, kv_cache.h): a row's logits, and the
// bytes written to the cache, depend neither on what shares the step, nor on how a prompt was split into steps, nor on
// the number of threads. The formulas are those of the model in training, and every operation rounds to `dtype` as
// there; logits alone stay float32.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "fastsft/common.h"
#include "fastsft/kv_cache.h"
#include "fastsft/matvec.h"

namespace fastsft {

struct DecoderLayer {
  const float* attention_norm;   // [hidden]
  PackedWeight qkv;              // of all heads: the queries', the keys', the values'
  const float* qkv_bias;         // or null, like all biases
  const float *q_norm, *k_norm;  // [head_dim], over each head before the rotation; or null
  PackedWeight o;
  const float* o_bias;
  const float* mlp_norm;  // [hidden]
  PackedWeight gate_up;   // the gate's channels, then as many of `up`
  const float* gate_up_bias;
  PackedWeight down;
  const float* down_bias;
  int64_t window_left;  // keys seen before a token's own; -1: all
};

struct Decoder {
  DType dtype;  // of activations: float32 or bfloat16
  int64_t vocab, hidden, heads, kv_heads, head_dim, intermediate;
  float eps;
  const void* embedding;  // [vocab, hidden] of `dtype`
  std::vector<DecoderLayer> layers;
  const float* norm;  // [hidden]
  PackedWeight head;  // [vocab, hidden]
};

// What an adapter (LoRA, arXiv 2106.09685) adds to a product with x: b (a x), each product rounded to the decoder's
// dtype. Of products stacked along n, such as qkv, a stacks theirs and b has theirs on its diagonal, zero elsewhere.
struct LowRank {
  PackedWeight a;  // [rank, k]; rank 0: nothing is added
  PackedWeight b;  // [n, rank], the adapter's scale in it
};

struct AdapterLayer {
  LowRank qkv, o, gate_up, down;
};

struct Adapter {
  std::vector<AdapterLayer> layers;  // as many as the decoder has
};

struct DecoderStep {
  CacheRows rows;
  const Adapter* const* adapters;  // [sequences], null where none; or null
  const int64_t* ids;              // [rows]
  const void *cos, *sin;           // [positions, head_dim / 2] of the decoder's dtype
  int64_t positions;               // at least the longest context
  KVLayout layout;
  char* cache;  // [layers, num_blocks, kv_block_bytes]
  int64_t num_blocks;
  const int64_t* wanted;  // [num_wanted]: rows of the step
  int64_t num_wanted;
  float* logits;  // [num_wanted, vocab]
  void* hidden;   // [num_wanted, hidden] of the decoder's dtype: what the head multiplies; or null
};

// What a step works in. It grows to the largest step and is kept: a fresh page costs more than its share of a step.
class DecoderWorkspace {
 public:
  char* reserve(int64_t bytes);  // aligned to 64; the contents are lost
  std::vector<CachedAttentionPlan> plans;
  std::vector<int64_t> positions;
  ChosenRows wanted;

 private:
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

// Throws Error, before anything is written, for rows that do not fit the cache (check_cache_rows), an id outside
// [0, vocab), a context beyond `positions`, a wanted row that does not exist or a cache format that does not go with
// `dtype` (float32 with float32, bfloat16 with bfloat16, int8 with both).
void decoder_step(const Decoder& decoder, const DecoderStep& step, DecoderWorkspace& workspace);

}  // namespace fastsft
