#include "fastsft/matvec.h"

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
      std::vector<uint16_t> half;
      for (float v : values) half.push_back(bfloat16_bits(v));
      stored = bytes_of(half);
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
  std::vector<uint16_t> half(rows * w.k), half_out(rows * w.n);
  for (int64_t i = 0; i < rows * w.k; ++i) half[i] = bfloat16_bits(x[i]);
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

void compare(const Weight& w, DType dtype, int64_t rows, bool with_bias) {
  std::vector<float> x = integers(rows * w.k, 3);
  const std::vector<float> bias = integers(w.n, 4);
  if (w.format == WeightFormat::kW8A8) {  // the scale of every run is 1
    for (int64_t i = 0; i < rows * w.k; ++i) {
      if (i % w.k % 128 == 0) x[i] = i % 2 ? 127 : -127;
    }
  }
  const std::vector<float> out = product(w, dtype, rows, x, with_bias ? bias.data() : nullptr);
  bool ok = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < w.n; ++c) {
      double sum = with_bias ? bias[c] : 0;
      for (int64_t i = 0; i < w.k; ++i) sum += static_cast<double>(x[r * w.k + i]) * w.values[c * w.k + i];
      ok &= std::abs(out[r * w.n + c] - sum) <= (dtype == DType::kBFloat16 ? 0x1p-8 * std::abs(sum) : 0);
    }
  }
  CHECK(ok);
  if (!ok) {
    std::printf("%s: format %d x %s, rows %d n %d k %d group %d, bias %d\n", isa_name(active_isa()),
                static_cast<int>(w.format), dtype_name(dtype), static_cast<int>(rows), static_cast<int>(w.n),
                static_cast<int>(w.k), static_cast<int>(w.group), with_bias);
  }
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

TEST(refuses_other_groups) {
  Weight w(WeightFormat::kInt4, 4, 64);
  const std::vector<float> x = integers(64, 1);
  for (int64_t group : {0, 8, 48, 128}) {
    w.group = group;
    CHECK_THROWS(product(w, DType::kFloat32, 1, x, nullptr), Error);
  }
}

TEST_MAIN()
