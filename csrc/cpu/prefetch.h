// Asking for a line of memory ahead of its use, into the level of cache that suits the CPU. Included by *.isa.cpp only.
#pragma once

#include "fastsft/memory.h"
#include "simd.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

struct Prefetch {
  bool into_second = streams_by_itself();

  FASTSFT_INLINE void operator()(const void* line) const {
    if (into_second) {
      __builtin_prefetch(line, 0, 2);
    } else {
      __builtin_prefetch(line);
    }
  }
};

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
