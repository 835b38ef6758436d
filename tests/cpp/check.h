// A test is a function registered by TEST(name) { ... }; CHECK and CHECK_THROWS report file and line and go on.
#pragma once

#include <cstdio>
#include <exception>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int n = 0;
  return n;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline int run_all() {
  int failed = 0;
  for (const Case& c : cases()) {
    const int before = failures();
    try {
      c.run();
    } catch (const std::exception& e) {
      std::printf("%s: unexpected exception: %s\n", c.name, e.what());
      ++failures();
    }
    if (failures() != before) {
      std::printf("FAILED %s\n", c.name);
      ++failed;
    }
  }
  std::printf("%zu passed, %d failed\n", cases().size() - failed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::printf("%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      ++check::failures();                                               \
    }                                                                    \
  } while (0)

#define CHECK_THROWS(expression, type)                                                     \
  do {                                                                                     \
    bool thrown = false;                                                                   \
    try {                                                                                  \
      (void)(expression);                                                                  \
    } catch (const type&) {                                                                \
      thrown = true;                                                                       \
    }                                                                                      \
    if (!thrown) {                                                                         \
      std::printf("%s:%d: %s did not throw %s\n", __FILE__, __LINE__, #expression, #type); \
      ++check::failures();                                                                 \
    }                                                                                      \
  } while (0)

#define TEST_MAIN() \
  int main() { return check::run_all(); }
