#include "tensor_view.h"

namespace fastsft::bindings {

void register_data(py::module_&) {}

}  // namespace fastsft::bindings
