// N-grams shared with references.
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "fastsft/overlap.h"
#include "text_views.h"

namespace fastsft::bindings {
namespace {

std::unique_ptr<NgramIndex> make_index(py::handle references, py::handle offsets, std::vector<int64_t> ngrams) {
  const std::vector<std::string_view> views = text_views("ngram_index", references, offsets);
  py::gil_scoped_release release;
  return std::make_unique<NgramIndex>(views.data(), static_cast<int64_t>(views.size()), std::move(ngrams));
}

py::tuple overlap(py::handle texts, py::handle offsets, const NgramIndex& index,
                  const std::optional<std::vector<double>>& above) {
  const std::vector<std::string_view> views = text_views("ngram_overlap", texts, offsets);
  Overlaps found;
  {
    py::gil_scoped_release release;
    found = ngram_overlap(views.data(), static_cast<int64_t>(views.size()), index, above ? &*above : nullptr);
  }
  static_assert(sizeof(Shared) == 4 * sizeof(int64_t));
  const py::ssize_t rows = static_cast<py::ssize_t>(found.pairs.size() / 2);
  const py::ssize_t lengths = static_cast<py::ssize_t>(index.ngrams().size());
  return py::make_tuple(
      py::array_t<int64_t>({rows, py::ssize_t{2}}, found.pairs.data()),
      py::array_t<int64_t>({rows, lengths, py::ssize_t{4}}, reinterpret_cast<const int64_t*>(found.shared.data())),
      py::array_t<uint8_t>(static_cast<py::ssize_t>(found.found.size()), found.found.data()));
}

}  // namespace

void register_overlap(py::module_& m) {
  py::class_<NgramIndex>(m, "NgramIndex", "Every n-gram of some references, for each n.")
      .def(py::init(&make_index), py::arg("references"), py::arg("offsets"), py::arg("ngrams"))
      .def_property_readonly("ngrams", &NgramIndex::ngrams)
      .def_property_readonly(
          "num_words",
          [](const NgramIndex& index) { return py::array_t<int64_t>(index.size(), index.num_words().data()); })
      .def("__len__", &NgramIndex::size);
  m.def("ngram_overlap", &overlap, py::arg("texts"), py::arg("offsets"), py::arg("index"), py::arg("above"),
        "(pairs int64 [M, 2], shared int64 [M, K, 4]: n-grams, words, begin, end; found uint8 [R])");
}

}  // namespace fastsft::bindings
