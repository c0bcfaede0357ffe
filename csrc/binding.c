/* moe_runtime._C: the only file that knows both Python and the C plan.
 *
 * It takes arrays by the buffer protocol, checks all of them before one pointer is used, and releases the GIL while
 * plan.c works. Every argument that cannot be used is a ValueError that names the argument. Callers allocate the
 * outputs; moe_runtime.comm.plan is the public face.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "exchange.h"
#include "experts.h"
#include "plan.h"
#include "rows.h"

enum { MAX_ARGUMENTS = 5, MAX_DIMENSIONS = 2 };

typedef enum { INT32 = 4, INT64 = 8, INT32_OR_INT64 = 12 } integer_kind; /* a mask of item sizes in bytes */
typedef enum { INPUT = 0, OUTPUT = 1 } direction;

/* What one positional argument has to be. */
typedef struct {
    const char *name;
    int dimensions;
    integer_kind kind;
    direction direction;
} argument_rule;

/* The arguments of one call, held until release_arguments. */
typedef struct {
    const argument_rule *rules;
    int num_held;
    Py_buffer views[MAX_ARGUMENTS];
} arguments;

static void release_arguments(arguments *held) {
    while (held->num_held > 0) PyBuffer_Release(&held->views[--held->num_held]);
}

static const char not_writable[] = "must be an array that can be written to";

static int refuse(const char *name, const char *what) {
    PyErr_Format(PyExc_ValueError, "%s: %s", name, what);
    return -1;
}

/* Exporters refuse with BufferError, TypeError or ValueError; callers of this module see ValueError only. */
static int refuse_exporter(const argument_rule *rule) {
    if (!PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_TypeError) &&
        !PyErr_ExceptionMatches(PyExc_ValueError)) {
        return -1;
    }
    PyErr_Clear();
    return refuse(rule->name, rule->direction == OUTPUT ? not_writable : "must be an array (a strided buffer)");
}

/* Whether a struct-style format is one signed integer in this machine's byte order. */
static int is_native_integer(const char *format) {
    if (format == NULL) return 0; /* means unsigned bytes */
    const char other_order = PY_LITTLE_ENDIAN ? '>' : '<';
    if (*format == '!' || *format == other_order) return 0;
    if (strchr("@=<>", *format) != NULL && *format != '\0') format++;
    return *format != '\0' && strchr("ilqn", *format) != NULL && format[1] == '\0';
}

/* Whether the length in bytes is the shape's: every index computed from the shape then stays inside the buffer. */
static int length_matches_shape(const Py_buffer *view) {
    Py_ssize_t bytes = view->itemsize;
    for (int d = 0; d < view->ndim; d++) {
        if (view->shape[d] < 0) return 0;
        if (view->shape[d] == 0) return view->len == 0;
    }
    for (int d = 0; d < view->ndim; d++) {
        if (bytes > PY_SSIZE_T_MAX / view->shape[d]) return 0;
        bytes *= view->shape[d];
    }
    return view->len == bytes;
}

static int check_view(const Py_buffer *view, const argument_rule *rule) {
    if ((view->itemsize != 4 && view->itemsize != 8) || !(rule->kind & view->itemsize) ||
        !is_native_integer(view->format)) {
        return refuse(rule->name, rule->kind == INT32   ? "must be int32"
                                  : rule->kind == INT64 ? "must be int64"
                                                        : "must be int32 or int64");
    }
    if (view->ndim != rule->dimensions || view->ndim > MAX_DIMENSIONS || view->shape == NULL) {
        return refuse(rule->name, rule->dimensions == 1 ? "must have 1 dimension" : "must have 2 dimensions");
    }
    if (!PyBuffer_IsContiguous(view, 'C')) return refuse(rule->name, "must be C-contiguous");
    if (!length_matches_shape(view)) return refuse(rule->name, "has a shape that does not match its length");
    if (view->len > 0 && (uintptr_t)view->buf % (uintptr_t)view->itemsize != 0) {
        return refuse(rule->name, "must be aligned to its item size");
    }
    if (rule->direction == OUTPUT && view->readonly) return refuse(rule->name, not_writable);
    return 0;
}

static int check_overlap(const arguments *held) {
    for (int a = 0; a < held->num_held; a++) {
        for (int b = a + 1; b < held->num_held; b++) {
            if (held->rules[a].direction == INPUT && held->rules[b].direction == INPUT) continue;
            const uintptr_t begin_a = (uintptr_t)held->views[a].buf, begin_b = (uintptr_t)held->views[b].buf;
            const uintptr_t end_a = begin_a + (uintptr_t)held->views[a].len;
            const uintptr_t end_b = begin_b + (uintptr_t)held->views[b].len;
            if (begin_a < end_b && begin_b < end_a && held->views[a].len > 0 && held->views[b].len > 0) {
                PyErr_Format(PyExc_ValueError, "%s and %s overlap in memory", held->rules[a].name, held->rules[b].name);
                return -1;
            }
        }
    }
    return 0;
}

/* Takes and checks all arguments, or takes none and sets an exception. */
static int hold_arguments(arguments *held, const argument_rule *rules, int num_rules, PyObject *const *objects,
                          Py_ssize_t num_objects) {
    *held = (arguments){.rules = rules, .num_held = 0};
    if (num_objects != num_rules) {
        PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", num_rules, num_objects);
        return -1;
    }
    for (int i = 0; i < num_rules; i++) {
        const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (rules[i].direction == OUTPUT ? PyBUF_WRITABLE : 0);
        int status = PyObject_GetBuffer(objects[i], &held->views[i], flags);
        if (status != 0) {
            refuse_exporter(&rules[i]);
        } else {
            held->num_held++;
            status = check_view(&held->views[i], &rules[i]);
        }
        if (status != 0) {
            release_arguments(held);
            return -1;
        }
    }
    if (check_overlap(held) != 0) {
        release_arguments(held);
        return -1;
    }
    return 0;
}

static plan_slots as_slots(const Py_buffer *view) {
    return (plan_slots){view->buf, (int)view->itemsize, (int64_t)view->shape[0], (int64_t)view->shape[1]};
}

static plan_owners as_owners(const Py_buffer *slot_rank, const Py_buffer *send_counts) {
    return (plan_owners){slot_rank->buf, (int64_t)slot_rank->shape[0], (int64_t)send_counts->shape[0]};
}

static void *allocate_scratch(Py_ssize_t count, size_t item_bytes) {
    if (count > PY_SSIZE_T_MAX / (Py_ssize_t)item_bytes) return PyErr_NoMemory();
    void *scratch = PyMem_Malloc((size_t)count * item_bytes);
    return scratch != NULL ? scratch : PyErr_NoMemory();
}

/* Sets the ValueError of a failed plan call. `row_name` and `num_slots` are those of the table that was read, and
 * `count_name` the counts that were given. */
static PyObject *raise_status(plan_status status, const plan_fault *fault, const char *row_name, Py_ssize_t num_slots,
                              const char *count_name) {
    const long long row = fault->row, k = fault->k, value = fault->value;
    PyObject *kind = PyExc_ValueError;
    switch (status) {
    case PLAN_BAD_SLOT:
        return PyErr_Format(kind, "%s %lld, k %lld: slot %lld is neither -1 nor below the number of slots, %zd",
                            row_name, row, k, value, num_slots);
    case PLAN_BAD_RANK:
        return PyErr_Format(kind, "slot_rank: slot %lld lives on rank %lld, which is not a rank", row, value);
    case PLAN_RANKS_DECREASE:
        return PyErr_Format(kind, "slot_rank: decreases at slot %lld, to rank %lld", row, value);
    case PLAN_BAD_COUNT:
        return PyErr_Format(kind,
                            "%s: entry %lld (%lld) does not fit these slots and output lengths; "
                            "counts and lengths come from the count call on the same arrays",
                            count_name, row, value);
    case PLAN_TOO_LARGE:
        return PyErr_Format(kind, "the sizes are too large: a table cannot be addressed, or slots exceed int32");
    default:
        return PyErr_Format(PyExc_SystemError, "moe_runtime._C: plan.c answered %d", (int)status);
    }
}

PyDoc_STRVAR(dispatch_count_doc,
             "dispatch_count(slots_TK, slot_rank, send_counts)\n--\n\n"
             "Writes send_counts [R] int64 and returns their sum, the number of rows to send.\n\n"
             "slots_TK [T, K] int32 or int64, slot_rank [S] int32.");

static PyObject *dispatch_count(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const argument_rule rules[] = {
        {"slots_TK", 2, INT32_OR_INT64, INPUT},
        {"slot_rank", 1, INT32, INPUT},
        {"send_counts", 1, INT64, OUTPUT},
    };
    (void)module;
    arguments held;
    if (hold_arguments(&held, rules, 3, objects, num_objects) != 0) return NULL;

    const plan_slots tokens = as_slots(&held.views[0]);
    const plan_owners owners = as_owners(&held.views[1], &held.views[2]);
    plan_cursor *cursors = allocate_scratch(held.views[2].shape[0], sizeof *cursors);
    PyObject *result = NULL;
    if (cursors != NULL) {
        plan_fault fault = {0, 0, 0};
        int64_t num_rows = 0;
        plan_status status;
        Py_BEGIN_ALLOW_THREADS
        status = plan_dispatch_count(&tokens, &owners, cursors, held.views[2].buf, &num_rows, &fault);
        Py_END_ALLOW_THREADS
        result = status == PLAN_OK ? PyLong_FromLongLong(num_rows)
                                   : raise_status(status, &fault, "token", held.views[1].shape[0], "send_counts");
    }
    PyMem_Free(cursors);
    release_arguments(&held);
    return result;
}

PyDoc_STRVAR(dispatch_fill_doc,
             "dispatch_fill(slots_TK, slot_rank, send_counts, send_tokens, send_slots)\n--\n\n"
             "Writes send_tokens [N] int64 and send_slots [N, K] int32.\n\n"
             "The first three are those of dispatch_count; N is what it returned.");

static PyObject *dispatch_fill(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const argument_rule rules[] = {
        {"slots_TK", 2, INT32_OR_INT64, INPUT}, {"slot_rank", 1, INT32, INPUT},  {"send_counts", 1, INT64, INPUT},
        {"send_tokens", 1, INT64, OUTPUT},      {"send_slots", 2, INT32, OUTPUT},
    };
    (void)module;
    arguments held;
    if (hold_arguments(&held, rules, 5, objects, num_objects) != 0) return NULL;

    const plan_slots tokens = as_slots(&held.views[0]);
    const plan_owners owners = as_owners(&held.views[1], &held.views[2]);
    const Py_ssize_t num_rows = held.views[3].shape[0];
    PyObject *result = NULL;
    plan_cursor *cursors = NULL;
    if (held.views[4].shape[0] != num_rows || held.views[4].shape[1] != held.views[0].shape[1]) {
        refuse("send_slots", "must have as many rows as send_tokens and as many columns as slots_TK");
    } else if ((cursors = allocate_scratch(held.views[2].shape[0], sizeof *cursors)) != NULL) {
        plan_fault fault = {0, 0, 0};
        plan_status status;
        Py_BEGIN_ALLOW_THREADS
        status = plan_dispatch_fill(&tokens, &owners, held.views[2].buf, (int64_t)num_rows, cursors, held.views[3].buf,
                                    held.views[4].buf, &fault);
        Py_END_ALLOW_THREADS
        result = status == PLAN_OK ? Py_NewRef(Py_None)
                                   : raise_status(status, &fault, "token", held.views[1].shape[0], "send_counts");
    }
    PyMem_Free(cursors);
    release_arguments(&held);
    return result;
}

PyDoc_STRVAR(expand_count_doc,
             "expand_count(recv_slots_NK, rows_per_slot)\n--\n\n"
             "Writes rows_per_slot [num_local_slots] int64 and returns their sum, the number of entries.\n\n"
             "recv_slots_NK [N, K] int32.");

static PyObject *expand_count(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const argument_rule rules[] = {
        {"recv_slots_NK", 2, INT32, INPUT},
        {"rows_per_slot", 1, INT64, OUTPUT},
    };
    (void)module;
    arguments held;
    if (hold_arguments(&held, rules, 2, objects, num_objects) != 0) return NULL;

    const plan_slots rows = as_slots(&held.views[0]);
    const Py_ssize_t num_slots = held.views[1].shape[0];
    plan_fault fault = {0, 0, 0};
    int64_t num_entries = 0;
    plan_status status;
    Py_BEGIN_ALLOW_THREADS
    status = plan_expand_count(&rows, (int64_t)num_slots, held.views[1].buf, &num_entries, &fault);
    Py_END_ALLOW_THREADS
    release_arguments(&held);
    return status == PLAN_OK ? PyLong_FromLongLong(num_entries)
                             : raise_status(status, &fault, "row", num_slots, "rows_per_slot");
}

PyDoc_STRVAR(expand_fill_doc,
             "expand_fill(recv_slots_NK, rows_per_slot, row_index, k_index)\n--\n\n"
             "Writes row_index [M] and k_index [M], both int64.\n\n"
             "The first two are those of expand_count; M is what it returned.");

static PyObject *expand_fill(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const argument_rule rules[] = {
        {"recv_slots_NK", 2, INT32, INPUT},
        {"rows_per_slot", 1, INT64, INPUT},
        {"row_index", 1, INT64, OUTPUT},
        {"k_index", 1, INT64, OUTPUT},
    };
    (void)module;
    arguments held;
    if (hold_arguments(&held, rules, 4, objects, num_objects) != 0) return NULL;

    const plan_slots rows = as_slots(&held.views[0]);
    const Py_ssize_t num_slots = held.views[1].shape[0], num_entries = held.views[2].shape[0];
    PyObject *result = NULL;
    int64_t *next_entry = NULL;
    if (held.views[3].shape[0] != num_entries) {
        refuse("k_index", "must be as long as row_index");
    } else if ((next_entry = allocate_scratch(num_slots, sizeof *next_entry)) != NULL) {
        plan_fault fault = {0, 0, 0};
        plan_status status;
        Py_BEGIN_ALLOW_THREADS
        status = plan_expand_fill(&rows, (int64_t)num_slots, held.views[1].buf, (int64_t)num_entries, next_entry,
                                  held.views[2].buf, held.views[3].buf, &fault);
        Py_END_ALLOW_THREADS
        result = status == PLAN_OK ? Py_NewRef(Py_None)
                                   : raise_status(status, &fault, "row", num_slots, "rows_per_slot");
    }
    PyMem_Free(next_entry);
    release_arguments(&held);
    return result;
}

/* ---- shared memory: frames between ranks (exchange.c); the callers are comm/lane.py and comm/shm.py ------------- */

/* A window held for one call: memory that other processes write to, too. */
static int hold_window(Py_buffer *view, PyObject *object) {
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) == 0) return 0;
    if (PyErr_ExceptionMatches(PyExc_BufferError) || PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        refuse("window", not_writable);
    }
    return -1;
}

static int check_number_of_arguments(Py_ssize_t num_objects, Py_ssize_t expected) {
    if (num_objects == expected) return 0;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, num_objects);
    return -1;
}

/* The bell, or a ring, of a window; NULL and an exception where it has none. */
static exchange_bell *find_bell(const Py_buffer *view) {
    exchange_bell *bell = exchange_bell_of(view->buf, (size_t)view->len);
    if (bell == NULL) refuse("window", "must be aligned to a cache line and begin with a bell");
    return bell;
}

static exchange_ring *find_ring(const Py_buffer *view, PyObject *source) {
    const size_t number = PyLong_AsSize_t(source);
    if (number == (size_t)-1 && PyErr_Occurred()) return NULL;
    exchange_ring *ring = exchange_ring_of(view->buf, (size_t)view->len, number);
    if (ring == NULL) PyErr_Format(PyExc_ValueError, "source: the window has no ring %zu", number);
    return ring;
}

static PyObject *raise_exchange(exchange_status status) {
    switch (status) {
    case EXCHANGE_FULL:
        return PyErr_Format(PyExc_ValueError, "the ring is full: its reader does not keep to the protocol");
    case EXCHANGE_CORRUPT:
        return PyErr_Format(PyExc_ValueError, "the ring is corrupt: a number or length that no writer leaves there");
    default:
        return PyErr_Format(PyExc_ValueError, "number must be at least 1, and frame at most %d bytes",
                            EXCHANGE_FRAME_BYTES);
    }
}

PyDoc_STRVAR(exchange_control_bytes_doc,
             "exchange_control_bytes(num_ranks)\n--\n\n"
             "How many bytes the bell and the rings take at the start of a window.");

static PyObject *exchange_control_bytes(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    if (check_number_of_arguments(num_objects, 1) != 0) return NULL;
    const size_t num_ranks = PyLong_AsSize_t(objects[0]);
    if (num_ranks == (size_t)-1 && PyErr_Occurred()) return NULL;
    if (num_ranks > UINT32_MAX) return PyErr_Format(PyExc_ValueError, "num_ranks: too many");
    return PyLong_FromSize_t(exchange_bytes(num_ranks));
}

PyDoc_STRVAR(exchange_send_doc,
             "exchange_send(window, source, number, frame)\n--\n\n"
             "Publishes frame `number`, counted from 1, in the ring that rank `source` has in another rank's window.\n\n"
             "Never waits. ValueError where the reader cannot have left the ring like this.");

static PyObject *exchange_send(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    if (check_number_of_arguments(num_objects, 4) != 0) return NULL;
    const unsigned long long number = PyLong_AsUnsignedLongLong(objects[2]);
    if (number == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    Py_buffer window, frame;
    if (hold_window(&window, objects[0]) != 0) return NULL;
    PyObject *result = NULL;
    exchange_bell *bell = find_bell(&window);
    exchange_ring *ring = bell != NULL ? find_ring(&window, objects[1]) : NULL;
    if (ring != NULL && PyObject_GetBuffer(objects[3], &frame, PyBUF_SIMPLE) == 0) {
        const exchange_status status = exchange_publish(ring, bell, number, frame.buf, (size_t)frame.len);
        result = status == EXCHANGE_OK ? Py_NewRef(Py_None) : raise_exchange(status);
        PyBuffer_Release(&frame);
    }
    PyBuffer_Release(&window);
    return result;
}

PyDoc_STRVAR(exchange_receive_doc,
             "exchange_receive(window, source, number)\n--\n\n"
             "Frame `number` of rank `source`'s ring in this rank's window as bytes, None while it is not there.\n\n"
             "ValueError where no writer can have left the ring like this.");

static PyObject *exchange_receive(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    if (check_number_of_arguments(num_objects, 3) != 0) return NULL;
    const unsigned long long number = PyLong_AsUnsignedLongLong(objects[2]);
    if (number == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    Py_buffer window;
    if (hold_window(&window, objects[0]) != 0) return NULL;
    PyObject *result = NULL;
    exchange_ring *ring = find_ring(&window, objects[1]);
    if (ring != NULL) {
        unsigned char frame[EXCHANGE_FRAME_BYTES];
        size_t length = 0;
        const exchange_status status = exchange_take(ring, number, frame, &length);
        result = status == EXCHANGE_OK        ? PyBytes_FromStringAndSize((const char *)frame, (Py_ssize_t)length)
                 : status == EXCHANGE_NOTHING ? Py_NewRef(Py_None)
                                              : raise_exchange(status);
    }
    PyBuffer_Release(&window);
    return result;
}

PyDoc_STRVAR(exchange_look_doc,
             "exchange_look(window)\n--\n\n"
             "What this rank's bell shows. Look, receive until there is nothing, await what was seen: no frame is missed.");

static PyObject *exchange_look(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    Py_buffer window;
    if (check_number_of_arguments(num_objects, 1) != 0 || hold_window(&window, objects[0]) != 0) return NULL;
    exchange_bell *bell = find_bell(&window);
    PyObject *result = bell != NULL ? PyLong_FromUnsignedLong(exchange_rung(bell)) : NULL;
    PyBuffer_Release(&window);
    return result;
}

PyDoc_STRVAR(exchange_await_doc,
             "exchange_await(window, seen, spin_ns, timeout_ns)\n--\n\n"
             "Waits without the GIL until the bell shows other than `seen`, spinning first, then asleep.\n\n"
             "Returns 0 after timeout_ns, 1 if it rang while spinning, 2 after a sleep (a signal also ends one).");

static PyObject *exchange_await(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    if (check_number_of_arguments(num_objects, 4) != 0) return NULL;
    const unsigned long seen = PyLong_AsUnsignedLongMask(objects[1]);
    const long long spin_ns = PyLong_AsLongLong(objects[2]), timeout_ns = PyLong_AsLongLong(objects[3]);
    if (PyErr_Occurred()) return NULL;
    Py_buffer window;
    if (hold_window(&window, objects[0]) != 0) return NULL;
    PyObject *result = NULL;
    exchange_bell *bell = find_bell(&window);
    if (bell != NULL) {
        exchange_status status;
        Py_BEGIN_ALLOW_THREADS
        status = exchange_wait(bell, (uint32_t)seen, spin_ns, timeout_ns);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() == 0) {
            result = PyLong_FromLong(status == EXCHANGE_OK ? 1 : status == EXCHANGE_SLEPT ? 2 : 0);
        }
    }
    PyBuffer_Release(&window);
    return result;
}

/* ---- end of shared memory --------------------------------------------------------------------------------------- */

/* ---- rows: packed, summed and quantised (rows.c); the callers are comm/rows.py and experts/blocks.py ---------------
 *
 * Rows are two-dimensional bytes here, whatever their dtype: Python's buffer protocol has no bfloat16 and no 8-bit
 * floats. The dtype comes beside them as torch's name of it. Rows may lie apart from each other. `simd` names a set of
 * instructions, "" the best there is; the results are the same. moe_runtime.comm.rows is the public face.
 */

enum { MAX_TABLES = 6 };

typedef enum { BYTE_ROWS, FLOAT32S, SUM_FLOATS, INT64S, INT32S } table_content; /* SUM_FLOATS: float32 or float64 */
typedef enum { NEEDED = 0, OR_NONE = 1 } presence;

typedef struct {
    const char *name;
    int dimensions;
    table_content content;
    direction direction;
    presence presence;
} table_rule;

/* The arrays of one call, held until release_tables; one that is None has obj and buf NULL. */
typedef struct {
    const table_rule *rules;
    int num_held;
    Py_buffer views[MAX_TABLES];
} tables;

static void release_tables(tables *held) {
    while (held->num_held > 0) PyBuffer_Release(&held->views[--held->num_held]);
}

static int is_native(const char *format, char letter) {
    if (format == NULL) return letter == 'B';
    if (*format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>')) format++;
    return format[0] == letter && format[1] == '\0';
}

static const char *refused_content(const Py_buffer *view, table_content content) {
    const int is_float32 = view->itemsize == 4 && is_native(view->format, 'f');
    switch (content) {
    case BYTE_ROWS:
        return view->itemsize == 1 && is_native(view->format, 'B') ? NULL : "must be bytes (uint8)";
    case FLOAT32S:
        return is_float32 ? NULL : "must be float32";
    case SUM_FLOATS:
        return is_float32 || (view->itemsize == 8 && is_native(view->format, 'd')) ? NULL
                                                                                   : "must be float32 or float64";
    case INT64S:
        return view->itemsize == 8 && is_native_integer(view->format) ? NULL : "must be int64";
    default:
        return view->itemsize == 4 && is_native_integer(view->format) ? NULL : "must be int32";
    }
}

/* The distance between rows in bytes. That of a single row is never used and may be anything. */
static Py_ssize_t row_stride(const Py_buffer *view) { return view->shape[0] > 1 ? view->strides[0] : view->shape[1]; }

/* From the first byte of the array to one past its last, gaps between rows included; fits, once check_table said so. */
static Py_ssize_t extent(const Py_buffer *view, table_content content) {
    if (view->buf == NULL || view->len == 0) return 0;
    return content == BYTE_ROWS ? (view->shape[0] - 1) * row_stride(view) + view->shape[1] : view->len;
}

static int check_table(const Py_buffer *view, const table_rule *rule) {
    const char *refused = refused_content(view, rule->content);
    if (refused != NULL) return refuse(rule->name, refused);
    if (view->ndim != rule->dimensions || view->shape == NULL || view->strides == NULL) {
        return refuse(rule->name, rule->dimensions == 1 ? "must have 1 dimension" : "must have 2 dimensions");
    }
    if (!length_matches_shape(view)) return refuse(rule->name, "has a shape that does not match its length");
    if (rule->content != BYTE_ROWS) {
        if (!PyBuffer_IsContiguous(view, 'C')) return refuse(rule->name, "must be C-contiguous");
        if (view->len > 0 && (uintptr_t)view->buf % (uintptr_t)view->itemsize != 0) {
            return refuse(rule->name, "must be aligned to its item size");
        }
    } else {
        if (view->shape[1] > 1 && view->strides[1] != 1) return refuse(rule->name, "must have contiguous rows");
        const Py_ssize_t stride = row_stride(view), least = rule->direction == OUTPUT ? view->shape[1] : 0;
        if (stride < least) return refuse(rule->name, "must have rows in increasing order that do not overlap");
        if (stride > 0 && view->shape[0] > (PY_SSIZE_T_MAX - view->shape[1]) / stride) {
            return refuse(rule->name, "has rows too far apart");
        }
    }
    if (rule->direction == OUTPUT && view->readonly) return refuse(rule->name, not_writable);
    return 0;
}

static int check_tables_apart(const tables *held) {
    for (int a = 0; a < held->num_held; a++) {
        for (int b = a + 1; b < held->num_held; b++) {
            if (held->rules[a].direction == INPUT && held->rules[b].direction == INPUT) continue;
            const uintptr_t begin_a = (uintptr_t)held->views[a].buf, begin_b = (uintptr_t)held->views[b].buf;
            const uintptr_t bytes_a = (uintptr_t)extent(&held->views[a], held->rules[a].content);
            const uintptr_t bytes_b = (uintptr_t)extent(&held->views[b], held->rules[b].content);
            if (bytes_a > 0 && bytes_b > 0 && begin_a < begin_b + bytes_b && begin_b < begin_a + bytes_a) {
                PyErr_Format(PyExc_ValueError, "%s and %s overlap in memory", held->rules[a].name, held->rules[b].name);
                return -1;
            }
        }
    }
    return 0;
}

/* Takes and checks the arrays of one call, objects[i] by rules[i], or takes none and sets an exception. */
static int hold_tables(tables *held, const table_rule *rules, int num_rules, PyObject *const *objects) {
    *held = (tables){.rules = rules, .num_held = 0};
    for (int i = 0; i < num_rules; i++) {
        held->views[i] = (Py_buffer){.buf = NULL};
        int status = 0;
        if (objects[i] == Py_None && rules[i].presence == OR_NONE) {
            held->num_held++;
            continue;
        }
        const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (rules[i].direction == OUTPUT ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(objects[i], &held->views[i], flags) != 0) {
            const argument_rule rule = {.name = rules[i].name, .direction = rules[i].direction};
            status = refuse_exporter(&rule);
        } else {
            held->num_held++;
            status = check_table(&held->views[i], &rules[i]);
        }
        if (status != 0) {
            release_tables(held);
            return -1;
        }
    }
    if (check_tables_apart(held) != 0) {
        release_tables(held);
        return -1;
    }
    return 0;
}

static int check_shape(const tables *held, int index, Py_ssize_t rows, Py_ssize_t columns) {
    const Py_buffer *view = &held->views[index];
    if (view->shape[0] == rows && (view->ndim == 1 || view->shape[1] == columns)) return 0;
    PyErr_Format(PyExc_ValueError, view->ndim == 1 ? "%s: must have %zd entries" : "%s: must have shape (%zd, %zd)",
                 held->rules[index].name, rows, columns);
    return -1;
}

static int check_row_alignment(const tables *held, int index, Py_ssize_t bytes) {
    const Py_buffer *view = &held->views[index];
    if (view->len == 0 || ((uintptr_t)view->buf % (uintptr_t)bytes == 0 && row_stride(view) % bytes == 0)) return 0;
    return refuse(held->rules[index].name, "must have rows that are aligned to the items in them");
}

/* How many values of `dtype` a row of bytes holds, or -1 and an exception. */
static Py_ssize_t take_columns(const tables *held, int index, rows_dtype dtype) {
    const Py_ssize_t bytes = (Py_ssize_t)rows_item_bytes(dtype), length = held->views[index].shape[1];
    if (length % bytes != 0) return refuse(held->rules[index].name, "must have rows of whole values");
    return check_row_alignment(held, index, bytes) == 0 ? length / bytes : -1;
}

static rows_input as_input(const Py_buffer *view) {
    return (rows_input){view->buf, (int64_t)view->shape[0], (int64_t)row_stride(view)};
}

static rows_output as_output(const Py_buffer *view) {
    return (rows_output){view->buf, (int64_t)view->shape[0], (int64_t)row_stride(view)};
}

static int take_word(PyObject *object, const char *name, const char *const *words, int first, int num_words) {
    if (!PyUnicode_Check(object)) return refuse(name, "must be a string");
    for (int i = first; i < num_words; i++) {
        if (PyUnicode_CompareWithASCIIString(object, words[i]) == 0) return i;
    }
    PyErr_Format(PyExc_ValueError, "%s: %R has no meaning here", name, object);
    return -1;
}

static const char *const dtype_words[ROWS_NUM_DTYPES] = {
    [ROWS_FLOAT32] = "float32",   [ROWS_FLOAT64] = "float64",           [ROWS_FLOAT16] = "float16",
    [ROWS_BFLOAT16] = "bfloat16", [ROWS_E4M3FN] = "float8_e4m3fn", [ROWS_E4M3FNUZ] = "float8_e4m3fnuz",
    [ROWS_INT8] = "int8",
};

static int take_dtype(PyObject *object, const char *name, int first, int end, rows_dtype *dtype) {
    const int word = take_word(object, name, dtype_words, first, end);
    *dtype = (rows_dtype)(word < 0 ? 0 : word);
    return word < 0 ? -1 : 0;
}

static int take_size(PyObject *object, const char *name, int64_t least, int64_t *size) {
    const long long value = PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
    if (PyErr_Occurred()) PyErr_Clear(); /* more than 64 bits: no size either */
    *size = (int64_t)value;
    return value >= least ? 0 : refuse(name, "must be a whole number that can be a size");
}

static const simd_loops *take_loops(PyObject *object) {
    const char *name = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : NULL;
    const simd_loops *loops = name != NULL ? simd_find(name) : NULL;
    if (loops == NULL) {
        PyErr_Clear();
        refuse("simd", "must be \"\" or one of simd_names()");
    }
    return loops;
}

static int check_count(Py_ssize_t given, Py_ssize_t needed) {
    if (given == needed) return 0;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", needed, given);
    return -1;
}

/* None, or the ValueError of a failed call; `num_tokens` and `num_rows` are the lengths of what was indexed. */
static PyObject *rows_result(rows_status status, const rows_fault *fault, Py_ssize_t num_tokens, Py_ssize_t num_rows) {
    const long long row = fault->row, value = fault->value;
    switch (status) {
    case ROWS_OK:
        return Py_NewRef(Py_None);
    case ROWS_BAD_TOKEN:
        return PyErr_Format(PyExc_ValueError, "tokens: row %lld is of token %lld, which is not in 0..%zd", row, value,
                            num_tokens - 1);
    case ROWS_BAD_ORDER:
        return PyErr_Format(PyExc_ValueError, "order: entry %lld is row %lld, which is not in 0..%zd", row, value,
                            num_rows - 1);
    case ROWS_BAD_VISIT:
        return PyErr_Format(PyExc_ValueError, "visit: entry %lld is row %lld, which is not in 0..%zd", row, value,
                            num_tokens - 1);
    default:
        return PyErr_Format(PyExc_SystemError, "moe_runtime._C: rows.c answered %d", (int)status);
    }
}

/* The layout of the packed rows views[index]; scales_at, weights_at and slots_at are the next three of `sizes`. */
static int take_layout(rows_layout *layout, const tables *held, int index, Py_ssize_t weight_bytes,
                       PyObject *const *sizes) {
    layout->weight_bytes = (int)weight_bytes;
    layout->row_bytes = (int64_t)held->views[index].shape[1];
    if (take_size(sizes[0], "scales_at", 0, &layout->scales_at) != 0 ||
        take_size(sizes[1], "weights_at", 0, &layout->weights_at) != 0 ||
        take_size(sizes[2], "slots_at", 0, &layout->slots_at) != 0) {
        return -1;
    }
    if (rows_check_layout(layout) != ROWS_OK) {
        return refuse(held->rules[index].name,
                      "is too short for its parts, or scales_at, weights_at and slots_at are not aligned one after the "
                      "other");
    }
    const Py_ssize_t most = weight_bytes == 8 || layout->wire == ROWS_FLOAT64 ? 8 : 4;
    return check_row_alignment(held, index, most);
}

PyDoc_STRVAR(pack_rows_doc,
             "pack_rows(x, dtype, weights, tokens, slots, packed, wire, scales_at, weights_at, slots_at, simd)\n--\n\n"
             "Writes packed rows [N, row_bytes]: row n is token tokens[n].\n\n"
             "x bytes [T, H * item], weights [T, K] float32 or float64, tokens [N] int64, slots [N, K] int32, packed\n"
             "bytes [N, row_bytes]. dtype is x's, wire that of the packed values.");

static PyObject *pack_rows(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"x", 2, BYTE_ROWS, INPUT, NEEDED},      {"weights", 2, SUM_FLOATS, INPUT, NEEDED},
        {"tokens", 1, INT64S, INPUT, NEEDED},    {"slots", 2, INT32S, INPUT, NEEDED},
        {"packed", 2, BYTE_ROWS, OUTPUT, NEEDED},
    };
    (void)module;
    tables held;
    if (check_count(num_objects, 11) != 0) return NULL;
    PyObject *const arrays[] = {objects[0], objects[2], objects[3], objects[4], objects[5]};
    if (hold_tables(&held, rules, 5, arrays) != 0) return NULL;

    PyObject *result = NULL;
    rows_layout layout = {.top_k = (int64_t)held.views[3].shape[1]};
    const Py_ssize_t num_tokens = held.views[0].shape[0], num_rows = held.views[2].shape[0];
    const simd_loops *loops = take_loops(objects[10]);
    if (loops != NULL && take_dtype(objects[1], "dtype", 0, ROWS_NUM_ROW_DTYPES, &layout.dtype) == 0 &&
        take_dtype(objects[6], "wire", 0, ROWS_NUM_DTYPES, &layout.wire) == 0 &&
        (layout.hidden_size = take_columns(&held, 0, layout.dtype)) >= 0 &&
        check_shape(&held, 1, num_tokens, held.views[3].shape[1]) == 0 &&
        check_shape(&held, 3, num_rows, held.views[3].shape[1]) == 0 &&
        check_shape(&held, 4, num_rows, held.views[4].shape[1]) == 0 &&
        take_layout(&layout, &held, 4, held.views[1].itemsize, objects + 7) == 0) {
        rows_fault fault = {0, 0};
        rows_status status;
        Py_BEGIN_ALLOW_THREADS
        status = rows_pack(loops, &layout, as_input(&held.views[0]), held.views[1].buf, held.views[2].buf,
                           held.views[3].buf, as_output(&held.views[4]), &fault);
        Py_END_ALLOW_THREADS
        result = rows_result(status, &fault, num_tokens, num_rows);
    }
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(unpack_rows_doc,
             "unpack_rows(packed, wire, hidden, dtype, weights, slots, scales_at, weights_at, slots_at, simd)\n--\n\n"
             "Writes the parts of packed rows: the inverse of pack_rows.\n\n"
             "hidden bytes [N, H * item] in dtype, or None to leave the values out; weights [N, K] float32 or\n"
             "float64, slots [N, K] int32.");

static PyObject *unpack_rows(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"packed", 2, BYTE_ROWS, INPUT, NEEDED},
        {"hidden", 2, BYTE_ROWS, OUTPUT, OR_NONE},
        {"weights", 2, SUM_FLOATS, OUTPUT, NEEDED},
        {"slots", 2, INT32S, OUTPUT, NEEDED},
    };
    (void)module;
    tables held;
    if (check_count(num_objects, 10) != 0) return NULL;
    PyObject *const arrays[] = {objects[0], objects[2], objects[4], objects[5]};
    if (hold_tables(&held, rules, 4, arrays) != 0) return NULL;

    PyObject *result = NULL;
    const int has_hidden = held.views[1].obj != NULL;
    rows_layout layout = {.top_k = (int64_t)held.views[3].shape[1]};
    const Py_ssize_t num_rows = held.views[0].shape[0];
    const simd_loops *loops = take_loops(objects[9]);
    if (loops != NULL && take_dtype(objects[1], "wire", 0, ROWS_NUM_DTYPES, &layout.wire) == 0 &&
        take_dtype(objects[3], "dtype", 0, ROWS_NUM_ROW_DTYPES, &layout.dtype) == 0 &&
        (!has_hidden || ((layout.hidden_size = take_columns(&held, 1, layout.dtype)) >= 0 &&
                         check_shape(&held, 1, num_rows, held.views[1].shape[1]) == 0)) &&
        check_shape(&held, 2, num_rows, held.views[3].shape[1]) == 0 &&
        check_shape(&held, 3, num_rows, held.views[3].shape[1]) == 0 &&
        take_layout(&layout, &held, 0, held.views[2].itemsize, objects + 6) == 0) {
        const rows_output hidden = has_hidden ? as_output(&held.views[1]) : (rows_output){NULL, 0, 0};
        rows_status status;
        Py_BEGIN_ALLOW_THREADS
        status = rows_unpack(loops, &layout, as_input(&held.views[0]), hidden, held.views[2].buf, held.views[3].buf);
        Py_END_ALLOW_THREADS
        result = rows_result(status, &(rows_fault){0, 0}, 0, num_rows);
    }
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(gather_rows_doc,
             "gather_rows(rows, order, gathered, visit)\n--\n\n"
             "Writes gathered bytes [M, B]: row m is row order[m] of rows bytes [N, B]. order [M] int64.\n\n"
             "visit int64: the m to write, in this order, or None for all from the first to the last.");

static PyObject *gather_rows(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"rows", 2, BYTE_ROWS, INPUT, NEEDED},
        {"order", 1, INT64S, INPUT, NEEDED},
        {"gathered", 2, BYTE_ROWS, OUTPUT, NEEDED},
        {"visit", 1, INT64S, INPUT, OR_NONE},
    };
    (void)module;
    tables held;
    if (check_count(num_objects, 4) != 0 || hold_tables(&held, rules, 4, objects) != 0) return NULL;
    PyObject *result = NULL;
    const Py_ssize_t num_rows = held.views[0].shape[0], row_bytes = held.views[0].shape[1];
    if (check_shape(&held, 2, held.views[1].shape[0], row_bytes) == 0) {
        rows_fault fault = {0, 0};
        rows_status status;
        Py_BEGIN_ALLOW_THREADS
        status = rows_gather((int64_t)row_bytes, as_input(&held.views[0]), held.views[1].buf, held.views[3].buf,
                             held.views[3].obj != NULL ? held.views[3].shape[0] : 0, as_output(&held.views[2]), &fault);
        Py_END_ALLOW_THREADS
        result = rows_result(status, &fault, held.views[2].shape[0], num_rows);
    }
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(sum_rows_doc,
             "sum_rows(rows, dtype, tokens, weights, order, sums, simd)\n--\n\n"
             "Writes sums bytes [T, H * item]: of each token's rows [N, H * item], in order, each times its weight.\n\n"
             "tokens [N] int64; weights [N] float32 (float64 for float64 rows) or None; order [M] int64, the rows to\n"
             "add, or None for all from the first to the last.");

static PyObject *sum_rows(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"rows", 2, BYTE_ROWS, INPUT, NEEDED},   {"tokens", 1, INT64S, INPUT, NEEDED},
        {"weights", 1, SUM_FLOATS, INPUT, OR_NONE}, {"order", 1, INT64S, INPUT, OR_NONE},
        {"sums", 2, BYTE_ROWS, OUTPUT, NEEDED},
    };
    (void)module;
    tables held;
    if (check_count(num_objects, 7) != 0) return NULL;
    PyObject *const arrays[] = {objects[0], objects[2], objects[3], objects[4], objects[5]};
    if (hold_tables(&held, rules, 5, arrays) != 0) return NULL;

    PyObject *result = NULL;
    int64_t *scratch = NULL;
    rows_dtype dtype;
    Py_ssize_t hidden_size;
    const Py_buffer *views = held.views;
    const Py_ssize_t num_rows = views[0].shape[0], num_tokens = views[4].shape[0];
    const Py_ssize_t num_added = views[3].obj != NULL ? views[3].shape[0] : num_rows;
    const simd_loops *loops = take_loops(objects[6]);
    if (loops != NULL && take_dtype(objects[1], "dtype", 0, ROWS_NUM_ROW_DTYPES, &dtype) == 0 &&
        (hidden_size = take_columns(&held, 0, dtype)) >= 0 && check_shape(&held, 1, num_rows, 0) == 0 &&
        (views[2].obj == NULL || check_shape(&held, 2, num_rows, 0) == 0) &&
        check_shape(&held, 4, num_tokens, views[0].shape[1]) == 0 && take_columns(&held, 4, dtype) >= 0) {
        if (views[2].obj != NULL && (views[2].itemsize == 8) != (dtype == ROWS_FLOAT64)) {
            refuse("weights", "must be float64 for float64 rows and float32 for others");
        } else if (hidden_size == 0) { /* rows of no bytes may claim any number; there is nothing to write */
            result = Py_NewRef(Py_None);
        } else if ((scratch = allocate_scratch(num_tokens + num_added, sizeof *scratch)) != NULL) {
            rows_fault fault = {0, 0};
            rows_status status;
            Py_BEGIN_ALLOW_THREADS
            status = rows_sum(loops, dtype, hidden_size, as_input(&views[0]), views[1].buf, views[2].buf, views[3].buf,
                              num_added, as_output(&views[4]), scratch, &fault);
            Py_END_ALLOW_THREADS
            result = rows_result(status, &fault, num_tokens, num_rows);
        }
    }
    PyMem_Free(scratch);
    release_tables(&held);
    return result;
}

/* The sizes of the blocks that `rows` by `columns` values are cut into, one scale each in views[scales]. */
static int take_blocks(const tables *held, Py_ssize_t rows, Py_ssize_t columns, int scales, PyObject *const *sizes,
                       int64_t *block_rows, int64_t *block_columns) {
    if (take_size(sizes[0], "block_rows", 1, block_rows) != 0) return -1;
    if (take_size(sizes[1], "block_columns", 1, block_columns) != 0) return -1;
    return check_shape(held, scales, (Py_ssize_t)rows_num_blocks(rows, *block_rows),
                       (Py_ssize_t)rows_num_blocks(columns, *block_columns));
}

PyDoc_STRVAR(quantize_rows_doc,
             "quantize_rows(values, dtype, payload, wire, scales, block_rows, block_columns, rule, simd)\n--\n\n"
             "Writes payload bytes [R, C] and scales [ceil(R / block_rows), ceil(C / block_columns)] float32.\n\n"
             "values bytes [R, C * item]. rule: \"wire\" as comm/formats.py, \"weight\" as experts/blocks.py.");

static PyObject *quantize_rows(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"values", 2, BYTE_ROWS, INPUT, NEEDED},
        {"payload", 2, BYTE_ROWS, OUTPUT, NEEDED},
        {"scales", 2, FLOAT32S, OUTPUT, NEEDED},
    };
    static const char *const rule_words[] = {"wire", "weight"};
    (void)module;
    tables held;
    if (check_count(num_objects, 9) != 0) return NULL;
    PyObject *const arrays[] = {objects[0], objects[2], objects[4]};
    if (hold_tables(&held, rules, 3, arrays) != 0) return NULL;

    PyObject *result = NULL;
    rows_dtype dtype, wire;
    Py_ssize_t columns;
    int64_t block_rows, block_columns;
    int word;
    const Py_ssize_t num_rows = held.views[0].shape[0];
    const simd_loops *loops = take_loops(objects[8]);
    if (loops != NULL && take_dtype(objects[1], "dtype", 0, ROWS_NUM_ROW_DTYPES, &dtype) == 0 &&
        take_dtype(objects[3], "wire", ROWS_NUM_ROW_DTYPES, ROWS_NUM_DTYPES, &wire) == 0 &&
        (word = take_word(objects[7], "rule", rule_words, 0, 2)) >= 0 &&
        (columns = take_columns(&held, 0, dtype)) >= 0 && check_shape(&held, 1, num_rows, columns) == 0 &&
        take_blocks(&held, num_rows, columns, 2, objects + 5, &block_rows, &block_columns) == 0) {
        const rows_rule *rule = word == 0 ? &rows_wire_rule : &rows_weight_rule;
        rows_status status;
        Py_BEGIN_ALLOW_THREADS
        status = rows_quantize(loops, rule, dtype, as_input(&held.views[0]), columns, block_rows, block_columns, wire,
                               as_output(&held.views[1]), held.views[2].buf);
        Py_END_ALLOW_THREADS
        result = rows_result(status, &(rows_fault){0, 0}, 0, num_rows);
    }
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(dequantize_rows_doc,
             "dequantize_rows(payload, wire, scales, block_rows, block_columns, values, dtype, simd)\n--\n\n"
             "Writes values bytes [R, C * item] in dtype: the inverse of quantize_rows.");

static PyObject *dequantize_rows(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"payload", 2, BYTE_ROWS, INPUT, NEEDED},
        {"scales", 2, FLOAT32S, INPUT, NEEDED},
        {"values", 2, BYTE_ROWS, OUTPUT, NEEDED},
    };
    (void)module;
    tables held;
    if (check_count(num_objects, 8) != 0) return NULL;
    PyObject *const arrays[] = {objects[0], objects[2], objects[5]};
    if (hold_tables(&held, rules, 3, arrays) != 0) return NULL;

    PyObject *result = NULL;
    rows_dtype dtype, wire;
    Py_ssize_t columns;
    int64_t block_rows, block_columns;
    const Py_ssize_t num_rows = held.views[2].shape[0];
    const simd_loops *loops = take_loops(objects[7]);
    if (loops != NULL && take_dtype(objects[1], "wire", ROWS_NUM_ROW_DTYPES, ROWS_NUM_DTYPES, &wire) == 0 &&
        take_dtype(objects[6], "dtype", 0, ROWS_NUM_ROW_DTYPES, &dtype) == 0 &&
        (columns = take_columns(&held, 2, dtype)) >= 0 && check_shape(&held, 0, num_rows, columns) == 0 &&
        take_blocks(&held, num_rows, columns, 1, objects + 3, &block_rows, &block_columns) == 0) {
        const int is_weight = wire == ROWS_E4M3FN && dtype == ROWS_BFLOAT16 && block_rows == EXPERTS_BLOCK &&
                              block_columns == EXPERTS_BLOCK;
        rows_status status;
        Py_BEGIN_ALLOW_THREADS
        status = is_weight
                     ? experts_dequantize(loops, as_input(&held.views[0]), columns, held.views[1].buf,
                                          as_output(&held.views[2]))
                     : rows_dequantize(loops, wire, as_input(&held.views[0]), columns, held.views[1].buf, block_rows,
                                       block_columns, dtype, as_output(&held.views[2]));
        Py_END_ALLOW_THREADS
        result = rows_result(status, &(rows_fault){0, 0}, 0, num_rows);
    }
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(simd_name_doc, "simd_name()\n--\n\nThe set of instructions that the functions on rows use here.");

static PyObject *simd_name(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    (void)objects;
    return check_count(num_objects, 0) != 0 ? NULL : PyUnicode_FromString(simd_find("")->name);
}

PyDoc_STRVAR(simd_names_doc,
             "simd_names()\n--\n\nEvery set that this machine can use, best first; all give the same results.");

static PyObject *simd_names(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    (void)objects;
    if (check_count(num_objects, 0) != 0) return NULL;
    PyObject *names = PyTuple_New(simd_count());
    for (int i = 0; names != NULL && i < simd_count(); i++) {
        PyObject *name = PyUnicode_FromString(simd_at(i)->name);
        if (name == NULL) {
            Py_CLEAR(names);
        } else {
            PyTuple_SET_ITEM(names, i, name);
        }
    }
    return names;
}

/* ---- end of rows ------------------------------------------------------------------------------------------------ */

/* ---- experts: products of few rows with experts' weights (experts.c); the caller is experts/compute.py ----------
 *
 * Rows and weights are bytes, as above. Weights [S, N, K] come as their S * N rows; rows_per_slot says what S is.
 */

PyDoc_STRVAR(experts_product_doc,
             "experts_product(x, x_dtype, row_index, weights, dtype, scales, rows_per_slot, out, out_dtype, part, "
             "parts, simd)\n--\n\n"
             "Writes part `part` of `parts` of out bytes [M, N * item]: x's row row_index[m] times the weights of the\n"
             "slot that pair m is of.\n\n"
             "x bytes [T, K * item]; row_index [M] int64 or None for 0..M-1; weights bytes [S * N, K * item]; scales\n"
             "[S * ceil(N / 128), ceil(K / 128)] float32 for float8_e4m3fn and int8 weights, else None; rows_per_slot [S]\n"
             "int64, which adds up to M.");

static PyObject *experts_result(experts_status status, const rows_fault *fault, Py_ssize_t num_rows,
                                Py_ssize_t num_pairs) {
    const long long row = fault->row, value = fault->value;
    switch (status) {
    case EXPERTS_OK:
        return Py_NewRef(Py_None);
    case EXPERTS_BAD_ROW:
        return PyErr_Format(PyExc_ValueError, "row_index: pair %lld is of row %lld, which is not in 0..%zd", row, value,
                            num_rows - 1);
    case EXPERTS_BAD_COUNT:
        return PyErr_Format(PyExc_ValueError,
                            "rows_per_slot: entry %lld (%lld) does not fit the %zd pairs that its entries add up to",
                            row, value, num_pairs);
    default:
        return PyErr_Format(PyExc_SystemError, "moe_runtime._C: experts.c answered %d", (int)status);
    }
}

/* The sizes of the weights views[1] and their scales views[2], of which x and out say N and K. */
static int take_weights(experts_weights *weights, const tables *held, Py_ssize_t num_inputs, Py_ssize_t num_outputs) {
    const Py_ssize_t num_slots = held->views[4].shape[0], columns = take_columns(held, 1, weights->dtype);
    if (columns < 0) return -1;
    if (columns != num_inputs) return refuse("weights", "must have as many inputs as x has columns");
    if (num_outputs > 0 && num_slots > PY_SSIZE_T_MAX / num_outputs) return refuse("weights", "has too many rows");
    if (held->views[1].shape[0] != num_slots * num_outputs) {
        return refuse("weights", "must have a row for each slot of rows_per_slot and each column of out");
    }
    if (!PyBuffer_IsContiguous(&held->views[1], 'C')) return refuse("weights", "must be C-contiguous");
    const int has_scales = weights->dtype == ROWS_E4M3FN || weights->dtype == ROWS_INT8;
    if (has_scales != (held->views[2].obj != NULL)) {
        return refuse("scales", "are needed for float8_e4m3fn and int8 weights, and for no others");
    }
    weights->values = held->views[1].buf;
    weights->scales = held->views[2].buf;
    weights->num_slots = (int64_t)num_slots;
    weights->num_outputs = (int64_t)num_outputs;
    weights->num_inputs = (int64_t)num_inputs;
    const Py_ssize_t down = (Py_ssize_t)rows_num_blocks(num_outputs, EXPERTS_BLOCK);
    return held->views[2].obj == NULL
               ? 0
               : check_shape(held, 2, num_slots * down, (Py_ssize_t)rows_num_blocks(num_inputs, EXPERTS_BLOCK));
}

static PyObject *experts_product_(PyObject *const *objects, const tables *held) {
    rows_dtype x_dtype, out_dtype;
    experts_weights weights;
    experts_part part;
    Py_ssize_t num_inputs, num_outputs;
    const Py_buffer *views = held->views;
    const Py_ssize_t num_pairs = views[5].shape[0];
    const simd_loops *loops = take_loops(objects[11]);
    if (loops == NULL || take_dtype(objects[1], "x_dtype", 0, ROWS_NUM_ROW_DTYPES, &x_dtype) != 0 ||
        take_dtype(objects[4], "dtype", 0, ROWS_NUM_DTYPES, &weights.dtype) != 0 ||
        take_dtype(objects[8], "out_dtype", 0, ROWS_NUM_ROW_DTYPES, &out_dtype) != 0 ||
        take_size(objects[9], "part", 0, &part.index) != 0 || take_size(objects[10], "parts", 1, &part.count) != 0) {
        return NULL;
    }
    if (x_dtype == ROWS_FLOAT64 || weights.dtype == ROWS_FLOAT64 || out_dtype == ROWS_FLOAT64 ||
        weights.dtype == ROWS_E4M3FNUZ) {
        PyErr_SetString(PyExc_ValueError, "dtype: float64 and float8_e4m3fnuz have no meaning here");
        return NULL;
    }
    if (part.index >= part.count) {
        PyErr_SetString(PyExc_ValueError, "part: must be below parts");
        return NULL;
    }
    if ((num_inputs = take_columns(held, 0, x_dtype)) < 0 || (num_outputs = take_columns(held, 5, out_dtype)) < 0 ||
        take_weights(&weights, held, num_inputs, num_outputs) != 0) {
        return NULL;
    }
    if (views[3].obj == NULL && num_pairs != views[0].shape[0]) {
        return PyErr_Format(PyExc_ValueError, "out: must have %zd rows, those of x", views[0].shape[0]);
    }
    if (views[3].obj != NULL && check_shape(held, 3, num_pairs, 0) != 0) return NULL;
    if (num_outputs == 0) return Py_NewRef(Py_None); /* rows of no bytes may claim any number; nothing to write */
    float *scratch = allocate_scratch((Py_ssize_t)experts_scratch(num_inputs), sizeof *scratch);
    if (scratch == NULL) return NULL;
    rows_fault fault = {0, 0};
    experts_status status;
    Py_BEGIN_ALLOW_THREADS
    status = experts_product(loops, &weights, x_dtype, as_input(&views[0]), views[3].buf, views[4].buf, out_dtype,
                             as_output(&views[5]), part, scratch, &fault);
    Py_END_ALLOW_THREADS
    PyMem_Free(scratch);
    return experts_result(status, &fault, views[0].shape[0], num_pairs);
}

static PyObject *experts_product_method(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"x", 2, BYTE_ROWS, INPUT, NEEDED},           {"weights", 2, BYTE_ROWS, INPUT, NEEDED},
        {"scales", 2, FLOAT32S, INPUT, OR_NONE},      {"row_index", 1, INT64S, INPUT, OR_NONE},
        {"rows_per_slot", 1, INT64S, INPUT, NEEDED},  {"out", 2, BYTE_ROWS, OUTPUT, NEEDED},
    };
    (void)module;
    tables held;
    if (check_count(num_objects, 12) != 0) return NULL;
    PyObject *const arrays[] = {objects[0], objects[3], objects[5], objects[2], objects[6], objects[7]};
    if (hold_tables(&held, rules, 6, arrays) != 0) return NULL;
    PyObject *result = experts_product_(objects, &held);
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(experts_is_fast_doc,
             "experts_is_fast(simd)\n--\n\n"
             "Whether this set multiplies and adds in one instruction; where it does not, experts_product is right\n"
             "but slow.");

static PyObject *experts_is_fast_method(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    (void)module;
    if (check_count(num_objects, 1) != 0) return NULL;
    const simd_loops *loops = take_loops(objects[0]);
    return loops == NULL ? NULL : PyBool_FromLong(experts_is_fast(loops));
}

PyDoc_STRVAR(use_huge_pages_doc,
             "use_huge_pages(rows)\n--\n\n"
             "Asks the system for large pages behind these bytes [R, C], which nobody has touched yet; whether it took\n"
             "note. Weights are then read faster where processors look up many pages at once.");

static PyObject *use_huge_pages(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {{"rows", 2, BYTE_ROWS, OUTPUT, NEEDED}};
    (void)module;
    tables held;
    if (check_count(num_objects, 1) != 0 || hold_tables(&held, rules, 1, objects) != 0) return NULL;
    int taken = 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)held.views[0].buf;
    const uintptr_t end = (start + (uintptr_t)extent(&held.views[0], BYTE_ROWS)) / page * page;
    const uintptr_t begin = (start + page - 1) / page * page;
    taken = begin < end && madvise((void *)begin, end - begin, MADV_HUGEPAGE) == 0;
#endif
    release_tables(&held);
    return PyBool_FromLong(taken);
}

/* ---- end of experts --------------------------------------------------------------------------------------------- */

/* ---- shared memory: parcels (exchange.c); the caller is comm/parcels.py ----------------------------------------- */

/* Where parcels lie, but for the window: rank or number of ranks, first byte, bytes of a place. */
static int take_parcels(exchange_parcels *parcels, Py_ssize_t num_ranks, PyObject *at, PyObject *place_bytes) {
    int64_t begin, length;
    if (take_size(at, "at", 0, &begin) != 0 || take_size(place_bytes, "place_bytes", 0, &length) != 0) return -1;
    *parcels = (exchange_parcels){
        .at = (size_t)begin, .place_bytes = (size_t)length, .num_ranks = (size_t)num_ranks};
    return 0;
}

static int use_window(exchange_parcels *parcels, const Py_buffer *window) {
    parcels->window = window->buf;
    parcels->window_bytes = (size_t)window->len;
    return exchange_parcels_fit(parcels) ? 0 : refuse("window", "must be aligned and have a place for every rank's parcels");
}

static PyObject *raise_parcel(exchange_status status, Py_ssize_t rank) {
    if (status == EXCHANGE_BAD_ARGUMENT) {
        return PyErr_Format(PyExc_ValueError, "the parcel for or of rank %zd has no number or is too long", rank);
    }
    return PyErr_Format(PyExc_ValueError, "the parcels of rank %zd are %s", rank,
                        status == EXCHANGE_FULL ? "not taken in turn: it does not keep to the protocol"
                                                : "corrupt: a number or length that no writer leaves there");
}

static int bounds_lie_inside(const int64_t *bounds, Py_ssize_t num_parts, Py_ssize_t length) {
    for (Py_ssize_t part = 0; part < num_parts; part++) {
        if (bounds[part] < 0 || bounds[part + 1] < bounds[part] || bounds[part + 1] > (int64_t)length) return 0;
    }
    return 1;
}

PyDoc_STRVAR(parcels_post_doc,
             "parcels_post(windows, rank, at, place_bytes, numbers, notes, message, bounds)\n--\n\n"
             "Puts message[bounds[r]:bounds[r + 1]] into rank `rank`'s place in windows[r], as parcel numbers[r].\n\n"
             "For every r with numbers[r] > 0. windows: a tuple of R windows; numbers [R], notes [R, 5] and bounds\n"
             "[R + 1] int64. Never waits.");

static PyObject *parcels_post(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"numbers", 1, INT64S, INPUT, NEEDED},
        {"notes", 2, INT64S, INPUT, NEEDED},
        {"bounds", 1, INT64S, INPUT, NEEDED},
    };
    (void)module;
    if (check_count(num_objects, 8) != 0) return NULL;
    if (!PyTuple_Check(objects[0])) return PyErr_Format(PyExc_ValueError, "windows: must be a tuple");
    const Py_ssize_t num_ranks = PyTuple_GET_SIZE(objects[0]);
    exchange_parcels parcels;
    int64_t rank;
    if (take_size(objects[1], "rank", 0, &rank) != 0 || take_parcels(&parcels, num_ranks, objects[2], objects[3]) != 0) {
        return NULL;
    }
    tables held;
    PyObject *const arrays[] = {objects[4], objects[5], objects[7]};
    if (hold_tables(&held, rules, 3, arrays) != 0) return NULL;
    Py_buffer message;
    if (PyObject_GetBuffer(objects[6], &message, PyBUF_SIMPLE) != 0) {
        const argument_rule rule = {.name = "message", .direction = INPUT};
        refuse_exporter(&rule);
        release_tables(&held);
        return NULL;
    }
    const int64_t *numbers = held.views[0].buf, *notes = held.views[1].buf, *bounds = held.views[2].buf;
    int refused = check_shape(&held, 0, num_ranks, 0) != 0 || check_shape(&held, 1, num_ranks, EXCHANGE_NOTE) != 0 ||
                  check_shape(&held, 2, num_ranks + 1, 0) != 0;
    if (!refused && !bounds_lie_inside(bounds, num_ranks, message.len)) {
        refused = 1;
        refuse("bounds", "must increase and lie inside message");
    }
    for (Py_ssize_t r = 0; r < num_ranks && !refused; r++) {
        if (numbers[r] <= 0) continue;
        Py_buffer window;
        int64_t each[2];
        memcpy(each, bounds + r, sizeof each); /* what is used is what is checked, whoever writes there meanwhile */
        if (!bounds_lie_inside(each, 1, message.len)) {
            refused = 1;
            refuse("bounds", "must not change");
        } else if (hold_window(&window, PyTuple_GET_ITEM(objects[0], r)) != 0) {
            refused = 1;
        } else {
            refused = use_window(&parcels, &window) != 0;
            if (!refused) {
                const char *from = message.buf;
                const exchange_status status =
                    exchange_post(&parcels, (size_t)rank, (uint64_t)numbers[r], notes + r * EXCHANGE_NOTE,
                                  from + each[0], (size_t)(each[1] - each[0]));
                refused = status != EXCHANGE_OK;
                if (refused) raise_parcel(status, r);
            }
            PyBuffer_Release(&window);
        }
    }
    PyBuffer_Release(&message);
    release_tables(&held);
    return refused ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(parcels_gather_doc,
             "parcels_gather(window, at, place_bytes, numbers, lengths, notes, waited_ns, spin_ns, timeout_ns)\n--\n\n"
             "Waits without the GIL until parcel numbers[r] of every rank r is there for which lengths[r] is negative.\n\n"
             "Sets lengths[r] and notes[r] of those that have come, and adds to waited_ns[r] of all. Ranks with\n"
             "numbers[r] <= 0 are left out. numbers, lengths and waited_ns [R], notes [R, 5] int64.\n"
             "Returns how long it waited in ns, or -1 after timeout_ns.");

static PyObject *parcels_gather(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"numbers", 1, INT64S, INPUT, NEEDED},
        {"lengths", 1, INT64S, OUTPUT, NEEDED},
        {"notes", 2, INT64S, OUTPUT, NEEDED},
        {"waited_ns", 1, INT64S, OUTPUT, NEEDED},
    };
    (void)module;
    if (check_count(num_objects, 9) != 0) return NULL;
    const long long spin_ns = PyLong_AsLongLong(objects[7]), timeout_ns = PyLong_AsLongLong(objects[8]);
    if (PyErr_Occurred()) return NULL;
    tables held;
    if (hold_tables(&held, rules, 4, objects + 3) != 0) return NULL;
    const Py_ssize_t num_ranks = held.views[0].shape[0];
    exchange_parcels parcels;
    PyObject *result = NULL;
    Py_buffer window;
    if (check_shape(&held, 1, num_ranks, 0) == 0 && check_shape(&held, 2, num_ranks, EXCHANGE_NOTE) == 0 &&
        check_shape(&held, 3, num_ranks, 0) == 0 && take_parcels(&parcels, num_ranks, objects[1], objects[2]) == 0 && hold_window(&window, objects[0]) == 0) {
        if (use_window(&parcels, &window) == 0) {
            exchange_status status;
            int64_t took_ns = 0;
            Py_BEGIN_ALLOW_THREADS
            status = exchange_gather(&parcels, held.views[0].buf, held.views[1].buf, held.views[2].buf,
                                     held.views[3].buf, spin_ns, timeout_ns, &took_ns);
            Py_END_ALLOW_THREADS
            if (status == EXCHANGE_CORRUPT) {
                PyErr_SetString(PyExc_ValueError, "parcels: a number or length that no writer leaves there");
            } else if (PyErr_CheckSignals() == 0) {
                result = PyLong_FromLongLong(status == EXCHANGE_TIMEOUT ? -1 : (long long)took_ns);
            }
        }
        PyBuffer_Release(&window);
    }
    release_tables(&held);
    return result;
}

PyDoc_STRVAR(parcels_fetch_doc,
             "parcels_fetch(window, at, place_bytes, numbers, lengths, shares, message)\n--\n\n"
             "Copies parcel numbers[r], of lengths[r] bytes, of every rank r with numbers[r] > 0 to the end of its share.\n\n"
             "Rank r's share of message bytes is shares[r] of them, after those of the ranks before it. The places of the\n"
             "parcels are free from then on. numbers, lengths and shares [R] int64.");

static PyObject *parcels_fetch(PyObject *module, PyObject *const *objects, Py_ssize_t num_objects) {
    static const table_rule rules[] = {
        {"numbers", 1, INT64S, INPUT, NEEDED},
        {"lengths", 1, INT64S, INPUT, NEEDED},
        {"shares", 1, INT64S, INPUT, NEEDED},
    };
    (void)module;
    if (check_count(num_objects, 7) != 0) return NULL;
    tables held;
    if (hold_tables(&held, rules, 3, objects + 3) != 0) return NULL;
    const Py_ssize_t num_ranks = held.views[0].shape[0];
    const int64_t *numbers = held.views[0].buf, *lengths = held.views[1].buf, *shares = held.views[2].buf;
    exchange_parcels parcels;
    Py_buffer window, message;
    if (check_shape(&held, 1, num_ranks, 0) != 0 || check_shape(&held, 2, num_ranks, 0) != 0 ||
        take_parcels(&parcels, num_ranks, objects[1], objects[2]) != 0 ||
        hold_window(&window, objects[0]) != 0) {
        release_tables(&held);
        return NULL;
    }
    int refused = use_window(&parcels, &window) != 0;
    if (!refused && PyObject_GetBuffer(objects[6], &message, PyBUF_WRITABLE) != 0) {
        const argument_rule rule = {.name = "message", .direction = OUTPUT};
        refuse_exporter(&rule);
        refused = 1;
    } else if (!refused) {
        int64_t end = 0;
        for (Py_ssize_t r = 0; r < num_ranks && !refused; r++) {
            const int64_t share = shares[r], length = lengths[r];
            if (share < 0 || share > (int64_t)message.len - end) {
                refused = 1;
                refuse("shares", "must not be negative, nor more than message in all");
                break;
            }
            end += share;
            if (numbers[r] <= 0) continue;
            if (length < 0 || length > share) {
                refused = 1;
                refuse("lengths", "must not be negative, nor more than the share");
                break;
            }
            const exchange_status status = exchange_fetch(&parcels, (size_t)r, (uint64_t)numbers[r],
                                                          (char *)message.buf + end - length, (size_t)length);
            refused = status != EXCHANGE_OK;
            if (refused) raise_parcel(status, r);
        }
        PyBuffer_Release(&message);
    }
    PyBuffer_Release(&window);
    release_tables(&held);
    return refused ? NULL : Py_NewRef(Py_None);
}

#define METHOD(function) {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL, function##_doc}

static PyMethodDef methods[] = {
    METHOD(dispatch_count), METHOD(dispatch_fill), METHOD(expand_count), METHOD(expand_fill),
    METHOD(pack_rows), METHOD(unpack_rows), METHOD(gather_rows), METHOD(sum_rows), METHOD(quantize_rows),
    METHOD(dequantize_rows), METHOD(simd_name), METHOD(simd_names),
    {"experts_product", (PyCFunction)(void (*)(void))experts_product_method, METH_FASTCALL, experts_product_doc},
    {"experts_is_fast", (PyCFunction)(void (*)(void))experts_is_fast_method, METH_FASTCALL, experts_is_fast_doc},
    METHOD(use_huge_pages),
    METHOD(exchange_control_bytes), METHOD(exchange_send), METHOD(exchange_receive), METHOD(exchange_look),
    METHOD(exchange_await), METHOD(parcels_post), METHOD(parcels_gather), METHOD(parcels_fetch), {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
#ifdef Py_mod_gil /* Python 3.13 and later: the module keeps no state, so free-threaded builds need no lock */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "moe_runtime._C",
    .m_doc = "The dispatch plan in C; moe_runtime.comm.plan is the public face.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_definition); }
