// Parts of one piece of memory. Private to csrc/cpu.
#pragma once

#include <cstdint>

namespace fastsft {

// Hands out parts of the workspace, each aligned to 64. Without memory it only adds up.
struct Arena {
  char* memory = nullptr;
  int64_t used = 0;

  template <typename T = void>
  T* take(int64_t bytes) {
    char* const part = memory == nullptr ? nullptr : memory + used;
    used += (bytes + 63) / 64 * 64;
    return reinterpret_cast<T*>(part);
  }
};

}  // namespace fastsft
