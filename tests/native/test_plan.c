/* csrc/plan.c against brute force: random and adversarial cases. tests/test_native.py builds it with sanitizers;
 * every buffer is a heap block of exactly its size, so that one item too far is caught. */

#include "plan.h"
#include "check.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Garbage-filled, so that nothing passes because memory happened to be zero. */
static void *block(int64_t count, size_t item_bytes) {
    const size_t bytes = (size_t)count * item_bytes;
    void *memory = malloc(bytes);
    REQUIRE(memory != NULL || bytes == 0);
    if (bytes > 0) memset(memory, 0xa5, bytes);
    return memory;
}

typedef struct {
    plan_slots table;
    plan_owners owners;
    void *slots;
    int32_t *slot_rank;
} routing;

static void set_slot(routing *r, int64_t index, int64_t slot) {
    if (r->table.slot_bytes == 8) ((int64_t *)r->slots)[index] = slot;
    else ((int32_t *)r->slots)[index] = (int32_t)slot;
}

static int64_t get_slot(const routing *r, int64_t row, int64_t k) {
    const int64_t index = row * r->table.top_k + k;
    return r->table.slot_bytes == 8 ? ((int64_t *)r->slots)[index] : ((int32_t *)r->slots)[index];
}

static routing new_routing(int64_t num_rows, int64_t top_k, int slot_bytes, int64_t num_slots, int64_t num_ranks) {
    routing r;
    r.slots = block(num_rows * top_k, (size_t)slot_bytes);
    r.slot_rank = block(num_slots, sizeof *r.slot_rank);
    r.table = (plan_slots){r.slots, slot_bytes, num_rows, top_k};
    r.owners = (plan_owners){r.slot_rank, num_slots, num_ranks};
    /* Non-decreasing with jumps: some ranks hold nothing. */
    int64_t rank = random_in(0, num_ranks - 1);
    for (int64_t slot = 0; slot < num_slots; slot++) {
        r.slot_rank[slot] = (int32_t)rank;
        if (random_in(0, 2) == 0) rank = random_in(rank, num_ranks - 1);
    }
    for (int64_t i = 0; i < num_rows * top_k; i++) set_slot(&r, i, random_in(-1, num_slots - 1));
    return r;
}

static void free_routing(routing *r) {
    free(r->slots);
    free(r->slot_rank);
}

/* ---------------------------------------------------------------- brute force */

static int64_t first_slot_of(const routing *r, int64_t rank) {
    int64_t slot = 0;
    while (r->slot_rank[slot] != rank) slot++;
    return slot;
}

static bool lives_on(const routing *r, int64_t slot, int64_t rank) { return slot >= 0 && r->slot_rank[slot] == rank; }

static void check_dispatch(const routing *r) {
    const int64_t num_ranks = r->owners.num_ranks, top_k = r->table.top_k;
    int64_t *counts = block(num_ranks, sizeof *counts);
    plan_cursor *cursors = block(num_ranks, sizeof *cursors);
    plan_fault fault;
    int64_t num_rows = -1;
    REQUIRE(plan_dispatch_count(&r->table, &r->owners, cursors, counts, &num_rows, &fault) == PLAN_OK);
    int64_t *tokens = block(num_rows, sizeof *tokens);
    int32_t *slots = block(num_rows * top_k, sizeof *slots);
    REQUIRE(plan_dispatch_fill(&r->table, &r->owners, counts, num_rows, cursors, tokens, slots, &fault) == PLAN_OK);

    int64_t row = 0;
    for (int64_t rank = 0; rank < num_ranks; rank++) {
        const int64_t begin = row;
        for (int64_t token = 0; token < r->table.num_rows; token++) {
            bool goes = false;
            for (int64_t k = 0; k < top_k; k++) goes = goes || lives_on(r, get_slot(r, token, k), rank);
            if (!goes) continue;
            REQUIRE(row < num_rows && tokens[row] == token);
            for (int64_t k = 0; k < top_k; k++) {
                const int64_t slot = get_slot(r, token, k);
                const int64_t expected = lives_on(r, slot, rank) ? slot - first_slot_of(r, rank) : -1;
                REQUIRE(slots[row * top_k + k] == expected);
            }
            row++;
        }
        REQUIRE(counts[rank] == row - begin);
    }
    REQUIRE(row == num_rows);
    free(slots);
    free(tokens);
    free(cursors);
    free(counts);
}

static void check_expand(const routing *r) {
    const int64_t num_slots = r->owners.num_slots, top_k = r->table.top_k;
    int64_t *rows_per_slot = block(num_slots, sizeof *rows_per_slot);
    int64_t *next_entry = block(num_slots, sizeof *next_entry);
    plan_fault fault;
    int64_t num_entries = -1;
    REQUIRE(plan_expand_count(&r->table, num_slots, rows_per_slot, &num_entries, &fault) == PLAN_OK);
    int64_t *row_index = block(num_entries, sizeof *row_index);
    int64_t *k_index = block(num_entries, sizeof *k_index);
    const plan_status status =
        plan_expand_fill(&r->table, num_slots, rows_per_slot, num_entries, next_entry, row_index, k_index, &fault);
    REQUIRE(status == PLAN_OK);

    int64_t entry = 0;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int64_t begin = entry;
        for (int64_t row = 0; row < r->table.num_rows; row++) {
            for (int64_t k = 0; k < top_k; k++) {
                if (get_slot(r, row, k) != slot) continue;
                REQUIRE(entry < num_entries && row_index[entry] == row && k_index[entry] == k);
                entry++;
            }
        }
        REQUIRE(rows_per_slot[slot] == entry - begin);
    }
    REQUIRE(entry == num_entries);
    free(k_index);
    free(row_index);
    free(next_entry);
    free(rows_per_slot);
}

static void check(const routing *r) {
    check_dispatch(r);
    check_expand(r);
}

/* ---------------------------------------------------------------- cases */

static void test_random(void) {
    for (int i = 0; i < 3000; i++) {
        routing r = new_routing(random_in(0, 40), random_in(1, 9), i % 2 ? 4 : 8, random_in(0, 24), random_in(1, 10));
        check(&r);
        free_routing(&r);
    }
}

static void test_shapes_at_the_edge(void) {
    const int64_t shapes[][4] = {
        /* rows, top_k, slots, ranks */
        {0, 8, 4, 2}, {5, 0, 4, 2},   {1, 1, 1, 1},   {1, 64, 1, 1},
        {7, 3, 0, 5}, {9, 8, 3, 300}, {600, 1, 2, 2}, {0, 0, 0, 1},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        routing r = new_routing(shapes[i][0], shapes[i][1], i % 2 ? 4 : 8, shapes[i][2], shapes[i][3]);
        check(&r);
        free_routing(&r);
    }
}

static void test_one_value_everywhere(void) {
    for (int64_t slot = -1; slot < 6; slot++) { /* nothing selected; all to one slot, repeated within each token */
        routing r = new_routing(33, 8, 4, 6, 3);
        for (int64_t i = 0; i < 33 * 8; i++) set_slot(&r, i, slot);
        check(&r);
        free_routing(&r);
    }
}

static void test_bad_slots_are_named(void) {
    const int64_t wrong[] = {
        -2, 6, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, INT64_C(1) << 32, (INT64_C(1) << 32) + 1,
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        for (int slot_bytes = 4; slot_bytes <= 8; slot_bytes += 4) {
            if (slot_bytes == 4 && (wrong[i] < INT32_MIN || wrong[i] > INT32_MAX)) continue;
            routing r = new_routing(20, 5, slot_bytes, 6, 3);
            const int64_t row = random_in(0, 19), k = random_in(0, 4);
            set_slot(&r, row * 5 + k, wrong[i]);
            set_slot(&r, 19 * 5 + 4, wrong[i]); /* a later one must not be the one that is named */
            int64_t counts[6], total, scratch[6], rows[100], ks[100];
            int32_t slots[100 * 5];
            plan_cursor cursors[3];
            plan_fault fault = {-9, -9, -9};
            REQUIRE(plan_dispatch_count(&r.table, &r.owners, cursors, counts, &total, &fault) == PLAN_BAD_SLOT);
            REQUIRE(fault.row == row && fault.k == k && fault.value == wrong[i]);
            REQUIRE(plan_expand_count(&r.table, 6, counts, &total, &fault) == PLAN_BAD_SLOT);
            REQUIRE(fault.row == row && fault.k == k && fault.value == wrong[i]);
            /* The fill calls do not rely on the count calls to have looked. */
            const int64_t roomy[] = {20, 20, 20, 20, 20, 0};
            REQUIRE(plan_dispatch_fill(&r.table, &r.owners, roomy, 60, cursors, rows, slots, &fault) == PLAN_BAD_SLOT);
            REQUIRE(fault.row == row && fault.k == k && fault.value == wrong[i]);
            REQUIRE(plan_expand_fill(&r.table, 6, roomy, 100, scratch, rows, ks, &fault) != PLAN_OK);
            free_routing(&r);
        }
    }
}

static void test_bad_owners_are_named(void) {
    routing r = new_routing(4, 2, 4, 5, 3);
    const struct {
        int32_t slot_rank[5];
        plan_status status;
        int64_t slot, rank;
    } cases[] = {
        {{0, 0, 3, 3, 3}, PLAN_BAD_RANK, 2, 3},
        {{-1, 0, 0, 0, 0}, PLAN_BAD_RANK, 0, -1},
        {{0, 1, 1, 2, INT32_MAX}, PLAN_BAD_RANK, 4, INT32_MAX},
        {{0, 1, 0, 2, 2}, PLAN_RANKS_DECREASE, 2, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memcpy(r.slot_rank, cases[i].slot_rank, sizeof cases[i].slot_rank);
        int64_t counts[3] = {8, 0, 0}, total, tokens[8];
        int32_t slots[16];
        plan_cursor cursors[3];
        plan_fault fault;
        REQUIRE(plan_dispatch_count(&r.table, &r.owners, cursors, counts, &total, &fault) == cases[i].status);
        REQUIRE(fault.row == cases[i].slot && fault.value == cases[i].rank);
        REQUIRE(plan_dispatch_fill(&r.table, &r.owners, counts, 8, cursors, tokens, slots, &fault) == cases[i].status);
    }
    free_routing(&r);
}

/* Counts that were taken from other inputs, or made up: an error, never a write outside the outputs. */
static void test_made_up_counts(void) {
    const int64_t strange[] = {0, 1, 2, 3, 7, -1, INT64_MAX, INT64_MIN, INT64_C(1) << 62};
    const int64_t choices = sizeof strange / sizeof *strange;
    for (int i = 0; i < 20000; i++) {
        const int64_t ranks = random_in(1, 4), top_k = random_in(1, 4), num_slots = random_in(1, 5);
        routing r = new_routing(random_in(0, 6), top_k, 4, num_slots, ranks);
        int64_t real[5], given[5], total, num_rows = random_in(0, 12);
        plan_cursor cursors[4];
        plan_fault fault;
        for (int j = 0; j < 5; j++) given[j] = strange[random_in(0, i % 2 ? 4 : choices - 1)];
        int64_t *first = block(num_rows, sizeof *first), *second = block(num_rows, sizeof *second), scratch[5];
        int32_t *slots = block(num_rows * top_k, sizeof *slots);

        REQUIRE(plan_dispatch_count(&r.table, &r.owners, cursors, real, &total, &fault) == PLAN_OK);
        bool same = total == num_rows && memcmp(real, given, (size_t)ranks * sizeof *real) == 0;
        plan_status status = plan_dispatch_fill(&r.table, &r.owners, given, num_rows, cursors, first, slots, &fault);
        REQUIRE(status == (same ? PLAN_OK : PLAN_BAD_COUNT));

        REQUIRE(plan_expand_count(&r.table, num_slots, real, &total, &fault) == PLAN_OK);
        same = total == num_rows && memcmp(real, given, (size_t)num_slots * sizeof *real) == 0;
        status = plan_expand_fill(&r.table, num_slots, given, num_rows, scratch, first, second, &fault);
        REQUIRE(status == (same ? PLAN_OK : PLAN_BAD_COUNT));
        free(slots);
        free(second);
        free(first);
        free_routing(&r);
    }
}

/* Sizes whose product overflows are refused before anything is read: the pointers here are not valid for them. */
static void test_sizes_that_overflow(void) {
    int32_t one_slot = 0, one_rank = 0, local;
    int64_t count, total, entry, out;
    plan_cursor cursor;
    plan_fault fault;
    const plan_owners owners = {&one_rank, 1, 1};
    const int64_t sizes[][2] = {
        {INT64_MAX, 1},         {1, INT64_MAX}, {INT64_MAX, INT64_MAX}, {INT64_C(1) << 32, INT64_C(1) << 32},
        {INT64_C(1) << 61, 4},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const plan_slots table = {&one_slot, 4, sizes[i][0], sizes[i][1]};
        REQUIRE(plan_dispatch_count(&table, &owners, &cursor, &count, &total, &fault) == PLAN_TOO_LARGE);
        REQUIRE(plan_expand_count(&table, 1, &count, &total, &fault) == PLAN_TOO_LARGE);
        count = 0;
        REQUIRE(plan_dispatch_fill(&table, &owners, &count, 0, &cursor, &out, &local, &fault) == PLAN_TOO_LARGE);
        REQUIRE(plan_expand_fill(&table, 1, &count, 0, &entry, &out, &out, &fault) == PLAN_TOO_LARGE);
    }
    const plan_slots table = {&one_slot, 4, 1, 1};
    const plan_owners many_slots = {&one_rank, INT64_C(1) << 31, 1}, many_ranks = {&one_rank, 1, INT64_MAX};
    REQUIRE(plan_dispatch_count(&table, &many_slots, &cursor, &count, &total, &fault) == PLAN_TOO_LARGE);
    REQUIRE(plan_dispatch_count(&table, &many_ranks, &cursor, &count, &total, &fault) == PLAN_TOO_LARGE);
    REQUIRE(plan_expand_count(&table, INT64_MAX, &count, &total, &fault) == PLAN_TOO_LARGE);
    count = 1;
    REQUIRE(plan_dispatch_fill(&table, &owners, &count, INT64_MAX, &cursor, &out, &local, &fault) == PLAN_TOO_LARGE);
    REQUIRE(plan_expand_fill(&table, 1, &count, INT64_MAX, &entry, &out, &out, &fault) == PLAN_TOO_LARGE);

    const plan_slots negative = {&one_slot, 4, -1, 1}, odd = {&one_slot, 2, 1, 1};
    REQUIRE(plan_expand_count(&negative, 1, &count, &total, &fault) == PLAN_BAD_ARGUMENT);
    REQUIRE(plan_expand_count(&odd, 1, &count, &total, &fault) == PLAN_BAD_ARGUMENT);
    REQUIRE(plan_expand_count(&table, -1, &count, &total, &fault) == PLAN_BAD_ARGUMENT);
}

/* A table of no columns may claim any number of rows; nobody counts that far. */
static void test_endless_rows_of_no_columns(void) {
    const int32_t rank = 0;
    const plan_slots table = {NULL, 4, INT64_C(1) << 50, 0};
    const plan_owners owners = {&rank, 1, 1};
    int64_t count = -1, total = -1;
    plan_cursor cursor;
    plan_fault fault;
    REQUIRE(plan_dispatch_count(&table, &owners, &cursor, &count, &total, &fault) == PLAN_OK);
    REQUIRE(total == 0 && count == 0);
    total = count = -1;
    REQUIRE(plan_expand_count(&table, 1, &count, &total, &fault) == PLAN_OK);
    REQUIRE(total == 0 && count == 0);
}

int main(void) {
    test_random();
    test_shapes_at_the_edge();
    test_one_value_everywhere();
    test_bad_slots_are_named();
    test_bad_owners_are_named();
    test_made_up_counts();
    test_sizes_that_overflow();
    test_endless_rows_of_no_columns();
    puts("plan: all cases passed");
    return 0;
}
