// The kernels for x86-64 with AVX2 and FMA (2013 and later).

#include "attention.hpp"
#include "kernels.hpp"

#ifdef HAMMER_X86
namespace {

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define HAMMER_VERSION avx2
#define HAMMER_LANES 8
#include "attention.inl"
#include "kernels.inl"

namespace hammer {

constexpr Version kAvx2 = {"avx2", runs_here, avx2::table<float>(), avx2::table<Bf16>(), avx2::square_sum};

constexpr AttentionVersion kAttentionAvx2 = {"avx2", runs_here, avx2::attention::passes<float>(),
                                             avx2::attention::passes<Bf16>()};

}  // namespace hammer
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
