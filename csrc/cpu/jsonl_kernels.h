// What csrc/cpu/jsonl.cpp hands to the copies of its kernel. Plain data only (see the hazard in isa.h).
#pragma once

#include <cstdint>

#include "fastsft/isa.h"

namespace fastsft {

struct JsonlNames {
  const uint8_t* const* text;  // [total]: the wanted names, then the unwanted ones
  const int64_t* size;
  int64_t wanted, total;
  int32_t separator;  // a byte, or -1
};

// Lines [first, last) of a range of lines that ends at `limit`; the other arguments as in jsonl.h. Strings go to
// text + lines[first] and on, so that ranges do not meet. `where` [wanted] is scratch. Returns the end of what was
// written.
FASTSFT_ISA_DECLARE(int64_t, jsonl_range, const uint8_t* data, const int64_t* lines, int64_t first, int64_t last,
                    const JsonlNames& names, const uint8_t** where, uint8_t* status, uint8_t* text, int64_t* offsets)

}  // namespace fastsft
