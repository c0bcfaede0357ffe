/* Frames and parcels between the ranks of one host: numbered places in shared memory, and a bell to wait at.
 *
 * Plain C11 with Linux's futex: no Python, no torch, no allocation. A rank's window begins with its bell and one ring
 * for each rank that writes to it. A ring has one writer and one reader. The writer fills a slot, then stores the
 * frame's number in it (release); the reader who sees the number (acquire) sees the frame, and everything else that
 * the writer wrote before it, such as rows in the same window. The bell counts frames of all rings, so that a rank can
 * wait for whoever comes first.
 *
 * A parcel is a whole message with a note of five numbers on it. Each two ranks have two places each way, and send each
 * other one parcel at a time: who has received parcel n knows that the other has taken n - 1, so that n + 1 finds its
 * place empty and nobody has to say that it is.
 *
 * All memory starts as zeros, and frames and parcels are numbered from 1. Nothing here trusts what it reads: a number, a length or
 * a count that no writer of this file could have left is EXCHANGE_CORRUPT, and no length is used before it is checked.
 */
#ifndef MOE_RUNTIME_EXCHANGE_H
#define MOE_RUNTIME_EXCHANGE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum {
    EXCHANGE_LINE = 64,         /* bytes of a cache line, or two of one */
    EXCHANGE_SLOTS = 16,        /* of a ring */
    EXCHANGE_FRAME_BYTES = 304, /* the longest frame; the first 48 bytes share the number's cache line */
    EXCHANGE_PLACES = 2,        /* for parcels, of one rank in another's window */
    EXCHANGE_NOTE = 5,          /* numbers of a parcel's note */
};

typedef enum {
    EXCHANGE_OK = 0,
    EXCHANGE_NOTHING, /* the next frame is not there yet */
    EXCHANGE_SLEPT,   /* as EXCHANGE_OK, after a sleep: spinning was in vain */
    EXCHANGE_TIMEOUT,
    EXCHANGE_FULL,    /* the reader has not taken the frame that lies where this one belongs */
    EXCHANGE_CORRUPT, /* memory holds what this protocol does not write */
    EXCHANGE_BAD_ARGUMENT,
} exchange_status;

/* Written by all other ranks, waited at by the window's owner. */
typedef struct {
    _Alignas(EXCHANGE_LINE) _Atomic uint32_t rung; /* frames ever published to this rank: what the futex compares */
    _Atomic uint32_t sleepers;                     /* so that nobody is woken by a system call who does not sleep */
} exchange_bell;

typedef struct {
    _Alignas(EXCHANGE_LINE) _Atomic uint64_t number;
    _Atomic uint32_t length;
    uint32_t unused;
    unsigned char bytes[EXCHANGE_FRAME_BYTES];
} exchange_slot;

typedef struct {
    _Alignas(EXCHANGE_LINE) _Atomic uint64_t taken; /* the number of the last frame that the reader has taken */
    exchange_slot slots[EXCHANGE_SLOTS];
} exchange_ring;

/* The head of a parcel's place; the message follows it. */
typedef struct {
    _Alignas(EXCHANGE_LINE) _Atomic uint64_t number;
    _Atomic uint64_t taken; /* the number of the last parcel that the reader has taken from this place */
    _Atomic uint64_t length;
    int64_t note[EXCHANGE_NOTE];
} exchange_parcel;

/* Where parcels lie in a window of num_ranks ranks: from byte `at` on, EXCHANGE_PLACES of place_bytes for each rank. */
typedef struct {
    void *window;
    size_t window_bytes, at, place_bytes, num_ranks;
} exchange_parcels;

/* Bytes that the bell and the rings of `num_ranks` ranks take at the start of a window. */
size_t exchange_bytes(size_t num_ranks);

/* The bell, and the ring that rank `source` writes, of a window; NULL unless it is aligned and long enough. */
exchange_bell *exchange_bell_of(void *window, size_t window_bytes);
exchange_ring *exchange_ring_of(void *window, size_t window_bytes, size_t source);

/* Publishes frame `number` of this ring, of 0..EXCHANGE_FRAME_BYTES bytes, and wakes the reader. Never waits. */
exchange_status exchange_publish(exchange_ring *ring, exchange_bell *bell, uint64_t number, const void *frame,
                                 size_t length);

/* Takes frame `number` into `frame` [EXCHANGE_FRAME_BYTES] if it is there. */
exchange_status exchange_take(exchange_ring *ring, uint64_t number, void *frame, size_t *length);

/* What the bell shows: read it, take frames until none is left, then wait from there, and no frame is missed. */
uint32_t exchange_rung(exchange_bell *bell);

/* Waits until the bell shows other than `seen`: spins for up to spin_ns, then sleeps, timeout_ns in all. May return
 * EXCHANGE_SLEPT without a ring when a signal comes. */
exchange_status exchange_wait(exchange_bell *bell, uint32_t seen, int64_t spin_ns, int64_t timeout_ns);

/* Whether the places are aligned and lie inside the window, after its bell; asked before any is used. */
int exchange_parcels_fit(const exchange_parcels *parcels);

/* Puts parcel `number` of rank `source` into its place in another rank's window, and rings there. Never waits. */
exchange_status exchange_post(const exchange_parcels *to, size_t source, uint64_t number, const int64_t *note,
                              const void *message, size_t length);

/* Waits, as exchange_wait does, until every rank r with numbers[r] > 0 and lengths[r] < 0 has sent that parcel;
 * lengths[r], notes[r] and waited_ns[r], which is added to, are set for each that has come, also where the time is up
 * for others. took_ns: how long this call waited. */
exchange_status exchange_gather(const exchange_parcels *parcels, const int64_t *numbers, int64_t *lengths,
                                int64_t *notes, int64_t *waited_ns, int64_t spin_ns, int64_t timeout_ns,
                                int64_t *took_ns);

/* Copies the `length` bytes of a parcel that was gathered, and gives its place back. */
exchange_status exchange_fetch(const exchange_parcels *parcels, size_t source, uint64_t number, void *message,
                               size_t length);

#endif
