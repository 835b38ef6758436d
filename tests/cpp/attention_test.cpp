// Off-tile sizes on exactly sized heap buffers, so that AddressSanitizer sees any access beside them; the reference is
// the definition in float64. The precision rules are in tests/ops/test_attention.py.
#include "fastsft/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention_cases.h"
#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

template <typename Run>
void on_every_isa(Run run) {
  set_num_threads(3);
  for (Isa isa : available_isas()) {
    set_isa(isa);
    run();
  }
}

// Runs forward and backward with outputs full of NaN, so that what is not written shows.
void check_results(const Problem& p, const Result& exact) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const int64_t heads_q = p.shape.num_q_heads, heads_k = p.shape.num_kv_heads;
  Floats out(p.q.size(), kNan), lse(p.dlse.size(), kNan), dq = out, dk(p.k.size(), kNan), dv = dk;
  varlen_attention_forward(p.shape, p.batch(), p.rows(p.q, heads_q), p.rows(p.k, heads_k), p.rows(p.v, heads_k),
                           out.data(), lse.data());
  varlen_attention_backward(p.shape, p.batch(), p.rows(p.dout, heads_q), p.rows(p.q, heads_q), p.rows(p.k, heads_k),
                            p.rows(p.v, heads_k), p.rows(out, heads_q), lse.data(), p.dlse.data(), dq.data(), dk.data(),
                            dv.data());
  CHECK(close(out, exact.out));
  CHECK(close(lse, exact.lse));
  CHECK(close(dq, exact.dq));
  CHECK(close(dk, exact.dk));
  CHECK(close(dv, exact.dv));
}

void check_problem(const Problem& p) {
  const Result exact = reference(p);
  on_every_isa([&] { check_results(p, exact); });
}

}  // namespace

TEST(packed_sequences_of_odd_lengths) {
  check_problem(make_problem({1, 0, 67, 31, 3, 130}, {1, 0, 67, 31, 3, 130}, 4, 2, 32));
  check_problem(make_problem({70, 9}, {70, 9}, 7, 1, 80));
  check_problem(make_problem({65}, {65}, 1, 1, 256));
  check_problem(make_problem({300, 2, 256}, {300, 2, 256}, 3, 1, 64));  // several key blocks of the backward pass
  check_problem(make_problem({3, 1}, {1100, 600}, 4, 2, 32));           // several key segments of the forward
  check_problem(make_problem({}, {}, 2, 1, 64));
}

TEST(unequal_lengths_masks_and_softcap) {
  Problem p = make_problem({5, 90, 0, 40, 1}, {70, 33, 9, 0, 129}, 4, 2, 32);
  check_problem(p);
  p.shape.causal = false;
  check_problem(p);
  p.shape.window_left = 3, p.shape.window_right = 20;
  check_problem(p);
  p.shape.softcap = 1.5f;
  check_problem(p);
  p.shape.causal = true;
  check_problem(p);
}

TEST(more_query_heads_than_a_tile_has_rows) { check_problem(make_problem({9, 70}, {9, 70}, 201, 1, 32)); }

TEST(half_precision_inputs_round_once) {
  on_every_isa([] {
    // Values with 3 significant bits are exact in both formats: converted by hand, the result must match float32's.
    Problem p = make_problem({67}, {67}, 2, 1, 64);
    for (Floats* x : {&p.q, &p.k, &p.v}) {
      for (float& value : *x) value = std::round(value * 4) / 4;
    }
    Floats exact(p.q.size()), lse(p.dlse.size());
    varlen_attention_forward(p.shape, p.batch(), p.rows(p.q, 2), p.rows(p.k, 1), p.rows(p.v, 1), exact.data(),
                             lse.data());
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const auto narrow = [dtype](const Floats& x) {
        std::vector<uint16_t> words;
        for (float value : x) {
          uint32_t bits;
          std::memcpy(&bits, &value, 4);
          const uint32_t rebased = value == 0 ? 0 : (bits & 0x7fffffffu) - (112u << 23);
          words.push_back(static_cast<uint16_t>(
              dtype == DType::kBFloat16 ? bits >> 16 : ((bits >> 16) & 0x8000u) | (rebased >> 13)));
        }
        return words;
      };
      const auto q = narrow(p.q), k = narrow(p.k), v = narrow(p.v);
      std::vector<uint16_t> out(q.size());
      p.shape.dtype = dtype;
      const int64_t dim = p.shape.head_dim;
      varlen_attention_forward(p.shape, p.batch(), {q.data(), 2 * dim, dim}, {k.data(), dim, dim}, {v.data(), dim, dim},
                               out.data(), lse.data());
      for (std::size_t i = 0; i < out.size(); ++i) {
        float value;
        uint32_t bits = out[i];
        if (dtype == DType::kBFloat16) {
          bits <<= 16;
          std::memcpy(&value, &bits, 4);
        } else {
          const int exponent = static_cast<int>(bits >> 10 & 31);
          const auto fraction = static_cast<float>(bits & 1023);
          value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
          if (bits & 0x8000u) value = -value;
        }
        // Bfloat16 dot products take the probabilities in bfloat16, too. |v| <= 2.
        const bool are_probs_rounded = dtype == DType::kBFloat16 && active_isa() == Isa::kAvx512Bf16;
        const double slack = are_probs_rounded ? 0x1p-8 : 0.0;
        const double half_ulp = std::ldexp(std::abs(exact[i]), dtype == DType::kBFloat16 ? -8 : -11) + 0x1p-25;
        CHECK(std::abs(value - exact[i]) <= half_ulp * (1 + 1e-5) + slack);
      }
    }
  });
}

TEST(bfloat16_forward_and_backward) {
  for (int64_t dim : {32, 80, 128}) {
    Problem p = make_problem({67, 1, 300, 0, 8}, {67, 1, 300, 4, 3}, 3, 1, dim);
    for (Floats* x : {&p.q, &p.k, &p.v, &p.dout}) {
      for (float& value : *x) value = std::round(value * 4) / 4;  // exact in bfloat16
    }
    const Result exact = reference(p);
    const auto narrow = [](const Floats& x) {
      std::vector<uint16_t> words(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) {
        std::memcpy(&words[i], reinterpret_cast<const char*>(&x[i]) + 2, 2);
      }
      return words;
    };
    const auto widen = [](const std::vector<uint16_t>& words) {
      Floats x(words.size(), 0.0f);
      for (std::size_t i = 0; i < x.size(); ++i) std::memcpy(reinterpret_cast<char*>(&x[i]) + 2, &words[i], 2);
      return x;
    };
    p.shape.dtype = DType::kBFloat16;
    const auto q = narrow(p.q), k = narrow(p.k), v = narrow(p.v), dout = narrow(p.dout);
    on_every_isa([&] {
      std::vector<uint16_t> out(q.size(), 0x7fc0), dq = out, dk(k.size(), 0x7fc0), dv = dk;
      Floats lse(p.dlse.size());
      const auto rows = [dim](const std::vector<uint16_t>& x, int64_t heads) {
        return AttentionInput{x.data(), heads * dim, dim};
      };
      varlen_attention_forward(p.shape, p.batch(), rows(q, 3), rows(k, 1), rows(v, 1), out.data(), lse.data());
      varlen_attention_backward(p.shape, p.batch(), rows(dout, 3), rows(q, 3), rows(k, 1), rows(v, 1), rows(out, 3),
                                lse.data(), p.dlse.data(), dq.data(), dk.data(), dv.data());
      CHECK(close(widen(out), exact.out, 0.02));
      CHECK(close(lse, exact.lse));
      CHECK(close(widen(dq), exact.dq, 0.05));
      CHECK(close(widen(dk), exact.dk, 0.1));
      CHECK(close(widen(dv), exact.dv, 0.1));
    });
  }
}

TEST(paged_equals_packed_bit_for_bit) {
  on_every_isa([] {
    const int64_t heads_q = 6, heads_k = 2, dim = 32, block_size = 5;
    const std::vector<int32_t> contexts = {1, 71, 1040};
    const Problem p = make_problem({1, 71, 1040}, {1, 71, 1040}, heads_q, heads_k, dim);
    const int64_t row = heads_k * dim, max_blocks = 210, num_blocks = 226;
    std::vector<int32_t> table(3 * max_blocks, -1);
    Floats k_cache(num_blocks * block_size * row, NAN), v_cache = k_cache;
    int32_t block = 0;
    for (int b = 0; b < 3; ++b) {
      for (int64_t j = 0; j < contexts[b]; ++j) {
        if (j % block_size == 0) table[b * max_blocks + j / block_size] = (block++ * 7 + 3) % num_blocks;
        const int64_t to = (table[b * max_blocks + j / block_size] * block_size + j % block_size) * row;
        const int64_t from = (p.cu_k[b] + j) * row;
        std::copy_n(p.k.begin() + from, row, k_cache.begin() + to);
        std::copy_n(p.v.begin() + from, row, v_cache.begin() + to);
      }
    }
    PagedCache cache{};
    cache.k = k_cache.data(), cache.v = v_cache.data();
    for (int64_t* strides : {cache.k_strides, cache.v_strides}) {
      strides[0] = block_size * row, strides[1] = row, strides[2] = dim;
    }
    cache.num_blocks = num_blocks, cache.block_size = block_size, cache.max_blocks = max_blocks;
    cache.block_table = table.data(), cache.context_lens = contexts.data();
    Floats packed(p.q.size()), paged(p.q.size());
    varlen_attention_forward(p.shape, p.batch(), p.rows(p.q, heads_q), p.rows(p.k, heads_k), p.rows(p.v, heads_k),
                             packed.data(), nullptr);
    paged_attention_forward(p.shape, p.cu_q.data(), 3, p.total_q(), p.rows(p.q, heads_q), cache, paged.data());
    CHECK(paged == packed);

    // Decode: only the last query of each sequence.
    Floats last, out(3 * heads_q * dim);
    for (int b = 0; b < 3; ++b) {
      const auto end = p.q.begin() + p.cu_q[b + 1] * heads_q * dim;
      last.insert(last.end(), end - heads_q * dim, end);
    }
    const std::vector<int32_t> one_each = {0, 1, 2, 3};
    paged_attention_forward(p.shape, one_each.data(), 3, 3, p.rows(last, heads_q), cache, out.data());
    for (int b = 0; b < 3; ++b) {
      CHECK(std::equal(out.begin() + b * heads_q * dim, out.begin() + (b + 1) * heads_q * dim,
                       packed.begin() + (p.cu_q[b + 1] - 1) * heads_q * dim));
    }
    table[0] = num_blocks;
    CHECK_THROWS(paged_attention_forward(p.shape, one_each.data(), 3, 3, p.rows(last, heads_q), cache, out.data()),
                 Error);
  });
}

TEST(bad_arguments) {
  Problem p = make_problem({3}, {3}, 2, 1, 32);
  Floats out(p.q.size());
  const auto run = [&] {
    varlen_attention_forward(p.shape, p.batch(), p.rows(p.q, 2), p.rows(p.k, 1), p.rows(p.v, 1), out.data(), nullptr);
  };
  run();
  p.shape.head_dim = 48;
  CHECK_THROWS(run(), Error);
  p.shape.head_dim = 32, p.shape.num_kv_heads = 3;
  CHECK_THROWS(run(), Error);
  p.shape.num_kv_heads = 1, p.shape.window_left = -2;
  CHECK_THROWS(run(), Error);
  p.shape.window_left = -1, p.cu_q = {1, 3};
  CHECK_THROWS(run(), Error);
}

TEST_MAIN()
