// csrc/cuda/fim.cu in the emulator: bit for bit the CPU's result.
#include "fastsft/fim.h"

#include <numeric>
#include <vector>

#include "check.h"

using namespace fastsft;

namespace {

template <typename Token>
struct Result {
  std::vector<FimMode> mode;
  std::vector<int64_t> cuts, cu, source;
  std::vector<Token> tokens;
  bool operator==(const Result&) const = default;
};

struct Batch {
  std::vector<int64_t> cu{0}, ids, spans;
  int64_t docs() const { return static_cast<int64_t>(cu.size()) - 1; }
};

template <typename Token>
Result<Token> run(const Batch& batch, const FimOptions& options, bool on_cuda) {
  const int64_t docs = batch.docs(), total = batch.cu.back();
  const int64_t *ids = batch.ids.empty() ? nullptr : batch.ids.data(),
                *spans = batch.spans.empty() ? nullptr : batch.spans.data();
  std::vector<Token> tokens(total);
  std::iota(tokens.begin(), tokens.end(), Token{1000});
  const Token sentinels[3] = {1, 2, 3};
  Result<Token> r{std::vector<FimMode>(docs), std::vector<int64_t>(2 * docs), std::vector<int64_t>(docs + 1), {}, {}};
  if (on_cuda) {
    int32_t broken = 0;
    std::vector<int64_t> lengths(docs, -1);
    cuda::fim_plan(batch.cu.data(), docs, total, options, ids, spans, r.mode.data(), r.cuts.data(), lengths.data(),
                   &broken, nullptr);
    CHECK(broken == 0);
    std::partial_sum(lengths.begin(), lengths.end(), r.cu.begin() + 1);
  } else {
    fim_plan(batch.cu.data(), docs, total, options, ids, spans, r.mode.data(), r.cuts.data(), r.cu.data());
  }
  r.tokens.assign(r.cu.back(), -5);
  r.source.assign(r.cu.back(), -5);
  if (on_cuda) {
    cuda::fim_copy(tokens.data(), batch.cu.data(), docs, r.mode.data(), r.cuts.data(), r.cu.data(), r.cu.back(),
                   sentinels, r.tokens.data(), r.source.data(), nullptr);
  } else {
    fim_copy(tokens.data(), batch.cu.data(), docs, r.mode.data(), r.cuts.data(), r.cu.data(), sentinels,
             r.tokens.data(), r.source.data());
  }
  return r;
}

Batch make(int docs, int longest) {
  Batch batch;
  for (int b = 0; b < docs; ++b) batch.cu.push_back(batch.cu.back() + (b % 5 == 2 ? 0 : b * 7 % (longest + 1)));
  return batch;
}

void compare(const Batch& batch, const FimOptions& options) {
  CHECK(run<int32_t>(batch, options, true) == run<int32_t>(batch, options, false));
  CHECK(run<int64_t>(batch, options, true) == run<int64_t>(batch, options, false));
}

}  // namespace

TEST(bits_of_the_cpu) {
  for (const FimOptions& options :
       {FimOptions{.seed = 5}, FimOptions{.seed = uint64_t{1} << 62, .rate = 1.0, .spm_rate = 0.0},
        FimOptions{.rate = 1.0, .spm_rate = 1.0}, FimOptions{.rate = 0.0}, FimOptions{.rate = 0.9, .max_len = 20}}) {
    compare(make(0, 0), options);
    compare(make(1, 0), options);
    compare(make(300, 40), options);
    compare(make(7, 5), options);
  }
  Batch lengthy;
  lengthy.cu = {0, 0, 0, 5000, 5001, 5001, 9000, 9000};
  compare(lengthy, {.seed = 3, .rate = 1.0});
}

TEST(ids_and_spans) {
  Batch batch = make(100, 40);
  for (int64_t b = 0; b < batch.docs(); ++b) {
    const int64_t length = batch.cu[b + 1] - batch.cu[b];
    batch.ids.push_back(b * 1'000'000'007 - 50);
    batch.spans.push_back(length / 3);
    batch.spans.push_back(length / 3 + length / 2);
  }
  compare(batch, {.seed = 1, .rate = 0.8});
}

TEST(broken_input_is_flagged) {
  const auto flagged = [](Batch batch, int64_t total) {
    const int64_t docs = batch.docs();
    std::vector<FimMode> mode(docs);
    std::vector<int64_t> cuts(2 * docs), lengths(docs);
    int32_t broken = 0;
    cuda::fim_plan(batch.cu.data(), docs, total, {}, nullptr, batch.spans.empty() ? nullptr : batch.spans.data(),
                   mode.data(), cuts.data(), lengths.data(), &broken, nullptr);
    return broken != 0;
  };
  const auto offsets = [](std::vector<int64_t> cu) { return Batch{std::move(cu), {}, {}}; };
  CHECK(!flagged(offsets({0, 2, 5}), 5));
  CHECK(flagged(offsets({1, 2, 5}), 5));
  CHECK(flagged(offsets({0, 2, 5}), 6));
  CHECK(flagged(offsets({0, 3, 2, 5}), 5));
  CHECK(flagged(offsets({0, int64_t{1} << 33}), int64_t{1} << 33));
  CHECK(!flagged({{0, 4}, {}, {1, 4}}, 4));
  CHECK(flagged({{0, 4}, {}, {1, 5}}, 4));
  CHECK(flagged({{0, 4}, {}, {3, 2}}, 4));
  CHECK(flagged({{0, 4}, {}, {-1, 2}}, 4));
}

TEST_MAIN()
