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
    const Floats<N> values = to_floats(load<N>(x + split.head + vector * N));
    for (int i = 0; i < N; ++i) largest = larger(largest, magnitude(values.at[i]));
  }
  const int64_t singles = n - split.vectors * N;
  for (int64_t single = thread; single < singles; single += threads) {
    largest = larger(largest, magnitude(to_float(x[single < split.head ? single : single + split.vectors * N])));
  }
  raise_amax(out, largest);
}

constexpr int kTileRows = 128, kTileColumns = 64;  // of a block
constexpr int kUnit = 8;                           // bytes of shared memory that stay together

// Where a byte of the tile lies. Units of a row are permuted, every eight rows in another way: a warp that reads down
// the columns of eight rows each, and one that writes rows, then meets every bank twice at most.
__device__ __forceinline__ int place(int row, int column) {
  const int unit = column / kUnit ^ row / kUnit % (kTileColumns / kUnit);
  return row * kTileColumns + unit * kUnit + column % kUnit;
}

template <__nv_fp8_interpretation_t kind, int N>
__device__ __forceinline__ Pack<uint8_t, N> to_fp8(const Floats<N>& values, float factor) {
  Pack<uint8_t, N> out;
  if constexpr (N == 1) {
    out.at[0] = __nv_cvt_float_to_fp8(values.at[0] * factor, __NV_SATFINITE, kind);
  } else {
    for (int i = 0; i < N; i += 2) {
      const float2 pair = {values.at[i] * factor, values.at[i + 1] * factor};
      const __nv_fp8x2_storage_t both = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, kind);
      memcpy(&out.at[i], &both, sizeof both);
    }
  }
  return out;
}

// Four words of four bytes: word j of the result holds byte j of each.
__device__ __forceinline__ void transpose(unsigned (&words)[4]) {
  const unsigned low01 = __byte_perm(words[0], words[1], 0x5140), low23 = __byte_perm(words[2], words[3], 0x5140);
  const unsigned high01 = __byte_perm(words[0], words[1], 0x7362), high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
}

template <__nv_fp8_interpretation_t kind, typename T, int N>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const T* __restrict__ x, const float* __restrict__ scale, int64_t rows, int64_t columns,
                uint8_t* __restrict__ out, uint8_t* __restrict__ transposed) {
  __shared__ __align__(8) uint8_t tile[kTileRows * kTileColumns];
  const int64_t top = static_cast<int64_t>(blockIdx.y) * kTileRows;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  const float factor = *scale;
#pragma unroll 4  // loads in flight
  for (int step = 0; step < kTileRows * kTileColumns / N / kThreads; ++step) {
    const int item = step * kThreads + threadIdx.x;
    const int row = item / (kTileColumns / N), column = item % (kTileColumns / N) * N;
    if (top + row >= rows || left + column >= columns) continue;
    const int64_t at = (top + row) * columns + left + column;
    const Pack<uint8_t, N> cast = to_fp8<kind>(to_floats(load<N>(x + at)), factor);
    store(out + at, cast);
    if (transposed != nullptr) store(tile + place(row, column), cast);
  }
  if (transposed == nullptr) return;
  __syncthreads();
  if constexpr (N == 1) {
    for (int item = threadIdx.x; item < kTileRows * kTileColumns; item += kThreads) {
      const int column = item / kTileRows, row = item % kTileRows;
      if (top + row >= rows || left + column >= columns) continue;
      transposed[(left + column) * rows + top + row] = tile[place(row, column)];
    }
  } else {  // a thread turns eight rows of four columns
    static_assert(kTileRows / kUnit * (kTileColumns / 4) == kThreads);
    const int row = threadIdx.x % (kTileRows / kUnit) * kUnit, column = threadIdx.x / (kTileRows / kUnit) * 4;
    if (top + row >= rows || left + column >= columns) return;
    unsigned words[2][4];
    for (int i = 0; i < kUnit; ++i) memcpy(&words[i / 4][i % 4], tile + place(row + i, column), 4);
    transpose(words[0]);
    transpose(words[1]);
    for (int i = 0; i < 4; ++i) {
      const unsigned long long eight = static_cast<unsigned long long>(words[1][i]) << 32 | words[0][i];
      *reinterpret_cast<unsigned long long*>(transposed + (left + column + i) * rows + top + row) = eight;
    }
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
                      (transposed == nullptr || (rows % kUnit == 0 && aligned({transposed}, kUnit)));
    with_width<T>(wide, [&](auto width) {
      const auto start = [&](auto kernel) {
        launch(kernel, grid(ceil_div(columns, kTileColumns), ceil_div(rows, kTileRows)), kThreads, stream,
               static_cast<const T*>(x), scale, rows, columns, static_cast<uint8_t*>(out),
               static_cast<uint8_t*>(transposed));
      };
      if (to == Type::e4m3) return start(cast_kernel<__NV_E4M3, T, width()>);
      start(cast_kernel<__NV_E5M2, T, width()>);
    });
  });
}

}  // namespace hammer
