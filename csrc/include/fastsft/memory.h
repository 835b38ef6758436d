// Advice to the operating system about large buffers.
#pragma once

#include <cstdint>

namespace fastsft {

// Asks for huge pages under [data, data + bytes) before it is first written: a fresh buffer of 4 KB pages costs more
// to fault in than to fill. A hint only, without effect where the system has none or for less than a huge page.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastsft
