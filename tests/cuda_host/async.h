// Hopper's asynchronous units: mbarriers, the bulk copy engine and the warpgroup matrix products. (cp.async, whose
// copies are the thread's own, is declared in emulator.h.)
//
// They see shared memory through a copy of it, the view, which bulk loads write as well and fence_async_proxy() brings
// up to date: what was written without that fence is not seen. Loads land as late as possible, when no thread can go on
// without them; stores when they are waited for; products when their group is waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace cuda_host {

struct TensorMap {
  std::byte* data;
  int rank, element_bytes, swizzle_bytes;
  int64_t size[3], stride[3];  // elements, bytes
  int box[3];
};

enum class Bulk { kLoad, kStore, kAdd };

// --- called by the thread that runs ---------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(const char* name, uint64_t* barrier, int expected_bytes);
bool mbarrier_try_wait(uint64_t* barrier, int parity);
void mbarrier_wait(uint64_t* barrier, int parity);

void fence_async_proxy();
void tensor_copy(Bulk kind, const TensorMap& map, void* shared, uint64_t* barrier, int x, int y, int z);
void bulk_copy(Bulk kind, void* global, void* shared, int bytes, uint64_t* barrier);
void bulk_commit();
void bulk_wait(int groups_left);

// Element (i, k) of a matrix operand is at byte offset `at` of shared memory; the formulas are in primitives_wgmma.cuh.
struct Descriptor {
  explicit Descriptor(uint64_t bits);
  std::size_t at(bool mn_major, int i, int k) const;
  int start, leading, stride, swizzle_row;
};

// One thread's part of a product; a null means from shared memory.
struct Wgmma {
  int columns;
  bool half, a_mn_major, b_mn_major, accumulate;
  float* d;
  const uint32_t* a;
  uint64_t descriptor_a, descriptor_b;
};
void wgmma_fence();
void wgmma(Wgmma part);
void wgmma_commit();
void wgmma_wait(int groups_left);

// --- state of a block -----------------------------------------------------------------------------------------------

struct Mbarrier {
  uint64_t* word;
  int arrivals, pending;
  int64_t bytes = 0;  // expected and not landed
  unsigned phase = 0;
  bool fenced = false;
  uint64_t order[2] = {};
};

struct Transfer {
  Bulk kind;
  TensorMap map;
  int corner[3];
  std::byte* shared;
  int bytes;
  uint64_t* barrier;
  unsigned group;
  uint64_t order = 0;
};

struct Product {
  Wgmma part;  // thread 0's
  float* d[128];
  uint32_t a[128][4];
  std::vector<float> saved;  // the accumulators, if no earlier product is still to write them
  std::vector<std::size_t> a_offsets, b_offsets;
  unsigned group;
  uint64_t order = 0;
};

struct Warpgroup {
  bool fenced = false;
  unsigned open_group = 0;
  std::deque<Product> products;
  uint64_t done = 0;
};

struct Async {
  std::deque<Mbarrier> mbarriers;
  std::deque<Transfer> loads;
  std::vector<std::byte> view;
  std::vector<Warpgroup> warpgroups;
};

struct Block;
struct Thread;
// Lands the oldest load; false if none is under way.
bool land_load(Block& block);
// What a thread leaves undone when it returns, or "".
std::string unfinished(const Thread& thread);
// And the block.
std::string unfinished(const Block& block);
// What the mbarrier at `place` waits for; "" if there is none.
std::string mbarrier_state(const Block& block, const void* place);

}  // namespace cuda_host
