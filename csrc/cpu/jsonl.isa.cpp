// Per byte of a line: one load and an OR to see whether it is all ASCII, and inside strings one more load, three vector
// comparisons and, for a wanted field, a store; the line comes from memory once and is in the cache for the second
// load. Bound by what interrupts a vector: an escape costs about 20 cycles, and source code has one every 30 bytes.
#include <cstring>

#include "jsonl_kernels.h"

#if defined(__AVX512BW__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastsft::FASTSFT_ISA_NS {
namespace {

// --- vectors -------------------------------------------------------------------------------------------------------

// A block of a string: where its first byte is that cannot be copied as it stands (quote, backslash, control
// character); kBlock if there is none.
#if defined(__AVX512BW__)
constexpr int kBlock = 64;
struct Block {
  __m512i v;
  explicit Block(const uint8_t* p) : v(_mm512_loadu_si512(p)) {}
  void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
  int first_special() const {
    const uint64_t mask = _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('"')) |
                          _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('\\')) |
                          _mm512_cmplt_epu8_mask(v, _mm512_set1_epi8(0x20));
    return mask == 0 ? kBlock : __builtin_ctzll(mask);
  }
};
#elif defined(__AVX2__)
constexpr int kBlock = 32;
struct Block {
  __m256i v;
  explicit Block(const uint8_t* p) : v(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) {}
  void store(uint8_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  int first_special() const {
    const __m256i control = _mm256_cmpeq_epi8(_mm256_min_epu8(v, _mm256_set1_epi8(0x1F)), v);
    const __m256i quote = _mm256_cmpeq_epi8(v, _mm256_set1_epi8('"'));
    const __m256i slash = _mm256_cmpeq_epi8(v, _mm256_set1_epi8('\\'));
    const uint32_t mask = _mm256_movemask_epi8(_mm256_or_si256(control, _mm256_or_si256(quote, slash)));
    return mask == 0 ? kBlock : __builtin_ctz(mask);
  }
};
#elif defined(__SSE2__)
constexpr int kBlock = 16;
struct Block {
  __m128i v;
  explicit Block(const uint8_t* p) : v(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) {}
  void store(uint8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  int first_special() const {
    const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(v, _mm_set1_epi8(0x1F)), v);
    const __m128i quote = _mm_cmpeq_epi8(v, _mm_set1_epi8('"'));
    const __m128i slash = _mm_cmpeq_epi8(v, _mm_set1_epi8('\\'));
    const uint32_t mask = _mm_movemask_epi8(_mm_or_si128(control, _mm_or_si128(quote, slash)));
    return mask == 0 ? kBlock : __builtin_ctz(mask);
  }
};
#else
// Eight bytes in a register. A borrow reaches only bytes above a hit, and the lowest hit is the one that counts.
constexpr int kBlock = 8;
struct Block {
  uint64_t v;
  explicit Block(const uint8_t* p) { std::memcpy(&v, p, sizeof(v)); }
  void store(uint8_t* p) const { std::memcpy(p, &v, sizeof(v)); }
  static uint64_t below(uint64_t x, uint64_t limit) { return (x - kOnes * limit) & ~x & (kOnes << 7); }
  int first_special() const {
    const uint64_t mask = below(v, 0x20) | below(v ^ kOnes * '"', 1) | below(v ^ kOnes * '\\', 1);
    return mask == 0 ? kBlock : __builtin_ctzll(mask) >> 3;
  }
  static constexpr uint64_t kOnes = 0x0101010101010101u;
};
#endif

// --- UTF-8 (RFC 3629) ----------------------------------------------------------------------------------------------

bool all_ascii(const uint8_t* p, const uint8_t* end) {
  uint8_t all = 0;
  for (; p != end; ++p) all |= *p;
  return all < 0x80;
}

bool valid_utf8(const uint8_t* p, const uint8_t* end) {
  while (p != end) {
    if (end - p >= 8) {
      uint64_t eight;
      std::memcpy(&eight, p, sizeof(eight));
      if ((eight & 0x8080808080808080u) == 0) {
        p += 8;
        continue;
      }
    }
    const uint8_t c = *p++;
    if (c < 0x80) continue;
    if (c < 0xC2 || c > 0xF4) return false;  // a stray continuation, an overlong pair, or beyond U+10FFFF
    const int more = 1 + (c >= 0xE0) + (c >= 0xF0);
    if (end - p < more) return false;
    for (int i = 0; i < more; ++i) {
      if ((p[i] & 0xC0) != 0x80) return false;
    }
    if ((c == 0xE0 && p[0] < 0xA0) || (c == 0xED && p[0] > 0x9F)) return false;  // overlong; surrogates
    if ((c == 0xF0 && p[0] < 0x90) || (c == 0xF4 && p[0] > 0x8F)) return false;  // overlong; beyond U+10FFFF
    p += more;
  }
  return true;
}

// --- strings -------------------------------------------------------------------------------------------------------

struct HexDigits {
  int8_t value[256];
  constexpr HexDigits() : value() {
    for (int c = 0; c < 256; ++c) {
      value[c] = static_cast<int8_t>(c >= '0' && c <= '9'   ? c - '0'
                                     : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                     : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                            : -1);
    }
  }
};
constexpr HexDigits kHex;

struct Escapes {
  uint8_t byte[256];  // what the character behind a backslash stands for; 0: not a simple escape
  constexpr Escapes() : byte() {
    byte['"'] = '"';
    byte['\\'] = '\\';
    byte['/'] = '/';
    byte['b'] = '\b';
    byte['f'] = '\f';
    byte['n'] = '\n';
    byte['r'] = '\r';
    byte['t'] = '\t';
  }
};
constexpr Escapes kEscapes;

// The four hexadecimal digits at p; -1 if they are not.
int32_t hex4(const uint8_t* p, const uint8_t* limit) {
  if (limit - p < 4) return -1;
  const int32_t a = kHex.value[p[0]], b = kHex.value[p[1]], c = kHex.value[p[2]], d = kHex.value[p[3]];
  return (a | b | c | d) < 0 ? -1 : a << 12 | b << 8 | c << 4 | d;
}

uint8_t* encode(uint32_t code, uint8_t* out) {
  if (code < 0x80) {
    *out++ = static_cast<uint8_t>(code);
  } else if (code < 0x800) {
    *out++ = static_cast<uint8_t>(0xC0 | code >> 6);
    *out++ = static_cast<uint8_t>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    *out++ = static_cast<uint8_t>(0xE0 | code >> 12);
    *out++ = static_cast<uint8_t>(0x80 | (code >> 6 & 0x3F));
    *out++ = static_cast<uint8_t>(0x80 | (code & 0x3F));
  } else {
    *out++ = static_cast<uint8_t>(0xF0 | code >> 18);
    *out++ = static_cast<uint8_t>(0x80 | (code >> 12 & 0x3F));
    *out++ = static_cast<uint8_t>(0x80 | (code >> 6 & 0x3F));
    *out++ = static_cast<uint8_t>(0x80 | (code & 0x3F));
  }
  return out;
}

// p: behind a \u. Returns what follows the character, or null for one that is broken or half a surrogate pair.
template <bool kCopy>
const uint8_t* unicode_escape(const uint8_t* p, const uint8_t* limit, uint8_t*& out) {
  int32_t code = hex4(p, limit);
  if (code < 0 || (code >= 0xDC00 && code < 0xE000)) return nullptr;
  p += 4;
  if (code >= 0xD800 && code < 0xDC00) {
    if (limit - p < 2 || p[0] != '\\' || p[1] != 'u') return nullptr;
    const int32_t low = hex4(p + 2, limit);
    if (low < 0xDC00 || low >= 0xE000) return nullptr;
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    p += 6;
  }
  if constexpr (kCopy) out = encode(static_cast<uint32_t>(code), out);
  return p;
}

// p: behind the opening quote. Returns what follows the closing one, or null. With kCopy the string goes to out, and up
// to a block behind it is overwritten, but nothing from `room` on. A string may be read up to `limit`, beyond the end
// of its line: a newline ends it.
template <bool kCopy>
const uint8_t* read_string(const uint8_t* p, const uint8_t* limit, uint8_t*& out, const uint8_t* room) {
  for (;;) {
    while (limit - p >= kBlock && (!kCopy || room - out >= kBlock)) {
      const Block block(p);
      if constexpr (kCopy) block.store(out);
      const int plain = block.first_special();
      p += plain;
      if constexpr (kCopy) out += plain;
      if (plain != kBlock) break;
    }
    if (p == limit) return nullptr;
    const uint8_t c = *p;
    if (c == '"') return p + 1;
    if (c < 0x20) return nullptr;
    if (c != '\\') {  // within a block of the limit or the room
      if constexpr (kCopy) *out++ = c;
      ++p;
      continue;
    }
    if (limit - p < 2) return nullptr;
    const uint8_t simple = kEscapes.byte[p[1]];
    if (simple != 0) {
      if constexpr (kCopy) *out++ = simple;
      p += 2;
    } else if (p[1] == 'u') {
      p = unicode_escape<kCopy>(p + 2, limit, out);
      if (p == nullptr) return nullptr;
    } else {
      return nullptr;
    }
  }
}

const uint8_t* skip_string(const uint8_t* p, const uint8_t* limit) {
  uint8_t* nowhere = nullptr;
  return read_string<false>(p, limit, nowhere, nullptr);
}

// --- values that nobody asked for ----------------------------------------------------------------------------------

const uint8_t* skip_space(const uint8_t* p, const uint8_t* end) {
  while (p != end && (*p == ' ' || *p == '\t' || *p == '\r' || *p == '\n')) ++p;
  return p;
}

const uint8_t* skip_digits(const uint8_t* p, const uint8_t* end) {
  while (p != end && static_cast<uint8_t>(*p - '0') < 10) ++p;
  return p;
}

// Null also for numbers of many digits or a large exponent, which a parser may find too large.
const uint8_t* skip_number(const uint8_t* p, const uint8_t* end) {
  const uint8_t* const begin = p;
  if (*p == '-') ++p;
  const uint8_t* digits = p;
  p = skip_digits(p, end);
  if (p == digits || (*digits == '0' && p - digits > 1)) return nullptr;
  if (p != end && *p == '.') {
    digits = ++p;
    p = skip_digits(p, end);
    if (p == digits) return nullptr;
  }
  if (p != end && (*p | 0x20) == 'e') {
    ++p;
    if (p != end && (*p == '+' || *p == '-')) ++p;
    digits = p;
    p = skip_digits(p, end);
    if (p == digits || p - digits > 2) return nullptr;
  }
  return p - begin > 64 ? nullptr : p;
}

const uint8_t* skip_word(const uint8_t* p, const uint8_t* end, const char* word, int size) {
  return end - p >= size && std::memcmp(p, word, static_cast<std::size_t>(size)) == 0 ? p + size : nullptr;
}

// p: at a key. Returns what follows its colon.
const uint8_t* skip_key(const uint8_t* p, const uint8_t* end, const uint8_t* limit) {
  if (p == end || *p != '"') return nullptr;
  p = skip_string(p + 1, limit);
  if (p == nullptr) return nullptr;
  p = skip_space(p, end);
  return p != end && *p == ':' ? p + 1 : nullptr;
}

const uint8_t* skip_value(const uint8_t* p, const uint8_t* end, const uint8_t* limit) {
  constexpr int kDeepest = 63;
  uint64_t objects = 0;  // bit 0: is the innermost open bracket an object's?
  int depth = 0;
  for (;;) {
    p = skip_space(p, end);
    if (p == end) return nullptr;
    const uint8_t c = *p;
    if (c == '{' || c == '[') {
      const bool object = c == '{';
      p = skip_space(p + 1, end);
      if (p == end || depth == kDeepest) return nullptr;
      if (*p != (object ? '}' : ']')) {
        objects = objects << 1 | static_cast<uint64_t>(object);
        ++depth;
        if (object && (p = skip_key(p, end, limit)) == nullptr) return nullptr;
        continue;
      }
      ++p;
    } else {
      p = c == '"'   ? skip_string(p + 1, limit)
          : c == 't' ? skip_word(p, end, "true", 4)
          : c == 'f' ? skip_word(p, end, "false", 5)
          : c == 'n' ? skip_word(p, end, "null", 4)
                     : skip_number(p, end);
      if (p == nullptr) return nullptr;
    }
    for (;; ++p) {  // behind a value: close what ends here
      if (depth == 0) return p;
      p = skip_space(p, end);
      if (p == end) return nullptr;
      if (*p == ',') break;
      if (*p != ((objects & 1) != 0 ? '}' : ']')) return nullptr;
      objects >>= 1;
      --depth;
    }
    ++p;
    if ((objects & 1) != 0 && (p = skip_key(skip_space(p, end), end, limit)) == nullptr) return nullptr;
  }
}

// --- lines ---------------------------------------------------------------------------------------------------------

int64_t index_of(const JsonlNames& names, const uint8_t* key, int64_t size) {
  for (int64_t i = 0; i < names.total; ++i) {
    if (names.size[i] == size && std::memcmp(names.text[i], key, static_cast<std::size_t>(size)) == 0) return i;
  }
  return -1;
}

// The strings of one line to out, offsets [wanted] to where each begins there, in terms of `text`. Fields that come in
// the order of the names are unescaped as they are met; the others are only checked, and unescaped at the end.
bool read_line(const uint8_t* p, const uint8_t* end, const uint8_t* limit, const JsonlNames& names,
               const uint8_t** where, const uint8_t* text, uint8_t*& out, const uint8_t* room, int64_t* offsets) {
  if (!all_ascii(p, end) && !valid_utf8(p, end)) return false;
  for (int64_t f = 0; f < names.wanted; ++f) where[f] = nullptr;
  int64_t written = 0;
  const auto write = [&](const uint8_t* from) {
    if (written > 0 && names.separator >= 0) *out++ = static_cast<uint8_t>(names.separator);
    offsets[written++] = out - text;
    return read_string<true>(from, limit, out, room);
  };
  p = skip_space(p, end);
  if (p == end || *p != '{') return false;
  p = skip_space(p + 1, end);
  if (p == end || *p != '"') return false;  // also {}, which lacks every field
  for (;;) {
    const uint8_t* const key = p + 1;
    p = skip_string(key, limit);
    if (p == nullptr) return false;
    const int64_t size = p - 1 - key;
    if (std::memchr(key, '\\', static_cast<std::size_t>(size)) != nullptr) return false;
    p = skip_space(p, end);
    if (p == end || *p != ':') return false;
    p = skip_space(p + 1, end);
    if (p == end) return false;
    const int64_t field = index_of(names, key, size);
    if (field >= names.wanted) return false;
    if (field >= 0) {
      if (where[field] != nullptr || *p != '"') return false;
      where[field] = p + 1;
      p = field == written ? write(p + 1) : skip_string(p + 1, limit);
    } else {
      p = skip_value(p, end, limit);
    }
    if (p == nullptr) return false;
    p = skip_space(p, end);
    if (p == end) return false;
    if (*p == '}') break;
    if (*p != ',') return false;
    p = skip_space(p + 1, end);
    if (p == end || *p != '"') return false;
  }
  if (skip_space(p + 1, end) != end) return false;
  for (int64_t f = 0; f < names.wanted; ++f) {
    if (where[f] == nullptr) return false;
  }
  while (written < names.wanted) write(where[written]);
  return true;
}

}  // namespace

int64_t jsonl_range(const uint8_t* data, const int64_t* lines, int64_t first, int64_t last, const JsonlNames& names,
                    const uint8_t** where, uint8_t* status, uint8_t* text, int64_t* offsets) {
  if (first == last) return 0;
  const uint8_t* const limit = data + lines[last];
  uint8_t* out = text + lines[first];
  const uint8_t* const room = text + lines[last];
  for (int64_t i = first; i < last; ++i) {
    const uint8_t* const begin = data + lines[i];
    const uint8_t* const end = data + lines[i + 1];
    uint8_t* const start = out;
    int64_t* const mine = offsets + i * names.wanted;
    if (read_line(begin, end, limit, names, where, text, out, room, mine)) {
      status[i] = 0;
      continue;
    }
    status[i] = skip_space(begin, end) == end ? 2 : 1;
    out = start;
    for (int64_t f = 0; f < names.wanted; ++f) mine[f] = out - text;
  }
  return out - text;
}

}  // namespace fastsft::FASTSFT_ISA_NS
