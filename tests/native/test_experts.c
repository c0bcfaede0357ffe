/* csrc/experts.c: products against sums in double, every set of instructions against the portable one, and parts that
 * cover every output once. tests/test_native.py builds it with sanitizers; every buffer is a heap block of exactly its
 * size. "threads" as the only argument shares products among threads instead. */

#include "experts.h"
#include "check.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Garbage-filled, so that nothing passes because memory happened to be zero. */
static void *block(int64_t bytes) {
    void *memory = malloc((size_t)bytes);
    REQUIRE(memory != NULL || bytes == 0);
    if (bytes > 0) memset(memory, 0xa5, (size_t)bytes);
    return memory;
}

static const simd_loops *portable(void) { return simd_find("portable"); }

static double value_of(rows_dtype dtype, const void *values, int64_t i) {
    float value;
    portable()->widen[dtype]((const char *)values + i * rows_item_bytes(dtype), &value, 1, 1);
    return value;
}

/* A problem of random size: everything experts_product reads. */
typedef struct {
    experts_weights weights;
    rows_dtype x_dtype, out_dtype;
    int64_t num_rows, num_pairs;
    int64_t *rows_per_slot, *row_index; /* row_index may be NULL */
    void *values, *x;
    float *scales;
} problem;

static const rows_dtype floats[] = {ROWS_FLOAT32, ROWS_FLOAT16, ROWS_BFLOAT16};

static void fill(rows_dtype dtype, void *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float value = (float)random_in(-1000, 1000) / 512.0f;
        portable()->narrow[dtype](&value, (char *)values + i * rows_item_bytes(dtype), 1);
    }
}

static int64_t random_extent(int64_t most) {
    static const int64_t edges[] = {15, 16, 17, 31, 32, 33, 127, 128, 129, 160, 256, 300};
    const int64_t extent = random_in(0, 2) ? random_in(1, 70) : edges[random_in(0, 11)];
    return extent < most ? extent : most;
}

static problem random_problem(int64_t most_inputs) {
    problem p = {.x_dtype = floats[random_in(0, 2)], .out_dtype = floats[random_in(0, 2)]};
    experts_weights *w = &p.weights;
    w->dtype = random_in(0, 1) ? floats[random_in(0, 2)] : random_in(0, 1) ? ROWS_E4M3FN : ROWS_INT8;
    w->num_slots = random_in(0, 4);
    w->num_outputs = random_extent(140);
    w->num_inputs = random_extent(most_inputs);
    p.rows_per_slot = block(w->num_slots * 8);
    for (int64_t slot = 0; slot < w->num_slots; slot++) {
        p.rows_per_slot[slot] = random_in(0, 3) ? random_in(0, 6) : random_in(0, 40);
        p.num_pairs += p.rows_per_slot[slot];
    }
    const bool indexed = random_in(0, 1) && p.num_pairs > 0;
    p.num_rows = indexed ? random_in(1, 9) : p.num_pairs;
    if (indexed) p.row_index = block(p.num_pairs * 8);
    for (int64_t m = 0; indexed && m < p.num_pairs; m++) p.row_index[m] = random_in(0, p.num_rows - 1);

    const int64_t count = w->num_slots * w->num_outputs * w->num_inputs;
    w->values = p.values = block(count * rows_item_bytes(w->dtype));
    p.x = block(p.num_rows * w->num_inputs * rows_item_bytes(p.x_dtype));
    fill(p.x_dtype, p.x, p.num_rows * w->num_inputs);
    if (w->dtype < ROWS_NUM_ROW_DTYPES) {
        fill(w->dtype, p.values, count);
        return p;
    }
    uint8_t *codes = p.values; /* all of them: large, subnormal, zeros; nan sometimes */
    const bool has_nan = w->dtype == ROWS_INT8 || random_in(0, 5) == 0; /* int8 has none: every code is a number */
    for (int64_t i = 0; i < count; i++) {
        codes[i] = (uint8_t)random_bits();
        if (!has_nan && (codes[i] & 0x7f) == 0x7f) codes[i] = 0;
    }
    const int64_t blocks = w->num_slots * rows_num_blocks(w->num_outputs, 128) * rows_num_blocks(w->num_inputs, 128);
    w->scales = p.scales = block(blocks * 4);
    for (int64_t i = 0; i < blocks; i++) {
        p.scales[i] = random_in(0, 30) ? (float)random_in(1, 1000) / 4096.0f : random_in(0, 1) ? 0x1p121f : 0.0f;
    }
    return p;
}

static void free_problem(problem *p) {
    free(p->scales);
    free(p->x);
    free(p->values);
    free(p->row_index);
    free(p->rows_per_slot);
}

static int64_t out_bytes(const problem *p) {
    return p->num_pairs * p->weights.num_outputs * rows_item_bytes(p->out_dtype);
}

static void run_part(const problem *p, const simd_loops *loops, void *out, experts_part part) {
    const int64_t inputs = p->weights.num_inputs;
    float *scratch = block(experts_scratch(inputs) * 4);
    rows_fault fault = {0, 0};
    REQUIRE(experts_product(loops, &p->weights, p->x_dtype,
                            (rows_input){p->x, p->num_rows, inputs * rows_item_bytes(p->x_dtype)}, p->row_index,
                            p->rows_per_slot, p->out_dtype,
                            (rows_output){out, p->num_pairs, p->weights.num_outputs * rows_item_bytes(p->out_dtype)},
                            part, scratch, &fault) == EXPERTS_OK);
    free(scratch);
}

static void *run(const problem *p, const simd_loops *loops) {
    void *out = block(out_bytes(p));
    run_part(p, loops, out, (experts_part){0, 1});
    return out;
}

/* Equal bits, where a nan equals every other. */
static bool same(const problem *p, const void *a, const void *b) {
    if (memcmp(a, b, (size_t)out_bytes(p)) == 0) return true;
    const int64_t item = rows_item_bytes(p->out_dtype);
    for (int64_t i = 0; i < out_bytes(p) / item; i++) {
        if (memcmp((const char *)a + i * item, (const char *)b + i * item, (size_t)item) == 0) continue;
        if (!isnan(value_of(p->out_dtype, a, i)) || !isnan(value_of(p->out_dtype, b, i))) return false;
    }
    return true;
}

static double weight_of(const experts_weights *w, int64_t slot, int64_t n, int64_t k) {
    const double value = value_of(w->dtype, w->values, (slot * w->num_outputs + n) * w->num_inputs + k);
    if (w->scales == NULL) return value;
    const int64_t down = rows_num_blocks(w->num_outputs, 128), across = rows_num_blocks(w->num_inputs, 128);
    return (double)((float)value * w->scales[(slot * down + n / 128) * across + k / 128]);
}

static void check_against_double(const problem *p, const void *out) {
    const experts_weights *w = &p->weights;
    const double rounding = p->out_dtype == ROWS_BFLOAT16 ? 0x1p-8 : p->out_dtype == ROWS_FLOAT16 ? 0x1p-11 : 0x1p-24;
    int64_t pair = 0;
    for (int64_t slot = 0; slot < w->num_slots; slot++) {
        for (int64_t r = 0; r < p->rows_per_slot[slot]; r++, pair++) {
            const int64_t row = p->row_index != NULL ? p->row_index[pair] : pair;
            for (int64_t n = 0; n < w->num_outputs; n++) {
                double sum = 0, size = 0;
                for (int64_t k = 0; k < w->num_inputs; k++) {
                    const double term = value_of(p->x_dtype, p->x, row * w->num_inputs + k) * weight_of(w, slot, n, k);
                    sum += term;
                    size += fabs(term);
                }
                const double got = value_of(p->out_dtype, out, pair * w->num_outputs + n);
                const double most = p->out_dtype == ROWS_FLOAT16 ? 65000 : 1e38;
                if (isnan(sum)) REQUIRE(isnan(got));
                else if (size > most) continue; /* may overflow on the way */
                else REQUIRE(fabs(got - sum) <= size * 0x1p-18 + fabs(sum) * rounding + 0x1p-24);
            }
        }
    }
}

static void test_products(void) {
    for (int round = 0; round < 120; round++) {
        problem p = random_problem(300);
        void *expected = run(&p, portable());
        check_against_double(&p, expected);
        for (int i = 0; i < simd_count(); i++) {
            void *out = run(&p, simd_at(i));
            REQUIRE(same(&p, out, expected));
            free(out);
        }
        free(expected);
        free_problem(&p);
    }
}

/* Parts write every output once: what one part writes, the bytes show, and no other part touches it. */
static void test_parts_cover_exactly_once(void) {
    for (int round = 0; round < 80; round++) {
        problem p = random_problem(40);
        const int64_t bytes = out_bytes(&p), count = random_in(1, 9);
        void *expected = run(&p, simd_at(0));
        uint8_t *together = block(bytes), *times = block(bytes), *one = block(bytes), *other = block(bytes);
        if (bytes > 0) memset(times, 0, (size_t)bytes);
        for (int64_t index = count - 1; index >= 0; index--) {
            run_part(&p, simd_at(0), together, (experts_part){index, count});
            if (bytes == 0) continue;
            memset(one, 0x00, (size_t)bytes); /* a byte that was not written keeps what it was, in both */
            memset(other, 0xff, (size_t)bytes);
            run_part(&p, simd_at(0), one, (experts_part){index, count});
            run_part(&p, simd_at(0), other, (experts_part){index, count});
            for (int64_t i = 0; i < bytes; i++) times[i] += one[i] == other[i];
        }
        REQUIRE(same(&p, together, expected));
        for (int64_t i = 0; i < bytes; i++) REQUIRE(times[i] == 1);
        free(other);
        free(one);
        free(times);
        free(together);
        free(expected);
        free_problem(&p);
    }
}

static void test_dequantized_rows_are_those_of_rows_c(void) {
    for (int round = 0; round < 120; round++) {
        problem p = random_problem(300);
        const experts_weights *w = &p.weights;
        if (w->dtype == ROWS_E4M3FN && w->num_slots > 0) {
            const int64_t bytes = w->num_outputs * w->num_inputs * 2;
            const rows_input codes = {p.values, w->num_outputs, w->num_inputs};
            void *expected = block(bytes), *out = block(bytes);
            problem both = p; /* compared as if it were an output */
            both.out_dtype = ROWS_BFLOAT16;
            both.num_pairs = w->num_inputs;
            REQUIRE(rows_dequantize(portable(), ROWS_E4M3FN, codes, w->num_inputs, w->scales, 128, 128, ROWS_BFLOAT16,
                                    (rows_output){expected, w->num_outputs, w->num_inputs * 2}) == ROWS_OK);
            for (int i = 0; i < simd_count(); i++) {
                REQUIRE(experts_dequantize(simd_at(i), codes, w->num_inputs, w->scales,
                                           (rows_output){out, w->num_outputs, w->num_inputs * 2}) == ROWS_OK);
                REQUIRE(same(&both, out, expected));
            }
            free(out);
            free(expected);
        }
        free_problem(&p);
    }
}

static void test_what_does_not_fit_is_refused(void) {
    const float x[4] = {1, 2, 3, 4}, values[8] = {0};
    float out[4], *scratch = block(experts_scratch(2) * 4);
    rows_fault fault;
    const simd_loops *loops = simd_at(0);
    const experts_weights w = {ROWS_FLOAT32, values, NULL, 2, 2, 2};
    const rows_input rows = {x, 2, 8};
    const rows_output target = {out, 2, 8};
    static const int64_t bad_counts[][2] = {{1, 0}, {2, 1}, {-1, 3}, {3, -1}, {INT64_MAX, INT64_MAX}, {0, 0}};
    for (size_t i = 0; i < sizeof bad_counts / sizeof *bad_counts; i++) {
        REQUIRE(experts_product(loops, &w, ROWS_FLOAT32, rows, NULL, bad_counts[i], ROWS_FLOAT32, target,
                                (experts_part){0, 1}, scratch, &fault) == EXPERTS_BAD_COUNT);
    }
    static const int64_t counts[2] = {1, 1}, bad_rows[][2] = {{0, 2}, {-1, 0}, {INT64_MAX, 0}, {0, INT64_MIN}};
    for (size_t i = 0; i < sizeof bad_rows / sizeof *bad_rows; i++) {
        REQUIRE(experts_product(loops, &w, ROWS_FLOAT32, rows, bad_rows[i], counts, ROWS_FLOAT32, target,
                                (experts_part){0, 1}, scratch, &fault) == EXPERTS_BAD_ROW);
    }
    static const experts_part bad_parts[] = {{0, 0}, {1, 1}, {-1, 1}, {0, -1}};
    for (size_t i = 0; i < sizeof bad_parts / sizeof *bad_parts; i++) {
        REQUIRE(experts_product(loops, &w, ROWS_FLOAT32, rows, NULL, counts, ROWS_FLOAT32, target, bad_parts[i],
                                scratch, &fault) == EXPERTS_BAD_ARGUMENT);
    }
    static const rows_dtype bad_dtypes[] = {ROWS_FLOAT64, ROWS_E4M3FN, ROWS_E4M3FNUZ, ROWS_INT8};
    for (size_t i = 0; i < sizeof bad_dtypes / sizeof *bad_dtypes; i++) {
        const experts_weights other = {bad_dtypes[i], values, NULL, 1, 1, 1}; /* e4m3fn, int8: without scales */
        REQUIRE(experts_product(loops, &other, ROWS_FLOAT32, rows, NULL, counts, ROWS_FLOAT32, target,
                                (experts_part){0, 1}, scratch, &fault) == EXPERTS_BAD_ARGUMENT);
        REQUIRE(experts_product(loops, &w, bad_dtypes[i], rows, NULL, counts, ROWS_FLOAT32, target,
                                (experts_part){0, 1}, scratch, &fault) == EXPERTS_BAD_ARGUMENT);
    }
    free(scratch);
}

/* ---------------------------------------------------------------- threads */

typedef struct {
    const problem *problem;
    void *out;
    experts_part part;
} share;

static void *run_share(void *argument) {
    const share *mine = argument;
    run_part(mine->problem, simd_at(0), mine->out, mine->part);
    return NULL;
}

static void test_threads_share_a_product(void) {
    enum { THREADS = 4 };
    for (int round = 0; round < 25; round++) {
        problem p = random_problem(300);
        void *expected = run(&p, simd_at(0)), *out = block(out_bytes(&p));
        pthread_t threads[THREADS];
        share shares[THREADS];
        for (int i = 0; i < THREADS; i++) {
            shares[i] = (share){&p, out, {i, THREADS}};
            REQUIRE(pthread_create(&threads[i], NULL, run_share, &shares[i]) == 0);
        }
        for (int i = 0; i < THREADS; i++) REQUIRE(pthread_join(threads[i], NULL) == 0);
        REQUIRE(same(&p, out, expected));
        free(out);
        free(expected);
        free_problem(&p);
    }
}

int main(int count, char **arguments) {
    if (count == 2 && strcmp(arguments[1], "threads") == 0) {
        test_threads_share_a_product();
    } else {
        test_products();
        test_parts_cover_exactly_once();
        test_dequantized_rows_are_those_of_rows_c();
        test_what_does_not_fit_is_refused();
    }
    puts("all experts tests passed");
    return 0;
}
