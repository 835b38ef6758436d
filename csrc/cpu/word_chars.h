// Private to csrc/cpu: which characters outside ASCII separate words and which are a word each (shingles.h).
#pragma once

#include <cstdint>

namespace fastsft {

enum class WordChar { kPart, kSeparator, kAlone };

struct CharRange {
  char32_t first, last;
};

// Spaces, punctuation, symbols and controls by general category, in the blocks that have little else; letters, marks
// and digits are parts of words. Ascending.
inline constexpr CharRange kSeparators[] = {
    {0x0080, 0x00A9}, {0x00AB, 0x00B1}, {0x00B4, 0x00B4}, {0x00B6, 0x00B8}, {0x00BB, 0x00BB},   {0x00BF, 0x00BF},
    {0x00D7, 0x00D7}, {0x00F7, 0x00F7}, {0x037E, 0x037E}, {0x0387, 0x0387}, {0x055A, 0x055F},   {0x0589, 0x058A},
    {0x05BE, 0x05BE}, {0x05C0, 0x05C0}, {0x05C3, 0x05C3}, {0x05F3, 0x05F4}, {0x0609, 0x060D},   {0x061B, 0x061F},
    {0x066A, 0x066D}, {0x06D4, 0x06D4}, {0x0700, 0x070D}, {0x0964, 0x0965}, {0x0F04, 0x0F14},   {0x0F3A, 0x0F3D},
    {0x104A, 0x104F}, {0x1360, 0x1368}, {0x1400, 0x1400}, {0x1680, 0x1680}, {0x169B, 0x169C},   {0x17D4, 0x17D6},
    {0x17D8, 0x17DB}, {0x1800, 0x180A}, {0x180E, 0x180E}, {0x2000, 0x206F}, {0x207A, 0x207E},   {0x208A, 0x208E},
    {0x20A0, 0x20CF}, {0x2190, 0x2BFF}, {0x2E00, 0x2E2E}, {0x2E30, 0x2E7F}, {0x3000, 0x3004},   {0x3008, 0x3020},
    {0x3030, 0x3030}, {0x3036, 0x3037}, {0x303D, 0x303F}, {0x309B, 0x309C}, {0x30A0, 0x30A0},   {0x30FB, 0x30FB},
    {0xFD3E, 0xFD3F}, {0xFE00, 0xFE1F}, {0xFE30, 0xFE6F}, {0xFEFF, 0xFEFF}, {0xFF01, 0xFF0F},   {0xFF1A, 0xFF20},
    {0xFF3B, 0xFF40}, {0xFF5B, 0xFF65}, {0xFFE0, 0xFFEE}, {0xFFF9, 0xFFFD}, {0x1F000, 0x1FAFF},
};

// Scripts written without spaces: Thai and Lao, Burmese, Khmer, kana, Han. Ascending.
inline constexpr CharRange kAlone[] = {
    {0x0E01, 0x0EFF}, {0x1000, 0x109F}, {0x1780, 0x17FF},   {0x3005, 0x3007},   {0x3021, 0x3029},
    {0x3031, 0x3035}, {0x3041, 0x30FF}, {0x31F0, 0x31FF},   {0x3400, 0x4DBF},   {0x4E00, 0x9FFF},
    {0xF900, 0xFAFF}, {0xFF66, 0xFF9F}, {0x1B000, 0x1B16F}, {0x20000, 0x3FFFF},
};

// No names for the linker: this is compiled for several instruction sets, and it would keep one of them.
namespace {

template <int count>
inline bool is_within(char32_t c, const CharRange (&ranges)[count]) {
  int low = 0, high = count;  // the first range that ends at c or behind it
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ranges[middle].last < c) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && ranges[low].first <= c;
}

inline WordChar word_char(char32_t c) {
  if (c >= 0x4E00 && c <= 0x9FFF) return WordChar::kAlone;
  if (is_within(c, kSeparators)) return WordChar::kSeparator;
  return is_within(c, kAlone) ? WordChar::kAlone : WordChar::kPart;
}

// The character whose UTF-8 begins at `from`, before `end`, and its bytes; 0 bytes where none begins.
inline int decode_char(const uint8_t* from, const uint8_t* end, char32_t& c) {
  const uint8_t lead = *from;
  const int bytes = lead >= 0xF5 ? 0 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC2 ? 2 : 0;
  if (bytes == 0 || end - from < bytes) return 0;
  c = lead & (0xFF >> (bytes + 1));
  for (int i = 1; i < bytes; ++i) {
    if ((from[i] & 0xC0) != 0x80) return 0;
    c = c << 6 | (from[i] & 0x3F);
  }
  const bool shortest = c >= (bytes == 4 ? 0x10000u : bytes == 3 ? 0x800u : 0x80u);
  return shortest && c <= 0x10FFFF ? bytes : 0;
}

}  // namespace
}  // namespace fastsft
