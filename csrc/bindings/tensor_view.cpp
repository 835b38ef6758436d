#include "tensor_view.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <sstream>
#include <string_view>

namespace fastsft::bindings {
namespace {

std::string type_name(dlpack::DataType type) {
  const std::string bits = std::to_string(type.bits);
  switch (type.code) {
    case dlpack::kInt: return "int" + bits;
    case dlpack::kUInt: return "uint" + bits;
    case dlpack::kFloat: return "float" + bits;
    case dlpack::kBFloat: return "bfloat" + bits;
    case dlpack::kBool: return "bool";
    default: return "dtype code " + std::to_string(type.code) + ", " + bits + " bits";
  }
}

std::string device_name(dlpack::Device device) {
  return device.type == dlpack::kCuda ? "cuda:" + std::to_string(device.id) : "cpu";
}

const dlpack::ExchangeApi* exchange_api(py::handle object) {
  // One producer type (torch.Tensor) is all but certain; remember the last one seen. Guarded by the GIL.
  static PyTypeObject* cached_type = nullptr;
  static const dlpack::ExchangeApi* cached_api = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == cached_type) return cached_api;
  const dlpack::ExchangeApi* api = nullptr;
  py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->version.major != dlpack::kMajorVersion || api->tensor_from_object == nullptr) api = nullptr;
  }
  Py_INCREF(type);  // keeps a dynamically created type's address from being reused
  Py_XDECREF(cached_type);
  cached_type = type;
  cached_api = api;
  return api;
}

TensorView from_exchange(const dlpack::ExchangeApi& api, py::handle object) {
  dlpack::Tensor tensor;
  if (api.tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  TensorView view;
  FASTSFT_CHECK(tensor.ndim <= kMaxDims, "expected at most ", kMaxDims, " dimensions, got ", tensor.ndim);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (tensor.device.type == dlpack::kCuda) view.device = tensor.device;  // pinned memory is the CPU's
  view.dtype = tensor.dtype;
  view.ndim = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, view.shape.begin());
  if (tensor.strides != nullptr) {
    std::copy_n(tensor.strides, tensor.ndim, view.strides.begin());
  } else {
    int64_t stride = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      view.strides[i] = stride;
      stride *= view.shape[i];
    }
  }
  if (view.on_cuda() && api.current_stream(view.device.type, view.device.id, &view.stream) != 0) {
    throw py::error_already_set();
  }
  return view;
}

TensorView from_array(const py::array& array) {
  TensorView view;
  FASTSFT_CHECK(array.ndim() <= kMaxDims, "expected at most ", kMaxDims, " dimensions, got ", array.ndim());
  view.data = const_cast<void*>(array.data());
  view.ndim = static_cast<int>(array.ndim());
  switch (array.dtype().kind()) {
    case 'i': view.dtype.code = dlpack::kInt; break;
    case 'u': view.dtype.code = dlpack::kUInt; break;
    case 'f': view.dtype.code = dlpack::kFloat; break;
    case 'b': view.dtype.code = dlpack::kBool; break;
    default:
      throw py::type_error("expected a numeric numpy array, got dtype " + py::str(array.dtype()).cast<std::string>());
  }
  view.dtype.bits = static_cast<uint8_t>(array.itemsize() * 8);
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = array.shape(i);
    view.strides[i] = array.strides(i) / array.itemsize();
  }
  return view;
}

// torch 2.6 to 2.9 have no exchange API: read the attributes instead.
TensorView from_attributes(py::handle object) {
  if (!py::hasattr(object, "data_ptr") || !py::hasattr(object, "stride")) {
    throw py::type_error("expected a torch tensor or a numpy array, got " +
                         py::str(py::type::of(object)).cast<std::string>());
  }
  TensorView view;
  view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  const auto shape = object.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = object.attr("stride")().cast<std::vector<int64_t>>();
  FASTSFT_CHECK(shape.size() <= kMaxDims, "expected at most ", kMaxDims, " dimensions, got ", shape.size());
  view.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  std::copy(strides.begin(), strides.end(), view.strides.begin());
  const std::string name = py::str(object.attr("dtype"));  // "torch.bfloat16"
  const std::string kind = name.substr(name.find('.') + 1);
  view.dtype.bits = static_cast<uint8_t>(object.attr("element_size")().cast<int>() * 8);
  view.dtype.code = kind == "bool"                 ? dlpack::kBool
                    : kind.rfind("bfloat", 0) == 0 ? dlpack::kBFloat
                    : kind.rfind("float", 0) == 0  ? dlpack::kFloat
                    : kind.rfind("uint", 0) == 0   ? dlpack::kUInt
                                                   : dlpack::kInt;
  const py::object device = object.attr("device");
  if (device.attr("type").cast<std::string>() == "cuda") {
    view.device = {dlpack::kCuda, device.attr("index").cast<int32_t>()};
    const py::object stream = py::module_::import("torch.cuda").attr("current_stream")(device);
    view.stream = reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
  }
  return view;
}

}  // namespace

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool TensorView::contiguous() const {
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return numel() == 0;
    stride *= shape[i];
  }
  return true;
}

std::string TensorView::describe() const {
  std::ostringstream text;
  text << type_name(dtype) << '[';
  for (int i = 0; i < ndim; ++i) text << (i ? ", " : "") << shape[i];
  text << "] on " << device_name(device);
  return text.str();
}

TensorView view_of(py::handle object) {
  if (const auto* api = exchange_api(object)) return from_exchange(*api, object);
  if (py::isinstance<py::array>(object)) return from_array(py::reinterpret_borrow<py::array>(object));
  return from_attributes(object);
}

// Builds its texts only when the condition fails: a call checks a dozen tensors and takes microseconds.
#define REQUIRE(condition, ...)                    \
  do {                                             \
    if (!(condition)) require(false, __VA_ARGS__); \
  } while (0)

void Check::require(bool condition, const char* name, const std::string& expected, const std::string& got) const {
  FASTSFT_CHECK(condition, op_, ": ", name, ": expected ", expected, ", got ", got);
}

int64_t Check::size(const std::string& letter) const {
  const auto found = sizes_.find(letter);
  FASTSFT_CHECK(found != sizes_.end(), op_, ": internal: size ", letter, " was never bound");
  return found->second;
}

void Check::bind(const char* name, const TensorView& view, const char* dims) {
  const std::string_view words(dims);
  const auto count = words.empty() ? 0 : std::count(words.begin(), words.end(), ' ') + 1;
  REQUIRE(count == view.ndim, name, "[" + std::string(dims) + "]", view.describe());
  std::size_t start = 0;
  for (int i = 0; i < view.ndim; ++i) {
    const std::size_t end = std::min(words.find(' ', start), words.size());
    std::string letter(words.substr(start, end - start));
    start = end + 1;
    int64_t size = view.shape[i];
    if (std::isdigit(static_cast<unsigned char>(letter[0]))) {
      REQUIRE(size == std::stoll(letter), name, "[" + std::string(dims) + "]", view.describe());
      continue;
    }
    if (const auto plus = letter.find('+'); plus != std::string::npos) {
      size -= std::stoll(letter.substr(plus + 1));
      letter.resize(plus);
      REQUIRE(size >= 0, name, "[" + std::string(dims) + "]", view.describe());
    }
    const auto [entry, fresh] = sizes_.emplace(letter, size);
    FASTSFT_CHECK(fresh || entry->second == size, op_, ": ", name, ": dimension ", i, " makes ", letter, " = ", size,
                  ", but earlier arguments made it ", entry->second);
  }
  if (device_.type == 0) device_ = view.device;
  REQUIRE(device_.type == view.device.type && device_.id == view.device.id, name,
          "a tensor on " + device_name(device_) + ", as those before", view.describe());
  if (view.on_cuda()) stream_ = view.stream;
}

TensorView Check::typed(const char* name, py::handle object, const char* dims, dlpack::TypeCode code, int bits) {
  const TensorView view = view_of(object);
  const dlpack::DataType wanted{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  REQUIRE(view.dtype.code == wanted.code && view.dtype.bits == wanted.bits && view.contiguous(), name,
          "contiguous " + type_name(wanted) + "[" + dims + "]",
          view.describe() + (view.contiguous() ? "" : ", not contiguous"));
  bind(name, view, dims);
  return view;
}

DType Check::dtype_of(const TensorView& view) {
  if (view.dtype.code == dlpack::kFloat && view.dtype.bits == 32) return DType::kFloat32;
  if (view.dtype.code == dlpack::kBFloat && view.dtype.bits == 16) return DType::kBFloat16;
  if (view.dtype.code == dlpack::kFloat && view.dtype.bits == 16) return DType::kFloat16;
  detail::fail("expected float32, bfloat16 or float16, got ", view.describe());
}

TensorView Check::floats(const char* name, py::handle object, const char* dims, Layout layout) {
  TensorView view = view_of(object);
  const bool is_float = (view.dtype.code == dlpack::kFloat && (view.dtype.bits == 32 || view.dtype.bits == 16)) ||
                        (view.dtype.code == dlpack::kBFloat && view.dtype.bits == 16);
  REQUIRE(is_float, name, "float32, bfloat16 or float16 [" + std::string(dims) + "]", view.describe());
  bind(name, view, dims);
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 1) view.strides[i] = 1;
  }
  switch (layout) {
    case Layout::kContiguous:
      REQUIRE(view.contiguous(), name, "a contiguous tensor", view.describe() + ", not contiguous");
      break;
    case Layout::kRows:
      REQUIRE(view.ndim == 0 || view.numel() == 0 || view.strides[view.ndim - 1] == 1, name,
              "a contiguous last dimension",
              view.describe() + " with last stride " + std::to_string(view.strides[view.ndim - 1]));
      break;
    case Layout::kMatrix:
      REQUIRE(view.numel() == 0 || view.strides[0] == 1 || view.strides[1] == 1, name, "one contiguous dimension",
              view.describe() + " with strides " + std::to_string(view.strides[0]) + " and " +
                  std::to_string(view.strides[1]));
      break;
  }
  return view;
}

void Check::same_dtype(const char* name, const TensorView& view, const TensorView& like) const {
  REQUIRE(view.dtype.code == like.dtype.code && view.dtype.bits == like.dtype.bits, name, type_name(like.dtype),
          view.describe());
}

}  // namespace fastsft::bindings
