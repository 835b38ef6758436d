// Hardware instructions of sm_80 and later behind plain names; those of sm_90a are in primitives_sm90.cuh. No other
// file has inline PTX or intrinsics. tests/cuda_host supplies the same names for the host compiler, so that the
// kernels' own source runs there (docs/cuda-emulation.md).
//
// Rules of a kernel:
// - blocks have one dimension and whole warps (launch.h);
// - all shared memory is dynamic: shared_memory<T>(), whose size the launch states;
// - warp operations are reached by all 32 lanes together; they do not order memory accesses: sync_warp() does;
// - from CUDA C++ itself it uses threadIdx, blockIdx, blockDim, gridDim, __syncthreads() and the math library.
#pragma once

#if defined(FASTSFT_CUDA_HOST)
#include "primitives_host.h"
#else

#include <cstdint>

namespace fastsft::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

// --- element types -------------------------------------------------------------------------------------------------
// Word is how an element is stored. Conversions to 16 bits round to nearest even.

struct Float32 {
  using Word = float;
  static __device__ __forceinline__ float to_float(Word word) { return word; }
  static __device__ __forceinline__ Word from_float(float value) { return value; }
};

struct BFloat16 {
  using Word = uint16_t;
  static __device__ __forceinline__ float to_float(Word word) {
    return __uint_as_float(static_cast<uint32_t>(word) << 16);
  }
  static __device__ __forceinline__ Word from_float(float value) {
    Word word;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
  }
  // Two elements in one register, `low` in the lower half: the lower address in memory.
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  static __device__ __forceinline__ float low(uint32_t both) { return __uint_as_float(both << 16); }
  static __device__ __forceinline__ float high(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }
};

struct Float16 {
  using Word = uint16_t;
  static __device__ __forceinline__ float to_float(Word word) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
    return value;
  }
  static __device__ __forceinline__ Word from_float(float value) {
    Word word;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  static __device__ __forceinline__ float low(uint32_t both) { return to_float(static_cast<Word>(both)); }
  static __device__ __forceinline__ float high(uint32_t both) { return to_float(static_cast<Word>(both >> 16)); }
};

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// --- arithmetic ------------------------------------------------------------------------------------------------------
// One instruction each; subnormal arguments and results are 0. Largest error: 2 units in the last place (exp2),
// 1 (reciprocal), 2^-22 absolute near 1 and relative elsewhere (log2), 2^-11 relative (tanh).

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The upper half of the product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
__device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

__device__ __forceinline__ uint32_t minimum(uint32_t a, uint32_t b, uint32_t c) { return __vimin3_u32(a, b, c); }

__device__ __forceinline__ int popcount(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ int popcount(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int leading_zeros(uint32_t bits) { return __clz(static_cast<int>(bits)); }  // of 0: 32
// The number of the lowest bit set; -1 if there is none.
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// --- warp ------------------------------------------------------------------------------------------------------------

// What the lanes wrote before is visible to the warp's lanes after.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// T has 4 or 8 bytes. A lane whose source is outside the warp gets its own value.
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {  // from lane - delta
  return __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(delta));
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int delta) {  // from lane + delta
  return __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(delta));
}

// Bit i is lane i's.
__device__ __forceinline__ uint32_t warp_ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
__device__ __forceinline__ bool warp_any(bool predicate) { return __any_sync(kAllLanes, predicate); }
__device__ __forceinline__ bool warp_all(bool predicate) { return __all_sync(kAllLanes, predicate); }

// --- block -----------------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char g_shared_memory[];

// The block's shared memory, aligned to 1024 bytes, of the size given to launch(). Unwritten bytes are undefined.
template <typename T = unsigned char>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(g_shared_memory);
}

// Barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads, a multiple of 32, counted by warps.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts as arrived without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- memory ----------------------------------------------------------------------------------------------------------
// V has 4, 8 or 16 bytes (uint32_t, uint2, uint4, float4, ...) and `data` is aligned to its size.

template <typename V>
__device__ __forceinline__ V load(const void* data) {
  return *static_cast<const V*>(data);
}
template <typename V>
__device__ __forceinline__ void store(void* data, V value) {
  *static_cast<V*>(data) = value;
}
// From global memory that no thread writes while the kernel runs.
template <typename V>
__device__ __forceinline__ V load_readonly(const void* data) {
  return __ldg(static_cast<const V*>(data));
}

// Relaxed atomic operations on global or shared memory; the old value is returned. T is int, uint32_t or uint64_t;
// atomic_add also takes float.
template <typename T>
__device__ __forceinline__ auto atomic_word(T* p) {
  if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<unsigned long long*>(p);
  } else {
    return p;
  }
}
template <typename T>
__device__ __forceinline__ T atomic_load(const T* p) {
  return *static_cast<const volatile T*>(p);
}
template <typename T>
__device__ __forceinline__ T atomic_add(T* p, T value) {
  return static_cast<T>(atomicAdd(atomic_word(p), value));
}
template <typename T>
__device__ __forceinline__ T atomic_min(T* p, T value) {
  return static_cast<T>(atomicMin(atomic_word(p), value));
}
template <typename T>
__device__ __forceinline__ T atomic_max(T* p, T value) {
  return static_cast<T>(atomicMax(atomic_word(p), value));
}
template <typename T>
__device__ __forceinline__ T atomic_exchange(T* p, T value) {
  return static_cast<T>(atomicExch(atomic_word(p), value));
}
template <typename T>
__device__ __forceinline__ T atomic_cas(T* p, T expected, T value) {
  return static_cast<T>(atomicCAS(atomic_word(p), expected, value));
}

// Writes of this thread before it are seen by any thread of the device that reads, after a fence of its own, a value
// written after it.
__device__ __forceinline__ void thread_fence() { __threadfence(); }

// --- cp.async: global to shared memory without registers -----------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* data) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(data));
}

// Starts copying kBytes (4, 8 or 16; both addresses aligned to it); where not `valid`, zeros are written and `global`
// is not read. The bytes may arrive at any time up to the copy_async_wait that covers them, which makes them visible to
// this thread only: a barrier must follow before others read.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(read)
                 : "memory");
  }
}
// Closes the group of the copies started since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the kGroupsLeft newest groups of this thread have arrived.
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// --- matrix fragments ----------------------------------------------------------------------------------------------
// PTX ISA, "Matrix fragments for mma.m16n8k16": with g = lane / 4, t = lane % 4 and each register holding two elements,
// the lower index in its lower half,
//   A [16, 16] row-major: a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   B [16, 8]:            b0 = B[2t..][g], b1 = B[2t + 8..][g]
//   D [16, 8] float:      d[0], d[1] = D[g][2t, 2t + 1], d[2], d[3] = D[g + 8][2t, 2t + 1]

// Loads 8 x 8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i (16 bytes, aligned), and
// r[i] gets elements 2t and 2t + 1 of row g; transposed: of column g. Fragments: A from a row-major [16, 16] tile with
// addresses (rows 0-7 | rows 8-15) x columns 0-7, then the same x columns 8-15; B from a tile stored [8 n, 16 k],
// plain, or from one stored [16 k, 8 n], transposed.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices: the addresses are those of lanes 0 to 15.
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// D += A B, [16, 8] += [16, 16] [16, 8], T = BFloat16 or Float16.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// [16, 8] += [16, 8] [8, 8] in tf32: float bits of which the lowest 13 are ignored. a[0] = A[g][t], a[1] = A[g + 8][t],
// a[2] = A[g][t + 4], a[3] = A[g + 8][t + 4]; b0 = B[t][g], b1 = B[t + 4][g]; D as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastsft::cuda

#endif
