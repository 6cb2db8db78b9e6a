/* What `compiled.py` asks of C: the rings of a request merged into features, and the names of their keys.
 *
 * Everything here has a twin in numpy or Python (`merging.py`, `view_plan.py`, `retrieval.py`) that gives the same bits;
 * tests hold the two together. Nothing is kept between calls, and nothing is trusted but the program of `compiled.py`.
 * Sums are taken slot by slot, in order: compile without fast-math and without contraction.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define FORMAT 2

/* A program: int64 words, a header and four tables. A double is stored by its bits. */
enum { H_FORMAT, H_GROUPS, H_WINDOWS, H_STEPS, H_FEATURES, H_SCRATCH, H_TTL, H_LAST_EVENT, H_WORDS };
enum { G_HOP, G_WIDTH, G_LIFE, G_ID, G_SECOND_ID, G_WORDS };
enum { W_GROUP, W_LENGTH, W_FIRST, W_STEPS, W_WORDS };
enum { S_OPERATOR, S_COLUMN, S_SCRATCH, S_WORDS };
enum { F_KIND, F_A, F_B, F_OUT, F_NUMBER, F_WORDS };

enum { ADD, LEAST, MOST, UNION, FIRST, LAST };
enum { PLAIN, RATIO, SINCE, EDGE, MEMBERS };

typedef struct {
    const char *slots; /* of one entity */
    Py_ssize_t n;
} Ring;

/* A bundle: how many rings; of each its id, of two words, and how many bytes it has; the rings. All in words. */
enum { E_ID, E_SECOND_ID, E_SIZE, E_WORDS };

typedef struct {
    const char *entries, *rings;
    int64_t n;
} Bundle;

static inline double number(const char *place)
{
    double value;
    memcpy(&value, place, sizeof value);
    return value;
}

static inline int64_t floor_division(int64_t a, int64_t b) /* b > 0 */
{
    int64_t quotient = a / b;
    return quotient - (a % b < 0);
}

/* Whether a value is a bundle, or none. Its rings have whole lengths that fill it: `ring_of` relies on that. */
static int bundle_of(PyObject *value, Bundle *found)
{
    memset(found, 0, sizeof *found);
    if (value == Py_None)
        return 1;
    if (!PyBytes_Check(value)) {
        PyErr_Format(PyExc_TypeError, "a bundle is bytes, not %.50s", Py_TYPE(value)->tp_name);
        return 0;
    }
    const char *at = PyBytes_AS_STRING(value);
    Py_ssize_t size = PyBytes_GET_SIZE(value);
    if (size == 0)
        return 1;
    double n = size < 8 ? -1.0 : number(at);
    if (!(n >= 1.0 && n <= (double)((size - 8) / (8 * E_WORDS))) || n != floor(n))
        goto wrong;
    found->n = (int64_t)n;
    found->entries = at + 8;
    found->rings = found->entries + found->n * 8 * E_WORDS;
    double left = (double)(at + size - found->rings);
    for (int64_t i = 0; i < found->n; i++) {
        double length = number(found->entries + 8 * (i * E_WORDS + E_SIZE));
        if (!(length >= 0.0 && length <= left) || length != floor(length))
            goto wrong;
        left -= length;
    }
    if (left == 0.0)
        return 1;
wrong:
    PyErr_SetString(PyExc_ValueError, "no bundle of rings");
    return 0;
}

/* A ring of a bundle, and its bytes; none if it has no such ring. `id` is two words. */
static const char *ring_of(const Bundle *bundle, const void *id, Py_ssize_t *size)
{
    const char *ring = bundle->rings, *entry = bundle->entries;
    for (int64_t i = 0; i < bundle->n; i++, entry += 8 * E_WORDS) {
        *size = (Py_ssize_t)number(entry + 8 * E_SIZE);
        if (memcmp(entry, id, 16) == 0)
            return ring;
        ring += *size;
    }
    *size = 0;
    return "";
}

/* One state over the slots that count. `out` takes a number, or three of an edge. */
static void fold(int64_t operator, const char *column, const int32_t *used, Py_ssize_t n, Py_ssize_t slot, double *out)
{
    Py_ssize_t i;
    double found;
    switch (operator) {
    case ADD:
        found = 0.0;
        for (i = 0; i < n; i++)
            found += number(column + used[i] * slot);
        out[0] = found;
        return;
    case LEAST: /* as numpy.minimum: what is no number stays */
        found = INFINITY;
        for (i = 0; i < n; i++) {
            double value = number(column + used[i] * slot);
            found = (found < value || found != found) ? found : value;
        }
        out[0] = found;
        return;
    case MOST:
        found = -INFINITY;
        for (i = 0; i < n; i++) {
            double value = number(column + used[i] * slot);
            found = (found > value || found != found) ? found : value;
        }
        out[0] = found;
        return;
    case UNION: {
        int64_t members = 0;
        for (i = 0; i < n; i++)
            members |= (int64_t)number(column + used[i] * slot);
        out[0] = (double)members;
        return;
    }
    default: { /* by time, then by tie; of equal ones the first or the last slot */
        const char *best = NULL;
        double time = 0.0, tie = 0.0;
        for (i = 0; i < n; i++) {
            const char *place = column + used[i] * slot;
            double at = number(place), then = number(place + 8);
            if (best == NULL || (operator == FIRST ? at < time || (at == time && then < tie)
                                                   : at > time || (at == time && then >= tie))) {
                best = place;
                time = at;
                tie = then;
            }
        }
        out[0] = best == NULL ? INFINITY : time;
        out[1] = tie;
        out[2] = best == NULL ? 0.0 : number(best + 16);
    }
    }
}

static double finished(const int64_t *feature, const double *scratch, double as_of)
{
    double a = scratch[feature[F_A]], given;
    memcpy(&given, &feature[F_NUMBER], sizeof given);
    switch (feature[F_KIND]) {
    case PLAIN:
        return a == given ? NAN : a;
    case RATIO: {
        double b = scratch[feature[F_B]];
        return a / (b > 0 ? b : NAN);
    }
    case SINCE:
        return (as_of - (a == -INFINITY ? NAN : a)) / given;
    case EDGE:
        return isfinite(a) ? scratch[feature[F_A] + 2] : NAN;
    default: { /* MEMBERS */
        uint64_t bits = (uint64_t)(int64_t)a;
        int n = 0;
        for (; bits; bits &= bits - 1)
            n++;
        return n ? (double)n : NAN;
    }
    }
}

typedef struct {
    const int64_t *groups, *windows, *steps, *features;
    int64_t n_groups, n_windows, n_features, n_scratch, ttl_us, last_event;
    int64_t as_of_us;
    int32_t *used;       /* slots that count, room for all of a ring's */
    double *scratch;     /* merged states of one entity */
} Run;

/* The time of the last event in a life ring, whatever its slots' tiles are. */
static double last_event(const Run *run, Ring ring)
{
    const int64_t *life = run->groups + (run->n_groups - 1) * G_WORDS;
    Py_ssize_t slot = 8 * life[G_WIDTH], n = 0, i;
    double before = (double)-floor_division(-run->as_of_us, life[G_HOP]);
    for (i = 0; i < ring.n; i++)
        if (i == 0 || number(ring.slots + i * slot) < before)
            run->used[n++] = (int32_t)i;
    double found;
    fold(MOST, ring.slots + 8 * run->last_event, run->used, n, slot, &found);
    return found;
}

static void merge_one(const Run *run, const Ring *rings, int expired, char *out, Py_ssize_t column_stride)
{
    for (int64_t w = 0; w < run->n_windows; w++) {
        const int64_t *window = run->windows + w * W_WORDS;
        const int64_t *group = run->groups + window[W_GROUP] * G_WORDS;
        Ring ring = rings[window[W_GROUP]];
        Py_ssize_t slot = 8 * group[G_WIDTH], n = 0, i;
        double before = (double)-floor_division(-run->as_of_us, group[G_HOP]);
        double since = -INFINITY;
        if (window[W_LENGTH] >= 0)
            since = (double)floor_division(run->as_of_us - window[W_LENGTH], group[G_HOP]);
        int base = window[W_LENGTH] < 0 && group[G_LIFE];
        if (!expired)
            for (i = 0; i < ring.n; i++) {
                double tile = number(ring.slots + i * slot);
                if ((base && i == 0) || (tile < before && tile >= since))
                    run->used[n++] = (int32_t)i;
            }
        const int64_t *step = run->steps + window[W_FIRST] * S_WORDS;
        for (int64_t s = 0; s < window[W_STEPS]; s++, step += S_WORDS)
            fold(step[S_OPERATOR], ring.slots + 8 * step[S_COLUMN], run->used, n, slot, run->scratch + step[S_SCRATCH]);
    }
    const int64_t *feature = run->features;
    for (int64_t f = 0; f < run->n_features; f++, feature += F_WORDS)
        *(double *)(void *)(out + feature[F_OUT] * column_stride)
            = finished(feature, run->scratch, (double)run->as_of_us);
}

/* A table of `item` bytes each; 0 and an error if the object is anything else. */
static int table_of(PyObject *object, int n_dimensions, Py_ssize_t item, Py_buffer *found)
{
    if (PyObject_GetBuffer(object, found, PyBUF_WRITABLE | PyBUF_STRIDES))
        return 0;
    if (found->ndim == n_dimensions && found->itemsize == item)
        return 1;
    PyErr_SetString(PyExc_TypeError, "results are float64 and bool, of one and two dimensions");
    return 0;
}

PyDoc_STRVAR(merge_doc,
    "merge(program, values, first, as_of_us, out, newest_us, absent, view)\n--\n\n"
    "Merge the rings of many entities; see MergeProgram.run.");

static PyObject *merge(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    if (n_arguments != 8) {
        PyErr_SetString(PyExc_TypeError, "merge takes 8 arguments");
        return NULL;
    }
    PyObject *program = arguments[0], *values = arguments[1], *result = NULL;
    if (!PyBytes_Check(program) || !PyList_Check(values)) {
        PyErr_SetString(PyExc_TypeError, "a program is bytes, and values are a list");
        return NULL;
    }
    Py_ssize_t first = PyLong_AsSsize_t(arguments[2]), view = PyLong_AsSsize_t(arguments[7]);
    int64_t as_of_us = PyLong_AsLongLong(arguments[3]);
    if (PyErr_Occurred())
        return NULL;

    const int64_t *words = (const int64_t *)(const void *)PyBytes_AS_STRING(program);
    Py_ssize_t n_words = PyBytes_GET_SIZE(program) / 8;
    if (n_words < H_WORDS || words[H_FORMAT] != FORMAT
        || n_words != H_WORDS + words[H_GROUPS] * G_WORDS + words[H_WINDOWS] * W_WORDS
                          + words[H_STEPS] * S_WORDS + words[H_FEATURES] * F_WORDS) {
        PyErr_SetString(PyExc_ValueError, "a program of another format");
        return NULL;
    }
    Run run = {.n_groups = words[H_GROUPS], .n_windows = words[H_WINDOWS], .n_features = words[H_FEATURES],
               .n_scratch = words[H_SCRATCH], .ttl_us = words[H_TTL], .last_event = words[H_LAST_EVENT],
               .as_of_us = as_of_us};
    run.groups = words + H_WORDS;
    run.windows = run.groups + run.n_groups * G_WORDS;
    run.steps = run.windows + run.n_windows * W_WORDS;
    run.features = run.steps + words[H_STEPS] * S_WORDS;

    Py_buffer out = {0}, newest = {0}, absent = {0};
    Ring *rings = NULL;
    if (!table_of(arguments[4], 2, 8, &out) || !table_of(arguments[5], 1, 8, &newest)
        || !table_of(arguments[6], 2, 1, &absent))
        goto done;
    Py_ssize_t n = out.shape[0];
    int64_t last_column = -1;
    for (int64_t f = 0; f < run.n_features; f++)
        if (run.features[f * F_WORDS + F_OUT] > last_column)
            last_column = run.features[f * F_WORDS + F_OUT];
    if (last_column >= out.shape[1] || newest.shape[0] != n || absent.shape[0] != n || view < 0
        || view >= absent.shape[1] || first < 0 || run.n_groups < 1
        || first + n > PyList_GET_SIZE(values)) {
        PyErr_SetString(PyExc_IndexError, "fewer values than entities, or no room for results");
        goto done;
    }

    rings = PyMem_Malloc((n ? n : 1) * run.n_groups * sizeof *rings);
    if (rings == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_ssize_t most = 0; /* slots of a ring */
    for (Py_ssize_t e = 0; e < n; e++) {
        Bundle bundle;
        if (!bundle_of(PyList_GET_ITEM(values, first + e), &bundle))
            goto done;
        for (int64_t g = 0; g < run.n_groups; g++) {
            const int64_t *group = run.groups + g * G_WORDS;
            Ring *ring = rings + e * run.n_groups + g;
            Py_ssize_t slot = 8 * group[G_WIDTH], size;
            ring->slots = ring_of(&bundle, group + G_ID, &size);
            if (size % slot) {
                PyErr_SetString(PyExc_ValueError, "a ring's length is no multiple of its layout's slots");
                goto done;
            }
            ring->n = size / slot;
            if (ring->n > most)
                most = ring->n;
        }
    }

    run.scratch = PyMem_Malloc((run.n_scratch ? run.n_scratch : 1) * sizeof *run.scratch);
    run.used = PyMem_Malloc((most ? most : 1) * sizeof *run.used);
    if (run.scratch == NULL || run.used == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    const int64_t *longest = run.groups + (run.n_groups - 1) * G_WORDS;
    for (Py_ssize_t e = 0; e < n; e++) {
        const Ring *own = rings + e * run.n_groups;
        Ring ring = own[run.n_groups - 1];
        Py_ssize_t all = 0;
        for (int64_t g = 0; g < run.n_groups; g++)
            all += own[g].n;
        int expired = 0;
        if (run.ttl_us >= 0)
            expired = !((double)as_of_us - last_event(&run, ring) <= (double)run.ttl_us);
        merge_one(&run, own, expired, (char *)out.buf + e * out.strides[0], out.strides[1]);
        ((char *)absent.buf)[e * absent.strides[0] + view * absent.strides[1]] = all == 0 || expired;
        if (ring.n > (longest[G_LIFE] != 0)) {
            double tile = floor(number(ring.slots + (ring.n - 1) * 8 * longest[G_WIDTH])) * (double)longest[G_HOP];
            double *known = (double *)(void *)((char *)newest.buf + e * newest.strides[0]);
            if (!(*known >= tile))
                *known = tile;
        }
    }
    result = Py_NewRef(Py_None);

done:
    PyMem_Free(rings);
    PyMem_Free(run.scratch);
    PyMem_Free(run.used);
    if (out.obj)
        PyBuffer_Release(&out);
    if (newest.obj)
        PyBuffer_Release(&newest);
    if (absent.obj)
        PyBuffer_Release(&absent);
    return result;
}

PyDoc_STRVAR(rings_doc, "rings(values, ring_id)\n--\n\nOne ring of each bundle; empty where there is none.");

static PyObject *rings_of(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    if (n_arguments != 2 || !PyList_Check(arguments[0]) || !PyBytes_Check(arguments[1])
        || PyBytes_GET_SIZE(arguments[1]) != 16) {
        PyErr_SetString(PyExc_TypeError, "rings takes a list of bundles, and an id of 16 bytes");
        return NULL;
    }
    Py_ssize_t n = PyList_GET_SIZE(arguments[0]), size;
    PyObject *found = PyList_New(n);
    for (Py_ssize_t i = 0; found != NULL && i < n; i++) {
        Bundle bundle;
        PyObject *ring = NULL;
        if (bundle_of(PyList_GET_ITEM(arguments[0], i), &bundle)) {
            const char *at = ring_of(&bundle, PyBytes_AS_STRING(arguments[1]), &size);
            ring = PyBytes_FromStringAndSize(at, size);
        }
        if (ring == NULL)
            Py_CLEAR(found);
        else
            PyList_SET_ITEM(found, i, ring);
    }
    return found;
}

/* An integer as Python writes it, inside int64; 0 if it is anything else. */
static int integer_of(PyObject *text, uint64_t *found)
{
    if (!PyUnicode_Check(text) || !PyUnicode_IS_ASCII(text))
        return 0;
    const char *at = PyUnicode_DATA(text);
    Py_ssize_t n = PyUnicode_GET_LENGTH(text);
    int negative = n > 0 && *at == '-';
    at += negative;
    n -= negative;
    if (n < 1 || n > 19 || (*at == '0' && (n > 1 || negative)))
        return 0;
    uint64_t value = 0; /* 19 digits are less than 2^64 */
    for (Py_ssize_t i = 0; i < n; i++) {
        if (at[i] < '0' || at[i] > '9')
            return 0;
        value = 10 * value + (uint64_t)(at[i] - '0');
    }
    if (value > (uint64_t)INT64_MAX + (uint64_t)negative)
        return 0;
    *found = negative ? 0 - value : value;
    return 1;
}

/* Steele, Lea and Flood 2014, as `schema.hash64`. */
static uint64_t splitmix64(uint64_t key)
{
    uint64_t mixed = key + 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
    return mixed ^ (mixed >> 31);
}

PyDoc_STRVAR(names_doc,
    "names(prefixes, tags, texts)\n--\n\n"
    "Names of the bundles of integer keys, prefix by prefix; None if Python has to look at them.");

static PyObject *names(PyObject *module, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    if (n_arguments != 3 || !PyTuple_Check(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyTuple_GET_SIZE(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "names takes tuples of prefixes and tags, and texts");
        return NULL;
    }
    PyObject *prefixes = arguments[0], *tags = arguments[1], *texts = arguments[2], *found = NULL;
    for (int which = 0; which < 2; which++)
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[which]); i++) {
            PyObject *each = PyTuple_GET_ITEM(arguments[which], i);
            if (!PyUnicode_Check(each) || !PyUnicode_IS_ASCII(each))
                Py_RETURN_NONE;
        }
    if (!PyList_Check(texts) && !PyTuple_Check(texts))
        Py_RETURN_NONE;
    PyObject **items = PySequence_Fast_ITEMS(texts);
    Py_ssize_t n = PySequence_Fast_GET_SIZE(texts), n_prefixes = PyTuple_GET_SIZE(prefixes);
    found = PyList_New(n * n_prefixes);
    if (found == NULL)
        return NULL;
    for (Py_ssize_t row = 0; row < n; row++) {
        PyObject *text = items[row];
        uint64_t key;
        if (!integer_of(text, &key)) {
            Py_DECREF(found);
            Py_RETURN_NONE;
        }
        PyObject *tag = PyTuple_GET_ITEM(tags, splitmix64(key) % (uint64_t)PyTuple_GET_SIZE(tags));
        Py_ssize_t n_tag = PyUnicode_GET_LENGTH(tag), n_text = PyUnicode_GET_LENGTH(text);
        for (Py_ssize_t p = 0; p < n_prefixes; p++) {
            PyObject *prefix = PyTuple_GET_ITEM(prefixes, p);
            Py_ssize_t n_prefix = PyUnicode_GET_LENGTH(prefix);
            PyObject *name = PyUnicode_New(n_prefix + n_tag + n_text, 127);
            if (name == NULL) {
                Py_DECREF(found);
                return NULL;
            }
            char *at = PyUnicode_DATA(name);
            memcpy(at, PyUnicode_DATA(prefix), n_prefix);
            memcpy(at + n_prefix, PyUnicode_DATA(tag), n_tag);
            memcpy(at + n_prefix + n_tag, PyUnicode_DATA(text), n_text);
            PyList_SET_ITEM(found, p * n + row, name);
        }
    }
    return found;
}

static PyMethodDef methods[] = {
    {"merge", (PyCFunction)(void (*)(void))merge, METH_FASTCALL, merge_doc},
    {"rings", (PyCFunction)(void (*)(void))rings_of, METH_FASTCALL, rings_doc},
    {"names", (PyCFunction)(void (*)(void))names, METH_FASTCALL, names_doc},
    {NULL, NULL, 0, NULL},
};

static int started(PyObject *module)
{
    return PyModule_AddIntConstant(module, "FORMAT", FORMAT);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, started}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_compiled", .m_doc = "Rings and their keys, in C.", .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__compiled(void)
{
    return PyModuleDef_Init(&definition);
}
