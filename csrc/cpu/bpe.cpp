// Time per pretoken of n bytes: n look-ups of adjacent pairs, two more per merge, each a cache line of the merge table
// (16 bytes an entry, at most half full), and n shifts of short arrays.
#include "fastsft/bpe.h"

#include <algorithm>
#include <cstring>

#include "fastsft/common.h"

namespace fastsft {
namespace {

constexpr uint8_t kLetter = CharClass::kLetter, kNumber = CharClass::kNumber, kSpace = CharClass::kSpace;
constexpr int32_t kNoRank = INT32_MAX;
constexpr std::size_t kPadding = 16;

bool continues(char byte) { return (static_cast<uint8_t>(byte) & 0xC0) == 0x80; }

uint64_t pair_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

uint64_t hash(uint64_t pair) {
  pair *= 0x9E3779B97F4A7C15u;
  return pair ^ (pair >> 29);
}

// The code point at text[at] and its length; a length of 0 stands for a byte that starts no valid sequence.
uint32_t code_point(std::string_view text, std::size_t at, int* length) {
  const auto byte = [&](std::size_t i) { return static_cast<uint8_t>(text[at + i]); };
  const uint8_t first = byte(0);
  const int size = first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  *length = 0;
  if (size == 0 || at + static_cast<std::size_t>(size) > text.size()) return 0;
  uint32_t code = size == 1 ? first : first & (0x7Fu >> size);
  for (int i = 1; i < size; ++i) {
    if (!continues(text[at + static_cast<std::size_t>(i)])) return 0;
    code = code << 6 | (byte(static_cast<std::size_t>(i)) & 0x3F);
  }
  constexpr uint32_t kSmallest[5] = {0, 0, 0x80, 0x800, 0x10000};
  if (code < kSmallest[size] || code >= kCodePoints || (code >= 0xD800 && code < 0xE000)) return 0;
  *length = size;
  return code;
}

// Bytes of a contraction that starts at text[at] = "'", or 0.
std::size_t contraction(std::string_view text, std::size_t at, bool any_case) {
  const auto lower = [&](std::size_t i) -> char {
    if (at + i >= text.size()) return 0;
    const char c = text[at + i];
    return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  };
  const char a = lower(1), b = lower(2);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
  // U+017F, the long s, equals s where case does not count.
  if (any_case && a == '\xC5' && b == '\xBF') return 3;
  return 0;
}

}  // namespace

ByteBpe::ByteBpe(std::vector<std::string> token_bytes, const int32_t* merges, int64_t num_merges,
                 const uint8_t* classes, const BpeSplit& split)
    : classes_(classes), split_(split) {
  const auto vocabulary = static_cast<int64_t>(token_bytes.size());
  std::fill(byte_ids_, byte_ids_ + 256, -1);
  starts_.push_back(0);
  for (int64_t id = 0; id < vocabulary; ++id) {
    const std::string& piece = token_bytes[static_cast<std::size_t>(id)];
    bytes_ += piece;
    starts_.push_back(static_cast<int64_t>(bytes_.size()));
    if (piece.size() == 1) byte_ids_[static_cast<uint8_t>(piece[0])] = static_cast<int32_t>(id);
  }
  bytes_.append(kPadding, '\0');
  for (int byte = 0; byte < 256; ++byte) {
    FASTSFT_CHECK(byte_ids_[byte] >= 0, "ByteBpe: token_bytes: expected a token for every byte, got none for ", byte);
  }
  if (split.ignore_merges) {
    for (int64_t id = 0; id < vocabulary; ++id) {
      if (!bytes_of(id).empty()) whole_[bytes_of(id)] = static_cast<int32_t>(id);
    }
  }
  std::size_t capacity = 16;
  while (capacity < 2 * static_cast<std::size_t>(num_merges)) capacity *= 2;
  table_.assign(capacity, Merge{0, -1, 0});
  mask_ = capacity - 1;
  for (int64_t rank = 0; rank < num_merges; ++rank) {
    const int32_t* row = merges + 3 * rank;
    for (int i = 0; i < 3; ++i) {
      FASTSFT_CHECK(row[i] >= 0 && row[i] < vocabulary, "ByteBpe: merges: expected ids in [0, ", vocabulary, "), got ",
                    row[i]);
    }
    uint64_t slot = hash(pair_of(row[0], row[1])) & mask_;
    while (table_[slot].rank >= 0 && table_[slot].pair != pair_of(row[0], row[1])) slot = (slot + 1) & mask_;
    table_[slot] = {pair_of(row[0], row[1]), static_cast<int32_t>(rank), row[2]};  // of equal pairs the last counts
  }
}

const ByteBpe::Merge* ByteBpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = pair_of(left, right);
  for (uint64_t slot = hash(pair) & mask_; table_[slot].rank >= 0; slot = (slot + 1) & mask_) {
    if (table_[slot].pair == pair) return &table_[slot];
  }
  return nullptr;
}

template <typename Token>
bool ByteBpe::decode(const Token* ids, int64_t n, std::string& text, std::vector<int64_t>& starts) const {
  starts.resize(static_cast<std::size_t>(n) + 1);
  int64_t size = 0;
  for (int64_t i = 0; i < n; ++i) {
    starts[static_cast<std::size_t>(i)] = size;
    const auto bytes = static_cast<int64_t>(bytes_of(ids[i]).size());
    if (bytes == 0) return false;
    size += bytes;
  }
  starts[static_cast<std::size_t>(n)] = size;
  text.resize(static_cast<std::size_t>(size) + kPadding);
  for (int64_t i = 0; i < n; ++i) {
    const std::string_view bytes = bytes_of(ids[i]);
    char* const out = text.data() + starts[static_cast<std::size_t>(i)];
    std::memcpy(out, bytes.data(), kPadding);  // most pieces are shorter; the next one overwrites the rest
    if (bytes.size() > kPadding) std::memcpy(out, bytes.data(), bytes.size());
  }
  text.resize(static_cast<std::size_t>(size));
  return true;
}

template bool ByteBpe::decode(const int32_t*, int64_t, std::string&, std::vector<int64_t>&) const;
template bool ByteBpe::decode(const int64_t*, int64_t, std::string&, std::vector<int64_t>&) const;

uint8_t ByteBpe::class_at(std::string_view text, std::size_t at, int* length) const {
  const uint32_t code = code_point(text, at, length);
  if (*length == 0) {
    *length = 1;
    return CharClass::kKnown;
  }
  return classes_[code];
}

void ByteBpe::merge(std::string_view pretoken, std::vector<int32_t>& out) const {
  const auto n = static_cast<int>(pretoken.size());
  if (n == 1) return out.push_back(byte_ids_[static_cast<uint8_t>(pretoken[0])]);
  if (split_.ignore_merges) {
    const auto found = whole_.find(pretoken);
    if (found != whole_.end()) return out.push_back(found->second);
  }
  int32_t ids[kMaxPretoken], ranks[kMaxPretoken], merged[kMaxPretoken];
  const auto look_up = [&](int i) {
    const Merge* entry = find(ids[i], ids[i + 1]);
    ranks[i] = entry ? entry->rank : kNoRank;
    merged[i] = entry ? entry->id : 0;
  };
  for (int i = 0; i < n; ++i) ids[i] = byte_ids_[static_cast<uint8_t>(pretoken[static_cast<std::size_t>(i)])];
  for (int i = 0; i + 1 < n; ++i) look_up(i);
  int size = n;
  while (size > 1) {
    const auto best = static_cast<int>(std::min_element(ranks, ranks + size - 1) - ranks);  // the first of equal ones
    if (ranks[best] == kNoRank) break;
    ids[best] = merged[best];
    const std::size_t tail = sizeof(int32_t) * static_cast<std::size_t>(size - best - 2);
    std::memmove(ids + best + 1, ids + best + 2, tail);
    std::memmove(ranks + best, ranks + best + 1, tail);
    std::memmove(merged + best, merged + best + 1, tail);
    --size;
    if (best > 0) look_up(best - 1);
    if (best + 1 < size) look_up(best);
  }
  out.insert(out.end(), ids, ids + size);
}

// Returns `begin` itself at a character of unknown class.
std::size_t ByteBpe::pretoken_end(std::string_view text, std::size_t begin, std::vector<uint32_t>& unknown) const {
  const bool gpt2 = split_.pattern == BpePattern::kGpt2;
  bool known = true;
  int length = 0;
  const auto kind = [&](std::size_t at) -> uint8_t {  // 0 means: none of the three
    if (at >= text.size()) return 0xFF;
    const uint8_t found = class_at(text, at, &length);
    if (!(found & CharClass::kKnown)) {
      known = false;
      int ignored;
      unknown.push_back(code_point(text, at, &ignored));
    }
    return found & (kLetter | kNumber | kSpace);
  };
  const auto run = [&](std::size_t at, uint8_t wanted, int most = INT32_MAX) {
    for (; most > 0 && kind(at) == wanted; --most) at += static_cast<std::size_t>(length);
    return at;
  };
  const auto newline = [&](std::size_t at) { return at < text.size() && (text[at] == '\n' || text[at] == '\r'); };
  const auto end = [&]() -> std::size_t {
    const char first = text[begin];
    if (first == '\'') {
      if (const std::size_t bytes = contraction(text, begin, !gpt2)) return begin + bytes;
    }
    const uint8_t here = kind(begin);
    const std::size_t second = begin + static_cast<std::size_t>(length);
    const uint8_t next = kind(second);
    if (here == kLetter) return run(begin, kLetter);
    if (next == kLetter && (gpt2 ? first == ' ' : here != kNumber && !newline(begin))) return run(second, kLetter);
    if (here == kNumber) return run(begin, kNumber, gpt2 ? INT32_MAX : split_.max_digits);
    if (gpt2 && first == ' ' && next == kNumber) return run(second, kNumber);
    if (here == 0 || (first == ' ' && next == 0)) {
      std::size_t at = run(here == 0 ? begin : second, 0);
      while (!gpt2 && newline(at)) ++at;
      return at;
    }
    // White space: up to its last line end, or else all but its last character, unless that is all there is.
    std::size_t at = begin, last = begin, after_line = begin;
    while (kind(at) == kSpace) {
      last = at;
      at += static_cast<std::size_t>(length);
      if (newline(last)) after_line = at;
    }
    if (!gpt2 && after_line > begin) return after_line;
    return at == text.size() || last == begin ? at : last;
  }();
  return known ? end : begin;
}

void ByteBpe::merge(std::string_view pretoken, std::vector<int32_t>& out, BpeCache& cache) const {
  if (pretoken.size() > BpeCache::kBytes) return merge(pretoken, out);
  char bytes[16] = {};
  std::copy(pretoken.begin(), pretoken.end(), bytes);
  bytes[15] = static_cast<char>(pretoken.size());
  uint64_t key[2];
  std::memcpy(key, bytes, sizeof(key));
  BpeCache::Entry& entry = cache.entry(key);
  if (entry.key[0] == key[0] && entry.key[1] == key[1]) {
    out.insert(out.end(), entry.ids, entry.ids + entry.count);
    return;
  }
  const std::size_t before = out.size();
  merge(pretoken, out);
  const std::size_t count = out.size() - before;
  if (count > BpeCache::kIds) return;
  std::copy(key, key + 2, entry.key);
  std::copy(out.end() - static_cast<std::ptrdiff_t>(count), out.end(), entry.ids);
  entry.count = static_cast<int32_t>(count);
}

bool ByteBpe::encode(std::string_view text, std::vector<int32_t>& out, std::vector<uint32_t>& unknown,
                     BpeCache* cache) const {
  const std::size_t before = out.size();
  const auto whole = [&](std::string_view part) {
    for (std::size_t begin = 0; begin < part.size();) {
      const std::size_t end = pretoken_end(part, begin, unknown);
      if (end == begin || end - begin > static_cast<std::size_t>(kMaxPretoken)) return false;
      if (cache != nullptr) {
        merge(part.substr(begin, end - begin), out, *cache);
      } else {
        merge(part.substr(begin, end - begin), out);
      }
      begin = end;
    }
    return true;
  };
  bool done = true;
  if (!split_.digits_apart) {
    done = whole(text);
  } else {
    std::size_t begin = 0;
    for (std::size_t at = 0; at < text.size() && done;) {
      int length;
      const uint8_t found = class_at(text, at, &length);
      const std::size_t next = at + static_cast<std::size_t>(length);
      if (found & CharClass::kDigit) {
        done = whole(text.substr(begin, at - begin));
        merge(text.substr(at, next - at), out);
        begin = next;
      }
      at = next;
    }
    done = done && whole(text.substr(begin));
  }
  if (!done) out.resize(before);
  return done;
}

// A character of unknown class makes no seam: it may be a letter, or not.
std::size_t ByteBpe::seam_before(std::string_view text, std::size_t begin, std::size_t end) const {
  bool other_follows = false;  // no place is sure while what follows it is not seen
  for (std::size_t at = end; at > begin;) {
    const std::size_t right = at;
    do --at;
    while (at > begin && continues(text[at]));
    int length;
    const uint8_t found = class_at(text, at, &length);
    if ((found & kLetter) && other_follows) return right;
    other_follows = (found & CharClass::kKnown) && !(found & kLetter);
  }
  return begin;
}

std::size_t ByteBpe::seam_after(std::string_view text, std::size_t begin, std::size_t end) const {
  bool letter_before = false;
  for (std::size_t at = begin; at < end;) {
    int length;
    const uint8_t found = class_at(text, at, &length);
    if (letter_before && (found & CharClass::kKnown) && !(found & kLetter)) return at;
    letter_before = found & kLetter;
    at += static_cast<std::size_t>(length);
  }
  return end;
}

}  // namespace fastsft
