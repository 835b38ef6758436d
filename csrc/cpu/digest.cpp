// Each byte is read once; two multiplications of 64 bits for each 16 bytes and lane, the two lanes independent of each
// other.
#include "fastsft/digest.h"

#include <cstring>

#include "fastsft/parallel.h"

namespace fastsft {
namespace {

constexpr int64_t kTextsPerTask = 64;
constexpr uint64_t kStart[2] = {0x243F6A8885A308D3u, 0x13198A2E03707344u};  // digits of pi
constexpr uint64_t kFirst[2] = {0xA4093822299F31D0u, 0x082EFA98EC4E6C89u};
constexpr uint64_t kSecond[2] = {0x452821E638D01377u, 0xBE5466CF34E90C6Cu};

uint64_t fold(uint64_t x, uint64_t y) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(x) * y;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

void digest(std::string_view text, uint64_t* out) {
  const uint64_t length = text.size();
  uint64_t h[2];
  for (int k = 0; k < 2; ++k) h[k] = kStart[k] + length * 0x9E3779B97F4A7C15u;
  const auto absorb = [&](const char* sixteen) {
    uint64_t lo, hi;
    std::memcpy(&lo, sixteen, 8);
    std::memcpy(&hi, sixteen + 8, 8);
    for (int k = 0; k < 2; ++k) h[k] = fold(h[k] ^ lo ^ kFirst[k], (h[k] + hi) ^ kSecond[k]) + lo;
  };
  const char* at = text.data();
  for (uint64_t left = length; left > 0;) {
    if (left >= 16) {
      absorb(at);
      at += 16;
      left -= 16;
    } else {
      char padded[16] = {};
      std::memcpy(padded, at, left);
      absorb(padded);
      left = 0;
    }
  }
  for (int k = 0; k < 2; ++k) out[k] = fold(h[k] ^ kFirst[k], kSecond[k] ^ length);
}

}  // namespace

void text_digests(const std::string_view* texts, int64_t n, uint64_t* digests) {
  parallel_for(n, kTextsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) digest(texts[i], digests + 2 * i);
  });
}

}  // namespace fastsft
