// Registrations of the library of CPU kernels besides the operators, whose kernels are in the *_cpu.cpp files, for the
// schemas in pecker_fast/ops/schemas.py. Loading the library runs the static initialisers. It is deliberately not a
// Python module, so that building it does not need Python's headers.
#include <torch/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

// Instruction set that the CPU kernels run with: scalar, avx2 or avx512.
std::string cpu_isa() { return pecker_fast::isa_name(pecker_fast::active_isa()); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(pecker_fast, m) { m.def("cpu_isa", &cpu_isa); }
