/* moe_runtime._C: the only file that knows both Python and the C plan.
 *
 * It takes arrays by the buffer protocol, checks all of them before one pointer is used, and releases the GIL while
 * plan.c works. Every argument that cannot be used is a ValueError that names the argument. Callers allocate the
 * outputs; moe_runtime.comm.plan is the public face.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "plan.h"

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

#define METHOD(function) {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL, function##_doc}

static PyMethodDef methods[] = {
    METHOD(dispatch_count), METHOD(dispatch_fill), METHOD(expand_count), METHOD(expand_fill), {NULL, NULL, 0, NULL},
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
