#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "fastsft/penalties.h"
#include "fastsft/sampling.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

void sample_rows(py::handle logits, py::handle temperature, py::handle top_k, py::handle top_p, py::handle min_p,
                 py::handle seeds, py::handle positions, py::handle ids, py::handle logprobs) {
  Check check("sample");
  const auto* in = check.in<float>("logits", logits, "B V");
  const SamplingRows parameters{check.in<float>("temperature", temperature, "B"),
                                check.in<int32_t>("top_k", top_k, "B"),
                                check.in<float>("top_p", top_p, "B"),
                                check.in<float>("min_p", min_p, "B"),
                                check.in<int64_t>("seeds", seeds, "B"),
                                check.in<int64_t>("positions", positions, "B")};
  auto* out_ids = check.in<int64_t>("ids", ids, "B");
  auto* out_logprobs = check.in<float>("logprobs", logprobs, "B");
  const int64_t rows = check.size("B"), vocab = check.size("V");
  py::gil_scoped_release release;
  sample(in, rows, vocab, parameters, out_ids, out_logprobs);
}

// Of a row: temperature, top_k, top_p, min_p, seed, position.
using Row = std::tuple<float, int32_t, float, float, int64_t, int64_t>;

std::pair<std::vector<int64_t>, std::vector<float>> sample_few(py::handle logits, const std::vector<Row>& rows) {
  Check check("sample");
  const auto* in = check.in<float>("logits", logits, "B V");
  const std::size_t n = rows.size();
  check.require(check.size("B") == static_cast<int64_t>(n), "rows", "one for each of the logits", std::to_string(n));
  std::vector<float> temperature(n), top_p(n), min_p(n), logprobs(n);
  std::vector<int32_t> top_k(n);
  std::vector<int64_t> seeds(n), positions(n), ids(n);
  for (std::size_t i = 0; i < n; ++i) {
    std::tie(temperature[i], top_k[i], top_p[i], min_p[i], seeds[i], positions[i]) = rows[i];
  }
  const int64_t vocab = check.size("V");
  {
    py::gil_scoped_release release;
    sample(in, static_cast<int64_t>(n), vocab,
           {temperature.data(), top_k.data(), top_p.data(), min_p.data(), seeds.data(), positions.data()}, ids.data(),
           logprobs.data());
  }
  return {std::move(ids), std::move(logprobs)};
}

void penalise_rows(py::handle logits, py::handle tokens, int64_t prompt, int64_t first, float repetition,
                   float frequency, float presence) {
  Check check("penalise");
  auto* rows = check.in<float>("logits", logits, "R V");
  const auto* text = check.in<int32_t>("tokens", tokens, "T");
  penalise(rows, check.size("R"), check.size("V"), text, check.size("T"), prompt, first,
           {repetition, frequency, presence});
}

}  // namespace

void register_sampling(py::module_& m) {
  m.def("sample", &sample_rows, py::arg("logits"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
        py::arg("min_p"), py::arg("seeds"), py::arg("positions"), py::arg("ids"), py::arg("logprobs"),
        "Fills ids and logprobs.");
  m.def("sample_few", &sample_few, py::arg("logits"), py::arg("rows"), "ids and logprobs.");
  m.def("penalise", &penalise_rows, py::arg("logits"), py::arg("tokens"), py::arg("prompt"), py::arg("first"),
        py::arg("repetition"), py::arg("frequency"), py::arg("presence"), "Changes logits.");
}

}  // namespace fastsft::bindings
