// Vectors of machine words for the units that cosim/vector compiles: eight words of 32 or 64 bits, sixteen of 32.
//
// Operators are those of GCC's and clang's vector extensions, which any processor has; where AVX-512 or AVX2 has one instruction
// for what would take several, it is named here. Shifts by the width of a word or more give 0 (or the sign), as in hardware.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lutra::vector {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are taken apart as bytes");

typedef uint8_t B;
typedef uint32_t W;
typedef unsigned long long D;  // the type of its literals, which uint64_t may not be
static_assert(sizeof(D) == 8, "words of 64 bits");
typedef uint8_t V8x8 __attribute__((vector_size(8)));
typedef uint16_t V8x16 __attribute__((vector_size(16)));
typedef uint32_t V8x32 __attribute__((vector_size(32)));
typedef D V8x64 __attribute__((vector_size(64)));
typedef uint8_t V16x8 __attribute__((vector_size(16)));
typedef uint16_t V16x16 __attribute__((vector_size(32)));
typedef uint32_t V16x32 __attribute__((vector_size(64)));
typedef int32_t S8x32 __attribute__((vector_size(32)));
typedef long long S8x64 __attribute__((vector_size(64)));
typedef int32_t S16x32 __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))

// Memory -----------------------------------------------------------------------------------------------------------------
template <class T> INLINE T load(const B *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
template <class T> INLINE void store(B *at, T value) { std::memcpy(at, &value, sizeof value); }

// A word of a memory for each lane.
template <class V, class Word, class Rows> INLINE V one_by_one(const B *memory, unsigned pitch, Rows row) {
    V value;
    for (unsigned lane = 0; lane < sizeof value / sizeof(Word); ++lane) value[lane] = load<Word>(memory + row[lane] * pitch);
    return value;
}
#if defined(__AVX2__)
INLINE V8x32 gather(const B *memory, unsigned pitch, V8x32 row, V8x32 *) {
    return (V8x32)_mm256_i32gather_epi32((const int *)memory, (__m256i)(row * pitch), 1);
}
#else
INLINE V8x32 gather(const B *memory, unsigned pitch, V8x32 row, V8x32 *) { return one_by_one<V8x32, W>(memory, pitch, row); }
#endif
#if defined(__AVX512F__)
INLINE V8x64 gather(const B *memory, unsigned pitch, V8x32 row, V8x64 *) {
    return (V8x64)_mm512_i32gather_epi64((__m256i)(row * pitch), memory, 1);
}
INLINE V16x32 gather(const B *memory, unsigned pitch, V16x32 row, V16x32 *) {
    return (V16x32)_mm512_i32gather_epi32((__m512i)(row * pitch), memory, 1);
}
#else
INLINE V8x64 gather(const B *memory, unsigned pitch, V8x32 row, V8x64 *) { return one_by_one<V8x64, D>(memory, pitch, row); }
INLINE V16x32 gather(const B *memory, unsigned pitch, V16x32 row, V16x32 *) { return one_by_one<V16x32, W>(memory, pitch, row); }
#endif

// A table of at most `registers` vectors of words that lie one behind the other, by a permutation of registers.
template <int registers> INLINE V16x32 look_up(const B *table, V16x32 row, V16x32 *) {
#if defined(__AVX512F__)
    const __m512i low = (__m512i)load<V16x32>(table);
    if (registers == 1) return (V16x32)_mm512_permutexvar_epi32((__m512i)row, low);
    return (V16x32)_mm512_permutex2var_epi32(low, (__m512i)row, (__m512i)load<V16x32>(table + 64));
#else
    return gather(table, 4, row, (V16x32 *)0);
#endif
}
template <int registers> INLINE V8x32 look_up(const B *table, V8x32 row, V8x32 *) {
#if defined(__AVX512VL__)
    if (registers == 2)
        return (V8x32)_mm256_permutex2var_epi32((__m256i)load<V8x32>(table), (__m256i)row, (__m256i)load<V8x32>(table + 32));
#endif
#if defined(__AVX2__)
    if (registers == 1) return (V8x32)_mm256_permutevar8x32_epi32((__m256i)load<V8x32>(table), (__m256i)row);
#endif
    return gather(table, 4, row, (V8x32 *)0);
}
template <int registers> INLINE V8x64 look_up(const B *table, V8x32 row, V8x64 *) {
#if defined(__AVX512F__)
    const __m512i low = (__m512i)load<V8x64>(table), which = _mm512_cvtepu32_epi64((__m256i)row);
    if (registers == 1) return (V8x64)_mm512_permutexvar_epi64(which, low);
    return (V8x64)_mm512_permutex2var_epi64(low, which, (__m512i)load<V8x64>(table + 64));
#else
    return gather(table, 8, row, (V8x64 *)0);
#endif
}

// Choices ----------------------------------------------------------------------------------------------------------------
INLINE V8x32 pick(V8x32 one, V8x32 a, V8x32 b) { return one != 0 ? a : b; }
INLINE V16x32 pick(V16x32 one, V16x32 a, V16x32 b) { return one != 0 ? a : b; }
INLINE V8x64 pick(V8x32 one, V8x64 a, V8x64 b) {
#if defined(__AVX512VL__)
    const __mmask8 ones = _mm256_test_epi32_mask((__m256i)one, (__m256i)one);
    return (V8x64)_mm512_mask_blend_epi64(ones, (__m512i)b, (__m512i)a);
#else
    return __builtin_convertvector(one, V8x64) != 0 ? a : b;
#endif
}

// Comparisons: 0 or 1 ----------------------------------------------------------------------------------------------------
INLINE V8x32 equal(V8x32 a, V8x32 b) { return (V8x32)(a == b) & 1; }
INLINE V16x32 equal(V16x32 a, V16x32 b) { return (V16x32)(a == b) & 1; }
INLINE V8x32 less(V8x32 a, V8x32 b) { return (V8x32)(a < b) & 1; }
INLINE V16x32 less(V16x32 a, V16x32 b) { return (V16x32)(a < b) & 1; }
INLINE V8x32 less_signed(V8x32 a, V8x32 b) { return (V8x32)((S8x32)a < (S8x32)b) & 1; }
INLINE V16x32 less_signed(V16x32 a, V16x32 b) { return (V16x32)((S16x32)a < (S16x32)b) & 1; }
#if defined(__AVX512VL__)
INLINE V8x32 ones(__mmask8 mask) { return (V8x32)_mm256_maskz_set1_epi32(mask, 1); }
INLINE V8x32 equal(V8x64 a, V8x64 b) { return ones(_mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b)); }
INLINE V8x32 less(V8x64 a, V8x64 b) { return ones(_mm512_cmplt_epu64_mask((__m512i)a, (__m512i)b)); }
INLINE V8x32 less_signed(V8x64 a, V8x64 b) { return ones(_mm512_cmplt_epi64_mask((__m512i)a, (__m512i)b)); }
#else
INLINE V8x32 equal(V8x64 a, V8x64 b) { return __builtin_convertvector((V8x64)(a == b) & 1, V8x32); }
INLINE V8x32 less(V8x64 a, V8x64 b) { return __builtin_convertvector((V8x64)(a < b) & 1, V8x32); }
INLINE V8x32 less_signed(V8x64 a, V8x64 b) { return __builtin_convertvector((V8x64)((S8x64)a < (S8x64)b) & 1, V8x32); }
#endif
INLINE W equal(D a, D b) { return a == b; }
INLINE W less(D a, D b) { return a < b; }
INLINE W less_signed(W a, W b) { return int32_t(a) < int32_t(b); }
INLINE W less_signed(D a, D b) { return int64_t(a) < int64_t(b); }

// Shifts by what another word says ---------------------------------------------------------------------------------------
template <class T> INLINE T left(T x, T by) { return by < 8 * sizeof x ? x << by : 0; }
template <class T> INLINE T right(T x, T by) { return by < 8 * sizeof x ? x >> by : 0; }
INLINE W right_signed(W x, W by) { return W(int32_t(x) >> (by < 31 ? by : 31)); }
INLINE D right_signed(D x, D by) { return D(int64_t(x) >> (by < 63 ? by : 63)); }
#if defined(__AVX512F__)
INLINE V8x32 left(V8x32 x, V8x32 by) { return (V8x32)_mm256_sllv_epi32((__m256i)x, (__m256i)by); }
INLINE V8x32 right(V8x32 x, V8x32 by) { return (V8x32)_mm256_srlv_epi32((__m256i)x, (__m256i)by); }
INLINE V8x32 right_signed(V8x32 x, V8x32 by) { return (V8x32)_mm256_srav_epi32((__m256i)x, (__m256i)by); }
INLINE V16x32 left(V16x32 x, V16x32 by) { return (V16x32)_mm512_sllv_epi32((__m512i)x, (__m512i)by); }
INLINE V16x32 right(V16x32 x, V16x32 by) { return (V16x32)_mm512_srlv_epi32((__m512i)x, (__m512i)by); }
INLINE V16x32 right_signed(V16x32 x, V16x32 by) { return (V16x32)_mm512_srav_epi32((__m512i)x, (__m512i)by); }
INLINE V8x64 left(V8x64 x, V8x64 by) { return (V8x64)_mm512_sllv_epi64((__m512i)x, (__m512i)by); }
INLINE V8x64 right(V8x64 x, V8x64 by) { return (V8x64)_mm512_srlv_epi64((__m512i)x, (__m512i)by); }
INLINE V8x64 right_signed(V8x64 x, V8x64 by) { return (V8x64)_mm512_srav_epi64((__m512i)x, (__m512i)by); }
#else
#define SHIFTS(V, S, BITS)                                                                                             \
    INLINE V left(V x, V by) { return by < BITS ? x << (by & (BITS - 1)) : V{}; }                                      \
    INLINE V right(V x, V by) { return by < BITS ? x >> (by & (BITS - 1)) : V{}; }                                     \
    INLINE V right_signed(V x, V by) { return (V)((S)x >> (S)(by < BITS ? by : V{} + (BITS - 1))); }
SHIFTS(V8x32, S8x32, 32)
SHIFTS(V16x32, S16x32, 32)
SHIFTS(V8x64, S8x64, 64)
#undef SHIFTS
#endif

// Products of words that hold numbers of at most 32 bits, without and with signs -----------------------------------------
template <class T> INLINE T multiply_32(T a, T b) { return a * b; }
template <class T> INLINE T multiply_32_signed(T a, T b) { return a * b; }
#if defined(__AVX512F__)
INLINE V8x64 multiply_32(V8x64 a, V8x64 b) { return (V8x64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
INLINE V8x64 multiply_32_signed(V8x64 a, V8x64 b) { return (V8x64)_mm512_mul_epi32((__m512i)a, (__m512i)b); }
#endif

// The rest ---------------------------------------------------------------------------------------------------------------
INLINE W parity(D x) { return __builtin_parityll(x); }
INLINE V8x32 fold(V8x32 x) { return x ^= x >> 16, x ^= x >> 8, x ^= x >> 4, x ^= x >> 2, (x ^ x >> 1) & 1; }
INLINE V16x32 fold(V16x32 x) { return x ^= x >> 16, x ^= x >> 8, x ^= x >> 4, x ^= x >> 2, (x ^ x >> 1) & 1; }
INLINE V8x32 parity(V8x32 x) { return fold(x); }
INLINE V16x32 parity(V16x32 x) { return fold(x); }
INLINE V8x32 parity(V8x64 x) { return fold(__builtin_convertvector(x ^ x >> 32, V8x32)); }

template <class To, class From> INLINE To convert(From x) { return __builtin_convertvector(x, To); }
template <class V, class T> INLINE V splat(T x) { return V{} + x; }

#undef INLINE

}  // namespace lutra::vector
