// A borrowed view of a torch tensor or numpy array, and the checks that turn a wrong argument into a clear ValueError.
//
// Three ways in, tried in this order: DLPack's C exchange API (torch >= 2.10, about 80 ns), the buffer of a numpy
// array, and the attributes of an older torch tensor. The view does not own memory and must not outlive the call.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "dlpack_abi.h"
#include "fastsft/common.h"

namespace fastsft::bindings {

namespace py = pybind11;

inline constexpr int kMaxDims = 6;

struct TensorView {
  void* data = nullptr;
  dlpack::Device device{dlpack::kCpu, 0};
  dlpack::DataType dtype{dlpack::kFloat, 32, 1};
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements
  void* stream = nullptr;                   // the producer's current stream on a CUDA device

  bool on_cuda() const { return device.type == dlpack::kCuda; }
  int64_t numel() const;
  bool contiguous() const;
  std::string describe() const;  // "float32[3, 4] on cpu"
};

TensorView view_of(py::handle object);  // throws py::type_error if it is no tensor or array

enum class Layout {
  kContiguous,
  kRows,    // the last dimension is contiguous, the outer strides are free
  kMatrix,  // two dimensions, one of them contiguous; a dimension of size 1 counts as such
};

// Binds the letters of a contract to sizes, so that a call's checks read as a table:
//
//   Check check("varlen_attention");
//   auto q = check.in("q", q_object, "T H D", {DType::kFloat32, DType::kBFloat16});
//   auto* cu = check.in<int32_t>("cu_seqlens", cu_object, "B+1");
//
// A letter's first use sets it, later uses must agree; a number must match as it stands; "B+1" binds B to size - 1.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // A floating-point tensor.
  TensorView floats(const char* name, py::handle object, const char* dims, Layout layout = Layout::kContiguous);
  static DType dtype_of(const TensorView& view);  // throws Error for other types

  // A contiguous tensor of exactly the element type T.
  template <typename T>
  T* in(const char* name, py::handle object, const char* dims);

  // The same, or null when the object is None.
  template <typename T>
  T* optional(const char* name, py::handle object, const char* dims) {
    return object.is_none() ? nullptr : in<T>(name, object, dims);
  }

  int64_t size(const std::string& letter) const;  // throws Error if the letter is unbound
  void same_dtype(const char* name, const TensorView& view, const TensorView& like) const;
  void require(bool condition, const char* name, const std::string& expected, const std::string& got) const;
  void* stream() const { return stream_; }
  bool on_cuda() const { return device_.type == dlpack::kCuda; }

 private:
  TensorView typed(const char* name, py::handle object, const char* dims, dlpack::TypeCode code, int bits);
  void bind(const char* name, const TensorView& view, const char* dims);

  const char* op_;
  std::map<std::string, int64_t> sizes_;
  dlpack::Device device_{0, 0};  // of the first tensor seen; all must agree
  void* stream_ = nullptr;
};

template <typename T>
T* Check::in(const char* name, py::handle object, const char* dims) {
  constexpr auto code = std::is_same_v<T, bool>       ? dlpack::kBool
                        : std::is_floating_point_v<T> ? dlpack::kFloat
                        : std::is_signed_v<T>         ? dlpack::kInt
                                                      : dlpack::kUInt;
  return static_cast<T*>(typed(name, object, dims, code, static_cast<int>(sizeof(T) * 8)).data);
}

}  // namespace fastsft::bindings
