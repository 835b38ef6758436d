// Hardware instructions of Hopper (sm_90a): mbarriers, the bulk copy engine (TMA), warpgroup matrix products. A kernel
// that uses them keeps its body inside #if FASTSFT_SM90A, since the same source is compiled for other architectures
// too.
//
// Order of things, as the emulation checks it:
// - mbarrier_init by one thread, mbarrier_init_fence by it, a barrier of the block, use;
// - shared memory written by ordinary stores is seen by wgmma and by bulk stores only after fence_async_proxy() in each
//   writing thread and then a barrier;
// - bulk loads complete at their mbarrier; bulk stores and additions at bulk_wait, before the thread ends;
// - wgmma_fence, products, wgmma_commit, wgmma_wait: in between neither the accumulators nor A's registers are touched.
#pragma once

#include "primitives.cuh"

#if defined(FASTSFT_CUDA_HOST)
#define FASTSFT_SM90A 1
#include "primitives_sm90_host.h"
#else

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSFT_SM90A 1
#else
#define FASTSFT_SM90A 0
#endif

#include <cuda.h>

namespace fastsft::cuda {

inline constexpr int kWarpgroup = 128;

// How 16-byte units are permuted in shared memory, in patterns of 8 rows of 32, 64 or 128 bytes: bits 4 and up of the
// address, 1, 2 or 3 of them, are xored with the bits that start at 7. A tile is aligned to the pattern: 256, 512 or
// 1024 bytes. The values are those of the matrix descriptor.
enum class Swizzle : int { kNone = 0, k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

// Of the number of a warpgroup's matrix operand in shared memory: which index is contiguous, k or the other one.
enum class Major : int { kK = 0, kMN = 1 };

using TensorMap = CUtensorMap;  // made by tensor_map.h; a kernel takes it as `const __grid_constant__ TensorMap`

// True in one lane of the warp.
__device__ __forceinline__ bool elect_lane() {
  int elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// Moves registers between warpgroups: kCount (24 to 240, a multiple of 8) per thread from here on. All warps of the
// warpgroup.
template <int kCount>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- mbarrier: 8 bytes of shared memory, aligned ---------------------------------------------------------------------
// A phase completes when `arrivals` threads have arrived and all bytes expected have landed; the phases' parities are
// 0, 1, 0, ...

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and makes the phase wait for `bytes` more bytes.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// True if the phase of that parity has completed: of the current phase and the one before it, the one with this parity.
// May wait a while.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  int complete;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(complete)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return complete != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// --- bulk copies, issued by one thread -------------------------------------------------------------------------------

// What this thread wrote to shared memory is visible to the copy engine and the matrix unit after.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the map's box at element (x, y) or (x, y, z), x innermost, to `shared` in the map's swizzle; elements outside
// the tensor are 0. Adds the whole box's bytes to what has landed at `barrier`. `shared` is aligned to 128 bytes, with
// a swizzle to its pattern.
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y,
                                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The way back; elements outside the tensor are not written. Ended by bulk_commit and bulk_wait.
__device__ __forceinline__ void tensor_store(const TensorMap& map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Contiguous bytes; both addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
// global[i] += shared[i], each element atomically.
__device__ __forceinline__ void bulk_add(float* global, const float* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Closes the group of the stores and additions that this thread issued since the last commit.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the kGroupsLeft newest groups of this thread are complete, or have at least read their shared
// memory.
template <int kGroupsLeft>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
}

// Stores 8 x 8 matrices: the inverse of load_matrix_x4.
__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_matrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fastsft::cuda

#include "primitives_wgmma.cuh"

#endif
