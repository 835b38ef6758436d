#include "emulator.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <sstream>
#include <vector>

#include "block.h"

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

Run* g_run = nullptr;

namespace {

constexpr std::size_t kMaxShared = 227 * 1024, kSharedAlignment = 1024;

// Two sets of fibres take turns, so that nothing orders a block's accesses before those of the next one.
struct Pool {
  std::vector<std::unique_ptr<Fibre>> fibres;
  void* owner = create_actor();  // see Run
  void* engine = create_actor();

  void grow(std::size_t count) {
    while (fibres.size() < count) fibres.push_back(std::make_unique<Fibre>());
  }
};

Pool& pool(unsigned turn) {
  static Pool pools[2];
  return pools[turn % 2];
}

uint64_t g_fences = 0;

void enter(Thread& thread) {
  g_run->self = &thread;
  threadIdx = {thread.index};
}

std::string where() {
  std::ostringstream text;
  text << *g_run->kernel << ", block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  return text.str();
}

// Why nothing can go on: the first thread that waits and the first one that it waits for.
std::exception_ptr deadlock(Block& block) {
  std::ostringstream text;
  text << where() << ": ";
  for (const Thread& thread : block.threads) {
    if (thread.waiting_at == nullptr) continue;
    text << "thread " << thread.index << " waits at " << thread.waiting_for;
    if (const std::string state = mbarrier_state(block, thread.waiting_at); !state.empty()) {
      text << state;
      break;
    }
    unsigned first = 0, last = static_cast<unsigned>(block.threads.size());
    for (const auto* meetings : {&block.warps, &block.warpgroups}) {
      for (const Meeting& m : *meetings) {
        if (&m == thread.waiting_at) first = m.first, last = m.first + m.size;
      }
    }
    for (unsigned i = first; i < last; ++i) {
      const Thread& other = block.threads[i];
      if (other.waiting_at == thread.waiting_at) continue;
      text << ", which thread " << i << " does not reach: it ";
      other.done ? text << "has returned" : text << "waits at " << other.waiting_for;
      break;
    }
    break;
  }
  return std::make_exception_ptr(Fault(text.str()));
}

// Leaves the running thread, which waits or is done, for the next one that can run; for the host if there is none.
void leave(Thread& self) {
  Block& block = *g_run->block;
  Thread* next = block.error ? nullptr : block.next();
  const bool over = block.error || block.done == block.threads.size();
  while (next == nullptr && !over && land_load(block)) next = block.next();
  if (next == nullptr) {
    Fibre::switch_to(*self.fibre, Fibre::host());  // the end of the block, or a deadlock
  } else {
    enter(*next);
    if (next != &self) Fibre::switch_to(*self.fibre, *next->fibre);
  }
}

void thread_main(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  Block& block = *g_run->block;
  acquire(&block.start);
  try {
    (*g_run->body)();
    if (const std::string text = unfinished(self); !text.empty()) fail(text);
  } catch (...) {
    block.error = std::current_exception();
  }
  release(&block.end);
  self.done = true;
  ++block.done;
  leave(self);
}

void meet(Meeting& m, const char* name, void* argument, Combine combine) {
  Block& block = *g_run->block;
  const unsigned lane = g_run->self->index - m.first;
  if (m.arrived > 0 && std::strcmp(m.name, name) != 0) {
    for (unsigned i = 0; i < m.size; ++i) {
      if (block.threads[m.first + i].waiting_at == &m) {
        fail(std::string("is at ") + name + " while thread " + std::to_string(m.first + i) + " of its warp is at " +
             m.name);
      }
    }
  }
  m.name = name;
  m.arguments[lane] = argument;
  if (++m.arrived < m.size) return wait_at(&m, name);
  m.arrived = 0;
  ++m.phase;
  if (combine != nullptr) combine(m.arguments);
  wake_all(block, &m, m.first, m.size);
}

Block* make_block(unsigned threads, std::size_t shared_bytes, unsigned turn) {
  auto* block = new Block;
  block->threads.resize(threads);
  block->ready.resize(threads);
  block->warps.resize(threads / kWarp);
  block->warpgroups.resize(threads / kWarpgroup);
  for (unsigned i = 0; i < threads; ++i) block->threads[i].index = i;
  for (unsigned i = 0; i < threads / kWarp; ++i) block->warps[i].first = i * kWarp, block->warps[i].size = kWarp;
  for (unsigned i = 0; i < threads / kWarpgroup; ++i) {
    block->warpgroups[i].first = i * kWarpgroup, block->warpgroups[i].size = kWarpgroup;
  }
  for (Barrier& b : block->barriers) b.last_arrival.resize(threads);
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, shared_bytes) != 0) throw std::bad_alloc();
  std::memset(memory, kPoison, shared_bytes);
  block->shared = static_cast<std::byte*>(memory);
  block->shared_bytes = shared_bytes;
  block->descending = turn % 2 == 1;
  return block;
}

std::exception_ptr run_block(Run& run, unsigned turn, std::size_t shared_bytes, uint64_t* begin, uint64_t* end) {
  Pool& fibres = pool(turn);
  const unsigned threads = blockDim.x;
  fibres.grow(threads);
  run.owner = fibres.owner;
  run.engine = fibres.engine;
  act_as(fibres.owner, [&] {
    acquire(begin);
    run.block = make_block(threads, shared_bytes, turn);
    release(&run.block->start);
  });
  Block& block = *run.block;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = block.threads[block.descending ? threads - 1 - i : i];
    thread.fibre = fibres.fibres[thread.index].get();
    thread.fibre->prepare(thread_main, &thread);
    block.wake(thread);
  }
  Thread& first = *block.next();
  enter(first);
  Fibre::switch_to(Fibre::host(), *first.fibre);
  const bool stuck = !block.error && block.done < threads;
  std::exception_ptr error = stuck ? deadlock(block) : block.error;
  if (const std::string text = unfinished(block); !error && !text.empty()) {
    error = std::make_exception_ptr(Fault(where() + ": " + text));
  }
  for (const Thread& thread : block.threads) {
    if (!thread.done) act_as(thread.fibre->tsan, [&] { release(&block.end); });
  }
  act_as(fibres.engine, [&] { release(&block.end); });
  act_as(fibres.owner, [&] {
    acquire(&block.end);
    std::free(block.shared);
    delete &block;
    release(end);
  });
  return error;
}

// A stride that visits all of [0, count) in an order far from ascending.
uint64_t scrambling_stride(uint64_t count) {
  uint64_t stride = std::max<uint64_t>(1, static_cast<uint64_t>(0.618 * static_cast<double>(count)));
  while (std::gcd(stride, count) != 1) ++stride;
  return stride;
}

}  // namespace

void wait_at(const void* place, const char* name) {
  Thread& self = *g_run->self;
  self.waiting_at = place;
  self.waiting_for = name;
  leave(self);
}

// In the order of the block. Allocates nothing: memory is the owner's business.
void wake_all(Block& block, const void* place, unsigned first, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[first + (block.descending ? count - 1 - i : i)];
    if (thread.waiting_at == place) block.wake(thread);
  }
}

void yield() {
  g_run->block->wake(*g_run->self);
  leave(*g_run->self);
}

void launch(const std::string& kernel, Dim3 grid, unsigned threads, std::size_t shared_bytes,
            const std::function<void()>& body) {
  if (threads == 0 || threads % kWarp != 0 || threads > kMaxThreads || shared_bytes > kMaxShared) {
    throw Fault(kernel + ": " + std::to_string(threads) + " threads (a multiple of 32 up to 1024), " +
                std::to_string(shared_bytes) + " bytes of shared memory (at most " + std::to_string(kMaxShared) + ")");
  }
  if (g_run != nullptr) throw Fault(kernel + ": launched inside a kernel");
  Run run{&kernel, &body};
  g_run = &run;
  gridDim = grid;
  blockDim = {threads};
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z, stride = scrambling_stride(count);
  std::exception_ptr error;
  uint64_t begin = 0, end = 0;
  release(&begin);
  for (uint64_t i = 0; i < count && !error; ++i) {
    const uint64_t b = (i + 1) * stride % count;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    error = run_block(run, static_cast<unsigned>(i), shared_bytes, &begin, &end);
  }
  acquire(&end);
  g_run = nullptr;
  if (error) {
    for (unsigned turn : {0, 1}) pool(turn).fibres.clear();  // some were left in the middle of the kernel
    std::rethrow_exception(error);
  }
}

void fail(const std::string& what) {
  throw Fault(where() + ", thread " + std::to_string(g_run->self->index) + " " + what);
}

std::byte* shared_memory() { return g_run->block->shared; }

void check_aligned(const char* name, const void* data, std::size_t alignment) {
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) {
    fail(std::string(name) + ": the address is not aligned to " + std::to_string(alignment) + " bytes");
  }
}

void check_shared(const char* name, const void* data, std::size_t bytes, std::size_t alignment) {
  const Block& block = *g_run->block;
  const auto* const first = static_cast<const std::byte*>(data);
  if (first < block.shared || first + bytes > block.shared + block.shared_bytes) {
    fail(std::string(name) + ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(first - block.shared) +
         " are not in the block's " + std::to_string(block.shared_bytes) + " bytes of shared memory");
  }
  check_aligned(name, data, alignment);
}

void meet_warp(const char* name, void* argument, Combine combine) {
  meet(g_run->block->warps[g_run->self->index / kWarp], name, argument, combine);
}

void meet_warpgroup(const char* name, void* argument, Combine combine) {
  Block& block = *g_run->block;
  const unsigned group = g_run->self->index / kWarpgroup;
  if (group >= block.warpgroups.size()) fail(std::string("is at ") + name + " but in no complete warpgroup");
  meet(block.warpgroups[group], name, argument, combine);
}

void sync_warp() {
  Meeting& warp = g_run->block->warps[g_run->self->index / kWarp];
  uint64_t* const order = &warp.order[warp.phase % 2];
  release(order);
  meet(warp, "sync_warp", nullptr, nullptr);
  acquire(order);
}

void barrier(const char* name, int id, int threads, bool wait) {
  Block& block = *g_run->block;
  Thread& self = *g_run->self;
  if (id < 0 || id >= kBarriers || threads <= 0 || threads % kWarp != 0 ||
      static_cast<std::size_t>(threads) > block.threads.size()) {
    fail(std::string("is at ") + name + " " + std::to_string(id) + " (0 to 15) for " + std::to_string(threads) +
         " threads (a multiple of 32, at most the block's)");
  }
  Barrier& b = block.barriers[id];
  if (b.arrived > 0 && b.expected != static_cast<unsigned>(threads)) {
    fail(std::string("is at ") + name + " " + std::to_string(id) + " for " + std::to_string(threads) +
         " threads, others for " + std::to_string(b.expected));
  }
  if (b.last_arrival[self.index] == b.phase + 1)
    fail(std::string("arrives twice at ") + name + " " + std::to_string(id));
  uint64_t* const order = &b.order[b.phase % 2];
  release(order);
  b.expected = static_cast<unsigned>(threads);
  b.last_arrival[self.index] = b.phase + 1;
  if (++b.arrived < b.expected) {
    if (!wait) return;
    wait_at(&b, name);
  } else {
    b.arrived = 0;
    ++b.phase;
    wake_all(block, &b, 0, static_cast<unsigned>(block.threads.size()));
  }
  if (wait) acquire(order);
}

void thread_fence() {
  release(&g_fences);
  acquire(&g_fences);
}

}  // namespace cuda_host

void __syncthreads() { cuda_host::barrier("__syncthreads", 0, static_cast<int>(blockDim.x), true); }
