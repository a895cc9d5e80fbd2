// The vector units that a loop may be compiled for, UNIT("avx512f,avx512dq,avx512bw,avx512vl") and UNIT("avx2"), and
// which of them this machine has.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define UNIT(NAME) __attribute__((target(NAME)))
#else
#define UNIT(NAME)
#endif

namespace units {

inline bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

inline bool has_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

}  // namespace units
