// The kernels for x86-64 with AVX-512 (servers from 2017 on, AMD from 2022 on).

#include "attention.hpp"
#include "kernels.hpp"

#ifdef HAMMER_X86
#include <immintrin.h>

namespace {

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

}  // namespace

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define HAMMER_VERSION avx512
#define HAMMER_LANES 16
// GCC 12 takes the intrinsics' own undefined values for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "attention.inl"
#include "kernels.inl"

namespace hammer {

constexpr Version kAvx512 = {"avx512", runs_here, avx512::table<float>(), avx512::table<Bf16>(), avx512::square_sum};

constexpr AttentionVersion kAttentionAvx512 = {"avx512", runs_here, avx512::attention::passes<float>(),
                                               avx512::attention::passes<Bf16>()};

}  // namespace hammer
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
