#include "fastsft/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "fastsft/common.h"

using namespace fastsft;

TEST(covers_every_item_once) {
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int64_t n : {0, 1, 7, 1000}) {
      std::vector<std::atomic<int>> hits(n);
      parallel_for(n, 3, [&](int64_t begin, int64_t end) {
        CHECK(end - begin <= 3);
        for (int64_t i = begin; i < end; ++i) ++hits[i];
      });
      for (auto& h : hits) CHECK(h == 1);
    }
  }
}

TEST(nested_calls_run_serially) {
  set_num_threads(4);
  std::atomic<int64_t> sum{0};
  parallel_for(8, 1,
               [&](int64_t, int64_t) { parallel_for(10, 1, [&](int64_t begin, int64_t end) { sum += end - begin; }); });
  CHECK(sum == 80);
}

TEST(exceptions_reach_the_caller_and_leave_the_pool_usable) {
  set_num_threads(3);
  CHECK_THROWS(parallel_for(100, 1,
                            [](int64_t begin, int64_t) {
                              if (begin == 42) throw std::runtime_error("42");
                            }),
               std::runtime_error);
  std::atomic<int> count{0};
  parallel_for(100, 1, [&](int64_t, int64_t) { ++count; });
  CHECK(count == 100);
  CHECK_THROWS(set_num_threads(0), Error);
}

TEST(callers_from_several_threads) {
  set_num_threads(3);
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        parallel_for(50, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
      }
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(sum == 4 * 200 * 50);
}

TEST(loops_of_a_team_follow_each_other) {
  for (int threads : {1, 2, 3, 9}) {  // more than the machine has, too
    set_num_threads(threads);
    std::vector<int64_t> values(100, 0);
    with_team([&] {
      for (int round = 0; round < 500; ++round) {
        parallel_for(100, 1 + round % 40, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) values[i] += round;  // a race if a range ran twice or too late
        });
        for (int64_t v : values) CHECK(v == int64_t{round} * (round + 1) / 2);
      }
    });
  }
}

TEST(a_team_nests_and_survives_exceptions) {
  set_num_threads(3);
  CHECK_THROWS(with_team([] {
                 parallel_for(50, 1, [](int64_t begin, int64_t) {
                   if (begin == 20) throw std::runtime_error("20");
                 });
               }),
               std::runtime_error);
  CHECK_THROWS(with_team([] { throw std::runtime_error("outside a loop"); }), std::runtime_error);
  std::atomic<int> count{0};
  with_team([&] {
    CHECK_THROWS(parallel_for(9, 1, [](int64_t, int64_t) { throw std::runtime_error("each"); }), std::runtime_error);
    with_team([&] { parallel_for(100, 1, [&](int64_t, int64_t) { ++count; }); });
    parallel_for(10, 1, [&](int64_t, int64_t) { parallel_for(10, 1, [&](int64_t, int64_t) { ++count; }); });
  });
  CHECK(count == 200);
  parallel_for(100, 1, [&](int64_t, int64_t) { ++count; });
  CHECK(count == 300);
}

TEST(a_forked_child_can_use_the_pool) {
  unsetenv("FASTSFT_NUM_THREADS");  // it would set the child's number too
  set_num_threads(4);
  parallel_for(100, 1, [](int64_t, int64_t) {});
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);  // a hang becomes a failure
    bool ok = num_threads() == 1;
    set_num_threads(3);
    std::atomic<int> count{0};
    parallel_for(100, 1, [&](int64_t, int64_t) { ++count; });
    _exit(ok && count == 100 ? 0 : 1);
  }
  int status = -1;
  waitpid(pid, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_MAIN()
