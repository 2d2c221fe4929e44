// What the library of CPU kernels registers besides the operators: the kernels themselves are in the *_cpu.cpp files, for
// the schemas that pecker_fast/ops/schemas.py defines. Loading the library runs the static initialisers. It is no Python
// module on purpose: Python's headers are not needed to build it.
#include <torch/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

// Instruction set that the CPU kernels run with: scalar, avx2 or avx512.
std::string cpu_isa() { return pecker_fast::isa_name(pecker_fast::active_isa()); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(pecker_fast, m) { m.def("cpu_isa", &cpu_isa); }
