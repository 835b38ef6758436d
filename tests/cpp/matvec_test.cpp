#include "fastsft/matvec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "fastsft/isa.h"
#include "fastsft/parallel.h"

using namespace fastsft;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kFloat32, WeightFormat::kBFloat16, WeightFormat::kInt8,
                                     WeightFormat::kInt4, WeightFormat::kW8A8};
constexpr int64_t kSizes[][2] = {{1, 1}, {7, 5}, {16, 32}, {65, 130}, {130, 1030}, {5, 0}};  // n, k

uint16_t bfloat16_bits(float v) {  // of a value that is exact in it
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
std::vector<uint16_t> halves(const std::vector<float>& values) {
  std::vector<uint16_t> half;
  for (float v : values) half.push_back(bfloat16_bits(v));
  return half;
}
template <typename T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  std::vector<char> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// Small integers in [-8, 7]: exact in every format, and so are their sums. The buffers have their exact sizes, so that
// AddressSanitizer sees a step past the end.
struct Weight {
  WeightFormat format;
  int64_t n, k, group;
  std::vector<float> values;  // with their scales, powers of two
  std::vector<char> stored, expected_scales, data, scales;

  Weight(WeightFormat f, int64_t rows, int64_t columns, int64_t group_size = 32)
      : format(f), n(rows), k(columns), group(group_size), values(n * k), data(packed_bytes(f, n, k)) {
    std::mt19937 random(static_cast<unsigned>(n * 1000 + k));
    std::uniform_int_distribution<int> small(-8, 7);
    std::vector<int8_t> integers(n * k);
    for (auto& v : integers) v = static_cast<int8_t>(small(random));
    // What makes packing find these very integers and scales.
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t i = 0; i < k; i += group) {
        if (format == WeightFormat::kInt4) integers[c * k + i] = -8;
      }
      if (k > 0 && (format == WeightFormat::kInt8 || format == WeightFormat::kW8A8)) integers[c * k + c % k] = -127;
    }
    for (int64_t i = 0; i < n * k; ++i) values[i] = integers[i];
    const int64_t slabs = (n + 63) / 64, groups = (k + group - 1) / group;
    const auto scale = [](int64_t i) { return std::ldexp(1.0f, static_cast<int>(i % 5) - 2); };
    if (format == WeightFormat::kFloat32) {
      stored = bytes_of(values);
    } else if (format == WeightFormat::kBFloat16) {
      stored = bytes_of(halves(values));
    } else {
      stored = bytes_of(integers);
    }
    if (format == WeightFormat::kInt8 || format == WeightFormat::kW8A8) {
      std::vector<float> all(slabs * 64);
      for (int64_t c = 0; c < n; ++c) {
        all[c] = k == 0 ? 0 : scale(c);  // of a channel of nothing
        for (int64_t i = 0; i < k; ++i) values[c * k + i] *= all[c];
      }
      expected_scales = bytes_of(all);
    }
    if (format == WeightFormat::kInt4) {
      std::vector<uint16_t> all(slabs * groups * 64);
      for (int64_t c = 0; c < n; ++c) {
        for (int64_t g = 0; g < groups; ++g) all[(c / 64 * groups + g) * 64 + c % 64] = bfloat16_bits(scale(c + 3 * g));
        for (int64_t i = 0; i < k; ++i) values[c * k + i] *= scale(c + 3 * (i / group));
      }
      expected_scales = bytes_of(all);
    }
    scales.assign(expected_scales.size(), 1);
    pack();
  }

  void pack() {
    std::vector<const void*> rows;
    for (int64_t c = 0; c < n; ++c) rows.push_back(values.data() + c * k);
    std::fill(data.begin(), data.end(), char{1});
    pack_weight(view(), {DType::kFloat32, rows.data()});
  }

  PackedWeight view() const { return {format, n, k, group, data.data(), scales.data()}; }
};

std::vector<float> integers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> small(-4, 4);
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(small(random));
  return values;
}

// The product as float; in bfloat16 the sums below are rounded, which exact() allows for.
std::vector<float> product(const Weight& w, DType dtype, int64_t rows, const std::vector<float>& x, const float* bias) {
  std::vector<float> out(rows * w.n);
  if (dtype == DType::kFloat32) {
    packed_linear({.weight = w.view(),
                   .dtype = dtype,
                   .rows = rows,
                   .x = x.data(),
                   .bias = bias,
                   .residual = nullptr,
                   .out_dtype = dtype,
                   .out = out.data()});
    return out;
  }
  const std::vector<uint16_t> half = halves(x);
  std::vector<uint16_t> half_out(rows * w.n);
  packed_linear({.weight = w.view(),
                 .dtype = dtype,
                 .rows = rows,
                 .x = half.data(),
                 .bias = bias,
                 .residual = nullptr,
                 .out_dtype = dtype,
                 .out = half_out.data()});
  for (int64_t i = 0; i < rows * w.n; ++i) out[i] = widen(half_out[i]);
  return out;
}

// x holds integers, of which the largest magnitude of every run is 127 in W8A8: its scale is 1.
void expect_exact(const Weight& w, DType dtype, int64_t rows, const std::vector<float>& x, const float* bias) {
  const std::vector<float> out = product(w, dtype, rows, x, bias);
  bool ok = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < w.n; ++c) {
      double sum = bias ? bias[c] : 0;
      for (int64_t i = 0; i < w.k; ++i) sum += static_cast<double>(x[r * w.k + i]) * w.values[c * w.k + i];
      ok &= std::abs(out[r * w.n + c] - sum) <= (dtype == DType::kBFloat16 ? 0x1p-8 * std::abs(sum) : 0);
    }
  }
  CHECK(ok);
  if (!ok) {
    std::printf("%s: format %d x %s, rows %d n %d k %d group %d, bias %d\n", isa_name(active_isa()),
                static_cast<int>(w.format), dtype_name(dtype), static_cast<int>(rows), static_cast<int>(w.n),
                static_cast<int>(w.k), static_cast<int>(w.group), bias != nullptr);
  }
}

void compare(const Weight& w, DType dtype, int64_t rows, bool with_bias) {
  std::vector<float> x = integers(rows * w.k, 3);
  const std::vector<float> bias = integers(w.n, 4);
  if (w.format == WeightFormat::kW8A8) {
    for (int64_t i = 0; i < rows * w.k; ++i) {
      if (i % w.k % 128 == 0) x[i] = i % 2 ? 127 : -127;
    }
  }
  expect_exact(w, dtype, rows, x, with_bias ? bias.data() : nullptr);
}

}  // namespace

TEST(every_format_type_and_edge) {
  for (Isa isa : available_isas()) {
    set_isa(isa);
    for (const auto& [n, k] : kSizes) {
      for (WeightFormat format : kFormats) {
        const Weight w(format, n, k), wide(format, n, k, 64);
        for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
          for (int64_t rows : {0, 1, 2, 3, 4, 7, 8, 16, 17, 35}) compare(w, dtype, rows, rows % 2 == 1);
          compare(wide, dtype, 5, false);
        }
      }
    }
  }
}

TEST(unpacking_gives_the_values_back) {
  for (const auto& [n, k] : kSizes) {
    for (WeightFormat format : kFormats) {
      Weight w(format, n, k);
      for (Isa isa : available_isas()) {
        set_isa(isa);
        w.pack();
        CHECK(w.scales == w.expected_scales);
        std::vector<char> back(w.stored.size(), 1);
        unpack_weight(format, n, k, w.data.data(), back.data());
        CHECK(back == w.stored);
      }
    }
  }
}

TEST(a_line_is_64_bytes_and_the_rest_of_a_panel_is_zero) {
  CHECK(packed_bytes(WeightFormat::kFloat32, 17, 3) == 2 * 3 * 64);
  CHECK(packed_bytes(WeightFormat::kBFloat16, 17, 3) == 2 * 2 * 64);
  CHECK(packed_bytes(WeightFormat::kInt8, 17, 5) == 2 * 2 * 64);
  CHECK(packed_bytes(WeightFormat::kInt4, 16, 8) == 64);
  CHECK(packed_bytes(WeightFormat::kInt4, 0, 8) == 0);
  const Weight one(WeightFormat::kInt8, 1, 1);
  for (std::size_t i = 0; i < one.data.size(); ++i) CHECK(one.data[i] == (i == 0 ? -127 : 0));
}

TEST(rows_and_threads_do_not_change_the_bits) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (WeightFormat format : kFormats) {
    Weight w(format, 200, 530);
    std::vector<float> x(19 * w.k);
    for (float& v : x) v = normal(random);
    for (Isa isa : available_isas()) {
      set_isa(isa);
      set_num_threads(4);
      const std::vector<float> all = product(w, DType::kFloat32, 19, x, nullptr);
      set_num_threads(1);
      for (int64_t r = 0; r < 19; ++r) {
        const std::vector<float> row(x.begin() + r * w.k, x.begin() + (r + 1) * w.k);
        const std::vector<float> alone = product(w, DType::kFloat32, 1, row, nullptr);
        CHECK(std::memcmp(alone.data(), &all[r * w.n], w.n * 4) == 0);
      }
    }
  }
}

// The product, 256.75, is no bfloat16: rounded it is 256, and 258 with the residual if that came first.
TEST(a_residual_is_added_to_the_rounded_product) {
  constexpr int64_t kRows = 3;
  for (WeightFormat format : kFormats) {
    Weight w(format, 85, 32);
    std::fill(w.values.begin(), w.values.end(), 8.0f);
    w.pack();
    const std::vector<float> bias(w.n, 0.75f);
    const std::vector<uint16_t> x = halves(std::vector<float>(kRows * w.k, 1.0f));
    const std::vector<uint16_t> residual = halves(std::vector<float>(kRows * w.n, 0.5f));
    for (Isa isa : available_isas()) {
      set_isa(isa);
      std::vector<uint16_t> in_place = residual;
      std::vector<float> wide(kRows * w.n);
      PackedLinear call{.weight = w.view(),
                        .dtype = DType::kBFloat16,
                        .rows = kRows,
                        .x = x.data(),
                        .bias = bias.data(),
                        .residual = residual.data(),
                        .out_dtype = DType::kFloat32,
                        .out = wide.data()};
      packed_linear(call);
      call.residual = call.out = in_place.data();
      call.out_dtype = DType::kBFloat16;
      packed_linear(call);
      CHECK(wide == std::vector<float>(wide.size(), 256.5f));
      CHECK(in_place == halves(std::vector<float>(in_place.size(), 256.0f)));
    }
  }
}

TEST(the_largest_magnitude_of_a_run_counts_wherever_it_stands) {
  for (int64_t k : {1, 5, 127, 130, 143, 259}) {
    const Weight w(WeightFormat::kW8A8, 5, k);
    for (Isa isa : available_isas()) {
      set_isa(isa);
      for (int64_t place = 0; place < std::min<int64_t>(k, 128); ++place) {
        std::vector<float> x = integers(2 * k, 6);
        for (int64_t row : {0, 1}) {
          for (int64_t run = 0; run < k; run += 128) {
            x[row * k + run + place % std::min<int64_t>(128, k - run)] = row ? 127 : -127;
          }
        }
        for (DType dtype : {DType::kFloat32, DType::kBFloat16}) expect_exact(w, dtype, 2, x, nullptr);
      }
    }
  }
}

TEST(what_is_not_finite_makes_its_row_nan_and_no_other) {
  constexpr int64_t kRows = 3;
  const float bad_values[] = {NAN, -NAN, INFINITY, -INFINITY};
  for (int64_t k : {5, 143, 259}) {
    const Weight w(WeightFormat::kW8A8, 21, k);
    const std::vector<float> clean = integers(kRows * k, 7);
    for (Isa isa : available_isas()) {
      set_isa(isa);
      for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        const std::vector<float> expected = product(w, dtype, kRows, clean, nullptr);
        for (int64_t place = 0; place < k; ++place) {
          std::vector<float> x = clean;
          x[k + place] = bad_values[place % 4];
          const std::vector<float> out = product(w, dtype, kRows, x, nullptr);
          bool ok = true;
          for (int64_t i = 0; i < kRows * w.n; ++i) ok &= i / w.n == 1 ? std::isnan(out[i]) : out[i] == expected[i];
          CHECK(ok);
        }
      }
    }
  }
}

TEST(refuses_other_groups) {
  Weight w(WeightFormat::kInt4, 4, 64);
  const std::vector<float> x = integers(64, 1);
  for (int64_t group : {0, 8, 48, 128}) {
    w.group = group;
    CHECK_THROWS(product(w, DType::kFloat32, 1, x, nullptr), Error);
  }
}

TEST_MAIN()
