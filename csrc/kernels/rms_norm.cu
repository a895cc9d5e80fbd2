// Residual add and RMSNorm (arXiv 1910.07467), forward and backward, over rows of h elements of T = fp32, bf16, fp16.
//
//   forward    s = T(x + branch)    r = 1 / sqrt(mean(s^2) + eps)    normed = weight T(s r)         s and r are kept
//   backward   c = mean(weight dn s r)    dx = r (weight dn - s r c) + ds    dweight = sum over rows of dn T(s r)
//
// with dn, ds the gradients of normed and s. All arithmetic is fp32, rounded to T where T is written, T(s r) as in
// Hugging Face.
//
// Memory, in units of rows x h elements: forward reads x, branch and writes s, normed: 4, or 2 without branch. Backward
// reads dn, ds, s and writes dx: 4, or 3 without ds. The weight's gradient costs 4 h bytes a block written and read.
//
// A block works on one row at a time, each thread on the same two vectors of 16 bytes of every row (with one, what a
// row costs beside its elements, above all the reduction, would take more instructions than an H200's memory leaves
// time for), so that the row stays in registers between its reduction and its use, and so do weight and the sums of its
// gradient in backward, whose few blocks stay for many rows and ask for the next row before they reduce this one. Rows
// that are wider than the registers of a block, odd or not aligned go through the plain kernels, which read them twice.
//
// Deterministic: sums over a row go up a fixed tree; those over rows go over each block's rows in order and then over
// blocks in order. The number of blocks depends on the device, so another GPU may round dweight in another way.

#include "common.cuh"

namespace hammer {
namespace {

constexpr int V = 2;  // vectors of a thread
constexpr int kMaxThreads = 512;  // of a block: rows of up to 8192 16-bit elements
constexpr int kPlainThreads = 256;
// x 2048 threads of a multiprocessor: few writers of amax. Without amax each row has a block of its own: the last
// blocks to run are then short.
constexpr int64_t kForwardWaves = 4;
// Threads x vectors that stay on a multiprocessor in backward. With the next row asked for, 48 KiB are then in flight;
// an H100 needs about 18 (3 TB/s x 800 ns / 132), an H200 26. It is what 128 registers allow.
constexpr int64_t kBackwardVectors = 1024;

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    forward_plain(const T* x, const T* branch, const T* weight, float eps, int64_t rows, int64_t h, float inverse_h,
                  T* normed, T* summed, float* rstd, float* amax) {
  __shared__ float places[2][kMaxWarps];
  unsigned largest = 0, parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const int64_t start = row * h;
    float square = 0.f;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      T sum = x[start + i];
      if (branch != nullptr) summed[start + i] = sum = rounded<T>(to_float(sum) + to_float(branch[start + i]));
      square += to_float(sum) * to_float(sum);
    }
    const float r = rsqrtf(block_sum(square, places[parity]) * inverse_h + eps);
    if (threadIdx.x == 0) rstd[row] = r;
    const T* sums = branch != nullptr ? summed : x;  // each thread reads what it wrote itself
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      const float scaled = to_float(rounded<T>(to_float(sums[start + i]) * r));
      const T out = rounded<T>(to_float(weight[i]) * scaled);
      normed[start + i] = out;
      largest = larger(largest, magnitude(to_float(out)));
    }
  }
  if (amax != nullptr) raise_amax(amax, largest);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    forward(const T* __restrict__ x, const T* __restrict__ branch, const T* __restrict__ weight, float eps,
            int64_t rows, int64_t h, float inverse_h, T* __restrict__ normed, T* __restrict__ summed,
            float* __restrict__ rstd, float* __restrict__ amax) {
  constexpr int N = kWide<T>;
  __shared__ float places[2][kMaxWarps];
  unsigned largest = 0, parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    Pack<T, N> sum[V], added[V], scale[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {  // all loads first
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      sum[v] = load<N>(x + row * h + at);
      if (branch != nullptr) added[v] = load<N>(branch + row * h + at);
      scale[v] = load<N>(weight + at);
    }
    float square = 0.f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      if (branch != nullptr) {
        Floats<N> both = to_floats(sum[v]);
        const Floats<N> other = to_floats(added[v]);
        for (int i = 0; i < N; ++i) both.at[i] += other.at[i];
        sum[v] = rounded<T>(both);
        store(summed + row * h + at, sum[v]);
      }
      const Floats<N> wide = to_floats(sum[v]);
      for (int i = 0; i < N; ++i) square += wide.at[i] * wide.at[i];
    }
    const float r = rsqrtf(block_sum(square, places[parity]) * inverse_h + eps);
    if (threadIdx.x == 0) rstd[row] = r;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      Floats<N> scaled = to_floats(sum[v]);
      for (int i = 0; i < N; ++i) scaled.at[i] *= r;
      scaled = to_floats(rounded<T>(scaled));
      const Floats<N> factor = to_floats(scale[v]);
      for (int i = 0; i < N; ++i) scaled.at[i] *= factor.at[i];
      const Pack<T, N> out = rounded<T>(scaled);
      store(normed + row * h + at, out);
      if (amax == nullptr) continue;
      const Floats<N> written = to_floats(out);
      for (int i = 0; i < N; ++i) largest = larger(largest, magnitude(written.at[i]));
    }
  }
  if (amax != nullptr) raise_amax(amax, largest);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    backward_plain(const T* grad_normed, const T* grad_summed, const T* summed, const T* weight, const float* rstd,
                   int64_t rows, int64_t h, float inverse_h, float* partial, T* grad_x) {
  __shared__ float places[2][kMaxWarps];
  unsigned parity = 0;
  float* sums = partial + blockIdx.x * h;  // a column always belongs to the same thread
  for (int64_t i = threadIdx.x; i < h; i += blockDim.x) sums[i] = 0.f;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const int64_t start = row * h;
    const float r = rstd[row];
    float dot = 0.f;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      const float scaled = to_float(summed[start + i]) * r, grad = to_float(grad_normed[start + i]);
      dot += grad * to_float(weight[i]) * scaled;
      sums[i] += grad * to_float(rounded<T>(scaled));
    }
    const float c = block_sum(dot, places[parity]) * inverse_h;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      const float scaled = to_float(summed[start + i]) * r, grad = to_float(grad_normed[start + i]);
      const float through = grad_summed != nullptr ? to_float(grad_summed[start + i]) : 0.f;
      grad_x[start + i] = rounded<T>(r * (grad * to_float(weight[i]) - scaled * c) + through);
    }
  }
}

// What backward reads of one row, as one thread sees it.
template <typename T>
struct Row {
  Pack<T, kWide<T>> grad_normed[V], grad_summed[V], summed[V];
  float rstd;
};

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kBackwardVectors / V / kMaxThreads)
    backward(const T* __restrict__ grad_normed, const T* __restrict__ grad_summed, const T* __restrict__ summed,
             const T* __restrict__ weight, const float* __restrict__ rstd, int64_t rows, int64_t h, float inverse_h,
             float* __restrict__ partial, T* __restrict__ grad_x) {
  constexpr int N = kWide<T>;
  __shared__ float places[2][kMaxWarps];
  float sums[V][N] = {};
  Pack<T, N> scale[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t at = (v * blockDim.x + threadIdx.x) * N;
    if (at < h) scale[v] = load<N>(weight + at);
  }
  const auto read = [&](int64_t row) {
    Row<T> read;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      read.grad_normed[v] = load<N>(grad_normed + row * h + at);
      read.summed[v] = load<N>(summed + row * h + at);
      if (grad_summed != nullptr) read.grad_summed[v] = load<N>(grad_summed + row * h + at);
    }
    read.rstd = rstd[row];
    return read;
  };

  unsigned parity = 0;
  Row<T> next;
  if (blockIdx.x < rows) next = read(blockIdx.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const Row<T> now = next;
    if (row + gridDim.x < rows) next = read(row + gridDim.x);
    float dot = 0.f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      Floats<N> scaled = to_floats(now.summed[v]);
      const Floats<N> grad = to_floats(now.grad_normed[v]), factor = to_floats(scale[v]);
      for (int i = 0; i < N; ++i) {
        scaled.at[i] *= now.rstd;
        dot += grad.at[i] * factor.at[i] * scaled.at[i];
      }
      scaled = to_floats(rounded<T>(scaled));
      for (int i = 0; i < N; ++i) sums[v][i] += grad.at[i] * scaled.at[i];
    }
    const float c = block_sum(dot, places[parity]) * inverse_h;
    const float away = -c * now.rstd * now.rstd;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      const Floats<N> sum = to_floats(now.summed[v]), grad = to_floats(now.grad_normed[v]);
      const Floats<N> factor = to_floats(scale[v]);
      Floats<N> out;
      if (grad_summed != nullptr) out = to_floats(now.grad_summed[v]);
      for (int i = 0; i < N; ++i) {
        const float through = grad_summed != nullptr ? out.at[i] : 0.f;
        out.at[i] = now.rstd * factor.at[i] * grad.at[i] + (away * sum.at[i] + through);
      }
      store(grad_x + row * h + at, rounded<T>(out));
    }
  }

  constexpr int M = kWide<float>;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t at = (v * blockDim.x + threadIdx.x) * N;
    if (at >= h) continue;
    for (int i = 0; i < N; i += M) {
      Pack<float, M> part;
      for (int j = 0; j < M; ++j) part.at[j] = sums[v][i + j];
      store(partial + blockIdx.x * h + at + i, part);
    }
  }
}

// grad_weight[i] = sum over blocks of partial[block, i]: 32 columns a block, 32 rows at a time.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarp)
    sum_blocks(const float* __restrict__ partial, int64_t blocks, int64_t h, T* __restrict__ grad_weight) {
  __shared__ float sums[kWarp][kWarp + 1];
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.f;
  if (column < h) {
#pragma unroll 8
    for (int64_t block = warp; block < blocks; block += kWarp) sum += partial[block * h + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  float total = sums[lane][warp];  // now a warp holds one column
  for (int distance = kWarp / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
  const int64_t summed = static_cast<int64_t>(blockIdx.x) * kWarp + warp;
  if (lane == 0 && summed < h) grad_weight[summed] = rounded<T>(total);
}

// Threads of a block for a row of h elements; 0: the plain kernels.
template <typename T>
int64_t threads_for(int64_t h, bool wide) {
  const int64_t vectors = h / kWide<T>;
  if (!wide || h % kWide<T> != 0 || vectors > V * kMaxThreads) return 0;
  return ceil_div(ceil_div(vectors, V), kWarp) * kWarp;
}

float inverse(int64_t h) { return static_cast<float>(1.0 / static_cast<double>(h)); }

}  // namespace

void rms_norm_forward(Type type, const void* x, const void* branch, const void* weight, float eps, int64_t rows,
                      int64_t h, void* normed, void* summed, float* rstd, float* amax, cudaStream_t stream) {
  if (amax != nullptr) check(cudaMemsetAsync(amax, 0, sizeof(float), stream));
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t fast = threads_for<T>(h, aligned({x, branch, weight, normed, summed}));
    const int64_t threads = fast > 0 ? fast : kPlainThreads;
    const int64_t most = amax != nullptr ? multiprocessors() * kForwardWaves * (2048 / threads) : kMaxGridX;
    launch(fast > 0 ? forward<T> : forward_plain<T>, grid(rows < most ? rows : most), static_cast<unsigned>(threads),
           stream, static_cast<const T*>(x), static_cast<const T*>(branch), static_cast<const T*>(weight), eps, rows, h,
           inverse(h), static_cast<T*>(normed), static_cast<T*>(summed), rstd, amax);
  });
}

int64_t rms_norm_backward_blocks(Type type, int64_t rows, int64_t h) {
  int64_t most = 0;
  with_type(type, [&](auto zero) {
    const int64_t fast = threads_for<decltype(zero)>(h, true);  // as if aligned: the plain kernel takes any number
    most = multiprocessors() * (fast > 0 ? kBackwardVectors / V / fast : kBackwardVectors / kPlainThreads);
  });
  return rows < most ? rows : most;
}

void rms_norm_backward(Type type, const void* grad_normed, const void* grad_summed, const void* summed,
                       const void* weight, const float* rstd, int64_t rows, int64_t h, float* partial, int64_t blocks,
                       void* grad_x, void* grad_weight, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t fast = threads_for<T>(h, aligned({grad_normed, grad_summed, summed, weight, partial, grad_x}));
    launch(fast > 0 ? backward<T> : backward_plain<T>, grid(blocks),
           static_cast<unsigned>(fast > 0 ? fast : kPlainThreads), stream, static_cast<const T*>(grad_normed),
           static_cast<const T*>(grad_summed), static_cast<const T*>(summed), static_cast<const T*>(weight), rstd, rows,
           h, inverse(h), partial, static_cast<T*>(grad_x));
    launch(sum_blocks<T>, grid(ceil_div(h, kWarp)), kWarp * kWarp, stream, partial, blocks, h,
           static_cast<T*>(grad_weight));
  });
}

}  // namespace hammer
