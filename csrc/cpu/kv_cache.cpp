#include "fastsft/kv_cache.h"

#include <algorithm>
#include <memory>

#include "fastsft/parallel.h"
#include "kv_cache_kernels.h"
#include "scratch.h"

namespace fastsft {
namespace {

constexpr int64_t kTileRows = 56;  // of a task: four strips of registers, one token at least
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kFewRows = 8;                     // memory-bound
constexpr int64_t kPartBytes = int64_t{256} << 10;  // of a task: with the next part, half of a second-level cache
constexpr int64_t kLeastParts = 2;                  // of a task: some microseconds

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a part: bringing in its keys and values costs about as much as multiplying four rows with them.
int64_t part_cost(int64_t rows) { return rows + 4; }

struct Parts {
  int64_t begin, end;
};
Parts parts_seen(int64_t first_position, int64_t tokens, int64_t window_left) {
  const int64_t key = window_left < 0 ? 0 : std::max<int64_t>(0, first_position - window_left);
  return {key / kPartKeys, ceil_div(first_position + tokens, kPartKeys)};
}

// Calls visit(sequence, first row, rows, parts) for every tile of rows, those with the longest contexts of a sequence
// first.
template <typename Visit>
void for_each_tile(const CacheRows& rows, int64_t tile_tokens, int64_t window_left, Visit&& visit) {
  for (int64_t b = 0; b < rows.sequences; ++b) {
    const int64_t begin = rows.cu_seqlens[b], tokens = rows.cu_seqlens[b + 1] - begin;
    const int64_t tiles = ceil_div(tokens, tile_tokens);
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      const int64_t from = tile * tile_tokens, count = std::min(tile_tokens, tokens - from);
      visit(b, begin + from, count, parts_seen(rows.context_lens[b] - tokens + from, count, window_left));
    }
  }
}

}  // namespace

int64_t kv_block_bytes(const KVLayout& layout) {
  FASTSFT_CHECK(layout.heads >= 1, "kv_cache: heads: expected >= 1, got ", layout.heads);
  FASTSFT_CHECK(layout.head_dim >= 16 && layout.head_dim <= kMaxHeadDim && layout.head_dim % 16 == 0,
                "kv_cache: head_dim: expected a multiple of 16 up to ", kMaxHeadDim, ", got ", layout.head_dim);
  FASTSFT_CHECK(layout.block_size >= 16 && layout.block_size % kGroupKeys == 0,
                "kv_cache: block_size: expected a multiple of 16, got ", layout.block_size);
  return KVPlaces(layout).block;
}

void check_cache_rows(const KVLayout& layout, const CacheRows& rows, int64_t num_blocks) {
  FASTSFT_CHECK(rows.cu_seqlens[0] == 0 && rows.cu_seqlens[rows.sequences] == rows.rows,
                "kv_cache: cu_seqlens: expected offsets from 0 to ", rows.rows, ", got ", rows.cu_seqlens[0], " to ",
                rows.cu_seqlens[rows.sequences]);
  for (int64_t b = 0; b < rows.sequences; ++b) {
    const int64_t tokens = int64_t{rows.cu_seqlens[b + 1]} - rows.cu_seqlens[b], context = rows.context_lens[b];
    FASTSFT_CHECK(tokens >= 0, "kv_cache: cu_seqlens: expected ascending offsets, got ", rows.cu_seqlens[b], " before ",
                  rows.cu_seqlens[b + 1]);
    FASTSFT_CHECK(context >= tokens, "kv_cache: context_lens: expected at least the sequence's rows (", tokens,
                  "), got ", context, " of sequence ", b);
    const int64_t blocks = ceil_div(context, layout.block_size);
    FASTSFT_CHECK(blocks <= rows.table_stride, "kv_cache: block_table: expected ", blocks, " blocks for ", context,
                  " tokens of sequence ", b, ", got ", rows.table_stride);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = rows.block_table[b * rows.table_stride + i];
      FASTSFT_CHECK(block >= 0 && block < num_blocks, "kv_cache: block_table: expected blocks from 0 to ",
                    num_blocks - 1, ", got ", block, " of sequence ", b);
    }
  }
}

void ChosenRows::choose(const CacheRows& step, const int64_t* which, int64_t count) {
  cu_seqlens.assign(1, 0);
  context_lens.clear();
  block_table.clear();
  origins.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = which[i];
    const int32_t* const ends = step.cu_seqlens + 1;
    const int64_t b = std::upper_bound(ends, ends + step.sequences, row) - ends;
    if (i > 0 && row == which[i - 1] + 1 && b == origins.back()) {
      ++cu_seqlens.back();
      ++context_lens.back();
      continue;
    }
    const int32_t* const table = step.block_table + b * step.table_stride;
    cu_seqlens.push_back(static_cast<int32_t>(i + 1));
    context_lens.push_back(step.context_lens[b] - ends[b] + static_cast<int32_t>(row) + 1);
    block_table.insert(block_table.end(), table, table + step.table_stride);
    origins.push_back(b);
  }
  rows = {.rows = count,
          .sequences = static_cast<int64_t>(origins.size()),
          .cu_seqlens = cu_seqlens.data(),
          .context_lens = context_lens.data(),
          .block_table = block_table.data(),
          .table_stride = step.table_stride};
}

void plan_cached_attention(const KVLayout& layout, const CacheRows& rows, int64_t q_heads, int64_t window_left,
                           int threads, CachedAttentionPlan& plan) {
  const int64_t group = q_heads / layout.heads, tile_tokens = std::max<int64_t>(1, kTileRows / group);
  const KVPlaces places(layout);
  int64_t total = 0, room = 0;
  for_each_tile(rows, tile_tokens, window_left, [&](int64_t, int64_t, int64_t tokens, Parts parts) {
    total += (parts.end - parts.begin) * part_cost(tokens * group) * layout.heads;
  });
  const int64_t share = threads <= 1 ? total : std::max<int64_t>(1, total / (threads * kTasksPerThread));
  plan.tasks.clear();
  plan.merges.clear();
  for_each_tile(rows, tile_tokens, window_left, [&](int64_t b, int64_t row, int64_t tokens, Parts parts) {
    const int64_t query_rows = tokens * group, count = parts.end - parts.begin;
    // Few rows: heads that stand next to each other are read together.
    const int64_t side_by_side =
        query_rows > kFewRows ? 1 : std::max<int64_t>(1, kPartBytes / (places.head * kPartKeys / layout.block_size));
    for (int64_t head = 0; head < layout.heads; head += side_by_side) {
      AttentionTask task{.sequence = static_cast<int32_t>(b),
                         .head_begin = static_cast<int32_t>(head),
                         .head_end = static_cast<int32_t>(std::min(head + side_by_side, layout.heads)),
                         .row_begin = static_cast<int32_t>(row),
                         .row_end = static_cast<int32_t>(row + tokens),
                         .part_begin = static_cast<int32_t>(parts.begin),
                         .part_end = static_cast<int32_t>(parts.end),
                         .partials = -1};
      const int64_t heads = task.head_end - task.head_begin;
      const int64_t at_once = std::max(kLeastParts, ceil_div(share, part_cost(query_rows) * heads));
      if (at_once >= count) {
        plan.tasks.push_back(task);
        continue;
      }
      const int64_t per_task = ceil_div(count, ceil_div(count, at_once));
      const int64_t size = partial_floats(query_rows, layout.head_dim) * heads;
      task.partials = room;
      plan.merges.push_back(task);
      for (int64_t part = parts.begin; part < parts.end; part += per_task) {
        task.part_begin = static_cast<int32_t>(part);
        task.part_end = static_cast<int32_t>(std::min(part + per_task, parts.end));
        task.partials = room + (part - parts.begin) * size;
        plan.tasks.push_back(task);
      }
      room += count * size;
    }
  });
  plan.scratch_bytes = room * 4;
}

void cached_attention_task(const CachedAttention& call, const AttentionTask& task, float* scratch) {
  const int64_t bytes = kv_work_bytes(task.head_end - task.head_begin, task_rows(call, task), call.layout.head_dim);
  FASTSFT_ISA_SELECT(kv_attention_task)
  (call, task, static_cast<char*>(thread_scratch(bytes)), task.partials < 0 ? nullptr : scratch);
}

void cached_attention_merge(const CachedAttention& call, const AttentionTask& merge, const float* scratch) {
  const int64_t bytes = kv_work_bytes(0, 0, call.layout.head_dim);
  FASTSFT_ISA_SELECT(kv_attention_merge)(call, merge, static_cast<char*>(thread_scratch(bytes)), scratch);
}

void cached_attention(const CachedAttention& call) {
  CachedAttentionPlan plan;
  plan_cached_attention(call.layout, call.rows, call.q_heads, call.window_left, num_threads(), plan);
  std::unique_ptr<float[]> scratch;
  if (plan.scratch_bytes > 0) scratch = std::make_unique_for_overwrite<float[]>(plan.scratch_bytes / 4);
  const auto run = [&](const std::vector<AttentionTask>& tasks, auto&& each) {
    parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) each(call, tasks[i], scratch.get());
    });
  };
  run(plan.tasks, cached_attention_task);
  run(plan.merges, cached_attention_merge);
}

}  // namespace fastsft
