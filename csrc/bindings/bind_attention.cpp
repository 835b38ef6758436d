#include "fastsft/attention.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

struct Options {
  bool causal;
  double scale;
  int64_t window_left, window_right;
  double softcap;
};

AttentionShape shape_of(const Check& check, DType dtype, const Options& options) {
  return {.dtype = dtype,
          .num_q_heads = check.size("Hq"),
          .num_kv_heads = check.size("Hkv"),
          .head_dim = check.size("D"),
          .scale = static_cast<float>(options.scale),
          .softcap = static_cast<float>(options.softcap),
          .causal = options.causal,
          .window_left = options.window_left,
          .window_right = options.window_right};
}

AttentionInput input(const TensorView& view) { return {view.data, view.strides[0], view.strides[1]}; }

void require_kernels(const Check& check, const char* op) {
#if !defined(FASTSFT_WITH_CUDA)
  FASTSFT_CHECK(!check.on_cuda(), op, ": q: this build has no CUDA kernels");
#else
  (void)check, (void)op;
#endif
}

#if defined(FASTSFT_WITH_CUDA)
cuda::AttentionPlan plan_of(Check& check, const AttentionBatch& batch, py::handle plan) {
  int32_t* memory = check.in<int32_t>("plan", plan, "P");
  const int64_t size = cuda::attention_plan_size(batch.total_q, batch.total_k);
  check.require(check.size("P") == size, "plan", std::to_string(size) + " words", std::to_string(check.size("P")));
  return cuda::attention_plan_at(memory, batch.total_q, batch.total_k);
}
#endif

void attention_plan(py::handle cu_q_tensor, py::handle cu_k_tensor, int64_t total_q, int64_t total_k, bool causal,
                    int64_t window_left, int64_t window_right, py::handle plan_tensor) {
  Check check("attention_plan");
  const auto* cu_q = check.in<int32_t>("cu_seqlens_q", cu_q_tensor, "B+1");
  const auto* cu_k = check.in<int32_t>("cu_seqlens_k", cu_k_tensor, "B+1");
  check.require(check.on_cuda(), "cu_seqlens_q", "a CUDA tensor", view_of(cu_q_tensor).describe());
  require_kernels(check, "attention_plan");
#if defined(FASTSFT_WITH_CUDA)
  AttentionShape mask{};
  mask.causal = causal, mask.window_left = window_left, mask.window_right = window_right;
  const AttentionBatch batch{cu_q, cu_k, check.size("B"), total_q, total_k};
  const cuda::AttentionPlan plan = plan_of(check, batch, plan_tensor);
  py::gil_scoped_release release;
  cuda::make_attention_plan(mask, batch, plan, check.stream());
#else
  (void)cu_q, (void)cu_k, (void)total_q, (void)total_k, (void)causal, (void)window_left, (void)window_right;
  (void)plan_tensor;
#endif
}

void varlen_attention_fwd(py::handle q_tensor, py::handle k_tensor, py::handle v_tensor, py::handle cu_q_tensor,
                          py::handle cu_k_tensor, py::handle plan_tensor, bool causal, double scale,
                          int64_t window_left, int64_t window_right, double softcap, py::handle out_tensor,
                          py::handle lse_tensor) {
  Check check("varlen_attention");
  const TensorView q = check.floats("q", q_tensor, "Tq Hq D", Layout::kRows);
  const TensorView k = check.floats("k", k_tensor, "Tk Hkv D", Layout::kRows);
  const TensorView v = check.floats("v", v_tensor, "Tk Hkv D", Layout::kRows);
  const TensorView out = check.floats("out", out_tensor, "Tq Hq D");
  check.same_dtype("k", k, q);
  check.same_dtype("v", v, q);
  check.same_dtype("out", out, q);
  const auto* cu_q = check.in<int32_t>("cu_seqlens_q", cu_q_tensor, "B+1");
  const auto* cu_k = check.in<int32_t>("cu_seqlens_k", cu_k_tensor, "B+1");
  auto* lse = check.in<float>("lse", lse_tensor, "Hq Tq");
  const AttentionShape shape = shape_of(check, Check::dtype_of(q), {causal, scale, window_left, window_right, softcap});
  const AttentionBatch batch{cu_q, cu_k, check.size("B"), check.size("Tq"), check.size("Tk")};
  require_kernels(check, "varlen_attention");
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) {
    const cuda::AttentionPlan plan = plan_of(check, batch, plan_tensor);
    py::gil_scoped_release release;
    return cuda::varlen_attention_forward(shape, batch, plan, input(q), input(k), input(v), out.data, lse,
                                          check.stream());
  }
#endif
  (void)plan_tensor;  // CPU kernels need none
  py::gil_scoped_release release;
  varlen_attention_forward(shape, batch, input(q), input(k), input(v), out.data, lse);
}

void varlen_attention_bwd(py::handle dout_tensor, py::handle q_tensor, py::handle k_tensor, py::handle v_tensor,
                          py::handle out_tensor, py::handle lse_tensor, py::handle dlse_tensor, py::handle cu_q_tensor,
                          py::handle cu_k_tensor, py::handle plan_tensor, bool causal, double scale,
                          int64_t window_left, int64_t window_right, double softcap, py::handle delta_tensor,
                          py::handle dq_tensor, py::handle dk_tensor, py::handle dv_tensor) {
  Check check("varlen_attention_bwd");
  const TensorView q = check.floats("q", q_tensor, "Tq Hq D", Layout::kRows);
  const TensorView k = check.floats("k", k_tensor, "Tk Hkv D", Layout::kRows);
  const TensorView v = check.floats("v", v_tensor, "Tk Hkv D", Layout::kRows);
  const TensorView out = check.floats("out", out_tensor, "Tq Hq D", Layout::kRows);
  const TensorView dout = check.floats("dout", dout_tensor, "Tq Hq D", Layout::kRows);
  const TensorView dq = check.floats("dq", dq_tensor, "Tq Hq D");
  const TensorView dk = check.floats("dk", dk_tensor, "Tk Hkv D");
  const TensorView dv = check.floats("dv", dv_tensor, "Tk Hkv D");
  check.same_dtype("k", k, q);
  check.same_dtype("v", v, q);
  check.same_dtype("out", out, q);
  check.same_dtype("dout", dout, q);
  check.same_dtype("dq", dq, q);
  check.same_dtype("dk", dk, q);
  check.same_dtype("dv", dv, q);
  const auto* cu_q = check.in<int32_t>("cu_seqlens_q", cu_q_tensor, "B+1");
  const auto* cu_k = check.in<int32_t>("cu_seqlens_k", cu_k_tensor, "B+1");
  const auto* lse = check.in<float>("lse", lse_tensor, "Hq Tq");
  const auto* dlse = check.optional<float>("dlse", dlse_tensor, "Hq Tq");
  const AttentionShape shape = shape_of(check, Check::dtype_of(q), {causal, scale, window_left, window_right, softcap});
  const AttentionBatch batch{cu_q, cu_k, check.size("B"), check.size("Tq"), check.size("Tk")};
  require_kernels(check, "varlen_attention_bwd");
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) {
    auto* delta = check.in<float>("delta", delta_tensor, "Hq Tq");
    const cuda::AttentionPlan plan = plan_of(check, batch, plan_tensor);
    py::gil_scoped_release release;
    return cuda::varlen_attention_backward(shape, batch, plan, input(dout), input(q), input(k), input(v), input(out),
                                           lse, dlse, delta, dq.data, dk.data, dv.data, check.stream());
  }
#endif
  (void)plan_tensor, (void)delta_tensor;  // CPU kernels need neither
  py::gil_scoped_release release;
  varlen_attention_backward(shape, batch, input(dout), input(q), input(k), input(v), input(out), lse, dlse, dq.data,
                            dk.data, dv.data);
}

void paged_attention(py::handle q_tensor, py::handle k_tensor, py::handle v_tensor, py::handle table_tensor,
                     py::handle cu_q_tensor, py::handle lens_tensor, bool causal, double scale, int64_t window_left,
                     int64_t window_right, double softcap, py::handle scratch_tensor, py::handle out_tensor) {
  Check check("paged_attention");
  const TensorView q = check.floats("q", q_tensor, "Tq Hq D", Layout::kRows);
  const TensorView k = check.floats("k_cache", k_tensor, "N S Hkv D", Layout::kRows);
  const TensorView v = check.floats("v_cache", v_tensor, "N S Hkv D", Layout::kRows);
  const TensorView out = check.floats("out", out_tensor, "Tq Hq D");
  check.same_dtype("k_cache", k, q);
  check.same_dtype("v_cache", v, q);
  check.same_dtype("out", out, q);
  const auto* cu_q = check.in<int32_t>("cu_seqlens_q", cu_q_tensor, "B+1");
  PagedCache cache{};
  cache.k = k.data;
  cache.v = v.data;
  for (int i = 0; i < 3; ++i) {
    cache.k_strides[i] = k.strides[i];
    cache.v_strides[i] = v.strides[i];
  }
  cache.num_blocks = check.size("N");
  cache.block_size = check.size("S");
  cache.block_table = check.in<int32_t>("block_table", table_tensor, "B M");
  cache.context_lens = check.in<int32_t>("context_lens", lens_tensor, "B");
  cache.max_blocks = check.size("M");
  const AttentionShape shape = shape_of(check, Check::dtype_of(q), {causal, scale, window_left, window_right, softcap});
  const int64_t batch = check.size("B"), total_q = check.size("Tq");
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) {
    auto* scratch = check.in<float>("scratch", scratch_tensor, "W");
    const int64_t needed =
        cuda::paged_scratch(total_q * shape.num_q_heads, shape.head_dim, cache.max_blocks * cache.block_size).floats;
    check.require(check.size("W") >= needed, "scratch", std::to_string(needed) + " floats",
                  std::to_string(check.size("W")));
    py::gil_scoped_release release;
    return cuda::paged_attention_forward(shape, cu_q, batch, total_q, input(q), cache, out.data, scratch,
                                         check.stream());
  }
#endif
  FASTSFT_CHECK(!check.on_cuda(), "paged_attention: q: this build has no CUDA kernels");
  (void)scratch_tensor;  // the CPU kernel has its own
  py::gil_scoped_release release;
  paged_attention_forward(shape, cu_q, batch, total_q, input(q), cache, out.data);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_plan", &attention_plan, py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("total_q"),
        py::arg("total_k"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"), py::arg("plan"));
  m.def("varlen_attention_fwd", &varlen_attention_fwd, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("plan").none(true), py::arg("causal"),
        py::arg("scale"), py::arg("window_left"), py::arg("window_right"), py::arg("softcap"), py::arg("out"),
        py::arg("lse"));
  m.def("varlen_attention_bwd", &varlen_attention_bwd, py::arg("dout"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("lse"), py::arg("dlse").none(true), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"),
        py::arg("plan").none(true), py::arg("causal"), py::arg("scale"), py::arg("window_left"),
        py::arg("window_right"), py::arg("softcap"), py::arg("delta").none(true), py::arg("dq"), py::arg("dk"),
        py::arg("dv"));
  m.def("paged_attention", &paged_attention, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("block_table"), py::arg("cu_seqlens_q"), py::arg("context_lens"), py::arg("causal"), py::arg("scale"),
        py::arg("window_left"), py::arg("window_right"), py::arg("softcap"), py::arg("scratch").none(true),
        py::arg("out"));
  m.def(
      "paged_attention_scratch",
      [](int64_t query_rows, int64_t head_dim, int64_t max_keys) {
        return cuda::paged_scratch(query_rows, head_dim, max_keys).floats;
      },
      py::arg("query_rows"), py::arg("head_dim"), py::arg("max_keys"), "Floats that paged_attention needs on CUDA.");
}

}  // namespace fastsft::bindings
