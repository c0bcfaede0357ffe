/* What the test programs share: a check that holds in every build, and numbers that are the same on every machine. */
#ifndef MOE_RUNTIME_CHECK_H
#define MOE_RUNTIME_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

/* Not assert(): it must also hold in a build with NDEBUG. */
#define REQUIRE(condition)                                                                 \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            _exit(1);                                                                      \
        }                                                                                  \
    } while (0)

static uint64_t random_state = 20240229;

static inline uint64_t random_bits(void) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * UINT64_C(2685821657736338717);
}

/* Uniform enough in low..high, both included; low where that is nothing. */
static inline int64_t random_in(int64_t low, int64_t high) {
    return high <= low ? low : low + (int64_t)((random_bits() >> 8) % (uint64_t)(high - low + 1));
}

#endif
