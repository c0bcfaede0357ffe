/* Token rows: packed for the wire, unpacked, summed by token, and quantised.
 *
 * Plain C11: no Python, no torch, no allocation. moe_runtime.comm.rows and comm.formats say what the bytes mean and are
 * the slow twins; the results are theirs bit for bit, where a nan equals every other. One call uses one thread.
 *
 * The caller answers for the memory: tables as large as they say they are, aligned to their items, outputs overlapping
 * nothing. Indices are checked here, each at the moment it is used, so that inputs which another thread changes
 * meanwhile give wrong values or an error, never an access outside the tables.
 *
 * Letters: T tokens, N rows, K top-k, H hidden.
 */
#ifndef MOE_RUNTIME_ROWS_H
#define MOE_RUNTIME_ROWS_H

#include <stdint.h>

#include "simd.h"

enum { ROWS_BLOCK = 128 }; /* consecutive values of a row that share one scale */

typedef enum {
    ROWS_OK = 0,
    ROWS_BAD_ARGUMENT, /* a dtype where it has no meaning, a negative size, a layout whose parts overlap or stick out */
    ROWS_BAD_TOKEN,    /* fault: row, and the token it names */
    ROWS_BAD_ORDER,    /* fault: row is the place in the order, value the row it names */
    ROWS_BAD_VISIT,    /* fault: row is the place in `visit`, value what stands there */
} rows_status;

typedef struct {
    int64_t row;
    int64_t value;
} rows_fault;

/* Rows in memory: row n begins at start + n * stride, in bytes. */
typedef struct {
    const void *start;
    int64_t count;
    int64_t stride;
} rows_input;

typedef struct {
    void *start;
    int64_t count;
    int64_t stride;
} rows_output;

/* A packed row: hidden values in the dtype `wire` from byte 0, then, each from its own byte on, one float32 scale per
 * ROWS_BLOCK values (8-bit formats only), top_k weights of weight_bytes (4: float32, 8: float64), top_k int32 slots. */
typedef struct {
    int64_t hidden_size;
    int64_t top_k;
    rows_dtype dtype; /* of the rows in memory; a row dtype */
    rows_dtype wire;
    int weight_bytes;
    int64_t scales_at, weights_at, slots_at;
    int64_t row_bytes;
} rows_layout;

/* How a block of values gets its scale: max(max(largest, least_largest) / format's largest, least_scale). */
typedef struct {
    float least_largest;
    float least_scale;
    int hides_nan; /* values are kept within the format and nan becomes 0 (the scale tells); else they stay nan */
} rows_rule;

extern const rows_rule rows_wire_rule;   /* of rows on the wire: comm/formats.py */
extern const rows_rule rows_weight_rule; /* of checkpoints' weights: experts/blocks.py */

int64_t rows_item_bytes(rows_dtype dtype);
int64_t rows_num_blocks(int64_t size, int64_t block); /* the last one may be shorter */

/* Whether parts lie one after the other inside row_bytes, each aligned to its items. */
rows_status rows_check_layout(const rows_layout *layout);

/* packed [N]: row n is token tokens[n] of x [T], with weights[tokens[n]] [T, K] (0 where the slot is negative) and
 * slots[n] [N, K]. What lies between the parts is left as it is. */
rows_status rows_pack(const simd_loops *loops, const rows_layout *layout, rows_input x, const void *weights,
                      const int64_t *tokens, const int32_t *slots, rows_output packed, rows_fault *fault);

/* hidden [N] in layout->dtype (skipped where start is NULL), weights [N, K], slots [N, K]. */
rows_status rows_unpack(const simd_loops *loops, const rows_layout *layout, rows_input packed, rows_output hidden,
                        void *weights, int32_t *slots);

/* gathered [N]: row n is row `index[n]` of `rows`; both are row_bytes long. visit [num_visited], or NULL for 0..N-1: the
 * rows to write, in this order; where rows are wanted several times, an order in which they come one after the other
 * reads them once. fault: row n and the row it names, or the place in `visit` and what stands there. */
rows_status rows_gather(int64_t row_bytes, rows_input rows, const int64_t *index, const int64_t *visit,
                        int64_t num_visited, rows_output gathered, rows_fault *fault);

/* sums [T]: the sum of each token's rows, in float32 (float64 for float64), converted once to `dtype`; 0 without rows.
 * tokens [N]. order [num_added], or NULL for 0..N-1: the rows to add, in this order. weights [N] or NULL: factors in
 * the dtype of the sums. scratch [T + num_added]. */
rows_status rows_sum(const simd_loops *loops, rows_dtype dtype, int64_t hidden_size, rows_input rows,
                     const int64_t *tokens, const void *weights, const int64_t *order, int64_t num_added,
                     rows_output sums, int64_t *scratch, rows_fault *fault);

/* payload [rows, columns] in an 8-bit format and float32 scales [ceil(rows / block_rows), ceil(columns /
 * block_columns)] of values in a row dtype. */
rows_status rows_quantize(const simd_loops *loops, const rows_rule *rule, rows_dtype dtype, rows_input values,
                          int64_t columns, int64_t block_rows, int64_t block_columns, rows_dtype wire,
                          rows_output payload, float *scales);

/* The inverse: value = payload * scale in float32, then converted to `dtype`. */
rows_status rows_dequantize(const simd_loops *loops, rows_dtype wire, rows_input payload, int64_t columns,
                            const float *scales, int64_t block_rows, int64_t block_columns, rows_dtype dtype,
                            rows_output values);

#endif
