/* The loops of simd.h for one instruction set: simd.c includes this once for each, with LOOP(name) naming the set's
 * functions and LOOP_TARGET its instructions. Plain C without branches inside, so that compilers vectorise it. */

#define WIDEN(dtype, item)                                                                                    \
    LOOP_TARGET static void LOOP(widen_##dtype)(const void *from, float *restrict to, int64_t count,          \
                                                float factor) {                                               \
        const item *restrict values = from;                                                                   \
        for (int64_t i = 0; i < count; i++) to[i] = dtype##_to_float(values[i]) * factor;                     \
    }
#define NARROW(dtype, item)                                                                                   \
    LOOP_TARGET static void LOOP(narrow_##dtype)(const float *restrict from, void *to, int64_t count) {       \
        item *restrict values = to;                                                                           \
        for (int64_t i = 0; i < count; i++) values[i] = float_to_##dtype(from[i]);                            \
    }
#define ADD(dtype, item, sum, to_sum)                                                                         \
    LOOP_TARGET static void LOOP(add_##dtype)(void *to, const void *row, int64_t count) {                     \
        sum *restrict sums = to;                                                                              \
        const item *restrict values = row;                                                                    \
        for (int64_t i = 0; i < count; i++) sums[i] += to_sum(values[i]);                                     \
    }                                                                                                         \
    LOOP_TARGET static void LOOP(add_weighted_##dtype)(void *to, const void *row, int64_t count,              \
                                                       double given_weight) {                                 \
        sum *restrict sums = to;                                                                              \
        const item *restrict values = row;                                                                    \
        const sum weight = (sum)given_weight;                                                                 \
        for (int64_t i = 0; i < count; i++) {                                                                 \
            const sum product = to_sum(values[i]) * weight; /* rounded before it is added */                  \
            sums[i] += product;                                                                               \
        }                                                                                                     \
    }

WIDEN(float32, float)
WIDEN(float64, double)
WIDEN(float16, uint16_t)
WIDEN(bfloat16, uint16_t)
WIDEN(e4m3fn, uint8_t)
WIDEN(e4m3fnuz, uint8_t)
WIDEN(int8, int8_t)

NARROW(float32, float)
NARROW(float64, double)
NARROW(float16, uint16_t)
NARROW(bfloat16, uint16_t)
NARROW(e4m3fn, uint8_t)
NARROW(e4m3fnuz, uint8_t)
NARROW(int8, uint8_t)

ADD(float32, float, float, float32_to_float)
ADD(float64, double, double, (double))
ADD(float16, uint16_t, float, float16_to_float)
ADD(bfloat16, uint16_t, float, bfloat16_to_float)

LOOP_TARGET static float LOOP(largest)(const float *restrict values, int64_t count) {
    /* As whole numbers: without the sign they are in the order of the values, with nan above inf. */
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const int32_t magnitude = (int32_t)(bits_of(values[i]) & 0x7fffffff);
        most = magnitude > most ? magnitude : most;
    }
    return float_of((uint32_t)most);
}

LOOP_TARGET static void LOOP(divide)(float *restrict values, int64_t count, float divisor, float limit,
                                     float for_nan) {
    for (int64_t i = 0; i < count; i++) {
        float value = values[i] / divisor;
        value = value > limit ? limit : value;
        value = value < -limit ? -limit : value;
        values[i] = value == value ? value : for_nan;
    }
}

#define EACH_ROW_DTYPE(loop) LOOP(loop##_float32), LOOP(loop##_float64), LOOP(loop##_float16), LOOP(loop##_bfloat16)
#define EACH_DTYPE(loop) EACH_ROW_DTYPE(loop), LOOP(loop##_e4m3fn), LOOP(loop##_e4m3fnuz), LOOP(loop##_int8)

static const simd_loops LOOP(loops) = {
    .name = LOOP_NAME,
    .widen = {EACH_DTYPE(widen)},
    .narrow = {EACH_DTYPE(narrow)},
    .largest = LOOP(largest),
    .divide = LOOP(divide),
    .add = {EACH_ROW_DTYPE(add)},
    .add_weighted = {EACH_ROW_DTYPE(add_weighted)},
};

#undef WIDEN
#undef NARROW
#undef ADD
#undef EACH_ROW_DTYPE
#undef EACH_DTYPE
