// MinHash, locality-sensitive hashing and near-duplicates.
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <vector>

#include "fastsft/all_pairs.h"
#include "fastsft/duplicates.h"
#include "fastsft/lsh.h"
#include "fastsft/minhash.h"
#include "tensor_view.h"
#include "text_views.h"

namespace fastsft::bindings {
namespace {

ShingleUnit unit_of(bool chars) { return chars ? ShingleUnit::kChar : ShingleUnit::kWord; }

// Where a call has come past the CUDA kernels.
void require_kernels(const Check& check, const char* op) {
  FASTSFT_CHECK(!check.on_cuda(), op, ": this build has no CUDA kernels");
}

void minhash(py::handle texts, py::handle offsets, int64_t num_perm, int64_t ngram, bool chars, uint64_t seed,
             py::handle signatures) {
  Check check("minhash_signatures");
  auto* out = check.in<uint32_t>("signatures", signatures, "N P");
  const std::vector<std::string_view> views = text_views("minhash_signatures", texts, offsets);
  check.require(check.size("N") == static_cast<int64_t>(views.size()) && check.size("P") == num_perm, "signatures",
                "one row per text, num_perm columns", view_of(signatures).describe());
  const MinHashOptions options{num_perm, ngram, unit_of(chars), seed};
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

void band_keys(py::handle signatures, int64_t rows, py::handle keys) {
  Check check("lsh_keys");
  const auto* in = check.in<uint32_t>("signatures", signatures, "N P");
  auto* out = check.in<int64_t>("keys", keys, "B N");
  require_kernels(check, "lsh_keys");
  const int64_t n = check.size("N"), num_perm = check.size("P"), bands = check.size("B");
  py::gil_scoped_release release;
  lsh_keys(in, n, num_perm, {bands, rows}, out);
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

void link(py::handle texts, py::handle offsets, py::handle members, py::handle bucket_offsets, py::handle rows,
          py::handle parent, double threshold, int64_t ngram, bool chars, int64_t max_cluster) {
  Check check("link_similar");
  const std::vector<std::string_view> views = text_views("link_similar", texts, offsets);
  const auto* in_members = check.in<int64_t>("members", members, "M");
  const auto* in_offsets = check.in<int64_t>("bucket_offsets", bucket_offsets, "K+1");
  const auto* in_rows = check.optional<int64_t>("rows", rows, "N");
  auto* forest = check.in<int64_t>("parent", parent, "R");
  const int64_t n = static_cast<int64_t>(views.size()), m = check.size("M"), buckets = check.size("K");
  require_kernels(check, "link_similar");
  check.require(in_offsets[buckets] == m, "bucket_offsets", "to end with the number of members, " + std::to_string(m),
                std::to_string(in_offsets[buckets]));
  check.require(in_rows == nullptr || check.size("N") == n, "rows", "one per text, " + std::to_string(n),
                in_rows == nullptr ? "None" : std::to_string(check.size("N")));
  const LinkOptions options{threshold, {ngram, unit_of(chars)}, true, max_cluster};
  const int64_t num_rows = check.size("R");
  py::gil_scoped_release release;
  link_similar(views.data(), n, {in_members, in_offsets, buckets}, options, in_rows, forest, num_rows);
}

// Texts in, a label for each out: find(texts, n, labels), without the GIL.
template <typename Find>
void label_texts(py::handle texts, py::handle offsets, py::handle labels, const Find& find) {
  Check check("near_duplicates");
  auto* out = check.in<int64_t>("labels", labels, "N");
  const std::vector<std::string_view> views = text_views("near_duplicates", texts, offsets);
  const int64_t n = static_cast<int64_t>(views.size());
  check.require(check.size("N") == n, "labels", "one per text, " + std::to_string(n), std::to_string(check.size("N")));
  require_kernels(check, "near_duplicates");
  py::gil_scoped_release release;
  find(views.data(), n, out);
}

void find_duplicates(py::handle texts, py::handle offsets, int64_t num_perm, int64_t ngram, bool chars, uint64_t seed,
                     int64_t bands, int64_t rows, double threshold, bool verify, int64_t max_cluster,
                     py::handle labels) {
  const MinHashOptions minhash{num_perm, ngram, unit_of(chars), seed};
  const LinkOptions options{threshold, {ngram, unit_of(chars)}, verify, max_cluster};
  label_texts(texts, offsets, labels, [&](const std::string_view* views, int64_t n, int64_t* out) {
    near_duplicates(views, n, minhash, {bands, rows}, options, out);
  });
}

void find_all_duplicates(py::handle texts, py::handle offsets, int64_t ngram, bool chars, double threshold,
                         int64_t max_cluster, py::handle labels) {
  const LinkOptions options{threshold, {ngram, unit_of(chars)}, true, max_cluster};
  label_texts(texts, offsets, labels, [&](const std::string_view* views, int64_t n, int64_t* out) {
    all_pairs_clusters(views, n, options, out);
  });
}

py::tuple find_pairs(py::handle texts, py::handle offsets, double threshold, int64_t ngram, bool chars) {
  const std::vector<std::string_view> views = text_views("similar_pairs", texts, offsets);
  std::vector<SimilarPair> found;
  {
    py::gil_scoped_release release;
    found = similar_pairs(views.data(), static_cast<int64_t>(views.size()), threshold, {ngram, unit_of(chars)});
  }
  const py::ssize_t count = static_cast<py::ssize_t>(found.size());
  py::array_t<int64_t> pairs({count, py::ssize_t{2}});
  py::array_t<double> similarity(count);
  int64_t* xy = pairs.mutable_data();
  double* value = similarity.mutable_data();
  for (const SimilarPair& pair : found) {
    *xy++ = pair.x;
    *xy++ = pair.y;
    *value++ = pair.similarity;
  }
  return py::make_tuple(std::move(pairs), std::move(similarity));
}

}  // namespace

void register_minhash(py::module_& m) {
  m.def("minhash_signatures", &minhash, py::arg("texts"), py::arg("offsets"), py::arg("num_perm"), py::arg("ngram"),
        py::arg("chars"), py::arg("seed"), py::arg("signatures"), "Fills signatures, uint32 [N, num_perm].");
  m.def("minhash_token_signatures", &minhash_tokens, py::arg("tokens"), py::arg("cu_seqlens"), py::arg("ngram"),
        py::arg("seed"), py::arg("signatures"), "Fills signatures, uint32 [N, num_perm].");
  m.def(
      "lsh_shape",
      [](int64_t num_perm, double threshold) {
        const LshShape shape = lsh_shape(num_perm, threshold);
        return py::make_tuple(shape.bands, shape.rows);
      },
      py::arg("num_perm"), py::arg("threshold"), "(bands, rows) with the least weighted error.");
  m.def("lsh_keys", &band_keys, py::arg("signatures"), py::arg("rows"), py::arg("keys"),
        "Fills keys, int64 [bands, N].");
  m.def("lsh_step", &lsh_step, py::arg("step"), py::arg("signatures"), py::arg("parent"), py::arg("duplicate"),
        py::arg("keys"), py::arg("order"), py::arg("labels"), py::arg("first"), py::arg("count"), py::arg("threshold"),
        "A step of lsh_clusters on CUDA: keys, duplicates, neighbours, groups or labels.");
  m.def("lsh_clusters", &cluster, py::arg("signatures"), py::arg("threshold"), py::arg("bands"), py::arg("rows"),
        py::arg("labels"), "Fills labels, int64 [N].");
  m.def("link_similar", &link, py::arg("texts"), py::arg("offsets"), py::arg("members"), py::arg("bucket_offsets"),
        py::arg("rows"), py::arg("parent"), py::arg("threshold"), py::arg("ngram"), py::arg("chars"),
        py::arg("max_cluster"), "Joins rows of parent, int64 [R]; max_cluster 0 is no limit.");
  m.def("near_duplicates", &find_duplicates, py::arg("texts"), py::arg("offsets"), py::arg("num_perm"),
        py::arg("ngram"), py::arg("chars"), py::arg("seed"), py::arg("bands"), py::arg("rows"), py::arg("threshold"),
        py::arg("verify"), py::arg("max_cluster"), py::arg("labels"),
        "Fills labels, int64 [N]; max_cluster 0 is no limit.");
  m.def("all_pairs_clusters", &find_all_duplicates, py::arg("texts"), py::arg("offsets"), py::arg("ngram"),
        py::arg("chars"), py::arg("threshold"), py::arg("max_cluster"), py::arg("labels"),
        "Fills labels, int64 [N]; max_cluster 0 is no limit.");
  m.def("similar_pairs", &find_pairs, py::arg("texts"), py::arg("offsets"), py::arg("threshold"), py::arg("ngram"),
        py::arg("chars"), "(int64 [P, 2], float64 [P])");
}

}  // namespace fastsft::bindings
