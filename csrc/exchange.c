/* Frames and parcels between the ranks of one host; exchange.h says what they promise. */

#define _GNU_SOURCE /* syscall */

#include "exchange.h"

#include <limits.h>
#include <string.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "a lock would not be shared by processes");
_Static_assert(sizeof(exchange_bell) == EXCHANGE_LINE, "ranks must agree on where things are");
_Static_assert(sizeof(exchange_slot) == 320 && offsetof(exchange_slot, bytes) == 16, "as above");
_Static_assert(sizeof(exchange_parcel) == EXCHANGE_LINE, "as above");
_Static_assert(sizeof(exchange_ring) == EXCHANGE_LINE + EXCHANGE_SLOTS * sizeof(exchange_slot), "as above");

size_t exchange_bytes(size_t num_ranks) { return sizeof(exchange_bell) + num_ranks * sizeof(exchange_ring); }

static int is_aligned(const void *window) { return window != NULL && (uintptr_t)window % EXCHANGE_LINE == 0; }

exchange_bell *exchange_bell_of(void *window, size_t window_bytes) {
    return is_aligned(window) && window_bytes >= sizeof(exchange_bell) ? window : NULL;
}

exchange_ring *exchange_ring_of(void *window, size_t window_bytes, size_t source) {
    if (!is_aligned(window) || window_bytes < sizeof(exchange_bell)) return NULL;
    if (source >= (window_bytes - sizeof(exchange_bell)) / sizeof(exchange_ring)) return NULL;
    return (exchange_ring *)((unsigned char *)window + sizeof(exchange_bell)) + source;
}

static exchange_slot *slot_of(exchange_ring *ring, uint64_t number) {
    return &ring->slots[(number - 1) % EXCHANGE_SLOTS];
}

/* ---- waking and sleeping; on other systems than Linux, where this package has no windows, a short nap ---- */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#ifdef __linux__
/* Not FUTEX_PRIVATE: the word is shared by processes. */
static void sleep_at(_Atomic uint32_t *word, uint32_t seen, int64_t timeout_ns) {
    const struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, NULL, 0);
}

static void wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }
#else
static void sleep_at(_Atomic uint32_t *word, uint32_t seen, int64_t timeout_ns) {
    (void)word, (void)seen;
    const struct timespec nap = {.tv_sec = 0, .tv_nsec = timeout_ns < 50000 ? timeout_ns : 50000};
    nanosleep(&nap, NULL);
}

static void wake(_Atomic uint32_t *word) { (void)word; }
#endif

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Either the sleeper sees this before it sleeps, or it is seen here: both are sequentially consistent. */
static void ring_bell(exchange_bell *bell) {
    atomic_fetch_add_explicit(&bell->rung, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&bell->sleepers, memory_order_seq_cst) != 0) wake(&bell->rung);
}

/* ---- frames ---- */

exchange_status exchange_publish(exchange_ring *ring, exchange_bell *bell, uint64_t number, const void *frame,
                                 size_t length) {
    if (number == 0 || length > EXCHANGE_FRAME_BYTES) return EXCHANGE_BAD_ARGUMENT;
    const uint64_t taken = atomic_load_explicit(&ring->taken, memory_order_acquire);
    if (taken >= number) return EXCHANGE_CORRUPT;
    if (number - taken > EXCHANGE_SLOTS) return EXCHANGE_FULL;

    exchange_slot *slot = slot_of(ring, number);
    if (length > 0) memcpy(slot->bytes, frame, length);
    atomic_store_explicit(&slot->length, (uint32_t)length, memory_order_relaxed);
    atomic_store_explicit(&slot->number, number, memory_order_release);
    ring_bell(bell);
    return EXCHANGE_OK;
}

exchange_status exchange_take(exchange_ring *ring, uint64_t number, void *frame, size_t *length) {
    if (number == 0) return EXCHANGE_BAD_ARGUMENT;
    exchange_slot *slot = slot_of(ring, number);
    const uint64_t there = atomic_load_explicit(&slot->number, memory_order_acquire);
    if (there != number) {
        const uint64_t before = number > EXCHANGE_SLOTS ? number - EXCHANGE_SLOTS : 0;
        return there == before ? EXCHANGE_NOTHING : EXCHANGE_CORRUPT;
    }
    const uint32_t bytes = atomic_load_explicit(&slot->length, memory_order_relaxed);
    if (bytes > EXCHANGE_FRAME_BYTES) return EXCHANGE_CORRUPT;
    if (bytes > 0) memcpy(frame, slot->bytes, bytes);
    *length = bytes;
    atomic_store_explicit(&ring->taken, number, memory_order_release); /* from here on the writer may write here */
    return EXCHANGE_OK;
}

uint32_t exchange_rung(exchange_bell *bell) { return atomic_load_explicit(&bell->rung, memory_order_acquire); }

exchange_status exchange_wait(exchange_bell *bell, uint32_t seen, int64_t spin_ns, int64_t timeout_ns) {
    enum { LOOKS = 32 }; /* between two readings of the clock */
    if (exchange_rung(bell) != seen) return EXCHANGE_OK;
    const int64_t began = now_ns();
    if (spin_ns > timeout_ns) spin_ns = timeout_ns;
    while (now_ns() - began < spin_ns) {
        for (int look = 0; look < LOOKS; look++) {
            if (exchange_rung(bell) != seen) return EXCHANGE_OK;
            pause_briefly();
        }
    }
    const int64_t left = timeout_ns - (now_ns() - began);
    if (left > 0) {
        atomic_fetch_add_explicit(&bell->sleepers, 1, memory_order_seq_cst);
        if (atomic_load_explicit(&bell->rung, memory_order_seq_cst) == seen) sleep_at(&bell->rung, seen, left);
        atomic_fetch_sub_explicit(&bell->sleepers, 1, memory_order_seq_cst);
        if (exchange_rung(bell) != seen || now_ns() - began < timeout_ns) return EXCHANGE_SLEPT;
    }
    return exchange_rung(bell) != seen ? EXCHANGE_SLEPT : EXCHANGE_TIMEOUT;
}

/* ---- parcels ---- */

int exchange_parcels_fit(const exchange_parcels *parcels) {
    const size_t places = parcels->num_ranks * EXCHANGE_PLACES, least = sizeof(exchange_parcel);
    return is_aligned(parcels->window) && parcels->at >= sizeof(exchange_bell) && parcels->at % EXCHANGE_LINE == 0 &&
           parcels->place_bytes >= least && parcels->place_bytes % EXCHANGE_LINE == 0 &&
           parcels->num_ranks <= UINT32_MAX && parcels->at <= parcels->window_bytes &&
           places <= (parcels->window_bytes - parcels->at) / parcels->place_bytes;
}

static exchange_parcel *place_of(const exchange_parcels *parcels, size_t source, uint64_t number) {
    const size_t place = source * EXCHANGE_PLACES + (size_t)((number - 1) % EXCHANGE_PLACES);
    return (exchange_parcel *)((unsigned char *)parcels->window + parcels->at + place * parcels->place_bytes);
}

static uint64_t number_before(uint64_t number) { return number > EXCHANGE_PLACES ? number - EXCHANGE_PLACES : 0; }

exchange_status exchange_post(const exchange_parcels *to, size_t source, uint64_t number, const int64_t *note,
                              const void *message, size_t length) {
    if (number == 0 || source >= to->num_ranks || length > to->place_bytes - sizeof(exchange_parcel)) {
        return EXCHANGE_BAD_ARGUMENT;
    }
    exchange_parcel *parcel = place_of(to, source, number);
    const uint64_t taken = atomic_load_explicit(&parcel->taken, memory_order_acquire);
    if (taken != number_before(number)) return taken < number ? EXCHANGE_FULL : EXCHANGE_CORRUPT;

    if (length > 0) memmove(parcel + 1, message, length); /* whoever passes the window itself gets what he asked for */
    memcpy(parcel->note, note, sizeof parcel->note);
    atomic_store_explicit(&parcel->length, length, memory_order_relaxed);
    atomic_store_explicit(&parcel->number, number, memory_order_release);
    ring_bell(to->window);
    return EXCHANGE_OK;
}

/* How many parcels have still to come; EXCHANGE_CORRUPT through *status where a place cannot be as it is. */
static size_t look_for(const exchange_parcels *parcels, const int64_t *numbers, int64_t *lengths, int64_t *notes,
                       int64_t *waited_ns, int64_t waited, exchange_status *status) {
    size_t missing = 0;
    for (size_t source = 0; source < parcels->num_ranks; source++) {
        if (numbers[source] <= 0 || lengths[source] >= 0) continue;
        const uint64_t number = (uint64_t)numbers[source];
        exchange_parcel *parcel = place_of(parcels, source, number);
        const uint64_t there = atomic_load_explicit(&parcel->number, memory_order_acquire);
        if (there != number) {
            if (there != number_before(number)) *status = EXCHANGE_CORRUPT;
            missing++;
            continue;
        }
        const uint64_t length = atomic_load_explicit(&parcel->length, memory_order_relaxed);
        if (length > parcels->place_bytes - sizeof(exchange_parcel)) {
            *status = EXCHANGE_CORRUPT;
            missing++;
            continue;
        }
        memcpy(notes + source * EXCHANGE_NOTE, parcel->note, sizeof parcel->note);
        lengths[source] = (int64_t)length;
        waited_ns[source] += waited;
    }
    return missing;
}

exchange_status exchange_gather(const exchange_parcels *parcels, const int64_t *numbers, int64_t *lengths,
                                int64_t *notes, int64_t *waited_ns, int64_t spin_ns, int64_t timeout_ns,
                                int64_t *took_ns) {
    exchange_bell *bell = parcels->window;
    exchange_status status = EXCHANGE_OK, how = EXCHANGE_OK;
    const int64_t began = now_ns();
    for (int64_t waited = 0;; waited = now_ns() - began) {
        const uint32_t seen = exchange_rung(bell);
        const size_t missing = look_for(parcels, numbers, lengths, notes, waited_ns, waited, &status);
        *took_ns = waited;
        if (status != EXCHANGE_OK) return status;
        if (missing == 0) return how;
        if (waited >= timeout_ns) {
            for (size_t source = 0; source < parcels->num_ranks; source++) {
                if (numbers[source] > 0 && lengths[source] < 0) waited_ns[source] += waited;
            }
            return EXCHANGE_TIMEOUT;
        }
        if (exchange_wait(bell, seen, spin_ns, timeout_ns - waited) == EXCHANGE_SLEPT) how = EXCHANGE_SLEPT;
    }
}

exchange_status exchange_fetch(const exchange_parcels *parcels, size_t source, uint64_t number, void *message,
                               size_t length) {
    if (number == 0 || source >= parcels->num_ranks || length > parcels->place_bytes - sizeof(exchange_parcel)) {
        return EXCHANGE_BAD_ARGUMENT;
    }
    exchange_parcel *parcel = place_of(parcels, source, number);
    if (atomic_load_explicit(&parcel->number, memory_order_acquire) != number) return EXCHANGE_CORRUPT;
    if (length > 0) memmove(message, parcel + 1, length);
    atomic_store_explicit(&parcel->taken, number, memory_order_release);
    return EXCHANGE_OK;
}
