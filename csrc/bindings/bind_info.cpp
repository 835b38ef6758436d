#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fastsft/device.h"
#include "fastsft/isa.h"
#include "fastsft/memory.h"
#include "fastsft/parallel.h"
#include "tensor_view.h"

namespace fastsft::bindings {

void register_info(py::module_& m) {
  m.def("compiler", [] { return FASTSFT_COMPILER; });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("set_isa", [](const std::string& name) { set_isa(find_isa("set_isa: name", name.c_str())); }, py::arg("name"));
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("cuda_architectures", &cuda_architectures, "Architectures compiled in, or '' for a CPU-only build.");
  m.def("keep_freed_memory", &keep_freed_memory, "Let the C library keep what is freed; for whole programs.");
  m.def(
      "advise_huge_pages",
      [](py::handle tensor) {
        const TensorView view = view_of(tensor);
        if (!view.on_cuda() && view.contiguous()) advise_huge_pages(view.data, view.numel() * view.dtype.bits / 8);
      },
      py::arg("tensor"), "Ask for huge pages under a fresh CPU tensor, before it is first written.");
  m.def(
      "describe", [](py::handle tensor) { return view_of(tensor).describe(); }, py::arg("tensor"),
      "How the bindings see a tensor: dtype, shape, device.");
}

}  // namespace fastsft::bindings
