#include "fastsft/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "fastsft/common.h"

namespace fastsft {
namespace {

constexpr int kUnset = -1;
std::atomic<int> g_active{kUnset};

std::vector<Isa> detect() {
  std::vector<Isa> isas{Isa::kBase};
#if defined(FASTSFT_X86)
  // __builtin_cpu_supports asks cpuid and, through xgetbv, whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    isas.push_back(Isa::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      isas.push_back(Isa::kAvx512);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        isas.push_back(Isa::kAvx512Bf16);
      }
    }
  }
#endif
  return isas;
}

Isa choose() {
  const char* forced = std::getenv("FASTSFT_ISA");
  return forced == nullptr || *forced == '\0' ? available_isas().back() : find_isa("FASTSFT_ISA", forced);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBase: return "base";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512bf16";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa find_isa(const char* argument, const char* name) {
  std::string names;
  for (Isa isa : available_isas()) {
    if (std::strcmp(name, isa_name(isa)) == 0) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  detail::fail(argument, ": expected one of {", names, "} on this CPU, got '", name, "'");
}

Isa active_isa() {
  int isa = g_active.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    isa = static_cast<int>(choose());
    g_active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(Isa isa) {
  g_active.store(static_cast<int>(find_isa("set_isa: isa", isa_name(isa))), std::memory_order_relaxed);
}

}  // namespace fastsft
