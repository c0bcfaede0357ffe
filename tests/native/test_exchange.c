/* csrc/exchange.c: refusals, threads that write and read over windows at once, and two processes. tests/test_shm.py
 * builds it with the thread sanitizer and with the address sanitizer; every window is a block of exactly its size. */

#define _GNU_SOURCE

#include "exchange.h"
#include "check.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WRITERS = 3, CHUNKS = 2, CHUNK_BYTES = 4096, MESSAGES = 3000 };

static const int64_t second = 1000000000;

typedef struct {
    unsigned char *memory;
    size_t bytes;
} window;

static window new_window(size_t num_ranks, size_t more) {
    window w = {.bytes = exchange_bytes(num_ranks) + more};
    w.memory = aligned_alloc(EXCHANGE_LINE, w.bytes);
    REQUIRE(w.memory != NULL);
    memset(w.memory, 0, w.bytes);
    return w;
}

static exchange_bell *bell_of(window w) { return exchange_bell_of(w.memory, w.bytes); }

static exchange_ring *ring_of(window w, size_t source) { return exchange_ring_of(w.memory, w.bytes, source); }

/* ---- what is refused ---- */

static void test_windows(void) {
    window w = new_window(2, 0);
    REQUIRE(ring_of(w, 0) != NULL && ring_of(w, 1) != NULL);
    REQUIRE(ring_of(w, 2) == NULL && ring_of(w, SIZE_MAX) == NULL);
    REQUIRE((unsigned char *)(ring_of(w, 1) + 1) == w.memory + w.bytes);
    REQUIRE(exchange_ring_of(w.memory, w.bytes - 1, 1) == NULL);
    REQUIRE(exchange_ring_of(w.memory, 3, 0) == NULL && exchange_bell_of(w.memory, 3) == NULL);
    REQUIRE(exchange_ring_of(w.memory + 8, w.bytes - 8, 0) == NULL && exchange_bell_of(w.memory + 8, 64) == NULL);
    REQUIRE(exchange_bell_of(NULL, 64) == NULL && exchange_ring_of(NULL, 1 << 20, 0) == NULL);
    free(w.memory);
}

static void test_frames(void) {
    window w = new_window(1, 0);
    exchange_ring *ring = ring_of(w, 0);
    exchange_bell *bell = bell_of(w);
    unsigned char frame[EXCHANGE_FRAME_BYTES + 1], got[EXCHANGE_FRAME_BYTES];
    size_t length = 99;
    memset(frame, 7, sizeof frame);
    REQUIRE(exchange_take(ring, 1, got, &length) == EXCHANGE_NOTHING && length == 99);
    REQUIRE(exchange_publish(ring, bell, 0, frame, 1) == EXCHANGE_BAD_ARGUMENT);
    REQUIRE(exchange_publish(ring, bell, 1, frame, sizeof frame) == EXCHANGE_BAD_ARGUMENT);
    REQUIRE(exchange_take(ring, 0, got, &length) == EXCHANGE_BAD_ARGUMENT);
    uint64_t number = 1;
    for (int round = 0; round < 5; round++) { /* fill the ring, and empty it */
        for (uint64_t i = 0; i < EXCHANGE_SLOTS; i++) {
            frame[0] = (unsigned char)(number + i);
            length = 1 + (size_t)i * 20 % EXCHANGE_FRAME_BYTES;
            REQUIRE(exchange_publish(ring, bell, number + i, frame, length) == EXCHANGE_OK);
        }
        REQUIRE(exchange_publish(ring, bell, number + EXCHANGE_SLOTS, frame, 1) == EXCHANGE_FULL);
        for (uint64_t i = 0; i < EXCHANGE_SLOTS; i++) {
            REQUIRE(exchange_take(ring, number + i, got, &length) == EXCHANGE_OK);
            REQUIRE(length == 1 + (size_t)i * 20 % EXCHANGE_FRAME_BYTES && got[0] == (unsigned char)(number + i));
        }
        number += EXCHANGE_SLOTS;
        REQUIRE(exchange_take(ring, number, got, &length) == EXCHANGE_NOTHING);
    }
    REQUIRE(exchange_rung(bell) == 5 * EXCHANGE_SLOTS);
    REQUIRE(exchange_publish(ring, bell, number, NULL, 0) == EXCHANGE_OK); /* a frame may be empty */
    REQUIRE(exchange_take(ring, number, got, &length) == EXCHANGE_OK && length == 0);
    free(w.memory);
}

static void test_corrupt_memory_is_refused(void) {
    window w = new_window(1, 0);
    exchange_ring *ring = ring_of(w, 0);
    exchange_bell *bell = bell_of(w);
    unsigned char got[EXCHANGE_FRAME_BYTES];
    size_t length = 0;
    atomic_store(&ring->slots[0].number, 2); /* of another slot */
    REQUIRE(exchange_take(ring, 1, got, &length) == EXCHANGE_CORRUPT);
    atomic_store(&ring->slots[0].number, 1 + EXCHANGE_SLOTS); /* a round ahead */
    REQUIRE(exchange_take(ring, 1, got, &length) == EXCHANGE_CORRUPT);
    atomic_store(&ring->slots[0].number, UINT64_MAX);
    REQUIRE(exchange_take(ring, 1, got, &length) == EXCHANGE_CORRUPT);
    atomic_store(&ring->slots[0].number, 1);
    for (uint32_t bytes = EXCHANGE_FRAME_BYTES + 1; bytes != 0; bytes = bytes < 1u << 31 ? bytes * 2 : 0) {
        atomic_store(&ring->slots[0].length, bytes);
        REQUIRE(exchange_take(ring, 1, got, &length) == EXCHANGE_CORRUPT);
    }
    atomic_store(&ring->slots[0].length, EXCHANGE_FRAME_BYTES);
    REQUIRE(exchange_take(ring, 1, got, &length) == EXCHANGE_OK && length == EXCHANGE_FRAME_BYTES);
    atomic_store(&ring->slots[1].number, 2 - (uint64_t)EXCHANGE_SLOTS); /* before the first round there is only 0 */
    REQUIRE(exchange_take(ring, 2, got, &length) == EXCHANGE_CORRUPT);
    atomic_store(&ring->taken, 3); /* more than was ever written */
    REQUIRE(exchange_publish(ring, bell, 3, "x", 1) == EXCHANGE_CORRUPT);
    atomic_store(&ring->taken, UINT64_MAX);
    REQUIRE(exchange_publish(ring, bell, 3, "x", 1) == EXCHANGE_CORRUPT);
    free(w.memory);
}

static void test_waiting_ends(void) {
    window w = new_window(1, 0);
    exchange_bell *bell = bell_of(w);
    REQUIRE(exchange_wait(bell, 0, 0, 2000000) == EXCHANGE_TIMEOUT);
    REQUIRE(exchange_wait(bell, 0, second, 2000000) == EXCHANGE_TIMEOUT); /* spinning ends with the time, too */
    REQUIRE(exchange_wait(bell, 0, 0, 0) == EXCHANGE_TIMEOUT && exchange_wait(bell, 0, -1, -1) == EXCHANGE_TIMEOUT);
    REQUIRE(exchange_publish(ring_of(w, 0), bell, 1, "x", 1) == EXCHANGE_OK);
    REQUIRE(exchange_wait(bell, 0, 0, second) == EXCHANGE_OK);
    REQUIRE(exchange_wait(bell, exchange_rung(bell), 0, 1000000) == EXCHANGE_TIMEOUT);
    free(w.memory);
}

/* ---- threads: chunks that are used again at once, as comm/lane.py uses them ---- */

static window reader_window, writer_windows[WRITERS];

static unsigned char *chunk_of(size_t writer, uint64_t message) {
    const size_t chunk = writer * CHUNKS + message % CHUNKS;
    return reader_window.memory + exchange_bytes(WRITERS) + chunk * CHUNK_BYTES;
}

static unsigned char byte_of(size_t writer, uint64_t message, size_t at) {
    return (unsigned char)(writer * 89 + message * 31 + at);
}

static void wait_at(window w, uint32_t seen, uint64_t turn) {
    const exchange_status status = exchange_wait(bell_of(w), seen, turn % 2 == 0 ? 0 : 20000, 60 * second);
    REQUIRE(status == EXCHANGE_OK || status == EXCHANGE_SLEPT);
}

static void *write_messages(void *argument) {
    const size_t writer = (size_t)(uintptr_t)argument;
    window mine = writer_windows[writer];
    uint64_t freed = 0;
    unsigned char frame[EXCHANGE_FRAME_BYTES];
    for (uint64_t message = 1; message <= MESSAGES; message++) {
        while (message - freed > CHUNKS) { /* until the chunk is free again */
            const uint32_t seen = exchange_rung(bell_of(mine));
            size_t length;
            const exchange_status status = exchange_take(ring_of(mine, 0), freed + 1, frame, &length);
            REQUIRE(status == EXCHANGE_OK || status == EXCHANGE_NOTHING);
            if (status == EXCHANGE_OK) freed++;
            else wait_at(mine, seen, message);
        }
        unsigned char *chunk = chunk_of(writer, message);
        for (size_t at = 0; at < CHUNK_BYTES; at++) chunk[at] = byte_of(writer, message, at);
        const size_t length = sizeof message + message % (EXCHANGE_FRAME_BYTES - sizeof message + 1);
        memset(frame, (int)message, sizeof frame);
        memcpy(frame, &message, sizeof message);
        exchange_bell *bell = bell_of(reader_window);
        REQUIRE(exchange_publish(ring_of(reader_window, writer), bell, message, frame, length) == EXCHANGE_OK);
    }
    return NULL;
}

static void *read_messages(void *unused) {
    (void)unused;
    uint64_t taken[WRITERS] = {0}, all = 0;
    unsigned char frame[EXCHANGE_FRAME_BYTES];
    while (all < (uint64_t)WRITERS * MESSAGES) {
        const uint32_t seen = exchange_rung(bell_of(reader_window));
        const uint64_t before = all;
        for (size_t writer = 0; writer < WRITERS; writer++) {
            size_t length;
            const uint64_t next = taken[writer] + 1;
            const exchange_status status = exchange_take(ring_of(reader_window, writer), next, frame, &length);
            if (status == EXCHANGE_NOTHING) continue;
            REQUIRE(status == EXCHANGE_OK);
            uint64_t message;
            memcpy(&message, frame, sizeof message);
            REQUIRE(message == next && length == sizeof message + next % (sizeof frame - sizeof message + 1));
            for (size_t at = sizeof message; at < length; at++) REQUIRE(frame[at] == (unsigned char)message);
            unsigned char *chunk = chunk_of(writer, message);
            for (size_t at = 0; at < CHUNK_BYTES; at++) {
                REQUIRE(chunk[at] == byte_of(writer, message, at));
                chunk[at] = 0; /* the reader's writes must be over before the writer's, too */
            }
            window theirs = writer_windows[writer];
            REQUIRE(exchange_publish(ring_of(theirs, 0), bell_of(theirs), next, NULL, 0) == EXCHANGE_OK);
            taken[writer]++;
            all++;
        }
        if (all == before) wait_at(reader_window, seen, all); /* only once no ring has anything left */
    }
    return NULL;
}

static void test_threads(void) {
    reader_window = new_window(WRITERS, (size_t)WRITERS * CHUNKS * CHUNK_BYTES);
    for (size_t writer = 0; writer < WRITERS; writer++) writer_windows[writer] = new_window(1, 0);
    pthread_t threads[WRITERS + 1];
    REQUIRE(pthread_create(&threads[WRITERS], NULL, read_messages, NULL) == 0);
    for (size_t i = 0; i < WRITERS; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, write_messages, (void *)(uintptr_t)i) == 0);
    }
    for (size_t i = 0; i <= WRITERS; i++) REQUIRE(pthread_join(threads[i], NULL) == 0);
    for (size_t writer = 0; writer < WRITERS; writer++) free(writer_windows[writer].memory);
    free(reader_window.memory);
}

/* ---- processes: the futex word is found by its page, not by its address ---- */

static void bounce(window mine, window theirs, uint64_t rounds, int starts) {
    unsigned char frame[EXCHANGE_FRAME_BYTES];
    for (uint64_t round = 1; round <= rounds; round++) {
        if (starts) REQUIRE(exchange_publish(ring_of(theirs, 0), bell_of(theirs), round, "ball", 4) == EXCHANGE_OK);
        for (;;) {
            const uint32_t seen = exchange_rung(bell_of(mine));
            size_t length;
            const exchange_status status = exchange_take(ring_of(mine, 0), round, frame, &length);
            if (status == EXCHANGE_OK) break;
            REQUIRE(status == EXCHANGE_NOTHING);
            wait_at(mine, seen, round / (rounds / 4)); /* asleep and spinning by turns */
        }
        if (!starts) REQUIRE(exchange_publish(ring_of(theirs, 0), bell_of(theirs), round, "ball", 4) == EXCHANGE_OK);
    }
}

static void test_processes(void) {
    enum { ROUNDS = 4000 };
    const size_t bytes = exchange_bytes(1);
    window windows[2];
    for (int i = 0; i < 2; i++) {
        windows[i].bytes = bytes;
        windows[i].memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        REQUIRE(windows[i].memory != MAP_FAILED);
    }
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        bounce(windows[1], windows[0], ROUNDS, 0);
        _exit(0);
    }
    bounce(windows[0], windows[1], ROUNDS, 1);
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    const double seconds = (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
    printf("two processes, there and back: %.1f us\n", 1e6 * seconds / ROUNDS);
    for (int i = 0; i < 2; i++) munmap(windows[i].memory, bytes);
}

/* ---- parcels ---- */

enum { TRADERS = 3, PLACE_BYTES = 4096, TRADES = 3000 };

static exchange_parcels parcels_of(window w, size_t num_ranks) {
    return (exchange_parcels){w.memory, w.bytes, exchange_bytes(num_ranks), PLACE_BYTES, num_ranks};
}

static void test_places(void) {
    window w = new_window(2, 4 * PLACE_BYTES);
    exchange_parcels right = parcels_of(w, 2), wrong = right;
    REQUIRE(exchange_parcels_fit(&right));
    wrong.at = 0;
    REQUIRE(!exchange_parcels_fit(&wrong));
    wrong.at = right.at + 8;
    REQUIRE(!exchange_parcels_fit(&wrong));
    wrong.at = right.at + EXCHANGE_LINE;
    REQUIRE(!exchange_parcels_fit(&wrong));
    wrong = right, wrong.place_bytes = SIZE_MAX - EXCHANGE_LINE + 1;
    REQUIRE(!exchange_parcels_fit(&wrong));
    wrong = right, wrong.num_ranks = SIZE_MAX / 2;
    REQUIRE(!exchange_parcels_fit(&wrong));
    wrong = right, wrong.place_bytes = 0;
    REQUIRE(!exchange_parcels_fit(&wrong));

    const size_t room = PLACE_BYTES - EXCHANGE_LINE;
    unsigned char message[PLACE_BYTES] = {1}, got[PLACE_BYTES];
    const int64_t note[EXCHANGE_NOTE] = {5, -4, 3, -2, 1}, numbers[2] = {0, 1};
    int64_t took = 0, lengths[2] = {7, -1}, waited[2] = {0, 0}, notes[2 * EXCHANGE_NOTE];
    REQUIRE(exchange_post(&right, 1, 0, note, message, 1) == EXCHANGE_BAD_ARGUMENT);
    REQUIRE(exchange_post(&right, 2, 1, note, message, 1) == EXCHANGE_BAD_ARGUMENT);
    REQUIRE(exchange_post(&right, 1, 1, note, message, room + 1) == EXCHANGE_BAD_ARGUMENT);
    REQUIRE(exchange_gather(&right, numbers, lengths, notes, waited, 0, 1000000, &took) == EXCHANGE_TIMEOUT && took >= 1000000);
    REQUIRE(lengths[1] == -1 && waited[1] >= 1000000 && waited[0] == 0);
    REQUIRE(exchange_fetch(&right, 1, 1, got, 1) == EXCHANGE_CORRUPT);
    REQUIRE(exchange_post(&right, 1, 1, note, message, room) == EXCHANGE_OK);
    REQUIRE(exchange_gather(&right, numbers, lengths, notes, waited, 0, 0, &took) == EXCHANGE_OK);
    REQUIRE(lengths[0] == 7 && lengths[1] == (int64_t)room);
    REQUIRE(memcmp(notes + EXCHANGE_NOTE, note, sizeof note) == 0);
    REQUIRE(exchange_post(&right, 1, 2, note, NULL, 0) == EXCHANGE_OK);
    REQUIRE(exchange_post(&right, 1, 3, note, NULL, 0) == EXCHANGE_FULL);
    REQUIRE(exchange_fetch(&right, 1, 1, got, room) == EXCHANGE_OK && memcmp(got, message, room) == 0);
    REQUIRE(exchange_post(&right, 1, 3, note, NULL, 0) == EXCHANGE_OK);
    free(w.memory);
}

static window trader_windows[TRADERS];

/* Every trader sends every other one a parcel, takes theirs, and begins again: places are always free in time. */
static void *trade(void *argument) {
    const size_t me = (size_t)(uintptr_t)argument;
    const exchange_parcels mine = parcels_of(trader_windows[me], TRADERS);
    unsigned char message[PLACE_BYTES];
    for (int64_t number = 1; number <= TRADES; number++) {
        const int64_t note[EXCHANGE_NOTE] = {number, (int64_t)me};
        int64_t took, numbers[TRADERS], lengths[TRADERS], waited[TRADERS] = {0}, notes[TRADERS * EXCHANGE_NOTE];
        for (size_t peer = 0; peer < TRADERS; peer++) {
            numbers[peer] = peer == me ? 0 : number;
            lengths[peer] = -1;
            if (peer == me) continue;
            const size_t length = (size_t)(number * 7 + (int64_t)peer) % (PLACE_BYTES - EXCHANGE_LINE);
            const exchange_parcels to = parcels_of(trader_windows[peer], TRADERS);
            memset(message, (int)(number + (int64_t)me), length);
            REQUIRE(exchange_post(&to, me, (uint64_t)number, note, message, length) == EXCHANGE_OK);
        }
        const exchange_status status =
            exchange_gather(&mine, numbers, lengths, notes, waited, number % 2 * 1000, 20 * second, &took);
        REQUIRE(status == EXCHANGE_OK || status == EXCHANGE_SLEPT);
        for (size_t peer = 0; peer < TRADERS; peer++) {
            if (peer == me) continue;
            const int64_t *told = notes + peer * EXCHANGE_NOTE;
            REQUIRE(told[0] == number && told[1] == (int64_t)peer);
            REQUIRE(lengths[peer] == (number * 7 + (int64_t)me) % (PLACE_BYTES - EXCHANGE_LINE));
            REQUIRE(exchange_fetch(&mine, peer, (uint64_t)number, message, (size_t)lengths[peer]) == EXCHANGE_OK);
            for (int64_t at = 0; at < lengths[peer]; at++) {
                REQUIRE(message[at] == (unsigned char)(number + (int64_t)peer));
            }
        }
    }
    return NULL;
}

static void test_trading(void) {
    pthread_t threads[TRADERS];
    for (size_t i = 0; i < TRADERS; i++) trader_windows[i] = new_window(TRADERS, 2 * TRADERS * PLACE_BYTES);
    for (size_t i = 0; i < TRADERS; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, trade, (void *)(uintptr_t)i) == 0);
    }
    for (size_t i = 0; i < TRADERS; i++) REQUIRE(pthread_join(threads[i], NULL) == 0);
    for (size_t i = 0; i < TRADERS; i++) free(trader_windows[i].memory);
}

int main(void) {
    test_windows();
    test_frames();
    test_corrupt_memory_is_refused();
    test_waiting_ends();
    test_processes();
    test_places();
    test_trading();
    test_threads();
    printf("passed\n");
    return 0;
}
