#include "fastsft/kv_cache.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "fastsft/parallel.h"
#include "kv_cache_cases.h"

using namespace fastsft;

TEST(attention_is_exact_to_rounding) {
  struct Shape {
    int64_t heads, group, dim, block_size, window, length;
  };
  constexpr Shape kShapes[] = {{1, 1, 64, 16, -1, 1},  {2, 3, 64, 16, -1, 300},  {1, 7, 32, 32, 40, 290},
                               {1, 8, 128, 64, 0, 70}, {2, 2, 80, 16, 300, 600}, {1, 1, 256, 48, -1, 130},
                               {1, 60, 16, 16, 7, 20}};
  for (const Type& type : kTypes) {
    for (const Shape& shape : kShapes) {
      World world{.layout = {type.format, shape.heads, shape.dim, shape.block_size},
                  .dtype = type.dtype,
                  .group = shape.group,
                  .window = shape.window};
      world.fill({shape.length});
      const auto exact = world.exact(0, 0, shape.length);
      on_every_isa([&] {
        world.place(1);
        const double error = world.error(world.step({{0, 0, shape.length}}), exact);
        // float32: roundings of sums; bfloat16: of the result and, one by one, of the probabilities, 2^-9 each.
        CHECK(error <= (type.dtype == DType::kFloat32 ? 4e-6 : 2e-2));
      });
    }
  }
}

TEST(bits_of_a_row_do_not_depend_on_its_company) {
  constexpr struct {
    int64_t window, group;
  } kShapes[] = {{-1, 1}, {290, 3}, {-1, 7}};
  for (const Type& type : kTypes) {
    for (const auto& [window, group] : kShapes) {
      World world{.layout = {type.format, 2, 48, 16}, .dtype = type.dtype, .group = group, .window = window};
      const int64_t bytes = 2 * 48 * group * static_cast<int64_t>(dtype_size(type.dtype)), length = 600;
      world.fill({length, 90, 260});
      on_every_isa([&] {
        world.place(1);
        const auto whole = world.step({{0, 0, length}});
        // A token at a time; of five tokens four are only written.
        world.place(2);
        for (int64_t i = 0; i < length; ++i) {
          if (i % 5 == 0) {
            CHECK(part_of(whole, i, world.step({{0, i, i + 1}}), bytes));
          } else {
            world.write(0, i, i + 1);
          }
        }
        // 1 to 17 rows, between other texts.
        world.place(3);
        for (int64_t begin = 0, n = 1; begin < length; begin += n, n = n % 17 + 1) {
          const int64_t end = std::min(length, begin + n), other = 1 + begin * 80 / length;
          auto got = world.step({{1, other - 1, other}, {0, begin, end}, {2, 0, 20}, {2, 20, 20}});
          got.erase(got.begin(), got.begin() + bytes);
          got.resize(static_cast<std::size_t>((end - begin) * bytes));
          CHECK(part_of(whole, begin, got, bytes));
        }
      });
    }
  }
}

TEST(bits_do_not_depend_on_the_division_into_tasks) {
  for (const Type& type : kTypes) {
    for (int64_t window : {int64_t{-1}, int64_t{3000}}) {
      World world{.layout = {type.format, 2, 32, 32}, .dtype = type.dtype, .group = 3, .window = window};
      world.fill({5000});
      on_every_isa([&] {
        world.place(1);
        world.write(0, 0, 4999);
        for (int64_t begin : {4999, 4962}) {  // one row; two full tiles of 18 and one of two rows
          const auto expected = world.step({{0, begin, 5000}}, 1);
          for (int threads : {2, 3, 16}) CHECK(world.step({{0, begin, 5000}}, threads) == expected);
          set_num_threads(3);
          CHECK(world.step({{0, begin, 5000}}) == expected);
        }
      });
    }
  }
}

TEST(a_cache_rolled_back_holds_the_bytes_of_a_fresh_one) {
  for (const Type& type : kTypes) {
    World world{.layout = {type.format, 2, 32, 16}, .dtype = type.dtype, .group = 1};
    world.fill({64});
    (void)world.step({{0, 0, 40}});
    const auto fresh = world.blocks;
    world.place(1);
    (void)world.step({{0, 0, 33}});
    (void)world.step({{0, 33, 48}});  // a draft
    (void)world.step({{0, 33, 40}});
    CHECK(world.blocks == fresh);
  }
}

TEST(a_plan_without_threads_needs_no_scratch_memory) {
  const KVLayout layout{KVFormat::kBFloat16, 2, 64, 16};
  const int32_t cu[] = {0, 1, 1}, contexts[] = {9000, 0};
  const CacheRows rows{
      .rows = 1, .sequences = 2, .cu_seqlens = cu, .context_lens = contexts, .block_table = nullptr, .table_stride = 0};
  CachedAttentionPlan plan;
  plan_cached_attention(layout, rows, 2, -1, 1, plan);
  CHECK(plan.scratch_bytes == 0 && plan.tasks.size() == 1 && plan.merges.empty());
  plan_cached_attention(layout, rows, 2, -1, 4, plan);
  CHECK(plan.scratch_bytes > 0 && plan.tasks.size() > 8 && plan.merges.size() == 1);
}

TEST(errors_name_the_argument) {
  CHECK_THROWS(kv_block_bytes({KVFormat::kFloat32, 1, 40, 16}), Error);
  CHECK_THROWS(kv_block_bytes({KVFormat::kFloat32, 1, 272, 16}), Error);
  CHECK_THROWS(kv_block_bytes({KVFormat::kFloat32, 1, 64, 24}), Error);
  CHECK_THROWS(kv_block_bytes({KVFormat::kFloat32, 0, 64, 16}), Error);
  CHECK(kv_block_bytes({KVFormat::kInt8, 2, 64, 16}) == 2 * 2 * 16 * (64 + 4));
  const KVLayout layout{KVFormat::kBFloat16, 1, 64, 16};
  const int32_t table[] = {0, 1, 2, 5};
  const auto check = [&](std::vector<int32_t> cu, std::vector<int32_t> contexts) {
    check_cache_rows(layout,
                     {.rows = 3,
                      .sequences = 2,
                      .cu_seqlens = cu.data(),
                      .context_lens = contexts.data(),
                      .block_table = table,
                      .table_stride = 2},
                     3);
    return true;
  };
  CHECK(check({0, 1, 3}, {32, 16}));
  CHECK_THROWS(check({0, 1, 2}, {32, 16}), Error);
  CHECK_THROWS(check({0, 4, 3}, {32, 16}), Error);
  CHECK_THROWS(check({0, 1, 3}, {33, 16}), Error);
  CHECK_THROWS(check({0, 1, 3}, {32, 17}), Error);
  CHECK_THROWS(check({0, 1, 3}, {32, 1}), Error);
}

TEST_MAIN()
