#include "fastsft/fim_rows.h"

#include <string>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

// Every byte is a token, and 256: "ab", 257: "abc", 258: " x", 259: "sx", 260: the end of U+017F and x, by rank.
struct Vocabulary {
  std::vector<uint8_t> classes = std::vector<uint8_t>(kCodePoints);

  ByteBpe bpe(const BpeSplit& split = {}) {
    for (int c = 0; c < 128; ++c) {
      const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
      const bool space = c == ' ' || (c >= 9 && c <= 13);
      classes[c] = static_cast<uint8_t>(128 | (letter ? 1 : 0) | (c >= '0' && c <= '9' ? 2 | 8 : 0) | (space ? 4 : 0));
    }
    std::vector<std::string> pieces;
    for (int byte = 0; byte < 256; ++byte) pieces.emplace_back(1, static_cast<char>(byte));
    pieces.insert(pieces.end(), {"ab", "abc", " x", "sx", "\xBFx", ""});
    const int32_t merges[15] = {'a', 'b', 256, 256, 'c', 257, ' ', 'x', 258, 's', 'x', 259, 0xBF, 'x', 260};
    classes[0x17F] = 128 | 1;
    return {pieces, merges, 5, classes.data(), split};
  }
};

std::vector<int32_t> encode(const ByteBpe& bpe, std::string_view text) {
  std::vector<int32_t> ids;
  std::vector<uint32_t> unknown;
  if (!bpe.encode(text, ids, unknown)) ids = {-1};
  return ids;
}

FimRowOptions options(FimUnit unit) {
  FimRowOptions o;
  o.rate = 1.0;
  o.spm_rate = 0.0;
  o.unit = unit;
  o.plain = {kFimPrefix, 900};
  o.psm = {901, kFimPrefix, 902, kFimSuffix, 903, kFimMiddle, 900};
  o.spm = {901, 902, kFimSuffix, 903, kFimPrefix, kFimMiddle, 900};
  return o;
}

std::vector<int32_t> row(const std::vector<int32_t>& ids, const FimRowOptions& o, const int64_t* span,
                         const ByteBpe* bpe) {
  const int64_t cu[2] = {0, static_cast<int64_t>(ids.size())};
  const FimRows<int32_t> rows(ids.data(), cu, 1, cu[1], o, nullptr, span, bpe);
  std::vector<int32_t> tokens(rows.num_tokens()), targets(tokens), positions(tokens), left(tokens);
  FimMode mode;
  int64_t cuts[2], bounds[6];
  rows.write(tokens.data(), targets.data(), positions.data(), left.data(), &mode, cuts, bounds);
  for (std::size_t i = 0; i + 1 < tokens.size(); ++i) CHECK(targets[i] == -100 || targets[i] == tokens[i + 1]);
  return tokens;
}

}  // namespace

TEST(encoder_merges_by_rank_within_pretokens) {
  Vocabulary v;
  const ByteBpe bpe = v.bpe();
  CHECK((encode(bpe, "abcab x") == std::vector<int32_t>{257, 256, 258}));
  CHECK((encode(bpe, "ab\n x") == std::vector<int32_t>{256, '\n', 258}));
  CHECK((encode(bpe, "  x") == std::vector<int32_t>{' ', 258}));
  CHECK(encode(bpe, "").empty());
  CHECK((encode(bpe, "\xC3\xA9") == std::vector<int32_t>{-1}));      // of unknown class
  CHECK((encode(bpe, "a\xFF") == std::vector<int32_t>{'a', 0xFF}));  // not UTF-8
  CHECK((encode(bpe, std::string(kMaxPretoken + 1, 'a')) == std::vector<int32_t>{-1}));
  CHECK(static_cast<int64_t>(encode(bpe, std::string(kMaxPretoken, 'a')).size()) == kMaxPretoken);
}

TEST(contractions_are_pretokens) {
  Vocabulary v;
  const ByteBpe gpt2 = v.bpe(), gpt4 = v.bpe({.pattern = BpePattern::kGpt4});
  CHECK((encode(gpt2, "'sx sx") == std::vector<int32_t>{'\'', 's', 'x', ' ', 259}));
  CHECK((encode(gpt4, "'sx") == std::vector<int32_t>{'\'', 's', 'x'}));
  CHECK((encode(gpt4, "'\xC5\xBFx") == std::vector<int32_t>{'\'', 0xC5, 0xBF, 'x'}));  // the long s is an s there
  CHECK((encode(gpt2, "'\xC5\xBFx") == std::vector<int32_t>{'\'', 0xC5, 260}));
}

TEST(seams_lie_behind_letters) {
  Vocabulary v;
  const ByteBpe bpe = v.bpe();
  const std::string_view text = "ab (cd) 12";
  CHECK(bpe.seam_before(text, 0, 10) == 6);  // behind "cd"
  CHECK(bpe.seam_before(text, 0, 6) == 2);   // what follows "cd" is not seen
  CHECK(bpe.seam_before(text, 3, 6) == 3);
  CHECK(bpe.seam_after(text, 1, 10) == 2);
  CHECK(bpe.seam_after(text, 2, 10) == 6);  // the letter itself must be seen
  CHECK(bpe.seam_after(text, 7, 10) == 10);
}

TEST(a_cut_within_a_token) {
  Vocabulary v;
  const ByteBpe bpe = v.bpe();
  const int64_t span[2] = {1, 6};  // a | bc ab | c x
  CHECK((row(encode(bpe, "abc abc x"), options(FimUnit::kCharacter), span, &bpe) ==
         std::vector<int32_t>{901, 'a', 902, 'c', 258, 903, 'b', 'c', ' ', 256, 900}));
  const int64_t empty[2] = {4, 4};
  CHECK((row(encode(bpe, "abc abc x"), options(FimUnit::kCharacter), empty, &bpe) ==
         std::vector<int32_t>{901, 257, ' ', 902, 257, 258, 903, 900}));
}

TEST(tokens_stay_where_nothing_was_cut) {
  Vocabulary v;
  const ByteBpe bpe = v.bpe();
  // "abc" written as three tokens, which is not how the encoder would: far from the cuts it stays so.
  const std::vector<int32_t> odd{'a', 'b', 'c', ' ', 'a', 'b', 'c', ' ', 'a', 'b', 'c'};
  const int64_t span[2] = {11, 11};
  const std::vector<int32_t> found = row(odd, options(FimUnit::kCharacter), span, &bpe);
  CHECK((std::vector<int32_t>(found.begin(), found.begin() + 8) ==
         std::vector<int32_t>{901, 'a', 'b', 'c', ' ', 'a', 'b', 'c'}));
}

TEST(special_ids_are_left_alone) {
  Vocabulary v;
  const ByteBpe bpe = v.bpe();
  CHECK(
      (row({256, 261, 256}, options(FimUnit::kCharacter), nullptr, &bpe) == std::vector<int32_t>{256, 261, 256, 900}));
  CHECK((row({256, 1000}, options(FimUnit::kCharacter), nullptr, &bpe) == std::vector<int32_t>{256, 1000, 900}));
}

TEST(wrong_arguments) {
  Vocabulary v;
  const ByteBpe bpe = v.bpe();
  const int64_t outside[2] = {1, 6}, reversed[2] = {3, 2};
  const std::vector<int32_t> ids{1, 2, 3, 4, 5};
  CHECK_THROWS(row(ids, options(FimUnit::kToken), outside, nullptr), Error);
  CHECK_THROWS(row(ids, options(FimUnit::kToken), reversed, nullptr), Error);
  CHECK_THROWS(row(ids, options(FimUnit::kToken), nullptr, &bpe), Error);
  CHECK_THROWS(row(ids, options(FimUnit::kCharacter), nullptr, nullptr), Error);
  FimRowOptions twice = options(FimUnit::kToken);
  twice.spm.push_back(kFimMiddle);
  CHECK_THROWS(row(ids, twice, nullptr, nullptr), Error);
  FimRowOptions rate = options(FimUnit::kToken);
  rate.rate = 1.5;
  CHECK_THROWS(row(ids, rate, nullptr, nullptr), Error);
}

TEST_MAIN()
