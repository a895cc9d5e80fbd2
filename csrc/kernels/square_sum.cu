// out += sum over part of x^2: the part of a gradient norm that one buffer holds.
//
// part flat fp32, out an fp32 scalar on the device. Memory: 4 bytes an element, once, and one number a block. Sums
// within a thread, a block and over blocks in fp32, fp32 and fp64.
//
// Deterministic, and the same bits on every GPU: how elements are divided depends on their number and address alone.

#include "common.cuh"

namespace hammer {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = kWide<float>;
constexpr int64_t kMaxBlocks = 16384;  // 15 waves of an H100, so that the last one costs little
constexpr int64_t kPerThread = 4;      // vectors at least, where there are fewer blocks

__global__ void __launch_bounds__(kThreads)
    sum_squares(const float* __restrict__ part, int64_t n, Split split, float* __restrict__ partial) {
  __shared__ float place[kMaxWarps];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  float sums[kWidth] = {};
#pragma unroll 4  // loads in flight
  for (int64_t vector = thread; vector < split.vectors; vector += threads) {
    const Pack<float, kWidth> x = load<kWidth>(part + split.head + vector * kWidth);
    for (int i = 0; i < kWidth; ++i) sums[i] += x.at[i] * x.at[i];
  }
  const int64_t singles = n - split.vectors * kWidth;
  for (int64_t single = thread; single < singles; single += threads) {
    const float x = part[single < split.head ? single : single + split.vectors * kWidth];
    sums[0] += x * x;
  }
  const float total = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), place);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block.
__global__ void __launch_bounds__(kThreads) add_blocks(const float* __restrict__ partial, int64_t blocks, float* out) {
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) sum += partial[block];
  sums[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = static_cast<float>(*out + sums[0]);
}

}  // namespace

int64_t square_sum_blocks(int64_t n) {
  const int64_t blocks = ceil_div(n, kThreads * kWidth * kPerThread);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

void add_square_sum(const float* part, int64_t n, float* partial, float* out, cudaStream_t stream) {
  const int64_t blocks = square_sum_blocks(n);
  launch(sum_squares, grid(blocks), kThreads, stream, part, n, split(n, kWidth, {{part, sizeof(float)}}), partial);
  launch(add_blocks, grid(1), kThreads, stream, partial, blocks, out);
}

}  // namespace hammer
