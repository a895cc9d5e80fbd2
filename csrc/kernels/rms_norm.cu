// Residual add and RMSNorm (arXiv 1910.07467), forward and backward, over rows of h elements of T = fp32, bf16, fp16.
//
//   forward    s = T(x + update)    r = 1 / sqrt(mean(s^2) + eps)    normed = weight T(s r)         s and r are kept
//   backward   c = mean(weight dn s r)    dx = r (weight dn - s r c) + ds    dweight = sum over rows of dn T(s r)
//
// with dn, ds the gradients of normed and s. All arithmetic is fp32, rounded to T where T is written, T(s r) as in
// Hugging Face.
//
// Memory, in units of rows x h elements: forward reads x, update and writes s, normed: 4, or 2 without update. Backward
// reads dn, ds, s and writes dx: 4, or 3 without ds. The weight's gradient costs 4 h bytes a block written and read.
//
// A block works on one row at a time, each thread on the same V vectors of 16 bytes of every row, so that the row stays
// in registers between its reduction and its use, and so do the sums of the weight's gradient. Backward, whose few
// blocks stay for many rows, asks for the next row before it reduces this one. Rows that are wider than the registers
// of a block, odd or not aligned go through the plain kernels, which read them twice.
//
// Deterministic: sums over a row go up a fixed tree; those over rows go over each block's rows in order and then over
// blocks in order. The number of blocks depends on the device, so another GPU may round dweight in another way.

#include "common.cuh"

namespace hammer {
namespace {

// Threads of a block at most, by the vectors of each: rows of up to 2048 16-bit elements, then of up to 8192.
constexpr int max_threads(int vectors) { return vectors == 1 ? 256 : 512; }
constexpr int kPlainThreads = 256;
constexpr int64_t kForwardWaves = 4;  // x 2048 threads of a multiprocessor: even load, and few writers of amax
// Threads x vectors that stay on a multiprocessor in backward. With the next row asked for, 48 KiB are then in flight;
// an H100 needs about 18 (3 TB/s x 800 ns / 132). It is what 64 registers (one vector) or 128 (two) allow.
constexpr int64_t kBackwardVectors = 1024;

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    forward_plain(const T* x, const T* update, const T* weight, float eps, int64_t rows, int64_t h, T* normed,
                  T* summed, float* rstd, float* amax) {
  __shared__ float places[2][kMaxWarps];
  unsigned largest = 0, parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const int64_t start = row * h;
    float square = 0.f;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      T sum = x[start + i];
      if (update != nullptr) summed[start + i] = sum = rounded<T>(to_float(sum) + to_float(update[start + i]));
      square += to_float(sum) * to_float(sum);
    }
    const float r = rsqrtf(block_sum(square, places[parity]) / h + eps);
    if (threadIdx.x == 0) rstd[row] = r;
    const T* sums = update != nullptr ? summed : x;  // each thread reads what it wrote itself
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      const float scaled = to_float(rounded<T>(to_float(sums[start + i]) * r));
      const T out = rounded<T>(to_float(weight[i]) * scaled);
      normed[start + i] = out;
      largest = larger(largest, magnitude(to_float(out)));
    }
  }
  if (amax != nullptr) raise_amax(amax, largest);
}

template <typename T, int V>
__global__ void __launch_bounds__(max_threads(V))
    forward(const T* __restrict__ x, const T* __restrict__ update, const T* __restrict__ weight, float eps,
            int64_t rows, int64_t h, T* __restrict__ normed, T* __restrict__ summed, float* __restrict__ rstd,
            float* __restrict__ amax) {
  constexpr int N = kWide<T>;
  __shared__ float places[2][kMaxWarps];
  unsigned largest = 0, parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    Pack<T, N> sum[V], added[V];
    for (int v = 0; v < V; ++v) {  // all loads first
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      sum[v] = load<N>(x + row * h + at);
      if (update != nullptr) added[v] = load<N>(update + row * h + at);
    }
    float square = 0.f;
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      if (update != nullptr) {
        for (int i = 0; i < N; ++i) sum[v].at[i] = rounded<T>(to_float(sum[v].at[i]) + to_float(added[v].at[i]));
        store(summed + row * h + at, sum[v]);
      }
      for (int i = 0; i < N; ++i) square += to_float(sum[v].at[i]) * to_float(sum[v].at[i]);
    }
    const float r = rsqrtf(block_sum(square, places[parity]) / h + eps);
    if (threadIdx.x == 0) rstd[row] = r;
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      const Pack<T, N> scale = load<N>(weight + at);
      Pack<T, N> out;
      for (int i = 0; i < N; ++i) {
        const float scaled = to_float(rounded<T>(to_float(sum[v].at[i]) * r));
        out.at[i] = rounded<T>(to_float(scale.at[i]) * scaled);
        largest = larger(largest, magnitude(to_float(out.at[i])));
      }
      store(normed + row * h + at, out);
    }
  }
  if (amax != nullptr) raise_amax(amax, largest);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    backward_plain(const T* grad_normed, const T* grad_summed, const T* summed, const T* weight, const float* rstd,
                   int64_t rows, int64_t h, float* partial, T* grad_x) {
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
    const float c = block_sum(dot, places[parity]) / h;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) {
      const float scaled = to_float(summed[start + i]) * r, grad = to_float(grad_normed[start + i]);
      const float through = grad_summed != nullptr ? to_float(grad_summed[start + i]) : 0.f;
      grad_x[start + i] = rounded<T>(r * (grad * to_float(weight[i]) - scaled * c) + through);
    }
  }
}

// What backward reads of one row, as one thread sees it.
template <typename T, int V>
struct Row {
  Pack<T, kWide<T>> grad_normed[V], grad_summed[V], summed[V];
  float rstd;
};

template <typename T, int V>
__global__ void __launch_bounds__(max_threads(V), kBackwardVectors / V / max_threads(V))
    backward(const T* __restrict__ grad_normed, const T* __restrict__ grad_summed, const T* __restrict__ summed,
             const T* __restrict__ weight, const float* __restrict__ rstd, int64_t rows, int64_t h,
             float* __restrict__ partial, T* __restrict__ grad_x) {
  constexpr int N = kWide<T>;
  __shared__ float places[2][kMaxWarps];
  float sums[V][N] = {};
  const auto read = [&](int64_t row) {
    Row<T, V> read;
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
  Row<T, V> next;
  if (blockIdx.x < rows) next = read(blockIdx.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const Row<T, V> now = next;
    if (row + gridDim.x < rows) next = read(row + gridDim.x);
    float dot = 0.f;
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      const Pack<T, N> scale = load<N>(weight + at);  // from the first cache
      for (int i = 0; i < N; ++i) {
        const float scaled = to_float(now.summed[v].at[i]) * now.rstd, grad = to_float(now.grad_normed[v].at[i]);
        dot += grad * to_float(scale.at[i]) * scaled;
        sums[v][i] += grad * to_float(rounded<T>(scaled));
      }
    }
    const float c = block_sum(dot, places[parity]) / h;
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * blockDim.x + threadIdx.x) * N;
      if (at >= h) continue;
      const Pack<T, N> scale = load<N>(weight + at);
      Pack<T, N> out;
      for (int i = 0; i < N; ++i) {
        const float scaled = to_float(now.summed[v].at[i]) * now.rstd, grad = to_float(now.grad_normed[v].at[i]);
        const float through = grad_summed != nullptr ? to_float(now.grad_summed[v].at[i]) : 0.f;
        out.at[i] = rounded<T>(now.rstd * (grad * to_float(scale.at[i]) - scaled * c) + through);
      }
      store(grad_x + row * h + at, out);
    }
  }

  constexpr int M = kWide<float>;
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
#pragma unroll 4
    for (int64_t block = warp; block < blocks; block += kWarp) sum += partial[block * h + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  float total = sums[lane][warp];  // now a warp holds one column
  for (int distance = kWarp / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
  const int64_t summed = static_cast<int64_t>(blockIdx.x) * kWarp + warp;
  if (lane == 0 && summed < h) grad_weight[summed] = rounded<T>(total);
}

// Vectors a thread and threads a block for a row of h elements; no vectors: the plain kernels.
struct Shape {
  int64_t vectors = 0;
  int64_t threads = kPlainThreads;
};

template <typename T>
Shape shape(int64_t h, bool wide) {
  const int64_t vectors = h / kWide<T>;
  if (!wide || h % kWide<T> != 0 || vectors > 2 * max_threads(2)) return {};
  const int64_t each = vectors <= max_threads(1) ? 1 : 2;
  return {each, ceil_div(ceil_div(vectors, each), kWarp) * kWarp};
}

}  // namespace

void rms_norm_forward(Type type, const void* x, const void* update, const void* weight, float eps, int64_t rows,
                      int64_t h, void* normed, void* summed, float* rstd, float* amax, cudaStream_t stream) {
  if (amax != nullptr) check(cudaMemsetAsync(amax, 0, sizeof(float), stream));
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const Shape form = shape<T>(h, aligned({x, update, weight, normed, summed}));
    const int64_t most = multiprocessors() * kForwardWaves * (2048 / form.threads);
    const dim3 blocks = grid(rows < most ? rows : most);
    const auto start = [&](auto kernel) {
      launch(kernel, blocks, static_cast<unsigned>(form.threads), stream, static_cast<const T*>(x),
             static_cast<const T*>(update), static_cast<const T*>(weight), eps, rows, h, static_cast<T*>(normed),
             static_cast<T*>(summed), rstd, amax);
    };
    start(form.vectors == 0 ? forward_plain<T> : form.vectors == 1 ? forward<T, 1> : forward<T, 2>);
  });
}

int64_t rms_norm_backward_blocks(Type type, int64_t rows, int64_t h) {
  int64_t most = 0;
  with_type(type, [&](auto zero) {
    const Shape form = shape<decltype(zero)>(h, true);  // as if aligned: the plain kernel takes any number of blocks
    most = multiprocessors() * (kBackwardVectors / (form.vectors == 2 ? 2 : 1) / form.threads);
  });
  return rows < most ? rows : most;
}

void rms_norm_backward(Type type, const void* grad_normed, const void* grad_summed, const void* summed,
                       const void* weight, const float* rstd, int64_t rows, int64_t h, float* partial, int64_t blocks,
                       void* grad_x, void* grad_weight, cudaStream_t stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const Shape form = shape<T>(h, aligned({grad_normed, grad_summed, summed, weight, partial, grad_x}));
    const auto start = [&](auto kernel) {
      launch(kernel, grid(blocks), static_cast<unsigned>(form.threads), stream, static_cast<const T*>(grad_normed),
             static_cast<const T*>(grad_summed), static_cast<const T*>(summed), static_cast<const T*>(weight), rstd,
             rows, h, partial, static_cast<T*>(grad_x));
    };
    start(form.vectors == 0 ? backward_plain<T> : form.vectors == 1 ? backward<T, 1> : backward<T, 2>);
    launch(sum_blocks<T>, grid(ceil_div(h, kWarp)), kWarp * kWarp, stream, partial, blocks, h,
           static_cast<T*>(grad_weight));
  });
}

}  // namespace hammer
