// Run-time choice between the copies of a kernel that were compiled for different instruction sets.
//
// A file `x.isa.cpp` is compiled once per instruction set with FASTSFT_ISA_NS defined as base, avx2, avx512 or
// avx512bf16 (the same with bfloat16 and 8-bit dot products) and puts everything it defines in `namespace
// fastsft::FASTSFT_ISA_NS`. `x.cpp` declares the copies with FASTSFT_ISA_DECLARE (inside namespace fastsft) and picks
// one with FASTSFT_ISA_SELECT.
//
// Hazard (one-definition rule): an inline function or template from a shared header that an x.isa.cpp instantiates may
// be merged by the linker with the AVX-512 copy and then run on a CPU without it. Such files keep helpers in
// FASTSFT_ISA_NS or an anonymous namespace and use no standard containers.
#pragma once

#include <vector>

namespace fastsft {

enum class Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* isa_name(Isa isa);

// Instruction sets that were compiled in and that this CPU and operating system can run, ascending.
const std::vector<Isa>& available_isas();

// The available one of this name. Throws Error, naming `argument`, if there is none.
Isa find_isa(const char* argument, const char* name);

// The best available one, unless FASTSFT_ISA=base|avx2|avx512|avx512bf16 names another at the first call or set_isa
// chose one. Throws Error if the name is unknown or the CPU lacks it.
Isa active_isa();
void set_isa(Isa isa);

}  // namespace fastsft

#define FASTSFT_ISA_DECLARE_IN(NS, RET, NAME, ...) \
  namespace NS {                                   \
  RET NAME(__VA_ARGS__);                           \
  }
#if defined(FASTSFT_X86)
#define FASTSFT_ISA_DECLARE(RET, NAME, ...)              \
  FASTSFT_ISA_DECLARE_IN(base, RET, NAME, __VA_ARGS__)   \
  FASTSFT_ISA_DECLARE_IN(avx2, RET, NAME, __VA_ARGS__)   \
  FASTSFT_ISA_DECLARE_IN(avx512, RET, NAME, __VA_ARGS__) \
  FASTSFT_ISA_DECLARE_IN(avx512bf16, RET, NAME, __VA_ARGS__)
#define FASTSFT_ISA_SELECT(NAME)                                             \
  (::fastsft::active_isa() == ::fastsft::Isa::kAvx512Bf16 ? avx512bf16::NAME \
   : ::fastsft::active_isa() == ::fastsft::Isa::kAvx512   ? avx512::NAME     \
   : ::fastsft::active_isa() == ::fastsft::Isa::kAvx2     ? avx2::NAME       \
                                                          : base::NAME)
#else
#define FASTSFT_ISA_DECLARE(RET, NAME, ...) FASTSFT_ISA_DECLARE_IN(base, RET, NAME, __VA_ARGS__)
#define FASTSFT_ISA_SELECT(NAME) (base::NAME)
#endif
