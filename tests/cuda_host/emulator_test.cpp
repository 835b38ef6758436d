// What the emulator promises: every thread runs, barriers hold, and broken rules are reported by name.
#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "kernel_cases.h"
#include "launch.h"
#include "primitives.cuh"

using namespace fastsft::cuda;

namespace {

template <typename T>
__global__ void write_indices(T* out, T offset) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] = static_cast<T>(block * 1000 + threadIdx.x) + offset;
}

}  // namespace

TEST(every_thread_of_every_block_runs_once) {
  std::vector<int> out(2 * 3 * 4 * 96, -1);
  launch<write_indices<int>>({2, 3, 4}, 96, 0, nullptr, out.data(), 7);
  for (int i = 0; i < 2 * 3 * 4 * 96; ++i) CHECK(out[i] == i / 96 * 1000 + i % 96 + 7);
  launch<write_indices<int>>({0, 3}, 96, 0, nullptr, static_cast<int*>(nullptr), 7);
  CHECK(multiprocessor_count() == 3);
}

TEST(kernel_names) {
  expect(kernel_name<write_indices<float>>(), "write_indices<float>");
  CHECK(kernel_name<write_indices<float>>().find_first_of("[];") == std::string::npos);
}

TEST(blocks_run_out_of_order) {
  int started = 0;
  std::vector<int> order(10, -1);
  cuda_host::launch("test", 10, 32, 0, [&] {
    if (threadIdx.x == 0) order[blockIdx.x] = atomic_add(&started, 1);
  });
  CHECK(started == 10 && std::set<int>(order.begin(), order.end()).size() == 10);
  CHECK(!std::is_sorted(order.begin(), order.end()) && !std::is_sorted(order.rbegin(), order.rend()));
}

TEST(shared_memory_is_fresh_and_poisoned) {
  cuda_host::launch("test", 3, 32, 256, [] {
    CHECK(std::isnan(shared_memory<float>()[63]));
    CHECK(reinterpret_cast<uintptr_t>(shared_memory()) % 1024 == 0);
    __syncthreads();
    if (threadIdx.x == 0) shared_memory<float>()[63] = 1.0f;
  });
}

TEST(barriers_order_the_block) {
  std::vector<int> sums(128);
  run(128, 128 * 4, [&] {
    int* const values = shared_memory<int>();
    for (int round = 0; round < 3; ++round) {
      values[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
      __syncthreads();
      int sum = 0;
      for (int i = 0; i < 128; ++i) sum += values[i];
      sums[threadIdx.x] += sum;
      __syncthreads();
    }
  });
  for (int sum : sums) CHECK(sum == 3 * 127 * 64 + 128 * 3);
}

TEST(named_barriers_hand_over) {
  int seen = 0;
  run(128, 16, [&] {
    int* const box = shared_memory<int>();
    for (int round = 0; round < 4; ++round) {
      if (warp_id() < 2) {
        if (round > 0) barrier_sync(2, 128);
        if (threadIdx.x == 0) box[0] = round;
        barrier_arrive(1, 128);
      } else {
        barrier_sync(1, 128);
        if (threadIdx.x == 64) seen += box[0];
        if (round < 3) barrier_arrive(2, 128);
      }
    }
  });
  CHECK(seen == 6);
}

TEST(a_barrier_that_not_all_threads_reach) {
  const std::string text = fault(64, 256, [] {
    if (threadIdx.x < 40) __syncthreads();
  });
  expect(text,
         "test, block (0, 0, 0): thread 0 waits at __syncthreads, which thread 40 does not reach: it has returned");
  expect(fault(64, 256, [] { threadIdx.x < 32 ? __syncthreads() : barrier_sync(3, 64); }),
         "thread 0 waits at __syncthreads, which thread 32 does not reach: it waits at barrier_sync");
}

TEST(a_lane_that_is_missing_from_a_warp_operation) {
  expect(fault(64, 256,
               [] {
                 if (threadIdx.x != 37) shuffle_xor(1.0f, 1);
               }),
         "thread 32 waits at shuffle_xor, which thread 37 does not reach: it has returned");
}

TEST(lanes_at_different_operations) {
  expect(fault(32, 256, [] { lane_id() == 3 ? sync_warp() : static_cast<void>(warp_ballot(true)); }),
         "thread 3 is at sync_warp while thread 0 of its warp is at warp_ballot");
}

TEST(barriers_used_wrongly) {
  expect(fault(64, 256, [] { barrier_sync(1, threadIdx.x < 32 ? 64 : 32); }), "others for 64");
  expect(fault(64, 256, [] { barrier_sync(16, 64); }), "16 (0 to 15)");
  expect(fault(64, 256, [] { barrier_sync(1, 128); }), "for 128 threads");
  expect(fault(64, 256,
               [] {
                 barrier_arrive(1, 64);
                 barrier_arrive(1, 64);
               }),
         "arrives twice at barrier_arrive 1");
}

TEST(misaligned_and_foreign_addresses) {
  expect(fault(32, 256, [] { load<uint4>(shared_memory() + 8); }), "load: the address is not aligned to 16 bytes");
  uint32_t r[4];
  expect(fault(32, 256, [&] { load_matrix_x4(r, shared_memory() + 2); }), "not aligned to 16");
  expect(fault(32, 256, [&] { load_matrix_x4(r, shared_memory() + 256); }),
         "offset 256 are not in the block's 256 bytes");
  alignas(16) float source[8] = {};
  expect(fault(32, 256, [&] { copy_async(shared_memory() + 4, source); }), "copy_async: the address is not aligned");
  expect(fault(32, 256, [&] { copy_async(shared_memory(), source + 1); }), "copy_async: the address is not aligned");
  expect(fault(32, 256, [&] { copy_async(source + 4, source); }), "are not in the block's 256 bytes of shared memory");
}

TEST(launches_that_a_GPU_would_refuse) {
  CHECK_THROWS(run(33, 0, [] {}), cuda_host::Fault);
  CHECK_THROWS(run(1056, 0, [] {}), cuda_host::Fault);
  CHECK_THROWS(run(32, 228 * 1024, [] {}), cuda_host::Fault);
}

TEST(an_exception_in_a_kernel_reaches_the_launch) {
  CHECK_THROWS(run(64, 0,
                   [] {
                     if (threadIdx.x == 33) throw std::runtime_error("from a thread");
                     __syncthreads();
                   }),
               std::runtime_error);
  run(64, 0, [] { __syncthreads(); });  // and the next launch works
}

// The pattern "the last block to finish sums up".
TEST(blocks_hand_over_through_a_fence_and_an_atomic) {
  int partial[5] = {}, finished = 0, total = 0;
  cuda_host::launch("test", 5, 32, 0, [&] {
    if (threadIdx.x != 0) return;
    partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    thread_fence();
    if (atomic_add(&finished, 1) != 4) return;
    thread_fence();
    for (int value : partial) total += value;
  });
  CHECK(total == 15);
}

TEST_MAIN()
