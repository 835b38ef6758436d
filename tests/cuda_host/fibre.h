// A stack of its own that the running OS thread can switch to, made known to the sanitizers: AddressSanitizer learns
// which stack is in use, ThreadSanitizer treats every fibre as a thread of its own, without any order between fibres
// but the one that release and acquire state.
#pragma once

#include <cstddef>

namespace cuda_host {

class Fibre {
 public:
  Fibre();   // with a stack
  ~Fibre();  // must not be running
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The OS thread's own stack, as the place to switch back to.
  static Fibre& host();

  // The next switch to this fibre calls entry(argument) on an empty stack; entry must not return.
  void prepare(void (*entry)(void*), void* argument);

  // Leaves `from`, which must be running, and continues `to`; returns when something switches back to `from`.
  static void switch_to(Fibre& from, Fibre& to);

  void* tsan = nullptr;  // ThreadSanitizer's handle, null in other builds

 private:
  struct Host {};
  explicit Fibre(Host);
  [[noreturn]] static void begin();

  void* stack_pointer_ = nullptr;
  std::byte* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

// What happened before release(object), in the thread or fibre that runs, happened before what follows acquire(object).
void release(void* object);
void acquire(void* object);

// Runs `action` as another ThreadSanitizer fibre, on the stack in use.
void* create_actor();
void* become(void* actor);  // returns who was running

template <typename Action>
void act_as(void* actor, Action&& action) {
  struct Return {
    void* self;
    ~Return() { become(self); }
  } const back{become(actor)};
  action();
}

// Tell ThreadSanitizer of accesses made by this library, which is not instrumented itself.
void note_read(const void* data, std::size_t bytes);
void note_write(void* data, std::size_t bytes);

}  // namespace cuda_host
