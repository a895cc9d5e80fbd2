// As version_avx512.cpp, for machines that round to bf16 by an instruction (Intel from 2020 on, AMD from 2022 on).

#include "attention.hpp"
#include "kernels.hpp"

#ifdef HAMMER_X86
#include <immintrin.h>

namespace {

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#define HAMMER_BF16_INSTRUCTION 1
#define HAMMER_VERSION avx512_bf16
#define HAMMER_LANES 16
// GCC 12 takes the intrinsics' own undefined values for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "attention.inl"
#include "kernels.inl"

namespace hammer {

constexpr Version kAvx512Bf16 = {"avx512_bf16", runs_here, avx512_bf16::table<float>(), avx512_bf16::table<Bf16>(),
                                 avx512_bf16::square_sum};

constexpr AttentionVersion kAttentionAvx512Bf16 = {"avx512_bf16", runs_here, avx512_bf16::attention::passes<float>(),
                                                   avx512_bf16::attention::passes<Bf16>()};

}  // namespace hammer
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
