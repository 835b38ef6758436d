#include <algorithm>
#include <cmath>
#include <cstring>

#include "block.h"
#include "matrix.h"

namespace cuda_host {
namespace {

constexpr int kRows = 64, kDepth = 16, kThreads = 128;

Warpgroup& group_of(unsigned thread) {
  Block& block = *g_run->block;
  std::vector<Warpgroup>& groups = block.async.warpgroups;
  if (groups.empty()) act_as(g_run->owner, [&] { groups.resize(block.warpgroups.size()); });
  return groups[thread / kWarpgroup];
}

Warpgroup& own_group() { return group_of(g_run->self->index); }

float element(bool half, uint16_t bits) { return half ? half_to_float(bits) : bfloat16_to_float(bits); }

std::size_t checked(const Descriptor& tile, bool mn_major, int i, int k) {
  const std::size_t offset = tile.at(mn_major, i, k);
  if (offset + 2 > g_run->block->shared_bytes) {
    fail("is at wgmma with a matrix descriptor that leaves shared memory, at offset " + std::to_string(offset));
  }
  return offset;
}

// Row and column of accumulator i of a thread: PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16".
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

void note_reads(const std::vector<std::size_t>& offsets) {
  for (std::size_t offset : offsets) note_read(g_run->block->shared + offset, 2);
}

// D += A B from the view as it is now; D as it was at the start.
void perform(Product& p) {
  const Wgmma& part = p.part;
  const int columns = part.columns, registers = columns / 2;
  const std::byte* const seen = g_run->block->async.view.data();
  const auto load = [&](std::size_t offset) {
    uint16_t bits;
    std::memcpy(&bits, seen + offset, 2);
    return element(part.half, bits);
  };
  float a[kRows][kDepth], b[kDepth][256], d[kRows][256] = {};
  for (int i = 0; i < kRows * kDepth && part.a == nullptr; ++i) a[i / kDepth][i % kDepth] = load(p.a_offsets[i]);
  for (int t = 0; t < kThreads && part.a != nullptr; ++t) {
    for (int i = 0; i < 8; ++i) {  // register i / 2, half i % 2
      const int row = row_of(t, i / 2 % 2 * 2), k = t % 4 * 2 + i % 2 + i / 4 * 8;
      a[row][k] = element(part.half, static_cast<uint16_t>(p.a[t][i / 2] >> 16 * (i % 2)));
    }
  }
  for (int i = 0; i < columns * kDepth; ++i) b[i % kDepth][i / kDepth] = load(p.b_offsets[i]);
  for (int i = 0; i < kThreads * registers && part.accumulate; ++i) {
    const int t = i / registers, r = i % registers;
    d[row_of(t, r)][column_of(t, r)] = p.saved.empty() ? p.d[t][r] : p.saved[i];
  }
  multiply(a, b, d, columns);
  for (int i = 0; i < kThreads * registers; ++i) {
    const int t = i / registers, r = i % registers;
    p.d[t][r] = d[row_of(t, r)][column_of(t, r)];
  }
}

void issue(void* const* lanes) {
  const Wgmma& first = *static_cast<const Wgmma*>(lanes[0]);
  Warpgroup& group = own_group();
  if (!group.fenced) fail("is at wgmma without wgmma_fence before it");
  view_of(*g_run->block);
  act_as(g_run->owner, [&] {
    Product p{first, {}, {}, {}, {}, {}, group.open_group};
    const bool pending = std::any_of(group.products.begin(), group.products.end(),
                                     [&](const Product& other) { return other.d[0] == first.d; });
    for (int t = 0; t < kThreads; ++t) {
      const Wgmma& part = *static_cast<const Wgmma*>(lanes[t]);
      if (part.descriptor_a != first.descriptor_a || part.descriptor_b != first.descriptor_b ||
          part.accumulate != first.accumulate || part.columns != first.columns) {
        fail("is at wgmma where the threads of the warpgroup disagree on the operands");
      }
      p.d[t] = part.d;
      for (int i = 0; i < 4 && part.a != nullptr; ++i) p.a[t][i] = part.a[i];
      for (int i = 0; i < part.columns / 2; ++i) {
        if (!pending && part.accumulate) p.saved.push_back(part.d[i]);
        part.d[i] = NAN;  // not to be read before the wait
      }
    }
    const Descriptor a(first.descriptor_a), b(first.descriptor_b);
    for (int i = 0; i < kRows * kDepth && first.a == nullptr; ++i) {
      p.a_offsets.push_back(checked(a, first.a_mn_major, i / kDepth, i % kDepth));
    }
    for (int i = 0; i < first.columns * kDepth; ++i) {
      p.b_offsets.push_back(checked(b, first.b_mn_major, i / kDepth, i % kDepth));
    }
    group.products.push_back(std::move(p));
  });
  // The last thread to arrive stands for the warpgroup: what the others wrote needs a barrier to be seen.
  release(&group.products.back().order);
}

void commit(void* const*) { ++own_group().open_group; }

void finish(void* const* lanes) {
  const int groups_left = *static_cast<const int*>(lanes[0]);
  Warpgroup& group = own_group();
  group.fenced = false;
  while (!group.products.empty() &&
         group.products.front().group + static_cast<unsigned>(groups_left) < group.open_group) {
    Product& p = group.products.front();
    act_as(g_run->engine, [&] {
      acquire(&p.order);
      note_reads(p.a_offsets);
      note_reads(p.b_offsets);
      release(&group.done);
    });
    perform(p);
    act_as(g_run->owner, [&] { group.products.pop_front(); });
  }
}

}  // namespace

Descriptor::Descriptor(uint64_t bits)
    : start(static_cast<int>(bits & 0x3fff) << 4),
      leading(static_cast<int>(bits >> 16 & 0x3fff) << 4),
      stride(static_cast<int>(bits >> 32 & 0x3fff) << 4),
      swizzle_row(bits >> 62 == 0 ? 0 : 256 >> (bits >> 62)) {
  if ((bits >> 49 & 7) != 0) fail("is at wgmma with a matrix descriptor that has a base offset");
  if (swizzle_row != 0 && start % (8 * swizzle_row) >= swizzle_row) {
    fail("is at wgmma with a matrix descriptor that does not start in the first row of a swizzle pattern");
  }
}

std::size_t Descriptor::at(bool mn_major, int i, int k) const {
  const int s = swizzle_row;
  const int linear = start + (mn_major ? s == 0 ? 2 * (i % 8) + i / 8 * stride + k % 8 * 16 + k / 8 * leading
                                                : 2 * (i % (s / 2)) + i / (s / 2) * leading + k % 8 * s + k / 8 * stride
                              : s == 0 ? 2 * (k % 8) + k / 8 * leading + i % 8 * 16 + i / 8 * stride
                                       : 2 * k + i % 8 * s + i / 8 * stride);
  return swizzled(static_cast<std::size_t>(linear), s);
}

void wgmma_fence() {
  meet_warpgroup("wgmma_fence", nullptr, [](void* const*) { own_group().fenced = true; });
}

void wgmma(Wgmma part) { meet_warpgroup("wgmma", &part, issue); }

void wgmma_commit() { meet_warpgroup("wgmma_commit", nullptr, commit); }

void wgmma_wait(int groups_left) {
  yield();  // as late as may be: others may overwrite what is not read yet
  meet_warpgroup("wgmma_wait", &groups_left, finish);
  acquire(&own_group().done);
}

}  // namespace cuda_host
