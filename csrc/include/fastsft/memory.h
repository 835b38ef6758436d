// The process's large buffers: their pages, and what becomes of them.
#pragma once

#include <cstdint>

namespace fastsft {

// Asks for huge pages under [data, data + bytes) before it is first written: a fresh buffer of 4 KB pages costs more
// to fault in than to fill. A hint only, without effect where the system has none or for less than a huge page.
void advise_huge_pages(void* data, int64_t bytes);

// From now on the C library keeps what is freed instead of giving it back to the system, so that a step of a training
// loop finds the pages of the one before. For whole programs, not for libraries. False where there is no such setting.
bool keep_freed_memory();

// Whether this CPU reads a stream from memory fastest when left alone, prefetches into the first-level cache taking
// from the requests that may be open at a time: Zen 4, where those of a product with a few rows halved its rate.
bool streams_by_itself();

}  // namespace fastsft
