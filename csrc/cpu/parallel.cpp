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
#include "phases.h"

namespace fastsft {
namespace {

thread_local bool t_inside = false;       // in a range
thread_local Phases* t_phases = nullptr;  // of the with_team that this thread called

using Work = void (*)(void* context);

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

  // work(context) once on each thread, the caller among them.
  void run(Work work, void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      ++generation_;
      busy_ = static_cast<int>(workers_.size());
    }
    wake_.notify_all();
    work(context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
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
      Work work;
      void* context;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        work = work_;
        context = context_;
      }
      work(context);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Work work_ = nullptr;
  void* context_ = nullptr;
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
  std::mutex use;  // held by the thread whose work the others run
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
  t_phases = nullptr;
}

State& state() {
  std::call_once(g_once, [] {
    g_state = new State;
    pthread_atfork(nullptr, nullptr, child_after_fork);
  });
  return *g_state;
}

// work(context) on every thread, the caller among them; `s.use` is held.
void on_every_thread(State& s, int threads, Work work, void* context) {
  if (s.may_borrow && s.team == nullptr && s.pool == nullptr) s.team = find_host_team();
  if (s.team != nullptr) return s.team(work, context, static_cast<unsigned>(threads), 0);
  if (s.pool == nullptr || s.pool->threads() != threads) {
    delete s.pool;
    s.pool = nullptr;
    s.pool = new Pool(threads);
  }
  s.pool->run(work, context);
}

// Calls body(phases) while the other threads help with the phases that it runs.
template <typename Body>
void with_helpers(State& s, int threads, Body&& body) {
  struct Shared {
    Body& body;
    std::thread::id caller;
    Phases phases{};
    std::exception_ptr error{};
  } shared{.body = body, .caller = std::this_thread::get_id()};
  on_every_thread(
      s, threads,
      [](void* context) {
        auto& mine = *static_cast<Shared*>(context);
        if (std::this_thread::get_id() != mine.caller) {
          t_inside = true;
          mine.phases.help();
          t_inside = false;
          return;
        }
        try {
          mine.body(mine.phases);
        } catch (...) {
          mine.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

void run_phase(Phases& phases, int64_t n, int64_t grain, detail::RangeFn fn, void* context, bool last) {
  struct Inside {
    Inside() { t_inside = true; }
    ~Inside() { t_inside = false; }
  } inside;
  phases.run(n, grain, fn, context, last);
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
  grain = std::max(grain, n >> 31);  // a ticket counts ranges in 32 bits
  const auto serial = [&] {
    for (int64_t begin = 0; begin < n; begin += grain) fn(context, begin, std::min(begin + grain, n));
  };
  if (n <= grain || t_inside) return serial();
  if (t_phases != nullptr) return run_phase(*t_phases, n, grain, fn, context, false);
  State& s = state();
  const int threads = num_threads();
  if (threads == 1 || !s.use.try_lock()) return serial();
  std::lock_guard<std::mutex> lock(s.use, std::adopt_lock);
  with_helpers(s, threads, [&](Phases& phases) { run_phase(phases, n, grain, fn, context, true); });
}

void detail::run_with_team(void (*fn)(void* context), void* context) {
  State& s = state();
  const int threads = num_threads();
  if (threads == 1 || t_inside || t_phases != nullptr || !s.use.try_lock()) return fn(context);
  std::lock_guard<std::mutex> lock(s.use, std::adopt_lock);
  with_helpers(s, threads, [&](Phases& phases) {
    struct Team {
      Phases& phases;
      explicit Team(Phases& p) : phases(p) { t_phases = &p; }
      ~Team() {
        t_phases = nullptr;
        phases.close();
      }
    } team(phases);
    fn(context);
  });
}

}  // namespace fastsft
