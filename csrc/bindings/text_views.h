// The two forms in which texts come: a tuple of str, or one buffer with offsets (the layout of Arrow's large_string).
#pragma once

#include <string_view>
#include <vector>

#include "tensor_view.h"

namespace fastsft::bindings {

// offsets None: texts is a tuple of str. Otherwise texts is uint8 [bytes] and offsets int64 [N + 1], ascending within
// it. The views are valid as long as the arguments: nobody can change a tuple, and CPython keeps a str's UTF-8 form.
// Throws Error, naming the place, for an element that is no str or holds a lone surrogate, and for broken offsets.
std::vector<std::string_view> text_views(const char* op, py::handle texts, py::handle offsets);

}  // namespace fastsft::bindings
