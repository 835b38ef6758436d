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
  m.def("penalise", &penalise_rows, py::arg("logits"), py::arg("tokens"), py::arg("prompt"), py::arg("first"),
        py::arg("repetition"), py::arg("frequency"), py::arg("presence"), "Changes logits.");
}

}  // namespace fastsft::bindings
