// Errors, element types and argument checks shared by every op. No Python, torch or CUDA types here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastsft {

// The caller broke a contract stated in a header. The bindings raise it as ValueError.
struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

namespace detail {
template <typename... Args>
[[noreturn]] void fail(const Args&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}
}  // namespace detail

// FASTSFT_CHECK(n >= 0, "pack: lengths: expected >= 0, got ", n)
#define FASTSFT_CHECK(condition, ...)                       \
  do {                                                      \
    if (!(condition)) ::fastsft::detail::fail(__VA_ARGS__); \
  } while (0)

// Element types of the floating-point arguments. bfloat16 and float16 travel as raw 16-bit words;
// kernels convert them to float32 on load and round to nearest even on store.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "unknown";
}

inline std::size_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fastsft
