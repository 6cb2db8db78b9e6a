/* Slots of many entities: what `assignment.slot_of` says of each, without an object of Python's for its digest.
 *
 * MD5 as RFC 1321 has it, of a prefix and a key; tests hold it against Python's own, which is used where this wasn't
 * built. It spreads entities evenly, and keeps no secret.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, LENGTH_AT = 56, SLOTS = 10000 };

static const uint32_t SINES[64] = {
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391,
};

static inline uint32_t word(const unsigned char *at)
{
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

#define STEP(mixed, a, b, c, d, i, from, turn)                         \
    do {                                                               \
        uint32_t sum = a + (mixed) + SINES[i] + word(block + 4 * (from)); \
        a = b + (sum << (turn) | sum >> (32 - (turn)));                \
    } while (0)
/* Four steps: each writes the word that the next one reads first. */
#define STEPS(MIX, i, step, first, w, x, y, z)                                    \
    do {                                                                          \
        STEP(MIX(b, c, d), a, b, c, d, i, (step * (i) + first) % 16, w);          \
        STEP(MIX(a, b, c), d, a, b, c, i + 1, (step * (i + 1) + first) % 16, x);  \
        STEP(MIX(d, a, b), c, d, a, b, i + 2, (step * (i + 2) + first) % 16, y);  \
        STEP(MIX(c, d, a), b, c, d, a, i + 3, (step * (i + 3) + first) % 16, z);  \
    } while (0)
#define CHOICE(x, y, z) (((x) & (y)) | (~(x) & (z)))
#define OTHER(x, y, z) (((x) & (z)) | ((y) & ~(z)))
#define PARITY(x, y, z) ((x) ^ (y) ^ (z))
#define LAST(x, y, z) ((y) ^ ((x) | ~(z)))

static void compress(uint32_t state[4], const unsigned char *block)
{
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    for (int i = 0; i < 16; i += 4)
        STEPS(CHOICE, i, 1, 0, 7, 12, 17, 22);
    for (int i = 16; i < 32; i += 4)
        STEPS(OTHER, i, 5, 1, 5, 9, 14, 20);
    for (int i = 32; i < 48; i += 4)
        STEPS(PARITY, i, 3, 5, 4, 11, 16, 23);
    for (int i = 48; i < 64; i += 4)
        STEPS(LAST, i, 7, 0, 6, 10, 15, 21);
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
}

/* The first eight bytes of a digest, as a number whose first byte is the highest. */
static uint64_t beginning(const char *prefix, size_t prefix_length, const char *key, size_t key_length)
{
    uint32_t state[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    unsigned char block[BLOCK];
    size_t total = prefix_length + key_length, at = 0;
    for (int ended = 0, done = 0; !done; at += BLOCK) {
        memset(block, 0, BLOCK);
        size_t i = 0;
        for (; i < BLOCK && at + i < prefix_length; i++)
            block[i] = (unsigned char)prefix[at + i];
        for (; i < BLOCK && at + i < total; i++)
            block[i] = (unsigned char)key[at + i - prefix_length];
        if (i < BLOCK && !ended)
            block[i] = 0x80, ended = 1;
        done = ended && (total < at || total - at < LENGTH_AT);
        for (int k = 0; done && k < 8; k++)
            block[LENGTH_AT + k] = (unsigned char)((uint64_t)total * 8 >> 8 * k);
        compress(state, block);
    }
    uint64_t found = 0;
    for (int i = 0; i < 8; i++)
        found = found << 8 | (state[i / 4] >> 8 * (i % 4) & 0xff);
    return found;
}

PyDoc_STRVAR(slots_doc, "slots(prefix, entities)\n--\n\n"
                        "The slots of entities, a sequence of texts, below a prefix, bytes: int32 of this machine.\n");

static PyObject *slots(PyObject *module, PyObject *const *given, Py_ssize_t n_given)
{
    if (n_given != 2 || !PyBytes_Check(given[0])) {
        PyErr_SetString(PyExc_TypeError, "slots() takes bytes and a sequence of texts");
        return NULL;
    }
    PyObject *entities = PySequence_Fast(given[1], "entities are a sequence");
    if (entities == NULL)
        return NULL;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(entities), length;
    PyObject *found = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(int32_t));
    for (Py_ssize_t i = 0; found != NULL && i < n; i++) {
        PyObject *entity = PySequence_Fast_GET_ITEM(entities, i);
        const char *key = NULL;
        if (PyUnicode_Check(entity))
            key = PyUnicode_AsUTF8AndSize(entity, &length);
        else
            PyErr_SetString(PyExc_TypeError, "an entity is a text");
        if (key == NULL) {
            Py_CLEAR(found);
            break;
        }
        uint64_t number = beginning(PyBytes_AS_STRING(given[0]), (size_t)PyBytes_GET_SIZE(given[0]), key, (size_t)length);
        int32_t slot = (int32_t)(number % SLOTS);
        memcpy(PyBytes_AS_STRING(found) + i * (Py_ssize_t)sizeof slot, &slot, sizeof slot);
    }
    Py_DECREF(entities);
    return found;
}

static PyMethodDef methods[] = {
    {"slots", (PyCFunction)(void (*)(void))slots, METH_FASTCALL, slots_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_slots", .m_doc = "Slots of experiments, in C.",
    .m_methods = methods, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__slots(void)
{
    return PyModuleDef_Init(&definition);
}
