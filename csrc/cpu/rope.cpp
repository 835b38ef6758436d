#include "fastsft/rope.h"

#include <algorithm>

#include "fastsft/parallel.h"
#include "row_kernels.h"

namespace fastsft {

void rope(const Rope& rope, bool inverse, void* out) {
  constexpr int64_t kElements = 16384;  // per unit of work: tens of microseconds
  const auto tokens = FASTSFT_ISA_SELECT(rope_tokens);
  parallel_for(rope.tokens, std::max<int64_t>(1, kElements / std::max<int64_t>(1, rope.heads * rope.size)),
               [&](int64_t begin, int64_t end) { tokens(rope, inverse, out, begin, end); });
}

}  // namespace fastsft
