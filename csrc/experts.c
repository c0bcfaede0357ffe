/* Products of few rows with experts' weights; experts.h says what they promise. A tile is some rows of one slot and up
 * to TILE_OUTPUTS outputs: x86 sets have their own functions for it (experts_tile.h), every other machine the plain C
 * of `portable`, which gives the same bits. */

#include "experts.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_SETS 1
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#else
#define ALWAYS_INLINE static inline
#define UNROLL
#endif

enum {
    LANES = 16,
    GROUP = 32,
    TILE_OUTPUTS = 64,
    TILE_SUMS = 4, /* the most rows and outputs whose sums any set holds in registers */
};
typedef struct {
    const float *x; /* num_rows rows, x_stride floats apart, zeros from num_inputs to a multiple of LANES */
    int64_t x_stride;
    const char *weights; /* of the first output; the next one lies weight_stride bytes further */
    int64_t weight_stride;
    const float *scales; /* of these outputs, one for each block of inputs; NULL: they are in x, over loaded_as */
    int64_t num_inputs;
    int num_rows, num_outputs;
    float *out; /* num_rows rows of TILE_OUTPUTS */
    const simd_loops *loops;
} tile;

/* Both return whether they met a nan of e4m3fn: the results are then to be made by the plain C. */
typedef struct {
    int (*sums[ROWS_NUM_DTYPES])(const tile *t);
    int (*dequantize)(const char *codes, int64_t count, const float *scales, char *to);
} tile_functions;

static int is_scaled(rows_dtype dtype) { return dtype == ROWS_E4M3FN || dtype == ROWS_INT8; }

/* What sets load a stored 1 as: for e4m3fn bits are moved, see below. */
static float loaded_as(rows_dtype dtype) { return dtype == ROWS_E4M3FN ? 0x1p-8f : 1; }

/* Which weights are taken in groups of 32 inputs, the even ones first: experts.h. */
static int is_interleaved(rows_dtype dtype) { return dtype == ROWS_BFLOAT16 || dtype == ROWS_E4M3FN; }

static void put_even_first(float *values, int64_t count) {
    for (float *group = values; group < values + count; group += GROUP) {
        float ordered[GROUP];
        for (int l = 0; l < LANES; l++) {
            ordered[l] = group[2 * l];
            ordered[l + LANES] = group[2 * l + 1];
        }
        memcpy(group, ordered, sizeof ordered);
    }
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---------------------------------------------------------------- plain C */

static float join_portable(const float *sums) {
    float eight[8], four[4];
    for (int l = 0; l < 8; l++) eight[l] = sums[l] + sums[l + 8];
    for (int l = 0; l < 4; l++) four[l] = eight[l] + eight[l + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

enum { PORTABLE_ROWS = 4 };

static void rows_portable(const tile *t, rows_dtype dtype, int first_row, int num_rows, int output) {
    const int64_t item = rows_item_bytes(dtype);
    const char *weights = t->weights + output * t->weight_stride;
    float total[PORTABLE_ROWS][LANES] = {{0}};
    for (int64_t begin = 0; begin < t->num_inputs; begin += EXPERTS_BLOCK) {
        const int64_t count = smaller(EXPERTS_BLOCK, t->num_inputs - begin);
        const int64_t up = (count + GROUP - 1) / GROUP * GROUP;
        float w[EXPERTS_BLOCK];
        const float scale = t->scales == NULL ? loaded_as(dtype) : t->scales[begin / EXPERTS_BLOCK];
        t->loops->widen[dtype](weights + begin * item, w, count, scale);
        for (int64_t k = count; k < up; k++) w[k] = 0;
        if (is_interleaved(dtype)) put_even_first(w, up);
        for (int r = 0; r < num_rows; r++) {
            const float *x = t->x + (first_row + r) * t->x_stride + begin;
            float sums[LANES];
            memcpy(sums, total[r], sizeof sums);
            for (int64_t k = 0; k < up; k += LANES) {
                for (int l = 0; l < LANES; l++) sums[l] = fmaf(x[k + l], w[k + l], sums[l]);
            }
            memcpy(total[r], sums, sizeof sums);
        }
    }
    for (int r = 0; r < num_rows; r++) {
        t->out[(first_row + r) * TILE_OUTPUTS + output] = join_portable(total[r]);
    }
}

static void tile_portable(const tile *t, rows_dtype dtype) {
    for (int output = 0; output < t->num_outputs; output++) {
        for (int row = 0; row < t->num_rows; row += PORTABLE_ROWS) {
            rows_portable(t, dtype, row, (int)smaller(PORTABLE_ROWS, t->num_rows - row), output);
        }
    }
}

/* ---------------------------------------------------------------- x86 */

#ifdef HAS_X86_SETS

/* Two numbers of 16 bits lie in every 32 bits that are loaded: the even inputs of a group below, the odd ones above.
 * bfloat16 is the upper half of a float32. The bits of e4m3fn are moved to where float16 has sign, exponent and
 * mantissa: that is the value times 2^-8, subnormal ones included, as float16's exponents are biased by 15 instead of 7. Only
 * e4m3fn's nan is no number there: its code is the largest one without the sign. */

#define TILE(name) name##_avx2
#define TILE_TARGET __attribute__((target("avx2,fma,f16c")))
#define TILE_FEW_ROWS 1
#define TILE_FEW_STEP 4
#define TILE_MOST_ROWS 3
#define TILE_MOST_STEP 2

typedef struct {
    __m256 low, high; /* sums 0 to 7 and 8 to 15 */
} sums_avx2;
typedef struct {
    sums_avx2 first, second;
} group_avx2;
typedef __m256i largest_code_avx2;

TILE_TARGET ALWAYS_INLINE __m256i load256(const char *from) {
    return _mm256_loadu_si256((const __m256i *)(const void *)from);
}
TILE_TARGET ALWAYS_INLINE __m256i no_code_avx2(void) { return _mm256_setzero_si256(); }
TILE_TARGET ALWAYS_INLINE int is_nan_avx2(__m256i largest) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(0x7f))) != 0;
}
TILE_TARGET ALWAYS_INLINE __m256i larger_code(__m256i largest, __m256i codes) {
    return _mm256_max_epu8(largest, _mm256_and_si256(codes, _mm256_set1_epi8(0x7f)));
}
/* The even or odd ones of 32 e4m3fn codes as float16. */
TILE_TARGET ALWAYS_INLINE __m256i even_halves(__m256i codes) {
    const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1);
    return _mm256_and_si256(moved, _mm256_set1_epi16((short)0xbf80));
}
TILE_TARGET ALWAYS_INLINE __m256i odd_halves(__m256i codes) {
    return _mm256_and_si256(_mm256_srai_epi16(codes, 1), _mm256_set1_epi16((short)0xbf80));
}

TILE_TARGET ALWAYS_INLINE sums_avx2 splat_avx2(float value) {
    return (sums_avx2){_mm256_set1_ps(value), _mm256_set1_ps(value)};
}
TILE_TARGET ALWAYS_INLINE sums_avx2 times_avx2(sums_avx2 a, sums_avx2 b) {
    return (sums_avx2){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
TILE_TARGET ALWAYS_INLINE sums_avx2 add_product_avx2(sums_avx2 c, sums_avx2 a, sums_avx2 b) {
    return (sums_avx2){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TILE_TARGET ALWAYS_INLINE sums_avx2 load_float_avx2(const float *from) {
    return (sums_avx2){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
TILE_TARGET ALWAYS_INLINE sums_avx2 halves_avx2(__m256i halves) {
    return (sums_avx2){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                       _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
/* 8 of int8; whole numbers of this size are exact as floats. */
TILE_TARGET ALWAYS_INLINE __m256 eight_whole(const char *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)from)));
}
TILE_TARGET ALWAYS_INLINE group_avx2 load_avx2(const rows_dtype dtype, const char *from, __m256i *largest) {
    if (dtype == ROWS_E4M3FN) {
        const __m256i codes = load256(from);
        *largest = larger_code(*largest, codes);
        return (group_avx2){halves_avx2(even_halves(codes)), halves_avx2(odd_halves(codes))};
    }
    if (dtype == ROWS_BFLOAT16) {
        const __m256i low = load256(from), high = load256(from + 32), upper = _mm256_set1_epi32((int)0xffff0000);
        return (group_avx2){
            {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))}};
    }
    if (dtype == ROWS_INT8) {
        return (group_avx2){{eight_whole(from), eight_whole(from + 8)},
                            {eight_whole(from + 16), eight_whole(from + 24)}};
    }
    if (dtype == ROWS_FLOAT16) return (group_avx2){halves_avx2(load256(from)), halves_avx2(load256(from + 32))};
    const float *values = (const float *)(const void *)from;
    return (group_avx2){load_float_avx2(values), load_float_avx2(values + LANES)};
}
TILE_TARGET ALWAYS_INLINE float join_eight(__m256 eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
TILE_TARGET ALWAYS_INLINE float join_avx2(sums_avx2 a) { return join_eight(_mm256_add_ps(a.low, a.high)); }

/* float32 to bfloat16 as simd.c rounds: the upper half of `value` afterwards. */
TILE_TARGET ALWAYS_INLINE __m256i round_avx2(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
TILE_TARGET ALWAYS_INLINE __m256i pair_avx2(__m256 even, __m256 odd) {
    const __m256i upper = _mm256_and_si256(round_avx2(odd), _mm256_set1_epi32((int)0xffff0000));
    return _mm256_or_si256(upper, _mm256_srli_epi32(round_avx2(even), 16));
}
TILE_TARGET ALWAYS_INLINE void store_bfloat16_avx2(group_avx2 group, sums_avx2 factor, char *to) {
    group = (group_avx2){times_avx2(group.first, factor), times_avx2(group.second, factor)};
    __m256i *pairs = (__m256i *)(void *)to;
    _mm256_storeu_si256(pairs, pair_avx2(group.first.low, group.second.low));
    _mm256_storeu_si256(pairs + 1, pair_avx2(group.first.high, group.second.high));
}

#include "experts_tile.h"

#define TILE(name) name##_avx512
#define TILE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define TILE_FEW_ROWS 4
#define TILE_FEW_STEP 4
#define TILE_MOST_ROWS 4
#define TILE_MOST_STEP 4

typedef __m512 sums_avx512;
typedef struct {
    __m512 first, second;
} group_avx512;
typedef __m256i largest_code_avx512;

TILE_TARGET ALWAYS_INLINE __m256i no_code_avx512(void) { return no_code_avx2(); }
TILE_TARGET ALWAYS_INLINE int is_nan_avx512(__m256i largest) { return is_nan_avx2(largest); }
TILE_TARGET ALWAYS_INLINE __m512 splat_avx512(float value) { return _mm512_set1_ps(value); }
TILE_TARGET ALWAYS_INLINE __m512 load_float_avx512(const float *from) { return _mm512_loadu_ps(from); }
TILE_TARGET ALWAYS_INLINE __m512 add_product_avx512(__m512 c, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, c); }
TILE_TARGET ALWAYS_INLINE __m512 sixteen_whole(const char *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)from)));
}
TILE_TARGET ALWAYS_INLINE group_avx512 load_avx512(const rows_dtype dtype, const char *from,
                                                   __m256i *largest) {
    if (dtype == ROWS_E4M3FN) {
        const __m256i codes = load256(from);
        *largest = larger_code(*largest, codes);
        return (group_avx512){_mm512_cvtph_ps(even_halves(codes)), _mm512_cvtph_ps(odd_halves(codes))};
    }
    if (dtype == ROWS_BFLOAT16) {
        const __m512i pairs = _mm512_loadu_si512(from);
        return (group_avx512){
            _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)))};
    }
    if (dtype == ROWS_INT8) return (group_avx512){sixteen_whole(from), sixteen_whole(from + LANES)};
    if (dtype == ROWS_FLOAT16) {
        return (group_avx512){_mm512_cvtph_ps(load256(from)), _mm512_cvtph_ps(load256(from + 32))};
    }
    return (group_avx512){_mm512_loadu_ps(from), _mm512_loadu_ps(from + 64)};
}
TILE_TARGET ALWAYS_INLINE float join_avx512(__m512 a) {
    return join_eight(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}

/* float32 to bfloat16 as simd.c rounds: the upper half of `value` afterwards. */
TILE_TARGET ALWAYS_INLINE __m512i round_avx512(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
TILE_TARGET ALWAYS_INLINE __m512i pair_avx512(__m512 even, __m512 odd) {
    const __m512i upper = _mm512_and_si512(round_avx512(odd), _mm512_set1_epi32((int)0xffff0000));
    return _mm512_or_si512(upper, _mm512_srli_epi32(round_avx512(even), 16));
}
TILE_TARGET ALWAYS_INLINE void store_bfloat16_avx512(group_avx512 group, __m512 factor, char *to) {
    _mm512_storeu_si512(to, pair_avx512(_mm512_mul_ps(group.first, factor), _mm512_mul_ps(group.second, factor)));
}

#include "experts_tile.h"

#endif

/* The functions of a set, or NULL: the plain C. */
static const tile_functions *functions_of(const simd_loops *loops) {
#ifdef HAS_X86_SETS
    const int has_fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_fma && strcmp(loops->name, "avx512") == 0) return &functions_avx512;
    if (has_fma && strcmp(loops->name, "avx2") == 0) return &functions_avx2;
#endif
    (void)loops;
    return NULL;
}

int experts_is_fast(const simd_loops *loops) {
#ifdef FP_FAST_FMAF
    (void)loops;
    return 1;
#else
    return functions_of(loops) != NULL;
#endif
}

/* ---------------------------------------------------------------- slots and parts */

static int64_t padded(int64_t num_inputs) { return (num_inputs + GROUP - 1) / GROUP * GROUP; }

/* x as floats, and the same with scales multiplied in. */
int64_t experts_scratch(int64_t num_inputs) { return 2 * EXPERTS_ROWS * padded(num_inputs); }

/* What one output of a slot costs: its weights are read, whatever the rows; four rows cost about as much as that. */
static int64_t cost_of(int64_t rows) { return rows == 0 ? 0 : 4 + rows; }

/* The rows of one slot, from `pair` on; `rows` of them, at most EXPERTS_ROWS. */
static experts_status fill_x(const simd_loops *loops, rows_dtype dtype, rows_input x, const int64_t *row_index,
                             int64_t pair, int rows, const experts_weights *w, float *scratch, rows_fault *fault) {
    const int64_t num_inputs = w->num_inputs;
    const int64_t stride = padded(num_inputs);
    for (int r = 0; r < rows; r++) {
        const int64_t row = row_index != NULL ? row_index[pair + r] : pair + r;
        if (row < 0 || row >= x.count) {
            *fault = (rows_fault){.row = pair + r, .value = row};
            return EXPERTS_BAD_ROW;
        }
        float *to = scratch + r * stride;
        loops->widen[dtype]((const char *)x.start + row * x.stride, to, num_inputs, 1);
        for (int64_t k = num_inputs; k < stride; k++) to[k] = 0;
        if (is_interleaved(w->dtype)) put_even_first(to, stride);
    }
    return EXPERTS_OK;
}

/* Over loaded_as there would be infinite ones; those of real weights are far from that. */
static int scales_are_huge(const float *scales, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (!(fabsf(scales[i]) < 0x1p119f)) return 1;
    }
    return 0;
}

/* x with the scales of 128 outputs, times `factor`, multiplied in: once for all of them, not once for each weight. */
static void scale_x(const float *x, int rows, int64_t stride, const float *scales, float factor, float *scaled) {
    for (int r = 0; r < rows; r++) {
        for (int64_t k = 0; k < stride; k++) {
            scaled[r * stride + k] = x[r * stride + k] * (scales[k / EXPERTS_BLOCK] * factor);
        }
    }
}

/* Outputs begin..end of one slot for `rows` pairs from `pair` on, whose x is in scratch. */
static void slot_outputs(const simd_loops *loops, const tile_functions *functions, const experts_weights *w,
                         int64_t slot, int64_t begin, int64_t end, int64_t pair, int rows, float *scratch,
                         rows_dtype out_dtype, rows_output out) {
    const int64_t row_bytes = w->num_inputs * rows_item_bytes(w->dtype), out_item = rows_item_bytes(out_dtype);
    const int64_t across = rows_num_blocks(w->num_inputs, EXPERTS_BLOCK), stride = padded(w->num_inputs);
    const int64_t down = rows_num_blocks(w->num_outputs, EXPERTS_BLOCK);
    float sums[EXPERTS_ROWS * TILE_OUTPUTS], *scaled = scratch + EXPERTS_ROWS * stride;
    tile t = {
        .x = scratch, .x_stride = stride, .weight_stride = row_bytes, .num_inputs = w->num_inputs, .num_rows = rows,
        .out = sums, .loops = loops,
    };
    for (int64_t n = begin; n < end; n += t.num_outputs) {
        const int64_t next = smaller(end, (n / TILE_OUTPUTS + 1) * TILE_OUTPUTS); /* so within a block of scales */
        if (w->scales != NULL && (n == begin || n % EXPERTS_BLOCK == 0)) {
            const float *scales = w->scales + (slot * down + n / EXPERTS_BLOCK) * across;
            t.scales = scales_are_huge(scales, across) ? scales : NULL;
            t.x = t.scales != NULL ? scratch : scaled;
            if (t.scales == NULL) scale_x(scratch, rows, stride, scales, 1 / loaded_as(w->dtype), scaled);
        }
        t.weights = (const char *)w->values + (slot * w->num_outputs + n) * row_bytes;
        t.num_outputs = (int)(next - n);
        if (functions == NULL || t.scales != NULL || functions->sums[w->dtype](&t)) tile_portable(&t, w->dtype);
        for (int r = 0; r < rows; r++) {
            char *to = (char *)out.start + (pair + r) * out.stride + n * out_item;
            loops->narrow[out_dtype](sums + r * TILE_OUTPUTS, to, t.num_outputs);
        }
    }
}

rows_status experts_dequantize(const simd_loops *loops, rows_input codes, int64_t columns, const float *scales,
                               rows_output values) {
    if (columns < 0 || codes.count != values.count) return ROWS_BAD_ARGUMENT;
    const tile_functions *functions = functions_of(loops);
    const int64_t across = rows_num_blocks(columns, EXPERTS_BLOCK);
    for (int64_t row = 0; row < codes.count && columns > 0; row++) {
        const char *from = (const char *)codes.start + row * codes.stride;
        char *to = (char *)values.start + row * values.stride;
        const float *of_row = scales + row / EXPERTS_BLOCK * across;
        if (functions == NULL || scales_are_huge(of_row, across) ||
            functions->dequantize(from, columns, of_row, to)) {
            const rows_status status =
                rows_dequantize(loops, ROWS_E4M3FN, (rows_input){from, 1, 0}, columns, of_row, EXPERTS_BLOCK,
                                EXPERTS_BLOCK, ROWS_BFLOAT16, (rows_output){to, 1, 0});
            if (status != ROWS_OK) return status;
        }
    }
    return ROWS_OK;
}

static int is_float(rows_dtype dtype) {
    return dtype == ROWS_FLOAT32 || dtype == ROWS_FLOAT16 || dtype == ROWS_BFLOAT16;
}

static experts_status check(const experts_weights *w, rows_dtype x_dtype, rows_dtype out_dtype, experts_part part) {
    const int has_scales = is_scaled(w->dtype);
    if (!is_float(x_dtype) || !is_float(out_dtype) || !(is_float(w->dtype) || has_scales)) return EXPERTS_BAD_ARGUMENT;
    if (has_scales != (w->scales != NULL)) return EXPERTS_BAD_ARGUMENT;
    if (w->num_slots < 0 || w->num_outputs < 0 || w->num_inputs < 0) return EXPERTS_BAD_ARGUMENT;
    return part.count < 1 || part.index < 0 || part.index >= part.count ? EXPERTS_BAD_ARGUMENT : EXPERTS_OK;
}

/* The cost of an output, summed over slots; every count of rows is looked at. */
static experts_status total_cost(const int64_t *rows_per_slot, int64_t num_slots, int64_t num_pairs, int64_t *cost,
                                 rows_fault *fault) {
    int64_t left = num_pairs;
    *cost = 0;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int64_t rows = rows_per_slot[slot];
        *fault = (rows_fault){.row = slot, .value = rows};
        if (rows < 0 || rows > left) return EXPERTS_BAD_COUNT;
        left -= rows;
        *cost += cost_of(rows);
    }
    *fault = (rows_fault){.row = num_slots, .value = num_pairs - left};
    return left == 0 ? EXPERTS_OK : EXPERTS_BAD_COUNT;
}

/* What falls to a part of the outputs of a slot whose costs lie at before..before + cost of all. */
static int64_t share(int64_t before, int64_t cost, int64_t edge_index, int64_t edge_count, int64_t all,
                     int64_t num_outputs) {
    const double edge = (double)all * (double)edge_index / (double)edge_count;
    const double inside = (edge - (double)before) / (double)cost * (double)num_outputs;
    if (inside <= 0) return 0;
    return inside >= (double)num_outputs ? num_outputs : (int64_t)inside;
}

experts_status experts_product(const simd_loops *loops, const experts_weights *weights, rows_dtype x_dtype,
                               rows_input x, const int64_t *row_index, const int64_t *rows_per_slot,
                               rows_dtype out_dtype, rows_output out, experts_part part, float *scratch,
                               rows_fault *fault) {
    const experts_weights w = *weights;
    int64_t all, before = 0, pair = 0;
    experts_status status = check(&w, x_dtype, out_dtype, part);
    if (status == EXPERTS_OK) status = total_cost(rows_per_slot, w.num_slots, out.count, &all, fault);
    if (status != EXPERTS_OK || w.num_outputs == 0) return status;
    const tile_functions *functions = functions_of(loops);
    for (int64_t slot = 0; slot < w.num_slots; slot++) {
        const int64_t rows = rows_per_slot[slot], cost = cost_of(rows);
        if (rows < 0 || rows > out.count - pair) { /* another thread has changed it */
            *fault = (rows_fault){.row = slot, .value = rows};
            return EXPERTS_BAD_COUNT;
        }
        if (rows == 0) continue;
        const int64_t begin = share(before, cost, part.index, part.count, all, w.num_outputs);
        const int64_t end = part.index + 1 == part.count
                                ? w.num_outputs
                                : share(before, cost, part.index + 1, part.count, all, w.num_outputs);
        for (int64_t done = 0; done < rows && begin < end; done += EXPERTS_ROWS) {
            const int now = (int)smaller(EXPERTS_ROWS, rows - done);
            status = fill_x(loops, x_dtype, x, row_index, pair + done, now, &w, scratch, fault);
            if (status != EXPERTS_OK) return status;
            slot_outputs(loops, functions, &w, slot, begin, end, pair + done, now, scratch, out_dtype, out);
        }
        before += cost;
        pair += rows;
    }
    return EXPERTS_OK;
}
