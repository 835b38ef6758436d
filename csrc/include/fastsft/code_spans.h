// Where Python source has statements, blocks and brackets, found by one scan of its bytes: the spans that
// structure-aware fill-in-the-middle takes out (arXiv 2506.00204), without a parser.
//
// A span is one of: a simple statement; a compound statement with its clauses (if ... elif ... else), from its first
// keyword, or from its first decorator, to its last statement; a clause; a decorator; the block of statements that one
// indentation makes; a pair of brackets with what is between, unless it is a subscript or a list of imported names. Any
// text has spans: what is no Python is lines and brackets, each closed by the next of its kind (quotes are
// Python's: a lone one, such as a lifetime's in Rust, hides the rest of its line). Spans nest or are
// apart.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace fastsft {

struct CodeSpan {
  int64_t begin, end;  // bytes
};

// Replaces `spans`; equal spans appear once for each reason. The order is by where the scan ends them.
class CodeScanner {
 public:
  void scan(std::string_view text, std::vector<CodeSpan>& spans);

 private:
  enum class Kind : uint8_t { kSimple, kDecorator, kDefinition, kOpening, kClause };

  // A statement, or the part of one before its block.
  struct Line {
    int64_t begin, end, indent;
    Kind kind;
    bool heads_block;
  };
  struct Open {
    int64_t at;
    bool node;
  };

  void lines(std::string_view text, std::vector<CodeSpan>& spans);
  static Kind kind_of(std::string_view statement);
  std::size_t statements(std::size_t first, int64_t indent, std::vector<CodeSpan>& spans);

  std::vector<Line> lines_;
  std::vector<Open> open_;
};

}  // namespace fastsft
