// The state of the block that runs. For the emulator's own files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "async.h"
#include "emulator.h"
#include "fibre.h"

namespace cuda_host {

inline constexpr unsigned kWarp = 32, kWarpgroup = 128, kMaxThreads = 1024;
inline constexpr int kBarriers = 16;

struct Copy {  // cp.async
  unsigned group;
  std::byte* to;
  std::size_t bytes;
  std::byte data[16];
};

struct Thread {
  unsigned index = 0;
  Fibre* fibre = nullptr;
  bool done = false;
  const void* waiting_at = nullptr;  // a Meeting, a Barrier or an mbarrier's word
  const char* waiting_for = nullptr;
  std::vector<Copy> copies;
  std::size_t landed = 0;   // copies before this one have
  unsigned open_group = 0;  // number of the cp.async group that the next commit closes
  std::deque<Transfer> stores;
  unsigned open_stores = 0;  // the same for bulk stores
};

// Where the lanes of a warp, or the threads of a warpgroup, come together.
struct Meeting {
  const char* name = nullptr;
  unsigned first = 0, size = 0, arrived = 0, phase = 0;
  void* arguments[kWarpgroup] = {};
  uint64_t order[2] = {};  // addresses to release and acquire, by phase, so that a slow lane acquires no later one
};

struct Barrier {
  unsigned expected = 0, arrived = 0, phase = 0;
  std::vector<unsigned> last_arrival;  // per thread: 1 + the phase it last arrived in
  uint64_t order[2] = {};
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps, warpgroups;
  std::vector<Barrier> barriers{kBarriers};
  Async async;
  std::byte* shared = nullptr;
  std::size_t shared_bytes = 0;
  bool descending = false;     // order in which threads start and wake: every second block the other way round
  std::vector<Thread*> ready;  // a ring
  std::size_t head = 0, count = 0;
  unsigned done = 0;
  std::exception_ptr error;
  uint64_t start = 0, end = 0;

  void wake(Thread& thread) {
    thread.waiting_at = nullptr;
    ready[(head + count++) % ready.size()] = &thread;
  }
  Thread* next() {
    if (count == 0) return nullptr;
    Thread* const thread = ready[head];
    head = (head + 1) % ready.size();
    --count;
    return thread;
  }
};

struct Run {
  const std::string* kernel;
  const std::function<void()>* body;
  Block* block = nullptr;
  Thread* self = nullptr;
  void* owner = nullptr;   // allocates and frees what belongs to the block
  void* engine = nullptr;  // makes the accesses of asynchronous operations
};
extern Run* g_run;

// Blocks the running thread at `place` until wake_all(place).
void wait_at(const void* place, const char* name);
// Lets go on the `count` threads from `first` on that wait at `place`.
void wake_all(Block& block, const void* place, unsigned first, unsigned count);
// Lets the other threads run first.
void yield();

// What the asynchronous units see of the block's shared memory.
std::vector<std::byte>& view_of(Block& block);
// An offset in shared memory with bits 4 and up, 1, 2 or 3 of them for rows of 32, 64 or 128 bytes, xored with those
// from 7 on; as it is for 0.
std::size_t swizzled(std::size_t offset, int row_bytes);

}  // namespace cuda_host
