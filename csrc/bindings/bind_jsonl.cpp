// Fields of JSON Lines.
#include <pybind11/stl.h>

#include "fastsft/jsonl.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

int64_t count(py::handle data) {
  Check check("jsonl_fields");
  const auto* in = check.in<uint8_t>("data", data, "S");
  const int64_t size = check.size("S");
  py::gil_scoped_release release;
  return jsonl_count(in, size);
}

int64_t fields(py::handle data, const std::vector<std::string>& wanted, const std::vector<std::string>& unwanted,
               const std::string& separator, py::handle lines, py::handle status, py::handle text, py::handle offsets) {
  Check check("jsonl_fields");
  const auto* in = check.in<uint8_t>("data", data, "S");
  auto* out_lines = check.in<int64_t>("lines", lines, "N+1");
  auto* out_status = check.in<uint8_t>("status", status, "N");
  auto* out_text = check.in<uint8_t>("text", text, "R");
  auto* out_offsets = check.in<int64_t>("offsets", offsets, "M+1");
  const int64_t size = check.size("S"), n = check.size("N");
  check.require(check.size("R") >= size, "text", "room for " + std::to_string(size) + " bytes",
                view_of(text).describe());
  check.require(check.size("M") == n * static_cast<int64_t>(wanted.size()), "offsets",
                "one per field and line, and one", view_of(offsets).describe());
  const JsonlFields names{{wanted.begin(), wanted.end()}, {unwanted.begin(), unwanted.end()}, separator};
  py::gil_scoped_release release;
  FASTSFT_CHECK(jsonl_count(in, size) == n, "jsonl_fields: lines: expected one per line of data, got ", n);
  return jsonl_fields(in, size, names, out_lines, out_status, out_text, out_offsets);
}

}  // namespace

void register_jsonl(py::module_& m) {
  m.def("jsonl_count", &count, py::arg("data"), "Number of lines.");
  m.def("jsonl_fields", &fields, py::arg("data"), py::arg("wanted"), py::arg("unwanted"), py::arg("separator"),
        py::arg("lines"), py::arg("status"), py::arg("text"), py::arg("offsets"),
        "Fills lines [N+1], status [N], text and offsets [N*F+1]; returns the bytes of text in use.");
}

}  // namespace fastsft::bindings
