// Private to matvec.cpp and matvec.isa.cpp: the packed layout, and the product of some slabs.
#pragma once

#include <cstdint>

#include "fastsft/isa.h"
#include "fastsft/matvec.h"

namespace fastsft {

constexpr int64_t kPanelColumns = 16;  // output channels
constexpr int64_t kSlabPanels = 4;
constexpr int64_t kLineBytes = 64;

constexpr int64_t kRunChannels = 128;  // W8A8: input channels that share a scale of a row of x

// Input channels of a line.
constexpr int64_t line_depth(WeightFormat format) {
  return format == WeightFormat::kW8A8 ? 4 : int64_t{1} << static_cast<int>(format);
}
constexpr int64_t panel_lines(WeightFormat format, int64_t k) {
  return (k + line_depth(format) - 1) / line_depth(format);
}
constexpr int64_t panel_count(int64_t n) { return (n + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t slab_count(int64_t n) { return (panel_count(n) + kSlabPanels - 1) / kSlabPanels; }
constexpr int64_t slab_bytes(WeightFormat format, int64_t k) {  // of a full one; only the last may be smaller
  return panel_lines(format, k) * kLineBytes * kSlabPanels;
}

FASTSFT_ISA_DECLARE(bool, matvec_pack_slabs, const PackedWeight& to, const WeightRows& from, int64_t begin, int64_t end)

constexpr int64_t kMaxRows = 16;  // of a pass

// x as the kernels want it: 4-byte words with the rows of a pass side by side; passes [begin, end).
FASTSFT_ISA_DECLARE(int64_t, matvec_input_words, const PackedLinear& call)
FASTSFT_ISA_DECLARE(void, matvec_pack_input, const PackedLinear& call, uint32_t* words, int64_t begin, int64_t end)
FASTSFT_ISA_DECLARE(void, matvec_slabs, const PackedLinear& call, const uint32_t* words, int64_t begin, int64_t end)

}  // namespace fastsft
