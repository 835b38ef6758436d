// One pass over the bytes with a switch per byte, about 1 ns each; then a pass over the lines.
#include "fastsft/code_spans.h"

#include <algorithm>
#include <array>

namespace fastsft {
namespace {

bool letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || (c & 0x80);
}

bool blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\f'; }

// The word that ends before text[end]; empty if none does.
std::string_view word_before(std::string_view text, std::size_t begin, std::size_t end) {
  std::size_t at = end;
  while (at > begin && letter(text[at - 1])) --at;
  return text.substr(at, end - at);
}

template <std::size_t N>
bool among(std::string_view word, const std::array<std::string_view, N>& words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

int kind_of_bracket(char c) { return c == '(' || c == ')' ? 0 : c == '[' || c == ']' ? 1 : 2; }

// Words behind which a square bracket opens a list and no subscript.
constexpr std::array<std::string_view, 17> kBeforeList = {"return", "in",     "and",   "or",     "not",  "if",
                                                          "else",   "elif",   "yield", "assert", "for",  "while",
                                                          "is",     "lambda", "del",   "case",   "await"};

// Whether a square bracket at text[at] subscripts what stands before it.
bool subscripts(std::string_view text, std::size_t begin, std::size_t at) {
  while (at > begin && blank(text[at - 1])) --at;
  if (at == begin) return false;
  const char before = text[at - 1];
  if (before == ')' || before == ']' || before == '}' || before == '"' || before == '\'') return true;
  return letter(before) && !among(word_before(text, begin, at), kBeforeList);
}

}  // namespace

CodeScanner::Kind CodeScanner::kind_of(std::string_view statement) {
  if (statement[0] == '@') return Kind::kDecorator;
  std::size_t size = 0;
  while (size < statement.size() && letter(statement[size])) ++size;
  std::string_view word = statement.substr(0, size);
  if (word == "async") {
    std::size_t next = size;
    while (next < statement.size() && blank(statement[next])) ++next;
    size = next;
    while (size < statement.size() && letter(statement[size])) ++size;
    word = statement.substr(next, size - next);
  }
  constexpr std::array<std::string_view, 2> kDefinitions = {"def", "class"};
  constexpr std::array<std::string_view, 5> kOpenings = {"if", "for", "while", "try", "with"};
  constexpr std::array<std::string_view, 4> kClauses = {"elif", "else", "except", "finally"};
  if (among(word, kDefinitions)) return Kind::kDefinition;
  if (among(word, kOpenings)) return Kind::kOpening;
  return among(word, kClauses) ? Kind::kClause : Kind::kSimple;
}

void CodeScanner::lines(std::string_view text, std::vector<CodeSpan>& spans) {
  lines_.clear();
  open_.clear();
  const std::size_t size = text.size();
  std::size_t at = 0, begin = 0, end = 0, line = 0;  // of the statement; `begin` == `end`: none has begun
  bool started = false;
  int64_t opened[3] = {};  // of each kind, in open_
  const auto finish = [&] {
    if (started) {
      int64_t indent = 0;
      for (std::size_t i = line; i < size && (text[i] == ' ' || text[i] == '\t'); ++i) {
        indent = text[i] == '\t' ? (indent / 8 + 1) * 8 : indent + 1;
      }
      lines_.push_back({static_cast<int64_t>(begin), static_cast<int64_t>(end), indent,
                        kind_of(text.substr(begin, end - begin)), text[end - 1] == ':'});
    }
    started = false;
  };
  while (at < size) {
    const char c = text[at];
    if (c == '\n') {
      ++at;
      if (open_.empty()) {
        finish();
        line = at;
      }
      continue;
    }
    if (blank(c)) {
      ++at;
      continue;
    }
    if (c == '#') {
      at = std::min(text.find('\n', at), size);
      continue;
    }
    if (c == '\\' && (text.substr(at + 1, 1) == "\n" || text.substr(at + 1, 2) == "\r\n")) {  // joins lines
      at += text[at + 1] == '\n' ? 2 : 3;
      continue;
    }
    if (c == ';' && open_.empty()) {
      finish();
      ++at;
      continue;
    }
    if (!started) {
      started = true;
      begin = at;
    }
    if (c == '"' || c == '\'') {
      const bool triple = at + 2 < size && text[at + 1] == c && text[at + 2] == c;
      at += triple ? 3 : 1;
      while (at < size) {
        if (text[at] == '\\') {
          at += 2;
        } else if (text[at] == c && (!triple || (at + 2 < size && text[at + 1] == c && text[at + 2] == c))) {
          at += triple ? 3 : 1;
          break;
        } else if (text[at] == '\n' && !triple) {
          break;  // not closed: the line ends it
        } else {
          ++at;
        }
      }
      end = at = std::min(at, size);
      continue;
    }
    if (c == '(' || c == '[' || c == '{') {
      const bool imported =
          c == '(' && text.substr(begin, 5) == "from " && word_before(text, begin, at - 1) == "import";
      open_.push_back({static_cast<int64_t>(at), !imported && !(c == '[' && subscripts(text, begin, at))});
      ++opened[kind_of_bracket(c)];
    } else if ((c == ')' || c == ']' || c == '}') && opened[kind_of_bracket(c)] > 0) {
      // What was opened since and never closed, in another language's comment perhaps, is no pair of brackets.
      const auto kind = kind_of_bracket(c);
      Open last;
      do {
        last = open_.back();
        open_.pop_back();
        --opened[kind_of_bracket(text[static_cast<std::size_t>(last.at)])];
      } while (kind_of_bracket(text[static_cast<std::size_t>(last.at)]) != kind);
      if (last.node) spans.push_back({last.at, static_cast<int64_t>(at) + 1});
    }
    if (letter(c)) {
      while (at < size && letter(text[at])) ++at;
    } else {
      ++at;
    }
    end = at;
  }
  finish();
}

// The statements from lines_[first] on that are indented by more than `indent`; returns the line behind them.
std::size_t CodeScanner::statements(std::size_t first, int64_t indent, std::vector<CodeSpan>& spans) {
  std::size_t at = first;
  int64_t decorated = -1;  // where the decorators of the next definition begin
  int64_t opening = -1;    // where the compound statement of the next clause began
  std::size_t opening_span = 0;
  int64_t opening_indent = 0;
  while (at < lines_.size() && lines_[at].indent > indent) {
    const Line& head = lines_[at];
    ++at;
    int64_t end = head.end;
    if (head.heads_block && at < lines_.size() && lines_[at].indent > head.indent) {
      const std::size_t body = at;
      at = statements(body, head.indent, spans);
      end = lines_[at - 1].end;
      spans.push_back({lines_[body].begin, end});
    }
    if (head.kind == Kind::kClause && opening >= 0 && head.indent == opening_indent) {
      spans[opening_span].end = end;  // the statement goes on
      spans.push_back({head.begin, end});
      continue;
    }
    opening = -1;
    if (head.kind == Kind::kOpening) {
      opening = head.begin;
      opening_span = spans.size();
      opening_indent = head.indent;
    }
    spans.push_back({head.begin, end});
    if (head.kind == Kind::kDecorator) {
      if (decorated < 0) decorated = head.begin;
      continue;
    }
    if (decorated >= 0 && head.kind == Kind::kDefinition) spans.push_back({decorated, end});
    decorated = -1;
  }
  return at;
}

void CodeScanner::scan(std::string_view text, std::vector<CodeSpan>& spans) {
  spans.clear();
  lines(text, spans);
  statements(0, -1, spans);
}

}  // namespace fastsft
