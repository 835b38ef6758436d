// First pass, a thread per document: 8 to 24 bytes read, 25 written, one Philox block.
// Second pass, per output token: the token read and written once (4 or 8 bytes each) and 8 bytes of source index
// written, 16 bytes for int32 tokens; a few comparisons to find the source. Memory-bound: threads take consecutive
// outputs, so that every access is coalesced, and 8 of them each, whose loads are independent: 64 kB in flight per
// multiprocessor of 2048 threads. Documents are found by search, not assigned: their lengths do not matter.
#include "fastsft/fim.h"
#include "launch.h"
#include "offsets.cuh"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;

struct Plan {
  const int64_t *cu_seqlens, *doc_ids, *spans;
  int64_t num_docs, num_tokens;
  uint64_t seed, fim_below, spm_below;
  int64_t max_len;
  FimMode* mode;
  int64_t *cuts, *out_lengths;
  int32_t* broken;
};

__global__ void plan_kernel(Plan p) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b >= p.num_docs) return;
  const int64_t length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  bool good = length >= 0 && length < 0xFFFFFFFF;
  good = good && (b > 0 || p.cu_seqlens[0] == 0) && (b + 1 < p.num_docs || p.cu_seqlens[b + 1] == p.num_tokens);
  const uint64_t id = static_cast<uint64_t>(p.doc_ids == nullptr ? b : p.doc_ids[b]);
  FimDraw draw = fim_draw(p.seed, id, length, p.fim_below, p.spm_below, p.max_len);
  if (p.spans != nullptr) {
    draw.begin = p.spans[2 * b];
    draw.end = p.spans[2 * b + 1];
    good = good && 0 <= draw.begin && draw.begin <= draw.end && draw.end <= length;
  }
  p.mode[b] = draw.mode;
  p.cuts[2 * b] = draw.begin;
  p.cuts[2 * b + 1] = draw.end;
  p.out_lengths[b] = length + (draw.mode == FimMode::kNone ? 0 : 3);
  if (!good) atomic_max(p.broken, 1);
}

template <typename Token>
struct Copy {
  const Token* tokens;
  const int64_t* cu_seqlens;
  int64_t num_docs;
  const FimMode* mode;
  const int64_t *cuts, *out_cu_seqlens;
  int64_t size;
  Token sentinels[3];
  Token* out_tokens;
  int64_t* source_index;
};

// Where output i of a document comes from: its position in the document, or -1 - (the sentinel's number).
__device__ int64_t source_of(FimMode mode, int64_t length, int64_t begin, int64_t end, int64_t i) {
  if (mode == FimMode::kNone) return i;
  if (i == 0) return -1;
  const int64_t suffix = length - end;
  const int64_t suf = mode == FimMode::kPsm ? begin + 1 : 1;  // where SUF stands
  if (i < suf) return i - 1;
  if (i == suf) return -2;
  const int64_t mid = suf + 1 + suffix;
  if (i < mid) return end + (i - suf - 1);
  if (i == mid) return -3;
  return i - mid - 1 + (mode == FimMode::kPsm ? begin : 0);
}

template <typename Token>
__global__ void __launch_bounds__(kThreads) copy_kernel(Copy<Token> c) {
  const int64_t first = int64_t{blockIdx.x} * kThreads * kPerThread + threadIdx.x;
  int64_t source[kPerThread];
  Token token[kPerThread];
  int64_t doc = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t at = first + k * kThreads;
    if (at >= c.size) break;
    doc = last_not_above(c.out_cu_seqlens, c.num_docs, doc, at);
    const int64_t begin = c.cu_seqlens[doc], length = c.cu_seqlens[doc + 1] - begin;
    source[k] = source_of(c.mode[doc], length, c.cuts[2 * doc], c.cuts[2 * doc + 1], at - c.out_cu_seqlens[doc]);
    if (source[k] >= 0) source[k] += begin;
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (first + k * kThreads >= c.size) break;
    const int64_t from = source[k];
    token[k] = from >= 0 ? c.tokens[from] : from == -1 ? c.sentinels[0] : from == -2 ? c.sentinels[1] : c.sentinels[2];
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t at = first + k * kThreads;
    if (at >= c.size) break;
    c.out_tokens[at] = token[k];
    c.source_index[at] = source[k] >= 0 ? source[k] : -1;
  }
}

dim3 blocks_for(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block));
}

}  // namespace

void fim_plan(const int64_t* cu_seqlens, int64_t num_docs, int64_t num_tokens, const FimOptions& options,
              const int64_t* doc_ids, const int64_t* spans, FimMode* mode, int64_t* cuts, int64_t* out_lengths,
              int32_t* broken, void* stream) {
  const Plan plan{.cu_seqlens = cu_seqlens,
                  .doc_ids = doc_ids,
                  .spans = spans,
                  .num_docs = num_docs,
                  .num_tokens = num_tokens,
                  .seed = options.seed,
                  .fim_below = fim_threshold(options.rate, "rate"),
                  .spm_below = fim_threshold(options.spm_rate, "spm_rate"),
                  .max_len = options.max_len,
                  .mode = mode,
                  .cuts = cuts,
                  .out_lengths = out_lengths,
                  .broken = broken};
  launch<plan_kernel>(blocks_for(num_docs, kThreads), kThreads, 0, stream, plan);
}

template <typename Token>
void fim_copy(const Token* tokens, const int64_t* cu_seqlens, int64_t num_docs, const FimMode* mode,
              const int64_t* cuts, const int64_t* out_cu_seqlens, int64_t out_tokens_size, const Token* sentinels,
              Token* out_tokens, int64_t* source_index, void* stream) {
  const Copy<Token> copy{.tokens = tokens,
                         .cu_seqlens = cu_seqlens,
                         .num_docs = num_docs,
                         .mode = mode,
                         .cuts = cuts,
                         .out_cu_seqlens = out_cu_seqlens,
                         .size = out_tokens_size,
                         .sentinels = {sentinels[0], sentinels[1], sentinels[2]},
                         .out_tokens = out_tokens,
                         .source_index = source_index};
  launch<copy_kernel<Token>>(blocks_for(out_tokens_size, kThreads * kPerThread), kThreads, 0, stream, copy);
}

template void fim_copy(const int32_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*, int64_t,
                       const int32_t*, int32_t*, int64_t*, void*);
template void fim_copy(const int64_t*, const int64_t*, int64_t, const FimMode*, const int64_t*, const int64_t*, int64_t,
                       const int64_t*, int64_t*, int64_t*, void*);

}  // namespace fastsft::cuda
