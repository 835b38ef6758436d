#include "fastsft/kv_cache.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

KVLayout layout_of(const Check& check, const std::string& format, int64_t heads, int64_t head_dim, int64_t block_size) {
  KVLayout layout{.format = KVFormat::kInt8, .heads = heads, .head_dim = head_dim, .block_size = block_size};
  if (format == "float32") layout.format = KVFormat::kFloat32;
  if (format == "bfloat16") layout.format = KVFormat::kBFloat16;
  check.require(format == "int8" || layout.format != KVFormat::kInt8, "format", "float32, bfloat16 or int8", format);
  return layout;
}

// The blocks of one layer and the rows of a step, checked against each other.
struct Cache {
  KVLayout layout;
  char* blocks;
  CacheRows rows;

  Cache(Check& check, const KVLayout& of, int64_t row_count, py::handle blocks_tensor, py::handle table,
        py::handle cu_seqlens, py::handle context_lens)
      : layout(of), blocks(reinterpret_cast<char*>(check.in<uint8_t>("blocks", blocks_tensor, "blocks bytes"))) {
    check.require(!check.on_cuda(), "blocks", "a CPU tensor", "one on cuda");
    const int64_t bytes = kv_block_bytes(layout);
    check.require(check.size("bytes") == bytes, "blocks", "[num_blocks, " + std::to_string(bytes) + "]",
                  std::to_string(check.size("bytes")) + " bytes");
    rows.block_table = check.in<int32_t>("block_table", table, "B blocks_of_one");
    rows.cu_seqlens = check.in<int32_t>("cu_seqlens", cu_seqlens, "B+1");
    rows.context_lens = check.in<int32_t>("context_lens", context_lens, "B");
    rows.rows = row_count;
    rows.sequences = check.size("B");
    rows.table_stride = check.size("blocks_of_one");
    check_cache_rows(layout, rows, check.size("blocks"));
  }
};

DType type_for(const Check& check, const KVLayout& layout, const char* name, const TensorView& rows) {
  const DType dtype = Check::dtype_of(rows);
  const bool takes_float32 = layout.format != KVFormat::kBFloat16;
  const bool takes_bfloat16 = layout.format != KVFormat::kFloat32;
  check.require((takes_float32 && dtype == DType::kFloat32) || (takes_bfloat16 && dtype == DType::kBFloat16), name,
                !takes_bfloat16  ? "float32"
                : !takes_float32 ? "bfloat16"
                                 : "float32 or bfloat16",
                rows.describe());
  return dtype;
}

// Rows whose heads stand side by side; the distance of the rows is free.
TensorView heads_in(Check& check, const char* name, py::handle tensor, const char* dims) {
  const TensorView view = check.floats(name, tensor, dims, Layout::kRows);
  check.require(view.numel() == 0 || view.shape[1] == 1 || view.strides[1] == view.shape[2], name,
                "heads next to each other", view.describe());
  return view;
}

void kv_write_checked(py::handle blocks, const std::string& format, int64_t block_size, py::handle k_tensor,
                      py::handle v_tensor, py::handle table, py::handle cu_seqlens, py::handle context_lens) {
  Check check("kv_write");
  const TensorView k = heads_in(check, "k", k_tensor, "T H D"), v = heads_in(check, "v", v_tensor, "T H D");
  check.same_dtype("v", v, k);
  const Cache cache(check, layout_of(check, format, check.size("H"), check.size("D"), block_size), check.size("T"),
                    blocks, table, cu_seqlens, context_lens);
  const DType dtype = type_for(check, cache.layout, "k", k);
  py::gil_scoped_release release;
  kv_write(cache.layout, cache.blocks, cache.rows, dtype, k.data, v.data, k.strides[0], v.strides[0], 0,
           cache.rows.rows);
}

void cached_attention_checked(py::handle q_tensor, py::handle blocks, const std::string& format, int64_t heads,
                              int64_t block_size, py::handle table, py::handle cu_seqlens, py::handle context_lens,
                              int64_t window_left, float scale, py::handle out_tensor) {
  Check check("cached_attention");
  const TensorView q = heads_in(check, "q", q_tensor, "T H D"), out = check.floats("out", out_tensor, "T H D");
  check.same_dtype("out", out, q);
  const int64_t q_heads = check.size("H"), dim = check.size("D");
  const Cache cache(check, layout_of(check, format, heads, dim, block_size), check.size("T"), blocks, table, cu_seqlens,
                    context_lens);
  check.require(q_heads > 0 && q_heads % heads == 0, "q", "a multiple of " + std::to_string(heads) + " heads",
                std::to_string(q_heads));
  check.require(window_left >= -1, "window_left", ">= -1", std::to_string(window_left));
  const CachedAttention call{.layout = cache.layout,
                             .layer_blocks = cache.blocks,
                             .rows = cache.rows,
                             .dtype = type_for(check, cache.layout, "q", q),
                             .q = q.data,
                             .q_stride = q.strides[0],
                             .q_heads = q_heads,
                             .out = out.data,
                             .out_stride = q_heads * dim,
                             .window_left = window_left,
                             .scale = scale};
  py::gil_scoped_release release;
  cached_attention(call);
}

}  // namespace

void register_kv_cache(py::module_& m) {
  m.def(
      "kv_block_bytes",
      [](const std::string& format, int64_t heads, int64_t head_dim, int64_t block_size) {
        return kv_block_bytes(layout_of(Check("kv_block_bytes"), format, heads, head_dim, block_size));
      },
      py::arg("format"), py::arg("heads"), py::arg("head_dim"), py::arg("block_size"));
  m.def("kv_write", &kv_write_checked, py::arg("blocks"), py::arg("format"), py::arg("block_size"), py::arg("k"),
        py::arg("v"), py::arg("block_table"), py::arg("cu_seqlens"), py::arg("context_lens"));
  m.def("cached_attention", &cached_attention_checked, py::arg("q"), py::arg("blocks"), py::arg("format"),
        py::arg("heads"), py::arg("block_size"), py::arg("block_table"), py::arg("cu_seqlens"), py::arg("context_lens"),
        py::arg("window_left"), py::arg("scale"), py::arg("out"));
}

}  // namespace fastsft::bindings
