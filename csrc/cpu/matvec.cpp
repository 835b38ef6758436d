#include "fastsft/matvec.h"

#include <algorithm>
#include <cstring>

#include "fastsft/memory.h"
#include "fastsft/parallel.h"
#include "matvec_kernels.h"
#include "scratch.h"

namespace fastsft {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;    // of weight, read or multiplied: some microseconds
constexpr int64_t kInputElements = 8 << 10;  // packed by a task

// Calls visit(byte, shift, index) for every element of slab `slab` that exists: where in the slab it is packed, and
// values[index].
template <typename Visit>
void for_each(WeightFormat format, int64_t n, int64_t k, int64_t slab, Visit&& visit) {
  const int64_t depth = line_depth(format);
  const int64_t first = slab * kSlabPanels, panels = std::min(kSlabPanels, panel_count(n) - first);
  for (int64_t c = first * kPanelColumns; c < std::min(n, (first + panels) * kPanelColumns); ++c) {
    const int64_t panel = c / kPanelColumns - first, lane = c % kPanelColumns;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = (i / depth * panels + panel) * kLineBytes, step = i % depth;
      switch (format) {
        case WeightFormat::kFloat32: visit(at + lane * 4, 0, c * k + i); break;
        case WeightFormat::kBFloat16: visit(at + lane * 4 + step * 2, 0, c * k + i); break;
        case WeightFormat::kInt8: visit(at + step * kPanelColumns + lane, 0, c * k + i); break;
        case WeightFormat::kW8A8: visit(at + lane * 4 + step, 0, c * k + i); break;
        // A channel's word: its even steps in the low half, its odd ones in the high half, 4 bits each.
        case WeightFormat::kInt4: visit(at + lane * 4 + step % 2 * 2 + step / 4, step / 2 % 2 * 4, c * k + i); break;
      }
    }
  }
}

// Of n slabs among threads: most of each one's share in one piece, since a CPU reads a stream faster that is not broken
// off; then small tasks, which make up for a thread that came late.
struct Division {
  int64_t n, small, threads, piece;

  Division(int64_t n, int64_t most, int64_t threads)
      : n(n),
        small(std::min(most, std::max<int64_t>(1, n / threads / 4))),
        threads(threads),
        piece(threads == 1 ? n : n / threads * 3 / 4) {}

  int64_t tasks() const { return (piece > 0 ? threads : 0) + (n - threads * piece + small - 1) / small; }
  int64_t begin(int64_t task) const {
    const int64_t pieces = piece > 0 ? std::min(task, threads) : 0;
    return std::min(n, pieces * piece + (task - pieces) * small);
  }
};

}  // namespace

int64_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return panel_count(n) * panel_lines(format, k) * kLineBytes;
}

void pack_weight(const PackedWeight& to, const WeightRows& from) {
  FASTSFT_CHECK(to.format != WeightFormat::kInt4 || to.group == 32 || to.group == 64,
                "pack_weight: group: expected 32 or 64, got ", to.group);
  const int64_t bytes = packed_bytes(to.format, to.n, to.k);
  advise_huge_pages(const_cast<void*>(to.data), bytes);
  const auto slabs = FASTSFT_ISA_SELECT(matvec_pack_slabs);
  parallel_for(slab_count(to.n), 1, [&](int64_t begin, int64_t end) {
    FASTSFT_CHECK(slabs(to, from, begin, end), "pack_weight: weight: expected finite values, got a NaN or an infinity");
  });
}

void unpack_weight(WeightFormat format, int64_t n, int64_t k, const void* data, void* values) {
  parallel_for(slab_count(n), 1, [&](int64_t slab, int64_t) {
    const char* const in = static_cast<const char*>(data) + slab * slab_bytes(format, k);
    if (format == WeightFormat::kInt4) {
      auto* const out = static_cast<int8_t*>(values);
      for_each(format, n, k, slab, [&](int64_t byte, int64_t shift, int64_t index) {
        const int bits = in[byte] >> shift & 15;
        out[index] = static_cast<int8_t>(bits < 8 ? bits : bits - 16);
      });
      return;
    }
    const std::size_t size = format == WeightFormat::kFloat32 ? 4 : format == WeightFormat::kBFloat16 ? 2 : 1;
    auto* const out = static_cast<char*>(values);
    for_each(format, n, k, slab, [&](int64_t byte, int64_t, int64_t index) {
      std::memcpy(out + index * static_cast<int64_t>(size), in + byte, size);
    });
  });
}

void packed_linear(const PackedLinear& call) {
  const PackedWeight& w = call.weight;
  FASTSFT_CHECK(w.format != WeightFormat::kInt4 || w.group == 32 || w.group == 64,
                "packed_linear: group: expected 32 or 64, got ", w.group);
  if (call.rows == 0 || w.n == 0) return;
  auto* const words = static_cast<uint32_t*>(thread_scratch(FASTSFT_ISA_SELECT(matvec_input_words)(call) * 4));
  const auto pack = FASTSFT_ISA_SELECT(matvec_pack_input);
  const int64_t passes = (call.rows + kMaxRows - 1) / kMaxRows;
  parallel_for(passes, std::max<int64_t>(1, kInputElements / (kMaxRows * std::max<int64_t>(1, w.k))),
               [&](int64_t begin, int64_t end) { pack(call, words, begin, end); });
  const auto slabs = FASTSFT_ISA_SELECT(matvec_slabs);
  const int64_t most = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, passes * slab_bytes(w.format, w.k)));
  const Division division(slab_count(w.n), most, num_threads());
  parallel_for(division.tasks(), 1,
               [&](int64_t task, int64_t) { slabs(call, words, division.begin(task), division.begin(task + 1)); });
}

}  // namespace fastsft
