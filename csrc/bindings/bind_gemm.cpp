#include "fastsft/gemm.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

Matrix matrix_of(const TensorView& view) {
  return {Check::dtype_of(view), view.data, view.strides[0], view.strides[1]};
}

void gemm_checked(py::handle a_tensor, py::handle b_tensor, py::handle c_tensor, bool accumulate) {
  Check check("gemm");
  const TensorView a = check.floats("a", a_tensor, "M K", Layout::kMatrix);
  const TensorView b = check.floats("b", b_tensor, "K N", Layout::kMatrix);
  const TensorView c = check.floats("c", c_tensor, "M N", Layout::kRows);
  check.require(!check.on_cuda(), "a", "a CPU tensor", a.describe());
  const Gemm product{.m = check.size("M"),
                     .n = check.size("N"),
                     .k = check.size("K"),
                     .a = matrix_of(a),
                     .b = matrix_of(b),
                     .c_dtype = Check::dtype_of(c),
                     .c = c.data,
                     .c_stride = c.strides[0],
                     .accumulate = accumulate};
  py::gil_scoped_release release;
  gemm(product);
}

}  // namespace

void register_gemm(py::module_& m) {
  m.def("gemm", &gemm_checked, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("accumulate"));
}

}  // namespace fastsft::bindings
