// The data side: packing, fill-in-the-middle, MinHash.
#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <vector>

#include "fastsft/fim.h"
#include "fastsft/lsh.h"
#include "fastsft/minhash.h"
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

// The views stay valid while `texts` (a tuple, so that nobody can change it) lives: CPython keeps a str's UTF-8 form.
std::vector<std::string_view> utf8_views(const char* op, const py::tuple& texts) {
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    PyObject* text = PyTuple_GET_ITEM(texts.ptr(), static_cast<Py_ssize_t>(i));
    FASTSFT_CHECK(PyUnicode_Check(text), op, ": texts[", i, "]: expected str, got ", Py_TYPE(text)->tp_name);
    Py_ssize_t bytes = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text, &bytes);
    if (data == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
      PyErr_Clear();
      detail::fail(op, ": texts[", i, "]: expected text that UTF-8 can encode, got a lone surrogate");
    }
    views.emplace_back(data, static_cast<std::size_t>(bytes));
  }
  return views;
}

void minhash(const py::tuple& texts, int64_t num_perm, int64_t ngram, bool chars, uint64_t seed,
             py::handle signatures) {
  Check check("minhash_signatures");
  auto* out = check.in<uint32_t>("signatures", signatures, "N P");
  check.require(check.size("N") == static_cast<int64_t>(texts.size()) && check.size("P") == num_perm, "signatures",
                "one row per text, num_perm columns", view_of(signatures).describe());
  const std::vector<std::string_view> views = utf8_views("minhash_signatures", texts);
  const MinHashOptions options{num_perm, ngram, chars ? ShingleUnit::kChar : ShingleUnit::kWord, seed};
  py::gil_scoped_release release;
  minhash_signatures(views.data(), static_cast<int64_t>(views.size()), options, out);
}

void minhash_tokens(py::handle tokens, py::handle cu_seqlens, int64_t ngram, uint64_t seed, py::handle signatures) {
  Check check("minhash_token_signatures");
  const auto* cu = check.in<int64_t>("cu_seqlens", cu_seqlens, "N+1");
  auto* out = check.in<uint32_t>("signatures", signatures, "N P");
  const MinHashOptions options{.num_perm = check.size("P"), .ngram = ngram, .seed = seed};
  const auto sign = [&](const auto* in) {
    const int64_t num_tokens = check.size("T"), n = check.size("N");
    py::gil_scoped_release release;
#if defined(FASTSFT_WITH_CUDA)
    if (check.on_cuda()) {
      return cuda::minhash_token_signatures(in, num_tokens, cu, n, options, out, check.stream());
    }
#endif
    require_kernels(check, "minhash_token_signatures");
    minhash_token_signatures(in, num_tokens, cu, n, options, out);
  };
  if (view_of(tokens).dtype.bits == 32) return sign(check.in<int32_t>("tokens", tokens, "T"));
  sign(check.in<int64_t>("tokens", tokens, "T"));
}

void cluster(py::handle signatures, double threshold, int64_t bands, int64_t rows, py::handle labels) {
  Check check("lsh_clusters");
  const auto* in = check.in<uint32_t>("signatures", signatures, "N P");
  auto* out = check.in<int64_t>("labels", labels, "N");
  const int64_t n = check.size("N"), num_perm = check.size("P");
  py::gil_scoped_release release;
  lsh_clusters(in, n, num_perm, threshold, {bands, rows}, out);
}

// One step of the clustering on CUDA; the order of the steps is in lsh.h. Columns [first, first + count) are the
// band's.
void lsh_step(const std::string& step, py::handle signatures, py::handle parent, py::handle duplicate, py::handle keys,
              py::handle order, py::handle labels, int64_t first, int64_t count, double threshold) {
  Check check("lsh_clusters");
  cuda::LshRows rows{};
  rows.signatures = check.in<uint32_t>("signatures", signatures, "N P");
  rows.parent = check.in<int32_t>("parent", parent, "N");
  rows.duplicate = check.in<bool>("duplicate", duplicate, "N");
  rows.n = check.size("N");
  rows.num_perm = check.size("P");
  auto* out_keys = check.in<int64_t>("keys", keys, "N");
  auto* out_labels = check.in<int64_t>("labels", labels, "N");
  [[maybe_unused]] const cuda::LshOrder sorted{out_keys, check.in<int64_t>("order", order, "N"), out_labels};
  [[maybe_unused]] const cuda::LshColumns band{first, count};
  FASTSFT_CHECK(first >= 0 && count >= 1 && count <= rows.num_perm - first,
                "lsh_clusters: bands, rows: expected "
                "columns within [0, ",
                rows.num_perm, "), got ", first, " to ", first + count);
  FASTSFT_CHECK(threshold >= 0.0 && threshold <= 1.0, "lsh_clusters: threshold: expected a number in [0, 1], got ",
                threshold);
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) {
    py::gil_scoped_release release;
    if (step == "keys") return cuda::lsh_keys(rows, band, out_keys, check.stream());
    if (step == "duplicates") return cuda::lsh_merge_duplicates(rows, sorted, check.stream());
    if (step == "neighbours") return cuda::lsh_link_neighbours(rows, band, sorted, threshold, check.stream());
    if (step == "groups") return cuda::lsh_link_groups(rows, band, sorted, threshold, check.stream());
    if (step == "labels") return cuda::lsh_labels(rows, out_labels, check.stream());
  }
#endif
  FASTSFT_CHECK(false, "lsh_clusters: internal: no step ", step, " on this device in this build");
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
  m.def("minhash_signatures", &minhash, py::arg("texts"), py::arg("num_perm"), py::arg("ngram"), py::arg("chars"),
        py::arg("seed"), py::arg("signatures"), "Fills signatures, uint32 [N, num_perm].");
  m.def("minhash_token_signatures", &minhash_tokens, py::arg("tokens"), py::arg("cu_seqlens"), py::arg("ngram"),
        py::arg("seed"), py::arg("signatures"), "Fills signatures, uint32 [N, num_perm].");
  m.def(
      "lsh_shape",
      [](int64_t num_perm, double threshold) {
        const LshShape shape = lsh_shape(num_perm, threshold);
        return py::make_tuple(shape.bands, shape.rows);
      },
      py::arg("num_perm"), py::arg("threshold"), "(bands, rows) with the least weighted error.");
  m.def("lsh_step", &lsh_step, py::arg("step"), py::arg("signatures"), py::arg("parent"), py::arg("duplicate"),
        py::arg("keys"), py::arg("order"), py::arg("labels"), py::arg("first"), py::arg("count"), py::arg("threshold"),
        "A step of lsh_clusters on CUDA: keys, duplicates, neighbours, groups or labels.");
  m.def("lsh_clusters", &cluster, py::arg("signatures"), py::arg("threshold"), py::arg("bands"), py::arg("rows"),
        py::arg("labels"), "Fills labels, int64 [N].");
}

}  // namespace fastsft::bindings
