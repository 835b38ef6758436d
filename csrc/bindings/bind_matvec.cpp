#include "packed_weight.h"

namespace fastsft::bindings {
namespace {

WeightFormat format_of(const Check& check, const std::string& name) {
  if (name == "float32") return WeightFormat::kFloat32;
  if (name == "bfloat16") return WeightFormat::kBFloat16;
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "int4") return WeightFormat::kInt4;
  check.require(name == "w8a8", "format", "float32, bfloat16, int8, int4 or w8a8", name);
  return WeightFormat::kW8A8;
}

bool has_channel_scales(WeightFormat format) { return format == WeightFormat::kInt8 || format == WeightFormat::kW8A8; }

// The row-major values in the type that the format packs.
void* values_of(Check& check, WeightFormat format, py::handle tensor) {
  if (has_channel_scales(format) || format == WeightFormat::kInt4) return check.in<int8_t>("values", tensor, "N K");
  const TensorView view = check.floats("values", tensor, "N K");
  const DType wanted = format == WeightFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
  check.require(Check::dtype_of(view) == wanted, "values", dtype_name(wanted), view.describe());
  return view.data;
}

void* data_of(Check& check, WeightFormat format, py::handle data, int64_t n, int64_t k) {
  void* const bytes = check.in<uint8_t>("data", data, "bytes");
  const int64_t expected = packed_bytes(format, n, k);
  check.require(check.size("bytes") == expected, "data", std::to_string(expected) + " bytes",
                std::to_string(check.size("bytes")));
  check.require(!check.on_cuda(), "data", "a CPU tensor", "one on cuda");
  return bytes;
}

}  // namespace

PackedWeight weight_of(const char* op, const std::string& format_name, int64_t group, int64_t n, int64_t k,
                       py::handle data, py::handle scales) {
  Check check(op);
  const WeightFormat format = format_of(check, format_name);
  PackedWeight weight{
      .format = format, .n = n, .k = k, .group = group, .data = data_of(check, format, data, n, k), .scales = nullptr};
  if (has_channel_scales(format)) {
    weight.scales = check.in<float>("scales", scales, "slabs 64");
    check.require(check.size("slabs") == (n + 63) / 64, "scales", "[slabs, 64]", std::to_string(check.size("slabs")));
  }
  if (format == WeightFormat::kInt4) {
    check.require(group == 32 || group == 64, "group", "32 or 64", std::to_string(group));
    const TensorView view = check.floats("scales", scales, "slabs groups 64");
    check.require(Check::dtype_of(view) == DType::kBFloat16 && check.size("slabs") == (n + 63) / 64 &&
                      check.size("groups") == (k + group - 1) / group,
                  "scales", "bfloat16 [slabs, groups, 64]", view.describe());
    weight.scales = view.data;
  }
  return weight;
}

namespace {

void unpack_checked(const std::string& format_name, py::handle data_tensor, py::handle values_tensor) {
  Check check("unpack_weight");
  const WeightFormat format = format_of(check, format_name);
  void* const values = values_of(check, format, values_tensor);
  const int64_t n = check.size("N"), k = check.size("K");
  const void* const data = data_of(check, format, data_tensor, n, k);
  py::gil_scoped_release release;
  unpack_weight(format, n, k, data, values);
}

// `parts` are stacked: matrices [rows, K] of one type whose last dimension is contiguous.
void pack_checked(const py::list& parts, const std::string& format_name, int64_t group, int64_t n, int64_t k,
                  py::handle data, py::handle scales) {
  std::vector<const void*> rows;
  DType dtype = DType::kFloat32;
  for (const py::handle part : parts) {
    Check check("pack_weight");
    const TensorView view = check.floats("weight", part, "N K", Layout::kRows);
    check.require(!check.on_cuda() && check.size("K") == k, "weight", "[N, " + std::to_string(k) + "] on the CPU",
                  view.describe());
    check.require(rows.empty() || dtype == Check::dtype_of(view), "weight", dtype_name(dtype), view.describe());
    dtype = Check::dtype_of(view);
    for (int64_t i = 0; i < view.shape[0]; ++i) {
      rows.push_back(static_cast<const char*>(view.data) +
                     i * view.strides[0] * static_cast<int64_t>(dtype_size(dtype)));
    }
  }
  FASTSFT_CHECK(static_cast<int64_t>(rows.size()) == n, "pack_weight: weight: expected ", n, " rows, got ",
                rows.size());
  const PackedWeight to = weight_of("pack_weight", format_name, group, n, k, data, scales);
  py::gil_scoped_release release;
  pack_weight(to, {.dtype = dtype, .rows = rows.data()});
}

void packed_linear_checked(py::handle x_tensor, const std::string& format_name, int64_t group, py::handle data,
                           py::handle scales, py::handle bias, py::handle out_tensor) {
  Check check("packed_linear");
  const TensorView x = check.floats("x", x_tensor, "M K"), out = check.floats("out", out_tensor, "M N");
  check.same_dtype("out", out, x);
  check.require(Check::dtype_of(x) != DType::kFloat16, "x", "float32 or bfloat16", x.describe());
  const int64_t n = check.size("N"), k = check.size("K");
  const PackedWeight weight = weight_of("packed_linear", format_name, group, n, k, data, scales);
  const PackedLinear call{.weight = weight,
                          .dtype = Check::dtype_of(x),
                          .rows = check.size("M"),
                          .x = x.data,
                          .bias = check.optional<float>("bias", bias, "N"),
                          .residual = nullptr,
                          .out_dtype = Check::dtype_of(x),
                          .out = out.data};
  py::gil_scoped_release release;
  packed_linear(call);
}

}  // namespace

void register_matvec(py::module_& m) {
  m.def(
      "packed_bytes",
      [](const std::string& format, int64_t n, int64_t k) {
        return packed_bytes(format_of(Check("pack_weight"), format), n, k);
      },
      py::arg("format"), py::arg("n"), py::arg("k"));
  m.def("pack_weight", &pack_checked, py::arg("parts"), py::arg("format"), py::arg("group"), py::arg("n"), py::arg("k"),
        py::arg("data"), py::arg("scales"));
  m.def("unpack_weight", &unpack_checked, py::arg("format"), py::arg("data"), py::arg("values"));
  m.def("packed_linear", &packed_linear_checked, py::arg("x"), py::arg("format"), py::arg("group"), py::arg("data"),
        py::arg("scales"), py::arg("bias"), py::arg("out"));
}

}  // namespace fastsft::bindings
