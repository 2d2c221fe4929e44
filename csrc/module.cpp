// The Python module pecker_fast._C. Importing it loads the library, whose static initialisers register the kernels
// (TORCH_LIBRARY_IMPL in the *_cpu.cpp and *_cuda.cpp files) for the schemas that pecker_fast/ops/schemas.py defines.
#include <Python.h>

#include "cpu/isa.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(pecker_fast::isa_name(pecker_fast::active_isa()));
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set that the CPU kernels run with: scalar, avx2 or avx512."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of pecker_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module_definition); }
