#include "fastsft/jsonl.h"

#include <string>
#include <vector>

#include "check.h"
#include "fastsft/common.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

struct Found {
  std::vector<int64_t> lines, offsets;
  std::vector<uint8_t> status;
  std::string text;
};

// In buffers of exactly the sizes that the contract names, so that a sanitizer sees a byte too many.
Found find(const std::string& line, const JsonlFields& fields) {
  const std::vector<uint8_t> data(line.begin(), line.end());
  const int64_t size = static_cast<int64_t>(data.size()), n = jsonl_count(data.data(), size);
  Found found;
  found.lines.resize(n + 1);
  found.status.resize(n);
  found.offsets.resize(n * fields.wanted.size() + 1);
  std::vector<uint8_t> text(size);
  const int64_t used = jsonl_fields(data.data(), size, fields, found.lines.data(), found.status.data(), text.data(),
                                    found.offsets.data());
  found.text.assign(text.begin(), text.begin() + used);
  return found;
}

}  // namespace

TEST(fields_by_hand) {
  const JsonlFields fields{{"a", "b"}, {"no"}, "|"};
  const Found found =
      find("{\"b\":\"2\\n\",\"a\":\"\\u00e9\"}\n\n{\"a\":\"1\"}\n{\"a\":\"x\",\"b\":\"\",\"no\":0}", fields);
  CHECK((found.status == std::vector<uint8_t>{0, 2, 1, 1}));
  CHECK(found.text == "\xC3\xA9|2\n");
  CHECK((found.offsets == std::vector<int64_t>{0, 3, 5, 5, 5, 5, 5, 5, 5}));
  CHECK(find("", fields).offsets == std::vector<int64_t>{0});
  CHECK_THROWS(find("{}", {{}, {}, ""}), Error);
  CHECK_THROWS(find("{}", {{"a"}, {"a"}, ""}), Error);
}

// A short field stands before a long one that is wanted first: what is written overtakes what is read.
TEST(order_and_room) {
  for (const Isa isa : available_isas()) {
    set_isa(isa);
    for (int size = 0; size < 300; ++size) {
      const std::string first(size, 'x'), line = "{\"b\":\"y\\\"\",\"a\":\"" + first + "\"}";
      for (const char* end : {"", "\n"}) {
        const Found found = find(line + end, {{"a", "b"}, {}, ""});
        CHECK(found.status[0] == 0 && found.text == first + "y\"");
      }
    }
  }
}

TEST(every_prefix_is_undecided) {
  const std::string line = "{\"x\":[1.5e3,{\"y\":[null,true]}],\"a\":\"\\ud83d\\ude00 text \xE2\x82\xAC\"}";
  for (const Isa isa : available_isas()) {
    set_isa(isa);
    CHECK(find(line, {{"a"}, {}, ""}).status[0] == 0);
    for (std::size_t size = 1; size < line.size(); ++size) {
      CHECK(find(line.substr(0, size), {{"a"}, {}, ""}).status[0] == 1);
    }
  }
}

TEST(threads_agree) {
  std::string data;
  for (int i = 0; i < 20000; ++i) {
    data += i % 7 == 0 ? "{broken\n" : "{\"a\":\"" + std::string(i % 97, 'x') + "\\n" + std::to_string(i) + "\"}\n";
  }
  set_num_threads(1);
  const Found one = find(data, {{"a"}, {}, ""});
  set_num_threads(4);
  const Found four = find(data, {{"a"}, {}, ""});
  CHECK(one.text == four.text && one.offsets == four.offsets && one.status == four.status);
}

TEST_MAIN()
