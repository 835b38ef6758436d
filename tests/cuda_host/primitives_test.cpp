// The emulated instructions of csrc/cuda/primitives.cuh against the definitions of the PTX ISA, written as plain loops.
#include "primitives.cuh"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernel_cases.h"

using namespace fastsft::cuda;

TEST(sixteen_bit_conversions_round_to_nearest_even) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto word = static_cast<uint16_t>(bits);
    const float half = Float16::to_float(word), bfloat = BFloat16::to_float(word);
    if (std::isnan(half))
      CHECK(Float16::from_float(half) == 0x7fff);
    else
      CHECK(Float16::from_float(half) == word);
    if (std::isnan(bfloat))
      CHECK(BFloat16::from_float(bfloat) == 0x7fff);
    else
      CHECK(BFloat16::from_float(bfloat) == word);
    if ((bits & 0x7fff) >= 0x7bff) continue;  // halfway to the next one: even wins, and a step beyond does not
    const float next = Float16::to_float(static_cast<uint16_t>(word + 1)), middle = (half + next) / 2;
    CHECK(Float16::from_float(middle) == word + (word & 1));
    CHECK(Float16::from_float(std::nextafter(middle, half)) == word);
    CHECK(Float16::from_float(std::nextafter(middle, next)) == word + 1);
    const uint32_t wide = bits << 16;
    CHECK(BFloat16::from_float(bits_float(wide | 0x8000u)) == word + (word & 1));
    CHECK(BFloat16::from_float(bits_float(wide | 0x7fffu)) == word);
  }
  CHECK(Float16::to_float(0x3555) == 0.333251953125f && Float16::to_float(0x0001) == 0x1p-24f);
  CHECK(Float16::from_float(65519.9f) == 0x7bff && Float16::from_float(65520.0f) == 0x7c00);
  CHECK(BFloat16::pack(1.0f, -2.0f) == 0xc0003f80u && Float16::pack(1.0f, -2.0f) == 0xc0003c00u);
  CHECK(BFloat16::low(0xc0003f80u) == 1.0f && BFloat16::high(0xc0003f80u) == -2.0f);
  CHECK(Float16::low(0xc0003c00u) == 1.0f && Float16::high(0xc0003c00u) == -2.0f);
}

TEST(shuffles_and_votes) {
  run(64, 0, [] {
    const int lane = lane_id(), thread = static_cast<int>(threadIdx.x);
    CHECK(shuffle(thread, 5) == thread - lane + 5);
    CHECK(shuffle(uint64_t{1} << lane, lane * 7) == uint64_t{1} << lane * 7 % 32);
    CHECK(shuffle_xor(static_cast<float>(thread), 9) == static_cast<float>(thread ^ 9));
    CHECK(shuffle_up(thread, 3) == (lane < 3 ? thread : thread - 3));
    CHECK(shuffle_down(static_cast<double>(thread), 30) == (lane < 2 ? thread + 30 : thread));
    CHECK(warp_ballot(thread % 3 == 0) == (warp_id() == 0 ? 0x49249249u : 0x92492492u));
    CHECK(warp_any(thread == 40) == (warp_id() == 1));
    CHECK(warp_all(thread < 33) == (warp_id() == 0));
  });
}

TEST(bit_and_integer_operations) {
  CHECK(multiply_high(0xffffffffu, 0xfffffffeu) == 0xfffffffdu);
  CHECK(multiply_high(~uint64_t{0}, uint64_t{7}) == 6);
  CHECK(popcount(0xf0u) == 4 && popcount(~uint64_t{0}) == 64);
  CHECK(leading_zeros(0) == 32 && leading_zeros(1) == 31 && lowest_bit(0) == -1 && lowest_bit(0x50) == 4);
  CHECK(exp2_approx(3.0f) == 8.0f && exp2_approx(-INFINITY) == 0.0f && exp2_approx(-140.0f) == 0.0f);
  CHECK(log2_approx(8.0f) == 3.0f && log2_approx(1e-40f) == -INFINITY && reciprocal_approx(4.0f) == 0.25f);
}

TEST(atomics_return_the_old_value) {
  int count = 5;
  float sum = 0;
  uint64_t lowest = ~uint64_t{0}, highest = 0;
  std::vector<int> seen(64);
  run(64, 0, [&] {
    seen[static_cast<std::size_t>(atomic_add(&count, 1) - 5)] = 1;
    atomic_add(&sum, 0.5f);
    atomic_min(&lowest, uint64_t{1000} + threadIdx.x);
    atomic_max(&highest, uint64_t{1000} + threadIdx.x);
  });
  CHECK(count == 69 && sum == 32.0f && lowest == 1000 && highest == 1063);
  CHECK(*std::min_element(seen.begin(), seen.end()) == 1);
  run(32, 0, [&] {
    if (threadIdx.x != 0) return;
    CHECK(atomic_cas(&count, 69, 3) == 69 && atomic_cas(&count, 69, 4) == 3 && atomic_exchange(&count, 9) == 3);
  });
  CHECK(count == 9);
}

TEST(asynchronous_copies_land_when_waited_for) {
  alignas(16) float source[64];
  for (int i = 0; i < 64; ++i) source[i] = static_cast<float>(i);
  run(32, 32 * 3 * 16, [&] {
    const int lane = lane_id();
    float* const mine = shared_memory<float>() + lane * 12;
    copy_async(mine, source + lane % 16 * 4);
    copy_async_commit();
    copy_async(mine + 4, source + lane % 16 * 4, lane % 2 == 0);
    copy_async<4>(mine + 8, source + lane);
    copy_async<8>(mine + 10, source + 2 * lane);
    copy_async_commit();
    CHECK(std::isnan(mine[0]));
    copy_async_wait<1>();
    CHECK(mine[0] == static_cast<float>(lane % 16 * 4) && mine[3] == mine[0] + 3 && std::isnan(mine[4]));
    copy_async_wait<0>();
    CHECK(mine[5] == (lane % 2 == 0 ? mine[1] : 0.0f) && mine[8] == source[lane] && std::isnan(mine[9]));
    CHECK(mine[10] == source[2 * lane] && mine[11] == source[2 * lane + 1]);
  });
}

TEST(load_matrix_distributes_rows_as_the_ISA_says) {
  run(32, 32 * 16, [] {
    auto* const tile = shared_memory<uint16_t>();  // four matrices of 8 rows of 8
    for (int i = 0; i < 8; ++i) tile[lane_id() * 8 + i] = static_cast<uint16_t>(lane_id() * 8 + i);
    sync_warp();
    const uint32_t g = static_cast<uint32_t>(lane_id() / 4), t = static_cast<uint32_t>(lane_id() % 4);
    uint32_t plain[4], transposed[4], two[2], two_transposed[2];
    load_matrix_x4(plain, tile + lane_id() * 8);
    load_matrix_x4_transposed(transposed, tile + lane_id() * 8);
    load_matrix_x2(two, lane_id() < 16 ? tile + lane_id() * 8 : nullptr);
    load_matrix_x2_transposed(two_transposed, lane_id() < 16 ? tile + lane_id() * 8 : nullptr);
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = 64 * i + 8 * g + 2 * t, column = 64 * i + 8 * (2 * t) + g;
      CHECK(plain[i] == (row | (row + 1) << 16));
      CHECK(transposed[i] == (column | (column + 8) << 16));
      if (i < 2) CHECK(two[i] == plain[i] && two_transposed[i] == transposed[i]);
    }
  });
}

// D = A B + D through shared memory: A row-major, B once as [n, k] (plain) and once as [k, n] (transposed).
template <typename T>
void check_mma() {
  const auto a = random_words<T>(16 * 16, 1), b = random_words<T>(16 * 8, 2);
  std::vector<uint16_t> b_columns(b.size());
  for (int i = 0; i < 128; ++i) b_columns[i % 8 * 16 + i / 8] = b[i];
  const auto expected = product<T>(a, b_columns, 16, 8, 16);
  run(32, (16 * 16 + 2 * 16 * 8) * 2, [&] {
    auto* const a_tile = shared_memory<uint16_t>();
    uint16_t *const b_tile = a_tile + 256, *const b_transposed = b_tile + 128;
    for (int i = lane_id(); i < 256; i += kWarp) a_tile[i] = a[i];
    for (int i = lane_id(); i < 128; i += kWarp) b_tile[i] = b[i], b_transposed[i % 8 * 16 + i / 8] = b[i];
    sync_warp();
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    uint32_t fragment[4], plain[2], transposed[2];
    load_matrix_x4(fragment, a_tile + lane % 16 * 16 + lane / 16 * 8);
    load_matrix_x2(plain, b_transposed + lane % 8 * 16 + lane / 8 % 2 * 8);
    load_matrix_x2_transposed(transposed, b_tile + lane % 16 * 8);
    CHECK(plain[0] == transposed[0] && plain[1] == transposed[1]);
    CHECK(fragment[1] == (a[(g + 8) * 16 + 2 * t] | static_cast<uint32_t>(a[(g + 8) * 16 + 2 * t + 1]) << 16));
    float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    mma_m16n8k16<T>(d, fragment, plain[0], plain[1]);
    for (int i = 0; i < 4; ++i) {
      const double value = expected[(g + i / 2 * 8) * 8 + 2 * t + i % 2] + i + 1;
      CHECK(std::fabs(d[i] - value) < 1e-5);
    }
  });
}

TEST(mma_bfloat16) { check_mma<BFloat16>(); }
TEST(mma_half) { check_mma<Float16>(); }

TEST(mma_tf32) {
  float a[16][8], b[8][8];
  std::mt19937 random(3);
  for (auto& row : a)
    for (float& v : row) v = static_cast<float>(random() % 1000) / 256;
  for (auto& row : b)
    for (float& v : row) v = static_cast<float>(random() % 1000) / 256;
  run(32, 0, [&] {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t fragment[4] = {float_bits(a[g][t]), float_bits(a[g + 8][t]), float_bits(a[g][t + 4]),
                                  float_bits(a[g + 8][t + 4]) | 1u};  // a bit that tf32 ignores
    float d[4] = {};
    mma_m16n8k8_tf32(d, fragment, float_bits(b[t][g]), float_bits(b[t + 4][g]));
    for (int i = 0; i < 4; ++i) {
      double value = 0;
      for (int k = 0; k < 8; ++k) value += double{a[g + i / 2 * 8][k]} * b[k][2 * t + i % 2];
      CHECK(std::fabs(d[i] - value) < 1e-4);
    }
  });
}

TEST_MAIN()
