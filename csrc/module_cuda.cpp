// The Python module pecker_fast._C_cuda. Importing it loads the library, whose static initialisers register the kernels
// (TORCH_LIBRARY_IMPL in the *_cuda.cu and *_cuda.cpp files) for the schemas that pecker_fast/ops/schemas.py defines.
// Nothing here touches the driver: it loads on machines without a GPU.
#include <Python.h>

namespace {

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of pecker_fast.", -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module_definition); }
