// Digests of texts.
#include "fastsft/digest.h"
#include "text_views.h"

namespace fastsft::bindings {
namespace {

void digests(py::handle texts, py::handle offsets, py::handle out) {
  const std::vector<std::string_view> views = text_views("text_digests", texts, offsets);
  Check check("text_digests");
  auto* to = check.in<uint64_t>("digests", out, "N 2");
  const int64_t n = static_cast<int64_t>(views.size());
  check.require(check.size("N") == n, "digests", "one row per text", view_of(out).describe());
  py::gil_scoped_release release;
  text_digests(views.data(), n, to);
}

}  // namespace

void register_digest(py::module_& m) {
  m.def("text_digests", &digests, py::arg("texts"), py::arg("offsets"), py::arg("digests"),
        "Fills digests, uint64 [N, 2].");
}

}  // namespace fastsft::bindings
