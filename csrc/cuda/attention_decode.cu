// Attention of a sequence's last queries over its block cache. Contract: fastsft/attention.h.
//
// Traffic: keys and values are read once, 4 D bytes per key and key head, by 16-byte cp.async; a segment of 256 keys
// adds its partial result, D + 2 floats per query head written and read again: with 4 query heads per key head 3 % of
// the segment's own bytes, which mostly stay in the L2 cache. Arithmetic: 4 D flop per key and query head, i.e. as many
// flop per byte as query heads share a key head (1 to 16). Scalar fused multiply-adds balance the memory at about 14
// flop per byte at their peak, before conversions and reductions; mma.sync m16n8k16 pads the query rows of a key head
// to 16, which is then the intensity whatever the group, an eighth of its rate. Hence matrix instructions throughout.
//
// In flight: 4.8 TB/s for 700 ns are 3.4 MB, 26 kB per multiprocessor of 132. A warp keeps three tiles of 16 keys or
// values in flight (12 kB at D = 128), a multiprocessor 8 warps at D >= 128, 12 at 80 and 96, 16 at 32 and 64: 96 kB at
// D = 128 and 256, 48 kB at D = 64.
//
// One warp works alone on a unit: (sequence, segment of keys, 16 query rows, key head). Warps share nothing, so there
// are no barriers and one warp's waiting is another's work. Units are dealt out in turn, key heads first, so that what
// runs at one time reads neighbouring rows of the cache. Where the partial results would need too much memory (many
// query rows: chunked prefill), a unit is all segments of its rows, folded into one partial result in the same order.
#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "fastsft/attention.h"
#include "launch.h"
#include "primitives.cuh"

namespace fastsft::cuda {
namespace {

constexpr int kSegment = kPagedSegment;  // keys whose partial result is formed in registers
constexpr int kStep = 16;                // keys per step: the depth of one matrix instruction
constexpr int kRows = 16;                // query rows of a unit: the height of one matrix instruction
constexpr int kStages = 2;
constexpr int kMergeThreads = 128;
constexpr float kLog2e = 1.44269504088896341f;

template <int kDim>
struct Tiling {
  static constexpr int kWarps = kDim > 128 ? 2 : 4;
  static constexpr int kBlocks = kDim <= 64 ? 4 : 2;  // per multiprocessor
  static constexpr int kStride = kDim + 8;  // an odd number of 16-byte chunks: no bank conflicts in load_matrix
  static constexpr int kTile = kStep * kStride;
  static constexpr bool kQueryInShared = kDim > 128;  // where the accumulators leave too few registers
  static constexpr int kQueryBytes = kQueryInShared ? kRows * kDim * 2 : 0;
  static constexpr int kSlotBytes = kSegment * static_cast<int>(sizeof(int2));
  static constexpr int kWarpBytes = 2 * kStages * kTile * 2 + kQueryBytes + kSlotBytes;
};

struct Arguments {
  AttentionShape shape;
  AttentionInput q;
  PagedCache cache;
  const int32_t* cu_q;
  int batch, total_q, group;
  int64_t window_left, window_right;  // causal counted in; -1: unbounded
  int splits;                         // partial results per query row; 1: a unit is all segments of its rows
  float score_scale, cap_scale;       // score * score_scale, or, with a cap, tanh(score * score_scale) * cap_scale
  void* out;
  float* sums;     // [total_q * num_q_heads, splits, head_dim]
  float2* maxima;  // [total_q * num_q_heads, splits]: maximum in base 2 and sum of exponentials
  int* counts;     // [total_q * num_q_heads]: segments of the row's sequence
};

struct Sequence {
  int index, begin, queries, context;
  int first_segment, segments;
  bool broken;  // its length is outside the contract
};

__device__ Sequence sequence_at(const Arguments& a, int b) {
  Sequence s;
  s.index = b;
  s.begin = min(max(a.cu_q[b], 0), a.total_q);
  s.queries = min(max(a.cu_q[b + 1], s.begin), a.total_q) - s.begin;
  const int length = a.cache.context_lens[b];
  const int64_t room = a.cache.max_blocks * a.cache.block_size;
  s.broken = length < s.queries || length > room;
  s.context = s.broken ? 0 : length;
  const int64_t oldest = a.window_left < 0 || s.broken ? 0 : s.context - s.queries - a.window_left;
  s.first_segment = static_cast<int>(max(oldest, int64_t{0}) / kSegment);
  s.segments = max(1, (s.context + kSegment - 1) / kSegment - s.first_segment);
  return s;
}

// The keys [begin, end) that a query sees; none for rows that pad a tile.
struct Range {
  int begin, end;
};

__device__ Range keys_of(const Arguments& a, const Sequence& s, int query) {
  if (query >= s.queries) return {0, 0};
  const int64_t position = s.context - s.queries + query, context = s.context;
  const int64_t begin = a.window_left < 0 ? 0 : max(int64_t{0}, position - a.window_left);
  const int64_t end = a.window_right < 0 ? context : min(context, position + 1 + a.window_right);
  return {static_cast<int>(begin), static_cast<int>(end)};
}

// Finds the unit of a number in the list of all units. The numbers asked for must ascend. Every lane of a warp calls
// and gets the same answer.
class UnitList {
 public:
  __device__ explicit UnitList(const Arguments& a) : a_(a) {}

  __device__ static int tiles(const Arguments& a, const Sequence& s) {
    return (s.queries * a.group + kRows - 1) / kRows;
  }

  // False after the last unit; else its sequence and its number within that.
  __device__ bool find(int64_t unit, Sequence* sequence, int64_t* within) {
    while (unit >= first_ + count_) {  // on to the next 32 sequences, one for each lane
      first_ += count_;
      chunk_ += kWarp;
      if (chunk_ >= a_.batch) return false;
      const int b = chunk_ + lane_id();
      int64_t mine = 0;
      if (b < a_.batch) {
        const Sequence s = sequence_at(a_, b);
        mine = static_cast<int64_t>(tiles(a_, s)) * a_.shape.num_kv_heads * (a_.splits > 1 ? s.segments : 1);
      }
      int64_t sum = mine;
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const int64_t other = shuffle_up(sum, delta);
        if (lane_id() >= delta) sum += other;
      }
      before_ = sum - mine;
      count_ = shuffle(sum, kWarp - 1);
    }
    // A sequence without units has the same `before_` as the next one, so that the last lane to qualify has some.
    const int owner = kWarp - 1 - leading_zeros(warp_ballot(before_ <= unit - first_));
    *within = unit - first_ - shuffle(before_, owner);
    *sequence = sequence_at(a_, chunk_ + owner);
    return true;
  }

 private:
  const Arguments& a_;
  int chunk_ = -kWarp;
  int64_t first_ = 0, count_ = 0;  // units before these 32 sequences, and in them
  int64_t before_ = 0;             // in them, before this lane's
};

// A partial softmax: maximum (base 2) and sum relative to it; sum 0: no key seen.
struct Partial {
  float max, sum;
};

// Merges `next` into `total`; accumulators become scale_total * total + scale_next * next. Both ways of splitting the
// work go through here, and a partial result without keys changes no bit.
__device__ Partial merge(const Partial& total, const Partial& next, float* scale_total, float* scale_next) {
  *scale_total = next.sum == 0.0f ? 1.0f : 0.0f;
  *scale_next = 1.0f - *scale_total;
  if (next.sum == 0.0f) return total;
  if (total.sum == 0.0f) return next;
  const float most = fmaxf(total.max, next.max);
  *scale_total = exp2_approx(total.max - most);
  *scale_next = exp2_approx(next.max - most);
  return {most, fmaf(*scale_total, total.sum, *scale_next * next.sum)};
}

__device__ float merged(float scale_total, float total, float scale_next, float next) {
  if (scale_next == 0.0f) return total;
  if (scale_total == 0.0f) return next;
  return fmaf(scale_total, total, scale_next * next);
}

// acc / sum; + 0 makes the sign of a zero a matter of its value and not of how the sum was split.
__device__ float normalised(float acc, float sum) { return sum == 0.0f ? 0.0f : acc / sum + 0.0f; }

// What one warp does.
template <typename T, int kDim>
class Worker {
  using Layout = Tiling<kDim>;
  using Word = typename T::Word;
  static constexpr int kSteps = kDim / 16;   // of the matrix product over D
  static constexpr int kColumns = kDim / 8;  // 8-wide tiles of the output

 public:
  __device__ __forceinline__ explicit Worker(const Arguments& a) : a_(a) {
    unsigned char* shared = shared_memory() + warp_id() * Layout::kWarpBytes;
    tiles_ = reinterpret_cast<Word*>(shared);
    shared += 2 * kStages * Layout::kTile * 2;
    query_words_ = reinterpret_cast<uint4*>(shared);
    slots_ = reinterpret_cast<int2*>(shared + Layout::kQueryBytes);
  }

  __device__ __forceinline__ void run(const Sequence& s, int64_t within) {
    s_ = s;
    head_ = static_cast<int>(within % a_.shape.num_kv_heads);
    within /= a_.shape.num_kv_heads;
    const int tiles = UnitList::tiles(a_, s);
    first_row_ = static_cast<int>(within % tiles) * kRows;
    const int split = static_cast<int>(within / tiles);
    for (int i = 0; i < 2; ++i) seen_[i] = keys_of(a_, s, query_of(i));
    const int last_row = min(first_row_ + kRows, s.queries * a_.group) - 1;
    const int begin = keys_of(a_, s, first_row_ / a_.group).begin, end = keys_of(a_, s, last_row / a_.group).end;
    load_query();
    const bool alone = a_.splits == 1;
    const int last = alone ? s.segments : split + 1;
    for (int i = alone ? 0 : split; i < last; ++i) {
      attend(s.first_segment + i, begin, end);
      if (alone && i > 0) fold_stored();
      if (alone && i + 1 == last) {
        write_output();
      } else {
        write_partial(alone ? 0 : i);
      }
    }
    if (!alone && split == 0) write_counts();
  }

 private:
  // Accumulator element i / 2 of a lane belongs to tile row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
  __device__ __forceinline__ int row_of(int i) const { return first_row_ + lane_id() / 4 + 8 * i; }
  __device__ __forceinline__ int query_of(int i) const { return row_of(i) / a_.group; }
  __device__ __forceinline__ bool row_exists(int i) const { return row_of(i) < s_.queries * a_.group; }
  __device__ __forceinline__ int64_t row_index(int i) const {  // in [total_q, num_q_heads]
    const int query = query_of(i), in_group = row_of(i) % a_.group;
    return static_cast<int64_t>(s_.begin + query) * a_.shape.num_q_heads + head_ * a_.group + in_group;
  }

  __device__ __forceinline__ void load_query() {
    const Word* rows[2] = {nullptr, nullptr};
    for (int i = 0; i < 2; ++i) {
      if (!row_exists(i)) continue;
      rows[i] = static_cast<const Word*>(a_.q.data) + (s_.begin + query_of(i)) * a_.q.token_stride +
                (head_ * a_.group + row_of(i) % a_.group) * a_.q.head_stride + 2 * (lane_id() % 4);
    }
    if constexpr (Layout::kQueryInShared) sync_warp();  // the last unit's have been read
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Word* row = rows[j % 2];
        words[j] = row == nullptr ? 0 : load_readonly<uint32_t>(row + 16 * k + 8 * (j / 2));
      }
      if constexpr (Layout::kQueryInShared) {
        query_words_[k * kWarp + lane_id()] = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) query_[k][j] = words[j];
      }
    }
  }

  __device__ __forceinline__ void query_fragment(int k, uint32_t (&fragment)[4]) const {
    if constexpr (Layout::kQueryInShared) {
      const uint4 words = query_words_[k * kWarp + lane_id()];  // this lane's own: no barrier needed
      fragment[0] = words.x, fragment[1] = words.y, fragment[2] = words.z, fragment[3] = words.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) fragment[j] = query_[k][j];
    }
  }

  // Where the segment's keys begin .. end - 1 lie; true if a block id is outside the cache.
  __device__ __forceinline__ bool find_slots(int base, int begin, int end) {
    bool bad = false;
    sync_warp();  // the last segment's have been read
    const int32_t* table = a_.cache.block_table + s_.index * a_.cache.max_blocks;
    for (int i = lane_id(); i < kSegment; i += kWarp) {
      int2 slot = make_int2(-1, 0);
      const int key = base + i;
      if (key >= begin && key < end) {
        const int size = static_cast<int>(a_.cache.block_size), block = key / size;
        slot = make_int2(load_readonly<int32_t>(table + block), key - block * size);
        if (slot.x < 0 || slot.x >= a_.cache.num_blocks) {
          bad = true;
          slot.x = -1;
        }
      }
      slots_[i] = slot;
    }
    sync_warp();
    return warp_any(bad);
  }

  // Starts copying 16 rows of the cache, those of `slots`; zeros where there is no key.
  __device__ __forceinline__ void copy_tile(Word* to, const void* data, const int64_t (&strides)[3],
                                            const int2* slots) {
    constexpr int kChunks = kDim / 8;
    const Word* from = static_cast<const Word*>(data) + head_ * strides[2];
#pragma unroll
    for (int i = 0; i < kStep * kChunks / kWarp; ++i) {
      const int chunk = i * kWarp + lane_id(), row = chunk / kChunks, column = chunk % kChunks * 8;
      const int2 slot = slots[row];
      const bool valid = slot.x >= 0;
      const Word* source = from + column + (valid ? slot.x * strides[0] + slot.y * strides[1] : 0);
      copy_async(to + row * Layout::kStride + column, source, valid);
    }
  }

  __device__ __forceinline__ Word* key_tile(int stage) { return tiles_ + 2 * stage * Layout::kTile; }
  __device__ __forceinline__ Word* value_tile(int stage) { return tiles_ + (2 * stage + 1) * Layout::kTile; }

  // The accumulators, maxima and sums over the keys of one segment that lie in [begin, end).
  __device__ __forceinline__ void attend(int segment, int begin, int end) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc_[n][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) part_[i] = {-INFINITY, 0.0f};
    const int base = segment * kSegment;
    begin = max(begin, base);
    end = min(end, base + kSegment);
    const bool bad = find_slots(base, begin, end);
    const int first_step = (begin - base) / kStep, steps = begin < end ? (end - base + kStep - 1) / kStep : 0;
    const auto start_keys = [&](int step) {
      if (step < steps) copy_tile(key_tile(step % kStages), a_.cache.k, a_.cache.k_strides, slots_ + step * kStep);
      copy_async_commit();
    };
    const auto start_values = [&](int step) {
      if (step < steps) copy_tile(value_tile(step % kStages), a_.cache.v, a_.cache.v_strides, slots_ + step * kStep);
      copy_async_commit();
    };
    for (int stage = 0; stage < kStages; ++stage) {
      start_keys(first_step + stage);
      start_values(first_step + stage);
    }
    for (int step = first_step; step < steps; ++step) {
      copy_async_wait<2 * kStages - 1>();
      sync_warp();
      float scores[2][4] = {};
      multiply_keys(key_tile(step % kStages), scores);
      sync_warp();
      start_keys(step + kStages);
      uint32_t probabilities[4];
      softmax(base + step * kStep, scores, probabilities);
      copy_async_wait<2 * kStages - 1>();
      sync_warp();
      multiply_values(value_tile(step % kStages), probabilities);
      sync_warp();
      start_values(step + kStages);
    }
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      part_[i].sum += shuffle_xor(part_[i].sum, 1);
      part_[i].sum += shuffle_xor(part_[i].sum, 2);
      if (bad || s_.broken) part_[i].sum = NAN;
    }
  }

  __device__ __forceinline__ void multiply_keys(const Word* tile, float (&scores)[2][4]) const {
    const int matrix = lane_id() / 8, row = lane_id() % 8 + 8 * (matrix / 2);
    const Word* at = tile + row * Layout::kStride + 8 * (matrix % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t query[4], keys[4];
      query_fragment(k, query);
      load_matrix_x4(keys, at + 16 * k);
      mma_m16n8k16<T>(scores[0], query, keys[0], keys[1]);
      mma_m16n8k16<T>(scores[1], query, keys[2], keys[3]);
    }
  }

  // Scores of the 16 keys from `key` become probabilities relative to the running maximum, as the A operand of the next
  // product. Sums are of the rounded probabilities, the ones that multiply the values.
  __device__ __forceinline__ void softmax(int key, float (&scores)[2][4], uint32_t (&probabilities)[4]) {
    key += 2 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n][2 * i + j];
          const int at = key + 8 * n + j;
          x *= a_.score_scale;
          if (a_.cap_scale > 0.0f) x = tanhf(x) * a_.cap_scale;
          if (at < seen_[i].begin || at >= seen_[i].end) x = -INFINITY;
          most = fmaxf(most, x);
        }
      }
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      most = fmaxf(most, part_[i].max);
      const float shift = most == -INFINITY ? 0.0f : most;
      const float rescale = exp2_approx(part_[i].max - shift);
      part_[i].max = most;
      part_[i].sum *= rescale;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t both = T::pack(exp2_approx(scores[n][2 * i] - shift), exp2_approx(scores[n][2 * i + 1] - shift));
        part_[i].sum += T::low(both) + T::high(both);
        probabilities[2 * n + i] = both;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        acc_[n][2 * i] *= rescale;
        acc_[n][2 * i + 1] *= rescale;
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const Word* tile, const uint32_t (&probabilities)[4]) {
    const int matrix = lane_id() / 8, row = lane_id() % 8 + 8 * (matrix % 2);
    const Word* at = tile + row * Layout::kStride + 8 * (matrix / 2);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t values[4];
      load_matrix_x4_transposed(values, at + 8 * n);
      mma_m16n8k16<T>(acc_[n], probabilities, values[0], values[1]);
      mma_m16n8k16<T>(acc_[n + 1], probabilities, values[2], values[3]);
    }
  }

  __device__ __forceinline__ float* stored_sums(int i, int split) const {
    return a_.sums + (row_index(i) * a_.splits + split) * kDim + 2 * (lane_id() % 4);
  }

  __device__ __forceinline__ void write_partial(int split) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!row_exists(i)) continue;
      float* to = stored_sums(i, split);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) store(to + 8 * n, make_float2(acc_[n][2 * i], acc_[n][2 * i + 1]));
      if (lane_id() % 4 == 0) {
        a_.maxima[row_index(i) * a_.splits + split] = make_float2(part_[i].max, part_[i].sum);
      }
    }
  }

  // Merges the partial result of the segments before, which this warp has stored, with this segment's.
  __device__ __forceinline__ void fold_stored() {
    sync_warp();  // one lane of four wrote the maximum
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!row_exists(i)) continue;
      const float2 stored = a_.maxima[row_index(i)];
      float scale_total, scale_next;
      part_[i] = merge({stored.x, stored.y}, part_[i], &scale_total, &scale_next);
      const float* from = stored_sums(i, 0);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const float2 total = load<float2>(from + 8 * n);
        acc_[n][2 * i] = merged(scale_total, total.x, scale_next, acc_[n][2 * i]);
        acc_[n][2 * i + 1] = merged(scale_total, total.y, scale_next, acc_[n][2 * i + 1]);
      }
    }
    sync_warp();  // all have read what may be written next
  }

  __device__ __forceinline__ void write_counts() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row_exists(i) && lane_id() % 4 == 0) a_.counts[row_index(i)] = s_.segments;
    }
  }

  __device__ __forceinline__ void write_output() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!row_exists(i)) continue;
      Word* to = static_cast<Word*>(a_.out) + row_index(i) * kDim + 2 * (lane_id() % 4);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        store(to + 8 * n,
              T::pack(normalised(acc_[n][2 * i], part_[i].sum), normalised(acc_[n][2 * i + 1], part_[i].sum)));
      }
    }
  }

  const Arguments& a_;
  Word* tiles_;
  uint4* query_words_;
  int2* slots_;
  Sequence s_;
  int head_, first_row_;
  Range seen_[2];
  uint32_t query_[Layout::kQueryInShared ? 1 : kSteps][4];
  float acc_[kColumns][4];
  Partial part_[2];
};

template <typename T, int kDim>
__global__ void __launch_bounds__(Tiling<kDim>::kWarps* kWarp, Tiling<kDim>::kBlocks)
    decode_kernel(const __grid_constant__ Arguments a) {
  UnitList units(a);
  Worker<T, kDim> worker(a);
  Sequence sequence;
  int64_t within;
  const int64_t stride = int64_t{gridDim.x} * Tiling<kDim>::kWarps;
  for (int64_t unit = blockIdx.x + int64_t{gridDim.x} * warp_id(); units.find(unit, &sequence, &within);
       unit += stride) {
    worker.run(sequence, within);
  }
}

// One warp per query row: its segments' partial results, in order.
template <typename T, int kDim>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Arguments a) {
  constexpr int kMine = (kDim + kWarp - 1) / kWarp;
  const int64_t row = blockIdx.x * int64_t{kMergeThreads / kWarp} + warp_id();
  if (row >= int64_t{a.total_q} * a.shape.num_q_heads) return;
  const int count = min(a.counts[row], a.splits);
  const float* sums = a.sums + row * a.splits * kDim;
  Partial total{-INFINITY, 0.0f};
  float acc[kMine] = {};
#pragma unroll 4
  for (int split = 0; split < count; ++split) {
    const float2 stored = load<float2>(a.maxima + row * a.splits + split);
    float scale_total, scale_next;
    total = merge(total, {stored.x, stored.y}, &scale_total, &scale_next);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int column = i * kWarp + lane_id();
      if (column < kDim) acc[i] = merged(scale_total, acc[i], scale_next, sums[int64_t{split} * kDim + column]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int column = i * kWarp + lane_id();
    if (column < kDim) {
      static_cast<typename T::Word*>(a.out)[row * kDim + column] = T::from_float(normalised(acc[i], total.sum));
    }
  }
}

void check_aligned(const char* name, const void* data, std::initializer_list<std::pair<int64_t, int64_t>> sizes_strides,
                   int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % bytes == 0;
  for (const auto& [size, stride] : sizes_strides) aligned = aligned && (size <= 1 || stride * 2 % bytes == 0);
  FASTSFT_CHECK(aligned, "paged_attention: ", name, ": expected rows that start at multiples of ", bytes, " bytes");
}

template <typename T, int kDim>
void start(const Arguments& a, void* stream) {
  using Layout = Tiling<kDim>;
  const int64_t rows = int64_t{a.total_q} * a.shape.num_q_heads;
  const int64_t units = (rows / a.shape.num_kv_heads / kRows + a.batch) * a.shape.num_kv_heads * a.splits;
  const int64_t blocks = std::min<int64_t>((units + Layout::kWarps - 1) / Layout::kWarps,
                                           int64_t{multiprocessor_count()} * Layout::kBlocks);
  launch<decode_kernel<T, kDim>>(dim3(static_cast<unsigned>(blocks)), Layout::kWarps * kWarp,
                                 Layout::kWarps * Layout::kWarpBytes, stream, a);
  if (a.splits == 1) return;
  constexpr int kPerBlock = kMergeThreads / kWarp;
  launch<merge_kernel<T, kDim>>(dim3(static_cast<unsigned>((rows + kPerBlock - 1) / kPerBlock)), kMergeThreads, 0,
                                stream, a);
}

template <typename T>
void start(const Arguments& a, void* stream) {
  switch (a.shape.head_dim) {
    case 32: return start<T, 32>(a, stream);
    case 64: return start<T, 64>(a, stream);
    case 80: return start<T, 80>(a, stream);
    case 96: return start<T, 96>(a, stream);
    case 128: return start<T, 128>(a, stream);
    case 256: return start<T, 256>(a, stream);
  }
  FASTSFT_CHECK(false, "paged_attention: q: expected a head size in 32, 64, 80, 96, 128, 256, got ", a.shape.head_dim);
}

}  // namespace

void paged_attention_forward(const AttentionShape& shape, const int32_t* cu_q, int64_t batch, int64_t total_q,
                             const AttentionInput& q, const PagedCache& cache, void* out, float* scratch,
                             void* stream) {
  const int64_t rows = total_q * shape.num_q_heads;
  const int64_t splits = paged_scratch(rows, shape.head_dim, cache.max_blocks * cache.block_size).splits;
  FASTSFT_CHECK(rows < INT32_MAX, "paged_attention: q: expected fewer than 2^31 query rows, got ", rows);
  FASTSFT_CHECK(shape.num_kv_heads >= 1 && shape.num_q_heads % shape.num_kv_heads == 0,
                "paged_attention: q: expected a multiple of ", shape.num_kv_heads, " heads, got ", shape.num_q_heads);
  if (rows == 0) return;
  check_aligned("q", q.data, {{total_q, q.token_stride}, {shape.num_q_heads, q.head_stride}}, 4);
  for (const auto& [name, data, strides] :
       {std::tuple{"k_cache", cache.k, cache.k_strides}, std::tuple{"v_cache", cache.v, cache.v_strides}}) {
    check_aligned(name, data,
                  {{cache.num_blocks, strides[0]}, {cache.block_size, strides[1]}, {shape.num_kv_heads, strides[2]}},
                  16);
  }
  Arguments a{};
  a.shape = shape;
  a.q = q;
  a.cache = cache;
  a.cu_q = cu_q;
  a.batch = static_cast<int>(batch);
  a.total_q = static_cast<int>(total_q);
  a.group = static_cast<int>(shape.num_q_heads / shape.num_kv_heads);
  a.window_left = shape.window_left;
  a.window_right = shape.causal ? 0 : shape.window_right;
  a.splits = static_cast<int>(splits);
  const bool capped = shape.softcap > 0.0f;
  a.score_scale = capped ? shape.scale / shape.softcap : shape.scale * kLog2e;
  a.cap_scale = capped ? shape.softcap * kLog2e : 0.0f;
  a.out = out;
  a.sums = scratch;
  a.maxima = reinterpret_cast<float2*>(scratch + rows * splits * shape.head_dim);
  a.counts = reinterpret_cast<int*>(scratch + rows * splits * (shape.head_dim + 2));
  switch (shape.dtype) {
    case DType::kBFloat16: return start<BFloat16>(a, stream);
    case DType::kFloat16: return start<Float16>(a, stream);
    case DType::kFloat32: break;
  }
  FASTSFT_CHECK(false, "paged_attention: q: expected bfloat16 or float16 on CUDA, got ", dtype_name(shape.dtype));
}

}  // namespace fastsft::cuda
