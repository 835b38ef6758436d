#include <pybind11/stl.h>

#include <mutex>

#include "fastsft/decoder.h"
#include "packed_weight.h"

namespace fastsft::bindings {
namespace {

// A float32 [size] vector, or null for None.
const float* vector_of(const char* name, py::handle tensor, int64_t size) {
  Check check("Decoder");
  const auto* const data = check.optional<float>(name, tensor, "N");
  check.require(data == nullptr || check.size("N") == size, name, "[" + std::to_string(size) + "]",
                tensor.is_none() ? "None" : std::to_string(check.size("N")));
  return data;
}

PackedWeight weight_in(const char* name, py::handle weight, int64_t n, int64_t k) {
  const auto [rows, columns] = weight.attr("shape").cast<std::pair<int64_t, int64_t>>();
  FASTSFT_CHECK(rows == n && columns == k, "Decoder: ", name, ": expected [", n, ", ", k, "], got [", rows, ", ",
                columns, "]");
  return weight_of("Decoder", weight.attr("format").cast<std::string>(), weight.attr("group").cast<int64_t>(), n, k,
                   weight.attr("data"), weight.attr("scales"));
}

// A decoder's adapter, with the tensors that it points into kept alive.
struct NativeAdapter {
  Adapter adapter;
  const void* owner;  // the decoder whose sizes it has
  py::object kept;
};

LowRank low_rank_in(const char* name, py::handle part, int64_t n, int64_t k) {
  if (part.is_none()) return {};
  const auto rank = part.attr("a").attr("shape").cast<std::pair<int64_t, int64_t>>().first;
  return {.a = weight_in(name, part.attr("a"), rank, k), .b = weight_in(name, part.attr("b"), n, rank)};
}

// A decoder's description, with the tensors it points into kept alive, and what its steps work in.
class NativeDecoder {
 public:
  NativeDecoder(py::handle embedding, py::handle norm, py::handle head, int64_t heads, int64_t kv_heads,
                int64_t head_dim, int64_t intermediate, float eps) {
    Check check("Decoder");
    const TensorView table = check.floats("embedding", embedding, "V D");
    check.require(Check::dtype_of(table) != DType::kFloat16 && !check.on_cuda(), "embedding",
                  "float32 or bfloat16 on the CPU", table.describe());
    check.require(head_dim > 0 && head_dim % 2 == 0, "head_dim", "an even number", std::to_string(head_dim));
    check.require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "kv_heads", "a divisor of heads",
                  std::to_string(kv_heads));
    decoder_ = {.dtype = Check::dtype_of(table),
                .vocab = check.size("V"),
                .hidden = check.size("D"),
                .heads = heads,
                .kv_heads = kv_heads,
                .head_dim = head_dim,
                .intermediate = intermediate,
                .eps = eps,
                .embedding = table.data,
                .layers = {},
                .norm = vector_of("norm", norm, check.size("D")),
                .head = weight_in("head", head, check.size("V"), check.size("D"))};
    keep({embedding, norm, head});
  }

  void add_layer(py::handle layer) {
    const Decoder& d = decoder_;
    const int64_t attended = d.heads * d.head_dim, qkv = attended + 2 * d.kv_heads * d.head_dim;
    const auto vector = [&](const char* name, int64_t size) { return vector_of(name, layer.attr(name), size); };
    const auto weight = [&](const char* name, int64_t n, int64_t k) { return weight_in(name, layer.attr(name), n, k); };
    decoder_.layers.push_back({.attention_norm = vector("attention_norm", d.hidden),
                               .qkv = weight("qkv", qkv, d.hidden),
                               .qkv_bias = vector("qkv_bias", qkv),
                               .q_norm = vector("q_norm", d.head_dim),
                               .k_norm = vector("k_norm", d.head_dim),
                               .o = weight("o", d.hidden, attended),
                               .o_bias = vector("o_bias", d.hidden),
                               .mlp_norm = vector("mlp_norm", d.hidden),
                               .gate_up = weight("gate_up", 2 * d.intermediate, d.hidden),
                               .gate_up_bias = vector("gate_up_bias", 2 * d.intermediate),
                               .down = weight("down", d.hidden, d.intermediate),
                               .down_bias = vector("down_bias", d.hidden),
                               .window_left = layer.attr("window_left").cast<int64_t>()});
    keep({layer});
  }

  NativeAdapter adapter(const py::list& layers) const {
    const Decoder& d = decoder_;
    const int64_t attended = d.heads * d.head_dim, qkv = attended + 2 * d.kv_heads * d.head_dim;
    Check("Decoder").require(layers.size() == d.layers.size(), "adapter", std::to_string(d.layers.size()) + " layers",
                             std::to_string(layers.size()));
    NativeAdapter made{.adapter = {}, .owner = this, .kept = layers};
    for (const py::handle layer : layers) {
      const auto part = [&](const char* name, int64_t n, int64_t k) {
        return low_rank_in(name, layer.attr(name), n, k);
      };
      made.adapter.layers.push_back({.qkv = part("qkv", qkv, d.hidden),
                                     .o = part("o", d.hidden, attended),
                                     .gate_up = part("gate_up", 2 * d.intermediate, d.hidden),
                                     .down = part("down", d.hidden, d.intermediate)});
    }
    return made;
  }

  int64_t block_bytes(const std::string& kv_format, int64_t block_size) const {
    return kv_block_bytes(layout_of(Check("Decoder"), kv_format, block_size));
  }

  void step(py::handle ids, py::handle cos, py::handle sin, const std::string& kv_format, py::handle cache,
            int64_t block_size, py::handle cu_seqlens, py::handle context_lens, py::handle block_table,
            const py::list& adapters, py::handle wanted, py::handle logits, py::handle hidden) {
    Check check("decoder_step");
    DecoderStep call{};
    call.ids = check.in<int64_t>("ids", ids, "T");
    const TensorView cosines = check.floats("cos", cos, "P R"), sines = check.floats("sin", sin, "P R");
    check.require(Check::dtype_of(cosines) == decoder_.dtype && check.size("R") * 2 == decoder_.head_dim, "cos",
                  std::string(dtype_name(decoder_.dtype)) + " [positions, head_dim / 2]", cosines.describe());
    check.same_dtype("sin", sines, cosines);
    call.cos = cosines.data;
    call.sin = sines.data;
    call.positions = check.size("P");
    call.layout = layout_of(check, kv_format, block_size);
    call.cache = reinterpret_cast<char*>(check.in<uint8_t>("cache", cache, "layers blocks bytes"));
    call.num_blocks = check.size("blocks");
    const auto layers = static_cast<int64_t>(decoder_.layers.size());
    const int64_t bytes = kv_block_bytes(call.layout);
    check.require(check.size("layers") == layers && check.size("bytes") == bytes, "cache",
                  "[" + std::to_string(layers) + ", blocks, " + std::to_string(bytes) + "]",
                  "[" + std::to_string(check.size("layers")) + ", " + std::to_string(call.num_blocks) + ", " +
                      std::to_string(check.size("bytes")) + "]");
    call.rows.cu_seqlens = check.in<int32_t>("cu_seqlens", cu_seqlens, "B+1");
    call.rows.context_lens = check.in<int32_t>("context_lens", context_lens, "B");
    call.rows.block_table = check.in<int32_t>("block_table", block_table, "B M");
    call.rows.rows = check.size("T");
    call.rows.sequences = check.size("B");
    call.rows.table_stride = check.size("M");
    std::vector<const Adapter*> chosen;
    for (const py::handle adapter : adapters) {
      const auto* const one = adapter.cast<const NativeAdapter*>();  // of None: null
      check.require(one == nullptr || one->owner == this, "adapters", "adapters of these weights", "another's");
      chosen.push_back(one == nullptr ? nullptr : &one->adapter);
    }
    check.require(chosen.empty() || static_cast<int64_t>(chosen.size()) == call.rows.sequences, "adapters",
                  "none, or one for each of " + std::to_string(call.rows.sequences) + " sequences",
                  std::to_string(chosen.size()));
    call.adapters = chosen.empty() ? nullptr : chosen.data();
    call.wanted = check.in<int64_t>("wanted", wanted, "R_");
    call.num_wanted = check.size("R_");
    call.logits = check.in<float>("logits", logits, "R_ V");
    check.require(check.size("V") == decoder_.vocab, "logits", "[rows wanted, " + std::to_string(decoder_.vocab) + "]",
                  std::to_string(check.size("V")) + " columns");
    if (!hidden.is_none()) {
      const TensorView states = check.floats("hidden", hidden, "R_ D");
      check.require(Check::dtype_of(states) == decoder_.dtype && check.size("D") == decoder_.hidden, "hidden",
                    std::string(dtype_name(decoder_.dtype)) + " [rows wanted, " + std::to_string(decoder_.hidden) + "]",
                    states.describe());
      call.hidden = states.data;
    }
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(use_);
    decoder_step(decoder_, call, workspace_);
  }

 private:
  KVLayout layout_of(const Check& check, const std::string& kv_format, int64_t block_size) const {
    KVLayout layout{.format = KVFormat::kFloat32,
                    .heads = decoder_.kv_heads,
                    .head_dim = decoder_.head_dim,
                    .block_size = block_size};
    if (kv_format == "float32") return layout;
    check.require(kv_format == "bfloat16" || kv_format == "int8", "kv_format", "float32, bfloat16 or int8", kv_format);
    layout.format = kv_format == "int8" ? KVFormat::kInt8 : KVFormat::kBFloat16;
    return layout;
  }

  void keep(std::initializer_list<py::handle> objects) {
    for (const py::handle object : objects) kept_.push_back(py::reinterpret_borrow<py::object>(object));
  }

  Decoder decoder_;
  DecoderWorkspace workspace_;
  std::mutex use_;  // of the workspace
  std::vector<py::object> kept_;
};

}  // namespace

void register_decoder(py::module_& m) {
  py::class_<NativeAdapter>(m, "DecoderAdapter");
  py::class_<NativeDecoder>(m, "Decoder")
      .def(py::init<py::handle, py::handle, py::handle, int64_t, int64_t, int64_t, int64_t, float>(),
           py::arg("embedding"), py::arg("norm"), py::arg("head"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("intermediate"), py::arg("eps"))
      .def("add_layer", &NativeDecoder::add_layer, py::arg("layer"))
      .def("adapter", &NativeDecoder::adapter, py::arg("layers"))
      .def("kv_block_bytes", &NativeDecoder::block_bytes, py::arg("kv_format"), py::arg("block_size"))
      .def("step", &NativeDecoder::step, py::arg("ids"), py::arg("cos"), py::arg("sin"), py::arg("kv_format"),
           py::arg("cache"), py::arg("block_size"), py::arg("cu_seqlens"), py::arg("context_lens"),
           py::arg("block_table"), py::arg("adapters"), py::arg("wanted"), py::arg("logits"), py::arg("hidden"));
}

}  // namespace fastsft::bindings
