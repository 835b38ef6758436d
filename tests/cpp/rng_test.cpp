#include "fastsft/rng.h"

#include <set>

#include "check.h"

using namespace fastsft;

namespace {

bool equals(const Philox4& got, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return got.x[0] == a && got.x[1] == b && got.x[2] == c && got.x[3] == d;
}

}  // namespace

// The vectors that the authors of Philox publish with Random123 (philox4x32-10).
TEST(known_answers) {
  CHECK(equals(philox(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  CHECK(equals(philox(~0ull, ~0ull, ~0ull), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  // counter and key from the digits of pi, low words first
  CHECK(equals(philox(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88), 0xd16cfe09, 0x94fdcceb, 0x5001e420,
               0x24126ea1));
}

TEST(uniform_open_is_never_zero_or_one) {
  CHECK(uniform_open(0) > 0.0f);
  CHECK(uniform_open(0xFFFFFFFFu) < 1.0f);
  for (uint32_t low : {0u, 1u, 0x7FFFFFFFu, 0xFFFFFE00u}) {
    CHECK(uniform_open(low) > 0.0f && uniform_open(low) < 1.0f);
    CHECK(uniform_open(low) + uniform_open(~low) == 1.0f);  // symmetric cells
  }
}

TEST(uniform_below_covers_its_range) {
  CHECK(uniform_below(0, 7) == 0);
  CHECK(uniform_below(0xFFFFFFFFu, 7) == 6);
  CHECK(uniform_below(0xFFFFFFFFu, 1) == 0);
  std::set<uint32_t> seen;
  for (uint64_t i = 0; i < 200; ++i) seen.insert(uniform_below(philox(1, 2, i).x[0], 7));
  CHECK(seen.size() == 7);
}

TEST_MAIN()
