// A packed weight as Python hands it over: ops/matvec.py's PackedWeight in its parts.
#pragma once

#include <string>

#include "fastsft/matvec.h"
#include "tensor_view.h"

namespace fastsft::bindings {

// Checks that data and scales have the sizes and types that the format of an [n, k] weight wants. `op` begins messages.
PackedWeight weight_of(const char* op, const std::string& format_name, int64_t group, int64_t n, int64_t k,
                       py::handle data, py::handle scales);

}  // namespace fastsft::bindings
