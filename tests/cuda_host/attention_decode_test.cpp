// csrc/cuda/attention_decode.cu in the emulator, against the definition in float64 and against itself: a row's bits
// must not depend on what else is in the call.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_decode_cases.h"
#include "emulator.h"

using namespace fastsft;

namespace {

constexpr int64_t kManyBlocks = 2'500'000;  // partial results of all their segments would need too much memory
const std::vector<int> kQueries{1, 1, 5, 0, 2, 1, 3}, kContexts{1, 17, 40, 9, 257, 530, 16};

}  // namespace

TEST(every_head_size_and_type) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int dim : {32, 64, 80, 96, 128, 256}) {
      Problem({.dtype = dtype, .dim = dim, .scale = 1.0f / std::sqrt(static_cast<float>(dim))}, {1, 2, 1}, {5, 33, 300})
          .check_accuracy("head size");
    }
  }
}

TEST(groups_of_query_heads) {
  for (const auto& [heads_q, heads_k] : {std::pair{1, 1}, {3, 3}, {7, 1}, {16, 1}, {34, 2}}) {
    Problem({.dtype = DType::kFloat16, .heads_q = heads_q, .heads_k = heads_k, .dim = 32}, {1, 3, 2}, {30, 65, 270})
        .check_accuracy("group");
  }
}

TEST(masks_and_options) {
  DType dtype = DType::kFloat16;
  for (Options o :
       {Options{}, Options{.left = 20}, Options{.left = 0}, Options{.left = 300}, Options{.causal = false},
        Options{.causal = false, .left = 3, .right = 2}, Options{.causal = false, .right = 0}, Options{.softcap = 2.0f},
        Options{.scale = -0.7f}, Options{.block_size = 1}, Options{.block_size = 7, .left = 100, .extra_blocks = 0}}) {
    o.dtype = dtype;
    dtype = dtype == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
    Problem(o, kQueries, kContexts).check_accuracy("option");
  }
}

TEST(bits_of_a_row_are_its_own) {
  const int before = cuda_host::multiprocessors;
  for (const Options& o : {Options{.heads_q = 6}, Options{.dim = 256, .left = 70}, Options{.left = 259}}) {
    const Problem all(o, kQueries, kContexts);
    const Words expected = all.run();
    const int row = o.heads_q * o.dim;
    for (std::size_t b = 0; b < all.lens.size(); ++b) {
      for (int i = all.cu_q[b]; i < all.cu_q[b + 1]; ++i) {
        for (int64_t extra_blocks : {int64_t{0}, kManyBlocks}) {  // by segments, and all segments in turn
          cuda_host::multiprocessors = 1 + i % 5;
          const Words alone = all.part(b, i - all.cu_q[b], i - all.cu_q[b] + 1, extra_blocks).run();
          CHECK(std::equal(alone.begin(), alone.end(), expected.begin() + i * row));
        }
      }
    }
  }
  cuda_host::multiprocessors = before;
}

// Sequences with 64 query rows per key head (32 for head size 256) are cut into units of blocks.
TEST(long_chunks) {
  const std::vector<int> queries{70, 1, 40, 0, 31, 33}, contexts{70, 300, 330, 5, 290, 40};
  DType dtype = DType::kFloat16;
  for (Options o : {Options{.dim = 32}, Options{.heads_q = 6, .left = 40}, Options{.heads_q = 2, .dim = 80},
                    Options{.dim = 96, .block_size = 7, .left = 0, .softcap = 2.0f},
                    Options{.heads_q = 7, .heads_k = 1, .dim = 128, .scale = 0.1f},
                    Options{.heads_q = 1, .heads_k = 1, .dim = 256, .scale = 0.06f},
                    Options{.causal = false, .left = 3, .right = 20, .extra_blocks = kManyBlocks}}) {
    o.dtype = dtype;
    dtype = dtype == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
    const Problem all(o, queries, contexts);
    all.check_accuracy("long chunk");
    const Words expected = all.run();
    const int row = o.heads_q * o.dim;
    if (!o.causal) continue;  // a part's context ends with its last query
    for (std::size_t b : {0, 2, 4}) {
      for (int i = all.cu_q[b] + 3; i < all.cu_q[b + 1]; i += 13) {
        for (int64_t extra_blocks : {int64_t{0}, kManyBlocks}) {
          const Words alone = all.part(b, i - all.cu_q[b], i - all.cu_q[b] + 1, extra_blocks).run();
          CHECK(std::equal(alone.begin(), alone.end(), expected.begin() + i * row));
        }
      }
    }
  }
  Problem({.heads_q = 1, .heads_k = 1, .dim = 32, .left = 20, .extra_blocks = kManyBlocks}, {1, 330}, {4, 600})
      .check_accuracy("keys from the second segment on");
}

// Strides over a single token, head or block mean nothing.
TEST(strides_of_one) {
  Problem p({.heads_q = 1, .heads_k = 1, .block_size = 1, .extra_blocks = 0}, {1}, {1});
  const Words expected = p.run();
  PagedCache cache = p.cache();
  for (int i = 0; i < 3; ++i) cache.k_strides[i] = cache.v_strides[i] = 1;
  Words out(p.q.size());
  cuda::paged_attention_forward(p.shape(), p.cu_q.data(), 1, 1, {p.q.data(), 1, 1}, cache, out.data(), nullptr,
                                nullptr);
  CHECK(out == expected);
}

TEST(both_ways_of_sharing_out_segments) {
  CHECK(cuda::paged_scratch(4, 64, 0).floats == 0 && cuda::paged_scratch(4, 64, 256).floats == 0);
  CHECK(cuda::paged_scratch(4, 64, 257).splits == 2 && cuda::paged_scratch(4, 64, 257).floats == 4 * (2 * 66 + 1));
  CHECK(cuda::paged_scratch(4, 64, 16 * kManyBlocks).splits == 1);
  CHECK(cuda::paged_scratch(4, 64, 16 * kManyBlocks).floats == 4 * 66);
}

TEST(many_sequences) {  // more than a warp looks at once, some without queries
  std::vector<int> queries, contexts;
  for (int b = 0; b < 75; ++b) {
    queries.push_back(b % 3 == 1 ? 0 : 1);
    contexts.push_back(1 + b * 7 % 40);
  }
  Problem({.dtype = DType::kFloat16, .dim = 32}, queries, contexts).check_accuracy("many sequences");
  const Problem none(Options{}, {0, 0}, {3, 4});
  CHECK(none.run().empty());
}

TEST(joint_cache) {
  const Problem p(Options{}, kQueries, kContexts);
  const int64_t block = int64_t{p.o.block_size} * p.o.heads_k * p.o.dim;
  Words both(p.k.size() * 2);
  for (int64_t i = 0; i < p.num_blocks; ++i) {
    std::copy_n(p.k.begin() + i * block, block, both.begin() + 2 * i * block);
    std::copy_n(p.v.begin() + i * block, block, both.begin() + (2 * i + 1) * block);
  }
  PagedCache cache = p.cache();
  cache.k = both.data();
  cache.v = both.data() + block;
  cache.k_strides[0] = cache.v_strides[0] = 2 * block;
  CHECK(p.run(cache) == p.run());
  cache.k_strides[1] += 4;
  CHECK_THROWS(p.run(cache), Error);
  cache = p.cache();
  cache.v = p.v.data() + 1;
  CHECK_THROWS(p.run(cache), Error);
}

TEST(broken_values_give_nan_and_touch_nothing_else) {
  const Problem good(Options{}, kQueries, kContexts);
  const Words expected = good.run();
  const int row = good.o.heads_q * good.o.dim;
  const auto check = [&](const Problem& p, std::size_t broken) {
    const Words got = p.run();
    for (std::size_t b = 0; b < p.lens.size(); ++b) {
      for (int i = p.cu_q[b] * row; i < p.cu_q[b + 1] * row; ++i) {
        CHECK(b == broken ? std::isnan(to_float(p.o.dtype, got[i])) : got[i] == expected[i]);
      }
    }
  };
  for (int id : {-1, static_cast<int>(good.num_blocks), INT32_MAX, INT32_MIN}) {
    for (int column : {0, 20}) {
      Problem p = good;
      p.table[5 * p.max_blocks + column] = id;
      check(p, 5);
    }
  }
  for (int length : {-1, 0, 4, 10000, INT32_MAX, INT32_MIN}) {
    Problem p = good;
    p.lens[2] = length;
    check(p, 2);
  }
}

#if !defined(__SANITIZE_THREAD__)  // sequences that overlap write the same rows, which it would report
TEST(broken_offsets_touch_nothing_else) {
  for (int32_t offset : {-5, 1000, INT32_MIN, INT32_MAX}) {
    Problem p(Options{}, kQueries, kContexts);
    const int32_t total = p.cu_q.back();
    p.cu_q[3] = offset;
    Words out(p.q.size());
    std::vector<float> scratch(cuda::paged_scratch(total * p.o.heads_q, p.o.dim, p.max_blocks * p.o.block_size).floats);
    cuda::paged_attention_forward(p.shape(), p.cu_q.data(), 7, total, {p.q.data(), p.o.heads_q * p.o.dim, p.o.dim},
                                  p.cache(), out.data(), scratch.data(), nullptr);
  }
}
#endif

TEST(errors) {
  Problem p(Options{}, {1}, {3});
  p.o.dim = 48;
  CHECK_THROWS(p.run(), Error);
  p.o = Options{.dtype = DType::kFloat32};
  CHECK_THROWS(p.run(), Error);
}

TEST_MAIN()
