#include "async.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"

namespace cuda_host {
namespace {

// Under ThreadSanitizer not memcpy and memset, which it would take for accesses of the running thread.
void copy_bytes(std::byte* to, const std::byte* from, std::size_t bytes) {  // at a fence all of a block's shared memory
#if defined(CUDA_HOST_TSAN)
  std::size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, from + i, 8);  // an instruction, not a call
    std::memcpy(to + i, &word, 8);
  }
  for (; i < bytes; ++i) to[i] = from[i];
#else
  std::copy_n(from, bytes, to);
#endif
}
void poison_bytes(std::byte* to, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i) to[i] = std::byte{kPoison};
}

Mbarrier* find(const Block& block, const void* word) {
  for (const Mbarrier& b : block.async.mbarriers) {
    if (b.word == word) return const_cast<Mbarrier*>(&b);
  }
  return nullptr;
}

constexpr uint64_t kMagic = 0x7265697272616264;

Mbarrier& use(const char* name, uint64_t* word) {
  check_shared(name, word, 8, 8);
  note_read(word, 8);
  Mbarrier* const b = find(*g_run->block, word);
  if (b == nullptr) fail(std::string(name) + ": no mbarrier_init was called for this address");
  if (*word != kMagic) fail(std::string(name) + ": something else was written over the mbarrier");
  return *b;
}

void complete_if_done(Block& block, Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  ++b.phase;
  wake_all(block, b.word, 0, static_cast<unsigned>(block.threads.size()));
}

bool complete(Mbarrier& b, int parity) {
  if (static_cast<int>(b.phase % 2) == parity) return false;
  acquire(&b.order[parity]);
  return true;
}

// Moves the elements between the tensor and the box in shared memory; those outside the tensor load as 0.
void perform(Block& block, const Transfer& t) {
  const TensorMap& map = t.map;
  std::byte* const seen = view_of(block).data();
  const auto bytes = static_cast<std::size_t>(map.element_bytes);
  const auto base = static_cast<std::size_t>(t.shared - block.shared);
  std::size_t linear = base;
  for (int z = 0; z < map.box[2]; ++z) {
    for (int y = 0; y < map.box[1]; ++y) {
      for (int x = 0; x < map.box[0]; ++x, linear += bytes) {
        const int64_t at[3] = {int64_t{t.corner[0]} + x, int64_t{t.corner[1]} + y, int64_t{t.corner[2]} + z};
        bool inside = true;
        int64_t offset = 0;
        for (int i = 0; i < 3; ++i) {
          inside = inside && at[i] >= 0 && at[i] < map.size[i];
          offset += at[i] * map.stride[i];
        }
        std::byte* const global = inside ? map.data + offset : nullptr;
        const std::size_t place = swizzled(linear, map.swizzle_bytes);
        if (t.kind == Bulk::kLoad) {
          const std::byte zeros[16] = {};
          if (inside) note_read(global, bytes);
          note_write(block.shared + place, bytes);
          copy_bytes(seen + place, inside ? global : zeros, bytes);
          copy_bytes(block.shared + place, seen + place, bytes);
          continue;
        }
        note_read(block.shared + place, bytes);
        if (!inside) continue;
        if (t.kind == Bulk::kStore) {
          note_write(global, bytes);
          copy_bytes(global, seen + place, bytes);
        } else {  // not noted: the addition is atomic
          auto* const sum = reinterpret_cast<float*>(global);
          *sum += *reinterpret_cast<const float*>(seen + place);
        }
      }
    }
  }
}

void start(Transfer transfer) {
  Block& block = *g_run->block;
  const char* const name = transfer.kind == Bulk::kLoad ? "bulk load" : "bulk store";
  const int pattern = transfer.map.swizzle_bytes == 0 ? 128 : 8 * transfer.map.swizzle_bytes;
  check_shared(name, transfer.shared, static_cast<std::size_t>(transfer.bytes),
               static_cast<std::size_t>(transfer.map.rank == 1 ? 16 : pattern));
  if (transfer.kind == Bulk::kLoad) {
    const Mbarrier& b = use(name, transfer.barrier);
    if (!b.fenced) fail("starts a bulk load at an mbarrier without mbarrier_init_fence after its mbarrier_init");
    const auto offset = static_cast<std::size_t>(transfer.shared - block.shared);
    note_write(transfer.shared, static_cast<std::size_t>(transfer.bytes));
    poison_bytes(transfer.shared, static_cast<std::size_t>(transfer.bytes));
    poison_bytes(view_of(block).data() + offset, static_cast<std::size_t>(transfer.bytes));
    act_as(g_run->owner, [&] { block.async.loads.push_back(transfer); });
    release(&block.async.loads.back().order);
  } else {
    Thread& self = *g_run->self;
    transfer.group = self.open_stores;
    self.stores.push_back(transfer);
    release(&self.stores.back().order);
  }
}

}  // namespace

// Accesses are noted by hand: GCC expands a memset of constant size without a word to ThreadSanitizer.
void start_copy(void* shared, const void* global, int bytes, bool valid) {
  const auto size = static_cast<std::size_t>(bytes);
  check_shared("copy_async", shared, size, size);
  check_aligned("copy_async", global, size);
  Thread& self = *g_run->self;
  Copy& copy = self.copies.emplace_back(Copy{self.open_group, static_cast<std::byte*>(shared), size, {}});
  if (valid) {
    note_read(global, size);
    copy_bytes(copy.data, static_cast<const std::byte*>(global), size);
  }
  note_write(shared, size);
  poison_bytes(copy.to, size);
}

void commit_copies() { ++g_run->self->open_group; }

void wait_for_copies(int groups_left) {
  Thread& self = *g_run->self;
  for (; self.landed < self.copies.size(); ++self.landed) {
    const Copy& copy = self.copies[self.landed];
    if (copy.group + static_cast<unsigned>(groups_left) >= self.open_group) return;
    note_write(copy.to, copy.bytes);
    copy_bytes(copy.to, copy.data, copy.bytes);
  }
  self.copies.clear(), self.landed = 0;
}

std::vector<std::byte>& view_of(Block& block) {
  std::vector<std::byte>& bytes = block.async.view;
  if (bytes.empty()) {
    act_as(g_run->owner, [&] { bytes.assign(block.shared_bytes, std::byte{kPoison}); });
  }
  return bytes;
}

std::size_t swizzled(std::size_t offset, int row_bytes) {
  const std::size_t bits = row_bytes == 0 ? 0 : static_cast<std::size_t>(row_bytes / 16 - 1);
  return offset ^ ((offset >> 7 & bits) << 4);
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  check_shared("mbarrier_init", barrier, 8, 8);
  if (arrivals <= 0) fail("mbarrier_init: expected at least one arrival");
  note_write(barrier, 8);
  Block& block = *g_run->block;
  *barrier = kMagic;
  act_as(g_run->owner, [&] {
    Mbarrier* const old = find(block, barrier);
    Mbarrier& b = old != nullptr ? *old : block.async.mbarriers.emplace_back();
    b = Mbarrier{barrier, arrivals, arrivals};
  });
}

void mbarrier_init_fence() {
  for (Mbarrier& b : g_run->block->async.mbarriers) b.fenced = true;
}

void mbarrier_arrive(const char* name, uint64_t* barrier, int expected_bytes) {
  Mbarrier& b = use(name, barrier);
  if (b.pending == 0) fail(std::string(name) + ": more arrivals than the mbarrier was made for");
  release(&b.order[b.phase % 2]);
  b.bytes += expected_bytes;
  --b.pending;
  complete_if_done(*g_run->block, b);
}

bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  Mbarrier& b = use("mbarrier_try_wait", barrier);
  if (complete(b, parity)) return true;
  land_load(*g_run->block);
  yield();
  return complete(b, parity);
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  Mbarrier& b = use("mbarrier_wait", barrier);
  while (!complete(b, parity)) wait_at(barrier, "mbarrier_wait");
}

std::string mbarrier_state(const Block& block, const void* place) {
  const Mbarrier* const b = find(block, place);
  if (b == nullptr) return "";
  return ", phase " + std::to_string(b->phase) + " of the mbarrier at offset " +
         std::to_string(reinterpret_cast<const std::byte*>(b->word) - block.shared) + ", which lacks " +
         std::to_string(b->pending) + " of " + std::to_string(b->arrivals) + " arrivals and " +
         std::to_string(b->bytes) + " bytes";
}

void fence_async_proxy() {
  Block& block = *g_run->block;
  copy_bytes(view_of(block).data(), block.shared, block.shared_bytes);
}

void tensor_copy(Bulk kind, const TensorMap& map, void* shared, uint64_t* barrier, int x, int y, int z) {
  Transfer t{kind, map, {x, y, z}, static_cast<std::byte*>(shared), map.element_bytes, barrier, 0};
  for (int i = 0; i < 3; ++i) {
    if (i >= map.rank) t.map.size[i] = t.map.box[i] = 1, t.map.stride[i] = 0;
    t.bytes *= t.map.box[i];
  }
  start(t);
}

void bulk_copy(Bulk kind, void* global, void* shared, int bytes, uint64_t* barrier) {
  const char* const name = kind == Bulk::kLoad ? "bulk load" : "bulk store";
  check_aligned(name, global, 16);
  if (bytes <= 0 || bytes % 16 != 0)
    fail(std::string(name) + ": " + std::to_string(bytes) + " bytes are no multiple of 16");
  const TensorMap line{static_cast<std::byte*>(global), 1, 4, 0, {bytes / 4, 1, 1}, {4, 0, 0}, {bytes / 4, 1, 1}};
  start({kind, line, {0, 0, 0}, static_cast<std::byte*>(shared), bytes, barrier, 0});
}

void bulk_commit() { ++g_run->self->open_stores; }

void bulk_wait(int groups_left) {
  yield();  // as late as may be: others may overwrite what is not read yet
  std::deque<Transfer>& stores = g_run->self->stores;
  while (!stores.empty() && stores.front().group + static_cast<unsigned>(groups_left) < g_run->self->open_stores) {
    Transfer& t = stores.front();
    act_as(g_run->engine, [&] {
      acquire(&t.order);
      perform(*g_run->block, t);
      release(&t.order);
    });
    acquire(&t.order);
    stores.pop_front();
  }
}

bool land_load(Block& block) {
  if (block.async.loads.empty()) return false;
  Transfer& t = block.async.loads.front();
  Mbarrier& b = *find(block, t.barrier);
  act_as(g_run->engine, [&] {
    acquire(&t.order);
    perform(block, t);
    release(&b.order[b.phase % 2]);
  });
  b.bytes -= t.bytes;
  complete_if_done(block, b);
  act_as(g_run->owner, [&] { block.async.loads.pop_front(); });
  return true;
}

std::string unfinished(const Thread& thread) {
  return thread.stores.empty() ? "" : "returned before its bulk stores were waited for";
}

std::string unfinished(const Block& block) {
  if (!block.async.loads.empty()) return "a bulk load was still under way at the end of the block";
  for (const Warpgroup& group : block.async.warpgroups) {
    if (!group.products.empty()) return "a wgmma was not waited for";
  }
  return "";
}

}  // namespace cuda_host
