// bf16 attention for machines that multiply tiles of bf16 (Intel's AMX, from 2023 on). Everything else is limited by
// memory there, and version_avx512_bf16.cpp is the version of it.

#include "attention.hpp"

#if defined(HAMMER_X86) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Asks Linux for the use of the tile registers, without which a process ends at the first such instruction.
bool runs_here() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bf16")) {
    return false;
  }
  unsigned a, b, c, d = 0;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  // Linux 5.16 and later, Documentation/arch/x86/xstate.rst
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return tiles && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

}  // namespace

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,prefer-vector-width=512")
#define HAMMER_BF16_INSTRUCTION 1
#define HAMMER_AMX 1
#define HAMMER_VERSION amx
#define HAMMER_LANES 16
// GCC 12 takes the intrinsics' own undefined values for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "attention.inl"

namespace hammer {

constexpr AttentionVersion kAttentionAmx = {"amx", runs_here, {}, amx::attention::passes<Bf16>()};

}  // namespace hammer
#endif
