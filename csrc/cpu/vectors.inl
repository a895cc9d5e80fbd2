// The vectors of one instruction set, and how they are read, written and rounded: what kernels.inl and attention.inl
// compute with. The file that includes it has set the target by a pragma and defines HAMMER_VERSION (a namespace) and
// HAMMER_LANES (floats of a vector register), and HAMMER_BF16_INSTRUCTION where the machine rounds to bf16 by itself.
//
// Vectors are those of GCC and Clang, so one text serves every machine.
//
// No templates of the standard library in here: the linker keeps one copy of each for the whole module, and might keep
// one that was compiled for a machine wider than the one it runs on.

#pragma once

#include "kernels.hpp"

namespace hammer {
namespace HAMMER_VERSION {
namespace {

#define HAMMER_INLINE inline __attribute__((always_inline))

constexpr int kLanes = HAMMER_LANES;
typedef float V __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint16_t H __attribute__((vector_size(kLanes * 2)));

// ---- memory ----------------------------------------------------------------------------------------------------

// GCC 12 writes the two conversions of 16 lanes as shuffles of halves, hence the instructions by name (with masks that
// keep all, as its headers warn of themselves in the plain ones).
HAMMER_INLINE V widen(H bits) {
#if HAMMER_LANES == 16
  return (V)((U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
  return (V)(__builtin_convertvector(bits, U) << 16);
#endif
}

// To the nearest, ties to even; NaN stays one, as the rounding of its bits could make it infinite. (The instruction
// takes what is below 2^-126 as 0.)
HAMMER_INLINE H narrow(V x) {
#ifdef HAMMER_BF16_INSTRUCTION
  return (H)_mm512_cvtneps_pbh(x);
#else
  const U bits = (U)x;
  const U kept = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : U{} + 0x7fc00000u;
#if HAMMER_LANES == 16
  return (H)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(kept >> 16));
#else
  return __builtin_convertvector(kept >> 16, H);
#endif
#endif
}

HAMMER_INLINE V load(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

HAMMER_INLINE V load(const Bf16* p) {
  H x;
  __builtin_memcpy(&x, p, sizeof x);
  return widen(x);
}

HAMMER_INLINE void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof x); }

HAMMER_INLINE void store(Bf16* p, V x) {
  const H bits = narrow(x);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// Asks for what lies 2 KiB on, as the machine's own prefetching stops at every page: 10 % in SwiGLU, half the time of
// softmax_gradient (Xeon, Sapphire Rapids). An address beyond the end does no harm.
HAMMER_INLINE void ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 2048); }

// What a T keeps of x.
template <class T>
HAMMER_INLINE V rounded(V x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return widen(narrow(x));
  }
}

// One vector of elements, and the shorter one at the end of a row; absent lanes read as `fill`.
struct Whole {
  template <class T>
  HAMMER_INLINE V load(const T* p, float = 0) const {
    return HAMMER_VERSION::load(p);
  }
  template <class T>
  HAMMER_INLINE void store(T* p, V x) const {
    HAMMER_VERSION::store(p, x);
  }
};

struct Part {
  int count;
  template <class T>
  HAMMER_INLINE V load(const T* p, float fill = 0) const {
    T values[kLanes] = {};
    for (int i = 0; i < count; ++i) values[i] = p[i];
    V x = HAMMER_VERSION::load(values);
    for (int i = count; i < kLanes; ++i) x[i] = fill;
    return x;
  }
  template <class T>
  HAMMER_INLINE void store(T* p, V x) const {
    T values[kLanes];
    HAMMER_VERSION::store(values, x);
    for (int i = 0; i < count; ++i) p[i] = values[i];
  }
};

HAMMER_INLINE float total(V x) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

}  // namespace
}  // namespace HAMMER_VERSION
}  // namespace hammer
