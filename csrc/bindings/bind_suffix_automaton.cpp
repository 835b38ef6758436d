#include "fastsft/suffix_automaton.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

void extend(SuffixAutomaton& automaton, py::handle tokens) {
  Check check("SuffixAutomaton");
  const auto* in = check.in<int32_t>("tokens", tokens, "T");
  const int64_t count = check.size("T");
  py::gil_scoped_release release;
  automaton.extend(in, count);
}

template <typename... At>
int64_t propose(const SuffixAutomaton& automaton, py::handle out, At... at) {
  Check check("SuffixAutomaton");
  auto* tokens = check.in<int32_t>("out", out, "T");
  return automaton.propose(at..., check.size("T"), tokens);
}

py::tuple follow(const SuffixAutomaton& automaton, int32_t state, int32_t length, py::handle tokens) {
  Check check("SuffixAutomaton");
  const auto* in = check.in<int32_t>("tokens", tokens, "T");
  SuffixAutomaton::Match at{state, length};
  for (int64_t i = 0; i < check.size("T"); ++i) at = automaton.follow(at, in[i]);
  return py::make_tuple(at.state, at.length);
}

}  // namespace

void register_suffix_automaton(py::module_& m) {
  py::class_<SuffixAutomaton>(m, "SuffixAutomaton", "See suffix_automaton.h.")
      .def(py::init<>())
      .def("extend", &extend, py::arg("tokens"))
      .def(
          "propose", [](const SuffixAutomaton& a, py::handle out) { return propose(a, out); }, py::arg("out"))
      .def(
          "propose_at",
          [](const SuffixAutomaton& a, int32_t state, int32_t length, py::handle out) {
            FASTSFT_CHECK(state >= 0 && state < a.states(), "SuffixAutomaton: state: expected one of ", a.states(),
                          ", got ", state);
            return propose(a, out, SuffixAutomaton::Match{state, length});
          },
          py::arg("state"), py::arg("length"), py::arg("out"))
      .def("follow", &follow, py::arg("state"), py::arg("length"), py::arg("tokens"))
      .def_property_readonly("repeated", &SuffixAutomaton::repeated)
      .def_property_readonly("size", &SuffixAutomaton::size)
      .def_property_readonly("states", &SuffixAutomaton::states)
      .def_property_readonly("bytes", &SuffixAutomaton::bytes);
}

}  // namespace fastsft::bindings
