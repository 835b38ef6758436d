// String fields of JSON Lines, without a parse tree.
//
// A line is *decided* if it is one JSON object by RFC 8259 in valid UTF-8 whose top level has each of the wanted fields
// exactly once, as a string, and none of the unwanted ones. Only then are its strings given out, unescaped. Everything
// else is left to a full parser, so that meaning and messages of errors are defined there alone; among it are lines
// that are valid but rare: top-level keys with escapes, more than 64 levels, numbers that a double might not hold. A
// line that is decided is one that every strict parser accepts, with the same strings.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace fastsft {

enum class JsonlStatus : uint8_t { kDecided = 0, kUndecided = 1, kBlank = 2 };  // blank: JSON white space only

// Lines of data [size]: the last one need not end in a newline.
int64_t jsonl_count(const uint8_t* data, int64_t size);

struct JsonlFields {
  std::vector<std::string_view> wanted;    // F >= 1 different names
  std::vector<std::string_view> unwanted;  // a line with one of them is undecided
  std::string_view separator;              // at most one byte, behind every field of a line but its last
};

// Writes, for n = jsonl_count(data, size) lines:
//   lines [n + 1]         where each begins in data; lines[n] == size
//   status [n]            of each line, a JsonlStatus
//   text [size]           the strings of all decided lines, in the order of `wanted` within a line; capacity as large
//   as
//                         the input, more than which they never are
//   offsets [n * F + 1]   where each string begins in text; lines that are not decided have empty ones
// Returns offsets[n * F], the bytes of text in use; what lies behind them is unspecified. The result does not depend on
// the number of threads. `text` must not overlap data. Throws Error for F < 1, a name twice, or a longer separator.
int64_t jsonl_fields(const uint8_t* data, int64_t size, const JsonlFields& fields, int64_t* lines, uint8_t* status,
                     uint8_t* text, int64_t* offsets);

}  // namespace fastsft
