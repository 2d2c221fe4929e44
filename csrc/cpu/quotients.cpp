#include "cpu/quotients.h"

#include "cpu/isa.h"

namespace pecker_fast {

#define PF_DECLARE(isa)                                 \
  namespace isa {                                       \
  void write_quotients(const QuotientRange&, float*);   \
  void add_magnitudes(const ScanRange&, std::int64_t*); \
  }
PF_DECLARE(scalar)
#if PF_X86
PF_DECLARE(avx2)
PF_DECLARE(avx512)
#define PF_DISPATCH(call)                               \
  if (active_isa() == Isa::avx512) return avx512::call; \
  if (active_isa() == Isa::avx2) return avx2::call;     \
  return scalar::call;
#else
#define PF_DISPATCH(call) return scalar::call;
#endif
#undef PF_DECLARE

void write_quotients(const QuotientRange& range, float* quotients) { PF_DISPATCH(write_quotients(range, quotients)) }

void add_magnitudes(const ScanRange& range, std::int64_t* sums) { PF_DISPATCH(add_magnitudes(range, sums)) }

#undef PF_DISPATCH

}  // namespace pecker_fast
