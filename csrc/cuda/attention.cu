// Checks and launches of the attention kernels; contract in fastsft/attention.h.
#include "attention_bwd_sm80.cuh"
#include "attention_bwd_sm90.cuh"
#include "attention_fwd_sm80.cuh"
#include "attention_fwd_sm90.cuh"
#include "attention_short_sm80.cuh"

namespace fastsft::cuda {

// Instantiated in attention_<family>_<architecture>_<type>.cu.
extern template void launch_attention_forward<BFloat16>(const ForwardArguments&, int64_t, void*);
extern template void launch_attention_forward<Float16>(const ForwardArguments&, int64_t, void*);
extern template void launch_attention_forward_sm90<BFloat16>(const ForwardArguments&, const AttentionShape&, void*);
extern template void launch_attention_forward_sm90<Float16>(const ForwardArguments&, const AttentionShape&, void*);
extern template void launch_attention_delta<BFloat16>(const BackwardArguments&, int64_t, void*);
extern template void launch_attention_delta<Float16>(const BackwardArguments&, int64_t, void*);
extern template void launch_attention_dkv<BFloat16>(const BackwardArguments&, int64_t, void*);
extern template void launch_attention_dkv<Float16>(const BackwardArguments&, int64_t, void*);
extern template void launch_attention_dq<BFloat16>(const BackwardArguments&, int64_t, void*);
extern template void launch_attention_dq<Float16>(const BackwardArguments&, int64_t, void*);
extern template void launch_attention_backward_sm90<BFloat16, true>(const BackwardArguments&, const AttentionShape&,
                                                                    void*);
extern template void launch_attention_backward_sm90<BFloat16, false>(const BackwardArguments&, const AttentionShape&,
                                                                     void*);
extern template void launch_attention_backward_sm90<Float16, true>(const BackwardArguments&, const AttentionShape&,
                                                                   void*);
extern template void launch_attention_backward_sm90<Float16, false>(const BackwardArguments&, const AttentionShape&,
                                                                    void*);
extern template void launch_attention_short<BFloat16>(const BackwardArguments&, const AttentionBatch&, int64_t, void*);
extern template void launch_attention_short<Float16>(const BackwardArguments&, const AttentionBatch&, int64_t, void*);

namespace {

// Keys and values of the heads in flight should stay in the L2: 50 MB on an H100, 40 MB on an A100.
constexpr int64_t kSectionBytes = int64_t{24} << 20;

// The key heads of a section: the most that divide all of them and fit.
int section_heads(const AttentionShape& shape, int64_t total_k) {
  const int64_t bytes = 4 * total_k * shape.head_dim;
  int64_t heads = shape.num_kv_heads;
  while (heads > 1 && (shape.num_kv_heads % heads != 0 || heads * bytes > kSectionBytes)) --heads;
  return static_cast<int>(heads);
}

void check_shape(const AttentionShape& shape) {
  FASTSFT_CHECK(has_varlen_attention(shape.dtype, shape.head_dim), "varlen_attention: q: no CUDA kernel for ",
                dtype_name(shape.dtype), " and head size ", shape.head_dim);
  FASTSFT_CHECK(shape.num_kv_heads > 0 && shape.num_q_heads > 0 && shape.num_q_heads % shape.num_kv_heads == 0,
                "varlen_attention: q: expected a number of heads that is a multiple of the key heads (",
                shape.num_kv_heads, "), got ", shape.num_q_heads);
}

// The rows of a tensor whose strides are fit for 16-byte reads. A stride over a single token or head says nothing: any
// will do that keeps addresses aligned.
AttentionInput checked_rows(const char* name, AttentionInput x, int64_t tokens, int64_t heads,
                            const AttentionShape& shape) {
  if (tokens <= 1) x.token_stride = heads * shape.head_dim;
  if (heads <= 1) x.head_stride = shape.head_dim;
  FASTSFT_CHECK(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.token_stride % 8 == 0 && x.head_stride % 8 == 0,
                "varlen_attention: ", name, ": expected data and strides that are multiples of 16 bytes, got strides ",
                x.token_stride, " and ", x.head_stride, " elements");
  return x;
}

}  // namespace

bool has_varlen_attention(DType dtype, int64_t head_dim) {
  return dtype != DType::kFloat32 &&
         (head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256);
}

void varlen_attention_forward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionPlan& plan,
                              const AttentionInput& q, const AttentionInput& k, const AttentionInput& v, void* out,
                              float* lse, void* stream) {
  check_shape(shape);
  const int group = static_cast<int>(shape.num_q_heads / shape.num_kv_heads);
  const ForwardArguments arguments{.q = checked_rows("q", q, batch.total_q, shape.num_q_heads, shape),
                                   .k = checked_rows("k", k, batch.total_k, shape.num_kv_heads, shape),
                                   .v = checked_rows("v", v, batch.total_k, shape.num_kv_heads, shape),
                                   .out = static_cast<uint16_t*>(out),
                                   .lse = lse,
                                   .rows = plan.rows,
                                   .order = plan.forward_order,
                                   .total_q = batch.total_q,
                                   .total_k = static_cast<int>(batch.total_k),
                                   .num_q_heads = static_cast<int>(shape.num_q_heads),
                                   .group = group,
                                   .section = section_heads(shape, batch.total_k) * group,
                                   .scale = ScoreScale(shape)};
  const auto launch_as = [&]<typename Element>(Element) {
    if (runs_sm90a() && has_hopper_forward(arguments, shape)) {
      launch_attention_forward_sm90<Element>(arguments, shape, stream);
    } else {
      launch_attention_forward<Element>(arguments, shape.head_dim, stream);
    }
  };
  if (shape.dtype == DType::kBFloat16) {
    launch_as(BFloat16{});
  } else {
    launch_as(Float16{});
  }
}

void varlen_attention_backward(const AttentionShape& shape, const AttentionBatch& batch, const AttentionPlan& plan,
                               const AttentionInput& dout, const AttentionInput& q, const AttentionInput& k,
                               const AttentionInput& v, const AttentionInput& out, const float* lse, const float* dlse,
                               float* delta, void* dq, void* dk, void* dv, void* stream) {
  check_shape(shape);
  const BackwardArguments arguments{.dout = checked_rows("dout", dout, batch.total_q, shape.num_q_heads, shape),
                                    .q = checked_rows("q", q, batch.total_q, shape.num_q_heads, shape),
                                    .k = checked_rows("k", k, batch.total_k, shape.num_kv_heads, shape),
                                    .v = checked_rows("v", v, batch.total_k, shape.num_kv_heads, shape),
                                    .out = checked_rows("out", out, batch.total_q, shape.num_q_heads, shape),
                                    .lse = lse,
                                    .dlse = dlse,
                                    .delta = delta,
                                    .dq = static_cast<uint16_t*>(dq),
                                    .dk = static_cast<uint16_t*>(dk),
                                    .dv = static_cast<uint16_t*>(dv),
                                    .plan = plan,
                                    .total_q = static_cast<int>(batch.total_q),
                                    .total_k = static_cast<int>(batch.total_k),
                                    .num_q_heads = static_cast<int>(shape.num_q_heads),
                                    .num_kv_heads = static_cast<int>(shape.num_kv_heads),
                                    .group = static_cast<int>(shape.num_q_heads / shape.num_kv_heads),
                                    .section = section_heads(shape, batch.total_k),
                                    .skip_short = has_short_kernel(shape.head_dim),
                                    .scale = ScoreScale(shape)};
  const auto launch_all = [&]<typename Element>(Element) {
    launch_attention_delta<Element>(arguments, shape.head_dim, stream);
    if (runs_sm90a() && has_hopper_backward(arguments, shape)) {
      launch_attention_backward_sm90<Element, true>(arguments, shape, stream);
      launch_attention_backward_sm90<Element, false>(arguments, shape, stream);
    } else {
      launch_attention_dkv<Element>(arguments, shape.head_dim, stream);
      launch_attention_dq<Element>(arguments, shape.head_dim, stream);
    }
    launch_attention_short<Element>(arguments, batch, shape.head_dim, stream);
  };
  if (shape.dtype == DType::kBFloat16) {
    launch_all(BFloat16{});
  } else {
    launch_all(Float16{});
  }
}

}  // namespace fastsft::cuda
