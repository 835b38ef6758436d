// Fill-in-the-middle with targets and positions, and the byte-level encoder that cuts between characters need.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fastsft/bpe.h"
#include "fastsft/bpe_texts.h"
#include "fastsft/fim_rows.h"
#include "tensor_view.h"
#include "text_views.h"

namespace fastsft::bindings {
namespace {

std::unique_ptr<ByteBpe> make_encoder(const std::vector<py::bytes>& token_bytes, py::handle merges, py::handle classes,
                                      bool gpt4, int32_t max_digits, bool digits_apart, bool ignore_merges) {
  Check check("ByteBpe");
  const auto* pairs = check.in<int32_t>("merges", merges, "M 3");
  const auto* table = check.in<uint8_t>("classes", classes, "C");
  check.require(check.size("C") == kCodePoints, "classes", "an entry for every code point",
                view_of(classes).describe());
  const BpeSplit split{gpt4 ? BpePattern::kGpt4 : BpePattern::kGpt2, max_digits, digits_apart, ignore_merges};
  return std::make_unique<ByteBpe>(std::vector<std::string>(token_bytes.begin(), token_bytes.end()), pairs,
                                   check.size("M"), table, split);
}

std::unique_ptr<BpeTexts> encode_texts(const ByteBpe& encoder, py::handle texts) {
  const std::vector<std::string_view> views = text_views("ByteBpe", texts, py::none());
  py::gil_scoped_release release;
  return std::make_unique<BpeTexts>(encoder, views);
}

void write_texts(const BpeTexts& self, py::handle ids, py::handle cu_seqlens, py::handle exact) {
  Check check("ByteBpe");
  auto* out = check.in<int32_t>("ids", ids, "T");
  auto* cu = check.in<int64_t>("cu_seqlens", cu_seqlens, "B+1");
  auto* whole = check.in<uint8_t>("exact", exact, "B");
  check.require(check.size("T") == self.num_tokens(), "ids", std::to_string(self.num_tokens()) + " tokens",
                std::to_string(check.size("T")));
  check.require(check.size("B") == self.num_texts(), "exact", "one per text", std::to_string(check.size("B")));
  py::gil_scoped_release release;
  self.write(out, cu, whole);
}

template <typename Token>
struct Rows {
  FimRows<Token> rows;

  static std::unique_ptr<Rows> make(py::handle tokens, py::handle cu_seqlens, py::handle doc_ids, py::handle spans,
                                    const FimRowOptions& options, py::handle encoder) {
    Check check("fim_rows");
    const ByteBpe* bpe = encoder.is_none() ? nullptr : encoder.cast<const ByteBpe*>();
    const auto* in = check.in<Token>("tokens", tokens, "T");
    const auto* cu = check.in<int64_t>("cu_seqlens", cu_seqlens, "B+1");
    const auto* ids = check.optional<int64_t>("doc_ids", doc_ids, "B");
    const auto* middles = check.optional<int64_t>("spans", spans, "B 2");
    check.require(!check.on_cuda(), "tokens", "a CPU tensor", view_of(tokens).describe());
    const int64_t docs = check.size("B"), size = check.size("T");
    py::gil_scoped_release release;
    return std::unique_ptr<Rows>(new Rows{{in, cu, docs, size, options, ids, middles, bpe}});
  }

  void write(py::handle tokens, py::handle targets, py::handle positions, py::handle middle_left, py::handle mode,
             py::handle cuts, py::handle bounds) const {
    Check check("fim_rows");
    auto* out = check.in<Token>("tokens", tokens, "U");
    auto* next = check.in<Token>("targets", targets, "U");
    auto* places = check.in<Token>("position_ids", positions, "U");
    auto* left = check.optional<Token>("middle_left", middle_left, "U");
    auto* modes = reinterpret_cast<FimMode*>(check.in<int8_t>("mode", mode, "B"));
    auto* middles = check.in<int64_t>("cuts", cuts, "B 2");
    auto* pieces = check.in<int64_t>("bounds", bounds, "B 6");
    check.require(check.size("U") == rows.num_tokens(), "tokens", std::to_string(rows.num_tokens()) + " tokens",
                  std::to_string(check.size("U")));
    py::gil_scoped_release release;
    rows.write(out, next, places, left, modes, middles, pieces);
  }
};

template <typename Token>
void register_rows(py::module_& m, const char* name) {
  py::class_<Rows<Token>>(m, name, "The first pass of fim_rows: what becomes of each document.")
      .def(py::init(&Rows<Token>::make), py::arg("tokens"), py::arg("cu_seqlens"), py::arg("doc_ids"), py::arg("spans"),
           py::arg("options"), py::arg("encoder"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(),
           py::keep_alive<1, 4>(), py::keep_alive<1, 5>(), py::keep_alive<1, 7>())
      .def_property_readonly("cu_seqlens", [](const Rows<Token>& self) { return self.rows.cu_seqlens(); })
      .def_property_readonly("num_tokens", [](const Rows<Token>& self) { return self.rows.num_tokens(); })
      .def_property_readonly("unknown", [](const Rows<Token>& self) { return self.rows.unknown(); })
      .def("write", &Rows<Token>::write, py::arg("tokens"), py::arg("targets"), py::arg("position_ids"),
           py::arg("middle_left"), py::arg("mode"), py::arg("cuts"), py::arg("bounds"), "The second pass.");
}

// Fills mode and cuts, the middle's bytes in each text.
void cut_texts(const std::vector<py::bytes>& texts, py::handle doc_ids, const FimRowOptions& options, py::handle mode,
               py::handle cuts) {
  Check check("fim_cuts");
  auto* modes = check.in<int8_t>("mode", mode, "B");
  auto* middles = check.in<int64_t>("cuts", cuts, "B 2");
  const auto* ids = check.optional<int64_t>("doc_ids", doc_ids, "B");
  check.require(check.size("B") == static_cast<int64_t>(texts.size()), "mode", "one per text",
                view_of(mode).describe());
  const std::vector<std::string_view> views(texts.begin(), texts.end());  // `texts` keeps the bytes alive
  py::gil_scoped_release release;
  FimScratch scratch;
  for (std::size_t i = 0; i < views.size(); ++i) {
    const FimCut cut =
        fim_cut_text(views[i], static_cast<uint64_t>(ids ? ids[i] : static_cast<int64_t>(i)), options, scratch);
    modes[i] = static_cast<int8_t>(cut.mode);
    middles[2 * i] = cut.begin;
    middles[2 * i + 1] = cut.end;
  }
}

}  // namespace

void register_fim(py::module_& m) {
  py::class_<ByteBpe>(m, "ByteBpe", "A byte-level BPE vocabulary; see bpe.h.")
      .def(py::init(&make_encoder), py::arg("token_bytes"), py::arg("merges"), py::arg("classes"), py::arg("gpt4"),
           py::arg("max_digits"), py::arg("digits_apart"), py::arg("ignore_merges"), py::keep_alive<1, 4>());
  py::class_<BpeTexts>(m, "BpeTexts", "The ids of many texts; see bpe_texts.h.")
      .def(py::init(&encode_texts), py::arg("encoder"), py::arg("texts"))
      .def_property_readonly("num_tokens", &BpeTexts::num_tokens)
      .def_property_readonly("unknown", &BpeTexts::unknown)
      .def("write", &write_texts, py::arg("ids"), py::arg("cu_seqlens"), py::arg("exact"));
  py::class_<FimRowOptions>(m, "FimRowOptions")
      .def(py::init([](uint64_t seed, double rate, double spm_rate, int64_t max_len, int unit, bool train_context,
                       std::vector<int64_t> plain, std::vector<int64_t> psm, std::vector<int64_t> spm) {
             return FimRowOptions{seed,
                                  rate,
                                  spm_rate,
                                  max_len,
                                  static_cast<FimUnit>(unit),
                                  train_context,
                                  std::move(plain),
                                  std::move(psm),
                                  std::move(spm)};
           }),
           py::arg("seed"), py::arg("rate"), py::arg("spm_rate"), py::arg("max_len"), py::arg("unit"),
           py::arg("train_context"), py::arg("plain"), py::arg("psm"), py::arg("spm"));
  register_rows<int32_t>(m, "FimRowsInt32");
  register_rows<int64_t>(m, "FimRowsInt64");
  m.def(
      "code_spans",
      [](const py::bytes& text) {
        CodeScanner scanner;
        std::vector<CodeSpan> spans;
        scanner.scan(std::string_view(text), spans);
        std::vector<std::pair<int64_t, int64_t>> pairs;
        for (const CodeSpan& span : spans) pairs.emplace_back(span.begin, span.end);
        return pairs;
      },
      py::arg("text"), "Statements, blocks and brackets of Python source, as bytes [begin, end).");
  m.def("fim_cuts", &cut_texts, py::arg("texts"), py::arg("doc_ids"), py::arg("options"), py::arg("mode"),
        py::arg("cuts"), "Draws the mode and the middle, in bytes, of UTF-8 texts.");
}

}  // namespace fastsft::bindings
