// One pass of memchr to count lines and one to place them, then ranges of lines on all threads. Each range writes at
// its own place in `text`; with more than one range the results are moved together afterwards (one read and write of
// the text).
#include "fastsft/jsonl.h"

#include <algorithm>
#include <cstring>

#include "fastsft/common.h"
#include "fastsft/parallel.h"
#include "jsonl_kernels.h"

namespace fastsft {
namespace {

constexpr int64_t kRangeBytes = int64_t{1} << 18;

template <typename Fn>
void for_each_end(const uint8_t* data, int64_t size, const Fn& fn) {
  const uint8_t* const end = data + size;
  for (const uint8_t* at = data; at != end;) {
    const void* newline = std::memchr(at, '\n', static_cast<std::size_t>(end - at));
    at = newline == nullptr ? end : static_cast<const uint8_t*>(newline) + 1;
    fn(at - data);
  }
}

// The lines as ranges of about equal numbers of bytes: {0, .., n}.
std::vector<int64_t> ranges_of(const int64_t* lines, int64_t n) {
  const int64_t size = lines[n];
  const int64_t wanted = num_threads() == 1 ? 1 : std::clamp<int64_t>(size / kRangeBytes, 1, 8 * num_threads());
  std::vector<int64_t> starts{0};
  for (int64_t r = 1; r < wanted; ++r) {
    const int64_t start = std::lower_bound(lines, lines + n, size / wanted * r) - lines;
    if (start > starts.back() && start < n) starts.push_back(start);
  }
  starts.push_back(n);
  return starts;
}

}  // namespace

int64_t jsonl_count(const uint8_t* data, int64_t size) {
  int64_t n = 0;
  for_each_end(data, size, [&](int64_t) { ++n; });
  return n;
}

int64_t jsonl_fields(const uint8_t* data, int64_t size, const JsonlFields& fields, int64_t* lines, uint8_t* status,
                     uint8_t* text, int64_t* offsets) {
  const int64_t width = static_cast<int64_t>(fields.wanted.size());
  FASTSFT_CHECK(width >= 1, "jsonl_fields: fields: expected at least one name");
  FASTSFT_CHECK(fields.separator.size() <= 1, "jsonl_fields: separator: expected at most one byte, got ",
                fields.separator.size());
  std::vector<const uint8_t*> names;
  std::vector<int64_t> sizes;
  for (const auto* list : {&fields.wanted, &fields.unwanted}) {
    for (const std::string_view name : *list) {
      names.push_back(reinterpret_cast<const uint8_t*>(name.data()));
      sizes.push_back(static_cast<int64_t>(name.size()));
      for (std::size_t i = 0; i + 1 < names.size(); ++i) {
        FASTSFT_CHECK(name != std::string_view(reinterpret_cast<const char*>(names[i]), sizes[i]),
                      "jsonl_fields: fields: expected different names, got twice ", name);
      }
    }
  }
  const JsonlNames table{names.data(), sizes.data(), width, static_cast<int64_t>(names.size()),
                         fields.separator.empty() ? -1 : static_cast<uint8_t>(fields.separator[0])};
  int64_t n = 0;
  lines[0] = 0;
  for_each_end(data, size, [&](int64_t end) { lines[++n] = end; });

  const std::vector<int64_t> starts = ranges_of(lines, n);
  const int64_t ranges = static_cast<int64_t>(starts.size()) - 1;
  std::vector<int64_t> ends(ranges);
  const auto scan = FASTSFT_ISA_SELECT(jsonl_range);
  parallel_for(ranges, 1, [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> where(width);
    for (int64_t r = begin; r < end; ++r) {
      ends[r] = scan(data, lines, starts[r], starts[r + 1], table, where.data(), status, text, offsets);
    }
  });
  int64_t used = n == 0 ? 0 : ends[0];
  for (int64_t r = 1; r < ranges; ++r) {
    const int64_t from = lines[starts[r]], moved = from - used;
    std::memmove(text + used, text + from, static_cast<std::size_t>(ends[r] - from));
    for (int64_t i = starts[r] * width; i < starts[r + 1] * width; ++i) offsets[i] -= moved;
    used = ends[r] - moved;
  }
  offsets[n * width] = used;
  return used;
}

}  // namespace fastsft
