// Documents to training rows in one pass: fill-in-the-middle by any format, between tokens or between characters, with
// targets, positions and the number of middle tokens that are left.
//
// Between characters, the ids of each piece are those that the tokenizer gives the piece by itself. Only what lies
// between a cut and the nearest place where two pretokens surely meet is encoded anew (bpe.h); beyond it the document's
// own ids stand.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "fastsft/bpe.h"
#include "fastsft/code_spans.h"
#include "fastsft/fim.h"

namespace fastsft {

// Where a document may be cut. kToken: between any two tokens. kCharacter: between any two characters. kLine: where a
// line begins, and at the end. kSyntax: the middle is a span of code_spans.h, each as likely as the others, or as for
// kCharacter where there is none.
enum class FimUnit : int8_t { kToken = 0, kCharacter = 1, kLine = 2, kSyntax = 3 };

// In a layout, in place of a token id: where a piece of the document goes. Each must be there once.
inline constexpr int64_t kFimPrefix = -1, kFimMiddle = -2, kFimSuffix = -3;

struct FimRowOptions {
  uint64_t seed = 0;
  double rate = 0.5, spm_rate = 0.5;
  int64_t max_len = -1;  // a row that would be longer keeps its order; -1: no limit
  FimUnit unit = FimUnit::kToken;
  bool train_context = true;      // false: in a rearranged row the middle and what follows it are targets, no more
  std::vector<int64_t> plain;     // a document left as it is: ids around kFimPrefix, its place
  std::vector<int64_t> psm, spm;  // ids and pieces in their order
};

// A document's pieces, as bytes [begin, end) of its text.
struct FimCut {
  FimMode mode;
  int64_t begin, end;
};

// What fim_cut_text keeps between calls, to save allocations.
struct FimScratch {
  CodeScanner scanner;
  std::vector<CodeSpan> spans;
};

// The pieces that (seed, doc_id) gives a text of whole characters; kToken is not for texts. Empty ones stay whole.
FimCut fim_cut_text(std::string_view text, uint64_t doc_id, const FimRowOptions& options, FimScratch& scratch);

// What a document became when its text needs the tokenizer itself: it stays as it is. Where an id of it is no plain
// piece of text its cut is -1, -1; the other reason is a pretoken of more than kMaxPretoken bytes.
inline constexpr FimMode kFimNotExact = static_cast<FimMode>(-1);

template <typename Token>
class FimRows {
 public:
  // tokens [T] and cu_seqlens [B + 1] as in fim_plan, doc_ids [B] or null, spans [B, 2] or null: the middle, in tokens
  // for kToken and in bytes of the text otherwise, instead of what is drawn. `encoder`: null for kToken alone.
  // All must outlive the object. Throws Error as fim_plan does, and for a layout with a piece missing or twice.
  FimRows(const Token* tokens, const int64_t* cu_seqlens, int64_t num_docs, int64_t num_tokens,
          const FimRowOptions& options, const int64_t* doc_ids, const int64_t* spans, const ByteBpe* encoder);

  int64_t num_tokens() const { return cu_seqlens_.back(); }
  const std::vector<int64_t>& cu_seqlens() const { return cu_seqlens_; }
  // Code points whose class the encoder lacks, ascending: the documents that hold them are kFimNotExact.
  const std::vector<uint32_t>& unknown() const { return unknown_; }

  // tokens, targets, positions [num_tokens()]; targets are the next token of the row, -100 where nothing is trained.
  // middle_left, or null: at each position, how many tokens of the middle come after it, for the middle and the
  // position before it, -1 elsewhere. mode [B]; cuts [B, 2]: begin and end of the middle in tokens or bytes; bounds
  // [B, 6]: begin and end of prefix, middle and suffix within the row. No output may alias an input.
  void write(Token* tokens, Token* targets, Token* positions, Token* middle_left, FimMode* mode, int64_t* cuts,
             int64_t* bounds) const;

 private:
  // One piece of a document: tokens encoded anew, the document's own [begin, end), tokens encoded anew.
  struct Piece {
    int32_t head_size = 0, tail_size = 0;  // in the task's store, from `store` on
    int64_t store = 0, begin = 0, end = 0;
    int64_t size() const { return head_size + (end - begin) + tail_size; }
  };
  struct Plan {
    FimMode mode = FimMode::kNone;
    int64_t begin = 0, end = 0;  // the cut
    Piece pieces[3];             // prefix, middle, suffix
  };
  struct Task;  // scratch of one range of documents

  void plan(int64_t doc, Task& task, std::vector<int32_t>& store);
  bool encode_pieces(Plan& plan, std::string_view text, const std::vector<int64_t>& starts, Task& task,
                     std::vector<int32_t>& store) const;
  const std::vector<int64_t>& layout(FimMode mode) const;

  const Token* tokens_;
  const int64_t* in_cu_;
  FimRowOptions options_;
  const int64_t* doc_ids_;
  const int64_t* spans_;
  const ByteBpe* encoder_;
  std::vector<Plan> plans_;
  std::vector<std::vector<int32_t>> stores_;  // one per task
  std::vector<int64_t> cu_seqlens_;
  std::vector<uint32_t> unknown_;
};

extern template class FimRows<int32_t>;
extern template class FimRows<int64_t>;

}  // namespace fastsft
