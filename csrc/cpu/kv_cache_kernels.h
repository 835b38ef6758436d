// Private to kv_cache*.cpp: where things stand in a block, and the kernels of a task.
#pragma once

#include <cstdint>

#include "fastsft/isa.h"
#include "fastsft/kv_cache.h"

namespace fastsft {

// Internal linkage: the *.isa.cpp include this (see the hazard in isa.h).
namespace {

constexpr int64_t kGroupKeys = 16;  // whose K stands side by side
constexpr int64_t kPartKeys = 256;  // with a maximum of their own
constexpr int64_t kPartGroups = kPartKeys / kGroupKeys;
constexpr int64_t kMaxHeadDim = 256;

constexpr int64_t kv_element_bytes(KVFormat format) {
  return format == KVFormat::kFloat32 ? 4 : format == KVFormat::kBFloat16 ? 2 : 1;
}

// A block, in bytes.
struct KVPlaces {
  int64_t group;  // K, or V, of 16 tokens of a head
  int64_t half;   // from a head's K to its V
  int64_t scale;  // from a token's K scale to its V scale
  int64_t head, block;

  explicit KVPlaces(const KVLayout& layout)
      : group(kGroupKeys * layout.head_dim * kv_element_bytes(layout.format)),
        half(layout.block_size / kGroupKeys * group),
        scale(layout.format == KVFormat::kInt8 ? layout.block_size * 4 : 0),
        head(2 * half + 2 * scale),
        block(layout.heads * head) {}
};

// Rows of a task, per key head, are (token, query head of the group), token first.
[[maybe_unused]] int64_t task_rows(const CachedAttention& call, const AttentionTask& task) {
  return (task.row_end - task.row_begin) * (call.q_heads / call.layout.heads);
}
// A part of a key head in the scratch memory: sums [rows, D], maxima and totals [round16(rows)] each.
constexpr int64_t partial_stats(int64_t rows) { return (rows + 15) / 16 * 16; }
constexpr int64_t partial_floats(int64_t rows, int64_t dim) { return rows * dim + 2 * partial_stats(rows); }

// `work` holds this many bytes, aligned to 64; `rows` of each of the `heads`.
constexpr int64_t kWorkPitch = kPartKeys + 16;  // words; not a power of two, so that rows do not share cache sets
constexpr int64_t kv_work_bytes(int64_t heads, int64_t rows, int64_t dim) {
  const int64_t all = heads * rows + 16;
  return (all * (kWorkPitch + dim + 32) + 16 * kWorkPitch + heads * 4 * kPartGroups + 2 * kPartKeys * dim) * 4;
}
}  // namespace

FASTSFT_ISA_DECLARE(void, kv_attention_task, const CachedAttention& call, const AttentionTask& task, char* work,
                    float* scratch)
FASTSFT_ISA_DECLARE(void, kv_attention_merge, const CachedAttention& call, const AttentionTask& merge, char* work,
                    const float* scratch)

}  // namespace fastsft
