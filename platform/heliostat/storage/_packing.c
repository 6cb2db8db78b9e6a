/* A read as bytes of the Redis protocol: one pass over its keys, instead of an object for each.
 *
 * The twin of `quick_commands._packed`, which is what there is where this wasn't built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

static const char COMMAND[] = "$4\r\nMGET\r\n";

static Py_ssize_t digits(size_t number, char *found) /* at least 20 bytes of room */
{
    char backwards[20];
    Py_ssize_t n = 0;
    do {
        backwards[n++] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    for (Py_ssize_t i = 0; i < n; i++)
        found[i] = backwards[n - 1 - i];
    return n;
}

PyDoc_STRVAR(mget_doc, "mget(keys)\n--\n\nThe command MGET for a list of texts; None if they aren't one.");

static PyObject *mget(PyObject *module, PyObject *keys)
{
    if (!PyList_Check(keys))
        Py_RETURN_NONE;
    Py_ssize_t n = PyList_GET_SIZE(keys), most = 24 + (Py_ssize_t)sizeof COMMAND, length;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *key = PyList_GET_ITEM(keys, i);
        if (!PyUnicode_Check(key))
            Py_RETURN_NONE;
        if (PyUnicode_AsUTF8AndSize(key, &length) == NULL) /* kept by the text: the second time it is there */
            return NULL;
        most += length + 26; /* "$", digits and two line ends */
    }
    PyObject *packed = PyBytes_FromStringAndSize(NULL, most);
    if (packed == NULL)
        return NULL;
    char *at = PyBytes_AS_STRING(packed);
    *at++ = '*';
    at += digits((size_t)n + 1, at);
    *at++ = '\r', *at++ = '\n';
    memcpy(at, COMMAND, sizeof COMMAND - 1);
    at += sizeof COMMAND - 1;
    for (Py_ssize_t i = 0; i < n; i++) {
        const char *text = PyUnicode_AsUTF8AndSize(PyList_GET_ITEM(keys, i), &length);
        *at++ = '$';
        at += digits((size_t)length, at);
        *at++ = '\r', *at++ = '\n';
        memcpy(at, text, length);
        at += length;
        *at++ = '\r', *at++ = '\n';
    }
    if (_PyBytes_Resize(&packed, at - PyBytes_AS_STRING(packed)))
        return NULL;
    return packed;
}

static PyMethodDef methods[] = {
    {"mget", mget, METH_O, mget_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_packing", .m_doc = "Reads as bytes of the Redis protocol, in C.",
    .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__packing(void)
{
    return PyModuleDef_Init(&definition);
}
