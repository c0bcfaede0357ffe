/* The dispatch plan's counting sorts; plan.h says what they promise. */

#include "plan.h"

#include <stddef.h>
#include <string.h>

static plan_status fail(plan_fault *fault, plan_status status, int64_t row, int64_t k, int64_t value) {
    *fault = (plan_fault){.row = row, .k = k, .value = value};
    return status;
}

/* Whether a table of `rows` by `columns` items can be addressed, so that index arithmetic cannot overflow. */
static plan_status check_size(int64_t rows, int64_t columns, size_t item_bytes) {
    if (rows < 0 || columns < 0) return PLAN_BAD_ARGUMENT;
    const uint64_t limit = (uint64_t)PTRDIFF_MAX / item_bytes;
    if ((uint64_t)rows > limit || (uint64_t)columns > limit) return PLAN_TOO_LARGE;
    if (rows != 0 && (uint64_t)columns > limit / (uint64_t)rows) return PLAN_TOO_LARGE;
    return PLAN_OK;
}

static plan_status check_slots(const plan_slots *table) {
    if (table->slot_bytes != 4 && table->slot_bytes != 8) return PLAN_BAD_ARGUMENT;
    return check_size(table->num_rows, table->top_k, (size_t)table->slot_bytes);
}

/* A table of no columns has nothing to read, yet it may claim any number of rows: do not count to 2^60. */
static int64_t rows_to_read(const plan_slots *table) { return table->top_k == 0 ? 0 : table->num_rows; }

static inline int64_t slot_at(const plan_slots *table, int64_t index) {
    return table->slot_bytes == 8 ? ((const int64_t *)table->slots)[index] : ((const int32_t *)table->slots)[index];
}

/* Sets every cursor to "no token yet", and to its rank's first slot (0 for a rank without slots: never read). */
static plan_status start_cursors(const plan_owners *owners, plan_cursor *cursors, plan_fault *fault) {
    plan_status status = check_size(owners->num_ranks, 1, sizeof *cursors);
    if (status == PLAN_OK) status = check_size(owners->num_slots, 1, sizeof *owners->slot_rank);
    if (status == PLAN_OK && owners->num_slots > INT32_MAX) status = PLAN_TOO_LARGE;
    if (status != PLAN_OK) return status;

    for (int64_t rank = 0; rank < owners->num_ranks; rank++) {
        cursors[rank] = (plan_cursor){.first_slot = 0, .last_token = -1, .row = 0, .end = 0};
    }
    int64_t previous = -1;
    for (int64_t slot = 0; slot < owners->num_slots; slot++) {
        const int64_t rank = owners->slot_rank[slot];
        if (rank < 0 || rank >= owners->num_ranks) return fail(fault, PLAN_BAD_RANK, slot, 0, rank);
        if (rank < previous) return fail(fault, PLAN_RANKS_DECREASE, slot, 0, rank);
        if (rank > previous) cursors[rank].first_slot = slot;
        previous = rank;
    }
    return PLAN_OK;
}

/* The rank of a slot that was read from a table; both are checked at the moment of use. */
static inline plan_status find_rank(const plan_owners *owners, int64_t slot, int64_t token, int64_t k, int64_t *rank,
                                    plan_fault *fault) {
    if (slot < 0 || slot >= owners->num_slots) return fail(fault, PLAN_BAD_SLOT, token, k, slot);
    *rank = owners->slot_rank[slot];
    if (*rank < 0 || *rank >= owners->num_ranks) return fail(fault, PLAN_BAD_RANK, slot, 0, *rank);
    return PLAN_OK;
}

plan_status plan_dispatch_count(const plan_slots *tokens, const plan_owners *owners, plan_cursor *restrict cursors,
                                int64_t *restrict send_counts, int64_t *num_rows, plan_fault *fault) {
    plan_status status = check_slots(tokens);
    if (status == PLAN_OK) status = start_cursors(owners, cursors, fault);
    if (status != PLAN_OK) return status;

    const plan_slots table = *tokens;
    const plan_owners owned = *owners;
    const int64_t num_tokens = rows_to_read(&table);
    int64_t total = 0;
    for (int64_t rank = 0; rank < owned.num_ranks; rank++) send_counts[rank] = 0;
    for (int64_t token = 0; token < num_tokens; token++) {
        for (int64_t k = 0; k < table.top_k; k++) {
            const int64_t slot = slot_at(&table, token * table.top_k + k);
            if (slot == -1) continue;
            int64_t rank;
            status = find_rank(&owned, slot, token, k, &rank, fault);
            if (status != PLAN_OK) return status;
            /* Added, not branched on: with many ranks no branch predictor guesses which entry is the first. */
            const int64_t is_first = cursors[rank].last_token != token;
            cursors[rank].last_token = token;
            send_counts[rank] += is_first;
            total += is_first;
        }
    }
    *num_rows = total;
    return PLAN_OK;
}

/* Gives each group (a rank's rows, a slot's entries) its part of 0..total-1; the counts must fill it exactly. */
static plan_status take_count(int64_t group, int64_t count, int64_t total, int64_t *start, plan_fault *fault) {
    if (count < 0 || count > total - *start) return fail(fault, PLAN_BAD_COUNT, group, 0, count);
    *start += count;
    return PLAN_OK;
}

plan_status plan_dispatch_fill(const plan_slots *tokens, const plan_owners *owners, const int64_t *send_counts,
                               int64_t num_rows, plan_cursor *restrict cursors, int64_t *restrict send_tokens,
                               int32_t *restrict send_slots, plan_fault *fault) {
    plan_status status = check_slots(tokens);
    if (status == PLAN_OK) status = check_size(num_rows, 1, sizeof *send_tokens);
    if (status == PLAN_OK) status = check_size(num_rows, tokens->top_k, sizeof *send_slots);
    if (status == PLAN_OK) status = start_cursors(owners, cursors, fault);
    if (status != PLAN_OK) return status;

    const plan_slots table = *tokens;
    const plan_owners owned = *owners;
    const int64_t num_tokens = rows_to_read(&table);
    int64_t start = 0;
    for (int64_t rank = 0; rank < owned.num_ranks; rank++) {
        cursors[rank].row = start - 1; /* the rank's first token steps onto `start` */
        status = take_count(rank, send_counts[rank], num_rows, &start, fault);
        if (status != PLAN_OK) return status;
        cursors[rank].end = start;
    }
    if (start != num_rows) return fail(fault, PLAN_BAD_COUNT, owned.num_ranks, 0, start);

    if (num_rows > 0) memset(send_slots, 0xff, (size_t)num_rows * (size_t)table.top_k * sizeof *send_slots); /* -1 */
    for (int64_t token = 0; token < num_tokens; token++) {
        for (int64_t k = 0; k < table.top_k; k++) {
            const int64_t slot = slot_at(&table, token * table.top_k + k);
            if (slot == -1) continue;
            int64_t rank;
            status = find_rank(&owned, slot, token, k, &rank, fault);
            if (status != PLAN_OK) return status;
            plan_cursor *cursor = &cursors[rank];
            cursor->row += cursor->last_token != token;
            cursor->last_token = token;
            if (cursor->row >= cursor->end) return fail(fault, PLAN_BAD_COUNT, rank, 0, send_counts[rank]);
            send_tokens[cursor->row] = token;
            send_slots[cursor->row * table.top_k + k] = (int32_t)(slot - cursor->first_slot);
        }
    }
    for (int64_t rank = 0; rank < owned.num_ranks; rank++) {
        if (cursors[rank].row + 1 != cursors[rank].end) return fail(fault, PLAN_BAD_COUNT, rank, 0, send_counts[rank]);
    }
    return PLAN_OK;
}

plan_status plan_expand_count(const plan_slots *rows, int64_t num_slots, int64_t *restrict rows_per_slot,
                              int64_t *num_entries, plan_fault *fault) {
    plan_status status = check_slots(rows);
    if (status == PLAN_OK) status = check_size(num_slots, 1, sizeof *rows_per_slot);
    if (status != PLAN_OK) return status;

    const plan_slots table = *rows;
    const int64_t num_rows = rows_to_read(&table);
    int64_t total = 0;
    for (int64_t slot = 0; slot < num_slots; slot++) rows_per_slot[slot] = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        for (int64_t k = 0; k < table.top_k; k++) {
            const int64_t slot = slot_at(&table, row * table.top_k + k);
            if (slot == -1) continue;
            if (slot < 0 || slot >= num_slots) return fail(fault, PLAN_BAD_SLOT, row, k, slot);
            rows_per_slot[slot]++;
            total++;
        }
    }
    *num_entries = total;
    return PLAN_OK;
}

plan_status plan_expand_fill(const plan_slots *rows, int64_t num_slots, const int64_t *rows_per_slot,
                             int64_t num_entries, int64_t *restrict next_entry, int64_t *restrict row_index,
                             int64_t *restrict k_index, plan_fault *fault) {
    plan_status status = check_slots(rows);
    if (status == PLAN_OK) status = check_size(num_slots, 1, sizeof *next_entry);
    if (status == PLAN_OK) status = check_size(num_entries, 1, sizeof *row_index);
    if (status != PLAN_OK) return status;

    const plan_slots table = *rows;
    const int64_t num_rows = rows_to_read(&table);
    int64_t start = 0;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        next_entry[slot] = start;
        status = take_count(slot, rows_per_slot[slot], num_entries, &start, fault);
        if (status != PLAN_OK) return status;
    }
    if (start != num_entries) return fail(fault, PLAN_BAD_COUNT, num_slots, 0, start);

    for (int64_t row = 0; row < num_rows; row++) {
        for (int64_t k = 0; k < table.top_k; k++) {
            const int64_t slot = slot_at(&table, row * table.top_k + k);
            if (slot == -1) continue;
            if (slot < 0 || slot >= num_slots) return fail(fault, PLAN_BAD_SLOT, row, k, slot);
            const int64_t entry = next_entry[slot]++;
            if (entry >= num_entries) return fail(fault, PLAN_BAD_COUNT, slot, 0, rows_per_slot[slot]);
            row_index[entry] = row;
            k_index[entry] = k;
        }
    }
    /* A slot that ran over into the next slot's part is caught here: each must have stopped where its part ends. */
    start = 0;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        status = take_count(slot, rows_per_slot[slot], num_entries, &start, fault);
        if (status != PLAN_OK) return status;
        if (next_entry[slot] != start) return fail(fault, PLAN_BAD_COUNT, slot, 0, rows_per_slot[slot]);
    }
    return PLAN_OK;
}
