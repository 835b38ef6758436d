#include "tensor_view.h"

namespace fastsft::bindings {

void register_attention(py::module_&) {}

}  // namespace fastsft::bindings
