#include "text_sets.h"

#include "fastsft/parallel.h"

namespace fastsft {

TextSets::TextSets(std::span<const std::string_view> texts, const ShingleOptions& options)
    : pieces_((texts.size() + kTextsPerPiece - 1) / kTextsPerPiece) {
  constexpr int64_t kGrain = kTextsPerPiece;
  parallel_for(static_cast<int64_t>(texts.size()), kGrain, [&](int64_t begin, int64_t end) {
    static thread_local Shingler<uint64_t> shingler;
    static thread_local ShingleTable table;
    Piece& piece = pieces_[begin / kGrain];
    for (int64_t i = begin; i < end; ++i) {
      piece.begins.push_back(piece.elements.size());
      piece.prints.push_back(append_distinct(texts[i], options, shingler, table, piece.elements));
    }
    shingler.release_if_large();
    if (table.large()) table = ShingleTable();
  });
}

DistinctSets::DistinctSets(std::span<const std::string_view> texts, const ShingleOptions& options)
    : all(texts, options) {
  PrintIndex index;
  for (std::size_t text = 0; text < texts.size(); ++text) {
    set_of.push_back(index.add(all.print(text)));
    if (set_of.back() == elements.size()) elements.push_back(all.elements(text));
  }
  prints = index.take();
}

}  // namespace fastsft
