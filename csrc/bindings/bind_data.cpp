// The data side: packing and fill-in-the-middle.
#include <pybind11/stl.h>

#include <array>

#include "fastsft/fim.h"
#include "fastsft/pack.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

// Where a call has come past the CUDA kernels.
void require_kernels(const Check& check, const char* op) {
  FASTSFT_CHECK(!check.on_cuda(), op, ": this build has no CUDA kernels");
}

int64_t pack(py::handle lengths, int64_t capacity, py::handle order, py::handle offsets) {
  Check check("pack_sequences");
  const auto* in = check.in<int64_t>("lengths", lengths, "N");
  auto* out_order = check.in<int64_t>("order", order, "N");
  auto* out_offsets = check.in<int64_t>("offsets", offsets, "N+1");
  const int64_t n = check.size("N");
  py::gil_scoped_release release;
  return pack_best_fit(in, n, capacity, out_order, out_offsets);
}

// On CUDA: the running sums of out_cu_seqlens are left to the caller, who finds lengths there; returns 0.
int64_t plan_fim(py::handle cu_seqlens, int64_t num_tokens, py::handle doc_ids, py::handle spans, uint64_t seed,
                 double rate, double spm_rate, int64_t max_len, py::handle mode, py::handle cuts,
                 py::handle out_cu_seqlens, py::handle broken) {
  Check check("fim_permute");
  const auto* cu = check.in<int64_t>("cu_seqlens", cu_seqlens, "B+1");
  const auto* ids = check.optional<int64_t>("doc_ids", doc_ids, "B");
  const auto* middles = check.optional<int64_t>("spans", spans, "B 2");
  auto* modes = reinterpret_cast<FimMode*>(check.in<int8_t>("mode", mode, "B"));
  auto* out_cuts = check.in<int64_t>("cuts", cuts, "B 2");
  auto* out_cu = check.in<int64_t>("out_cu_seqlens", out_cu_seqlens, "B+1");
  [[maybe_unused]] auto* flag = check.optional<int32_t>("broken", broken, "1");
  const FimOptions options{seed, rate, spm_rate, max_len};
  const int64_t docs = check.size("B");
  py::gil_scoped_release release;
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) {
    FASTSFT_CHECK(flag != nullptr, "fim_permute: broken: expected int32[1] on CUDA, got None");
    cuda::fim_plan(cu, docs, num_tokens, options, ids, middles, modes, out_cuts, out_cu + 1, flag, check.stream());
    return 0;
  }
#endif
  require_kernels(check, "fim_permute");
  return fim_plan(cu, docs, num_tokens, options, ids, middles, modes, out_cuts, out_cu);
}

template <typename Token>
void copy_fim(py::handle tokens, py::handle cu_seqlens, py::handle mode, py::handle cuts, py::handle out_cu_seqlens,
              const std::array<int64_t, 3>& sentinels, py::handle out_tokens, py::handle source_index) {
  Check check("fim_permute");
  const auto* in = check.in<Token>("tokens", tokens, "T");
  const auto* cu = check.in<int64_t>("cu_seqlens", cu_seqlens, "B+1");
  const auto* modes = reinterpret_cast<const FimMode*>(check.in<int8_t>("mode", mode, "B"));
  const auto* in_cuts = check.in<int64_t>("cuts", cuts, "B 2");
  const auto* out_cu = check.in<int64_t>("out_cu_seqlens", out_cu_seqlens, "B+1");
  auto* out = check.in<Token>("out_tokens", out_tokens, "U");
  auto* source = check.in<int64_t>("source_index", source_index, "U");
  const int64_t b = check.size("B"), size = check.size("U");
  const Token marks[3] = {static_cast<Token>(sentinels[0]), static_cast<Token>(sentinels[1]),
                          static_cast<Token>(sentinels[2])};
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) {
    py::gil_scoped_release release;
    return cuda::fim_copy(in, cu, b, modes, in_cuts, out_cu, size, marks, out, source, check.stream());
  }
#endif
  require_kernels(check, "fim_permute");
  check.require(out_cu[b] == size, "out_tokens", std::to_string(out_cu[b]) + " tokens", std::to_string(size));
  py::gil_scoped_release release;
  fim_copy(in, cu, b, modes, in_cuts, out_cu, marks, out, source);
}

}  // namespace

void register_data(py::module_& m) {
  m.def("pack_best_fit", &pack, py::arg("lengths"), py::arg("capacity"), py::arg("order"), py::arg("offsets"),
        "Fills order and offsets; returns the number of bins.");
  m.def("fim_plan", &plan_fim, py::arg("cu_seqlens"), py::arg("num_tokens"), py::arg("doc_ids"), py::arg("spans"),
        py::arg("seed"), py::arg("rate"), py::arg("spm_rate"), py::arg("max_len"), py::arg("mode"), py::arg("cuts"),
        py::arg("out_cu_seqlens"), py::arg("broken") = py::none(),
        "Decides modes and cuts; returns the number of output tokens. On CUDA: writes lengths to out_cu_seqlens[1:], "
        "sets "
        "broken where it would raise, returns 0.");
  for (const char* name : {"fim_copy_int32", "fim_copy_int64"}) {
    m.def(name, std::string(name) == "fim_copy_int32" ? &copy_fim<int32_t> : &copy_fim<int64_t>, py::arg("tokens"),
          py::arg("cu_seqlens"), py::arg("mode"), py::arg("cuts"), py::arg("out_cu_seqlens"), py::arg("sentinels"),
          py::arg("out_tokens"), py::arg("source_index"), "Second pass, after fim_plan.");
  }
}

}  // namespace fastsft::bindings
