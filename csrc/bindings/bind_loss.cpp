#include "tensor_view.h"

namespace fastsft::bindings {

void register_loss(py::module_&) {}

}  // namespace fastsft::bindings
