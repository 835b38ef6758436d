// csrc/cuda/primitives_sm90.cuh for the host: the same names, whose contracts are there and in primitives_wgmma.cuh.
#pragma once

#include "async.h"
#include "primitives_host.h"

namespace fastsft::cuda {

inline constexpr int kWarpgroup = 128;

enum class Swizzle : int { kNone = 0, k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };
enum class Major : int { kK = 0, kMN = 1 };

using TensorMap = cuda_host::TensorMap;

inline bool elect_lane() {
  cuda_host::meet_warp("elect_lane", nullptr, nullptr);
  return lane_id() == 0;
}

template <int kCount>
void registers_increase() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  cuda_host::meet_warpgroup("registers_increase", nullptr, nullptr);
}
template <int kCount>
void registers_decrease() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  cuda_host::meet_warpgroup("registers_decrease", nullptr, nullptr);
}

// --- mbarrier --------------------------------------------------------------------------------------------------------

inline void mbarrier_init(uint64_t* barrier, int arrivals) { cuda_host::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() { cuda_host::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint64_t* barrier) { cuda_host::mbarrier_arrive("mbarrier_arrive", barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  cuda_host::mbarrier_arrive("mbarrier_arrive_expect", barrier, bytes);
}
inline bool mbarrier_try_wait(uint64_t* barrier, int parity) { return cuda_host::mbarrier_try_wait(barrier, parity); }
inline void mbarrier_wait(uint64_t* barrier, int parity) { cuda_host::mbarrier_wait(barrier, parity); }

// --- bulk copies -----------------------------------------------------------------------------------------------------

inline void fence_async_proxy() { cuda_host::fence_async_proxy(); }
inline void tensor_map_prefetch(const TensorMap&) {}

inline void tensor_load(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y, int z = 0) {
  cuda_host::tensor_copy(cuda_host::Bulk::kLoad, map, shared, barrier, x, y, z);
}
inline void tensor_store(const TensorMap& map, const void* shared, int x, int y, int z = 0) {
  cuda_host::tensor_copy(cuda_host::Bulk::kStore, map, const_cast<void*>(shared), nullptr, x, y, z);
}
inline void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  cuda_host::bulk_copy(cuda_host::Bulk::kLoad, const_cast<void*>(global), shared, bytes, barrier);
}
inline void bulk_store(void* global, const void* shared, int bytes) {
  cuda_host::bulk_copy(cuda_host::Bulk::kStore, global, const_cast<void*>(shared), bytes, nullptr);
}
inline void bulk_add(float* global, const float* shared, int bytes) {
  cuda_host::bulk_copy(cuda_host::Bulk::kAdd, global, const_cast<float*>(shared), bytes, nullptr);
}
inline void bulk_commit() { cuda_host::bulk_commit(); }
template <int kGroupsLeft>
void bulk_wait() {
  cuda_host::bulk_wait(kGroupsLeft);
}
template <int kGroupsLeft>
void bulk_wait_read() {
  cuda_host::bulk_wait(kGroupsLeft);
}

template <bool kTransposed>
void store_matrices(const char* name, void* row, const uint32_t (&r)[4]) {
  cuda_host::check_shared(name, row, 16, 16);
  cuda_host::MatrixRow lane{};
  std::memcpy(lane.result, r, sizeof(r));
  cuda_host::meet_warp(name, &lane, kTransposed ? cuda_host::gather_columns : cuda_host::gather_rows);
  std::memcpy(row, lane.row, 16);
}
inline void store_matrix_x4(void* row, const uint32_t (&r)[4]) { store_matrices<false>("store_matrix_x4", row, r); }
inline void store_matrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
  store_matrices<true>("store_matrix_x4_transposed", row, r);
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

template <Swizzle kSwizzle>
uint64_t matrix_descriptor(const void* shared, int leading, int stride) {
  const auto address = static_cast<uint64_t>(static_cast<const std::byte*>(shared) - cuda_host::shared_memory());
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(kSwizzle) << 62;
}
inline uint64_t descriptor_advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

template <typename... Registers>
void wgmma_fence([[maybe_unused]] Registers&... registers) {
  cuda_host::wgmma_fence();
}
inline void wgmma_commit() { cuda_host::wgmma_commit(); }
template <int kGroupsLeft, int... kCounts>
void wgmma_wait([[maybe_unused]] float (&... accumulators)[kCounts]) {
  cuda_host::wgmma_wait(kGroupsLeft);
}

template <typename T, int kColumns, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kColumns % 8 == 0 && kColumns <= 256);
  cuda_host::wgmma({kColumns, std::is_same_v<T, Float16>, kMajorA == Major::kMN, kMajorB == Major::kMN, accumulate, d,
                    nullptr, a, b});
}
template <typename T, int kColumns, Major kMajorB = Major::kK>
void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kColumns % 8 == 0 && kColumns <= 256);
  cuda_host::wgmma({kColumns, std::is_same_v<T, Float16>, false, kMajorB == Major::kMN, accumulate, d, a, 0, b});
}

}  // namespace fastsft::cuda
