// csrc/cuda/attention*.cu in the emulator, against the definition in float64. Inputs are rounded to the element type
// first, outputs are full of NaN, so that what is not written shows; sizes are off the tiles, buffers exactly as long
// as the contract says.
#include <limits>
#include <memory>
#include <string>

#include "attention_cases.h"
#include "check.h"
#include "primitives.cuh"

using namespace fastsft;

namespace {

using Words = std::vector<uint16_t>;

float word_to_float(DType dtype, uint16_t word) {
  return dtype == DType::kBFloat16 ? cuda::BFloat16::to_float(word) : cuda::Float16::to_float(word);
}

Words narrow(DType dtype, const Floats& x) {
  Words words;
  for (float value : x) {
    words.push_back(dtype == DType::kBFloat16 ? cuda::BFloat16::from_float(value) : cuda::Float16::from_float(value));
  }
  return words;
}

Floats widen(DType dtype, const Words& words) {
  Floats x;
  for (uint16_t word : words) x.push_back(word_to_float(dtype, word));
  return x;
}

// A tensor at a 16-byte boundary, with rows `gap` words longer than they need to be.
class Tensor {
 public:
  Tensor(const Words& values, int64_t tokens, int64_t heads, int64_t dim, int64_t gap)
      : tokens_(tokens), heads_(heads), token_stride_(heads * dim + gap), head_stride_(dim) {
    const std::size_t size = static_cast<std::size_t>(std::max<int64_t>(1, tokens * token_stride_ - gap));
    data_.reset(static_cast<uint16_t*>(::operator new(2 * size, std::align_val_t{16})));
    std::fill_n(data_.get(), size, uint16_t{0xffff});
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(values.begin() + t * heads * dim, heads * dim, data_.get() + t * token_stride_);
    }
  }
  // As the bindings do: the stride over a single row is 1.
  AttentionInput input() const {
    return {data_.get(), tokens_ == 1 ? 1 : token_stride_, heads_ == 1 ? 1 : head_stride_};
  }

 private:
  struct Free {
    void operator()(uint16_t* p) const { ::operator delete(p, std::align_val_t{16}); }
  };
  std::unique_ptr<uint16_t, Free> data_;
  int64_t tokens_, heads_, token_stride_, head_stride_;
};

// An element may be off by `units` roundings at its own size and at that of the largest element.
bool close_in(DType dtype, const std::string& what, const Words& ours, const Doubles& exact, double units) {
  const double unit = dtype == DType::kBFloat16 ? 0x1p-9 : 0x1p-12;
  double largest = 0;
  for (double x : exact) largest = std::max(largest, std::abs(x));
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double value = word_to_float(dtype, ours[i]);
    if (!(std::abs(value - exact[i]) <= unit * (1.01 * std::abs(exact[i]) + units * largest))) {
      std::printf("%s, %s, element %zu: %g, expected %g\n", what.c_str(), dtype_name(dtype), i, value, exact[i]);
      return false;
    }
  }
  return true;
}

struct Run {
  Words out, dq, dk, dv;
  Floats lse;
};

// Forward and backward on a device of this compute capability.
Run run(const Problem& p, int64_t gap = 0, int capability = 80) {
  const DType dtype = p.shape.dtype;
  const int64_t heads_q = p.shape.num_q_heads, heads_k = p.shape.num_kv_heads, dim = p.shape.head_dim;
  const Tensor q(narrow(dtype, p.q), p.total_q(), heads_q, dim, gap);
  const Tensor k(narrow(dtype, p.k), p.total_k(), heads_k, dim, gap);
  const Tensor v(narrow(dtype, p.v), p.total_k(), heads_k, dim, 2 * gap);
  std::vector<int32_t> memory(cuda::attention_plan_size(p.total_q(), p.total_k()), -1234567);
  const cuda::AttentionPlan plan = cuda::attention_plan_at(memory.data(), p.total_q(), p.total_k());
  cuda::make_attention_plan(p.shape, p.batch(), plan, nullptr);
  Run r{Words(p.q.size(), 0xffff), Words(p.q.size(), 0xffff), Words(p.k.size(), 0xffff), Words(p.k.size(), 0xffff),
        Floats(p.dlse.size(), std::numeric_limits<float>::quiet_NaN())};
  cuda_host::compute_capability = capability;
  cuda::varlen_attention_forward(p.shape, p.batch(), plan, q.input(), k.input(), v.input(), r.out.data(), r.lse.data(),
                                 nullptr);
  const Tensor dout(narrow(dtype, p.dout), p.total_q(), heads_q, dim, gap), out(r.out, p.total_q(), heads_q, dim, 0);
  Floats delta(p.dlse.size(), std::numeric_limits<float>::quiet_NaN());
  cuda::varlen_attention_backward(p.shape, p.batch(), plan, dout.input(), q.input(), k.input(), v.input(), out.input(),
                                  r.lse.data(), p.dlse.data(), delta.data(), r.dq.data(), r.dk.data(), r.dv.data(),
                                  nullptr);
  cuda_host::compute_capability = 80;
  return r;
}

// The intervals and orders of the plan against the definition.
void check_plan(const Problem& p) {
  std::vector<int32_t> memory(cuda::attention_plan_size(p.total_q(), p.total_k()), -1234567);
  const cuda::AttentionPlan plan = cuda::attention_plan_at(memory.data(), p.total_q(), p.total_k());
  cuda::make_attention_plan(p.shape, p.batch(), plan, nullptr);
  const auto sees = [&p](int64_t position, int64_t j) {
    return !(p.shape.causal && j > position) && !(p.shape.window_left >= 0 && j < position - p.shape.window_left) &&
           !(p.shape.window_right >= 0 && j > position + p.shape.window_right);
  };
  const auto holds = [](const cuda::AttentionInterval& seen, int64_t i) {
    return seen.lo <= i && i < (seen.hi < 0 ? ~seen.hi : seen.hi);
  };
  std::vector<int64_t> of_row(p.total_q()), of_column(p.total_k());
  for (std::size_t b = 0; b + 1 < p.cu_q.size(); ++b) {
    std::fill(of_row.begin() + p.cu_q[b], of_row.begin() + p.cu_q[b + 1], b);
    std::fill(of_column.begin() + p.cu_k[b], of_column.begin() + p.cu_k[b + 1], b);
  }
  const auto len_q = [&p](int64_t b) { return p.cu_q[b + 1] - p.cu_q[b]; };
  const auto len_k = [&p](int64_t b) { return p.cu_k[b + 1] - p.cu_k[b]; };
  const auto is_short = [&](int64_t b) { return len_q(b) <= cuda::kShortSequence && len_k(b) <= cuda::kShortSequence; };
  for (int64_t i = 0; i < p.total_q(); ++i) {
    const int64_t b = of_row[i];
    CHECK((plan.rows[i].hi < 0) == is_short(b));
    for (int64_t j = 0; j < p.total_k(); ++j) {
      const bool expected = of_column[j] == b && sees(i - p.cu_q[b] + len_k(b) - len_q(b), j - p.cu_k[b]);
      CHECK(holds(plan.rows[i], j) == expected);
      CHECK(holds(plan.columns[j], i) == expected);
    }
  }
  for (int64_t j = 0; j < p.total_k(); ++j) CHECK((plan.columns[j].hi < 0) == is_short(of_column[j]));
  const auto is_order = [](const int32_t* order, int64_t total) {
    std::vector<int> tiles;
    for (int64_t i = 0; i < (total + cuda::kPlanTile - 1) / cuda::kPlanTile; ++i) {
      tiles.push_back(order[i] < 0 ? ~order[i] : order[i]);
    }
    std::sort(tiles.begin(), tiles.end());
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      if (tiles[i] != static_cast<int>(i)) return false;
    }
    return true;
  };
  CHECK(is_order(plan.forward_order, p.total_q()));
  CHECK(is_order(plan.dq_order, p.total_q()));
  CHECK(is_order(plan.dkv_order, p.total_k()));
}

// Forward and backward by the kernels of both architectures.
void check_problem(Problem p, int64_t gap = 0, DType dtype = DType::kBFloat16) {
  check_plan(p);
  p.shape.dtype = dtype;
  for (Floats* x : {&p.q, &p.k, &p.v, &p.dout}) *x = widen(dtype, narrow(dtype, *x));
  const Result exact = reference(p);
  for (int capability : {80, 90}) {
    const Run ours = run(p, gap, capability);
    const std::string on = " on sm_" + std::to_string(capability);
    CHECK(close(ours.lse, exact.lse));
    CHECK(close_in(dtype, "out" + on, ours.out, exact.out, 1.5));
    CHECK(close_in(dtype, "dq" + on, ours.dq, exact.dq, 4));
    CHECK(close_in(dtype, "dk" + on, ours.dk, exact.dk, 4));
    CHECK(close_in(dtype, "dv" + on, ours.dv, exact.dv, 4));
  }
}

}  // namespace

// The kernels of both element types are one template: a type that differs shows here, the rest is bfloat16.
TEST(both_element_types) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int64_t dim : {64, 80, 96, 128, 256}) check_problem(make_problem({70}, {70}, 2, 1, dim), 0, dtype);
    check_problem(make_problem({1, 31, 100}, {1, 31, 100}, 3, 1, 128), 16, dtype);
  }
}

TEST(many_sequences_share_tiles) {
  check_problem(make_problem({1, 0, 67, 31, 3, 130, 16, 64}, {1, 0, 67, 31, 3, 130, 16, 64}, 4, 2, 64), 8);
  check_problem(make_problem({}, {}, 2, 1, 64));
}

TEST(more_keys_than_queries_and_the_other_way_round) {
  Problem p = make_problem({5, 90, 0, 40, 1}, {70, 33, 9, 0, 129}, 2, 1, 64);
  check_problem(p);
  p.shape.causal = false;
  check_problem(p);
}

TEST(windows) {
  Problem p = make_problem({5, 90, 0, 40, 1, 150}, {70, 33, 9, 0, 129, 150}, 2, 1, 64);
  p.shape.window_left = 20;
  check_problem(p);
  p.shape.causal = false, p.shape.window_left = 3, p.shape.window_right = 18;
  check_problem(p);
}

TEST(what_all_rows_see_ends_one_short_of_a_tile) {
  Problem p = make_problem({127, 129}, {127, 129}, 2, 1, 64);
  p.shape.causal = false;
  check_problem(p);
  p = make_problem({200}, {200}, 2, 1, 64);
  p.shape.causal = false, p.shape.window_left = 62;  // query 127 is the first that does not see key 64
  check_problem(p);
}

TEST(scales_and_softcap) {
  Problem p = make_problem({5, 90}, {70, 90}, 2, 1, 64);
  p.shape.softcap = 1.5f;
  check_problem(p);
  p.shape.softcap = 0;
  for (float scale : {-0.2f, 0.0f}) {
    p.shape.scale = scale;
    check_problem(p);
  }
}

TEST(one_token_and_no_keys_and_no_queries) {
  check_problem(make_problem({1}, {1}, 1, 1, 64));
  check_problem(make_problem({5}, {0}, 2, 1, 128));
  check_problem(make_problem({0}, {70}, 2, 1, 128));
}

// Softcap, windows and seven query heads per key head at head size 128, whose tiles of columns are others than at 64.
TEST(head_size_128) {
  Problem p = make_problem({150, 0, 70, 9}, {90, 5, 200, 9}, 7, 1, 128);
  check_problem(p);
  p = make_problem({90, 170}, {90, 170}, 2, 1, 128);
  p.shape.softcap = 1.5f;
  check_problem(p);
  p.shape.causal = false, p.shape.softcap = 0, p.shape.scale = -0.1f;
  p.shape.window_left = 30, p.shape.window_right = 70;
  check_problem(p);
}

// Longest first, over several rounds of the grid, the ring of columns going round within and across items.
TEST(backward_gives_the_same_bits_again) {
  Problem p = make_problem({330, 20, 150}, {330, 20, 150}, 4, 2, 64);
  p.shape.dtype = DType::kBFloat16;
  for (int capability : {80, 90}) {
    const Run once = run(p, 0, capability);
    const int before = cuda_host::multiprocessors;
    cuda_host::multiprocessors = 7;
    const Run again = run(p, 0, capability);
    cuda_host::multiprocessors = before;
    CHECK(once.dq == again.dq && once.dk == again.dk && once.dv == again.dv);
  }
}

// Key heads that are one head in memory: the copy engine of sm_90a takes no stride of 0.
TEST(expanded_heads) {
  Problem p = make_problem({70}, {70}, 2, 2, 64);
  p.shape.dtype = DType::kBFloat16;
  Floats one_head;
  for (Floats* x : {&p.q, &p.k, &p.v, &p.dout}) *x = widen(p.shape.dtype, narrow(p.shape.dtype, *x));
  for (std::size_t i = 0; i < p.k.size(); ++i) {
    if (i / 64 % 2 == 1) p.k[i] = p.k[i - 64];
    if (i / 64 % 2 == 0) one_head.push_back(p.k[i]);
  }
  const auto tensor = [&p](const Floats& x, int64_t heads) {
    return Tensor(narrow(p.shape.dtype, x), 70, heads, 64, 0);
  };
  const Tensor q = tensor(p.q, 2), k = tensor(one_head, 1), v = tensor(p.v, 2), dout = tensor(p.dout, 2);
  std::vector<int32_t> memory(cuda::attention_plan_size(70, 70));
  const cuda::AttentionPlan plan = cuda::attention_plan_at(memory.data(), 70, 70);
  cuda::make_attention_plan(p.shape, p.batch(), plan, nullptr);
  Words out(p.q.size(), 0xffff), dq = out, dk = out, dv = out;
  Floats lse(p.dlse.size()), delta(p.dlse.size());
  AttentionInput keys = k.input();
  keys.head_stride = 0;
  cuda_host::compute_capability = 90;
  cuda::varlen_attention_forward(p.shape, p.batch(), plan, q.input(), keys, v.input(), out.data(), lse.data(), nullptr);
  const Tensor result(out, 70, 2, 64, 0);
  cuda::varlen_attention_backward(p.shape, p.batch(), plan, dout.input(), q.input(), keys, v.input(), result.input(),
                                  lse.data(), p.dlse.data(), delta.data(), dq.data(), dk.data(), dv.data(), nullptr);
  cuda_host::compute_capability = 80;
  const Result exact = reference(p);
  CHECK(close_in(p.shape.dtype, "out", out, exact.out, 1.5));
  CHECK(close_in(p.shape.dtype, "dq", dq, exact.dq, 4));
  CHECK(close_in(p.shape.dtype, "dk", dk, exact.dk, 4));
  CHECK(close_in(p.shape.dtype, "dv", dv, exact.dv, 4));
}

// On sm_90a: 64 rows of a tile see nothing of some tiles of keys, at either end; the rings of buffers go round.
TEST(rows_that_skip_tiles_of_keys) {
  Problem p = make_problem({192, 190}, {192, 300}, 2, 1, 64);
  check_problem(p);
  p.shape.causal = false;
  check_problem(p);
  check_problem(make_problem({192, 70}, {192, 330}, 1, 1, 128));
  check_problem(make_problem({130}, {700}, 2, 2, 64));
  check_problem(make_problem({140, 60}, {140, 60}, 4, 1, 256));
}

TEST(the_costliest_tiles_come_first) {
  const Problem p = make_problem({100, 700, 60, 400}, {100, 700, 60, 400}, 1, 1, 64);
  std::vector<int32_t> memory(cuda::attention_plan_size(p.total_q(), p.total_k()));
  const cuda::AttentionPlan plan = cuda::attention_plan_at(memory.data(), p.total_q(), p.total_k());
  cuda::make_attention_plan(p.shape, p.batch(), plan, nullptr);
  // Keys per tile of 128 queries: 0 to 156 and so on up to 800 of the second sequence, then those of the last.
  CHECK(plan.forward_order[0] == 6);
  CHECK(plan.forward_order[9] == 0);
  CHECK(plan.dkv_order[0] == 1 || plan.dkv_order[0] == 0);
}

TEST(one_stage_of_copies) {
  const std::size_t before = cuda_host::shared_per_multiprocessor;
  cuda_host::shared_per_multiprocessor = 100 * 1024;
  check_problem(make_problem({300}, {300}, 2, 1, 64));
  check_problem(make_problem({200}, {200}, 2, 1, 128));
  cuda_host::shared_per_multiprocessor = before;
}

TEST(offsets_outside_the_contract_stay_inside_the_tensors) {
  Problem p = make_problem({70, 60}, {70, 60}, 2, 1, 64);
  p.shape.dtype = DType::kBFloat16;
  p.cu_q[1] = 1000, p.cu_k[1] = -50;
  for (int capability : {80, 90}) run(p, 0, capability);
  p.cu_q[0] = 40, p.cu_k[0] = 900;
  for (int capability : {80, 90}) run(p, 0, capability);
}

TEST_MAIN()
