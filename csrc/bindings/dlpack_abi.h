// The parts of the DLPack 1.x ABI that the bindings use, written from the DLPack specification
// (https://dmlc.github.io/dlpack). Field order and widths are the contract; the names are ours.
#pragma once

#include <cstdint>

namespace fastsft::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major contiguous
  uint64_t byte_offset;
};

// The C exchange API: a table behind the capsule "dlpack_exchange_api" in `type(x).__dlpack_c_exchange_api__`.
struct ExchangeApi {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Borrowed view: valid while the object lives and control has not returned to Python. May be null.
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

inline constexpr uint32_t kMajorVersion = 1;

}  // namespace fastsft::dlpack
