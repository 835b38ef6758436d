// Vectors of float, element conversion, transposes, exp and tanh: what the float kernels are made of.
// Included by *.isa.cpp only; everything sits in an anonymous namespace (see the hazard in isa.h).
//
// Written for -fassociative-math: no expression here relies on (x + c) - c, and every sum whose order is part of the
// result runs over a loop the compiler cannot reorder (one chain per accumulator, in ascending k).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "fastsft/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastsft::FASTSFT_ISA_NS {
namespace {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
inline constexpr int kVectorBytes = kLanes * 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecInt __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecBits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecHalf __attribute__((vector_size(kVectorBytes / 2)));

#define FASTSFT_INLINE inline __attribute__((always_inline))
// Loops that share a function also share its 16 address registers; a call costs less than the spills.
#define FASTSFT_NOINLINE __attribute__((noinline, unused)) static

template <typename T>
FASTSFT_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
FASTSFT_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}
FASTSFT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

FASTSFT_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0, not x + 0, keeps -0
FASTSFT_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTSFT_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
// a if the lane's mask is all ones, else b
FASTSFT_INLINE Vec select(VecInt mask, Vec a, Vec b) { return mask ? a : b; }

// a * b + sum with one rounding where the instruction set has it. Spelt out where contraction is off: of two products
// added, which of them the compiler fuses may differ between two places that must agree to the bit.
FASTSFT_INLINE Vec fused_multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
#else
  return a * b + sum;
#endif
}

template <int kXor, std::size_t... kIndex>
FASTSFT_INLINE Vec exchange(Vec v, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(v, v, (kIndex ^ kXor)...);
}
template <int kXor>
FASTSFT_INLINE Vec exchange(Vec v) {
  return exchange<kXor>(v, std::make_index_sequence<kLanes>());
}
FASTSFT_INLINE float sum_lanes(Vec v) {
  if constexpr (kLanes >= 16) v += exchange<8>(v);
  if constexpr (kLanes >= 8) v += exchange<4>(v);
  v += exchange<2>(v);
  v += exchange<1>(v);
  return v[0];
}
FASTSFT_INLINE Vec max_of(Vec a, Vec b) { return a > b ? a : b; }
FASTSFT_INLINE float max_lanes(Vec v) {
  if constexpr (kLanes >= 16) v = max_of(v, exchange<8>(v));
  if constexpr (kLanes >= 8) v = max_of(v, exchange<4>(v));
  v = max_of(v, exchange<2>(v));
  v = max_of(v, exchange<1>(v));
  return v[0];
}

// --- element conversion ------------------------------------------------------------------------------------------

// Between 16 and 32 bits. Of a __builtin_convertvector GCC 12 makes halves, converted each and put together again.
FASTSFT_INLINE VecBits widen(VecHalf h) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecBits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, VecBits);
#endif
}

// The low halves, where the high ones are 0.
FASTSFT_INLINE VecHalf narrow(VecBits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecHalf>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i all = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<VecHalf>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  return __builtin_convertvector(v, VecHalf);
#endif
}

FASTSFT_INLINE Vec widen_bfloat16(VecHalf h) { return reinterpret_cast<Vec>(widen(h) << 16); }

FASTSFT_INLINE Vec widen_float16(VecHalf h) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  // Exponent and mantissa move up 13 bits; the product with 2^112 rebiases the exponent and normalises subnormals.
  const VecBits bits = widen(h);
  const VecBits sign = (bits & 0x8000u) << 16;
  const VecBits magnitude = (bits & 0x7fffu) << 13;
  const Vec scaled = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
  const VecBits special = reinterpret_cast<VecBits>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;  // inf, NaN
  return reinterpret_cast<Vec>(reinterpret_cast<VecBits>(scaled) | special | sign);
#endif
}

// To nearest, ties to even; AVX-512's instruction flushes subnormals to zero, as its dot products do.
FASTSFT_INLINE VecHalf round_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const VecBits bits = reinterpret_cast<VecBits>(v);
  const VecBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const VecInt is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return narrow((is_nan ? bits | 0x400000u : rounded) >> 16);
#endif
}

FASTSFT_INLINE VecHalf round_float16(Vec v) {
  const VecBits bits = reinterpret_cast<VecBits>(v);
  const VecBits magnitude = bits & 0x7fffffffu;
  const VecBits sign = (bits >> 16) & 0x8000u;
  // Normal: rebias the exponent by 112 and round to nearest even at bit 13.
  const VecBits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal (below 2^-14): adding 0.5 lets the adder shift and round; its own bits are then taken off.
  const Vec shifted = reinterpret_cast<Vec>(magnitude) + 0.5f;
  const VecBits subnormal = reinterpret_cast<VecBits>(shifted) - 0x3f000000u;
  const VecBits is_small = reinterpret_cast<VecBits>(magnitude < (113u << 23));
  const VecBits is_large = reinterpret_cast<VecBits>(magnitude >= 0x477ff000u);  // 65520: rounds to infinity
  const VecBits is_nan = reinterpret_cast<VecBits>(magnitude > 0x7f800000u);
  VecBits half = (subnormal & is_small) | (normal & ~is_small);
  half = (half & ~is_large) | (0x7c00u & is_large);
  return narrow(half | (0x200u & is_nan) | sign);
}

FASTSFT_INLINE Vec load_as_float(DType dtype, const void* row, int64_t i) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(row) + i);
  VecHalf h;
  std::memcpy(&h, static_cast<const uint16_t*>(row) + i, sizeof(h));
  return dtype == DType::kBFloat16 ? widen_bfloat16(h) : widen_float16(h);
}

FASTSFT_INLINE void store_from_float(DType dtype, void* row, int64_t i, Vec v) {
  if (dtype == DType::kFloat32) return store(static_cast<float*>(row) + i, v);
  const VecHalf h = dtype == DType::kBFloat16 ? round_bfloat16(v) : round_float16(v);
  std::memcpy(static_cast<uint16_t*>(row) + i, &h, sizeof(h));
}

// As the type holds it.
FASTSFT_INLINE Vec rounded(DType dtype, Vec v) {
  if (dtype == DType::kFloat32) return v;
  return dtype == DType::kBFloat16 ? widen_bfloat16(round_bfloat16(v)) : widen_float16(round_float16(v));
}

FASTSFT_INLINE const void* element(DType dtype, const void* data, int64_t index) {
  return static_cast<const char*>(data) + index * (dtype == DType::kFloat32 ? 4 : 2);
}
FASTSFT_INLINE void* element(DType dtype, void* data, int64_t index) {
  return static_cast<char*>(data) + index * (dtype == DType::kFloat32 ? 4 : 2);
}

// panel[row * pitch + i] = element i of rows[row] as float32, `dim` elements each
template <DType kDType>
FASTSFT_INLINE void load_rows_as(const void* const* rows, int64_t n, int64_t dim, float* panel, int64_t pitch) {
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < dim; i += kLanes) store(panel + row * pitch + i, load_as_float(kDType, rows[row], i));
  }
}
FASTSFT_NOINLINE void load_rows(DType dtype, const void* const* rows, int64_t n, int64_t dim, float* panel,
                                int64_t pitch) {
  switch (dtype) {
    case DType::kFloat32: return load_rows_as<DType::kFloat32>(rows, n, dim, panel, pitch);
    case DType::kBFloat16: return load_rows_as<DType::kBFloat16>(rows, n, dim, panel, pitch);
    case DType::kFloat16: return load_rows_as<DType::kFloat16>(rows, n, dim, panel, pitch);
  }
}
// rows[row][i] = factors[row] * panel[row * pitch + i], rounded
template <DType kDType>
FASTSFT_INLINE void store_rows_as(const float* panel, int64_t pitch, int64_t n, int64_t dim, const float* factors,
                                  void* const* rows) {
  for (int64_t row = 0; row < n; ++row, panel += pitch) {
    for (int64_t i = 0; i < dim; i += kLanes) store_from_float(kDType, rows[row], i, load(panel + i) * factors[row]);
  }
}
FASTSFT_NOINLINE void store_rows(DType dtype, const float* panel, int64_t pitch, int64_t n, int64_t dim,
                                 const float* factors, void* const* rows) {
  switch (dtype) {
    case DType::kFloat32: return store_rows_as<DType::kFloat32>(panel, pitch, n, dim, factors, rows);
    case DType::kBFloat16: return store_rows_as<DType::kBFloat16>(panel, pitch, n, dim, factors, rows);
    case DType::kFloat16: return store_rows_as<DType::kFloat16>(panel, pitch, n, dim, factors, rows);
  }
}
FASTSFT_NOINLINE void fill_zero(float* begin, const float* end) {
  for (; begin < end; begin += kLanes) store(begin, Vec{});
}

// One step of the butterfly that transposes kLanes vectors: rows i and i + kXor exchange their off-diagonal lanes.
template <int kXor, std::size_t... kIndex>
FASTSFT_INLINE void transpose_step(Vec* rows, std::index_sequence<kIndex...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kXor) continue;
    const Vec a = rows[i], b = rows[i + kXor];
    rows[i] = __builtin_shufflevector(a, b, ((kIndex & kXor) ? kLanes + (kIndex ^ kXor) : kIndex)...);
    rows[i + kXor] = __builtin_shufflevector(a, b, ((kIndex & kXor) ? kLanes + kIndex : (kIndex ^ kXor))...);
  }
}
FASTSFT_INLINE void transpose(Vec* rows) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  if constexpr (kLanes >= 16) transpose_step<8>(rows, lanes);
  if constexpr (kLanes >= 8) transpose_step<4>(rows, lanes);
  transpose_step<2>(rows, lanes);
  transpose_step<1>(rows, lanes);
}

// columns[d * stride + j] = element first + d of row j, for d < dim (>= kLanes) and j < n rounded up to whole vectors;
// rows past n count as zeros.
template <DType kDType>
FASTSFT_INLINE void load_transposed_as(const void* const* rows, int64_t n, int64_t first, int64_t dim, float* columns,
                                       int64_t stride) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t have = smaller<int64_t>(kLanes, n - j);
    for (int64_t d = 0; d < dim; d += kLanes) {
      // The last vector of a width that is no multiple of kLanes is taken further left and overlaps the one before.
      const int64_t at = smaller<int64_t>(d, dim - kLanes);
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = i < have ? load_as_float(kDType, rows[j + i], first + at) : Vec{};
      }
      transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) store(columns + (at + i) * stride + j, block[i]);
    }
  }
}
FASTSFT_NOINLINE void load_transposed(DType dtype, const void* const* rows, int64_t n, int64_t first, int64_t dim,
                                      float* columns, int64_t stride) {
  switch (dtype) {
    case DType::kFloat32: return load_transposed_as<DType::kFloat32>(rows, n, first, dim, columns, stride);
    case DType::kBFloat16: return load_transposed_as<DType::kBFloat16>(rows, n, first, dim, columns, stride);
    case DType::kFloat16: return load_transposed_as<DType::kFloat16>(rows, n, first, dim, columns, stride);
  }
}

// Lane i of the result is the maximum or the sum over the lanes of rows[i]; every row is reduced in the same order.
template <int kXor, bool kMax, std::size_t... kIndex>
FASTSFT_INLINE void reduce_step(Vec* rows, std::index_sequence<kIndex...>) {
  for (int i = 0; i < kXor; ++i) {
    const Vec a = rows[i], b = rows[i + kXor];
    const Vec kept = __builtin_shufflevector(a, b, ((kIndex & kXor) ? kLanes + kIndex : kIndex)...);
    const Vec moved = __builtin_shufflevector(a, b, ((kIndex & kXor) ? kLanes + (kIndex ^ kXor) : (kIndex ^ kXor))...);
    rows[i] = kMax ? max_of(kept, moved) : kept + moved;
  }
}
template <bool kMax>
FASTSFT_INLINE Vec reduce_rows(Vec* rows) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  if constexpr (kLanes >= 16) reduce_step<8, kMax>(rows, lanes);
  if constexpr (kLanes >= 8) reduce_step<4, kMax>(rows, lanes);
  reduce_step<2, kMax>(rows, lanes);
  reduce_step<1, kMax>(rows, lanes);
  return rows[0];
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// --- elementary functions ----------------------------------------------------------------------------------------

// The minimax polynomial with constant term 1 for 2^r on [-1/2, 1/2]: relative error 3e-6 in degree 4, 2e-9 in degree
// 6, before rounding.
template <int kDegree>
FASTSFT_INLINE Vec exp2_fraction(Vec r) {
  static_assert(kDegree == 4 || kDegree == 6);
  Vec p;
  if constexpr (kDegree == 4) {
    p = splat(0x1.3a02ccp-7f);
    p = fused_multiply_add(p, r, splat(0x1.c9fc46p-5f));
    p = fused_multiply_add(p, r, splat(0x1.ec0378p-3f));
    p = fused_multiply_add(p, r, splat(0x1.62e12cp-1f));
  } else {
    p = splat(0x1.41fbbcp-13f);
    p = fused_multiply_add(p, r, splat(0x1.5f3e54p-10f));
    p = fused_multiply_add(p, r, splat(0x1.3b2d4cp-7f));
    p = fused_multiply_add(p, r, splat(0x1.c6aee8p-5f));
    p = fused_multiply_add(p, r, splat(0x1.ebfbdcp-3f));
    p = fused_multiply_add(p, r, splat(0x1.62e430p-1f));
  }
  return fused_multiply_add(p, r, splat(1.0f));
}
FASTSFT_INLINE Vec power_of_2(VecInt exponent) { return reinterpret_cast<Vec>((exponent + 127) << 23); }

// exp(x) for x <= 0 (a rounding error above 0 is fine): 0 below 2^-126, NaN for NaN, and exactly 1 for 0.
FASTSFT_INLINE Vec exp_nonpositive(Vec x) {
#if defined(__AVX512F__)
  const __mmask16 seen = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(x * kLog2e),
                                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = fused_multiply_add(x, splat(kLog2e), -reinterpret_cast<Vec>(whole));
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(seen, reinterpret_cast<__m512>(exp2_fraction<6>(r)), whole));
#else
  const VecInt underflow = x < -87.33654f;
  const VecInt whole = __builtin_convertvector(select(underflow, Vec{}, x) * kLog2e - 0.5f, VecInt);  // truncates
  const Vec r = x * kLog2e - __builtin_convertvector(whole, Vec);
  return select(underflow, Vec{}, exp2_fraction<6>(r) * power_of_2(whole));
#endif
}

// 2^x for x <= 0 (a rounding error above 0 is fine): 0 below 2^-150, NaN for NaN, and exactly 1 for 0; kDegree as for
// exp2_fraction.
template <int kDegree>
FASTSFT_INLINE Vec exp2_nonpositive(Vec x) {
#if defined(__AVX512F__)
  // The second operand where either is NaN. 2^-160 underflows to 0.
  const __m512 bounded = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-160.0f), reinterpret_cast<__m512>(x));
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec p = exp2_fraction<kDegree>(reinterpret_cast<Vec>(bounded) - reinterpret_cast<Vec>(whole));
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), whole));
#else
  const VecInt underflow = x < -126.0f;
  const VecInt whole = __builtin_convertvector(select(underflow, Vec{}, x) - 0.5f, VecInt);  // truncates
  const Vec p = exp2_fraction<kDegree>(x - __builtin_convertvector(whole, Vec));
  return select(underflow, Vec{}, p * power_of_2(whole));
#endif
}

// log2(x) for normal x > 0, NaN for NaN: 2 / ln 2 * atanh(s) with s = (m - 1) / (m + 1), where x = m 2^e with m in
// [sqrt(1/2), sqrt(2)], to its ninth power (relative error 2e-9 before rounding).
FASTSFT_INLINE Vec log2_of(Vec x) {
  const VecInt exponent = (reinterpret_cast<VecInt>(x) - 0x3f3504f3) >> 23;
  const Vec m = x * power_of_2(-exponent);
  const Vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  Vec p = splat(0x1.484b14p-2f);
  p = p * z + 0x1.a61762p-2f;
  p = p * z + 0x1.2776c6p-1f;
  p = p * z + 0x1.ec709ep-1f;
  p = p * z + 0x1.715476p+1f;
  return p * s + __builtin_convertvector(exponent, Vec);
}

// tanh: odd polynomial near 0 (the quotient would cancel there), (1 - e) / (1 + e) with e = exp(-2|x|) beyond.
FASTSFT_INLINE Vec tanh_of(Vec x) {
  const Vec size = select(x < 0.0f, -x, x);
  const Vec e = exp_nonpositive(size * -2.0f);
  const Vec far = (1.0f - e) / (1.0f + e);
  const Vec z = x * x;
  Vec p = splat(-0x1.6e69b2p-8f);  // minimax for |x| < 0.64, relative error 6e-9 before rounding
  p = p * z + 0x1.50820ep-6f;
  p = p * z - 0x1.b7fd50p-5f;
  p = p * z + 0x1.110552p-3f;
  p = p * z - 0x1.55552ap-2f;
  const Vec near = p * z * x + x;
  return select(size < 0.64f, near, select(x < 0.0f, -far, far));
}

}  // namespace
}  // namespace fastsft::FASTSFT_ISA_NS
