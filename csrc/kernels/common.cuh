// What the kernels share: vector accesses, conversions, reductions over a block, launching. Only CUDA's headers are
// used, and of the launch syntax only cudaLaunchKernelEx, so that tests/kernels/cuda_on_cpu can run the kernels on a
// CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.hpp"

namespace hammer {

// ---- vectors ----

constexpr int kVectorBytes = 16;  // the widest load of sm_80 and sm_90

template <typename T>
constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));  // elements in a vector

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;

// N elements that are loaded and stored at once.
template <typename T, int N, bool in_pairs = kIsHalf<T> && N % 2 == 0>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// 16-bit types as the words that they come in: a compiler that sees single elements takes them apart and puts them
// together again wherever a pack is kept.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack<T, N, true> {
  unsigned pairs[N / 2];  // the even element in the lower half
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof pack == sizeof(unsigned long long)) {  // as a struct of two words it would be two stores
    unsigned long long bits;
    memcpy(&bits, &pack, sizeof bits);
    *reinterpret_cast<unsigned long long*>(to) = bits;
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

// Whether vectors of `bytes` may be accessed at each of these.
inline bool aligned(std::initializer_list<const void*> pointers, size_t bytes = kVectorBytes) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  }
  return true;
}

// ---- conversions: all arithmetic is in fp32 ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

template <int N>
struct Floats {
  float at[N];
};

// All elements of a pack. A bf16 is the upper half of an fp32.
template <typename T, int N>
__device__ __forceinline__ Floats<N> to_floats(const Pack<T, N>& pack) {
  Floats<N> out;
  for (int i = 0; i < N; ++i) {
    if constexpr (!kIsHalf<T> || N % 2 == 1) {
      out.at[i] = to_float(pack.at[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out.at[i] = __uint_as_float(i % 2 == 0 ? pack.pairs[i / 2] << 16 : pack.pairs[i / 2] & 0xffff0000u);
    } else {
      out.at[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(pack.pairs[i / 2] >> (i % 2 * 16))));
    }
  }
  return out;
}

// The other way. 16-bit types in pairs: one fast instruction each, where a single one takes the slow units.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> rounded(const Floats<N>& x) {
  Pack<T, N> out;
  if constexpr (!kIsHalf<T> || N % 2 == 1) {
    for (int i = 0; i < N; ++i) out.at[i] = rounded<T>(x.at[i]);
  } else {
    for (int i = 0; i < N; i += 2) {
      std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162> pair;
      if constexpr (std::is_same_v<T, __half>) {
        pair = __floats2half2_rn(x.at[i], x.at[i + 1]);
      } else {
        pair = __floats2bfloat162_rn(x.at[i], x.at[i + 1]);
      }
      memcpy(&out.pairs[i / 2], &pair, sizeof pair);
    }
  }
  return out;
}

// |x| as an integer that orders as |x| does, with NaN above all: maxima of it do not depend on their order.
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// ---- reductions over a block of whole warps ----

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the block, the same bits in every thread and every run. One barrier; a caller that reduces again alternates
// between two places, so that no thread writes one which another still reads.
__device__ __forceinline__ float block_sum(float value, float (&place)[kMaxWarps]) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (threadIdx.x % kWarp == 0) place[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += place[warp];
  return sum;
}

// *amax = max(*amax, the largest magnitude in the block). Lanes reduce first, then one atomic a warp, and none where
// the maximum is known to be as large.
__device__ __forceinline__ void raise_amax(float* amax, unsigned largest) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  unsigned* bits = reinterpret_cast<unsigned*>(amax);
  if (threadIdx.x % kWarp == 0 && largest > *static_cast<volatile unsigned*>(bits)) atomicMax(bits, largest);
}

// ---- launching ----

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("hammer_cuda: ") + cudaGetErrorString(status));
}

constexpr int64_t kMaxGridX = 2147483647;  // of the grid's first dimension

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Enqueue a kernel; an empty grid is no work.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, cudaStream_t stream, Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline dim3 grid(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

// function(T()) for the type of the activations.
template <typename Function>
void with_type(Type type, Function function) {
  switch (type) {
    case Type::fp32: return function(float());
    case Type::bf16: return function(__nv_bfloat16());
    case Type::fp16: return function(__half());
    default: throw std::runtime_error("hammer_cuda: not a type of activations");
  }
}

// function(N): vectors where everything is aligned for them, single elements otherwise.
template <typename T, typename Function>
void with_width(bool wide, Function function) {
  if (wide) return function(std::integral_constant<int, kWide<T>>());
  function(std::integral_constant<int, 1>());
}

// A flat array in vectors: [0, head) and the rest after the vectors are single elements.
struct Split {
  int64_t head, vectors;
};

struct FlatArray {
  const void* data;
  size_t item_bytes;
};

// Vectors of `width` elements at the first place where every array is aligned for them; none where there is no such
// place.
inline Split split(int64_t n, int64_t width, std::initializer_list<FlatArray> arrays) {
  for (int64_t head = 0; head < width && head < n; ++head) {
    bool fits = true;
    for (const FlatArray& array : arrays) {
      fits = fits && (reinterpret_cast<uintptr_t>(array.data) / array.item_bytes + head) % width == 0;
    }
    if (fits) return {head, (n - head) / width};
  }
  return {n, 0};
}

}  // namespace hammer
