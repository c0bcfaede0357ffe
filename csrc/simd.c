/* Conversions of single values, and the loops of simd_loops.h compiled for each instruction set.
 *
 * The conversions are whole-number arithmetic on the bits, all sides computed and one selected. They neither read nor
 * make subnormal float32 numbers on the way, so they are right even in a thread that flushes those to zero.
 */

#include "simd.h"

#include <float.h>
#include <stddef.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float32 arithmetic that is not rounded to float32 each time gives other bits than torch"
#endif

#if defined(__GNUC__)
#define VALUE static inline __attribute__((always_inline))
#else
#define VALUE static inline
#endif

VALUE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

VALUE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

VALUE uint32_t select(int condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }

/* A float with `mantissa_bits` and exponents biased by `bias`, without its sign, to float32; not for inf and nan. */
VALUE uint32_t small_to_float(uint32_t magnitude, int mantissa_bits, int bias) {
    const uint32_t shifted = magnitude << (23 - mantissa_bits);
    const uint32_t least_normal = (uint32_t)(127 - bias + 1) << 23;
    /* A subnormal one has no leading 1: add it, then subtract its value. */
    const uint32_t subnormal = bits_of(float_of(least_normal | shifted) - float_of(least_normal));
    return select(magnitude >> mantissa_bits == 0, subnormal, shifted + ((uint32_t)(127 - bias) << 23));
}

/* A float32 without its sign to such a float, rounded half to even; not for what is beyond its largest. */
VALUE uint32_t float_to_small(uint32_t magnitude, int mantissa_bits, int bias) {
    const int cut = 23 - mantissa_bits;
    const uint32_t half_less_one = (UINT32_C(1) << (cut - 1)) - 1;
    const uint32_t odd = magnitude >> cut & 1;
    const uint32_t normal = (magnitude - ((uint32_t)(127 - bias) << 23) + half_less_one + odd) >> cut;
    /* Added to a number whose last bit is worth the smallest subnormal, the sum is rounded there. */
    const uint32_t aligned = (uint32_t)(127 - bias + 1 + cut) << 23;
    const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(aligned)) - aligned;
    return select(magnitude < (uint32_t)(127 - bias + 1) << 23, subnormal, normal);
}

VALUE float float32_to_float(float value) { return value; }
VALUE float float_to_float32(float value) { return value; }
VALUE float float64_to_float(double value) { return (float)value; }
VALUE double float_to_float64(float value) { return (double)value; }
VALUE float int8_to_float(int8_t value) { return (float)value; }

VALUE uint8_t float_to_int8(float value) {
    return (uint8_t)bits_of(value + 0x1.8p23f); /* whose last bit is worth 1: the sum is rounded to whole numbers */
}

VALUE float bfloat16_to_float(uint16_t value) { return float_of((uint32_t)value << 16); }

VALUE uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t)select((bits & 0x7fffffff) > 0x7f800000, nan, rounded);
}

VALUE float float16_to_float(uint16_t value) {
    const uint32_t sign = (uint32_t)(value & 0x8000) << 16, magnitude = value & 0x7fff;
    const uint32_t not_finite = 0x7f800000 | magnitude << 13 | select(magnitude > 0x7c00, 0x400000, 0);
    return float_of(sign | select(magnitude >= 0x7c00, not_finite, small_to_float(magnitude, 10, 15)));
}

VALUE uint16_t float_to_float16(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint32_t nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
    const uint32_t not_small = select(magnitude > 0x7f800000, nan, 0x7c00);
    const uint32_t finite = float_to_small(magnitude, 10, 15); /* 65520 and more would be beyond its largest */
    return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)select(magnitude >= 0x477ff000, not_small, finite);
}

VALUE float e4m3fn_to_float(uint8_t value) {
    const uint32_t sign = (uint32_t)(value & 0x80) << 24, magnitude = value & 0x7f;
    return float_of(sign | select(magnitude == 0x7f, 0x7fc00000, small_to_float(magnitude, 3, 7)));
}

VALUE uint8_t float_to_e4m3fn(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint32_t finite = float_to_small(magnitude, 3, 7); /* 464, half way beyond 448, is rounded down */
    return (uint8_t)(bits >> 24 & 0x80) | (uint8_t)select(magnitude > 0x43e80000, 0x7f, finite);
}

/* The one without minus zero: that byte is its nan. */
VALUE float e4m3fnuz_to_float(uint8_t value) {
    const uint32_t sign = (uint32_t)(value & 0x80) << 24, magnitude = value & 0x7f;
    return float_of(select(value == 0x80, 0x7fc00000, sign | small_to_float(magnitude, 3, 8)));
}

VALUE uint8_t float_to_e4m3fnuz(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint32_t finite = float_to_small(magnitude, 3, 8); /* 248, half way beyond 240, is rounded up: nan */
    const uint32_t with_sign = finite | select(finite == 0, 0, bits >> 24 & 0x80);
    return (uint8_t)select(magnitude >= 0x43780000, 0x80, with_sign);
}

/* What every machine of this kind has: SSE2 on x86-64, NEON on 64-bit ARM. */
#define LOOP_NAME "portable"
#define LOOP_TARGET
#define LOOP(name) name##_portable
#include "simd_loops.h"
#undef LOOP_NAME
#undef LOOP_TARGET
#undef LOOP

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_SETS 1

#define LOOP_NAME "avx2"
#define LOOP_TARGET __attribute__((target("avx2")))
#define LOOP(name) name##_avx2
#include "simd_loops.h"
#undef LOOP_NAME
#undef LOOP_TARGET
#undef LOOP

#ifdef __clang__ /* which uses 512 bits without being asked */
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#define LOOP_NAME "avx512"
#define LOOP_TARGET __attribute__((target(AVX512)))
#define LOOP(name) name##_avx512
#include "simd_loops.h"
#undef LOOP_NAME
#undef LOOP_TARGET
#undef LOOP
#endif

enum { MAX_SETS = 3 };

static int find_sets(const simd_loops *sets[MAX_SETS]) {
    int count = 0;
#ifdef HAS_X86_SETS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        sets[count++] = &loops_avx512;
    }
    if (__builtin_cpu_supports("avx2")) sets[count++] = &loops_avx2;
#endif
    sets[count++] = &loops_portable;
    return count;
}

int simd_count(void) {
    const simd_loops *sets[MAX_SETS];
    return find_sets(sets);
}

const simd_loops *simd_at(int index) {
    const simd_loops *sets[MAX_SETS];
    const int count = find_sets(sets);
    return index >= 0 && index < count ? sets[index] : NULL;
}

const simd_loops *simd_find(const char *name) {
    const simd_loops *sets[MAX_SETS];
    const int count = find_sets(sets);
    if (name == NULL || *name == '\0') return sets[0];
    for (int i = 0; i < count; i++) {
        if (strcmp(sets[i]->name, name) == 0) return sets[i];
    }
    return NULL;
}
