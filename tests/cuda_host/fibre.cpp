#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// This file is compiled without -fsanitize=thread, so the build says by hand whether the program has it.
#if defined(CUDA_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif

// cuda_host_switch(void** save, void* load): pushes what a function must preserve, swaps stack pointers, pops.
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
extern "C" void cuda_host_switch(void** save, void* load);

namespace cuda_host {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;
Fibre* t_arriving = nullptr;  // the fibre being switched to
Fibre* t_leaving = nullptr;

}  // namespace

Fibre::Fibre() {
  stack_bytes_ = kStackBytes;
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);  // an overflow faults
  stack_ = static_cast<std::byte*>(memory) + kGuardBytes;
  tsan = create_actor();
}

Fibre::Fibre(Host) {
#if defined(CUDA_HOST_TSAN)
  tsan = __tsan_get_current_fiber();
#endif
}

Fibre::~Fibre() {
  if (this == &host()) return;
  munmap(stack_ - kGuardBytes, kStackBytes + kGuardBytes);
#if defined(CUDA_HOST_TSAN)
  __tsan_destroy_fiber(tsan);
#endif
}

Fibre& Fibre::host() {
  static Fibre fibre{Host{}};
  return fibre;
}

void Fibre::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // frames that were abandoned
#endif
  auto* top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;  // where begin() would return to; also makes the stack as aligned as after a call
  *--top = reinterpret_cast<void*>(&Fibre::begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fibre::switch_to(Fibre& from, Fibre& to) {
  t_leaving = &from;
  t_arriving = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(CUDA_HOST_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  cuda_host_switch(&from.stack_pointer_, to.stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fibre::begin() {
  Fibre& self = *t_arriving;
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (t_leaving->entry_ == nullptr) {  // the host's stack, whose place is not known otherwise
    t_leaving->stack_ = static_cast<std::byte*>(const_cast<void*>(bottom));
    t_leaving->stack_bytes_ = bytes;
  }
#endif
  self.entry_(self.argument_);
  std::abort();
}

#if defined(CUDA_HOST_TSAN)
void release(void* object) { __tsan_release(object); }
void acquire(void* object) { __tsan_acquire(object); }
void* create_actor() { return __tsan_create_fiber(0); }
void* become(void* actor) {
  void* const self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(actor, __tsan_switch_to_fiber_no_sync);
  return self;
}
void note_read(const void* data, std::size_t bytes) { __tsan_read_range(const_cast<void*>(data), bytes); }
void note_write(void* data, std::size_t bytes) { __tsan_write_range(data, bytes); }
#else
void release(void*) {}
void acquire(void*) {}
void* create_actor() { return nullptr; }
void* become(void*) { return nullptr; }
void note_read(const void*, std::size_t) {}
void note_write(void*, std::size_t) {}
#endif

}  // namespace cuda_host
