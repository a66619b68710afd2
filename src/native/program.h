#ifndef BOXSHIP_PROGRAM_H
#define BOXSHIP_PROGRAM_H

#include <Python.h>

/* Reg, Label and Operations; -1 with an exception set. */
int program_add_types(PyObject *module);

#endif
