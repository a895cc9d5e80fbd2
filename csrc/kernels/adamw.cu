// AdamW (arXiv 1711.05101, algorithm 2) over a flat buffer, with the clipping or unscaling of the gradient before and
// the 16-bit copy of the weights after it, in one pass.
//
//   g = grad / divisor;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   w = w (1 - lr decay) - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps);  param = T(w)         k = updates + 1
//
// master, grad, exp_avg (m), exp_avg_sq (v) fp32; param bf16, fp16 or absent. divisor, skip and updates are fp32
// scalars on the device, so that the host never waits for them; where skip is not 0 nothing is written.
//
// Memory: 30 bytes an element (28 without param), each once: 16 read, 14 written. Deterministic: every element is
// computed by one thread from its own inputs.

#include <cmath>

#include "common.cuh"

namespace hammer {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;           // elements a vector: 16 bytes of fp32, 8 of the copy
constexpr int64_t kPerThread = 16;  // vectors: the bias correction at the start of a block is paid by 16384 elements

// What is the same for all elements.
struct Factors {
  float divisor, one_minus_beta1, beta2, one_minus_beta2, eps, decay;  // decay: times lr
  float step_size, root;                                               // lr / (1 - b1^k), 1 / sqrt(1 - b2^k)
};

// b^k and the difference to 1 in fp64: with b2 = 0.999, the first update divides by 0.001.
__device__ __forceinline__ void correct_bias(const AdamW& a, double log_beta1, double log_beta2, Factors& factors) {
  const double k = static_cast<double>(*a.updates) + 1.0;
  factors.step_size = static_cast<float>(a.lr / -expm1(k * log_beta1));
  factors.root = static_cast<float>(1.0 / sqrt(-expm1(k * log_beta2)));
}

__device__ __forceinline__ void update(const Factors& f, float grad, float& weight, float& exp_avg, float& exp_avg_sq) {
  const float g = grad / f.divisor;
  exp_avg += f.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = f.beta2 * exp_avg_sq + f.one_minus_beta2 * g * g;
  weight -= f.decay * weight;
  weight -= f.step_size * exp_avg / (sqrtf(exp_avg_sq) * f.root + f.eps);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamW a, double log_beta1, double log_beta2, Factors factors, T* param, int64_t n, Split split) {
  if (*a.skip != 0.f) return;  // the same in every thread
  __shared__ float corrected[2];
  if (threadIdx.x == 0) {
    correct_bias(a, log_beta1, log_beta2, factors);
    corrected[0] = factors.step_size;
    corrected[1] = factors.root;
  }
  __syncthreads();
  factors.step_size = corrected[0];
  factors.root = corrected[1];
  factors.divisor = *a.divisor;

  // A block's vectors are neighbours.
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread, end = begin + kThreads * kPerThread;
  for (int64_t vector = begin + threadIdx.x; vector < end && vector < split.vectors; vector += kThreads) {
    const int64_t at = split.head + vector * kWidth;
    const Pack<float, kWidth> grad = load<kWidth>(a.grad + at);
    Pack<float, kWidth> weight = load<kWidth>(a.master + at), exp_avg = load<kWidth>(a.exp_avg + at),
                        exp_avg_sq = load<kWidth>(a.exp_avg_sq + at);
    for (int i = 0; i < kWidth; ++i) update(factors, grad.at[i], weight.at[i], exp_avg.at[i], exp_avg_sq.at[i]);
    const Pack<T, kWidth> copy = rounded<T>(to_floats(weight));
    store(a.master + at, weight);
    store(a.exp_avg + at, exp_avg);
    store(a.exp_avg_sq + at, exp_avg_sq);
    if (param != nullptr) store(param + at, copy);
  }
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads, singles = n - split.vectors * kWidth;
  for (int64_t single = thread; single < singles; single += threads) {
    const int64_t at = single < split.head ? single : single + split.vectors * kWidth;
    update(factors, a.grad[at], a.master[at], a.exp_avg[at], a.exp_avg_sq[at]);
    if (param != nullptr) param[at] = rounded<T>(a.master[at]);
  }
}

}  // namespace

void adamw(Type param_type, const AdamW& a, int64_t n, cudaStream_t stream) {
  Factors factors{};
  factors.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  factors.beta2 = static_cast<float>(a.beta2);
  factors.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  factors.eps = static_cast<float>(a.eps);
  factors.decay = static_cast<float>(a.lr * a.decay);
  const auto start = [&](auto zero) {
    using T = decltype(zero);
    T* param = static_cast<T*>(a.param);
    constexpr size_t wide = sizeof(float);
    const Split parts = split(
        n, kWidth, {{a.master, wide}, {a.grad, wide}, {a.exp_avg, wide}, {a.exp_avg_sq, wide}, {a.param, sizeof(T)}});
    const int64_t items = parts.vectors > 0 ? ceil_div(parts.vectors, kPerThread) : n;
    launch(adamw_kernel<T>, grid(ceil_div(items, kThreads)), kThreads, stream, a, std::log(a.beta1), std::log(a.beta2),
           factors, param, n, parts);
  };
  if (param_type == Type::fp16) return start(__half());
  start(__nv_bfloat16());
}

}  // namespace hammer
