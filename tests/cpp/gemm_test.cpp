#include "fastsft/gemm.h"

#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

// An operand of its exact size, so that AddressSanitizer sees a read past its end.
struct Operand {
  DType dtype;
  int64_t rows, columns;
  bool transposed;
  std::vector<float> values;  // row-major, what the kernel sees after rounding
  std::vector<char> bytes;

  Operand(DType type, int64_t m, int64_t n, bool by_columns, unsigned seed)
      : dtype(type), rows(m), columns(n), transposed(by_columns), values(m * n), bytes(m * n * dtype_size(type)) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> small(-8, 8);  // eighths: exact in every type, and so are their sums
    for (float& v : values) v = static_cast<float>(small(random)) / 8;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) put(transposed ? j * m + i : i * n + j, values[i * n + j]);
    }
  }

  Matrix view() const { return {dtype, bytes.data(), transposed ? 1 : columns, transposed ? rows : 1}; }

  float get(int64_t index) const {
    if (dtype == DType::kFloat32) {
      float v;
      std::memcpy(&v, &bytes[index * 4], 4);
      return v;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[index * 2], 2);
    if (dtype == DType::kBFloat16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float v;
      std::memcpy(&v, &bits, 4);
      return v;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return half >> 15 ? -size : size;
  }

 private:
  void put(int64_t index, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (dtype == DType::kFloat32) {
      std::memcpy(&bytes[index * 4], &bits, 4);
      return;
    }
    // Exact values of small magnitude: no rounding, no subnormals.
    const uint32_t half = v == 0 ? bits >> 16 & 0x8000u
                                 : (bits >> 16 & 0x8000u) | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023);
    const auto word = static_cast<uint16_t>(dtype == DType::kBFloat16 ? bits >> 16 : half);
    std::memcpy(&bytes[index * 2], &word, 2);
  }
};

// Sums of products of eighths are exact in float32, so every element is compared for equality.
void compare(const Operand& a, const Operand& b, Operand c, bool accumulate) {
  const int64_t m = a.rows, n = b.columns, k = a.columns;
  if (!accumulate) std::memset(c.bytes.data(), 0xff, c.bytes.size());  // NaN: must not be read
  gemm({.m = m,
        .n = n,
        .k = k,
        .a = a.view(),
        .b = b.view(),
        .c_dtype = c.dtype,
        .c = c.bytes.data(),
        .c_stride = n,
        .accumulate = accumulate});
  bool ok = true;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? c.values[i * n + j] : 0;
      for (int64_t p = 0; p < k; ++p) sum += static_cast<double>(a.values[i * k + p]) * b.values[p * n + j];
      const double unit = c.dtype == DType::kBFloat16 ? 0x1p-8 : c.dtype == DType::kFloat16 ? 0x1p-11 : 0;
      ok &= std::abs(c.get(i * n + j) - sum) <= unit * std::abs(sum);
    }
  }
  CHECK(ok);
  if (!ok) {
    std::printf("%s: %s x %s -> %s, m %d n %d k %d, transposed %d %d, accumulate %d\n", isa_name(active_isa()),
                dtype_name(a.dtype), dtype_name(b.dtype), dtype_name(c.dtype), static_cast<int>(m), static_cast<int>(n),
                static_cast<int>(k), a.transposed, b.transposed, accumulate);
  }
}

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace

TEST(every_layout_type_and_edge) {
  const int64_t sizes[][3] = {{1, 1, 1}, {3, 7, 5}, {14, 32, 32}, {15, 33, 31}, {29, 65, 70}, {5, 3, 0}};
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (const auto& [m, n, k] : sizes) {
      for (DType type : kTypes) {
        for (int layout = 0; layout < 4; ++layout) {
          const Operand a(type, m, k, layout & 1, 1), b(type, k, n, layout & 2, 2);
          for (bool accumulate : {false, true}) {
            compare(a, b, Operand(type, m, n, false, 3), accumulate);
            compare(a, b, Operand(DType::kFloat32, m, n, false, 3), accumulate);
          }
        }
      }
      compare(Operand(DType::kFloat32, m, k, false, 1), Operand(DType::kBFloat16, k, n, true, 2),
              Operand(DType::kFloat32, m, n, false, 3), false);
    }
  }
}

TEST(several_blocks_of_the_depth_and_several_tasks) {
  set_num_threads(3);
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (DType type : kTypes) {
      compare(Operand(type, 61, 1100, false, 1), Operand(type, 1100, 150, true, 2), Operand(type, 61, 150, false, 3),
              true);
      compare(Operand(type, 600, 20, true, 1), Operand(type, 20, 40, false, 2), Operand(type, 600, 40, false, 3),
              false);
    }
  }
}

TEST(a_window_of_c_leaves_the_rest) {
  const Operand a(DType::kFloat32, 9, 6, false, 1), b(DType::kFloat32, 6, 13, false, 2);
  for (Isa isa : available_isas()) {
    set_isa(isa);
    std::vector<float> whole(9 * 20, 5);
    gemm({.m = 9,
          .n = 13,
          .k = 6,
          .a = a.view(),
          .b = b.view(),
          .c_dtype = DType::kFloat32,
          .c = whole.data() + 3,
          .c_stride = 20,
          .accumulate = false});
    for (int64_t i = 0; i < 9; ++i) {
      for (int64_t j = 0; j < 20; ++j) {
        if (j < 3 || j >= 16) CHECK(whole[i * 20 + j] == 5);
      }
    }
  }
}

TEST(threads_and_callers_do_not_change_the_bits) {
  std::vector<float> a(90 * 700), b(700 * 80);
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (float& v : a) v = normal(random);
  for (float& v : b) v = normal(random);
  const auto product = [&] {
    std::vector<float> c(90 * 80);
    gemm({.m = 90,
          .n = 80,
          .k = 700,
          .a = {DType::kFloat32, a.data(), 700, 1},
          .b = {DType::kFloat32, b.data(), 80, 1},
          .c_dtype = DType::kFloat32,
          .c = c.data(),
          .c_stride = 80,
          .accumulate = false});
    return c;
  };
  for (Isa isa : available_isas()) {
    set_isa(isa);
    set_num_threads(1);
    const std::vector<float> alone = product();
    set_num_threads(4);
    CHECK(product() == alone);
    std::vector<std::thread> callers;
    std::vector<char> same(3, 0);
    for (char& result : same) callers.emplace_back([&] { result = product() == alone; });
    for (auto& caller : callers) caller.join();
    for (char result : same) CHECK(result);
  }
}

TEST(refuses_an_operand_without_a_unit_stride) {
  float data[16] = {};
  const Matrix good{DType::kFloat32, data, 2, 1}, bad{DType::kFloat32, data, 4, 2};
  Gemm g{.m = 2,
         .n = 2,
         .k = 2,
         .a = bad,
         .b = good,
         .c_dtype = DType::kFloat32,
         .c = data + 8,
         .c_stride = 2,
         .accumulate = false};
  CHECK_THROWS(gemm(g), Error);
  g.a = good;
  g.b = bad;
  CHECK_THROWS(gemm(g), Error);
}

TEST_MAIN()
