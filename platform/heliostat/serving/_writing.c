/* The entities of an answer as JSON: one pass over its columns, instead of an object and its members for each.
 *
 * The twin of `answers.PredictAnswer.document`, which is what there is where this wasn't built. What an entity looks
 * like is said there alone: here the places of a frame are filled, and rows that are alike share theirs.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

enum { BEFORE_ID, BEFORE_SCORE, BEFORE_NAME, END, PIECES };
enum { COLUMNS = 4, FRAMES = 8 };

typedef struct {
    PyObject *text; /* bytes, longer than what is in them */
    Py_ssize_t used;
} Text;

typedef struct {
    const char *at, *end; /* of a JSON array without white space */
} Items;

typedef struct {
    PyObject *row[COLUMNS]; /* the objects themselves: a frame of equal ones is made again, which is no harm */
    PyObject *pieces;
} Frame;

static int put(Text *to, const char *what, Py_ssize_t length)
{
    Py_ssize_t room = PyBytes_GET_SIZE(to->text);
    if (to->used + length > room && _PyBytes_Resize(&to->text, 2 * room + length))
        return -1;
    memcpy(PyBytes_AS_STRING(to->text) + to->used, what, (size_t)length);
    to->used += length;
    return 0;
}

static int put_bytes(Text *to, PyObject *bytes)
{
    return put(to, PyBytes_AS_STRING(bytes), PyBytes_GET_SIZE(bytes));
}

/* Length of the item that comes next; the reader is behind it then, and behind the comma. -1: there is none. */
static Py_ssize_t next_item(Items *items, const char **item)
{
    const char *at = items->at;
    int depth = 0, quoted = 0;
    for (; at < items->end; at++) {
        if (quoted) {
            if (*at == '\\')
                at++;
            else if (*at == '"')
                quoted = 0;
        } else if (*at == '"')
            quoted = 1;
        else if (*at == '[' || *at == '{')
            depth++;
        else if (depth && (*at == ']' || *at == '}'))
            depth--;
        else if (!depth && (*at == ',' || *at == ']'))
            break;
    }
    if (at >= items->end || at == items->at)
        return -1;
    *item = items->at;
    items->at = at + 1;
    return at - *item;
}

static Items items_of(PyObject *array)
{
    const char *text = PyBytes_AS_STRING(array);
    return (Items){text + 1, text + PyBytes_GET_SIZE(array)};
}

/* The pieces of a row's frame, borrowed: those of a row before it, or made now. */
static PyObject *pieces_of(Frame *frames, Py_ssize_t *made, PyObject **row, PyObject *make)
{
    for (Py_ssize_t i = *made < FRAMES ? *made : FRAMES; i-- > 0;)
        if (!memcmp(frames[i].row, row, sizeof frames[i].row))
            return frames[i].pieces;
    for (int i = 0; i < COLUMNS; i++)
        Py_INCREF(row[i]); /* what is called may change the lists that they are in */
    PyObject *pieces = PyObject_Vectorcall(make, row, COLUMNS, NULL);
    int fits = pieces != NULL && PyTuple_Check(pieces) && PyTuple_GET_SIZE(pieces) == PIECES;
    for (Py_ssize_t i = 0; fits && i < PIECES; i++)
        fits = PyBytes_Check(PyTuple_GET_ITEM(pieces, i));
    if (!fits) {
        if (pieces != NULL)
            PyErr_Format(PyExc_TypeError, "a frame is a tuple of %d bytes", PIECES);
        Py_XDECREF(pieces);
        for (int i = 0; i < COLUMNS; i++)
            Py_DECREF(row[i]);
        return NULL;
    }
    Frame *frame = &frames[(*made)++ % FRAMES];
    for (int i = 0; i < COLUMNS; i++)
        Py_XSETREF(frame->row[i], row[i]);
    Py_XSETREF(frame->pieces, pieces);
    return pieces;
}

static int put_entity(Text *to, PyObject *pieces, Items *ids, Items *scores, const char *request, Py_ssize_t row)
{
    const char *id, *score;
    Py_ssize_t id_length = next_item(ids, &id), score_length = next_item(scores, &score);
    if (id_length < 0 || score_length < 0) {
        PyErr_Format(PyExc_ValueError, "row %zd has no %s", row, id_length < 0 ? "entity id" : "score");
        return -1;
    }
    char number[24], *digits = number + sizeof number;
    *--digits = '"';
    do
        *--digits = (char)('0' + row % 10);
    while (row /= 10);
    *--digits = '-';
    return put_bytes(to, PyTuple_GET_ITEM(pieces, BEFORE_ID)) || put(to, id, id_length) ||
           put_bytes(to, PyTuple_GET_ITEM(pieces, BEFORE_SCORE)) || put(to, score, score_length) ||
           put_bytes(to, PyTuple_GET_ITEM(pieces, BEFORE_NAME)) || put(to, "\"", 1) ||
           put(to, request, (Py_ssize_t)strlen(request)) || put(to, digits, number + sizeof number - digits) ||
           put_bytes(to, PyTuple_GET_ITEM(pieces, END));
}

PyDoc_STRVAR(entities_doc,
             "entities(ids, scores, request_id, variants, versions, missing, absent, frame)\n--\n\n"
             "A JSON array of an answer's entities.\n\n"
             "Args:\n"
             "    ids: What the client called them: a JSON array without white space.\n"
             "    scores: Their scores, likewise.\n"
             "    request_id: Letters and digits alone: a row's name is this and its number.\n"
             "    variants, versions, missing, absent: Lists, a value a row.\n"
             "    frame: Of a row's values in these lists, the text around its id, its score and its name: four\n"
             "        pieces, bytes.\n\n"
             "Raises:\n"
             "    TypeError: If an argument is something else.\n"
             "    ValueError: If there aren't as many ids or scores as rows.\n");

static PyObject *entities(PyObject *module, PyObject *const *given, Py_ssize_t n_given)
{
    const char *request;
    int fits = n_given == 8 && PyBytes_Check(given[0]) && PyBytes_Check(given[1]) && PyUnicode_Check(given[2]);
    for (int i = 0; fits && i < COLUMNS; i++)
        fits = PyList_Check(given[3 + i]);
    if (!fits) {
        PyErr_SetString(PyExc_TypeError, "entities() takes two bytes, a text, four lists and a function");
        return NULL;
    }
    if ((request = PyUnicode_AsUTF8(given[2])) == NULL)
        return NULL;
    Items ids = items_of(given[0]), scores = items_of(given[1]);
    Py_ssize_t n = PyList_GET_SIZE(given[3]), made = 0;
    for (int i = 1; i < COLUMNS; i++)
        if (PyList_GET_SIZE(given[3 + i]) != n) {
            PyErr_Format(PyExc_ValueError, "there are columns of %zd and of %zd rows", n, PyList_GET_SIZE(given[3 + i]));
            return NULL;
        }
    Frame frames[FRAMES] = {0};
    Text to = {PyBytes_FromStringAndSize(NULL, 64 + 320 * n), 0};
    if (to.text == NULL)
        return NULL;
    int failed = put(&to, "[", 1);
    for (Py_ssize_t i = 0; !failed && i < n; i++) {
        PyObject *row[COLUMNS], *pieces;
        failed = 1;
        for (int column = 0; column < COLUMNS; column++)
            if ((row[column] = PyList_GetItem(given[3 + column], i)) == NULL)
                goto end;
        if ((pieces = pieces_of(frames, &made, row, given[7])) == NULL)
            goto end;
        failed = (i && put(&to, ",", 1)) || put_entity(&to, pieces, &ids, &scores, request, i);
    }
    if (!failed && n && (ids.at != ids.end || scores.at != scores.end)) {
        PyErr_Format(PyExc_ValueError, "there are more ids or scores than %zd rows", n);
        failed = 1;
    }
    failed = failed || put(&to, "]", 1) || _PyBytes_Resize(&to.text, to.used);
end:
    for (int i = 0; i < FRAMES; i++) {
        for (int column = 0; column < COLUMNS; column++)
            Py_XDECREF(frames[i].row[column]);
        Py_XDECREF(frames[i].pieces);
    }
    if (failed)
        Py_CLEAR(to.text);
    return to.text;
}

static PyMethodDef methods[] = {
    {"entities", (PyCFunction)(void (*)(void))entities, METH_FASTCALL, entities_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_writing", .m_doc = "Answers as JSON, in C.",
    .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__writing(void)
{
    return PyModuleDef_Init(&definition);
}
