/* Products of few rows with the weights of the experts that they chose.
 *
 * Plain C11: no Python, no torch, no allocation. moe_runtime.experts.compute decides when it runs; F.linear on
 * dequantised weights is the slow twin. One call uses one thread; several threads share a product by its parts.
 *
 * Every set of instructions gives the same bits. Inputs are taken in groups of 32, the last one filled up with zeros:
 * for bfloat16 and e4m3fn weights the 16 even ones of a group, then the 16 odd ones; for others as they lie. A row and
 * an output have 16 sums: sum l is of the products whose number in this order is l modulo 16, each added with one
 * rounding (fma). They are joined in one order: l with l + 8, then l + 4, l + 2, l + 1. So a row's result depends on
 * that row and the weights only: not on the other rows, the parts or the set.
 *
 * The caller answers for the memory, as in rows.h; numbers of rows are checked here at the moment they are used.
 *
 * Letters: M pairs of a row and a slot, S slots, N outputs, K inputs of a weight matrix.
 */
#ifndef MOE_RUNTIME_EXPERTS_H
#define MOE_RUNTIME_EXPERTS_H

#include "rows.h"

enum {
    EXPERTS_BLOCK = 128, /* rows and columns of an FP8 or INT8 weight that share one scale */
    EXPERTS_ROWS = 16,   /* rows of a slot for which its weights are read once */
};

typedef enum {
    EXPERTS_OK = 0,
    EXPERTS_BAD_ARGUMENT, /* a dtype where it has no meaning, a negative size, no such part */
    EXPERTS_BAD_COUNT,    /* fault: row is the slot, value its number of rows: below 0, or more than there are pairs */
    EXPERTS_BAD_ROW,      /* fault: row is the pair, value the row it names */
} experts_status;

/* Weights [S, N, K], contiguous. E4M3FN and INT8 have scales [S, ceil(N / 128), ceil(K / 128)]: value * scale is the
 * weight. The scale is multiplied into x, in float32, once for 128 outputs; values are exact. Others have no scales. */
typedef struct {
    rows_dtype dtype; /* float32, float16, bfloat16, e4m3fn or int8 */
    const void *values;
    const float *scales;
    int64_t num_slots, num_outputs, num_inputs;
} experts_weights;

/* Part `index` of `count`: a contiguous range of (slot, output). Together they write every output once. */
typedef struct {
    int64_t index, count;
} experts_part;

/* Floats of scratch that one call needs. */
int64_t experts_scratch(int64_t num_inputs);

/* out[p, n] = sum over k of x[row_index[p], k] * weights[slot of p, n, k], for this part of (slot, n).
 *
 * Pairs are grouped by slot: rows_per_slot [S] adds up to out.count. row_index [M], or NULL for 0..M-1. x and out are
 * float32, float16 or bfloat16; sums are float32, rounded once. */
experts_status experts_product(const simd_loops *loops, const experts_weights *weights, rows_dtype x_dtype,
                               rows_input x, const int64_t *row_index, const int64_t *rows_per_slot,
                               rows_dtype out_dtype, rows_output out, experts_part part, float *scratch,
                               rows_fault *fault);

/* values [rows, columns] bfloat16 of codes [rows, columns] e4m3fn with scales for blocks of 128 by 128: what
 * rows_dequantize gives, several times as fast where the set has its own function for it. */
rows_status experts_dequantize(const simd_loops *loops, rows_input codes, int64_t columns, const float *scales,
                               rows_output values);

/* Whether this set multiplies and adds in one instruction; where it does not, its products are right but slow. */
int experts_is_fast(const simd_loops *loops);

#endif
