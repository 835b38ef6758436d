// The emulated matrix products of csrc/cuda/primitives_sm90.cuh against the definitions of the PTX ISA.
#include <algorithm>
#include <cmath>
#include <vector>

#include "sm90_cases.h"

using namespace fastsft;
using namespace fastsft::cuda;

namespace {

// D as the ISA's figure of the m64nN accumulator fragment has it.
template <int kColumns>
void check_accumulators(const float (&d)[kColumns / 2], const std::vector<double>& expected) {
  const int thread = static_cast<int>(threadIdx.x % 128), g = thread % 32 / 4, t = thread % 4;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = thread / 32 * 16 + g + (i & 2) * 4, column = (i >> 2) * 8 + t * 2 + (i & 1);
    CHECK(std::fabs(d[i] - expected[row * kColumns + column]) < 1e-4);
  }
}

// A [64, k] and B [kColumns, k] with k contiguous, by TMA in `kSwizzle`, k = one row of the swizzle.
template <typename T, int kColumns, Swizzle kSwizzle>
void check_k_major() {
  const int row = swizzle_bytes(kSwizzle), depth = row / 2;
  const auto a = random_words<T>(64 * depth, 2), b = random_words<T>(kColumns * depth, 3);
  const auto expected = product<T>(a, b, 64, kColumns, depth);
  const TensorMap a_map = matrix_map(a, 64, depth, 64, depth, kSwizzle);
  const TensorMap b_map = matrix_map(b, kColumns, depth, kColumns, depth, kSwizzle);
  const int b_offset = 64 * row, bytes = b_offset + kColumns * row, aligned = (bytes + 7) / 8 * 8;
  run(128, static_cast<std::size_t>(aligned) + 8, [&] {
    auto* const barrier = reinterpret_cast<uint64_t*>(shared_memory() + aligned);
    make_mbarriers(barrier, 1);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, bytes);
      tensor_load(shared_memory(), a_map, barrier, 0, 0);
      tensor_load(shared_memory() + b_offset, b_map, barrier, 0, 0);
    }
    mbarrier_wait(barrier, 0);
    const uint64_t a_tile = matrix_descriptor<kSwizzle>(shared_memory(), 0, 8 * row);
    const uint64_t b_tile = matrix_descriptor<kSwizzle>(shared_memory() + b_offset, 0, 8 * row);
    float d[kColumns / 2];
    wgmma_fence(d);
    for (int k = 0; k < depth / 16; ++k) {
      wgmma<T, kColumns>(d, descriptor_advance(a_tile, 32 * k), descriptor_advance(b_tile, 32 * k), k > 0);
    }
    wgmma_commit();
    CHECK(std::isnan(d[0]) && std::isnan(d[kColumns / 2 - 1]));
    wgmma_wait<0>(d);
    check_accumulators<kColumns>(d, expected);
  });
}

// A^T [k, 64] and B^T [k, 128] with m and n contiguous, in boxes as wide as the swizzle's row.
template <typename T, Swizzle kSwizzle>
void check_mn_major() {
  constexpr int kColumns = 128, kDepth = 32;
  const int row = swizzle_bytes(kSwizzle), width = row / 2, box_bytes = kDepth * row;
  const auto a = random_words<T>(64 * kDepth, 4), b = random_words<T>(kColumns * kDepth, 5);
  const auto expected = product<T>(a, b, 64, kColumns, kDepth);
  std::vector<uint16_t> a_columns(a.size()), b_columns(b.size());
  for (int i = 0; i < 64 * kDepth; ++i) a_columns[i % kDepth * 64 + i / kDepth] = a[i];
  for (int i = 0; i < kColumns * kDepth; ++i) b_columns[i % kDepth * kColumns + i / kDepth] = b[i];
  const TensorMap a_map = matrix_map(a_columns, kDepth, 64, kDepth, width, kSwizzle);
  const TensorMap b_map = matrix_map(b_columns, kDepth, kColumns, kDepth, width, kSwizzle);
  const int b_offset = 64 * kDepth * 2, bytes = b_offset + kColumns * kDepth * 2;
  run(128, static_cast<std::size_t>(bytes) + 8, [&] {
    auto* const barrier = reinterpret_cast<uint64_t*>(shared_memory() + bytes);
    make_mbarriers(barrier, 1);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, bytes);
      for (int i = 0; i < 64 / width; ++i) tensor_load(shared_memory() + i * box_bytes, a_map, barrier, i * width, 0);
      for (int i = 0; i < kColumns / width; ++i) {
        tensor_load(shared_memory() + b_offset + i * box_bytes, b_map, barrier, i * width, 0);
      }
    }
    mbarrier_wait(barrier, 0);
    const uint64_t a_tile = matrix_descriptor<kSwizzle>(shared_memory(), box_bytes, 8 * row);
    const uint64_t b_tile = matrix_descriptor<kSwizzle>(shared_memory() + b_offset, box_bytes, 8 * row);
    float d[kColumns / 2] = {};
    wgmma_fence(d);
    for (int k = 0; k < kDepth / 16; ++k) {
      wgmma<T, kColumns, Major::kMN, Major::kMN>(d, descriptor_advance(a_tile, 16 * row * k),
                                                 descriptor_advance(b_tile, 16 * row * k), true);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    check_accumulators<kColumns>(d, expected);
  });
}

}  // namespace

TEST(wgmma_k_major) {
  check_k_major<BFloat16, 8, Swizzle::k32Bytes>();
  check_k_major<Float16, 40, Swizzle::k64Bytes>();
  check_k_major<BFloat16, 64, Swizzle::k128Bytes>();
  check_k_major<Float16, 256, Swizzle::k128Bytes>();
}

TEST(wgmma_mn_major) {
  check_mn_major<BFloat16, Swizzle::k32Bytes>();
  check_mn_major<Float16, Swizzle::k64Bytes>();
  check_mn_major<BFloat16, Swizzle::k128Bytes>();
}

// Core matrices of 8 rows of 16 bytes, contiguous, written by ordinary stores; `kMajor` says which index their rows
// are.
template <Major kMajor>
void check_core_matrices() {
  constexpr int kColumns = 24, kDepth = 16;
  const auto a = random_words<BFloat16>(64 * kDepth, 6), b = random_words<BFloat16>(kColumns * kDepth, 7);
  const auto expected = product<BFloat16>(a, b, 64, kColumns, kDepth);
  const int a_blocks = 64 / 8, b_blocks = kColumns / 8;
  run(128, (64 + kColumns) * kDepth * 2, [&] {
    auto* const a_tile = shared_memory<uint16_t>();
    uint16_t* const b_tile = a_tile + 64 * kDepth;
    // Matrix (i / 8, k / 8) is number i / 8 + k / 8 * blocks.
    const auto place = [](int i, int k, int blocks) {
      const int inner = kMajor == Major::kK ? i % 8 * 8 + k % 8 : k % 8 * 8 + i % 8;
      return (i / 8 + k / 8 * blocks) * 64 + inner;
    };
    for (int n = static_cast<int>(threadIdx.x); n < 64 * kDepth; n += 128) {
      a_tile[place(n / kDepth, n % kDepth, a_blocks)] = a[n];
    }
    for (int n = static_cast<int>(threadIdx.x); n < kColumns * kDepth; n += 128) {
      b_tile[place(n / kDepth, n % kDepth, b_blocks)] = b[n];
    }
    fence_async_proxy();
    __syncthreads();
    float d[kColumns / 2];
    wgmma_fence(d);
    wgmma<BFloat16, kColumns, kMajor, kMajor>(d, matrix_descriptor<Swizzle::kNone>(a_tile, 128 * a_blocks, 128),
                                              matrix_descriptor<Swizzle::kNone>(b_tile, 128 * b_blocks, 128), false);
    wgmma_commit();
    wgmma_wait<0>(d);
    check_accumulators<kColumns>(d, expected);
  });
}

TEST(wgmma_without_swizzle) {
  check_core_matrices<Major::kK>();
  check_core_matrices<Major::kMN>();
}

TEST(wgmma_with_a_in_registers_and_two_groups) {
  constexpr int kColumns = 32, kDepth = 64;
  const auto a = random_words<BFloat16>(64 * kDepth, 8), b = random_words<BFloat16>(kColumns * kDepth, 9);
  const auto expected = product<BFloat16>(a, b, 64, kColumns, kDepth);
  const TensorMap b_map = matrix_map(b, kColumns, kDepth, kColumns, kDepth, Swizzle::k128Bytes);
  run(256, kColumns * kDepth * 2 + 8, [&] {  // two warpgroups on the same B
    auto* const barrier = shared_memory<uint64_t>() + kColumns * kDepth / 4;
    make_mbarriers(barrier, 1);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, kColumns * kDepth * 2);
      tensor_load(shared_memory(), b_map, barrier, 0, 0);
    }
    mbarrier_wait(barrier, 0);
    const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    const uint64_t b_tile = matrix_descriptor<Swizzle::k128Bytes>(shared_memory(), 0, 1024);
    float d[kColumns / 2] = {}, e[kColumns / 2];
    wgmma_fence(d, e);
    for (int k = 0; k < 4; ++k) {
      uint32_t fragment[4];
      for (int i = 0; i < 4; ++i) {
        const int at = (row + i % 2 * 8) * kDepth + 16 * k + 2 * t + i / 2 * 8;
        fragment[i] = a[at] | static_cast<uint32_t>(a[at + 1]) << 16;
      }
      wgmma<BFloat16, kColumns>(d, fragment, descriptor_advance(b_tile, 32 * k), true);
      if (k == 0) {
        wgmma_commit();
        wgmma<BFloat16, kColumns>(e, fragment, b_tile, false);
      }
    }
    wgmma_commit();
    wgmma_wait<1>(d);
    CHECK(!std::isnan(d[0]) && std::isnan(e[0]));
    wgmma_wait<0>(d, e);
    check_accumulators<kColumns>(d, expected);
  });
}

TEST(what_the_asynchronous_units_do_not_see) {
  run(128, 64 * 32 + 8 * 32, [] {
    for (int i = static_cast<int>(threadIdx.x); i < 72 * 16; i += 128) shared_memory<uint16_t>()[i] = 0x3f80;
    __syncthreads();  // and no fence_async_proxy
    const uint64_t tile = matrix_descriptor<Swizzle::k32Bytes>(shared_memory(), 0, 256);
    float d[4];
    wgmma_fence(d);
    wgmma<BFloat16, 8>(d, tile, descriptor_advance(tile, 2048), false);
    wgmma_commit();
    wgmma_wait<0>(d);
    CHECK(std::isnan(d[0]));
  });
}

TEST(wgmma_used_wrongly) {
  const auto product_of = [](uint64_t tile, bool fence, bool wait) {
    return fault(128, 4096, [&] {
      float d[4];
      if (fence) wgmma_fence(d);
      wgmma<BFloat16, 8>(d, tile, tile, false);
      wgmma_commit();
      if (wait) wgmma_wait<0>(d);
    });
  };
  const uint64_t tile = uint64_t{256 >> 4} << 32 | uint64_t{3} << 62;  // stride 256, 32-byte rows
  CHECK(product_of(tile, true, true).empty());
  expect(product_of(tile, false, true), "without wgmma_fence");
  expect(product_of(tile, true, false), "a wgmma was not waited for");
  expect(product_of(tile + (2560 >> 4), true, true), "leaves shared memory");
  expect(product_of(tile + (64 >> 4), true, true), "first row of a swizzle pattern");
}

TEST_MAIN()
