// Sequences over a block cache and their attention by definition, in float64. Buffers have exactly their size; what no
// key may be read from is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "check.h"
#include "fastsft/attention.h"
#include "fastsft/rng.h"
#include "matrix.h"

namespace fastsft {

using Words = std::vector<uint16_t>;

inline uint16_t to_word(DType dtype, float x) {
  return dtype == DType::kBFloat16 ? cuda_host::float_to_bfloat16(x) : cuda_host::float_to_half(x);
}
inline float to_float(DType dtype, uint16_t word) {
  return dtype == DType::kBFloat16 ? cuda_host::bfloat16_to_float(word) : cuda_host::half_to_float(word);
}

struct Options {
  DType dtype = DType::kBFloat16;
  int heads_q = 4, heads_k = 2, dim = 64, block_size = 16;
  bool causal = true;
  int64_t left = -1, right = -1;
  float softcap = 0.0f, scale = 0.3f;
  int64_t extra_blocks = 2;  // columns of the table past the longest context
};

struct Problem {
  Options o;
  std::vector<int32_t> cu_q{0}, lens, table;
  int64_t max_blocks, num_blocks = 0;
  Words q, k, v;

  Problem(const Options& options, const std::vector<int>& queries, const std::vector<int>& contexts) : o(options) {
    for (int n : queries) cu_q.push_back(cu_q.back() + n);
    lens.assign(contexts.begin(), contexts.end());
    const auto blocks_of = [&](int n) { return (n + o.block_size - 1) / o.block_size; };
    max_blocks = blocks_of(*std::max_element(contexts.begin(), contexts.end())) + o.extra_blocks;
    for (int n : contexts) num_blocks += blocks_of(n);
    table.assign(lens.size() * max_blocks, -7);  // never valid
    int next = 0;
    for (std::size_t b = 0; b < lens.size(); ++b) {
      for (int i = 0; i < blocks_of(contexts[b]); ++i) {
        table[b * max_blocks + i] = static_cast<int32_t>(num_blocks - 1 - next++);
      }
    }
    q = random(int64_t{cu_q.back()} * o.heads_q * o.dim, 1);
    const uint16_t nan = to_word(o.dtype, NAN);
    const int64_t row = int64_t{o.heads_k} * o.dim;
    k.assign(num_blocks * o.block_size * row, nan);
    v = k;
    for (std::size_t b = 0; b < lens.size(); ++b) {
      for (int j = 0; j < lens[b]; ++j) {
        for (Words* cache : {&k, &v}) {
          const Words values = random(row, 100 + 2 * (1000 * b + j) + (cache == &v));
          std::copy(values.begin(), values.end(), cache->begin() + slot(b, j) * row);
        }
      }
    }
  }

  int64_t slot(std::size_t b, int64_t key) const {
    return int64_t{table[b * max_blocks + key / o.block_size]} * o.block_size + key % o.block_size;
  }

  Words random(int64_t n, uint64_t stream) const {
    Words words(n);
    for (int64_t i = 0; i < n; ++i) words[i] = to_word(o.dtype, 4.0f * uniform_open(philox(7, stream, i).x[0]) - 2.0f);
    return words;
  }

  AttentionShape shape() const {
    return {o.dtype, o.heads_q, o.heads_k, o.dim, o.scale, o.softcap, o.causal, o.left, o.right};
  }

  PagedCache cache() const {
    const int64_t row = int64_t{o.heads_k} * o.dim;
    return {.k = k.data(),
            .v = v.data(),
            .k_strides = {o.block_size * row, row, o.dim},
            .v_strides = {o.block_size * row, row, o.dim},
            .num_blocks = num_blocks,
            .block_size = o.block_size,
            .block_table = table.data(),
            .context_lens = lens.data(),
            .max_blocks = max_blocks};
  }

  Words run() const { return run(cache()); }

  Words run(const PagedCache& cache) const {
    const int64_t total = cu_q.back(), batch = static_cast<int64_t>(lens.size());
    Words out(q.size(), to_word(o.dtype, NAN));
    const int64_t max_keys = cache.max_blocks * cache.block_size;
    std::vector<float> scratch(cuda::paged_scratch(total * o.heads_q, o.dim, max_keys).floats, NAN);
    cuda::paged_attention_forward(shape(), cu_q.data(), batch, total, {q.data(), o.heads_q * o.dim, o.dim}, cache,
                                  out.data(), scratch.data(), nullptr);
    return out;
  }

  // Sequence b alone, with queries [first, last) of it and the context that ends with the last of these.
  Problem part(std::size_t b, int first, int last, int64_t extra_blocks) const {
    Problem p = *this;
    const int queries = cu_q[b + 1] - cu_q[b], row = o.heads_q * o.dim;
    p.cu_q = {0, last - first};
    p.lens = {lens[b] - (queries - last)};
    p.q.assign(q.begin() + (cu_q[b] + first) * row, q.begin() + (cu_q[b] + last) * row);
    p.max_blocks = (lens[b] + o.block_size - 1) / o.block_size + extra_blocks;
    p.table.assign(p.max_blocks, -7);
    const auto mine = table.begin() + b * max_blocks;
    std::copy(mine, mine + (lens[b] + o.block_size - 1) / o.block_size, p.table.begin());
    return p;
  }

  std::vector<double> reference() const {
    std::vector<double> out(q.size());
    const int group = o.heads_q / o.heads_k;
    for (std::size_t b = 0; b < lens.size(); ++b) {
      const int queries = cu_q[b + 1] - cu_q[b];
      for (int i = 0; i < queries * o.heads_q; ++i) {
        const int64_t row = (int64_t{cu_q[b]} * o.heads_q + i) * o.dim, head = i % o.heads_q / group;
        const int64_t position = lens[b] - queries + i / o.heads_q;
        const auto at = [&](const Words& cache, int64_t key, int d) {
          return static_cast<double>(to_float(o.dtype, cache[(slot(b, key) * o.heads_k + head) * o.dim + d]));
        };
        std::vector<double> scores(lens[b], -INFINITY);
        for (int64_t j = 0; j < lens[b]; ++j) {
          if (o.left >= 0 && j < position - o.left) continue;
          if (o.causal ? j > position : o.right >= 0 && j > position + o.right) continue;
          double dot = 0;
          for (int d = 0; d < o.dim; ++d) dot += to_float(o.dtype, q[row + d]) * at(k, j, d);
          scores[j] = dot * o.scale;
          if (o.softcap > 0) scores[j] = o.softcap * std::tanh(scores[j] / o.softcap);
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (double& s : scores) total += s = std::exp(s - top);
        for (int d = 0; d < o.dim; ++d) {
          for (int64_t j = 0; j < lens[b]; ++j) {
            if (scores[j] > 0) out[row + d] += scores[j] / total * at(v, j, d);
          }
        }
      }
    }
    return out;
  }

  // Probabilities and the result are rounded once each, to 8 or 11 bits; values are below 2.
  void check_accuracy(const char* what) const {
    const Words got = run();
    const std::vector<double> expected = reference();
    const double unit = o.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double error = std::fabs(to_float(o.dtype, got[i]) - expected[i]);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
    if (worst > 2 * unit) std::printf("%s: error %g, allowed %g\n", what, worst, 2 * unit);
    CHECK(worst <= 2 * unit);
  }
};

}  // namespace fastsft
