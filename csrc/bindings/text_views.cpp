#include "text_views.h"

namespace fastsft::bindings {
namespace {

std::vector<std::string_view> of_strings(const char* op, py::handle texts) {
  FASTSFT_CHECK(PyTuple_Check(texts.ptr()), op, ": texts: expected a tuple of str, got ",
                Py_TYPE(texts.ptr())->tp_name);
  constexpr Py_ssize_t kAhead = 16;  // strings lie anywhere in memory
  const Py_ssize_t n = PyTuple_GET_SIZE(texts.ptr());
  std::vector<std::string_view> views;
  views.reserve(static_cast<std::size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(PyTuple_GET_ITEM(texts.ptr(), i + kAhead));
    PyObject* text = PyTuple_GET_ITEM(texts.ptr(), i);
    FASTSFT_CHECK(PyUnicode_Check(text), op, ": texts[", i, "]: expected str, got ", Py_TYPE(text)->tp_name);
    Py_ssize_t bytes = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text, &bytes);
    if (data == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
      PyErr_Clear();
      detail::fail(op, ": texts[", i, "]: expected text that UTF-8 can encode, got a lone surrogate");
    }
    views.emplace_back(data, static_cast<std::size_t>(bytes));
  }
  return views;
}

std::vector<std::string_view> of_arena(const char* op, py::handle texts, py::handle offsets) {
  Check check(op);
  const auto* data = reinterpret_cast<const char*>(check.in<uint8_t>("texts", texts, "B"));
  const auto* at = check.in<int64_t>("offsets", offsets, "N+1");
  const int64_t n = check.size("N"), bytes = check.size("B");
  FASTSFT_CHECK(!check.on_cuda(), op, ": texts: expected an array on the CPU, got one on CUDA");
  FASTSFT_CHECK(at[0] >= 0 && at[n] <= bytes, op, ": offsets: expected to lie within the ", bytes, " bytes given, got ",
                at[0], " to ", at[n]);
  std::vector<std::string_view> views;
  views.reserve(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    FASTSFT_CHECK(at[i] <= at[i + 1], op, ": offsets: expected never to decrease, got ", at[i], " then ", at[i + 1],
                  " at text ", i);
    views.emplace_back(data + at[i], static_cast<std::size_t>(at[i + 1] - at[i]));
  }
  return views;
}

}  // namespace

std::vector<std::string_view> text_views(const char* op, py::handle texts, py::handle offsets) {
  return offsets.is_none() ? of_strings(op, texts) : of_arena(op, texts, offsets);
}

}  // namespace fastsft::bindings
