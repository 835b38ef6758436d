// Two kernels with a fault each, named by the argument, that must be seen: CMakeLists.txt says how. With "none" they
// are sound.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"
#include "primitives_sm90.cuh"
#include "tensor_map.h"

using namespace fastsft::cuda;

namespace {

constexpr int kThreads = 64;

void expect_equal(int i, float value, float expected) {
  if (value == expected) return;
  std::printf("element %d: got %g, expected %g\n", i, value, expected);
  std::exit(2);
}

// Reverses kThreads floats per block through shared memory.
void reverse(const std::string& fault) {
  std::vector<float> in(2 * kThreads), out(2 * kThreads);
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = static_cast<float>(i);
  const std::size_t shared_bytes = kThreads * 4 - (fault == "shared_out_of_bounds" ? 4 : 0);
  cuda_host::launch("reverse", 2, kThreads, shared_bytes, [&] {
    float* const tile = shared_memory<float>();
    const int thread = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * kThreads;
    if (fault == "copy_not_waited_for") {
      copy_async<4>(tile + thread, &in[base + thread]);
      copy_async_commit();
    } else {
      tile[thread] = in[base + thread];
    }
    if (fault == "shuffle_as_barrier")
      shuffle(thread, 0);
    else if (fault == "warp_barrier_for_block")
      sync_warp();
    else if (fault != "missing_barrier")
      __syncthreads();
    const float value = tile[kThreads - 1 - thread];
    if (fault != "copy_over_unread") __syncthreads();
    copy_async<4>(tile + thread, &in[base + thread]);  // as for a next round
    copy_async_commit();
    __syncthreads();  // where the copies land, all have read
    copy_async_wait<0>();
    if (fault == "blocks_overlap")
      out[thread] = value;
    else if (fault == "global_out_of_bounds")
      out.data()[base + thread + 1] = value;
    else if (fault == "missing_atomic")
      out[base] += value;
    else
      out[base + thread] = value;
  });
  for (int i = 0; i < 2 * kThreads && fault != "missing_atomic" && fault != "blocks_overlap"; ++i) {
    expect_equal(i, out[i], static_cast<float>(i / kThreads * kThreads + kThreads - 1 - i % kThreads));
  }
}

// Hopper's pipeline: a thread of the second warpgroup loads tiles of 64 columns of A [64, 64 kTiles] and B [32, 64
// kTiles] into kStages buffers in turn, the first warpgroup multiplies them; full[] and empty[] hand the buffers over.
void multiply(const std::string& fault) {
  constexpr int kTiles = 5, kStages = 2, kWidth = 64, kRows = 64, kColumns = 32,
                kBytes = (kRows + kColumns) * kWidth * 2;
  std::vector<uint16_t> a(kRows * kWidth * kTiles), b(kColumns * kWidth * kTiles);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = BFloat16::from_float(static_cast<float>(i % 7));
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = BFloat16::from_float(static_cast<float>(i % 5));
  const auto map_of = [](const std::vector<uint16_t>& data, int rows) {
    return make_tensor_map({.dtype = fastsft::DType::kBFloat16,
                            .data = data.data(),
                            .size = {kWidth * kTiles, rows},
                            .stride = {kWidth * kTiles * 2},
                            .box = {kWidth, rows},
                            .swizzle = Swizzle::k128Bytes});
  };
  const TensorMap a_map = map_of(a, kRows), b_map = map_of(b, kColumns);
  std::vector<float> out(kRows * kColumns);
  cuda_host::launch("multiply", 1, 2 * kWarpgroup, kStages * kBytes + 2 * kStages * 8, [&] {
    unsigned char* const tiles = shared_memory();
    auto* const full = reinterpret_cast<uint64_t*>(tiles + kStages * kBytes);
    uint64_t* const empty = full + kStages;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, kWarpgroup);
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == kWarpgroup) {
      for (int i = 0; i < kTiles; ++i) {
        const int stage = i % kStages;
        if (fault != "empty_not_waited_for") mbarrier_wait(empty + stage, (i / kStages + 1) % 2);
        mbarrier_arrive_expect(full + stage, kBytes);
        tensor_load(tiles + stage * kBytes, a_map, full + stage, i * kWidth, 0);
        tensor_load(tiles + stage * kBytes + kRows * kWidth * 2, b_map, full + stage, i * kWidth, 0);
      }
      if (fault == "full_not_waited_for") mbarrier_wait(full + (kTiles - 1) % kStages, (kTiles - 1) / kStages % 2);
    }
    if (threadIdx.x >= kWarpgroup) return;
    float d[kColumns / 2] = {};
    for (int i = 0; i < kTiles; ++i) {
      const int stage = i % kStages;
      if (fault != "full_not_waited_for") mbarrier_wait(full + stage, i / kStages % 2);
      const uint64_t a_tile = matrix_descriptor<Swizzle::k128Bytes>(tiles + stage * kBytes, 0, 1024);
      wgmma_fence(d);
      for (int k = 0; k < kWidth / 16; ++k) {
        wgmma<BFloat16, kColumns>(d, descriptor_advance(a_tile, 32 * k),
                                  descriptor_advance(a_tile, kRows * kWidth * 2 + 32 * k), true);
      }
      wgmma_commit();
      if (fault == "released_too_early") mbarrier_arrive(empty + stage);
      wgmma_wait<0>(d);
      if (fault != "released_too_early") mbarrier_arrive(empty + stage);
    }
    const int row = warp_id() * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
    for (int i = 0; i < kColumns / 2; ++i) out[(row + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + column + i % 2] = d[i];
  });
  for (int i = 0; i < kRows * kColumns; ++i) {
    float sum = 0;
    for (int k = 0; k < kWidth * kTiles; ++k) {
      sum += BFloat16::to_float(a[i / kColumns * kWidth * kTiles + k]) *
             BFloat16::to_float(b[i % kColumns * kWidth * kTiles + k]);
    }
    expect_equal(i, out[i], sum);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "none";
  try {
    reverse(fault);
    multiply(fault);
  } catch (const cuda_host::Fault& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("no fault seen\n");
}
