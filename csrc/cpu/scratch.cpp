#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastsft {

void* thread_scratch(int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(64, (static_cast<std::size_t>(bytes) + 63) / 64 * 64);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace fastsft
