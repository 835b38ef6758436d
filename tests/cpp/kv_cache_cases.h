// A layer of a model with the texts that it has seen, for the tests of attention over a cache, and its float64 answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/kv_cache.h"

namespace fastsft {

struct Type {
  KVFormat format;
  DType dtype;
};
constexpr Type kTypes[] = {{KVFormat::kFloat32, DType::kFloat32},
                           {KVFormat::kBFloat16, DType::kBFloat16},
                           {KVFormat::kInt8, DType::kBFloat16},
                           {KVFormat::kInt8, DType::kFloat32}};

inline float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint16_t narrow(float v) {  // of finite values
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Values [tokens, width] in the type of the rows; `floats` are what they stand for.
struct Rows {
  int64_t width = 0;
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  bool is_half = false;

  Rows() = default;
  Rows(DType dtype, int64_t tokens, int64_t row_width, unsigned seed)
      : width(row_width), floats(static_cast<std::size_t>(tokens * row_width)), is_half(dtype == DType::kBFloat16) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& v : floats) v = normal(random);
    if (!is_half) return;
    for (float& v : floats) {
      halves.push_back(narrow(v));
      v = widen(halves.back());
    }
  }
  const void* at(int64_t token) const {
    return is_half ? static_cast<const void*>(halves.data() + token * width)
                   : static_cast<const void*>(floats.data() + token * width);
  }
};

// A model's layer with the texts that it has seen, each in blocks of its own.
struct World {
  KVLayout layout;
  DType dtype;
  int64_t group;
  int64_t window = -1;
  std::vector<int64_t> lengths = {};
  std::vector<Rows> q = {}, k = {}, v = {};
  std::vector<int32_t> table = {};
  int64_t stride = 0, num_blocks = 0;
  std::vector<char> blocks = {};

  void fill(std::vector<int64_t> tokens) {
    lengths = std::move(tokens);
    const int64_t dim = layout.head_dim;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const auto own = static_cast<unsigned>(100 + 3 * i);
      q.emplace_back(dtype, lengths[i], layout.heads * group * dim, own);
      k.emplace_back(dtype, lengths[i], layout.heads * dim, own + 1);
      v.emplace_back(dtype, lengths[i], layout.heads * dim, own + 2);
    }
    place(1);
  }

  // Nothing is written, and the texts have other blocks.
  void place(unsigned seed) {
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    stride = (longest + layout.block_size - 1) / layout.block_size + 1;
    num_blocks = stride * static_cast<int64_t>(lengths.size());
    table.resize(static_cast<std::size_t>(num_blocks));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(seed));
    blocks.assign(static_cast<std::size_t>(num_blocks * kv_block_bytes(layout)), static_cast<char>(0xff));  // NaN
  }

  struct Chunk {
    int64_t text, begin, end;
  };

  // One step: writes K and V of the chunks and returns the bytes of their rows.
  std::vector<char> step(const std::vector<Chunk>& chunks, int threads_of_plan = 0) {
    const int64_t dim = layout.head_dim, kv_width = layout.heads * dim, width = kv_width * group;
    const auto size = static_cast<int64_t>(dtype_size(dtype));
    std::vector<int32_t> cu = {0}, contexts, own_table;
    std::vector<char> q_rows, k_rows, v_rows;
    const auto append = [&](std::vector<char>& to, const Rows& from, const Chunk& c) {
      const char* begin = static_cast<const char*>(from.at(c.begin));
      to.insert(to.end(), begin, begin + (c.end - c.begin) * from.width * size);
    };
    for (const Chunk& c : chunks) {
      cu.push_back(cu.back() + static_cast<int32_t>(c.end - c.begin));
      contexts.push_back(static_cast<int32_t>(c.end));
      own_table.insert(own_table.end(), table.begin() + c.text * stride, table.begin() + (c.text + 1) * stride);
      append(q_rows, q[c.text], c), append(k_rows, k[c.text], c), append(v_rows, v[c.text], c);
    }
    const CacheRows rows{.rows = cu.back(),
                         .sequences = static_cast<int64_t>(chunks.size()),
                         .cu_seqlens = cu.data(),
                         .context_lens = contexts.data(),
                         .block_table = own_table.data(),
                         .table_stride = stride};
    check_cache_rows(layout, rows, num_blocks);
    for (int64_t row = 0; row < rows.rows; row += 3) {
      kv_write(layout, blocks.data(), rows, dtype, k_rows.data(), v_rows.data(), kv_width, kv_width, row,
               std::min(row + 3, rows.rows));
    }
    std::vector<char> out(static_cast<std::size_t>(rows.rows * width * size), 77);
    const CachedAttention call{.layout = layout,
                               .layer_blocks = blocks.data(),
                               .rows = rows,
                               .dtype = dtype,
                               .q = q_rows.data(),
                               .q_stride = width,
                               .q_heads = layout.heads * group,
                               .out = out.data(),
                               .out_stride = width,
                               .window_left = window,
                               .scale = 1 / std::sqrt(static_cast<float>(dim))};
    if (threads_of_plan == 0) {
      cached_attention(call);
      return out;
    }
    CachedAttentionPlan plan;
    plan_cached_attention(layout, rows, call.q_heads, window, threads_of_plan, plan);
    std::vector<float> scratch(static_cast<std::size_t>(plan.scratch_bytes / 4), NAN);
    std::reverse(plan.tasks.begin(), plan.tasks.end());
    for (const AttentionTask& task : plan.tasks) cached_attention_task(call, task, scratch.data());
    for (const AttentionTask& merge : plan.merges) cached_attention_merge(call, merge, scratch.data());
    return out;
  }

  // Writes K and V of tokens [begin, end) of a text.
  void write(int64_t text, int64_t begin, int64_t end) {
    const int32_t cu[] = {0, static_cast<int32_t>(end - begin)}, contexts[] = {static_cast<int32_t>(end)};
    const CacheRows rows{.rows = cu[1],
                         .sequences = 1,
                         .cu_seqlens = cu,
                         .context_lens = contexts,
                         .block_table = table.data() + text * stride,
                         .table_stride = stride};
    check_cache_rows(layout, rows, num_blocks);
    const int64_t width = layout.heads * layout.head_dim;
    kv_write(layout, blocks.data(), rows, dtype, k[text].at(begin), v[text].at(begin), width, width, 0, rows.rows);
  }

  // What the cache holds of a row, by the formula of the header.
  std::vector<double> stored(const float* row) const {
    std::vector<double> values(row, row + layout.head_dim);
    if (layout.format != KVFormat::kInt8) return values;
    float most = 0;
    for (double x : values) most = std::max(most, static_cast<float>(std::fabs(x)));
    const float scale = most / 127;
    for (double& x : values) x = std::nearbyint(static_cast<float>(x) / scale) * static_cast<double>(scale);
    return values;
  }

  // Rows [begin, end) of a text in float64.
  std::vector<double> exact(int64_t text, int64_t begin, int64_t end) const {
    const int64_t dim = layout.head_dim, heads = layout.heads * group;
    std::vector<double> out(static_cast<std::size_t>((end - begin) * heads * dim));
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<std::vector<double>> keys, values;
      for (int64_t j = 0; j < end; ++j) {
        const int64_t at = (j * layout.heads + h / group) * dim;
        keys.push_back(stored(k[text].floats.data() + at));
        values.push_back(stored(v[text].floats.data() + at));
      }
      for (int64_t i = begin; i < end; ++i) {
        const float* query = q[text].floats.data() + (i * heads + h) * dim;
        const int64_t first = window < 0 ? 0 : std::max<int64_t>(0, i - window);
        std::vector<double> p;
        for (int64_t j = first; j <= i; ++j) {
          double s = 0;
          for (int64_t d = 0; d < dim; ++d) s += query[d] * keys[j][d];
          p.push_back(s / std::sqrt(static_cast<double>(dim)));
        }
        const double most = *std::max_element(p.begin(), p.end());
        double total = 0;
        for (double& s : p) total += s = std::exp(s - most);
        double* row = out.data() + ((i - begin) * heads + h) * dim;
        for (int64_t j = first; j <= i; ++j) {
          for (int64_t d = 0; d < dim; ++d) row[d] += p[j - first] / total * values[j][d];
        }
      }
    }
    return out;
  }

  double error(const std::vector<char>& got, const std::vector<double>& expected) const {
    double worst = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      float value;
      if (dtype == DType::kFloat32) {
        std::memcpy(&value, got.data() + i * 4, 4);
      } else {
        uint16_t half;
        std::memcpy(&half, got.data() + i * 2, 2);
        value = widen(half);
      }
      const double difference = std::fabs(value - expected[i]);
      worst = difference <= worst ? worst : difference;  // a NaN stays
    }
    return worst;
  }
};

template <typename Visit>
void on_every_isa(Visit visit) {
  const Isa before = active_isa();
  for (Isa isa : available_isas()) {
    set_isa(isa);
    visit();
  }
  set_isa(before);
}

inline bool part_of(const std::vector<char>& whole, int64_t row, const std::vector<char>& part, int64_t row_bytes) {
  return std::memcmp(whole.data() + row * row_bytes, part.data(), part.size()) == 0;
}

}  // namespace fastsft
