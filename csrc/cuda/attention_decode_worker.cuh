// One unit of attention over a block cache, from its queries to its result.
#pragma once

#include "attention_decode_units.cuh"

namespace fastsft::cuda::paged {

// What one warp does, by itself (kTeam = 1) or as one of the kTeam warps of a block, which take 16 query rows each and
// share tiles of 16 kTeam keys. A team's steps of 16 keys are those of a single warp: a row's bits are the same.
template <typename T, int kDim, int kTeam>
class Worker {
  using Layout = Tiling<kDim>;
  using Word = typename T::Word;
  static_assert(kTeam == 1 || kTeam == Layout::kWarps);  // a team's barrier is the block's
  static constexpr int kTileKeys = kTeam * kStep;
  static constexpr int kSteps = kDim / 16;   // of the matrix product over D
  static constexpr int kColumns = kDim / 8;  // 8-wide tiles of the output

 public:
  __device__ __forceinline__ explicit Worker(const Arguments& a) : a_(a) {
    unsigned char* shared = shared_memory() + warp_id() / kTeam * kTeam * Layout::kWarpBytes;
    tiles_ = reinterpret_cast<Word*>(shared);
    shared += kTeam * Layout::kTilesBytes + warp_id() % kTeam * Layout::kOwnBytes;
    query_words_ = reinterpret_cast<uint4*>(shared);
    slots_ = reinterpret_cast<int2*>(shared + Layout::kQueryBytes);
  }

  __device__ __forceinline__ void run(const Sequence& s, int64_t within) {
    s_ = s;
    head_ = static_cast<int>(within % a_.shape.num_kv_heads);
    within /= a_.shape.num_kv_heads;
    const int tiles = UnitList<kTeam>::tiles(a_, s), tile_row = static_cast<int>(within % tiles) * kTeam * kRows;
    const int split = static_cast<int>(within / tiles);
    first_row_ = tile_row + warp_id() % kTeam * kRows;
    for (int i = 0; i < 2; ++i) seen_[i] = keys_of(a_, s, query_of(i));
    const Range range = keys_of_rows(tile_row, kTeam * kRows);
    load_query();
    const bool alone = a_.splits == 1;
    int first = split, last = split + 1;
    if (alone) {  // one segment at least, which writes the result; the others without keys would change no bit
      first = max(range.begin / kSegment - s.first_segment, 0);
      last = max((range.end + kSegment - 1) / kSegment - s.first_segment, first + 1);
    }
    for (int i = first; i < last; ++i) {
      attend(s.first_segment + i, range.begin, range.end);
      if (alone && i > first) fold_stored();
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

  // What `count` rows from `first` see together.
  __device__ __forceinline__ Range keys_of_rows(int first, int count) const {
    const int last = min(first + count, s_.queries * a_.group) - 1;
    if (last < first) return {0, 0};
    return {keys_of(a_, s_, first / a_.group).begin, keys_of(a_, s_, last / a_.group).end};
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

  // Starts copying kTileKeys rows of the cache, those of `slots`; zeros where there is no key.
  __device__ __forceinline__ void copy_tile(Word* to, const void* data, const int64_t (&strides)[3],
                                            const int2* slots) {
    constexpr int kChunks = kDim / 8, kThreads = kTeam * kWarp;
    const int thread = warp_id() % kTeam * kWarp + lane_id();
    const Word* from = static_cast<const Word*>(data) + head_ * strides[2];
#pragma unroll(kTeam > 1 && kDim > 128 ? 4 : 16)  // all, or as many as there are registers for
    for (int i = 0; i < kTileKeys * kChunks / kThreads; ++i) {
      const int chunk = i * kThreads + thread, row = chunk / kChunks, column = chunk % kChunks * 8;
      const int2 slot = slots[row];
      const bool valid = slot.x >= 0;
      const Word* source = from + column + (valid ? slot.x * strides[0] + slot.y * strides[1] : 0);
      copy_async(to + row * Layout::kStride + column, source, valid);
    }
  }

  __device__ __forceinline__ Word* key_tile(int stage) { return tiles_ + 2 * stage * kTeam * Layout::kTile; }
  __device__ __forceinline__ Word* value_tile(int stage) { return tiles_ + (2 * stage + 1) * kTeam * Layout::kTile; }

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
    const int first = (begin - base) / kTileKeys, steps = begin < end ? (end - base + kTileKeys - 1) / kTileKeys : 0;
    if constexpr (kTeam == 1) {
      walk_alone(base, first, steps);
    } else {
      walk_together(base, first, steps);
    }
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      part_[i].sum += shuffle_xor(part_[i].sum, 1);
      part_[i].sum += shuffle_xor(part_[i].sum, 2);
      if (bad || s_.broken) part_[i].sum = NAN;
    }
  }

  // Steps [first, steps) of the segment from `base`: keys and values come separately, to have more of them under way.
  __device__ __forceinline__ void walk_alone(int base, int first, int steps) {
    const auto start_keys = [&](int step) {
      if (step < steps) copy_tile(key_tile(step % kStages), a_.cache.k, a_.cache.k_strides, slots_ + step * kStep);
      copy_async_commit();
    };
    const auto start_values = [&](int step) {
      if (step < steps) copy_tile(value_tile(step % kStages), a_.cache.v, a_.cache.v_strides, slots_ + step * kStep);
      copy_async_commit();
    };
    for (int stage = 0; stage < kStages; ++stage) {
      start_keys(first + stage);
      start_values(first + stage);
    }
    for (int step = first; step < steps; ++step) {
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
  }

  // Whether row i of the lane sees any of the 16 keys from `key`.
  __device__ __forceinline__ bool sees(int i, int key) const {
    return key < seen_[i].end && seen_[i].begin < key + kStep;
  }

  // The same in steps of kTileKeys, of which a warp leaves out the 16 keys that none of its rows sees.
  __device__ __forceinline__ void walk_together(int base, int first, int steps) {
    const auto start = [&](int step) {
      if (step < steps) {
        const int2* const slots = slots_ + step * kTileKeys;
        copy_tile(key_tile(step % kStages), a_.cache.k, a_.cache.k_strides, slots);
        copy_tile(value_tile(step % kStages), a_.cache.v, a_.cache.v_strides, slots);
      }
      copy_async_commit();
    };
    for (int stage = 0; stage < kStages; ++stage) start(first + stage);
    for (int step = first; step < steps; ++step) {
      copy_async_wait<kStages - 1>();
      __syncthreads();
#pragma unroll 1
      for (int part = 0; part < kTeam; ++part) {
        const int key = base + step * kTileKeys + part * kStep;
        if (!warp_any(sees(0, key) || sees(1, key))) continue;
        float scores[2][4] = {};
        uint32_t probabilities[4];
        multiply_keys(key_tile(step % kStages) + part * Layout::kTile, scores);
        softmax(key, scores, probabilities);
        multiply_values(value_tile(step % kStages) + part * Layout::kTile, probabilities);
      }
      __syncthreads();  // all are done with the stage
      start(step + kStages);
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

}  // namespace fastsft::cuda::paged
