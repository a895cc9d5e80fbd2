// Casts to fp8 (arXiv 2209.05433) for matrix products with one scale a tensor.
//
//   amax       out = max |x|                                          NaN if there is one
//   cast_fp8   out = saturated(x scale), transposed = out^T           x [rows, columns] fp32, bf16, fp16; e4m3 or e5m2
//
// scale is an fp32 scalar on the device, by which x is multiplied (the product's own scale is its reciprocal). Values
// beyond the largest of the type become the largest, NaN stays. Memory, in bytes an element of T: amax sizeof T; cast
// sizeof T + 1, and 1 more with the transposed copy, which goes through a tile in shared memory. Deterministic: every
// element is computed by one thread; a maximum does not depend on the order of the atomics.
//
// The maximum of an output of the norm and of SwiGLU comes from those kernels: amax is for tensors that others write.

#include <cuda_fp8.h>

#include "common.cuh"

namespace hammer {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAmaxWaves = 4;  // of all multiprocessors

template <typename T>
__global__ void __launch_bounds__(kThreads) amax_kernel(const T* __restrict__ x, int64_t n, Split split, float* out) {
  constexpr int N = kWide<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  unsigned largest = 0;
#pragma unroll 4  // loads in flight
  for (int64_t vector = thread; vector < split.vectors; vector += threads) {
    const Pack<T, N> values = load<N>(x + split.head + vector * N);
    for (int i = 0; i < N; ++i) largest = larger(largest, magnitude(to_float(values.at[i])));
  }
  const int64_t singles = n - split.vectors * N;
  for (int64_t single = thread; single < singles; single += threads) {
    largest = larger(largest, magnitude(to_float(x[single < split.head ? single : single + split.vectors * N])));
  }
  raise_amax(out, largest);
}

constexpr int kTile = 64;             // rows and columns of a block's tile
constexpr int kPitch = kTile + 8;     // bytes from row to row in shared memory: stores of 8 stay aligned
constexpr int kTransposedWidth = 16;  // rows that are stored at once

template <__nv_fp8_interpretation_t kind, typename T, int N>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const T* __restrict__ x, const float* __restrict__ scale, int64_t rows, int64_t columns,
                uint8_t* __restrict__ out, uint8_t* __restrict__ transposed) {
  __shared__ __align__(8) uint8_t tile[kTile][kPitch];
  const int64_t top = static_cast<int64_t>(blockIdx.y) * kTile, left = static_cast<int64_t>(blockIdx.x) * kTile;
  const float factor = *scale;
#pragma unroll 4
  for (int step = 0; step < kTile * kTile / N / kThreads; ++step) {
    const int item = step * kThreads + threadIdx.x;
    const int row = item / (kTile / N), column = item % (kTile / N) * N;
    if (top + row >= rows || left + column >= columns) continue;
    const int64_t at = (top + row) * columns + left + column;
    const Pack<T, N> values = load<N>(x + at);
    Pack<uint8_t, N> cast;
    for (int i = 0; i < N; ++i)
      cast.at[i] = __nv_cvt_float_to_fp8(to_float(values.at[i]) * factor, __NV_SATFINITE, kind);
    store(out + at, cast);
    if (transposed != nullptr) store(&tile[row][column], cast);
  }
  if (transposed == nullptr) return;
  __syncthreads();
  constexpr int M = N == 1 ? 1 : kTransposedWidth;
#pragma unroll 4
  for (int step = 0; step < kTile * kTile / M / kThreads; ++step) {
    const int item = step * kThreads + threadIdx.x;
    const int column = item / (kTile / M), row = item % (kTile / M) * M;
    if (top + row >= rows || left + column >= columns) continue;
    Pack<uint8_t, M> cast;
    for (int i = 0; i < M; ++i) cast.at[i] = tile[row + i][column];
    store(transposed + (left + column) * rows + top + row, cast);
  }
}

}  // namespace

void amax(Type type, const void* x, int64_t n, float* out, cudaStream_t stream) {
  check(cudaMemsetAsync(out, 0, sizeof(float), stream));
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t most = multiprocessors() * (2048 / kThreads) * kAmaxWaves, blocks = ceil_div(n, kThreads * kWide<T>);
    launch(amax_kernel<T>, grid(blocks < most ? blocks : most), kThreads, stream, static_cast<const T*>(x), n,
           split(n, kWide<T>, {{x, sizeof(T)}}), out);
  });
}

void cast_fp8(Type from, Type to, const void* x, const float* scale, int64_t rows, int64_t columns, void* out,
              void* transposed, cudaStream_t stream) {
  with_type(from, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = columns % kWide<T> == 0 && aligned({x}) && aligned({out}, kWide<T>) &&
                      (transposed == nullptr || (rows % kTransposedWidth == 0 && aligned({transposed})));
    with_width<T>(wide, [&](auto width) {
      const auto start = [&](auto kernel) {
        launch(kernel, grid(ceil_div(columns, kTile), ceil_div(rows, kTile)), kThreads, stream,
               static_cast<const T*>(x), scale, rows, columns, static_cast<uint8_t*>(out),
               static_cast<uint8_t*>(transposed));
      };
      if (to == Type::e4m3) return start(cast_kernel<__NV_E4M3, T, width()>);
      start(cast_kernel<__NV_E5M2, T, width()>);
    });
  });
}

}  // namespace hammer
