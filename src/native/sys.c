/* boxship.linux._sys: what the interpreter cannot do by itself, and nothing more.
 *
 *   syscall(nr, *args) -> int             any system call; arguments are integers, buffers or None
 *   spawn(fd, name, fds, flags, cgroup)   clone3 + execveat of an open program: no copy of the interpreter's page tables
 *   address(buffer) -> int                where a buffer lies, for structures that hold pointers
 *   hold(listener) -> control, fds        the process that shims work in forks of, see hold.c
 *   Operations, Reg, Label                programs for init, see program.c
 *
 * Built against the limited API (3.11), so that one shared object serves every later version of Python.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "hold.h"
#include "program.h"
#include "spawn.h"

static PyObject *os_error(void)
{
	return PyErr_SetFromErrno(PyExc_OSError);
}

static int to_word(PyObject *object, Py_buffer *view, long *word)
{
	if (object == Py_None) {
		*word = 0;
		return 0;
	}
	if (PyLong_Check(object)) {
		unsigned long long value = PyLong_AsUnsignedLongLongMask(object);
		if (value == (unsigned long long)-1 && PyErr_Occurred())
			return -1;
		*word = (long)value;
		return 0;
	}
	/* Writable when it can be: the kernel fills in results. */
	if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) < 0) {
		PyErr_Clear();
		if (PyObject_GetBuffer(object, view, PyBUF_SIMPLE) < 0)
			return -1;
	}
	*word = (long)view->buf;
	return 1;
}

static PyObject *sys_syscall(PyObject *self, PyObject *args)
{
	(void)self;
	Py_ssize_t count = PyTuple_Size(args);
	if (count < 1 || count > 7) {
		PyErr_SetString(PyExc_TypeError, "syscall(nr, *args) takes a number and up to six arguments");
		return NULL;
	}
	long words[7] = {0};
	Py_buffer views[7];
	int held[7] = {0};
	PyObject *result = NULL;
	for (Py_ssize_t i = 0; i < count; i++) {
		held[i] = to_word(PyTuple_GetItem(args, i), &views[i], &words[i]);
		if (held[i] < 0) {
			held[i] = 0;
			goto out;
		}
	}
	long value;
	int saved;
	Py_BEGIN_ALLOW_THREADS
	value = syscall(words[0], words[1], words[2], words[3], words[4], words[5], words[6]);
	saved = errno;
	Py_END_ALLOW_THREADS
	if (value == -1) {
		errno = saved;
		os_error();
	} else {
		result = PyLong_FromLong(value);
	}
out:
	for (Py_ssize_t i = 0; i < count; i++)
		if (held[i] > 0)
			PyBuffer_Release(&views[i]);
	return result;
}

static PyObject *sys_spawn(PyObject *self, PyObject *args)
{
	(void)self;
	int exe;
	const char *name;
	PyObject *list;
	unsigned int flags = 0;
	int cgroup = -1;
	if (!PyArg_ParseTuple(args, "isO|Ii:spawn", &exe, &name, &list, &flags, &cgroup))
		return NULL;
	Py_ssize_t count = PySequence_Size(list);
	if (count < 0)
		return NULL;
	if (count > SPAWN_MAX_FDS) {
		PyErr_SetString(PyExc_ValueError, "spawn: at most 16 descriptors");
		return NULL;
	}
	int fds[SPAWN_MAX_FDS];
	for (Py_ssize_t i = 0; i < count; i++) {
		PyObject *item = PySequence_GetItem(list, i);
		if (!item)
			return NULL;
		fds[i] = (int)PyLong_AsLong(item);
		Py_DecRef(item);
		if (PyErr_Occurred())
			return NULL;
	}
	char *argv[] = {(char *)name, NULL};
	pid_t pid = spawn(exe, argv, fds, (int)count, (int)flags, cgroup);
	if (pid < 0)
		return os_error();
	return PyLong_FromLong(pid);
}

static PyObject *sys_address(PyObject *self, PyObject *object)
{
	(void)self;
	Py_buffer view;
	if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0)
		return NULL;
	PyObject *result = PyLong_FromVoidPtr(view.buf);
	PyBuffer_Release(&view);
	return result;
}

static PyMethodDef methods[] = {
	{"syscall", sys_syscall, METH_VARARGS, "syscall(nr, *args) -> int; raises OSError with the errno"},
	{"spawn", sys_spawn, METH_VARARGS,
	 "spawn(exe_fd, name, fds, clone_flags=0, cgroup_fd=-1) -> pid; fds[i] becomes descriptor i, the others close; no environment"},
	{"hold", sys_hold, METH_VARARGS,
	 "hold(listener_fd) -> (control_fd, fds); returns in forks only; raises OSError"},
	{"address", sys_address, METH_O, "address(buffer) -> int; valid while the caller keeps the buffer alive and unchanged"},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sys", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sys(void)
{
	PyObject *made = PyModule_Create(&module);
	if (made && program_add_types(made) < 0) {
		Py_DecRef(made);
		return NULL;
	}
	return made;
}
