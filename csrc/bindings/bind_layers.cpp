#include "fastsft/activation.h"
#include "fastsft/norm.h"
#include "fastsft/rope.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

// Another tensor of the same type and shape.
void* like(Check& check, const char* name, py::handle tensor, const char* dims, const TensorView& first) {
  const TensorView view = check.floats(name, tensor, dims);
  check.same_dtype(name, view, first);
  check.require(!check.on_cuda(), name, "a CPU tensor", view.describe());
  return view.data;
}

RmsNorm norm_of(Check& check, const TensorView& x, py::handle weight, float eps) {
  return {Check::dtype_of(x), x.data, check.in<float>("weight", weight, "D"), check.size("N"), check.size("D"), eps};
}

void rms_norm_checked(py::handle x_tensor, py::handle weight, float eps, py::handle out, py::handle scale) {
  Check check("rms_norm");
  const TensorView x = check.floats("x", x_tensor, "N D");
  const RmsNorm norm = norm_of(check, x, weight, eps);
  void* const y = like(check, "out", out, "N D", x);
  float* const scales = check.in<float>("scale", scale, "N");
  py::gil_scoped_release release;
  rms_norm(norm, y, scales);
}

void rms_norm_backward_checked(py::handle x_tensor, py::handle weight, py::handle scale, py::handle grad,
                               py::handle d_x, py::handle d_weight) {
  Check check("rms_norm_backward");
  const TensorView x = check.floats("x", x_tensor, "N D");
  const RmsNorm norm = norm_of(check, x, weight, 0.0f);
  const float* const scales = check.in<float>("scale", scale, "N");
  const void* const dy = like(check, "grad", grad, "N D", x);
  void* const dx = like(check, "d_x", d_x, "N D", x);
  float* const dw = check.in<float>("d_weight", d_weight, "D");
  py::gil_scoped_release release;
  rms_norm_backward(norm, scales, dy, dx, dw);
}

void rope_checked(py::handle x_tensor, py::handle cos, py::handle sin, bool inverse, py::handle out) {
  Check check("rope");
  const TensorView x = check.floats("x", x_tensor, "T N K");
  const Rope turn{.dtype = Check::dtype_of(x),
                  .x = x.data,
                  .cos = like(check, "cos", cos, "T R", x),
                  .sin = like(check, "sin", sin, "T R", x),
                  .tokens = check.size("T"),
                  .heads = check.size("N"),
                  .size = check.size("K")};
  check.require(check.size("K") == 2 * check.size("R"), "cos", "half as many columns as x", x.describe());
  void* const y = like(check, "out", out, "T N K", x);
  py::gil_scoped_release release;
  rope(turn, inverse, y);
}

SwiGlu unit_of(Check& check, const TensorView& gate, py::handle up) {
  return {Check::dtype_of(gate), gate.data, like(check, "up", up, "N", gate), check.size("N")};
}

void swiglu_checked(py::handle gate_tensor, py::handle up, py::handle out) {
  Check check("swiglu");
  const TensorView gate = check.floats("gate", gate_tensor, "N");
  const SwiGlu unit = unit_of(check, gate, up);
  void* const y = like(check, "out", out, "N", gate);
  py::gil_scoped_release release;
  swiglu(unit, y);
}

void swiglu_backward_checked(py::handle gate_tensor, py::handle up, py::handle grad, py::handle d_gate,
                             py::handle d_up) {
  Check check("swiglu_backward");
  const TensorView gate = check.floats("gate", gate_tensor, "N");
  const SwiGlu unit = unit_of(check, gate, up);
  const void* const dy = like(check, "grad", grad, "N", gate);
  void *const dg = like(check, "d_gate", d_gate, "N", gate), *const du = like(check, "d_up", d_up, "N", gate);
  py::gil_scoped_release release;
  swiglu_backward(unit, dy, dg, du);
}

}  // namespace

void register_layers(py::module_& m) {
  m.def("rms_norm", &rms_norm_checked, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
        py::arg("scale"));
  m.def("rms_norm_backward", &rms_norm_backward_checked, py::arg("x"), py::arg("weight"), py::arg("scale"),
        py::arg("grad"), py::arg("d_x"), py::arg("d_weight"));
  m.def("rope", &rope_checked, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("inverse"), py::arg("out"));
  m.def("swiglu", &swiglu_checked, py::arg("gate"), py::arg("up"), py::arg("out"));
  m.def("swiglu_backward", &swiglu_backward_checked, py::arg("gate"), py::arg("up"), py::arg("grad"), py::arg("d_gate"),
        py::arg("d_up"));
}

}  // namespace fastsft::bindings
