// The emulated barriers and copies of csrc/cuda/primitives_sm90.cuh against the definitions of the PTX ISA.
#include <algorithm>
#include <vector>

#include "sm90_cases.h"

using namespace fastsft;
using namespace fastsft::cuda;

namespace {

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32Bytes, Swizzle::k64Bytes, Swizzle::k128Bytes};

// The place of 16-byte unit `unit` of row `row` in a pattern of rows of `row_bytes`, from the figures of the ISA's
// section on swizzling: the units of a row are permuted by the number of the 128-byte line in the pattern.
int swizzled_unit(int row, int unit, Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128Bytes: return unit ^ row % 8;
    case Swizzle::k64Bytes: return unit ^ row / 2 % 4;
    case Swizzle::k32Bytes: return unit ^ row / 4 % 2;
    case Swizzle::kNone: break;
  }
  return unit;
}

}  // namespace

TEST(mbarriers_count_arrivals_and_bytes) {
  alignas(16) const int source[4] = {7, 8, 9, 10};
  run(64, 64, [&] {
    auto* const barrier = shared_memory<uint64_t>();
    int* const box = shared_memory<int>() + 4;
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 33);
      mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x > 32) return;
    mbarrier_wait(barrier, 1);  // "the phase before the first one" is complete
    if (threadIdx.x < 32) {
      mbarrier_arrive(barrier);
    } else {
      CHECK(!mbarrier_try_wait(barrier, 0));
      mbarrier_arrive_expect(barrier, 16);
      bulk_load(box, source, 16, barrier);
    }
    mbarrier_wait(barrier, 0);
    CHECK(box[3] == 10);
    mbarrier_arrive(barrier);  // the second phase
    mbarrier_wait(barrier, 1);
  });
}

TEST(tensor_loads_place_every_element_where_the_swizzle_says) {
  constexpr int kRows = 21, kColumns = 72, kBoxRows = 16;
  const auto data = random_words<BFloat16>(kRows * kColumns, 1);
  for (Swizzle swizzle : kSwizzles) {
    const int box_columns = swizzle == Swizzle::kNone ? 24 : swizzle_bytes(swizzle) / 2;
    const TensorMap map = matrix_map(data, kRows, kColumns, kBoxRows, box_columns, swizzle);
    for (const auto& [x, y] : {std::pair{0, 0}, {48, 9}, {-5, -3}, {200, 0}}) {
      run(32, 4096 + 16, [&, x = x, y = y] {
        auto* const tile = shared_memory<uint16_t>();
        auto* const barrier = shared_memory<uint64_t>() + 512;
        make_mbarriers(barrier, 1);
        if (threadIdx.x == 0) {
          mbarrier_arrive_expect(barrier, kBoxRows * box_columns * 2);
          tensor_load(tile, map, barrier, x, y);
        }
        mbarrier_wait(barrier, 0);
        for (int i = lane_id(); i < kBoxRows * box_columns; i += kWarp) {
          const int row = i / box_columns, column = i % box_columns;
          const bool inside = row + y >= 0 && row + y < kRows && column + x >= 0 && column + x < kColumns;
          const uint16_t expected = inside ? data[(row + y) * kColumns + column + x] : 0;
          const int place = row * box_columns + swizzled_unit(row, column / 8, swizzle) * 8 + column % 8;
          CHECK(tile[place] == expected);
        }
      });
    }
  }
}

TEST(three_dimensions_and_stores) {
  constexpr int kX = 20, kY = 3, kZ = 5;
  std::vector<float> source(kX * kY * kZ), target(source.size(), -1.0f);
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<float>(i);
  const auto map_of = [](const std::vector<float>& data) {
    return make_tensor_map({.dtype = DType::kFloat32,
                            .data = data.data(),
                            .size = {kX, kY, kZ},
                            .stride = {kX * 4, kX * kY * 4},
                            .box = {8, 2, 2},
                            .swizzle = Swizzle::k32Bytes});
  };
  const TensorMap from = map_of(source), to = map_of(target);
  run(32, 256 + 16, [&] {
    auto* const barrier = shared_memory<uint64_t>() + 32;
    make_mbarriers(barrier, 1);
    if (threadIdx.x != 0) return;
    mbarrier_arrive_expect(barrier, 128);
    tensor_load(shared_memory(), from, barrier, 16, 2, 3);
    mbarrier_wait(barrier, 0);
    tensor_store(to, shared_memory(), 16, 2, 3);
    bulk_commit();
    bulk_wait<0>();
  });
  for (int i = 0; i < kX * kY * kZ; ++i) {
    const bool inside = i % kX >= 16 && i / kX % kY >= 2 && i / kX / kY >= 3;
    CHECK(target[i] == (inside ? source[i] : -1.0f));
  }
}

TEST(bulk_stores_and_additions) {
  alignas(16) float sums[8] = {1, 1, 1, 1, 1, 1, 1, 1}, copy[8] = {};
  cuda_host::launch("test", 3, 32, 32, [&] {
    float* const mine = shared_memory<float>();
    if (threadIdx.x < 8) mine[threadIdx.x] = static_cast<float>(threadIdx.x);
    fence_async_proxy();
    sync_warp();
    if (threadIdx.x != 0) return;
    bulk_add(sums, mine, 32);
    bulk_commit();
    if (blockIdx.x == 1) bulk_store(copy, mine, 32);
    bulk_commit();
    bulk_wait_read<1>();
    bulk_wait<0>();
  });
  for (int i = 0; i < 8; ++i) CHECK(sums[i] == 1.0f + 3.0f * i && copy[i] == i);
}

TEST(store_matrix_is_the_inverse_of_load_matrix) {
  run(32, 1024, [] {
    auto* const tile = shared_memory<uint16_t>();
    uint32_t r[4], again[4];
    for (uint32_t i = 0; i < 4; ++i) r[i] = (threadIdx.x * 8 + i * 2) | (threadIdx.x * 8 + i * 2 + 1) << 16;
    store_matrix_x4(tile + lane_id() * 8, r);
    store_matrix_x4_transposed(tile + 256 + lane_id() * 8, r);
    sync_warp();
    load_matrix_x4(again, tile + lane_id() * 8);
    CHECK(std::equal(r, r + 4, again));
    load_matrix_x4_transposed(again, tile + 256 + lane_id() * 8);
    CHECK(std::equal(r, r + 4, again));
  });
}

TEST(asynchronous_operations_used_wrongly) {
  std::vector<float> data(64);
  const TensorMap map =
      make_tensor_map({.dtype = DType::kFloat32, .data = data.data(), .size = {8, 8}, .stride = {32}, .box = {8, 8}});
  const auto with_barrier = [](const std::function<void(uint64_t*)>& body) {
    return fault(128, 1024, [&] {
      auto* const barrier = shared_memory<uint64_t>() + 100;
      make_mbarriers(barrier, 1);
      body(barrier);
    });
  };
  expect(with_barrier([](uint64_t* barrier) { mbarrier_wait(barrier, 0); }),
         "thread 0 waits at mbarrier_wait, phase 0 of the mbarrier at offset 800, which lacks 1 of 1 arrivals and 0 "
         "bytes");
  expect(with_barrier([](uint64_t* barrier) { mbarrier_arrive(barrier + 1); }), "no mbarrier_init");
  expect(with_barrier([&](uint64_t* barrier) {
           if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, 128), tensor_load(shared_memory(), map, barrier, 0, 0);
           mbarrier_wait(barrier, 0);
         }),
         "lacks 0 of 1 arrivals and -128 bytes");
  expect(with_barrier([&](uint64_t* barrier) {
           if (threadIdx.x == 0) tensor_load(shared_memory(), map, barrier, 0, 0);
         }),
         "a bulk load was still under way");
  expect(with_barrier([&](uint64_t* barrier) {
           if (threadIdx.x == 0) tensor_load(shared_memory() + 64, map, barrier, 0, 0);
         }),
         "not aligned to 128");
  expect(with_barrier([&](uint64_t*) {
           if (threadIdx.x == 0) tensor_store(map, shared_memory(), 0, 0);
         }),
         "returned before its bulk stores were waited for");
  expect(fault(32, 64,
               [] {
                 if (threadIdx.x == 0) mbarrier_init(shared_memory<uint64_t>(), 1);
                 if (threadIdx.x == 0)
                   bulk_load(shared_memory() + 16, shared_memory() + 32, 16, shared_memory<uint64_t>());
               }),
         "without mbarrier_init_fence");
  expect(fault(128, 64, [] { registers_decrease<24>(); }), "");
  expect(fault(160, 64, [] { registers_decrease<24>(); }), "in no complete warpgroup");
}

TEST(tensor_maps_that_the_hardware_refuses) {
  alignas(16) static float data[64];
  const TensorMapArguments good{.dtype = DType::kFloat32, .data = data, .size = {8, 8}, .stride = {32}, .box = {8, 8}};
  CHECK(make_tensor_map(good).rank == 2);
  for (int fault = 0; fault < 6; ++fault) {
    TensorMapArguments bad = good;
    if (fault == 0) bad.data = data + 1;
    if (fault == 1) bad.stride = {24};
    if (fault == 2) bad.box = {3, 8};
    if (fault == 3) bad.box = {8, 257};
    if (fault == 4) bad.size = {8, 8, 8};
    if (fault == 5) bad.box = {16, 8}, bad.swizzle = Swizzle::k32Bytes;
    CHECK_THROWS(make_tensor_map(bad), Error);
  }
}

TEST_MAIN()
