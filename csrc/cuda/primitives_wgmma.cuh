// Warpgroup matrix products: wgmma.mma_async of sm_90a, m64nNk16 with float accumulators. Included by
// primitives_sm90.cuh, whose rules on fences hold.
#pragma once

#include <cstdint>

namespace fastsft::cuda {

// PTX ISA, "Matrix descriptor": a tile in shared memory, element (i, k) with i the index along m or n. Offsets in bytes
// before the swizzle, for elements of 2 bytes, with s the swizzle's row of 32, 64 or 128 bytes:
//   Major::kK,  no swizzle: 2 (k % 8) + k / 8 * leading + i % 8 * 16 + i / 8 * stride
//   Major::kK,  swizzled:   2 k + i % 8 * s + i / 8 * stride                            (leading is not used)
//   Major::kMN, no swizzle: 2 (i % 8) + i / 8 * stride + k % 8 * 16 + k / 8 * leading
//   Major::kMN, swizzled:   2 (i % (s / 2)) + i / (s / 2) * leading + k % 8 * s + k / 8 * stride
// A box of s bytes per row that TMA loaded with the same swizzle is such a tile with stride 8 s. The next 16 of k: + 32
// bytes in Major::kK, + 16 s in Major::kMN.
template <Swizzle kSwizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, int leading, int stride) {
  return (shared_address(shared) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(kSwizzle) << 62;
}
// The descriptor of the tile `bytes` further on.
__device__ __forceinline__ uint64_t descriptor_advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Ties registers to this point of the program: the compiler knows of no connection between a product and its wait.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Before the first product, and again after accumulators or A's registers, both given here, were touched.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin_registers(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes the group of the products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the kGroupsLeft newest groups are complete; `accumulators` are those that may be read after.
template <int kGroupsLeft, int... kCounts>
__device__ __forceinline__ void wgmma_wait(float (&... accumulators)[kCounts]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  (pin_registers(accumulators), ...);
}

// One instruction per type and width; see wgmma() below.
template <typename T, int kColumns>
struct WgmmaInstruction;

// clang-format off
// Accumulator registers of the first n columns, as operands and as text.
#define FASTSFT_OUT_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTSFT_D_8 "%0, %1, %2, %3"
#define FASTSFT_OUT_16 FASTSFT_OUT_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTSFT_D_16 FASTSFT_D_8 ", %4, %5, %6, %7"
#define FASTSFT_OUT_24 FASTSFT_OUT_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTSFT_D_24 FASTSFT_D_16 ", %8, %9, %10, %11"
#define FASTSFT_OUT_32 FASTSFT_OUT_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTSFT_D_32 FASTSFT_D_24 ", %12, %13, %14, %15"
#define FASTSFT_OUT_40 FASTSFT_OUT_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTSFT_D_40 FASTSFT_D_32 ", %16, %17, %18, %19"
#define FASTSFT_OUT_48 FASTSFT_OUT_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTSFT_D_48 FASTSFT_D_40 ", %20, %21, %22, %23"
#define FASTSFT_OUT_56 FASTSFT_OUT_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTSFT_D_56 FASTSFT_D_48 ", %24, %25, %26, %27"
#define FASTSFT_OUT_64 FASTSFT_OUT_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTSFT_D_64 FASTSFT_D_56 ", %28, %29, %30, %31"
#define FASTSFT_OUT_72 FASTSFT_OUT_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTSFT_D_72 FASTSFT_D_64 ", %32, %33, %34, %35"
#define FASTSFT_OUT_80 FASTSFT_OUT_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTSFT_D_80 FASTSFT_D_72 ", %36, %37, %38, %39"
#define FASTSFT_OUT_88 FASTSFT_OUT_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTSFT_D_88 FASTSFT_D_80 ", %40, %41, %42, %43"
#define FASTSFT_OUT_96 FASTSFT_OUT_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTSFT_D_96 FASTSFT_D_88 ", %44, %45, %46, %47"
#define FASTSFT_OUT_104 FASTSFT_OUT_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTSFT_D_104 FASTSFT_D_96 ", %48, %49, %50, %51"
#define FASTSFT_OUT_112 FASTSFT_OUT_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTSFT_D_112 FASTSFT_D_104 ", %52, %53, %54, %55"
#define FASTSFT_OUT_120 FASTSFT_OUT_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTSFT_D_120 FASTSFT_D_112 ", %56, %57, %58, %59"
#define FASTSFT_OUT_128 FASTSFT_OUT_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTSFT_D_128 FASTSFT_D_120 ", %60, %61, %62, %63"
#define FASTSFT_OUT_136 FASTSFT_OUT_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTSFT_D_136 FASTSFT_D_128 ", %64, %65, %66, %67"
#define FASTSFT_OUT_144 FASTSFT_OUT_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTSFT_D_144 FASTSFT_D_136 ", %68, %69, %70, %71"
#define FASTSFT_OUT_152 FASTSFT_OUT_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTSFT_D_152 FASTSFT_D_144 ", %72, %73, %74, %75"
#define FASTSFT_OUT_160 FASTSFT_OUT_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTSFT_D_160 FASTSFT_D_152 ", %76, %77, %78, %79"
#define FASTSFT_OUT_168 FASTSFT_OUT_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTSFT_D_168 FASTSFT_D_160 ", %80, %81, %82, %83"
#define FASTSFT_OUT_176 FASTSFT_OUT_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTSFT_D_176 FASTSFT_D_168 ", %84, %85, %86, %87"
#define FASTSFT_OUT_184 FASTSFT_OUT_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTSFT_D_184 FASTSFT_D_176 ", %88, %89, %90, %91"
#define FASTSFT_OUT_192 FASTSFT_OUT_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTSFT_D_192 FASTSFT_D_184 ", %92, %93, %94, %95"
#define FASTSFT_OUT_200 FASTSFT_OUT_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTSFT_D_200 FASTSFT_D_192 ", %96, %97, %98, %99"
#define FASTSFT_OUT_208 FASTSFT_OUT_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTSFT_D_208 FASTSFT_D_200 ", %100, %101, %102, %103"
#define FASTSFT_OUT_216 FASTSFT_OUT_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTSFT_D_216 FASTSFT_D_208 ", %104, %105, %106, %107"
#define FASTSFT_OUT_224 FASTSFT_OUT_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTSFT_D_224 FASTSFT_D_216 ", %108, %109, %110, %111"
#define FASTSFT_OUT_232 FASTSFT_OUT_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTSFT_D_232 FASTSFT_D_224 ", %112, %113, %114, %115"
#define FASTSFT_OUT_240 FASTSFT_OUT_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTSFT_D_240 FASTSFT_D_232 ", %116, %117, %118, %119"
#define FASTSFT_OUT_248 FASTSFT_OUT_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTSFT_D_248 FASTSFT_D_240 ", %120, %121, %122, %123"
#define FASTSFT_OUT_256 FASTSFT_OUT_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define FASTSFT_D_256 FASTSFT_D_248 ", %124, %125, %126, %127"

// i0 to i6 are the numbers of the operands that follow the n / 2 accumulators.
#define FASTSFT_WGMMA_OF(T, type, n, i0, i1, i2, i3, i4, i5, i6)                                                    \
  template <>                                                                                                       \
  struct WgmmaInstruction<T, n> {                                                                                   \
    template <int kMajorA, int kMajorB>                                                                             \
    static __device__ __forceinline__ void run(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                                  \
                   " {" FASTSFT_D_##n "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}"                       \
                   : FASTSFT_OUT_##n                                                                                \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kMajorA), "n"(kMajorB));                                  \
    }                                                                                                               \
    template <int kMajorB>                                                                                          \
    static __device__ __forceinline__ void run(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b,               \
                                               int accumulate) {                                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                                  \
                   " {" FASTSFT_D_##n "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}" \
                   : FASTSFT_OUT_##n                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kMajorB));            \
    }                                                                                                               \
  };
#define FASTSFT_WGMMA(n, ...)                          \
  FASTSFT_WGMMA_OF(BFloat16, "bf16", n, __VA_ARGS__)   \
  FASTSFT_WGMMA_OF(Float16, "f16", n, __VA_ARGS__)

FASTSFT_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
FASTSFT_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
FASTSFT_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
FASTSFT_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
FASTSFT_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
FASTSFT_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
FASTSFT_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
FASTSFT_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
FASTSFT_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
FASTSFT_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
FASTSFT_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
FASTSFT_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
FASTSFT_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
FASTSFT_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
FASTSFT_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
FASTSFT_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
FASTSFT_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
FASTSFT_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
FASTSFT_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
FASTSFT_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
FASTSFT_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
FASTSFT_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
FASTSFT_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
FASTSFT_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
FASTSFT_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
FASTSFT_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
FASTSFT_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
FASTSFT_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
FASTSFT_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
FASTSFT_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
FASTSFT_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
FASTSFT_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef FASTSFT_WGMMA
#undef FASTSFT_WGMMA_OF
// clang-format on

// D [64, kColumns] = A [64, 16] B [16, kColumns], plus D if `accumulate`, by the four warps of a warpgroup; T =
// BFloat16 or Float16, kColumns a multiple of 8 up to 256. A and B from shared memory by their descriptors. With w the
// warp in the warpgroup, g = lane / 4 and t = lane % 4, d[i] is D[16 w + g + i / 2 % 2 * 8][i / 4 * 8 + 2 t + i % 2].
template <typename T, int kColumns, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  WgmmaInstruction<T, kColumns>::template run<static_cast<int>(kMajorA), static_cast<int>(kMajorB)>(d, a, b,
                                                                                                    accumulate);
}
// A from registers: each warp's 16 rows as the A fragment of mma_m16n8k16.
template <typename T, int kColumns, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  WgmmaInstruction<T, kColumns>::template run<static_cast<int>(kMajorB)>(d, a, b, accumulate);
}

}  // namespace fastsft::cuda
