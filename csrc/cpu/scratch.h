// Private to csrc/cpu: each thread's working memory.
#pragma once

#include <cstdint>

namespace fastsft {

// At least `bytes`, aligned to 64, valid until the thread's next call. It grows to the largest unit of work the thread
// has run and is kept: a page fault per call would cost more than a small unit.
void* thread_scratch(int64_t bytes);

}  // namespace fastsft
