/* Sums of a tile of rows and outputs for one x86 instruction set: experts.c includes this once for each, with
 * TILE(name) naming the set's functions, TILE_TARGET its instructions, and these defined for it:
 *   TILE(sums): 16 floats in registers; splat(f), load_float(p), add_product(c, a, b): c + a * b rounded once, join(a):
 *   the sum of the 16 in the order of experts.h
 *   TILE(group): the 32 weights of a group, `first` and `second` those that meet the first and the second 16 inputs;
 *   load(dtype, p, &largest): as floats, e4m3fn times 2^-8
 *   store_bfloat16(group, factor, p): its 32 values times factor in their order, rounded half to even; not for nan
 *   FEW_ROWS by FEW_STEP and MOST_ROWS by MOST_STEP: rows and outputs whose sums fit in registers at once
 *
 * What makes it fast is to ask for the weights of the next outputs while these are used: without it memory was read at
 * little more than half its rate (docs/performance.md). */

/* A group of inputs: `total` += x * w for every row and output. */
#define ADD_GROUP(at)                                                                                          \
    UNROLL for (int r = 0; r < rows; r++) {                                                                    \
        const TILE(sums) first = TILE(load_float)(x + r * t->x_stride + (at));                                 \
        const TILE(sums) second = TILE(load_float)(x + r * t->x_stride + (at) + LANES);                        \
        UNROLL for (int n = 0; n < outputs; n++) {                                                             \
            total[r][n] = TILE(add_product)(total[r][n], first, w[n].first);                                   \
            total[r][n] = TILE(add_product)(total[r][n], second, w[n].second);                                 \
        }                                                                                                      \
    }

/* `rows`, `outputs` and `dtype` are constants wherever it is called, so that all sums lie in registers. Returns whether
 * there was a weight that is nan in e4m3fn: then the sums are not those of such weights. */
TILE_TARGET ALWAYS_INLINE int TILE(block)(const int rows, const int outputs, const rows_dtype dtype, const tile *t,
                                          const int first_row, const int first_output) {
    const int64_t item = dtype == ROWS_E4M3FN || dtype == ROWS_INT8 ? 1 : dtype == ROWS_FLOAT32 ? 4 : 2;
    const int64_t whole = t->num_inputs / GROUP * GROUP;
    const int64_t ahead = outputs * t->weight_stride; /* the weights that come after these */
    const char *weights[TILE_SUMS];
    const float *x = t->x + first_row * t->x_stride;
    TILE(sums) total[TILE_SUMS][TILE_SUMS];
    TILE(group) w[TILE_SUMS];
    TILE(largest_code) largest = TILE(no_code)();
    UNROLL for (int n = 0; n < outputs; n++) {
        weights[n] = t->weights + (first_output + n) * t->weight_stride;
        UNROLL for (int r = 0; r < rows; r++) total[r][n] = TILE(splat)(0);
    }
    for (int64_t k = 0; k < whole; k += GROUP) {
        UNROLL for (int n = 0; n < outputs; n++) {
            const char *from = weights[n] + k * item;
            if (item > 1 || k % 64 == 0) __builtin_prefetch(from + ahead, 0, 2);
            if (item > 2) __builtin_prefetch(from + ahead + 64, 0, 2);
            w[n] = TILE(load)(dtype, from, &largest);
        }
        ADD_GROUP(k)
    }
    if (whole < t->num_inputs) { /* the rest, with zeros behind it as in x */
        UNROLL for (int n = 0; n < outputs; n++) {
            char rest[GROUP * 4] = {0};
            memcpy(rest, weights[n] + whole * item, (size_t)((t->num_inputs - whole) * item));
            w[n] = TILE(load)(dtype, rest, &largest);
        }
        ADD_GROUP(whole)
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int n = 0; n < outputs; n++) {
            t->out[(first_row + r) * TILE_OUTPUTS + first_output + n] = TILE(join)(total[r][n]);
        }
    }
    return dtype == ROWS_E4M3FN && TILE(is_nan)(largest);
}

#define BLOCK_OF(rows)                                                                                 \
    case rows:                                                                                         \
        if (rows <= most) *has_nan |= TILE(block)(rows, outputs, dtype, t, row, output);  \
        break;

/* `outputs` at a time for all rows of the tile, at most `most` rows at a time; the weights are in the first caches from
 * the second time on. Returns the first output that is left. */
TILE_TARGET ALWAYS_INLINE int TILE(outputs)(const int outputs, const int most, const rows_dtype dtype, const tile *t,
                                            int output, int *has_nan) {
    for (; output + outputs <= t->num_outputs; output += outputs) {
        for (int row = 0; row < t->num_rows; row += most) {
            switch (t->num_rows - row < most ? t->num_rows - row : most) {
                BLOCK_OF(1) BLOCK_OF(2) BLOCK_OF(3) BLOCK_OF(4)
            }
        }
    }
    return output;
}

#define TILE_OF(name, dtype)                                                                                   \
    TILE_TARGET static int TILE(name)(const tile *t) {                                                         \
        int output = 0, has_nan = 0;                                                                           \
        if (t->num_rows <= TILE_FEW_ROWS) {                                                                    \
            output = TILE(outputs)(TILE_FEW_STEP, TILE_FEW_ROWS, dtype, t, output, &has_nan);                  \
        }                                                                                                      \
        output = TILE(outputs)(TILE_MOST_STEP, TILE_MOST_ROWS, dtype, t, output, &has_nan);                         \
        TILE(outputs)(1, TILE_MOST_ROWS, dtype, t, output, &has_nan);                                          \
        return has_nan;                                                                                        \
    }

TILE_OF(tile_float32, ROWS_FLOAT32)
TILE_OF(tile_float16, ROWS_FLOAT16)
TILE_OF(tile_bfloat16, ROWS_BFLOAT16)
TILE_OF(tile_e4m3fn, ROWS_E4M3FN)
TILE_OF(tile_int8, ROWS_INT8)

/* A row of e4m3fn weights as bfloat16. Returns whether there was a nan: then the row is not right. */
TILE_TARGET static int TILE(dequantize)(const char *codes, int64_t count, const float *scales, char *to) {
    TILE(largest_code) largest = TILE(no_code)();
    for (int64_t begin = 0; begin < count; begin += EXPERTS_BLOCK) {
        const TILE(sums) factor = TILE(splat)(scales[begin / EXPERTS_BLOCK] * 256.0f);
        const int64_t end = smaller(begin + EXPERTS_BLOCK, count);
        for (int64_t k = begin; k < end; k += GROUP) {
            if (end - k >= GROUP) {
                TILE(store_bfloat16)(TILE(load)(ROWS_E4M3FN, codes + k, &largest), factor, to + 2 * k);
            } else {
                char rest[GROUP] = {0}, values[2 * GROUP];
                memcpy(rest, codes + k, (size_t)(end - k));
                TILE(store_bfloat16)(TILE(load)(ROWS_E4M3FN, rest, &largest), factor, values);
                memcpy(to + 2 * k, values, (size_t)(2 * (end - k)));
            }
        }
    }
    return TILE(is_nan)(largest);
}

static const tile_functions TILE(functions) = {
    .sums[ROWS_FLOAT32] = TILE(tile_float32),
    .sums[ROWS_FLOAT16] = TILE(tile_float16),
    .sums[ROWS_BFLOAT16] = TILE(tile_bfloat16),
    .sums[ROWS_E4M3FN] = TILE(tile_e4m3fn),
    .sums[ROWS_INT8] = TILE(tile_int8),
    .dequantize = TILE(dequantize),
};

#undef ADD_GROUP
#undef BLOCK_OF
#undef TILE_OF
#undef TILE
#undef TILE_TARGET
#undef TILE_FEW_ROWS
#undef TILE_FEW_STEP
#undef TILE_MOST_ROWS
#undef TILE_MOST_STEP
