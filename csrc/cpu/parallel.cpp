#include "fastsft/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "fastsft/common.h"
#include "host_team.h"

namespace fastsft {
namespace {

thread_local bool t_inside = false;

struct Job {
  detail::RangeFn fn;
  void* context;
  int64_t n;
  int64_t grain;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // written once, by the thread that sets `failed`

  void work() {
    t_inside = true;
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n || failed.load(std::memory_order_relaxed)) break;
      try {
        fn(context, begin, std::min(begin + grain, n));
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    t_inside = false;
  }
};

class Pool {
 public:
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { loop(); });
    } catch (...) {  // the process may not have more threads
      stop();
      throw;
    }
  }

  ~Pool() { stop(); }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++generation_;
      busy_ = static_cast<int>(workers_.size());
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void loop() {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        job = job_;
      }
      job->work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

int threads_from_environment() {
  const char* text = std::getenv("FASTSFT_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  FASTSFT_CHECK(*end == '\0' && n >= 1 && n <= 1024, "FASTSFT_NUM_THREADS: expected an integer in [1, 1024], got '",
                text, "'");
  return static_cast<int>(n);
}

int threads_from_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// Never destroyed at exit: workers may be inside a kernel while static destructors run. A forked child drops its copy
// without joining, since the workers exist only in the parent.
struct State {
  std::mutex use;  // held by the thread that is running a job
  Pool* pool = nullptr;
  HostTeam team = nullptr;
  bool may_borrow = true;      // not in a forked child, where the team's threads do not exist
  std::atomic<int> wanted{0};  // 0: not chosen yet
};
State* g_state = nullptr;
std::once_flag g_once;

void child_after_fork() {
  State* fresh = new State;  // the old one's mutex may be locked by a thread that does not exist here
  fresh->wanted = std::getenv("FASTSFT_NUM_THREADS") ? 0 : 1;
  fresh->may_borrow = false;
  g_state = fresh;
  t_inside = false;
}

State& state() {
  std::call_once(g_once, [] {
    g_state = new State;
    pthread_atfork(nullptr, nullptr, child_after_fork);
  });
  return *g_state;
}

}  // namespace

int num_threads() {
  State& s = state();
  int n = s.wanted.load();
  if (n == 0) {
    n = threads_from_environment();
    if (n == 0) n = threads_from_affinity();
    s.wanted = n;
  }
  return n;
}

void set_num_threads(int n) {
  FASTSFT_CHECK(n >= 1 && n <= 1024, "num_threads: expected an integer in [1, 1024], got ", n);
  state().wanted = n;
}

void detail::run_ranges(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= 0) return;
  FASTSFT_CHECK(grain >= 1, "parallel_for: grain: expected >= 1, got ", grain);
  State& s = state();
  const int threads = num_threads();
  if (n <= grain || threads == 1 || t_inside || !s.use.try_lock()) {
    for (int64_t begin = 0; begin < n; begin += grain) fn(context, begin, std::min(begin + grain, n));
    return;
  }
  std::lock_guard<std::mutex> lock(s.use, std::adopt_lock);
  Job job{.fn = fn, .context = context, .n = n, .grain = grain};
  if (s.may_borrow && s.team == nullptr && s.pool == nullptr) s.team = find_host_team();
  if (s.team != nullptr) {
    s.team([](void* work) { static_cast<Job*>(work)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    if (s.pool == nullptr || s.pool->threads() != threads) {
      delete s.pool;
      s.pool = nullptr;
      s.pool = new Pool(threads);
    }
    s.pool->run(job);
  }
  if (job.failed.load()) std::rethrow_exception(job.error);
}

}  // namespace fastsft
