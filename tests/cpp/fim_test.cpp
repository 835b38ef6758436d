#include "fastsft/fim.h"

#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

struct Result {
  std::vector<int32_t> tokens;
  std::vector<int64_t> cu, source, cuts;
  std::vector<FimMode> mode;
};

Result run(const std::vector<int64_t>& cu, const FimOptions& options, const int64_t* spans = nullptr) {
  const int64_t docs = static_cast<int64_t>(cu.size()) - 1, total = cu.back();
  std::vector<int32_t> tokens(total);
  for (int64_t i = 0; i < total; ++i) tokens[i] = static_cast<int32_t>(1000 + i);
  Result r{{}, std::vector<int64_t>(docs + 1), {}, std::vector<int64_t>(2 * docs), std::vector<FimMode>(docs)};
  const int64_t n =
      fim_plan(cu.data(), docs, total, options, nullptr, spans, r.mode.data(), r.cuts.data(), r.cu.data());
  r.tokens.resize(n);
  r.source.resize(n);
  const int32_t sentinels[3] = {1, 2, 3};
  fim_copy(tokens.data(), cu.data(), docs, r.mode.data(), r.cuts.data(), r.cu.data(), sentinels, r.tokens.data(),
           r.source.data());
  return r;
}

}  // namespace

TEST(layouts) {
  const int64_t span[2] = {1, 3};
  const Result psm = run({0, 5}, {.seed = 0, .rate = 1.0, .spm_rate = 0.0}, span);
  CHECK((psm.tokens == std::vector<int32_t>{1, 1000, 2, 1003, 1004, 3, 1001, 1002}));
  CHECK((psm.source == std::vector<int64_t>{-1, 0, -1, 3, 4, -1, 1, 2}));
  const Result spm = run({0, 5}, {.seed = 0, .rate = 1.0, .spm_rate = 1.0}, span);
  CHECK((spm.tokens == std::vector<int32_t>{1, 2, 1003, 1004, 3, 1000, 1001, 1002}));
  const Result none = run({0, 5}, {.seed = 0, .rate = 0.0});
  CHECK((none.source == std::vector<int64_t>{0, 1, 2, 3, 4}));
}

TEST(empty_and_long_documents_stay) {
  const Result r = run({0, 0, 5, 6, 6}, {.seed = 9, .rate = 1.0, .spm_rate = 0.5, .max_len = 7});
  CHECK(r.mode[0] == FimMode::kNone && r.mode[3] == FimMode::kNone);
  CHECK(r.mode[1] == FimMode::kNone);  // 5 + 3 > 7
  CHECK(r.mode[2] != FimMode::kNone);
  CHECK((r.cu == std::vector<int64_t>{0, 0, 5, 9, 9}));
  CHECK(run({0}, {}).tokens.empty());
}

TEST(threads_do_not_matter) {
  std::vector<int64_t> cu{0};
  for (int64_t b = 0; b < 1000; ++b) cu.push_back(cu.back() + b % 37);
  set_num_threads(1);
  const Result one = run(cu, {.seed = 5});
  set_num_threads(4);
  const Result four = run(cu, {.seed = 5});
  CHECK(one.tokens == four.tokens && one.source == four.source && one.mode == four.mode);
}

TEST(wrong_arguments) {
  const int64_t outside[2] = {1, 6}, reversed[2] = {3, 2};
  CHECK_THROWS(run({0, 5}, {}, outside), Error);
  CHECK_THROWS(run({0, 5}, {}, reversed), Error);
  CHECK_THROWS(run({1, 5}, {}), Error);
  CHECK_THROWS(run({0, 5, 3, 6}, {}), Error);
  CHECK_THROWS(run({0, 5}, {.rate = 1.5}), Error);
  CHECK_THROWS(run({0, 5}, {.spm_rate = -0.1}), Error);
}

TEST_MAIN()
