// csrc/cuda/primitives.cuh for the host: the same names, whose contracts are there.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "matrix.h"

namespace fastsft::cuda {

inline constexpr int kWarp = 32;

inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
inline int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

// --- element types -------------------------------------------------------------------------------------------------

struct Float32 {
  using Word = float;
  static float to_float(Word word) { return word; }
  static Word from_float(float value) { return value; }
};

struct BFloat16 {
  using Word = uint16_t;
  static float to_float(Word word) { return cuda_host::bfloat16_to_float(word); }
  static Word from_float(float value) { return cuda_host::float_to_bfloat16(value); }
  static uint32_t pack(float low, float high) {
    return from_float(low) | static_cast<uint32_t>(from_float(high)) << 16;
  }
  static float low(uint32_t both) { return to_float(static_cast<Word>(both)); }
  static float high(uint32_t both) { return to_float(static_cast<Word>(both >> 16)); }
};

struct Float16 {
  using Word = uint16_t;
  static float to_float(Word word) { return cuda_host::half_to_float(word); }
  static Word from_float(float value) { return cuda_host::float_to_half(value); }
  static uint32_t pack(float low, float high) {
    return from_float(low) | static_cast<uint32_t>(from_float(high)) << 16;
  }
  static float low(uint32_t both) { return to_float(static_cast<Word>(both)); }
  static float high(uint32_t both) { return to_float(static_cast<Word>(both >> 16)); }
};

inline uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// --- arithmetic ------------------------------------------------------------------------------------------------------

inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush_subnormal(std::exp2(x)); }
inline float log2_approx(float x) { return std::log2(flush_subnormal(x)); }
inline float reciprocal_approx(float x) { return flush_subnormal(1.0f / flush_subnormal(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline uint32_t minimum(uint32_t a, uint32_t b, uint32_t c) { return std::min(std::min(a, b), c); }
inline int popcount(uint32_t bits) { return std::popcount(bits); }
inline int popcount(uint64_t bits) { return std::popcount(bits); }
inline int leading_zeros(uint32_t bits) { return std::countl_zero(bits); }
inline int lowest_bit(uint32_t bits) { return bits == 0 ? -1 : std::countr_zero(bits); }

// --- warp ------------------------------------------------------------------------------------------------------------

inline void sync_warp() { cuda_host::sync_warp(); }

template <typename T>
T exchange(const char* name, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  cuda_host::Shuffle lane{0, 0, source};
  std::memcpy(&lane.value, &value, sizeof(T));
  cuda_host::meet_warp(name, &lane, cuda_host::shuffle_lanes);
  std::memcpy(&value, &lane.result, sizeof(T));
  return value;
}
template <typename T>
T shuffle(T value, int lane) {
  return exchange("shuffle", value, lane & (kWarp - 1));
}
template <typename T>
T shuffle_xor(T value, int mask) {
  return exchange("shuffle_xor", value, lane_id() ^ mask);
}
template <typename T>
T shuffle_up(T value, int delta) {
  return exchange("shuffle_up", value, lane_id() - delta);
}
template <typename T>
T shuffle_down(T value, int delta) {
  return exchange("shuffle_down", value, lane_id() + delta);
}

inline uint32_t warp_ballot(bool predicate) {
  cuda_host::Shuffle lane{predicate, 0, 0};
  cuda_host::meet_warp("warp_ballot", &lane, cuda_host::ballot_lanes);
  return static_cast<uint32_t>(lane.result);
}
inline bool warp_any(bool predicate) { return warp_ballot(predicate) != 0; }
inline bool warp_all(bool predicate) { return warp_ballot(predicate) == 0xffffffffu; }

// --- block -----------------------------------------------------------------------------------------------------------

template <typename T = unsigned char>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_host::shared_memory());
}
inline void barrier_sync(int id, int threads) { cuda_host::barrier("barrier_sync", id, threads, true); }
inline void barrier_arrive(int id, int threads) { cuda_host::barrier("barrier_arrive", id, threads, false); }

// --- memory ----------------------------------------------------------------------------------------------------------

template <typename V>
V load(const void* data) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  cuda_host::check_aligned("load", data, sizeof(V));
  return *static_cast<const V*>(data);
}
template <typename V>
void store(void* data, V value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  cuda_host::check_aligned("store", data, sizeof(V));
  *static_cast<V*>(data) = value;
}
template <typename V>
V load_readonly(const void* data) {
  return load<V>(data);
}

template <typename T, typename Change>
T atomic_change(T* p, Change&& change) {
  T old, wanted;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    wanted = change(old);
  } while (!__atomic_compare_exchange(p, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <typename T>
T atomic_load(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
template <typename T>
T atomic_add(T* p, T value) {
  return atomic_change(p, [&](T old) {
    if constexpr (std::is_same_v<T, int>)
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
    else
      return static_cast<T>(old + value);
  });
}
template <typename T>
T atomic_min(T* p, T value) {
  return atomic_change(p, [&](T old) { return std::min(old, value); });
}
template <typename T>
T atomic_max(T* p, T value) {
  return atomic_change(p, [&](T old) { return std::max(old, value); });
}
template <typename T>
T atomic_exchange(T* p, T value) {
  return atomic_change(p, [&](T) { return value; });
}
template <typename T>
T atomic_cas(T* p, T expected, T value) {
  __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

inline void thread_fence() { cuda_host::thread_fence(); }

// --- cp.async --------------------------------------------------------------------------------------------------------

template <int kBytes = 16>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_host::start_copy(shared, global, kBytes, valid);
}
inline void copy_async_commit() { cuda_host::commit_copies(); }
template <int kGroupsLeft>
void copy_async_wait() {
  cuda_host::wait_for_copies(kGroupsLeft);
}

// --- matrix fragments ----------------------------------------------------------------------------------------------

template <int kMatrices, bool kTransposed>
void load_matrices(const char* name, uint32_t (&r)[kMatrices], const void* row) {
  cuda_host::MatrixRow lane{};
  if (lane_id() < 8 * kMatrices) {  // the reading is the lane's own, so that races and bounds are seen
    cuda_host::check_shared(name, row, 16, 16);
    std::memcpy(lane.row, row, 16);
  }
  cuda_host::meet_warp(name, &lane, kTransposed ? cuda_host::transpose_rows : cuda_host::distribute_rows);
  std::memcpy(r, lane.result, sizeof(r));
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { load_matrices<4, false>("load_matrix_x4", r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices<4, true>("load_matrix_x4_transposed", r, row);
}
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) { load_matrices<2, false>("load_matrix_x2", r, row); }
inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  load_matrices<2, true>("load_matrix_x2_transposed", r, row);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  cuda_host::Mma lane{d, a, {b0, b1}};
  cuda_host::meet_warp("mma_m16n8k16", &lane,
                       std::is_same_v<T, BFloat16> ? cuda_host::mma_bfloat16 : cuda_host::mma_half);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_host::Mma lane{d, a, {b0, b1}};
  cuda_host::meet_warp("mma_m16n8k8_tf32", &lane, cuda_host::mma_tf32);
}

}  // namespace fastsft::cuda
