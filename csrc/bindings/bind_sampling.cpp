#include "tensor_view.h"

namespace fastsft::bindings {

void register_sampling(py::module_&) {}

}  // namespace fastsft::bindings
