// Attention problems and the definition in float64, shared by the tests of the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "fastsft/attention.h"
#include "fastsft/rng.h"

namespace fastsft {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline Floats random_floats(int64_t n, uint64_t stream) {
  Floats values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = 4.0f * uniform_open(philox(7, stream, i).x[0]) - 2.0f;
  return values;
}

struct Problem {
  AttentionShape shape;
  std::vector<int32_t> cu_q, cu_k;
  Floats q, k, v, dout, dlse;

  int64_t total_q() const { return cu_q.back(); }
  int64_t total_k() const { return cu_k.back(); }
  AttentionBatch batch() const {
    return {cu_q.data(), cu_k.data(), static_cast<int64_t>(cu_q.size()) - 1, total_q(), total_k()};
  }
  AttentionInput rows(const Floats& x, int64_t heads) const {
    return {x.data(), heads * shape.head_dim, shape.head_dim};
  }
};

inline Problem make_problem(const std::vector<int>& lengths_q, const std::vector<int>& lengths_k, int64_t heads_q,
                            int64_t heads_k, int64_t dim) {
  Problem p;
  p.shape = {DType::kFloat32, heads_q, heads_k, dim, 1 / std::sqrt(static_cast<float>(dim)), 0.0f, true, -1, -1};
  p.cu_q = {0};
  p.cu_k = {0};
  for (int n : lengths_q) p.cu_q.push_back(p.cu_q.back() + n);
  for (int n : lengths_k) p.cu_k.push_back(p.cu_k.back() + n);
  p.q = random_floats(p.total_q() * heads_q * dim, 1);
  p.k = random_floats(p.total_k() * heads_k * dim, 2);
  p.v = random_floats(p.total_k() * heads_k * dim, 3);
  p.dout = random_floats(p.total_q() * heads_q * dim, 4);
  p.dlse = random_floats(p.total_q() * heads_q, 5);
  return p;
}

struct Result {
  Doubles out, lse, dq, dk, dv;
};

inline Result reference(const Problem& p) {
  const AttentionShape& s = p.shape;
  const int64_t dim = s.head_dim, group = s.num_q_heads / s.num_kv_heads;
  Result r{Doubles(p.q.size()), Doubles(p.dlse.size()), Doubles(p.q.size()), Doubles(p.k.size()), Doubles(p.v.size())};
  for (std::size_t b = 0; b + 1 < p.cu_q.size(); ++b) {
    const int64_t len_q = p.cu_q[b + 1] - p.cu_q[b], len_k = p.cu_k[b + 1] - p.cu_k[b];
    for (int64_t i = 0; i < len_q; ++i) {
      for (int64_t h = 0; h < s.num_q_heads; ++h) {
        const int64_t row = ((p.cu_q[b] + i) * s.num_q_heads + h) * dim, position = i + len_k - len_q;
        const int64_t stat = h * p.total_q() + p.cu_q[b] + i;
        const auto key_row = [&](int64_t j) { return ((p.cu_k[b] + j) * s.num_kv_heads + h / group) * dim; };
        const auto dot = [&](const Floats& x, const Floats& y, int64_t j) {
          return std::inner_product(x.begin() + row, x.begin() + row + dim, y.begin() + key_row(j), 0.0);
        };
        Doubles probs(len_k, -INFINITY), slopes(len_k, 1.0), gains(len_k);  // gains: dout times v
        double top = -INFINITY, total = 0, delta = 0;
        for (int64_t j = 0; j < len_k; ++j) {
          if (s.causal && j > position) continue;
          if (s.window_left >= 0 && j < position - s.window_left) continue;
          if (s.window_right >= 0 && j > position + s.window_right) continue;
          probs[j] = dot(p.q, p.k, j) * s.scale;
          if (s.softcap > 0) {
            const double t = std::tanh(probs[j] / s.softcap);
            slopes[j] = 1 - t * t;
            probs[j] = s.softcap * t;
          }
          top = std::max(top, probs[j]);
        }
        r.lse[stat] = -INFINITY;
        if (top == -INFINITY) continue;
        for (double& x : probs) total += x = std::exp(x - top);
        r.lse[stat] = top + std::log(total);
        for (int64_t j = 0; j < len_k; ++j) {
          if (probs[j] == 0) continue;
          probs[j] /= total;
          gains[j] = dot(p.dout, p.v, j);
          delta += probs[j] * gains[j];
        }
        for (int64_t j = 0; j < len_k; ++j) {
          if (probs[j] == 0) continue;
          const double dscore = probs[j] * (gains[j] - delta + p.dlse[stat]) * slopes[j] * static_cast<double>(s.scale);
          for (int64_t d = 0; d < dim; ++d) {
            r.out[row + d] += probs[j] * p.v[key_row(j) + d];
            r.dv[key_row(j) + d] += probs[j] * p.dout[row + d];
            r.dq[row + d] += dscore * p.k[key_row(j) + d];
            r.dk[key_row(j) + d] += dscore * p.q[row + d];
          }
        }
      }
    }
  }
  return r;
}

inline bool close(const Floats& ours, const Doubles& exact, double tolerance = 2e-4) {
  for (std::size_t i = 0; i < ours.size(); ++i) {
    if (std::isinf(exact[i]) ? ours[i] != exact[i] : !(std::abs(ours[i] - exact[i]) < tolerance)) {
      std::printf("element %zu: %g, expected %g\n", i, ours[i], exact[i]);
      return false;
    }
  }
  return true;
}

}  // namespace fastsft
