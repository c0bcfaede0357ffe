/* Packing, summing and quantising rows; rows.h says what they promise, simd.h holds the inner loops. */

#include "rows.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { CHUNK = 1024 }; /* values that are worked on at a time: float32 of them stay in the first cache */

const rows_rule rows_wire_rule = {.least_largest = 0, .least_scale = FLT_MIN, .hides_nan = 1};
const rows_rule rows_weight_rule = {.least_largest = 1e-12f, .least_scale = 0, .hides_nan = 0};

static const int64_t item_bytes[ROWS_NUM_DTYPES] = {
    [ROWS_FLOAT32] = 4, [ROWS_FLOAT64] = 8,   [ROWS_FLOAT16] = 2, [ROWS_BFLOAT16] = 2,
    [ROWS_E4M3FN] = 1,  [ROWS_E4M3FNUZ] = 1, [ROWS_INT8] = 1,
};
/* What the largest value of a block becomes; 0 for formats without scales. */
static const float largest_of[ROWS_NUM_DTYPES] = {[ROWS_E4M3FN] = 448, [ROWS_E4M3FNUZ] = 240, [ROWS_INT8] = 127};

static inline int is_row_dtype(rows_dtype dtype) { return (unsigned)dtype < ROWS_NUM_ROW_DTYPES; }

static inline int is_scaled(rows_dtype dtype) {
    return (unsigned)dtype >= ROWS_NUM_ROW_DTYPES && (unsigned)dtype < ROWS_NUM_DTYPES;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline const char *row_of(rows_input table, int64_t row) {
    return (const char *)table.start + row * table.stride;
}

static inline char *out_row(rows_output table, int64_t row) { return (char *)table.start + row * table.stride; }

int64_t rows_item_bytes(rows_dtype dtype) { return item_bytes[dtype]; }

int64_t rows_num_blocks(int64_t size, int64_t block) { return size / block + (size % block != 0); }

/* Takes `count` items for the part at byte `at`; 0 where they do not fit between *end and row_bytes. */
static int take_part(int64_t *end, int64_t row_bytes, int64_t at, int64_t count, int64_t bytes) {
    if (at < *end || at > row_bytes || at % bytes != 0 || count > (row_bytes - at) / bytes) return 0;
    *end = at + count * bytes;
    return 1;
}

rows_status rows_check_layout(const rows_layout *layout) {
    const rows_layout l = *layout;
    if (!is_row_dtype(l.dtype) || (unsigned)l.wire >= ROWS_NUM_DTYPES) return ROWS_BAD_ARGUMENT;
    if ((l.weight_bytes != 4 && l.weight_bytes != 8) || l.hidden_size < 0 || l.top_k < 0) return ROWS_BAD_ARGUMENT;
    const int64_t scales = is_scaled(l.wire) ? rows_num_blocks(l.hidden_size, ROWS_BLOCK) : 0;
    int64_t end = 0;
    const int fits = take_part(&end, l.row_bytes, 0, l.hidden_size, item_bytes[l.wire]) &&
                     take_part(&end, l.row_bytes, l.scales_at, scales, 4) &&
                     take_part(&end, l.row_bytes, l.weights_at, l.top_k, l.weight_bytes) &&
                     take_part(&end, l.row_bytes, l.slots_at, l.top_k, 4);
    return fits ? ROWS_OK : ROWS_BAD_ARGUMENT;
}

/* ---------------------------------------------------------------- values */

/* A conversion without a scale, through float32 unless it is none. */
static void convert(const simd_loops *loops, rows_dtype from, const char *source, rows_dtype to, char *target,
                    int64_t count) {
    float chunk[CHUNK];
    if (count == 0) return; /* of an array that may be NULL */
    if (from == to) {
        memcpy(target, source, (size_t)(count * item_bytes[from]));
    } else if (from == ROWS_FLOAT32) {
        loops->narrow[to]((const float *)(const void *)source, target, count);
    } else if (to == ROWS_FLOAT32) {
        loops->widen[from](source, (float *)(void *)target, count, 1);
    } else {
        for (int64_t i = 0; i < count; i += CHUNK) {
            const int64_t part = smaller(CHUNK, count - i);
            loops->widen[from](source + i * item_bytes[from], chunk, part, 1);
            loops->narrow[to](chunk, target + i * item_bytes[to], part);
        }
    }
}

/* One block of `rows` by `columns` values; returns its scale. */
static float quantize_block(const simd_loops *loops, const rows_rule *rule, rows_dtype dtype, rows_input values,
                            rows_dtype wire, rows_output payload, int64_t columns) {
    float chunk[CHUNK];
    const int64_t item = item_bytes[dtype];
    const int fits_chunk = values.count == 1 && columns <= CHUNK; /* then nothing has to be read twice */
    float largest = 0;
    for (int64_t row = 0; row < values.count; row++) {
        for (int64_t i = 0; i < columns; i += CHUNK) {
            const int64_t part = smaller(CHUNK, columns - i);
            loops->widen[dtype](row_of(values, row) + i * item, chunk, part, 1);
            const float of_part = loops->largest(chunk, part);
            if (!(of_part <= largest)) largest = largest != largest ? largest : of_part; /* nan stays */
        }
    }
    /* Comparisons with nan are false: it passes through both. */
    if (largest < rule->least_largest) largest = rule->least_largest;
    float scale = largest / largest_of[wire];
    if (scale < rule->least_scale) scale = rule->least_scale;

    const float limit = rule->hides_nan ? largest_of[wire] : INFINITY, for_nan = rule->hides_nan ? 0 : NAN;
    for (int64_t row = 0; row < values.count; row++) {
        for (int64_t i = 0; i < columns; i += CHUNK) {
            const int64_t part = smaller(CHUNK, columns - i);
            if (!fits_chunk) loops->widen[dtype](row_of(values, row) + i * item, chunk, part, 1);
            loops->divide(chunk, part, scale, limit, for_nan);
            loops->narrow[wire](chunk, out_row(payload, row) + i, part);
        }
    }
    return scale;
}

/* One row of 8-bit values whose scales are one per `block` values. */
static void dequantize_row(const simd_loops *loops, rows_dtype wire, const char *payload, const float *scales,
                           int64_t block, rows_dtype dtype, char *values, int64_t columns) {
    float chunk[CHUNK];
    for (int64_t begin = 0, number = 0; begin < columns; begin += block, number++) {
        const int64_t end = begin + smaller(block, columns - begin);
        for (int64_t i = begin; i < end; i += CHUNK) {
            const int64_t part = smaller(CHUNK, end - i);
            char *target = values + i * item_bytes[dtype];
            float *wide = dtype == ROWS_FLOAT32 ? (float *)(void *)target : chunk;
            loops->widen[wire](payload + i, wide, part, scales[number]);
            if (dtype != ROWS_FLOAT32) loops->narrow[dtype](chunk, target, part);
        }
        if (columns - begin <= block) break; /* the next begin might not fit an integer */
    }
}

/* ---------------------------------------------------------------- large results */

/* From here on results are written past the caches: nothing would be left of their beginning when they are read, and a
 * line that is written whole need not be read first, which is a third of a copy's traffic. */
static const int64_t past_caches_bytes = (int64_t)8 << 20;

#ifdef __SSE2__
static void copy_past_caches(char *restrict to, const char *restrict from, int64_t bytes) {
    int64_t i = -(intptr_t)to & 15;
    if (i > bytes) i = bytes;
    memcpy(to, from, (size_t)i);
    for (; i + 64 <= bytes; i += 64) {
        const __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(from + i));
        const __m128i b = _mm_loadu_si128((const __m128i *)(const void *)(from + i + 16));
        const __m128i c = _mm_loadu_si128((const __m128i *)(const void *)(from + i + 32));
        const __m128i d = _mm_loadu_si128((const __m128i *)(const void *)(from + i + 48));
        _mm_stream_si128((__m128i *)(void *)(to + i), a);
        _mm_stream_si128((__m128i *)(void *)(to + i + 16), b);
        _mm_stream_si128((__m128i *)(void *)(to + i + 32), c);
        _mm_stream_si128((__m128i *)(void *)(to + i + 48), d);
    }
    memcpy(to + i, from + i, (size_t)(bytes - i));
}

/* Such writes are not ordered by the release that publishes them to other ranks. */
static void end_past_caches(void) { _mm_sfence(); }
#else
static void copy_past_caches(char *restrict to, const char *restrict from, int64_t bytes) {
    memcpy(to, from, (size_t)bytes);
}

static void end_past_caches(void) {}
#endif

/* ---------------------------------------------------------------- packed rows */

static void pack_hidden(const simd_loops *loops, const rows_layout *layout, const char *source, char *row,
                        int past_caches) {
    if (past_caches && layout->dtype == layout->wire) {
        copy_past_caches(row, source, layout->hidden_size * item_bytes[layout->wire]);
        return;
    }
    if (!is_scaled(layout->wire)) {
        convert(loops, layout->dtype, source, layout->wire, row, layout->hidden_size);
        return;
    }
    float *scales = (float *)(void *)(row + layout->scales_at);
    for (int64_t begin = 0; begin < layout->hidden_size; begin += ROWS_BLOCK, scales++) {
        const rows_input values = {source + begin * item_bytes[layout->dtype], 1, 0};
        const rows_output payload = {row + begin, 1, 0};
        *scales = quantize_block(loops, &rows_wire_rule, layout->dtype, values, layout->wire, payload,
                                 smaller(ROWS_BLOCK, layout->hidden_size - begin));
    }
}

rows_status rows_pack(const simd_loops *loops, const rows_layout *layout, rows_input x, const void *weights,
                      const int64_t *tokens, const int32_t *slots, rows_output packed, rows_fault *fault) {
    const rows_layout l = *layout;
    if (rows_check_layout(&l) != ROWS_OK) return ROWS_BAD_ARGUMENT;
    const int past_caches = packed.count >= past_caches_bytes / (l.row_bytes > 0 ? l.row_bytes : 1);
    for (int64_t n = 0; n < packed.count; n++) {
        const int64_t token = tokens[n];
        if (token < 0 || token >= x.count) {
            *fault = (rows_fault){.row = n, .value = token};
            return ROWS_BAD_TOKEN;
        }
        char *row = out_row(packed, n);
        pack_hidden(loops, &l, row_of(x, token), row, past_caches);
        int32_t *slots_out = (int32_t *)(void *)(row + l.slots_at);
        for (int64_t k = 0; k < l.top_k; k++) {
            const int32_t slot = slots[n * l.top_k + k];
            slots_out[k] = slot;
            char *weight_out = row + l.weights_at + k * l.weight_bytes;
            if (slot < 0) {
                memset(weight_out, 0, (size_t)l.weight_bytes);
            } else {
                const char *weight = (const char *)weights + (token * l.top_k + k) * l.weight_bytes;
                memcpy(weight_out, weight, (size_t)l.weight_bytes);
            }
        }
    }
    if (past_caches) end_past_caches();
    return ROWS_OK;
}

rows_status rows_unpack(const simd_loops *loops, const rows_layout *layout, rows_input packed, rows_output hidden,
                        void *weights, int32_t *slots) {
    const rows_layout l = *layout;
    if (rows_check_layout(&l) != ROWS_OK) return ROWS_BAD_ARGUMENT;
    /* Rows of nothing may claim any number: do not count to 2^60. */
    if (l.top_k == 0 && (l.hidden_size == 0 || hidden.start == NULL)) return ROWS_OK;
    const size_t weight_bytes = (size_t)(l.top_k * l.weight_bytes), slot_bytes = (size_t)l.top_k * sizeof *slots;
    for (int64_t n = 0; n < packed.count; n++) {
        const char *row = row_of(packed, n);
        if (hidden.start != NULL && is_scaled(l.wire)) {
            dequantize_row(loops, l.wire, row, (const float *)(const void *)(row + l.scales_at), ROWS_BLOCK, l.dtype,
                           out_row(hidden, n), l.hidden_size);
        } else if (hidden.start != NULL) {
            convert(loops, l.wire, row, l.dtype, out_row(hidden, n), l.hidden_size);
        }
        if (l.top_k == 0) continue;
        memcpy((char *)weights + (size_t)n * weight_bytes, row + l.weights_at, weight_bytes);
        memcpy((char *)slots + (size_t)n * slot_bytes, row + l.slots_at, slot_bytes);
    }
    return ROWS_OK;
}

/* ---------------------------------------------------------------- gathered rows */

rows_status rows_gather(int64_t row_bytes, rows_input rows, const int64_t *index, const int64_t *visit,
                        int64_t num_visited, rows_output gathered, rows_fault *fault) {
    if (row_bytes <= 0) return row_bytes < 0 ? ROWS_BAD_ARGUMENT : ROWS_OK;
    const int past_caches = gathered.count >= past_caches_bytes / row_bytes;
    if (visit == NULL) num_visited = gathered.count;
    for (int64_t place = 0; place < num_visited; place++) {
        const int64_t n = visit != NULL ? visit[place] : place;
        if (n < 0 || n >= gathered.count) {
            *fault = (rows_fault){.row = place, .value = n};
            return ROWS_BAD_VISIT;
        }
        const int64_t row = index[n];
        if (row < 0 || row >= rows.count) {
            *fault = (rows_fault){.row = n, .value = row};
            return ROWS_BAD_ORDER;
        }
        if (past_caches) {
            copy_past_caches(out_row(gathered, n), row_of(rows, row), row_bytes);
        } else {
            memcpy(out_row(gathered, n), row_of(rows, row), (size_t)row_bytes);
        }
    }
    if (past_caches) end_past_caches();
    return ROWS_OK;
}

/* ---------------------------------------------------------------- sums */

/* Strings the rows to add on one list per token, in order: first[token] is a place in the order, next[place] the one
 * after it, -1 ends. Each token is read once, so nothing that changes later can lead out of the tables. */
static rows_status list_rows_by_token(rows_input rows, const int64_t *tokens, const int64_t *order, int64_t num_added,
                                      int64_t num_tokens, int64_t *first, int64_t *next, rows_fault *fault) {
    for (int64_t token = 0; token < num_tokens; token++) first[token] = -1;
    for (int64_t place = num_added - 1; place >= 0; place--) {
        const int64_t row = order != NULL ? order[place] : place;
        if (row < 0 || row >= rows.count) {
            *fault = (rows_fault){.row = place, .value = row};
            return ROWS_BAD_ORDER;
        }
        const int64_t token = tokens[row];
        if (token < 0 || token >= num_tokens) {
            *fault = (rows_fault){.row = row, .value = token};
            return ROWS_BAD_TOKEN;
        }
        next[place] = first[token];
        first[token] = place;
    }
    return ROWS_OK;
}

rows_status rows_sum(const simd_loops *loops, rows_dtype dtype, int64_t hidden_size, rows_input rows,
                     const int64_t *tokens, const void *weights, const int64_t *order, int64_t num_added,
                     rows_output sums, int64_t *scratch, rows_fault *fault) {
    if (!is_row_dtype(dtype) || hidden_size < 0 || (order == NULL && num_added != rows.count)) return ROWS_BAD_ARGUMENT;
    int64_t *first = scratch, *next = scratch + sums.count;
    const rows_status status = list_rows_by_token(rows, tokens, order, num_added, sums.count, first, next, fault);
    if (status != ROWS_OK) return status;

    float chunk[CHUNK];
    uint16_t narrowed[CHUNK];
    const int in_place = dtype == ROWS_FLOAT32 || dtype == ROWS_FLOAT64; /* the sums are what is asked for */
    const int64_t sum_bytes = hidden_size * item_bytes[dtype];
    const int past_caches = !in_place && sum_bytes > 0 && sums.count >= past_caches_bytes / sum_bytes;
    for (int64_t token = 0; token < sums.count; token++) {
        for (int64_t begin = 0; begin < hidden_size; begin += CHUNK) {
            const int64_t part = smaller(CHUNK, hidden_size - begin), offset = begin * item_bytes[dtype];
            void *target = out_row(sums, token) + offset, *wide = in_place ? target : chunk;
            memset(wide, 0, (size_t)part * (dtype == ROWS_FLOAT64 ? sizeof(double) : sizeof(float)));
            for (int64_t place = first[token]; place >= 0; place = next[place]) {
                const int64_t row = order != NULL ? order[place] : place;
                if (row < 0 || row >= rows.count) { /* another thread has changed it */
                    *fault = (rows_fault){.row = place, .value = row};
                    return ROWS_BAD_ORDER;
                }
                const char *values = row_of(rows, row) + offset;
                if (weights == NULL) {
                    loops->add[dtype](wide, values, part);
                } else {
                    const double weight = dtype == ROWS_FLOAT64 ? ((const double *)weights)[row]
                                                                : (double)((const float *)weights)[row];
                    loops->add_weighted[dtype](wide, values, part, weight);
                }
            }
            if (past_caches) {
                loops->narrow[dtype](chunk, narrowed, part);
                copy_past_caches(target, (const char *)narrowed, part * (int64_t)sizeof *narrowed);
            } else if (!in_place) {
                loops->narrow[dtype](chunk, target, part);
            }
        }
    }
    if (past_caches) end_past_caches();
    return ROWS_OK;
}

/* ---------------------------------------------------------------- quantised tables */

static int is_block_table(rows_dtype dtype, rows_dtype wire, int64_t columns, int64_t block_rows,
                          int64_t block_columns) {
    return is_row_dtype(dtype) && is_scaled(wire) && columns >= 0 && block_rows > 0 && block_columns > 0;
}

rows_status rows_quantize(const simd_loops *loops, const rows_rule *rule, rows_dtype dtype, rows_input values,
                          int64_t columns, int64_t block_rows, int64_t block_columns, rows_dtype wire,
                          rows_output payload, float *scales) {
    if (!is_block_table(dtype, wire, columns, block_rows, block_columns)) return ROWS_BAD_ARGUMENT;
    if (payload.count != values.count) return ROWS_BAD_ARGUMENT;
    if (columns == 0) return ROWS_OK; /* and any number of rows */
    const int64_t down = rows_num_blocks(values.count, block_rows), across = rows_num_blocks(columns, block_columns);
    for (int64_t i = 0; i < down; i++) {
        const int64_t row = i * block_rows, count = smaller(block_rows, values.count - row);
        for (int64_t j = 0; j < across; j++) {
            const int64_t column = j * block_columns;
            const rows_input from = {row_of(values, row) + column * item_bytes[dtype], count, values.stride};
            const rows_output to = {out_row(payload, row) + column, count, payload.stride};
            scales[i * across + j] =
                quantize_block(loops, rule, dtype, from, wire, to, smaller(block_columns, columns - column));
        }
    }
    return ROWS_OK;
}

rows_status rows_dequantize(const simd_loops *loops, rows_dtype wire, rows_input payload, int64_t columns,
                            const float *scales, int64_t block_rows, int64_t block_columns, rows_dtype dtype,
                            rows_output values) {
    if (!is_block_table(dtype, wire, columns, block_rows, block_columns)) return ROWS_BAD_ARGUMENT;
    if (payload.count != values.count) return ROWS_BAD_ARGUMENT;
    if (columns == 0) return ROWS_OK; /* and any number of rows */
    const int64_t across = rows_num_blocks(columns, block_columns);
    for (int64_t row = 0; row < payload.count; row++) {
        dequantize_row(loops, wire, row_of(payload, row), scales + row / block_rows * across, block_columns, dtype,
                       out_row(values, row), columns);
    }
    return ROWS_OK;
}
