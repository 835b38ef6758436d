#include "fastsft/digest.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

using namespace fastsft;

TEST(every_byte_and_the_length_count) {
  std::set<std::pair<uint64_t, uint64_t>> seen;
  std::vector<std::string> texts;
  for (int size = 0; size < 70; ++size) {
    texts.emplace_back(size, '\0');
    for (int at = 0; at < size; ++at) {
      texts.emplace_back(size, '\0');
      texts.back()[at] = 1;
    }
  }
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  std::vector<uint64_t> digests(2 * views.size());
  text_digests(views.data(), static_cast<int64_t>(views.size()), digests.data());
  std::set<uint64_t> halves;
  for (std::size_t i = 0; i < views.size(); ++i) {
    halves.insert(digests[2 * i]);
    halves.insert(digests[2 * i + 1]);
  }
  CHECK(halves.size() == 2 * views.size());
}

TEST_MAIN()
