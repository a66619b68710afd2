/* See hold.c. */
#ifndef HOLD_H
#define HOLD_H
PyObject *sys_hold(PyObject *self, PyObject *args);
#endif
