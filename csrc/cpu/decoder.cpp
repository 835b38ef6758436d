// Per step: every packed weight read once (per 128 rows, and from cache within these), the keys and values that the
// rows see, 2 flops per weight and row. With few rows it is bound by memory: about a dozen loops per layer follow each
// other on one team of threads, and the small ones between the products work on rows that stay in L1. With hundreds of
// rows it is bound by the products; rows then go through a layer 128 at a time, whose activations stay in a
// second-level cache. Of the last layer rows that are not wanted give their keys and values alone.
#include "fastsft/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "arena.h"
#include "fastsft/memory.h"
#include "fastsft/parallel.h"
#include "row_kernels.h"

namespace fastsft {
namespace {

constexpr int64_t kChunkRows = 128;
constexpr int64_t kTaskElements = 16384;  // of a loop over rows: tens of microseconds

int64_t rows_of_task(int64_t width) { return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width)); }

void check(const Decoder& d, const DecoderStep& step) {
  const CacheRows& rows = step.rows;
  check_cache_rows(step.layout, rows, step.num_blocks);
  FASTSFT_CHECK(step.layout.heads == d.kv_heads && step.layout.head_dim == d.head_dim, "decoder_step: cache: expected ",
                d.kv_heads, " heads of ", d.head_dim, ", got ", step.layout.heads, " of ", step.layout.head_dim);
  const KVFormat exact = d.dtype == DType::kFloat32 ? KVFormat::kFloat32 : KVFormat::kBFloat16;
  FASTSFT_CHECK(step.layout.format == exact || step.layout.format == KVFormat::kInt8, "decoder_step: cache: expected ",
                dtype_name(d.dtype), " or int8 beside ", dtype_name(d.dtype), " activations");
  for (int64_t i = 0; i < rows.rows; ++i) {
    FASTSFT_CHECK(step.ids[i] >= 0 && step.ids[i] < d.vocab, "decoder_step: ids: expected [0, ", d.vocab, "), got ",
                  step.ids[i]);
  }
  for (int64_t b = 0; b < rows.sequences; ++b) {
    FASTSFT_CHECK(rows.context_lens[b] <= step.positions, "decoder_step: context_lens: expected at most ",
                  step.positions, ", got ", rows.context_lens[b]);
  }
  for (int64_t i = 0; i < step.num_wanted; ++i) {
    FASTSFT_CHECK(step.wanted[i] >= 0 && step.wanted[i] < rows.rows, "decoder_step: wanted: expected rows in [0, ",
                  rows.rows, "), got ", step.wanted[i]);
  }
}

// Rows [begin, end) of a step.
struct Adapted {
  const Adapter* adapter;
  int64_t begin, end;
};

// One step under way.
class Run {
 public:
  Run(const Decoder& decoder, const DecoderStep& step, DecoderWorkspace& workspace)
      : d_(decoder),
        step_(step),
        workspace_(workspace),
        size_(static_cast<int64_t>(dtype_size(decoder.dtype))),
        narrows_(!decoder.layers.empty() && step.num_wanted < step.rows.rows),
        rows_(step.rows) {
    const CacheRows& rows = step.rows;
    workspace.positions.resize(static_cast<std::size_t>(rows.rows));
    for (int64_t b = 0; b < rows.sequences; ++b) {
      const int64_t end = rows.cu_seqlens[b + 1];
      for (int64_t i = rows.cu_seqlens[b]; i < end; ++i) workspace.positions[i] = rows.context_lens[b] - end + i;
    }
    if (narrows_) workspace.wanted.choose(rows, step.wanted, step.num_wanted);
    find_adapted();
    plan_attention();
    Arena arena;
    lay_out(arena);
    arena = {.memory = workspace.reserve(arena.used), .used = 0};
    lay_out(arena);
  }

  void run() {
    embed();
    for (std::size_t i = 0; i < d_.layers.size(); ++i) {
      const DecoderLayer& layer = d_.layers[i];
      char* const blocks = step_.cache + static_cast<int64_t>(i) * step_.num_blocks * kv_block_bytes(step_.layout);
      for (int64_t row = 0; row < rows_.rows; row += kChunkRows) project(i, blocks, row);
      if (narrows_ && i + 1 == d_.layers.size()) narrow();
      attend(plans_[i], blocks, layer.window_left);
      for (int64_t row = 0; row < rows_.rows; row += kChunkRows) {
        const int64_t count = std::min(kChunkRows, rows_.rows - row);
        const char* const attended = at(attended_, row, attended_width());
        linear(layer.o, layer.o_bias, attended, count, at(x_, row, d_.hidden), true);
        adapt(i, &AdapterLayer::o, attended, row, count, at(x_, row, d_.hidden));
        feed_forward(i, row, count);
      }
    }
    head();
  }

 private:
  int64_t qkv_width() const { return (d_.heads + 2 * d_.kv_heads) * d_.head_dim; }
  int64_t attended_width() const { return d_.heads * d_.head_dim; }
  char* at(void* base, int64_t row, int64_t width) const { return static_cast<char*>(base) + row * width * size_; }

  // Sequences beside each other that share an adapter go through it together.
  void find_adapted() {
    adapted_.clear();
    for (int64_t b = 0; step_.adapters != nullptr && b < rows_.sequences; ++b) {
      const Adapter* const adapter = step_.adapters[origins_ == nullptr ? b : origins_[b]];
      if (adapter == nullptr) continue;
      const int64_t begin = rows_.cu_seqlens[b], end = rows_.cu_seqlens[b + 1];
      if (!adapted_.empty() && adapted_.back().adapter == adapter && adapted_.back().end == begin) {
        adapted_.back().end = end;
        continue;
      }
      adapted_.push_back({adapter, begin, end});
      for (const AdapterLayer& layer : adapter->layers) {
        rank_ = std::max({rank_, layer.qkv.a.n, layer.o.a.n, layer.gate_up.a.n, layer.down.a.n});
      }
    }
  }

  // A plan per window of the layers, and one of the rows wanted.
  void plan_attention() {
    std::vector<int64_t> windows;
    for (const DecoderLayer& layer : d_.layers) {
      auto found = std::find(windows.begin(), windows.end(), layer.window_left);
      plans_.push_back(static_cast<std::size_t>(found - windows.begin()));
      if (found == windows.end()) windows.push_back(layer.window_left);
    }
    if (workspace_.plans.size() < windows.size() + 1) workspace_.plans.resize(windows.size() + 1);
    const auto plan = [&](std::size_t i, const CacheRows& rows, int64_t window_left) {
      plan_cached_attention(step_.layout, rows, d_.heads, window_left, num_threads(), workspace_.plans[i]);
      partial_bytes_ = std::max(partial_bytes_, workspace_.plans[i].scratch_bytes);
    };
    for (std::size_t i = 0; i < windows.size(); ++i) plan(i, step_.rows, windows[i]);
    if (!narrows_) return;
    plans_.back() = windows.size();
    plan(windows.size(), workspace_.wanted.rows, d_.layers.back().window_left);
  }

  void lay_out(Arena& arena) {
    const int64_t rows = step_.rows.rows, chunk = std::max(std::min(rows, kChunkRows), step_.num_wanted);
    const int64_t kept = narrows_ ? step_.num_wanted : 0;
    x_ = arena.take(rows * d_.hidden * size_);
    qkv_ = arena.take(rows * qkv_width() * size_);
    attended_ = arena.take(rows * attended_width() * size_);
    normal_ = arena.take(chunk * d_.hidden * size_);
    gate_up_ = arena.take(std::min(rows, kChunkRows) * 2 * d_.intermediate * size_);
    hidden_ = arena.take(std::min(rows, kChunkRows) * d_.intermediate * size_);
    low_ = arena.take(std::min(rows, kChunkRows) * rank_ * size_);
    scales_ = arena.take<float>(std::max({chunk, rows * d_.heads}) * 4);
    partials_ = arena.take<float>(partial_bytes_);
    kept_x_ = arena.take(kept * d_.hidden * size_);
    kept_qkv_ = arena.take(kept * qkv_width() * size_);
  }

  void embed() {
    const int64_t bytes = d_.hidden * size_;
    for (int64_t i = 0; i < step_.rows.rows; ++i) {
      std::memcpy(at(x_, i, d_.hidden), static_cast<const char*>(d_.embedding) + step_.ids[i] * bytes,
                  static_cast<std::size_t>(bytes));
    }
  }

  // normal = the norm of `rows` rows of x
  void norm(const float* weight, const void* x, int64_t rows) {
    const RmsNorm call{.dtype = d_.dtype, .x = x, .weight = weight, .rows = rows, .size = d_.hidden, .eps = d_.eps};
    parallel_for(rows, rows_of_task(d_.hidden), [&](int64_t begin, int64_t end) {
      FASTSFT_ISA_SELECT(rms_norm_rows)(call, normal_, scales_, begin, end);
    });
  }

  // out = weight times x + bias, or out += that
  void linear(const PackedWeight& weight, const float* bias, const void* x, int64_t rows, void* out, bool add) {
    packed_linear({.weight = weight,
                   .dtype = d_.dtype,
                   .rows = rows,
                   .x = x,
                   .bias = bias,
                   .residual = add ? out : nullptr,
                   .out_dtype = d_.dtype,
                   .out = out});
  }

  // out += what the adapters add to the product with x, where rows `first` and on of the step have one.
  void adapt(std::size_t layer, LowRank AdapterLayer::* part, const void* x, int64_t first, int64_t rows, void* out) {
    for (const Adapted& run : adapted_) {
      const LowRank& low = run.adapter->layers[layer].*part;
      const int64_t begin = std::max(run.begin, first), end = std::min(run.end, first + rows);
      if (begin >= end || low.a.n == 0) continue;
      const char* const in = static_cast<const char*>(x) + (begin - first) * low.a.k * size_;
      linear(low.a, nullptr, in, end - begin, low_, false);
      linear(low.b, nullptr, low_, end - begin, at(out, begin - first, low.b.n), true);
    }
  }

  // Queries, keys and values of the chunk from row `first` on; keys and values into the cache.
  void project(std::size_t index, char* blocks, int64_t first) {
    const DecoderLayer& layer = d_.layers[index];
    const int64_t rows = std::min(kChunkRows, step_.rows.rows - first), width = qkv_width(), size = d_.head_dim;
    norm(layer.attention_norm, at(x_, first, d_.hidden), rows);
    linear(layer.qkv, layer.qkv_bias, normal_, rows, at(qkv_, first, width), false);
    adapt(index, &AdapterLayer::qkv, normal_, first, rows, at(qkv_, first, width));
    parallel_for(rows, rows_of_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = first + begin; row < first + end; ++row) {
        char* const q = at(qkv_, row, width);
        float* const scales = scales_ + row * d_.heads;
        norm_heads(layer.q_norm, q, d_.heads, scales);
        norm_heads(layer.k_norm, q + attended_width() * size_, d_.kv_heads, scales);
        const int64_t angles = workspace_.positions[row] * (size / 2) * size_;
        const Rope turn{.dtype = d_.dtype,
                        .x = q,
                        .cos = static_cast<const char*>(step_.cos) + angles,
                        .sin = static_cast<const char*>(step_.sin) + angles,
                        .tokens = 1,
                        .heads = d_.heads + d_.kv_heads,
                        .size = size};
        FASTSFT_ISA_SELECT(rope_tokens)(turn, false, q, 0, 1);
      }
      const char* const k = at(qkv_, 0, width) + attended_width() * size_;
      kv_write(step_.layout, blocks, step_.rows, d_.dtype, k, k + d_.kv_heads * size * size_, width, width,
               first + begin, first + end);
    });
  }

  void norm_heads(const float* weight, char* heads, int64_t count, float* scales) const {
    if (weight == nullptr) return;
    const RmsNorm call{
        .dtype = d_.dtype, .x = heads, .weight = weight, .rows = count, .size = d_.head_dim, .eps = d_.eps};
    FASTSFT_ISA_SELECT(rms_norm_rows)(call, heads, scales, 0, count);
  }

  void attend(std::size_t plan_index, const char* blocks, int64_t window_left) {
    const CachedAttentionPlan& plan = workspace_.plans[plan_index];
    const CachedAttention call{.layout = step_.layout,
                               .layer_blocks = blocks,
                               .rows = rows_,
                               .dtype = d_.dtype,
                               .q = qkv_,
                               .q_stride = qkv_width(),
                               .q_heads = d_.heads,
                               .out = attended_,
                               .out_stride = attended_width(),
                               .window_left = window_left,
                               .scale = 1.0f / std::sqrt(static_cast<float>(d_.head_dim))};
    parallel_for(static_cast<int64_t>(plan.tasks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) cached_attention_task(call, plan.tasks[i], partials_);
    });
    parallel_for(static_cast<int64_t>(plan.merges.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) cached_attention_merge(call, plan.merges[i], partials_);
    });
  }

  void feed_forward(std::size_t index, int64_t first, int64_t rows) {
    const DecoderLayer& layer = d_.layers[index];
    const int64_t width = d_.intermediate;
    char* const x = at(x_, first, d_.hidden);
    norm(layer.mlp_norm, x, rows);
    linear(layer.gate_up, layer.gate_up_bias, normal_, rows, gate_up_, false);
    adapt(index, &AdapterLayer::gate_up, normal_, first, rows, gate_up_);
    parallel_for(rows, rows_of_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const char* const gate = at(gate_up_, row, 2 * width);
        const SwiGlu unit{.dtype = d_.dtype, .gate = gate, .up = gate + width * size_, .size = width};
        FASTSFT_ISA_SELECT(swiglu_range)(unit, at(hidden_, row, width), 0, width);
      }
    });
    linear(layer.down, layer.down_bias, hidden_, rows, x, true);
    adapt(index, &AdapterLayer::down, hidden_, first, rows, x);
  }

  // From here on the step is that of the rows wanted.
  void narrow() {
    const auto keep = [&](void*& from, void* to, int64_t width) {
      const auto bytes = static_cast<std::size_t>(width * size_);
      for (int64_t i = 0; i < step_.num_wanted; ++i)
        std::memcpy(at(to, i, width), at(from, step_.wanted[i], width), bytes);
      from = to;
    };
    keep(x_, kept_x_, d_.hidden);
    keep(qkv_, kept_qkv_, qkv_width());
    rows_ = workspace_.wanted.rows;
    origins_ = workspace_.wanted.origins.data();
    find_adapted();
  }

  void head() {
    for (int64_t i = 0; i < step_.num_wanted; ++i) {
      const RmsNorm call{.dtype = d_.dtype,
                         .x = at(x_, narrows_ ? i : step_.wanted[i], d_.hidden),
                         .weight = d_.norm,
                         .rows = 1,
                         .size = d_.hidden,
                         .eps = d_.eps};
      FASTSFT_ISA_SELECT(rms_norm_rows)(call, at(normal_, i, d_.hidden), scales_, 0, 1);
    }
    if (step_.hidden != nullptr) {
      std::memcpy(step_.hidden, normal_, static_cast<std::size_t>(step_.num_wanted * d_.hidden * size_));
    }
    packed_linear({.weight = d_.head,
                   .dtype = d_.dtype,
                   .rows = step_.num_wanted,
                   .x = normal_,
                   .bias = nullptr,
                   .residual = nullptr,
                   .out_dtype = DType::kFloat32,
                   .out = step_.logits});
  }

  const Decoder& d_;
  const DecoderStep& step_;
  DecoderWorkspace& workspace_;
  const int64_t size_;                // bytes of an activation
  const bool narrows_;                // in the last layer, to the rows wanted
  CacheRows rows_;                    // under way
  const int64_t* origins_ = nullptr;  // of their sequences, where those are not the step's
  std::vector<std::size_t> plans_;    // of each layer
  std::vector<Adapted> adapted_;      // in the order of their rows
  int64_t rank_ = 0;                  // the largest of theirs
  int64_t partial_bytes_ = 0;
  void *x_ = nullptr, *qkv_ = nullptr, *attended_ = nullptr;         // [rows, ...]
  void *normal_ = nullptr, *gate_up_ = nullptr, *hidden_ = nullptr;  // [chunk, ...]
  void* low_ = nullptr;                                              // [chunk, rank]
  void *kept_x_ = nullptr, *kept_qkv_ = nullptr;                     // [wanted, ...], where rows are fewer at last
  float *scales_ = nullptr, *partials_ = nullptr;
};

}  // namespace

char* DecoderWorkspace::reserve(int64_t bytes) {
  if (bytes + 63 > size_) {
    size_ = bytes + 63;
    memory_.reset();
    memory_.reset(new char[static_cast<std::size_t>(size_)]);
    advise_huge_pages(memory_.get(), size_);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
  return memory_.get() + (64 - address % 64) % 64;
}

void decoder_step(const Decoder& decoder, const DecoderStep& step, DecoderWorkspace& workspace) {
  check(decoder, step);
  if (step.rows.rows == 0) return;
  with_team([&] { Run(decoder, step, workspace).run(); });
}

}  // namespace fastsft
