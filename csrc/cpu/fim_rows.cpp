// Traffic per token: the token read, token, target and position written (4 or 8 bytes each); between characters the
// text is put together besides, 4 bytes or so a token, and stays in the first cache. Copies run at memory speed, so
// there is no per-ISA version.
#include "fastsft/fim_rows.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <string>

#include "fastsft/common.h"
#include "fastsft/parallel.h"

namespace fastsft {
namespace {

constexpr int64_t kDocsPerTask = 64;
constexpr int64_t kIgnore = -100;

bool continues(char byte) { return (static_cast<uint8_t>(byte) & 0xC0) == 0x80; }

int64_t characters(std::string_view text) {
  int64_t count = 0;
  for (const char byte : text) count += !continues(byte);
  return count;
}

// The byte at which character `index` begins; the text's end for the one after the last.
int64_t character_at(std::string_view text, int64_t index) {
  std::size_t at = 0;
  for (; at < text.size(); ++at) {
    if (!continues(text[at]) && index-- == 0) break;
  }
  return static_cast<int64_t>(at);
}

// The byte at which line `index` begins; likewise.
int64_t line_at(std::string_view text, int64_t index) {
  std::size_t at = 0;
  for (; index > 0 && at < text.size(); --index) {
    const std::size_t end = text.find('\n', at);
    at = end == std::string_view::npos ? text.size() : end + 1;
  }
  return static_cast<int64_t>(at);
}

int64_t lines(std::string_view text) {
  const int64_t ends = std::count(text.begin(), text.end(), '\n');
  return ends + (!text.empty() && text.back() != '\n');
}

void check_layout(const std::vector<int64_t>& layout, const char* name, std::initializer_list<int64_t> pieces) {
  for (const int64_t piece : pieces) {
    FASTSFT_CHECK(std::count(layout.begin(), layout.end(), piece) == 1, "fim_rows: ", name, ": expected each of ",
                  pieces.size(), " pieces once, got ", std::count(layout.begin(), layout.end(), piece), " of ", piece);
  }
}

}  // namespace

FimCut fim_cut_text(std::string_view text, uint64_t doc_id, const FimRowOptions& options, FimScratch& scratch) {
  const int64_t places = options.unit == FimUnit::kLine ? lines(text) : characters(text);
  FASTSFT_CHECK(places < 0xFFFFFFFF, "fim_rows: expected a text of fewer than 2^32 - 1 characters, got ", places);
  const FimDraw draw = fim_draw(options.seed, doc_id, places, fim_threshold(options.rate, "rate"),
                                fim_threshold(options.spm_rate, "spm_rate"), -1);
  if (options.unit == FimUnit::kSyntax && draw.mode != FimMode::kNone) {
    scratch.scanner.scan(text, scratch.spans);
    if (!scratch.spans.empty()) {
      const uint32_t bits = philox(options.seed, doc_id, kFimIndex).x[2];
      const CodeSpan span = scratch.spans[uniform_below(bits, static_cast<uint32_t>(scratch.spans.size()))];
      return {draw.mode, span.begin, span.end};
    }
  }
  const auto at = options.unit == FimUnit::kLine ? line_at : character_at;
  const int64_t begin = at(text, draw.begin);
  const auto rest = text.substr(static_cast<std::size_t>(begin));
  return {draw.mode, begin, begin + at(rest, draw.end - draw.begin)};
}

template <typename Token>
struct FimRows<Token>::Task {
  std::string text;
  std::vector<int64_t> starts;  // byte at which each token begins, and the text's length
  std::vector<uint32_t> unknown;
  FimScratch scratch;
};

template <typename Token>
FimRows<Token>::FimRows(const Token* tokens, const int64_t* cu_seqlens, int64_t num_docs, int64_t num_tokens,
                        const FimRowOptions& options, const int64_t* doc_ids, const int64_t* spans,
                        const ByteBpe* encoder)
    : tokens_(tokens),
      in_cu_(cu_seqlens),
      options_(options),
      doc_ids_(doc_ids),
      spans_(spans),
      encoder_(encoder),
      plans_(static_cast<std::size_t>(num_docs)),
      stores_(static_cast<std::size_t>((num_docs + kDocsPerTask - 1) / kDocsPerTask)),
      cu_seqlens_(static_cast<std::size_t>(num_docs) + 1) {
  FASTSFT_CHECK((encoder == nullptr) == (options.unit == FimUnit::kToken),
                "fim_rows: encoder: expected one for every unit but \"token\"");
  FASTSFT_CHECK(cu_seqlens[0] == 0, "fim_rows: cu_seqlens: expected to start with 0, got ", cu_seqlens[0]);
  FASTSFT_CHECK(cu_seqlens[num_docs] == num_tokens, "fim_rows: cu_seqlens: expected to end with the ", num_tokens,
                " tokens given, got ", cu_seqlens[num_docs]);
  fim_threshold(options.rate, "rate");
  fim_threshold(options.spm_rate, "spm_rate");
  check_layout(options.plain, "plain", {kFimPrefix});
  check_layout(options.psm, "psm", {kFimPrefix, kFimMiddle, kFimSuffix});
  check_layout(options.spm, "spm", {kFimPrefix, kFimMiddle, kFimSuffix});
  std::mutex mutex;
  parallel_for(num_docs, kDocsPerTask, [&](int64_t first, int64_t last) {
    Task task;
    std::vector<int32_t>& store = stores_[static_cast<std::size_t>(first / kDocsPerTask)];
    for (int64_t doc = first; doc < last; ++doc) plan(doc, task, store);
    if (!task.unknown.empty()) {
      const std::lock_guard lock(mutex);
      unknown_.insert(unknown_.end(), task.unknown.begin(), task.unknown.end());
    }
  });
  std::sort(unknown_.begin(), unknown_.end());
  unknown_.erase(std::unique(unknown_.begin(), unknown_.end()), unknown_.end());
  for (std::size_t doc = 0; doc < plans_.size(); ++doc) {
    int64_t size = static_cast<int64_t>(layout(plans_[doc].mode).size());
    for (const int64_t item : layout(plans_[doc].mode)) size += item < 0 ? plans_[doc].pieces[-1 - item].size() - 1 : 0;
    cu_seqlens_[doc + 1] = cu_seqlens_[doc] + size;
  }
}

template <typename Token>
const std::vector<int64_t>& FimRows<Token>::layout(FimMode mode) const {
  return mode == FimMode::kPsm ? options_.psm : mode == FimMode::kSpm ? options_.spm : options_.plain;
}

template <typename Token>
void FimRows<Token>::plan(int64_t doc, Task& task, std::vector<int32_t>& store) {
  const int64_t first = in_cu_[doc], length = in_cu_[doc + 1] - first;
  FASTSFT_CHECK(length >= 0, "fim_rows: cu_seqlens: expected never to decrease, got ", first, " then ", in_cu_[doc + 1],
                " at document ", doc);
  FASTSFT_CHECK(length < 0xFFFFFFFF, "fim_rows: cu_seqlens: expected documents of fewer than 2^32 - 1 tokens, got ",
                length, " at document ", doc);
  const auto id = static_cast<uint64_t>(doc_ids_ ? doc_ids_[doc] : doc);
  Plan& plan = plans_[static_cast<std::size_t>(doc)];
  const FimDraw draw = fim_draw(options_.seed, id, length, fim_threshold(options_.rate, "rate"),
                                fim_threshold(options_.spm_rate, "spm_rate"), -1);
  plan.mode = draw.mode;
  const auto whole = [&](FimMode mode) {
    plan.mode = mode;
    for (Piece& piece : plan.pieces) piece = {};
    plan.pieces[0].end = length;
  };
  if (plan.mode == FimMode::kNone) return whole(FimMode::kNone);
  int64_t limit = length;
  if (options_.unit == FimUnit::kToken) {
    plan.begin = draw.begin;
    plan.end = draw.end;
  } else {
    if (!encoder_->decode(tokens_ + first, length, task.text, task.starts)) {
      plan.begin = plan.end = -1;
      return whole(kFimNotExact);
    }
    limit = static_cast<int64_t>(task.text.size());
    const FimCut cut = fim_cut_text(task.text, id, options_, task.scratch);
    plan.begin = cut.begin;
    plan.end = cut.end;
  }
  if (spans_ != nullptr) {
    plan.begin = spans_[2 * doc];
    plan.end = spans_[2 * doc + 1];
    FASTSFT_CHECK(0 <= plan.begin && plan.begin <= plan.end && plan.end <= limit,
                  "fim_rows: spans: expected 0 <= begin <= end <= ", limit, " at document ", doc, ", got [", plan.begin,
                  ", ", plan.end, ")");
  }
  if (options_.unit == FimUnit::kToken) {
    plan.pieces[0].end = plan.pieces[1].begin = plan.begin;
    plan.pieces[1].end = plan.pieces[2].begin = plan.end;
    plan.pieces[2].end = length;
  } else if (!encode_pieces(plan, task.text, task.starts, task, store)) {
    return whole(kFimNotExact);
  }
  if (options_.max_len >= 0) {
    int64_t size = static_cast<int64_t>(layout(plan.mode).size()) - 3;
    for (const Piece& piece : plan.pieces) size += piece.size();
    if (size > options_.max_len) whole(FimMode::kNone);
  }
}

// Prefix [0, begin), middle [begin, end) and suffix [end, size) of the text. Each piece keeps the document's tokens
// between its first and its last seam, unless the two cross.
template <typename Token>
bool FimRows<Token>::encode_pieces(Plan& plan, std::string_view text, const std::vector<int64_t>& starts, Task& task,
                                   std::vector<int32_t>& store) const {
  const auto token_at = [&](std::size_t byte) -> int64_t {  // the token that begins there; -1: none does
    const auto found = std::lower_bound(starts.begin(), starts.end(), static_cast<int64_t>(byte));
    return found != starts.end() && *found == static_cast<int64_t>(byte) ? found - starts.begin() : -1;
  };
  const std::size_t edges[4] = {0, static_cast<std::size_t>(plan.begin), static_cast<std::size_t>(plan.end),
                                text.size()};
  for (int i = 0; i < 3; ++i) {
    const std::size_t begin = edges[i], end = edges[i + 1];
    Piece& piece = plan.pieces[i];
    piece = {};
    piece.store = static_cast<int64_t>(store.size());
    if (begin == end) continue;
    const std::size_t head = i == 0 ? 0 : encoder_->seam_after(text, begin, end);
    const std::size_t tail = i == 2 ? end : encoder_->seam_before(text, begin, end);
    const int64_t first = token_at(head), last = token_at(tail);
    // A token across a seam: these ids are not the encoder's, so that nothing of them can be kept.
    const bool keep = head <= tail && first >= 0 && last >= 0;
    if (!encoder_->encode(text.substr(begin, (keep ? head : end) - begin), store, task.unknown)) return false;
    piece.head_size = static_cast<int32_t>(static_cast<int64_t>(store.size()) - piece.store);
    if (!keep) continue;
    piece.begin = first;
    piece.end = last;
    if (!encoder_->encode(text.substr(tail, end - tail), store, task.unknown)) return false;
    piece.tail_size = static_cast<int32_t>(static_cast<int64_t>(store.size()) - piece.store) - piece.head_size;
  }
  return true;
}

template <typename Token>
void FimRows<Token>::write(Token* tokens, Token* targets, Token* positions, Token* middle_left, FimMode* mode,
                           int64_t* cuts, int64_t* bounds) const {
  parallel_for(static_cast<int64_t>(plans_.size()), kDocsPerTask, [&](int64_t first, int64_t last) {
    const int32_t* store = stores_[static_cast<std::size_t>(first / kDocsPerTask)].data();
    for (int64_t doc = first; doc < last; ++doc) {
      const Plan& plan = plans_[static_cast<std::size_t>(doc)];
      const int64_t at = cu_seqlens_[static_cast<std::size_t>(doc)];
      const int64_t size = cu_seqlens_[static_cast<std::size_t>(doc) + 1] - at;
      Token* const row = tokens + at;
      Token* out = row;
      int64_t* bound = bounds + 6 * doc;
      for (int i = 0; i < 6; ++i) bound[i] = size;
      for (const int64_t item : layout(plan.mode)) {
        if (item >= 0) {
          *out++ = static_cast<Token>(item);
          continue;
        }
        const Piece& piece = plan.pieces[-1 - item];
        const int32_t* fresh = store + piece.store;
        bound[2 * (-1 - item)] = out - row;
        out = std::copy(fresh, fresh + piece.head_size, out);
        out = std::copy(tokens_ + in_cu_[doc] + piece.begin, tokens_ + in_cu_[doc] + piece.end, out);
        out = std::copy(fresh + piece.head_size, fresh + piece.head_size + piece.tail_size, out);
        bound[2 * (-1 - item) + 1] = out - row;
      }
      const bool rearranged = plan.mode == FimMode::kPsm || plan.mode == FimMode::kSpm;
      if (size > 0) {
        // The target before the middle's first token is that token; a row's first token is nobody's target.
        const int64_t trained = rearranged && !options_.train_context ? std::max<int64_t>(bound[2] - 1, 0) : 0;
        std::fill(targets + at, targets + at + trained, static_cast<Token>(kIgnore));
        std::copy(row + trained + 1, row + size, targets + at + trained);
        targets[at + size - 1] = static_cast<Token>(kIgnore);
        std::iota(positions + at, positions + at + size, Token{0});
      }
      if (middle_left != nullptr) {
        Token* left = middle_left + at;
        std::fill(left, left + size, Token{-1});
        for (int64_t i = rearranged ? std::max<int64_t>(bound[2] - 1, 0) : size; i < std::min(bound[3], size); ++i) {
          left[i] = static_cast<Token>(bound[3] - 1 - i);
        }
      }
      mode[doc] = plan.mode;
      cuts[2 * doc] = plan.begin;
      cuts[2 * doc + 1] = plan.end;
    }
  });
}

template class FimRows<int32_t>;
template class FimRows<int64_t>;

}  // namespace fastsft
