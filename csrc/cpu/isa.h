// Instruction sets that the CPU kernels are compiled for, and the choice among them at run time.
//
// Each kernel is one header of templates, compiled once per instruction set: a translation unit includes the standard
// headers, then opens PF_TARGET_*, includes the kernel header and closes it. Nothing of the standard library may be
// included between the two, or its inline functions would be compiled for that instruction set for the whole program.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define PF_X86 1
#include <immintrin.h>
#else
#define PF_X86 0
#endif

#if defined(__clang__)
#define PF_TARGET_AVX2_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt\"))), apply_to = function)")
#define PF_TARGET_AVX512_BEGIN                                                                             \
  _Pragma(                                                                                                 \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi," \
      "bmi2,popcnt,lzcnt\"))), apply_to = function)")
#define PF_TARGET_END _Pragma("clang attribute pop")
#else
#define PF_TARGET_AVX2_BEGIN \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt\")")
#define PF_TARGET_AVX512_BEGIN      \
  _Pragma("GCC push_options") _Pragma( \
      "GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt\")")
#define PF_TARGET_END _Pragma("GCC pop_options")
#endif

#if defined(__GNUC__) || defined(__clang__)
// A hot loop in a function of its own gets the registers to itself.
#define PF_NOINLINE __attribute__((noinline))
#define PF_UNROLL _Pragma("GCC unroll 8")
#else
#define PF_NOINLINE
#define PF_UNROLL
#endif

namespace pecker_fast {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this machine, or the lower one that the environment variable PECKER_FAST_CPU_ISA
// (scalar, avx2, avx512) names; read once.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace pecker_fast
