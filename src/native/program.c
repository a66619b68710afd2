/* boxship.linux._sys.Operations: the part of `boxship.linux.remote.Program` that runs once for every operation.
 *
 * A container takes some five hundred operations; put together one by one in Python they cost more than all else that the
 * runtime does before init begins. What an operation means is in init.c, and how programs are put together in remote.py;
 * here is only the layout: operations in the order of their appending, then the data that their pointers lead to.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

#include "program.h"

/* As init.c has it. */
struct op {
	uint32_t nr;
	uint16_t dst, regs;
	uint32_t on_ok, on_err;
	int64_t result;
	uint64_t args[6];
};
_Static_assert(sizeof(struct op) == 72, "init.c and remote.py count on it");

enum { FREE_REGISTER = 2, REUSED_REGISTER = 32, RECEIVED = 64 };
#define BASE 0x200000000000u

static PyTypeObject *reg_type, *label_type;
static PyObject *name_dst, *name_what, *name_on_err, *name_on_ok, *no_text;

/* --- registers and labels ---------------------------------------------------------------------------------------- */

struct reg { PyObject_HEAD int number; };

static PyObject *make_reg(int number)
{
	allocfunc alloc = (allocfunc)PyType_GetSlot(reg_type, Py_tp_alloc);
	struct reg *reg = (struct reg *)alloc(reg_type, 0);
	if (reg)
		reg->number = number;
	return (PyObject *)reg;
}

static PyObject *reg_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	(void)type;
	(void)kwargs;
	int number;
	return PyArg_ParseTuple(args, "i:Reg", &number) ? make_reg(number) : NULL;
}

struct user { uint32_t op; int on_ok; };

struct label {
	PyObject_HEAD
	Py_ssize_t index;  /* -1: not marked yet */
	struct user *users;
	size_t count, room;
};

static PyObject *label_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	if (kwargs || PyTuple_Size(args)) {
		PyErr_SetString(PyExc_TypeError, "Label() takes no arguments");
		return NULL;
	}
	allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	struct label *label = (struct label *)alloc(type, 0);
	if (label)
		label->index = -1;
	return (PyObject *)label;
}

static void free_object(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
	release(self);
	Py_DecRef((PyObject *)type);
}

static void label_dealloc(PyObject *self)
{
	free(((struct label *)self)->users);
	free_object(self);
}

/* --- operations -------------------------------------------------------------------------------------------------- */

/* An address to be written once it is known where the data will lie: of argument `argument` of an operation, or, where
 * `op` is negative, into the data itself at `argument`. */
struct pointer { int64_t op; uint64_t argument, offset; };

struct operations {
	PyObject_HEAD
	struct op *ops;
	struct pointer *pointers;
	unsigned char *data;
	size_t op_count, op_room, pointer_count, pointer_room, data_size, data_room;
	int next_register;
	Py_ssize_t data_base;
	PyObject *strings, *texts, *contexts, *context;
};

static int grow(void *array, size_t *room, size_t wanted, size_t size)
{
	if (wanted <= *room)
		return 0;
	size_t larger = *room ? *room * 2 : 64;
	while (larger < wanted)
		larger *= 2;
	void *moved = realloc(*(void **)array, larger * size);
	if (!moved) {
		PyErr_NoMemory();
		return -1;
	}
	*(void **)array = moved;
	*room = larger;
	return 0;
}

static PyObject *operations_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	(void)args;
	(void)kwargs;
	allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	struct operations *self = (struct operations *)alloc(type, 0);
	if (!self)
		return NULL;
	self->next_register = FREE_REGISTER;
	self->strings = PyDict_New();
	self->texts = PyList_New(0);
	self->contexts = PyList_New(0);
	Py_IncRef(no_text);
	self->context = no_text;
	if (!self->strings || !self->texts || !self->contexts) {
		Py_DecRef((PyObject *)self);
		return NULL;
	}
	return (PyObject *)self;
}

static void operations_dealloc(PyObject *object)
{
	struct operations *self = (struct operations *)object;
	free(self->ops);
	free(self->pointers);
	free(self->data);
	Py_DecRef(self->strings);
	Py_DecRef(self->texts);
	Py_DecRef(self->contexts);
	Py_DecRef(self->context);
	free_object(object);
}

static Py_ssize_t operations_length(PyObject *self)
{
	return (Py_ssize_t)((struct operations *)self)->op_count;
}

/* The offset of a copy of `data`, or -1. */
static int64_t put(struct operations *self, const void *data, size_t size, size_t align)
{
	size_t start = self->data_size + (align - self->data_size % align) % align;
	if (grow(&self->data, &self->data_room, start + size, 1) < 0)
		return -1;
	memset(self->data + self->data_size, 0, start - self->data_size);
	memcpy(self->data + start, data, size);
	self->data_size = start + size;
	return (int64_t)start;
}

static int64_t put_buffer(struct operations *self, PyObject *object, size_t align)
{
	Py_buffer view;
	if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0)
		return -1;
	int64_t offset = put(self, view.buf, (size_t)view.len, align);
	PyBuffer_Release(&view);
	return offset;
}

/* Each string is there once. */
static int64_t put_string(struct operations *self, PyObject *text)
{
	PyObject *known = PyDict_GetItemWithError(self->strings, text);
	if (known)
		return PyLong_AsLongLong(known);
	if (PyErr_Occurred())
		return -1;
	PyObject *raw = PyUnicode_EncodeFSDefault(text);
	if (!raw)
		return -1;
	char *bytes = PyBytes_AsString(raw);
	size_t size = (size_t)PyBytes_Size(raw);
	int64_t offset = -1;
	if (memchr(bytes, 0, size))
		PyErr_Format(PyExc_ValueError, "%R contains a NUL byte", text);
	else
		offset = put(self, bytes, size + 1, 1);
	Py_DecRef(raw);
	if (offset < 0)
		return -1;
	PyObject *number = PyLong_FromLongLong(offset);
	int failed = !number || PyDict_SetItem(self->strings, text, number) < 0;
	Py_DecRef(number);
	return failed ? -1 : offset;
}

static int add_pointer(struct operations *self, int64_t op, uint64_t argument, uint64_t offset)
{
	if (grow(&self->pointers, &self->pointer_room, self->pointer_count + 1, sizeof *self->pointers) < 0)
		return -1;
	self->pointers[self->pointer_count++] = (struct pointer){op, argument, offset};
	return 0;
}

static int to_argument(struct operations *self, struct op *op, uint32_t index, int position, PyObject *argument)
{
	if (PyLong_Check(argument)) {
		op->args[position] = PyLong_AsUnsignedLongLongMask(argument);
		return op->args[position] == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
	}
	if (Py_TYPE(argument) == reg_type) {
		op->args[position] = (uint64_t)((struct reg *)argument)->number;
		op->regs |= (uint16_t)(1 << position);
		return 0;
	}
	if (argument == Py_None)
		return 0;
	int64_t offset = PyUnicode_Check(argument) ? put_string(self, argument) : put_buffer(self, argument, 8);
	return offset < 0 ? -1 : add_pointer(self, index, (uint64_t)position, (uint64_t)offset);
}

static int use_label(struct label *label, struct op *op, uint32_t index, int on_ok)
{
	if (label->index >= 0) {
		*(on_ok ? &op->on_ok : &op->on_err) = (uint32_t)label->index;
		return 0;
	}
	if (grow(&label->users, &label->room, label->count + 1, sizeof *label->users) < 0)
		return -1;
	label->users[label->count++] = (struct user){index, on_ok};
	return 0;
}

static int is_name(PyObject *given, PyObject *name)
{
	return given == name || PyUnicode_Compare(given, name) == 0;
}

static PyObject *operations_call(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
	struct operations *self = (struct operations *)object;
	if (count < 1 || count > 7) {
		PyErr_SetString(PyExc_TypeError, "call(nr, *args) takes a number and up to six arguments");
		return NULL;
	}
	PyObject *dst = Py_None, *what = no_text, *on_err = NULL, *on_ok = Py_None;
	for (Py_ssize_t i = 0, named = names ? PyTuple_Size(names) : 0; i < named; i++) {
		PyObject *name = PyTuple_GetItem(names, i), *value = args[count + i];
		if (is_name(name, name_what))
			what = value;
		else if (is_name(name, name_dst))
			dst = value;
		else if (is_name(name, name_on_err))
			on_err = value;
		else if (is_name(name, name_on_ok))
			on_ok = value;
		else {
			PyErr_Format(PyExc_TypeError, "call() has no argument %R", name);
			return NULL;
		}
	}
	if (!PyUnicode_Check(what) || (dst != Py_None && Py_TYPE(dst) != reg_type) || (on_ok != Py_None && Py_TYPE(on_ok) != label_type)) {
		PyErr_SetString(PyExc_TypeError, "call(nr, *args, dst: Reg, what: str, on_err: int | Label, on_ok: Label)");
		return NULL;
	}
	uint32_t index = (uint32_t)self->op_count;
	struct op op = {0};
	op.nr = (uint32_t)PyLong_AsUnsignedLong(args[0]);
	if (op.nr == (uint32_t)-1 && PyErr_Occurred())
		return NULL;
	if (dst != Py_None)
		op.dst = (uint16_t)((struct reg *)dst)->number;
	size_t pointers = self->pointer_count;
	for (Py_ssize_t i = 1; i < count; i++)
		if (to_argument(self, &op, index, (int)i - 1, args[i]) < 0) {
			self->pointer_count = pointers;
			return NULL;
		}
	if (on_err) {
		if (Py_TYPE(on_err) == label_type) {
			if (use_label((struct label *)on_err, &op, index, 0) < 0)
				return NULL;
		} else if (PyLong_AsLong(on_err) != 0) {
			if (PyErr_Occurred()) {
				self->pointer_count = pointers;
				return NULL;
			}
			op.on_err = index + 1;
		}
	}
	if (on_ok != Py_None && use_label((struct label *)on_ok, &op, index, 1) < 0)
		return NULL;
	if (grow(&self->ops, &self->op_room, self->op_count + 1, sizeof op) < 0 || PyList_Append(self->texts, what) < 0
	    || PyList_Append(self->contexts, self->context) < 0)
		return NULL;
	self->ops[self->op_count++] = op;
	return PyLong_FromLong((long)index);
}

static PyObject *operations_place(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
	if (count != 1 && count != 2) {
		PyErr_SetString(PyExc_TypeError, "place(data, align=8)");
		return NULL;
	}
	long align = count == 2 ? PyLong_AsLong(args[1]) : 8;
	if (align < 1) {
		if (!PyErr_Occurred())
			PyErr_SetString(PyExc_ValueError, "place: align is positive");
		return NULL;
	}
	int64_t offset = put_buffer((struct operations *)object, args[0], (size_t)align);
	return offset < 0 ? NULL : PyLong_FromLongLong(offset);
}

static PyObject *operations_point(PyObject *object, PyObject *args)
{
	struct operations *self = (struct operations *)object;
	long index, argument;
	long long offset;
	if (!PyArg_ParseTuple(args, "llL:point", &index, &argument, &offset))
		return NULL;
	if (index < 0 || (size_t)index >= self->op_count || argument < 0 || argument > 5 || offset < 0) {
		PyErr_SetString(PyExc_IndexError, "point: no such operation or argument");
		return NULL;
	}
	if (add_pointer(self, index, (uint64_t)argument, (uint64_t)offset) < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *operations_embed(PyObject *object, PyObject *args)
{
	struct operations *self = (struct operations *)object;
	long long at, target;
	if (!PyArg_ParseTuple(args, "LL:embed", &at, &target))
		return NULL;
	if (at < 0 || target < 0 || (size_t)at + 8 > self->data_size) {
		PyErr_SetString(PyExc_IndexError, "embed: not in the data");
		return NULL;
	}
	if (add_pointer(self, -1, (uint64_t)at, (uint64_t)target) < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *operations_new_register(PyObject *object, PyObject *unused)
{
	(void)unused;
	struct operations *self = (struct operations *)object;
	int number = self->next_register++;
	if (self->next_register >= RECEIVED)
		self->next_register = REUSED_REGISTER;
	return make_reg(number);
}

static PyObject *operations_mark(PyObject *object, PyObject *given)
{
	struct operations *self = (struct operations *)object;
	if (Py_TYPE(given) != label_type) {
		PyErr_SetString(PyExc_TypeError, "mark(label: Label)");
		return NULL;
	}
	struct label *label = (struct label *)given;
	label->index = (Py_ssize_t)self->op_count;
	for (size_t i = 0; i < label->count; i++) {
		struct user user = label->users[i];
		if (user.op >= self->op_count) {
			PyErr_SetString(PyExc_ValueError, "mark: the label is another program's");
			return NULL;
		}
		*(user.on_ok ? &self->ops[user.op].on_ok : &self->ops[user.op].on_err) = (uint32_t)label->index;
	}
	label->count = 0;
	Py_RETURN_NONE;
}

static PyObject *operations_image(PyObject *object, PyObject *unused)
{
	(void)unused;
	struct operations *self = (struct operations *)object;
	size_t code = self->op_count * sizeof(struct op);
	size_t base = (code + 15) / 16 * 16;
	self->data_base = (Py_ssize_t)base;
	for (size_t i = 0; i < self->pointer_count; i++) {
		struct pointer *pointer = &self->pointers[i];
		uint64_t address = BASE + base + pointer->offset;
		if (pointer->op < 0)
			memcpy(self->data + pointer->argument, &address, sizeof address);
		else
			self->ops[pointer->op].args[pointer->argument] = address;
	}
	PyObject *image = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(base + self->data_size));
	if (!image)
		return NULL;
	char *to = PyBytes_AsString(image);
	if (code)
		memcpy(to, self->ops, code);
	memset(to + code, 0, base - code);
	if (self->data_size)
		memcpy(to + base, self->data, self->data_size);
	return image;
}

/* --- the types --------------------------------------------------------------------------------------------------- */

static PyMemberDef reg_members[] = {{"number", T_INT, offsetof(struct reg, number), READONLY, NULL}, {0}};

static PyType_Slot reg_slots[] = {
	{Py_tp_new, reg_new}, {Py_tp_dealloc, free_object}, {Py_tp_members, reg_members},
	{Py_tp_doc, "A register of the remote process: the place of a result that later operations use as an argument."}, {0, NULL},
};
static PyType_Spec reg_spec = {"boxship.linux._sys.Reg", sizeof(struct reg), 0, Py_TPFLAGS_DEFAULT, reg_slots};

static PyType_Slot label_slots[] = {
	{Py_tp_new, label_new}, {Py_tp_dealloc, label_dealloc},
	{Py_tp_doc, "A place in a program that operations jump to."}, {0, NULL},
};
static PyType_Spec label_spec = {"boxship.linux._sys.Label", sizeof(struct label), 0, Py_TPFLAGS_DEFAULT, label_slots};

static PyMethodDef operations_methods[] = {
	{"call", (PyCFunction)(void (*)(void))operations_call, METH_FASTCALL | METH_KEYWORDS,
	 "call(nr, *args, dst=None, what='', on_err=0, on_ok=None) -> index of the operation"},
	{"place", (PyCFunction)(void (*)(void))operations_place, METH_FASTCALL, "place(data, align=8) -> offset"},
	{"point", operations_point, METH_VARARGS, "point(index, argument, offset)"},
	{"embed", operations_embed, METH_VARARGS, "embed(at, target)"},
	{"new", operations_new_register, METH_NOARGS, "new() -> Reg"},
	{"mark", operations_mark, METH_O, "mark(label)"},
	{"image", operations_image, METH_NOARGS, "image() -> bytes"},
	{NULL, NULL, 0, NULL},
};
static PyMemberDef operations_members[] = {
	{"context", T_OBJECT_EX, offsetof(struct operations, context), 0, NULL},
	{"texts", T_OBJECT_EX, offsetof(struct operations, texts), READONLY, NULL},
	{"contexts", T_OBJECT_EX, offsetof(struct operations, contexts), READONLY, NULL},
	{"data_base", T_PYSSIZET, offsetof(struct operations, data_base), READONLY, NULL},
	{0},
};
static PyType_Slot operations_slots[] = {
	{Py_tp_new, operations_new}, {Py_tp_dealloc, operations_dealloc}, {Py_tp_methods, operations_methods},
	{Py_tp_members, operations_members}, {Py_sq_length, operations_length},
	{Py_tp_doc, "Operations in order, with the memory that their arguments point to."}, {0, NULL},
};
static PyType_Spec operations_spec = {
	"boxship.linux._sys.Operations", sizeof(struct operations), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, operations_slots,
};

int program_add_types(PyObject *module)
{
	name_dst = PyUnicode_InternFromString("dst");
	name_what = PyUnicode_InternFromString("what");
	name_on_err = PyUnicode_InternFromString("on_err");
	name_on_ok = PyUnicode_InternFromString("on_ok");
	no_text = PyUnicode_InternFromString("");
	reg_type = (PyTypeObject *)PyType_FromSpec(&reg_spec);
	label_type = (PyTypeObject *)PyType_FromSpec(&label_spec);
	PyObject *operations_type = PyType_FromSpec(&operations_spec);
	if (!name_dst || !name_what || !name_on_err || !name_on_ok || !no_text || !reg_type || !label_type || !operations_type)
		return -1;
	if (PyModule_AddObjectRef(module, "Reg", (PyObject *)reg_type) < 0 || PyModule_AddObjectRef(module, "Label", (PyObject *)label_type) < 0
	    || PyModule_AddObjectRef(module, "Operations", operations_type) < 0)
		return -1;
	Py_DecRef(operations_type);
	return 0;
}
