// MinHash signatures of token ids. Contract: fastsft/minhash.h.
//
// Traffic: a token is read once (4 or 8 bytes), a signature written once: nothing against the arithmetic, which is
// num_perm multiply-add-mins per shingle. Bound: integer multiply-adds, 64 per clock and multiprocessor; minima run
// beside them in another pipe. A thread takes 8 hash functions and, of the two half warps, every other shingle: for 4
// shingles 32 multiply-adds, 16 three-way minima (sm_90; 32 two-way ones before), 4 broadcast loads and about 7
// instructions to address them, 59 issued where the multiply-adds need 64 clocks of their pipe. Forming a shingle is
// n + 20 instructions once, against 128 / 32 * 1.9 * 32 = 240 of its sketch: about 10 % for n = 5, then 40 per document
// and warp to merge and write.
//
// The packed axis is cut into chunks whatever the documents' lengths, so that neither long nor short ones unbalance the
// blocks. Minima do not depend on the order, so parts of a document meet in an atomic minimum and the bits are exact.
#include "fastsft/common.h"
#include "fastsft/minhash.h"
#include "fastsft/rng.h"
#include "launch.h"
#include "offsets.cuh"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRange = 512;              // positions, i.e. possible first tokens of shingles, per warp
constexpr int kChunk = kWarps * kRange;  // and per block
constexpr int kHashes = 128;             // hash functions per pass
constexpr int kHalf = kWarp / 2;
constexpr int kPerThread = kHashes / kHalf;
constexpr int kUnroll = 4;  // shingles per half warp and turn of the loop

constexpr uint32_t kBase = 0x1B873593u;

__device__ uint32_t fmix32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}

template <typename Token>
struct Sketch {
  const Token* tokens;
  int64_t num_tokens;
  const int64_t* cu_seqlens;
  int64_t n;
  int num_perm, ngram;
  uint64_t seed;
  uint32_t* signatures;
};

// The running minima of a warp: lane l of either half has the hash functions l % 16 + 16 j.
struct Minima {
  uint32_t a[kPerThread], b[kPerThread], least[kPerThread];

  __device__ __forceinline__ void load_factors(const uint32_t* factors) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      a[j] = factors[j * kHalf + lane_id() % kHalf];
      b[j] = factors[kHashes + j * kHalf + lane_id() % kHalf];
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) least[j] = 0xffffffffu;
  }

  __device__ __forceinline__ void add(uint32_t x, uint32_t y) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) least[j] = minimum(a[j] * x + b[j], a[j] * y + b[j], least[j]);
  }

  // Past the end, the last shingle counts again: a minimum does not mind.
  __device__ __forceinline__ void add_all(const uint32_t* shingles, int count) {
    const int half = lane_id() / kHalf, last = count - 1;
    for (int i = half; i - half < count; i += 2 * kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; u += 2) add(shingles[min(i + 2 * u, last)], shingles[min(i + 2 * u + 2, last)]);
    }
  }

  __device__ __forceinline__ void merge_into(uint32_t* signature, int count) {
    const int half = lane_id() / kHalf;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) least[j] = min(least[j], shuffle_xor(least[j], kHalf));
#pragma unroll
    for (int k = 0; k < kPerThread / 2; ++k) {  // each half writes half of them
      const int column = (half * (kPerThread / 2) + k) * kHalf + lane_id() % kHalf;
      const uint32_t value = half == 0 ? least[k] : least[kPerThread / 2 + k];
      if (column < count) atomic_min(signature + column, value);
    }
  }
};

__device__ uint32_t shingle_of(const uint32_t* units, int count) {
  uint32_t sum = 0, coefficient = 1;
  for (int k = 0; k < count; ++k) {
    coefficient *= kBase;
    sum += units[k] * coefficient;
  }
  return fmix32(sum);
}

template <typename Token>
__global__ void __launch_bounds__(kThreads) sketch_kernel(Sketch<Token> s) {
  uint32_t* const factors = shared_memory<uint32_t>();  // [2, kHashes]
  uint32_t* const shingles = factors + 2 * kHashes;     // [kChunk]: the one that begins here, if its document goes on
  uint32_t* const units = shingles + kChunk;            // [kChunk + ngram - 1]
  const int thread = static_cast<int>(threadIdx.x);
  const int first_hash = static_cast<int>(blockIdx.y) * kHashes;
  const int64_t chunk = int64_t{blockIdx.x} * kChunk;

  const Philox4 random = philox(s.seed, kMinHashStream, static_cast<uint64_t>(first_hash + thread));
  factors[thread] = random.x[0] | 1;
  factors[kHashes + thread] = random.x[1];
  for (int i = thread; i < kChunk + s.ngram - 1; i += kThreads) {
    units[i] = chunk + i < s.num_tokens ? fmix32(static_cast<uint32_t>(s.tokens[chunk + i])) : 0;
  }
  __syncthreads();
  uint32_t sums[kChunk / kThreads] = {};
  uint32_t coefficient = 1;
  for (int k = 0; k < s.ngram; ++k) {
    coefficient *= kBase;
#pragma unroll
    for (int i = 0; i < kChunk / kThreads; ++i) sums[i] += units[i * kThreads + thread + k] * coefficient;
  }
#pragma unroll
  for (int i = 0; i < kChunk / kThreads; ++i) shingles[i * kThreads + thread] = fmix32(sums[i]);
  __syncthreads();

  Minima minima;
  minima.load_factors(factors);
  const int64_t from = chunk + warp_id() * kRange, to = min(from + kRange, s.num_tokens);
  if (from >= to) return;
  int64_t document = last_not_above(s.cu_seqlens, s.n, 0, from);
  while (true) {
    const int64_t begin = min(max(s.cu_seqlens[document], int64_t{0}), s.num_tokens);
    const int64_t end = min(max(s.cu_seqlens[document + 1], int64_t{0}), s.num_tokens);
    const int64_t last_start = max(begin, end - s.ngram);
    const int64_t first = max(begin, from), past = min(last_start + 1, to);
    if (begin < end && first < past) {
      minima.clear();
      if (end - begin < s.ngram) {  // one shingle, all of it
        const uint32_t whole = shingle_of(units + (begin - chunk), static_cast<int>(end - begin));
        minima.add(whole, whole);
      } else {
        minima.add_all(shingles + (first - chunk), static_cast<int>(past - first));
      }
      minima.merge_into(s.signatures + document * s.num_perm + first_hash, s.num_perm - first_hash);
    }
    if (end >= to) return;
    const int64_t next = last_not_above(s.cu_seqlens, s.n, document, end);
    if (next == document) return;  // broken offsets
    document = next;
  }
}

}  // namespace

template <typename Token>
void minhash_token_signatures(const Token* tokens, int64_t num_tokens, const int64_t* cu_seqlens, int64_t n,
                              const MinHashOptions& options, uint32_t* signatures, void* stream) {
  const int64_t num_perm = options.num_perm, ngram = options.ngram;
  FASTSFT_CHECK(num_perm >= 1 && num_perm < (int64_t{1} << 22),
                "minhash_token_signatures: num_perm: expected 1 to 2^22 - 1 "
                "on CUDA, got ",
                num_perm);
  FASTSFT_CHECK(ngram >= 1 && ngram <= kMaxNgram, "minhash_token_signatures: ngram: expected 1 to ", kMaxNgram,
                " on CUDA, got ", ngram);
  FASTSFT_CHECK(num_tokens < int64_t{1} << 42, "minhash_token_signatures: tokens: expected fewer than 2^42, got ",
                num_tokens);
  if (n == 0) return;
  fill_bytes(signatures, 0xff, static_cast<std::size_t>(n * num_perm) * sizeof(uint32_t), stream);
  const Sketch<Token> sketch{.tokens = tokens,
                             .num_tokens = num_tokens,
                             .cu_seqlens = cu_seqlens,
                             .n = n,
                             .num_perm = static_cast<int>(num_perm),
                             .ngram = static_cast<int>(ngram),
                             .seed = options.seed,
                             .signatures = signatures};
  const dim3 grid(static_cast<unsigned>((num_tokens + kChunk - 1) / kChunk),
                  static_cast<unsigned>((num_perm + kHashes - 1) / kHashes));
  const std::size_t words = 2 * kHashes + kChunk + kChunk + static_cast<std::size_t>(ngram) - 1;
  launch<sketch_kernel<Token>>(grid, kThreads, words * sizeof(uint32_t), stream, sketch);
}

template void minhash_token_signatures(const int32_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                       uint32_t*, void*);
template void minhash_token_signatures(const int64_t*, int64_t, const int64_t*, int64_t, const MinHashOptions&,
                                       uint32_t*, void*);

}  // namespace fastsft::cuda
