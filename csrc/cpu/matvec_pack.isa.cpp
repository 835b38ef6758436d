// A weight, read row by row twice (once where it is not quantised) and written once in lines: 16 rows at a time are
// turned into 4-byte words, as many as a line holds per output channel, and transposed. Memory-bound but for the
// division, one per element, of the quantised formats. Compiled with the flags of matvec.isa.cpp.
#include "matvec_kernels.h"
#include "partial.h"

namespace fastsft::FASTSFT_ISA_NS {
namespace {

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

FASTSFT_INLINE Vec load_within(const WeightRows& from, int64_t row, int64_t i, int64_t k) {
  return i < k ? load_until(from.dtype, from.rows[row], i, k) : Vec{};
}

// The lanes reduced by `of`, which orders them.
template <typename V, typename Of>
FASTSFT_INLINE auto reduce(V v, Of&& of) {
  const auto swapped = [](V a, auto amount) {
    return reinterpret_cast<V>(exchange<decltype(amount)::value>(reinterpret_cast<Vec>(a)));
  };
  if constexpr (kLanes >= 16) v = of(v, swapped(v, std::integral_constant<int, 8>()));
  if constexpr (kLanes >= 8) v = of(v, swapped(v, std::integral_constant<int, 4>()));
  v = of(v, swapped(v, std::integral_constant<int, 2>()));
  return of(v, swapped(v, std::integral_constant<int, 1>()))[0];
}

// Extremes of elements [begin, end) of a row; false if one of them is not finite.
FASTSFT_INLINE bool extremes(const WeightRows& from, int64_t row, int64_t begin, int64_t end, int64_t k, float* low,
                             float* high) {
  Vec least{}, most{};
  VecInt bits{};  // of the largest magnitude, which order as magnitudes do; infinity and NaN above all
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec v = load_within(from, row, i, k);
    const VecInt magnitude = reinterpret_cast<VecInt>(v) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  *low = reduce(least, [](Vec a, Vec b) { return a < b ? a : b; });
  *high = reduce(most, [](Vec a, Vec b) { return a > b ? a : b; });
  return reduce(bits, [](VecInt a, VecInt b) { return a > b ? a : b; }) < 0x7f800000;
}

// Integers nearest v / scale, ties to even, in [low, high]; a scale of 0 stands for 1.
FASTSFT_INLINE Bytes quantised(Vec v, float scale, float low, float high) {
  Vec q = v / splat(scale == 0 ? 1.0f : scale);
  q = q < low ? splat(low) : q;
  q = q > high ? splat(high) : q;
  // Added to 1.5 * 2^23, an integer is in the low bits.
  return __builtin_convertvector(reinterpret_cast<VecInt>(q + 0x1.8p23f) - 0x4b400000, Bytes);
}

// The scales of output channel `channel` of a slab, with which its elements are rounded.
FASTSFT_INLINE float scale_of(const PackedWeight& to, int64_t slab, int64_t channel, int64_t i) {
  constexpr int64_t kChannels = kSlabPanels * kPanelColumns;
  if (to.format != WeightFormat::kInt4) return static_cast<const float*>(to.scales)[slab * kChannels + channel];
  const int64_t groups = (to.k + to.group - 1) / to.group;
  const uint16_t half = static_cast<const uint16_t*>(to.scales)[(slab * groups + i / to.group) * kChannels + channel];
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

bool write_scales(const PackedWeight& to, const WeightRows& from, int64_t slab) {
  constexpr int64_t kChannels = kSlabPanels * kPanelColumns;
  void* const scales = const_cast<void*>(to.scales);
  const int64_t rows = smaller(kChannels, to.n - slab * kChannels);
  for (int64_t channel = 0; channel < kChannels; ++channel) {
    const int64_t row = slab * kChannels + channel;
    float low = 0, high = 0;
    if (to.format == WeightFormat::kInt4) {
      const int64_t groups = (to.k + to.group - 1) / to.group;
      for (int64_t g = 0; g < groups; ++g) {
        low = high = 0;
        const int64_t begin = g * to.group;
        if (channel < rows && !extremes(from, row, begin, begin + to.group, to.k, &low, &high)) return false;
        const float largest = high > -low ? high : low;
        const VecHalf half = round_bfloat16(splat(largest == 0 ? 0.0f : largest / -8));
        std::memcpy(static_cast<uint16_t*>(scales) + (slab * groups + g) * kChannels + channel, &half, 2);
      }
    } else {
      if (channel < rows && !extremes(from, row, 0, to.k, to.k, &low, &high)) return false;
      static_cast<float*>(scales)[slab * kChannels + channel] = larger(high, -low) / 127;
    }
  }
  return true;
}

// Words [word, word + kLanes) of a row of x: what a line holds of its output channel.
template <WeightFormat kFormat>
FASTSFT_INLINE Vec words_of(const PackedWeight& to, const WeightRows& from, int64_t slab, int64_t channel,
                            int64_t word) {
  constexpr int64_t kDepth = line_depth(kFormat);
  const int64_t row = slab * kSlabPanels * kPanelColumns + channel, first = word * kDepth;
  if constexpr (kFormat == WeightFormat::kFloat32) return load_within(from, row, first, to.k);
  alignas(64) char buffer[kVectorBytes];
  if constexpr (kFormat == WeightFormat::kBFloat16) {
    for (int part = 0; part < 2; ++part) {
      const VecHalf half = round_bfloat16(load_within(from, row, first + part * kLanes, to.k));
      std::memcpy(buffer + part * kLanes * 2, &half, sizeof(half));
    }
  } else if constexpr (kFormat == WeightFormat::kInt4) {
    alignas(64) char nibbles[8 * kLanes];
    for (int part = 0; part < 8; ++part) {
      const int64_t i = first + part * kLanes;
      if (i >= to.k) {
        std::memset(nibbles + part * kLanes, 0, kLanes);
        continue;
      }
      const Bytes bytes = quantised(load_within(from, row, i, to.k), scale_of(to, slab, channel, i), -8, 7);
      std::memcpy(nibbles + part * kLanes, &bytes, sizeof(bytes));
    }
    for (int i = 0; i < kLanes; ++i) {
      uint64_t eight;
      std::memcpy(&eight, nibbles + 8 * i, 8);
      // Even steps into the low half of the word, odd ones into the high half.
      const auto packed = [](uint64_t four) {  // 4 bits in every other byte
        four &= 0x000f000f000f000fu;
        four = (four | four >> 12) & 0x000000ff000000ffu;
        return static_cast<uint32_t>((four | four >> 24) & 0xffff);
      };
      const uint32_t value = packed(eight) | packed(eight >> 8) << 16;
      std::memcpy(buffer + 4 * i, &value, 4);
    }
  } else {
    const float scale = scale_of(to, slab, channel, 0);
    for (int part = 0; part < 4; ++part) {
      const Bytes bytes = quantised(load_within(from, row, first + part * kLanes, to.k), scale, -127, 127);
      std::memcpy(buffer + part * kLanes, &bytes, sizeof(bytes));
    }
  }
  return load(reinterpret_cast<const float*>(buffer));
}

template <WeightFormat kFormat>
void write_lines(const PackedWeight& to, const WeightRows& from, int64_t slab) {
  const int64_t lines = panel_lines(kFormat, to.k), first = slab * kSlabPanels;
  const int64_t panels = smaller(kSlabPanels, panel_count(to.n) - first);
  const int64_t channels = to.n - first * kPanelColumns;  // of this slab and those after it
  char* const data = static_cast<char*>(const_cast<void*>(to.data)) + slab * slab_bytes(kFormat, to.k);
  for (int64_t channel = 0; channel < panels * kPanelColumns; channel += kLanes) {
    char* const column = data + channel / kPanelColumns * kLineBytes;
    const int64_t lane = channel % kPanelColumns;
    for (int64_t line = 0; line < lines; line += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = channel + i < channels ? words_of<kFormat>(to, from, slab, channel + i, line) : Vec{};
      }
      transpose(block);
      const int64_t count = smaller<int64_t>(kLanes, lines - line);
      for (int64_t i = 0; i < count; ++i) {
        char* const out = column + (line + i) * panels * kLineBytes;
        if constexpr (kFormat == WeightFormat::kInt8) {  // a step's 16 channels stand together
          for (int step = 0; step < 4; ++step) {
            const Bytes bytes = __builtin_convertvector(reinterpret_cast<VecInt>(block[i]) >> (8 * step), Bytes);
            std::memcpy(out + step * kPanelColumns + lane, &bytes, sizeof(bytes));
          }
        } else {
          std::memcpy(out + lane * 4, &block[i], sizeof(Vec));
        }
      }
    }
  }
}

}  // namespace

// False for a value to be quantised that is not finite.
bool matvec_pack_slabs(const PackedWeight& to, const WeightRows& from, int64_t begin, int64_t end) {
  for (int64_t slab = begin; slab < end; ++slab) {
    const bool plain = to.format == WeightFormat::kFloat32 || to.format == WeightFormat::kBFloat16;
    if (!plain && !write_scales(to, from, slab)) return false;
    switch (to.format) {
      case WeightFormat::kFloat32: write_lines<WeightFormat::kFloat32>(to, from, slab); break;
      case WeightFormat::kBFloat16: write_lines<WeightFormat::kBFloat16>(to, from, slab); break;
      case WeightFormat::kInt8: write_lines<WeightFormat::kInt8>(to, from, slab); break;
      case WeightFormat::kInt4: write_lines<WeightFormat::kInt4>(to, from, slab); break;
      case WeightFormat::kW8A8: write_lines<WeightFormat::kW8A8>(to, from, slab); break;
    }
  }
  return true;
}

}  // namespace fastsft::FASTSFT_ISA_NS
