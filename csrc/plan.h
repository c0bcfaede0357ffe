/* The dispatch plan: which token rows go to which rank, and which received rows feed which local slot.
 *
 * Plain C11: no Python, no torch, no allocation. The caller owns every buffer, scratch included, and makes two calls:
 * `count`, which says how large the outputs are, then `fill`. Both are counting sorts: dispatch takes
 * O(T * K + S + R + N * K) time, expand O(N * K + S), and both are stable.
 *
 * Nothing here trusts what it reads. `fill` checks every slot again and never writes past the counts it was given,
 * so inputs that another thread changes between or during the calls give a wrong plan or an error, not a write
 * outside the outputs. Outputs and scratch must not overlap each other or the inputs.
 *
 * Letters: T tokens, K top-k, S global slots, R ranks, N rows, M entries that name a slot.
 * Slots are -1 for "not selected"; anything below -1 or past the last slot is an error.
 */
#ifndef MOE_RUNTIME_PLAN_H
#define MOE_RUNTIME_PLAN_H

#include <stdint.h>

typedef enum {
    PLAN_OK = 0,
    PLAN_BAD_ARGUMENT,   /* a negative size, or slot_bytes other than 4 and 8 */
    PLAN_TOO_LARGE,      /* a size whose bytes cannot be addressed, or more slots than int32 can name */
    PLAN_BAD_SLOT,       /* fault: row and k of the entry, value of the slot */
    PLAN_BAD_RANK,       /* fault: row is the slot, value the rank it claims to live on */
    PLAN_RANKS_DECREASE, /* fault: row is the first slot whose rank is below its predecessor's, value that rank */
    PLAN_BAD_COUNT,      /* fault: row is the rank or slot whose count does not belong to these inputs, value it */
} plan_status;

/* Where an error is; only meaningful for the statuses that say so. */
typedef struct {
    int64_t row;
    int64_t k;
    int64_t value;
} plan_fault;

/* A row-major table of slot ids, [num_rows, top_k]; slot_bytes is 4 (int32) or 8 (int64). */
typedef struct {
    const void *slots;
    int slot_bytes;
    int64_t num_rows;
    int64_t top_k;
} plan_slots;

/* The rank each global slot lives on, [num_slots], non-decreasing, within 0..num_ranks-1. */
typedef struct {
    const int32_t *slot_rank;
    int64_t num_slots;
    int64_t num_ranks;
} plan_owners;

/* Scratch of the dispatch calls, one per rank; uninitialised memory will do. */
typedef struct {
    int64_t first_slot; /* the first global slot of the rank */
    int64_t last_token; /* the token that last wrote to the rank: says whether a token already has a row there */
    int64_t row;        /* the row that token has */
    int64_t end;        /* one past the rank's last row */
} plan_cursor;

/* send_counts [R]: how many distinct tokens have a slot on each rank; *num_rows their sum, N. */
plan_status plan_dispatch_count(const plan_slots *tokens, const plan_owners *owners, plan_cursor *cursors,
                                int64_t *send_counts, int64_t *num_rows, plan_fault *fault);

/* send_tokens [N]: tokens grouped by rank, increasing inside a rank. send_slots [N, K]: the slot of each entry that
 * lives on the row's rank, counted from that rank's first slot, else -1. N must be the sum of send_counts. */
plan_status plan_dispatch_fill(const plan_slots *tokens, const plan_owners *owners, const int64_t *send_counts,
                               int64_t num_rows, plan_cursor *cursors, int64_t *send_tokens, int32_t *send_slots,
                               plan_fault *fault);

/* rows_per_slot [num_slots]: how many entries name each slot; *num_entries their sum, M. */
plan_status plan_expand_count(const plan_slots *rows, int64_t num_slots, int64_t *rows_per_slot, int64_t *num_entries,
                              plan_fault *fault);

/* row_index, k_index [M]: the entries that name a slot, sorted by slot, then row, then k. M must be the sum of
 * rows_per_slot. next_entry [num_slots] is scratch. */
plan_status plan_expand_fill(const plan_slots *rows, int64_t num_slots, const int64_t *rows_per_slot,
                             int64_t num_entries, int64_t *next_entry, int64_t *row_index, int64_t *k_index,
                             plan_fault *fault);

#endif
