#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pecker_fast {
namespace {

Isa detect() {
#if PF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  Isa best = avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  Isa best = Isa::scalar;
#endif
  if (const char* wanted = std::getenv("PECKER_FAST_CPU_ISA")) {
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa < best) best = isa;
    }
  }
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace pecker_fast
