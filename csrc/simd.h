/* The loops over a row's values that vector instructions make faster, once per instruction set.
 *
 * Every set gives the same bits: all of them are the same C (simd_loops.h), compiled for other instructions, without
 * fused multiply-adds and without reordered sums. Only what a nan looks like is left open, as it is in torch.
 * Values that are converted go through float32, as torch's conversions do.
 */
#ifndef MOE_RUNTIME_SIMD_H
#define MOE_RUNTIME_SIMD_H

#include <stdint.h>

typedef enum {
    ROWS_FLOAT32 = 0,
    ROWS_FLOAT64,
    ROWS_FLOAT16,
    ROWS_BFLOAT16,
    ROWS_NUM_ROW_DTYPES, /* what rows are computed with; what follows is only stored or sent */
    ROWS_E4M3FN = ROWS_NUM_ROW_DTYPES,
    ROWS_E4M3FNUZ,
    ROWS_INT8,
    ROWS_NUM_DTYPES,
} rows_dtype;

/* Inputs and outputs of one call must not overlap; every pointer is aligned to the size of its items. */
typedef struct {
    const char *name;
    /* to[i] = (float)from[i] * factor */
    void (*widen[ROWS_NUM_DTYPES])(const void *from, float *to, int64_t count, float factor);
    /* to[i] = from[i] rounded half to even. An 8-bit float takes what is too large as nan, as torch does; int8 takes
     * values within -128..127 only, anything else gives some byte. */
    void (*narrow[ROWS_NUM_DTYPES])(const float *from, void *to, int64_t count);
    /* The largest absolute value; nan where there is one, 0 of nothing. */
    float (*largest)(const float *values, int64_t count);
    /* values[i] /= divisor, then brought within -limit..limit; nan becomes `for_nan`. */
    void (*divide)(float *values, int64_t count, float divisor, float limit, float for_nan);
    /* sums[i] += row[i], and += row[i] * weight; sums and products are double for float64 rows, else float. */
    void (*add[ROWS_NUM_ROW_DTYPES])(void *sums, const void *row, int64_t count);
    void (*add_weighted[ROWS_NUM_ROW_DTYPES])(void *sums, const void *row, int64_t count, double weight);
} simd_loops;

/* The sets that this machine has, best first, the portable one last; NULL from simd_count() on. */
int simd_count(void);
const simd_loops *simd_at(int index);

/* The set of that name; the best for NULL and for ""; NULL where this machine or this build has none of that name. */
const simd_loops *simd_find(const char *name);

#endif
