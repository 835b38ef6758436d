// The table of contents of fastsft._C. Each register_* function lives in bind_<area>.cpp: it unpacks and checks
// arguments, releases the GIL and calls one function of include/fastsft; it does no maths.
#include <pybind11/pybind11.h>

#include "fastsft/common.h"

namespace fastsft::bindings {
void register_info(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_decoder(pybind11::module_& m);
void register_digest(pybind11::module_& m);
void register_gemm(pybind11::module_& m);
void register_jsonl(pybind11::module_& m);
void register_kv_cache(pybind11::module_& m);
void register_layers(pybind11::module_& m);
void register_loss(pybind11::module_& m);
void register_matvec(pybind11::module_& m);
void register_data(pybind11::module_& m);
void register_minhash(pybind11::module_& m);
void register_fim(pybind11::module_& m);
void register_overlap(pybind11::module_& m);
void register_sampling(pybind11::module_& m);
void register_suffix_automaton(pybind11::module_& m);
}  // namespace fastsft::bindings

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastsft. Private: call fastsft.ops, which checks devices and registers autograd.";
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fastsft::Error& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  fastsft::bindings::register_info(m);
  fastsft::bindings::register_attention(m);
  fastsft::bindings::register_decoder(m);
  fastsft::bindings::register_digest(m);
  fastsft::bindings::register_gemm(m);
  fastsft::bindings::register_jsonl(m);
  fastsft::bindings::register_kv_cache(m);
  fastsft::bindings::register_layers(m);
  fastsft::bindings::register_loss(m);
  fastsft::bindings::register_matvec(m);
  fastsft::bindings::register_data(m);
  fastsft::bindings::register_minhash(m);
  fastsft::bindings::register_fim(m);
  fastsft::bindings::register_overlap(m);
  fastsft::bindings::register_sampling(m);
  fastsft::bindings::register_suffix_automaton(m);
}
