/* csrc/rows.c and csrc/simd.c against their definitions, every set of instructions against the portable one, and random
 * calls against plain loops. tests/test_native.py builds it with sanitizers; every buffer is a heap block of exactly
 * its size, so that one byte too far is caught. "threads" as the only argument runs what several threads do at once,
 * a number so many random calls. */

#include "rows.h"
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

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* ---------------------------------------------------------------- what the formats are, by their definitions */

typedef struct {
    int exponent_bits, mantissa_bits, bias;
    bool has_inf, is_fnuz;
} definition;

static const definition float16 = {5, 10, 15, true, false}, e4m3fn = {4, 3, 7, false, false},
                        e4m3fnuz = {4, 3, 8, false, true}, bfloat16 = {8, 7, 127, true, false};

static double value_of(const definition *d, uint32_t code) {
    const int bits = d->exponent_bits + d->mantissa_bits;
    const uint32_t magnitude = code & ((1u << bits) - 1), mantissa = magnitude & ((1u << d->mantissa_bits) - 1);
    const int exponent = (int)(magnitude >> d->mantissa_bits);
    const double sign = code >> bits & 1 ? -1 : 1;
    if (d->is_fnuz && code == 1u << bits) return NAN;
    if (d->has_inf && exponent == (1 << d->exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
    if (!d->has_inf && !d->is_fnuz && magnitude == (1u << bits) - 1) return NAN;
    const double fraction = mantissa / (double)(1 << d->mantissa_bits);
    return sign * (exponent ? ldexp(1 + fraction, exponent - d->bias) : ldexp(fraction, 1 - d->bias));
}

/* The code of a finite value by bisection between neighbouring codes: the nearer one, of two equally near the even. */
static uint32_t code_of(const definition *d, float value) {
    const int bits = d->exponent_bits + d->mantissa_bits;
    const uint32_t sign_bit = 1u << bits, nan = d->is_fnuz ? sign_bit : sign_bit - 1;
    const uint32_t infinite = ((1u << d->exponent_bits) - 1) << d->mantissa_bits;
    const uint32_t beyond = d->has_inf ? infinite : d->is_fnuz ? sign_bit : sign_bit - 1; /* first that is no number */
    const uint32_t sign = signbit(value) ? sign_bit : 0;
    if (isnan(value)) return nan;
    const double magnitude = fabs((double)value);
    uint32_t low = 0, high = beyond;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (value_of(d, middle) <= magnitude) low = middle;
        else high = middle;
    }
    const double below = value_of(d, low);
    double above = high == beyond ? 2 * value_of(d, low) - value_of(d, low - 1) : value_of(d, high);
    uint32_t code = magnitude - below < above - magnitude || (magnitude - below == above - magnitude && low % 2 == 0)
                        ? low
                        : high;
    if (isinf(value)) code = beyond;
    if (code == beyond && !d->has_inf) return nan;
    return d->is_fnuz && code == 0 ? 0 : sign | code;
}

static bool is_nan_code(const definition *d, uint32_t code) { return isnan(value_of(d, code)); }

static void check_narrow(const simd_loops *loops, rows_dtype dtype, const definition *d, const float *values,
                         int64_t count) {
    const int64_t item = rows_item_bytes(dtype);
    uint8_t *narrow = block(count * item);
    loops->narrow[dtype](values, narrow, count);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t code = item == 1 ? narrow[i] : ((uint16_t *)(void *)narrow)[i];
        const uint32_t expected = code_of(d, values[i]);
        const bool both_nan = is_nan_code(d, code) && is_nan_code(d, expected);
        if (code != expected && !both_nan) {
            fprintf(stderr, "%s, dtype %d: %a gives %x\n", loops->name, (int)dtype, (double)values[i], code);
            exit(1);
        }
    }
    free(narrow);
}

static const struct {
    rows_dtype dtype;
    const definition *definition;
} small_floats[] = {
    {ROWS_FLOAT16, &float16}, {ROWS_BFLOAT16, &bfloat16}, {ROWS_E4M3FN, &e4m3fn}, {ROWS_E4M3FNUZ, &e4m3fnuz},
};
enum { NUM_SMALL = sizeof small_floats / sizeof *small_floats };

static void test_every_code_means_what_its_definition_says(const simd_loops *loops) {
    for (int f = 0; f < NUM_SMALL; f++) {
        const rows_dtype dtype = small_floats[f].dtype;
        const int64_t item = rows_item_bytes(dtype), codes = item == 1 ? 256 : 65536;
        uint8_t *narrow = block(codes * item);
        float *wide = block(codes * 4);
        for (int64_t i = 0; i < codes; i++) {
            if (item == 1) narrow[i] = (uint8_t)i;
            else ((uint16_t *)(void *)narrow)[i] = (uint16_t)i;
        }
        loops->widen[dtype](narrow, wide, codes, 1);
        for (int64_t i = 0; i < codes; i++) {
            const double expected = value_of(small_floats[f].definition, (uint32_t)i);
            REQUIRE(isnan(expected) ? isnan(wide[i]) : bits_of(wide[i]) == bits_of((float)expected));
        }
        check_narrow(loops, dtype, small_floats[f].definition, wide, codes); /* and back */
        free(wide);
        free(narrow);
    }
}

/* All upper halves of a float32 with the lower halves at which rounding turns, and random ones. */
static void test_rounding(const simd_loops *loops) {
    static const uint32_t lower[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff};
    enum { PER_HALF = sizeof lower / sizeof *lower + 2 };
    float *values = block(65536 * 4);
    for (int part = 0; part < PER_HALF; part++) {
        for (uint32_t upper = 0; upper < 65536; upper++) {
            const bool listed = part < PER_HALF - 2;
            values[upper] = float_of(upper << 16 | (listed ? lower[part] : (uint32_t)(random_bits() >> 40) & 0xffff));
        }
        for (int f = 0; f < NUM_SMALL; f++) {
            check_narrow(loops, small_floats[f].dtype, small_floats[f].definition, values, 65536);
        }
    }
    free(values);
}

static void test_int8(const simd_loops *loops) {
    for (int i = -128 * 16; i < 128 * 16; i++) {
        const float value = (float)i / 16;
        int8_t code;
        float back;
        loops->narrow[ROWS_INT8](&value, &code, 1);
        loops->widen[ROWS_INT8](&code, &back, 1, 1);
        if (value < 127.5f) REQUIRE(back == nearbyintf(value));
    }
}

/* ---------------------------------------------------------------- values that make trouble */

static float odd_float(void) {
    static const float odd[] = {0.0f, -0.0f, 1.0f, -1.0f, 448.0f, 464.0f, 240.0f, 65504.0f, 65520.0f, 1e-40f, 1e38f};
    const int64_t kind = random_in(0, 40);
    if (kind == 0) return float_of((uint32_t)random_bits());
    if (kind == 1) return random_in(0, 9) ? INFINITY : NAN;
    if (kind < 12) return odd[random_in(0, sizeof odd / sizeof *odd - 1)];
    return (float)random_in(-1000, 1000) / 64.0f;
}

static void fill_values(rows_dtype dtype, void *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float value = odd_float();
        if (dtype == ROWS_FLOAT32) ((float *)values)[i] = value;
        else if (dtype == ROWS_FLOAT64) ((double *)values)[i] = (double)value * (random_in(0, 9) ? 1.1 : 1e30);
        else simd_find("portable")->narrow[dtype](&value, (char *)values + i * rows_item_bytes(dtype), 1);
    }
}

/* Equal bits, where a nan equals every other. */
static bool same_values(rows_dtype dtype, const void *a, const void *b, int64_t count) {
    if (memcmp(a, b, (size_t)(count * rows_item_bytes(dtype))) == 0) return true;
    for (int64_t i = 0; i < count; i++) {
        const int64_t item = rows_item_bytes(dtype);
        const char *one = (const char *)a + i * item, *other = (const char *)b + i * item;
        if (memcmp(one, other, (size_t)item) == 0) continue;
        double x, y;
        if (dtype == ROWS_FLOAT64) {
            memcpy(&x, one, sizeof x);
            memcpy(&y, other, sizeof y);
        } else {
            float wide[2];
            simd_find("portable")->widen[dtype](one, &wide[0], 1, 1);
            simd_find("portable")->widen[dtype](other, &wide[1], 1, 1);
            x = wide[0];
            y = wide[1];
        }
        if (!isnan(x) || !isnan(y)) return false;
    }
    return true;
}

/* ---------------------------------------------------------------- every set against the portable one */

static void check_loops(const simd_loops *loops, const simd_loops *twin, int64_t count) {
    float *from = block(count * 4), *wide[2] = {block(count * 4), block(count * 4)};
    void *narrow[2] = {block(count * 8), block(count * 8)}, *row = block(count * 8);
    const float factor = odd_float(), divisor = odd_float(), limit = random_in(0, 1) ? INFINITY : 448.0f;
    fill_values(ROWS_FLOAT32, from, count);
    for (rows_dtype dtype = 0; dtype < ROWS_NUM_DTYPES; dtype++) {
        loops->narrow[dtype](from, narrow[0], count);
        twin->narrow[dtype](from, narrow[1], count);
        REQUIRE(same_values(dtype, narrow[0], narrow[1], count));
        loops->widen[dtype](narrow[1], wide[0], count, factor);
        twin->widen[dtype](narrow[1], wide[1], count, factor);
        REQUIRE(same_values(ROWS_FLOAT32, wide[0], wide[1], count));
        if (dtype >= ROWS_NUM_ROW_DTYPES) continue;
        const rows_dtype sum = dtype == ROWS_FLOAT64 ? ROWS_FLOAT64 : ROWS_FLOAT32;
        fill_values(dtype, row, count);
        memset(narrow[0], 0, (size_t)count * 8);
        memset(narrow[1], 0, (size_t)count * 8);
        for (int i = 0; i < 3; i++) {
            loops->add[dtype](narrow[0], row, count);
            twin->add[dtype](narrow[1], row, count);
            loops->add_weighted[dtype](narrow[0], row, count, (double)factor);
            twin->add_weighted[dtype](narrow[1], row, count, (double)factor);
        }
        REQUIRE(same_values(sum, narrow[0], narrow[1], count));
    }
    const float most[2] = {loops->largest(from, count), twin->largest(from, count)};
    REQUIRE(bits_of(most[0]) == bits_of(most[1]));
    memcpy(wide[0], from, (size_t)count * 4);
    memcpy(wide[1], from, (size_t)count * 4);
    loops->divide(wide[0], count, divisor, limit, 0);
    twin->divide(wide[1], count, divisor, limit, 0);
    REQUIRE(same_values(ROWS_FLOAT32, wide[0], wide[1], count));
    for (int64_t i = 0; i < count; i++) REQUIRE(wide[0][i] >= -limit && wide[0][i] <= limit);
    free(row);
    free(narrow[1]);
    free(narrow[0]);
    free(wide[1]);
    free(wide[0]);
    free(from);
}

static void test_sets_agree(void) {
    const simd_loops *portable = simd_at(simd_count() - 1);
    REQUIRE(strcmp(portable->name, "portable") == 0 && simd_at(simd_count()) == NULL && simd_at(-1) == NULL);
    REQUIRE(simd_find(NULL) == simd_at(0) && simd_find("") == simd_at(0) && simd_find("sse9") == NULL);
    for (int i = 0; i < simd_count(); i++) {
        REQUIRE(simd_find(simd_at(i)->name) == simd_at(i));
        for (int64_t count = 1; count < 150; count++) check_loops(simd_at(i), portable, count);
        for (int round = 0; round < 100; round++) check_loops(simd_at(i), portable, random_in(150, 2500));
    }
}

/* ---------------------------------------------------------------- random calls against plain loops */

static const simd_loops *any_set(void) { return simd_at((int)random_in(0, simd_count() - 1)); }

static int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

/* Mostly tiny, sometimes around the sizes of blocks and chunks. */
static int64_t random_size(void) {
    static const int64_t edges[] = {127, 128, 129, 256, 1023, 1024, 1025, 1100};
    return random_in(0, 60) ? random_in(0, 20) : edges[random_in(0, 7)];
}

static float plain_value(rows_dtype dtype, const void *row, int64_t i) {
    float value;
    simd_find("portable")->widen[dtype]((const char *)row + i * rows_item_bytes(dtype), &value, 1, 1);
    return value;
}

/* scale, and payload as what it decodes to before the scale, of one block by the words of comm/formats.py. */
static float plain_scale(rows_dtype wire, const float *values, int64_t count) {
    const float largest = wire == ROWS_INT8 ? 127 : wire == ROWS_E4M3FN ? 448 : 240;
    float most = 0;
    for (int64_t i = 0; i < count; i++) {
        if (isnan(values[i])) return NAN;
        if (fabsf(values[i]) > most) most = fabsf(values[i]);
    }
    return fmaxf(most / largest, 0x1p-126f);
}

static void check_packed_block(rows_dtype wire, const float *values, int64_t count, const uint8_t *payload,
                               float scale) {
    const float expected = plain_scale(wire, values, count);
    REQUIRE(same_values(ROWS_FLOAT32, &scale, &expected, 1));
    for (int64_t i = 0; i < count; i++) {
        const float quotient = values[i] / scale;
        if (wire == ROWS_INT8) {
            REQUIRE((int8_t)payload[i] == (isnan(quotient) ? 0 : (int)nearbyintf(quotient)));
        } else {
            const definition *d = wire == ROWS_E4M3FN ? &e4m3fn : &e4m3fnuz;
            const float most = wire == ROWS_E4M3FN ? 448 : 240;
            REQUIRE(payload[i] == code_of(d, isnan(quotient) ? 0 : fminf(fmaxf(quotient, -most), most)));
        }
    }
}

static void fuzz_pack(void) {
    const int64_t num_tokens = random_in(1, 4), count = random_in(0, 4), hidden = random_size(), k = random_in(0, 3);
    rows_layout layout = {.hidden_size = hidden, .top_k = k};
    layout.dtype = (rows_dtype)random_in(0, ROWS_NUM_ROW_DTYPES - 1);
    layout.wire = (rows_dtype)random_in(0, ROWS_NUM_DTYPES - 1);
    layout.weight_bytes = random_in(0, 1) ? 4 : 8;
    const bool scaled = layout.wire >= ROWS_NUM_ROW_DTYPES;
    const int64_t item = rows_item_bytes(layout.dtype), wire = rows_item_bytes(layout.wire);
    layout.scales_at = up(hidden * wire, 4);
    layout.weights_at = up(layout.scales_at + (scaled ? rows_num_blocks(hidden, 128) * 4 : 0), 8);
    layout.slots_at = layout.weights_at + k * layout.weight_bytes;
    layout.row_bytes = up(layout.slots_at + k * 4, 8);

    const int64_t x_stride = hidden * item + random_in(0, 1) * 8 * item;
    const int64_t stride = layout.row_bytes + random_in(0, 1) * 16, slots_and_weights = count * k;
    char *x = block((num_tokens - 1) * x_stride + hidden * item);
    char *weights = block(num_tokens * k * layout.weight_bytes);
    int64_t *tokens = block(count * 8);
    int32_t *slots = block(slots_and_weights * 4), *slots_back = block(slots_and_weights * 4);
    char *packed = block(count ? (count - 1) * stride + layout.row_bytes : 0);
    char *hidden_back = block(count * hidden * item), *weights_back = block(slots_and_weights * layout.weight_bytes);
    for (int64_t t = 0; t < num_tokens; t++) fill_values(layout.dtype, x + t * x_stride, hidden);
    for (int64_t n = 0; n < count; n++) tokens[n] = random_in(0, num_tokens - 1);
    for (int64_t i = 0; i < slots_and_weights; i++) slots[i] = (int32_t)random_in(-1, 3);
    const bool wrong = count > 0 && random_in(0, 9) == 0;
    const int64_t wrong_row = wrong ? random_in(0, count - 1) : 0;
    if (wrong) tokens[wrong_row] = random_in(0, 1) ? num_tokens : INT64_MIN;

    const rows_input source = {x, num_tokens, x_stride};
    rows_fault fault = {-9, -9};
    const rows_status status =
        rows_pack(any_set(), &layout, source, weights, tokens, slots, (rows_output){packed, count, stride}, &fault);
    REQUIRE(status == (wrong ? ROWS_BAD_TOKEN : ROWS_OK));
    REQUIRE(!wrong || (fault.row == wrong_row && fault.value == tokens[wrong_row]));
    const rows_output target = {random_in(0, 9) ? hidden_back : NULL, count, hidden * item};
    REQUIRE(rows_unpack(any_set(), &layout, (rows_input){packed, count, stride}, target, weights_back, slots_back) ==
            ROWS_OK);
    for (int64_t n = 0; n < count && !wrong; n++) {
        const char *row = packed + n * stride, *from = x + tokens[n] * x_stride, *to = hidden_back + n * hidden * item;
        float values[1100], narrowed;
        for (int64_t i = 0; i < hidden; i++) values[i] = plain_value(layout.dtype, from, i);
        for (int64_t begin = 0; scaled && begin < hidden; begin += 128) {
            float scale;
            memcpy(&scale, row + layout.scales_at + begin / 128 * 4, 4);
            const int64_t size = hidden - begin < 128 ? hidden - begin : 128;
            check_packed_block(layout.wire, values + begin, size, (const uint8_t *)row + begin, scale);
            for (int64_t i = begin; i < begin + size && target.start != NULL; i++) {
                const float product = plain_value(layout.wire, row, i) * scale;
                uint64_t expected = 0;
                simd_find("portable")->narrow[layout.dtype](&product, &expected, 1);
                REQUIRE(same_values(layout.dtype, to + i * item, &expected, 1));
            }
        }
        if (!scaled && layout.wire == layout.dtype) REQUIRE(memcmp(row, from, (size_t)(hidden * item)) == 0);
        for (int64_t i = 0; i < hidden && !scaled && layout.wire != layout.dtype; i++) {
            uint64_t expected = 0;
            simd_find("portable")->narrow[layout.wire](&values[i], &expected, 1);
            REQUIRE(same_values(layout.wire, row + i * wire, &expected, 1));
            narrowed = plain_value(layout.wire, &expected, 0);
            simd_find("portable")->narrow[layout.dtype](&narrowed, &expected, 1);
            REQUIRE(target.start == NULL || same_values(layout.dtype, to + i * item, &expected, 1));
        }
        static const char zeros[8];
        for (int64_t j = 0; j < k; j++) {
            const char *weight = weights + (tokens[n] * k + j) * layout.weight_bytes;
            const void *expected = slots[n * k + j] < 0 ? zeros : weight;
            REQUIRE(memcmp(weights_back + (n * k + j) * layout.weight_bytes, expected, layout.weight_bytes) == 0);
            REQUIRE(slots_back[n * k + j] == slots[n * k + j]);
        }
        for (int64_t i = layout.row_bytes; i < stride && n + 1 < count; i++) REQUIRE((uint8_t)row[i] == 0xa5);
    }
    free(weights_back);
    free(hidden_back);
    free(packed);
    free(slots_back);
    free(slots);
    free(tokens);
    free(weights);
    free(x);
}

static void fuzz_sum(void) {
    const int64_t count = random_in(0, 6), num_tokens = random_in(0, 4), hidden = random_size();
    const rows_dtype dtype = (rows_dtype)random_in(0, ROWS_NUM_ROW_DTYPES - 1);
    const bool is_double = dtype == ROWS_FLOAT64, has_order = random_in(0, 1), has_weights = random_in(0, 1);
    const int64_t item = rows_item_bytes(dtype), weight_bytes = is_double ? 8 : 4;
    const int64_t num_added = has_order ? random_in(0, 7) : count, stride = (hidden + random_in(0, 2)) * item;
    char *rows = block(count ? (count - 1) * stride + hidden * item : 0), *sums = block(num_tokens * hidden * item);
    void *weights = block(count * weight_bytes);
    int64_t *tokens = block(count * 8), *order = block(num_added * 8), *scratch = block((num_tokens + num_added) * 8);
    for (int64_t n = 0; n < count; n++) fill_values(dtype, rows + n * stride, hidden);
    fill_values(is_double ? ROWS_FLOAT64 : ROWS_FLOAT32, weights, count);
    for (int64_t n = 0; n < count; n++) tokens[n] = random_in(random_in(0, 99) ? 0 : -1, num_tokens - 1);
    for (int64_t i = 0; i < num_added; i++) order[i] = random_in(0, count - (random_in(0, 99) ? 1 : 0));

    rows_status expected = ROWS_OK;
    rows_fault fault;
    for (int64_t i = num_added - 1; i >= 0 && expected == ROWS_OK; i--) {
        const int64_t row = has_order ? order[i] : i;
        if (row < 0 || row >= count) expected = ROWS_BAD_ORDER;
        else if (tokens[row] < 0 || tokens[row] >= num_tokens) expected = ROWS_BAD_TOKEN;
    }
    REQUIRE(rows_sum(any_set(), dtype, hidden, (rows_input){rows, count, stride}, tokens, has_weights ? weights : NULL,
                     has_order ? order : NULL, num_added, (rows_output){sums, num_tokens, hidden * item}, scratch,
                     &fault) == expected);
    for (int64_t token = 0; token < num_tokens && expected == ROWS_OK; token++) {
        for (int64_t h = 0; h < hidden; h++) {
            double exact = 0;
            float single = 0;
            for (int64_t i = 0; i < num_added; i++) {
                const int64_t row = has_order ? order[i] : i;
                if (tokens[row] != token) continue;
                if (is_double) {
                    double product = ((const double *)(void *)(rows + row * stride))[h];
                    if (has_weights) product *= ((const double *)weights)[row];
                    exact += product;
                } else {
                    float product = plain_value(dtype, rows + row * stride, h);
                    if (has_weights) product *= ((const float *)weights)[row];
                    single += product;
                }
            }
            uint64_t value = 0;
            if (is_double) memcpy(&value, &exact, sizeof exact);
            else simd_find("portable")->narrow[dtype](&single, &value, 1);
            REQUIRE(same_values(dtype, sums + (token * hidden + h) * item, &value, 1));
        }
    }
    free(scratch);
    free(order);
    free(tokens);
    free(weights);
    free(sums);
    free(rows);
}

static void fuzz_quantize(void) {
    const int64_t rows = random_in(0, 5), columns = random_size(), down = random_in(1, 4);
    const int64_t across = random_in(0, 5) ? random_in(1, 9) : INT64_MAX;
    const rows_dtype dtype = (rows_dtype)random_in(0, ROWS_NUM_ROW_DTYPES - 1);
    const rows_dtype wire = (rows_dtype)random_in(ROWS_NUM_ROW_DTYPES, ROWS_NUM_DTYPES - 1);
    const int64_t item = rows_item_bytes(dtype), blocks = rows_num_blocks(columns, across);
    const int64_t num_scales = rows_num_blocks(rows, down) * blocks;
    char *values = block(rows * columns * item), *back = block(rows * columns * item);
    uint8_t *payload = block(rows * columns);
    float *scales = block(num_scales * 4);
    fill_values(dtype, values, rows * columns);
    const rows_output target = {payload, rows, columns};
    REQUIRE(rows_quantize(any_set(), &rows_wire_rule, dtype, (rows_input){values, rows, columns * item}, columns, down,
                          across, wire, target, scales) == ROWS_OK);
    REQUIRE(rows_dequantize(any_set(), wire, (rows_input){payload, rows, columns}, columns, scales, down, across, dtype,
                            (rows_output){back, rows, columns * item}) == ROWS_OK);
    for (int64_t i = 0; i < rows_num_blocks(rows, down); i++) {
        for (int64_t j = 0; j < blocks; j++) {
            float inside[5 * 1100];
            uint8_t codes[5 * 1100];
            int64_t count = 0;
            for (int64_t row = i * down; row < rows && row < (i + 1) * down; row++) {
                for (int64_t column = j * across; column < columns && column - j * across < across; column++) {
                    const int64_t at = row * columns + column;
                    inside[count] = plain_value(dtype, values, at);
                    codes[count++] = payload[at];
                    const float product = plain_value(wire, payload, at) * scales[i * blocks + j];
                    uint64_t expected = 0;
                    simd_find("portable")->narrow[dtype](&product, &expected, 1);
                    REQUIRE(same_values(dtype, back + at * item, &expected, 1));
                }
            }
            check_packed_block(wire, inside, count, codes, scales[i * blocks + j]);
        }
    }
    free(scales);
    free(payload);
    free(back);
    free(values);
}

static void fuzz_gather(void) {
    const int64_t count = random_in(0, 6), wanted = random_in(0, 6), width = random_in(0, 70);
    const int64_t stride = width + random_in(0, 3);
    const bool has_visit = random_in(0, 1);
    const int64_t num_visited = has_visit ? random_in(0, 7) : wanted;
    char *rows = block(count ? (count - 1) * stride + width : 0), *gathered = block(wanted * width);
    int64_t *index = block(wanted * 8), *visit = block(num_visited * 8);
    for (int64_t n = 0; n < count; n++) {
        for (int64_t i = 0; i < width; i++) rows[n * stride + i] = (char)random_in(0, 255);
    }
    if (wanted > 0 && width > 0) memset(gathered, 7, (size_t)(wanted * width));
    for (int64_t n = 0; n < wanted; n++) index[n] = random_in(random_in(0, 99) ? 0 : -1, count - 1);
    for (int64_t i = 0; i < num_visited; i++) {
        visit[i] = has_visit ? random_in(0, wanted - (random_in(0, 99) ? 1 : 0)) : i;
    }

    rows_status expected = ROWS_OK;
    rows_fault fault;
    for (int64_t i = 0; i < num_visited && width && expected == ROWS_OK; i++) {
        if (visit[i] < 0 || visit[i] >= wanted) expected = ROWS_BAD_VISIT;
        else if (index[visit[i]] < 0 || index[visit[i]] >= count) expected = ROWS_BAD_ORDER;
    }
    REQUIRE(rows_gather(width, (rows_input){rows, count, stride}, index, has_visit ? visit : NULL, num_visited,
                        (rows_output){gathered, wanted, width}, &fault) == expected);
    for (int64_t n = 0; n < wanted && width && expected == ROWS_OK; n++) {
        bool visited = false;
        for (int64_t i = 0; i < num_visited; i++) visited = visited || visit[i] == n;
        for (int64_t i = 0; i < width; i++) {
            REQUIRE(gathered[n * width + i] == (visited ? rows[index[n] * stride + i] : 7));
        }
    }
    free(visit);
    free(index);
    free(gathered);
    free(rows);
}

static void test_random_calls(int64_t calls) {
    for (int64_t i = 0; i < calls; i++) {
        switch (random_in(0, 3)) {
        case 0: fuzz_pack(); break;
        case 1: fuzz_quantize(); break;
        case 2: fuzz_gather(); break;
        default: fuzz_sum();
        }
    }
}

/* ---------------------------------------------------------------- what is refused */

static void test_layouts_that_do_not_fit(void) {
    const rows_layout good = {16, 2, ROWS_FLOAT32, ROWS_E4M3FN, 4, 16, 32, 40, 48};
    REQUIRE(rows_check_layout(&good) == ROWS_OK);
    const int64_t strange[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX - 3, 1, 2, 15, 47, 49, INT64_C(1) << 62};
    for (size_t i = 0; i < sizeof strange / sizeof *strange; i++) {
        rows_layout changed[6] = {good, good, good, good, good, good};
        changed[0].hidden_size = changed[1].top_k = changed[2].scales_at = strange[i];
        changed[3].weights_at = changed[4].slots_at = changed[5].row_bytes = strange[i];
        for (int j = 0; j < 6; j++) {
            const bool fits = (j == 0 && strange[i] >= 0 && strange[i] < 16) ||
                              (j == 1 && strange[i] >= 0 && strange[i] <= 2) || (j == 5 && strange[i] >= 48);
            REQUIRE(rows_check_layout(&changed[j]) == (fits ? ROWS_OK : ROWS_BAD_ARGUMENT));
        }
    }
    rows_layout odd = good;
    odd.weight_bytes = 2;
    REQUIRE(rows_check_layout(&odd) == ROWS_BAD_ARGUMENT);
    odd = good, odd.dtype = ROWS_INT8;
    REQUIRE(rows_check_layout(&odd) == ROWS_BAD_ARGUMENT);
    odd = good, odd.wire = ROWS_NUM_DTYPES;
    REQUIRE(rows_check_layout(&odd) == ROWS_BAD_ARGUMENT);
}

static void test_rows_of_nothing_may_claim_any_number(void) {
    const int64_t endless = INT64_C(1) << 60;
    const rows_layout empty = {0, 0, ROWS_FLOAT32, ROWS_FLOAT32, 4, 0, 0, 0, 0};
    const rows_input in = {NULL, endless, 0};
    const rows_output out = {NULL, endless, 0};
    REQUIRE(rows_unpack(simd_at(0), &empty, in, out, NULL, NULL) == ROWS_OK);
    REQUIRE(rows_quantize(simd_at(0), &rows_wire_rule, ROWS_FLOAT32, in, 0, 1, 1, ROWS_INT8, out, NULL) == ROWS_OK);
    REQUIRE(rows_dequantize(simd_at(0), ROWS_INT8, in, 0, NULL, 1, 1, ROWS_FLOAT32, out) == ROWS_OK);
}

/* ---------------------------------------------------------------- several threads, shared inputs */

enum { SHARED_ROWS = 40, SHARED_HIDDEN = 1300 };

typedef struct {
    float *x;
    int64_t tokens[SHARED_ROWS];
    int32_t slots[SHARED_ROWS];
    float weights[SHARED_ROWS];
} shared;

typedef struct {
    const shared *inputs;
    const simd_loops *loops;
    uint64_t hash;
} job;

static uint64_t hash_of(uint64_t hash, const void *bytes, int64_t count) {
    for (int64_t i = 0; i < count; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * UINT64_C(1099511628211);
    return hash;
}

static void *work(void *given) {
    job *mine = given;
    const shared *s = mine->inputs;
    const rows_layout layout = {SHARED_HIDDEN, 1, ROWS_FLOAT32, ROWS_E4M3FN, 4, 1312, 1360, 1364, 1376};
    const rows_input x = {s->x, SHARED_ROWS, SHARED_HIDDEN * 4};
    char *packed = calloc(SHARED_ROWS, 1376);
    float *back = block(SHARED_ROWS * SHARED_HIDDEN * 4), weights[SHARED_ROWS];
    int32_t slots[SHARED_ROWS];
    int64_t scratch[2 * SHARED_ROWS];
    rows_fault fault;
    mine->loops = simd_find(mine->loops->name);
    for (int round = 0; round < 20; round++) {
        REQUIRE(rows_pack(mine->loops, &layout, x, s->weights, s->tokens, s->slots,
                          (rows_output){packed, SHARED_ROWS, 1376}, &fault) == ROWS_OK);
        mine->hash = hash_of(mine->hash, packed, SHARED_ROWS * 1376);
        const rows_output wide = {back, SHARED_ROWS, SHARED_HIDDEN * 4};
        REQUIRE(rows_unpack(mine->loops, &layout, (rows_input){packed, SHARED_ROWS, 1376}, wide, weights, slots) == 0);
        mine->hash = hash_of(mine->hash, back, SHARED_ROWS * SHARED_HIDDEN * 4);
        REQUIRE(rows_sum(mine->loops, ROWS_FLOAT32, SHARED_HIDDEN, x, s->tokens, s->weights, NULL, SHARED_ROWS, wide,
                         scratch, &fault) == ROWS_OK);
        mine->hash = hash_of(mine->hash, back, SHARED_ROWS * SHARED_HIDDEN * 4);
    }
    free(back);
    free(packed);
    return NULL;
}

static void test_threads(void) {
    enum { THREADS = 6 };
    shared inputs = {.x = block(SHARED_ROWS * SHARED_HIDDEN * 4)};
    for (int i = 0; i < SHARED_ROWS * SHARED_HIDDEN; i++) inputs.x[i] = (float)random_in(-1000, 1000) / 7;
    for (int i = 0; i < SHARED_ROWS; i++) {
        inputs.tokens[i] = random_in(0, SHARED_ROWS - 1);
        inputs.slots[i] = (int32_t)random_in(-1, 3);
        inputs.weights[i] = (float)random_in(0, 100) / 100;
    }
    job alone = {.inputs = &inputs, .loops = simd_find("portable"), .hash = 1}, jobs[THREADS];
    work(&alone);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (job){.inputs = &inputs, .loops = simd_at(i % simd_count()), .hash = 1};
        REQUIRE(pthread_create(&threads[i], NULL, work, &jobs[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        REQUIRE(pthread_join(threads[i], NULL) == 0);
        REQUIRE(jobs[i].hash == alone.hash);
    }
    free(inputs.x);
}

int main(int count, char **arguments) {
    if (count > 1 && strcmp(arguments[1], "threads") == 0) {
        test_threads();
        puts("rows in threads: all cases passed");
        return 0;
    }
    for (int i = 0; i < simd_count(); i++) {
        test_every_code_means_what_its_definition_says(simd_at(i));
        test_rounding(simd_at(i));
        test_int8(simd_at(i));
    }
    test_sets_agree();
    test_layouts_that_do_not_fit();
    test_rows_of_nothing_may_claim_any_number();
    test_random_calls(count > 1 ? atoll(arguments[1]) : 1000000);
    test_threads();
    printf("rows (%s and %d more): all cases passed\n", simd_at(0)->name, simd_count() - 1);
    return 0;
}
