// Memory traffic per token and key head: K and V once in and once out, in words of two elements (K: 64 bytes apart, the
// same lines for 16 tokens in a row). Arithmetic: int8 only, a maximum and a division per element.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "kv_cache_kernels.h"

namespace fastsft {
namespace {

// Element i of a token's head goes to k[k_place(i)] and v[v_place(i)], counted in elements from its group of 16 on.
struct Slot {
  int64_t dim, key;  // key of the group
  bool in_pairs;     // all but float32

  int64_t k_place(int64_t i) const { return in_pairs ? (i / 2 * kGroupKeys + key) * 2 + i % 2 : i * kGroupKeys + key; }
  int64_t v_place(int64_t i) const { return in_pairs ? (key / 2 * dim + i) * 2 + key % 2 : key * dim + i; }
};

template <typename T>
void put(const Slot& slot, const T* k, const T* v, T* k_group, T* v_group) {
  for (int64_t i = 0; i < slot.dim; ++i) k_group[slot.k_place(i)] = k[i];
  for (int64_t i = 0; i < slot.dim; ++i) v_group[slot.v_place(i)] = v[i];
}

// values = row / scale to the nearest, ties to even. A NaN or infinity makes the scale NaN.
float quantise(const float* row, int64_t dim, int8_t* values) {
  float most = 0, poison = 0;
  for (int64_t i = 0; i < dim; ++i) {
    most = std::max(most, std::fabs(row[i]));
    poison += row[i] * 0.0f;
  }
  const float scale = most / 127 + poison;
  if (!(scale >= FLT_MIN)) {  // too small to divide by, or NaN
    std::fill_n(values, dim, int8_t{0});
    return std::isnan(scale) ? scale : 0.0f;
  }
  constexpr float kWhole = 0x1.8p23f;  // added and taken off again, it rounds to the nearest, ties to even
  for (int64_t i = 0; i < dim; ++i) values[i] = static_cast<int8_t>(row[i] / scale + kWhole - kWhole);
  return scale;
}

const float* as_floats(DType dtype, const void* row, int64_t dim, float* room) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row);
  for (int64_t i = 0; i < dim; ++i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(row)[i]) << 16;
    std::memcpy(room + i, &bits, sizeof(bits));
  }
  return room;
}

// One head of one token; null rows are zeros.
void write_head(const KVLayout& layout, const KVPlaces& places, char* head, int64_t slot, DType dtype, const void* k,
                const void* v) {
  static constexpr float kZeros[kMaxHeadDim] = {};
  if (k == nullptr) k = v = kZeros;
  char* const k_group = head + slot / kGroupKeys * places.group;
  char* const v_group = k_group + places.half;
  const Slot at{layout.head_dim, slot % kGroupKeys, layout.format != KVFormat::kFloat32};
  switch (layout.format) {
    case KVFormat::kFloat32:
      return put(at, static_cast<const uint32_t*>(k), static_cast<const uint32_t*>(v),
                 reinterpret_cast<uint32_t*>(k_group), reinterpret_cast<uint32_t*>(v_group));
    case KVFormat::kBFloat16:
      return put(at, static_cast<const uint16_t*>(k), static_cast<const uint16_t*>(v),
                 reinterpret_cast<uint16_t*>(k_group), reinterpret_cast<uint16_t*>(v_group));
    case KVFormat::kInt8: {
      float room[kMaxHeadDim] = {};
      int8_t k_values[kMaxHeadDim], v_values[kMaxHeadDim];
      auto* const scales = reinterpret_cast<float*>(head + 2 * places.half);
      scales[slot] = quantise(as_floats(dtype, k, at.dim, room), at.dim, k_values);
      scales[layout.block_size + slot] = quantise(as_floats(dtype, v, at.dim, room), at.dim, v_values);
      return put(at, k_values, v_values, reinterpret_cast<int8_t*>(k_group), reinterpret_cast<int8_t*>(v_group));
    }
  }
}

}  // namespace

void kv_write(const KVLayout& layout, char* layer_blocks, const CacheRows& rows, DType dtype, const void* k,
              const void* v, int64_t k_stride, int64_t v_stride, int64_t row_begin, int64_t row_end) {
  const KVPlaces places(layout);
  const auto size = static_cast<int64_t>(dtype_size(dtype));
  int64_t b = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    while (rows.cu_seqlens[b + 1] <= row) ++b;
    const int32_t* const table = rows.block_table + b * rows.table_stride;
    const int64_t position = rows.context_lens[b] - rows.cu_seqlens[b + 1] + row;
    char* const block = layer_blocks + table[position / layout.block_size] * places.block;
    const int64_t slot = position % layout.block_size;
    const int64_t cleared = row + 1 == rows.cu_seqlens[b + 1] ? (slot / kGroupKeys + 1) * kGroupKeys : slot + 1;
    for (int64_t head = 0; head < layout.heads; ++head) {
      char* const to = block + head * places.head;
      const int64_t at = head * layout.head_dim;
      write_head(layout, places, to, slot, dtype, static_cast<const char*>(k) + (row * k_stride + at) * size,
                 static_cast<const char*>(v) + (row * v_stride + at) * size);
      for (int64_t i = slot + 1; i < cleared; ++i) write_head(layout, places, to, i, dtype, nullptr, nullptr);
    }
  }
}

}  // namespace fastsft
