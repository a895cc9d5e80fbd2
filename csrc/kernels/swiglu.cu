// The feed-forward product silu(gate) up (arXiv 2002.05202); silu(g) = g q with q = 1 / (1 + exp(-g)).
//
//   forward    [rows, 2f] -> [rows, f]               product = gate q up
//   backward   [rows, f], [rows, 2f] -> [rows, 2f]   dup = d gate q    dgate = d up q (1 + gate (1 - q))
//
// Gate first, then up, in a row; T = fp32, bf16, fp16, fp32 arithmetic rounded once. Memory, in units of rows x f
// elements: forward 3, backward 5, each once. Deterministic: every element is computed by one thread from its own
// inputs; the maximum for fp8 does not depend on the order of the atomics.
//
// A block works on one row at a time, a thread on vectors of 16 bytes, or on single elements where f is odd or an
// address does not allow vectors.

#include "common.cuh"

namespace hammer {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWaves = 4;  // of all multiprocessors: even load, and few writers of amax

// __fdividef: an error of 2 units in the last place, and 0 from where exp(-g) is above 2^126; so is silu there. The
// error of __expf(x) grows with |x|, to 5e-6 where silu vanishes: far below a rounding to 16 bits.
template <typename T>
__device__ __forceinline__ float sigmoid(float g) {
  return __fdividef(1.f, 1.f + (sizeof(T) == 2 ? __expf(-g) : expf(-g)));
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ gate_up, int64_t rows, int64_t f, T* __restrict__ product, float* __restrict__ amax) {
  unsigned largest = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int64_t at = threadIdx.x * N; at < f; at += blockDim.x * N) {
      const Pack<T, N> gate = load<N>(gate_up + row * 2 * f + at), up = load<N>(gate_up + row * 2 * f + f + at);
      const Floats<N> g = to_floats(gate), u = to_floats(up);
      Floats<N> result;
      for (int i = 0; i < N; ++i) result.at[i] = g.at[i] * sigmoid<T>(g.at[i]) * u.at[i];
      const Pack<T, N> out = rounded<T>(result);
      store(product + row * f + at, out);
      if (amax == nullptr) continue;
      const Floats<N> written = to_floats(out);
      for (int i = 0; i < N; ++i) largest = larger(largest, magnitude(written.at[i]));
    }
  }
  if (amax != nullptr) raise_amax(amax, largest);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward(const T* __restrict__ grad, const T* __restrict__ gate_up,
                                                     int64_t rows, int64_t f, T* __restrict__ grad_gate_up) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int64_t at = threadIdx.x * N; at < f; at += blockDim.x * N) {
      const Pack<T, N> gate = load<N>(gate_up + row * 2 * f + at), up = load<N>(gate_up + row * 2 * f + f + at);
      const Pack<T, N> incoming = load<N>(grad + row * f + at);
      const Floats<N> g = to_floats(gate), u = to_floats(up), d = to_floats(incoming);
      Floats<N> grad_gate, grad_up;
      for (int i = 0; i < N; ++i) {
        const float q = sigmoid<T>(g.at[i]), dq = d.at[i] * q;
        grad_up.at[i] = dq * g.at[i];
        grad_gate.at[i] = dq * u.at[i] * (1.f + g.at[i] * (1.f - q));
      }
      store(grad_gate_up + row * 2 * f + at, rounded<T>(grad_gate));
      store(grad_gate_up + row * 2 * f + f + at, rounded<T>(grad_up));
    }
  }
}

// Blocks of one row each, within the limit.
dim3 blocks_for(int64_t rows) {
  const int64_t most = multiprocessors() * (2048 / kThreads) * kWaves;
  return grid(rows < most ? rows : most);
}

}  // namespace

void swiglu_forward(Type type, const void* gate_up, int64_t rows, int64_t f, void* product, float* amax,
                    cudaStream_t stream) {
  if (amax != nullptr) check(cudaMemsetAsync(amax, 0, sizeof(float), stream));
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(f % kWide<T> == 0 && aligned({gate_up, product}), [&](auto width) {
      launch(forward<T, width()>, blocks_for(rows), kThreads, stream, static_cast<const T*>(gate_up), rows, f,
             static_cast<T*>(product), amax);
    });
  });
}

void swiglu_backward(Type type, const void* grad, const void* gate_up, int64_t rows, int64_t f, void* grad_gate_up,
                     cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(f % kWide<T> == 0 && aligned({grad, gate_up, grad_gate_up}), [&](auto width) {
      launch(backward<T, width()>, blocks_for(rows), kThreads, stream, static_cast<const T*>(grad),
             static_cast<const T*>(gate_up), rows, f, static_cast<T*>(grad_gate_up));
    });
  });
}

}  // namespace hammer
