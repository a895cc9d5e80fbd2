// Rotary position embedding (arXiv 2104.09864), half-split as in Hugging Face, on the fused queries, keys and values.
//
//   forward    (a, b) -> (a cos - b sin, b cos + a sin)    in place, the first `turned` heads of [s, b, heads, 2 half]
//   backward   (a, b) -> (a cos + b sin, b cos - a sin)    from grad_q and grad_k, grad_v copied, into grad_qkv, whole
//
// a, b: elements i and i + half of a head; cos, sin [s, half]; T = fp32, bf16, fp16 for all of them, fp32 arithmetic
// rounded once. Memory: forward reads and writes the turned heads once, backward all heads once; cos and sin come from
// the caches. Deterministic: every element is computed by one thread from its own inputs.
//
// A block works on one row (position, sample), a thread on 16 bytes of a and the 16 of b, or on one element of each
// where half or an address does not allow that.

#include "common.cuh"

namespace hammer {
namespace {

constexpr int kMaxThreads = 256;

template <typename T, int N>
struct Pair {
  Pack<T, N> a, b;
};

// Turn by the angle, or back.
template <bool back, typename T, int N>
__device__ __forceinline__ Pair<T, N> turn(const Pair<T, N>& in, const Pack<T, N>& cos, const Pack<T, N>& sin) {
  const Floats<N> a = to_floats(in.a), b = to_floats(in.b), c = to_floats(cos), s = to_floats(sin);
  Floats<N> first, second;
  for (int i = 0; i < N; ++i) {
    const float turned = back ? -s.at[i] : s.at[i];
    first.at[i] = a.at[i] * c.at[i] - b.at[i] * turned;
    second.at[i] = b.at[i] * c.at[i] + a.at[i] * turned;
  }
  return {rounded<T>(first), rounded<T>(second)};
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads)
    forward(T* qkv, const T* __restrict__ cos, const T* __restrict__ sin, int heads, int turned, int half) {
  const int64_t position = blockIdx.x, row = position * gridDim.y + blockIdx.y;
  const int packs = half / N, items = turned * packs;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int head = item / packs, at = item % packs * N;
    T* place = qkv + (row * heads + head) * 2 * half + at;
    const Pair<T, N> in = {load<N>(place), load<N>(place + half)};
    const Pair<T, N> out = turn<false>(in, load<N>(cos + position * half + at), load<N>(sin + position * half + at));
    store(place, out.a);
    store(place + half, out.b);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) backward(Heads q, Heads k, Heads v, const T* __restrict__ cos,
                                                        const T* __restrict__ sin, int half, T* __restrict__ grad_qkv) {
  const int64_t position = blockIdx.x, sample = blockIdx.y, row = position * gridDim.y + sample;
  const int queries = static_cast<int>(q.count), turned = queries + static_cast<int>(k.count);
  const auto place = [&](const Heads& from, int head) {
    return static_cast<const T*>(from.data) + position * from.position + sample * from.sample + head * from.head;
  };
  const int heads = turned + static_cast<int>(v.count), packs = half / N, items = heads * packs;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int head = item / packs, at = item % packs * N;
    const T* source = at + (head < queries  ? place(q, head)
                            : head < turned ? place(k, head - queries)
                                            : place(v, head - turned));
    Pair<T, N> pair = {load<N>(source), load<N>(source + half)};
    if (head < turned) {
      pair = turn<true>(pair, load<N>(cos + position * half + at), load<N>(sin + position * half + at));
    }
    T* out = grad_qkv + (row * heads + head) * 2 * half + at;
    store(out, pair.a);
    store(out + half, pair.b);
  }
}

unsigned threads_for(int64_t items) {
  const int64_t whole_warps = ceil_div(items, kWarp) * kWarp;
  return static_cast<unsigned>(whole_warps < kMaxThreads ? whole_warps : kMaxThreads);
}

}  // namespace

void rope_forward(Type type, void* qkv, const void* cos, const void* sin, int64_t s, int64_t b, int64_t heads,
                  int64_t turned, int64_t half, cudaStream_t stream) {
  if (turned * half == 0) return;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = half % kWide<T> == 0 && aligned({qkv, cos, sin});
    with_width<T>(wide, [&](auto width) {
      launch(forward<T, width()>, grid(s, b), threads_for(turned * half / width()), stream, static_cast<T*>(qkv),
             static_cast<const T*>(cos), static_cast<const T*>(sin), heads, turned, half);
    });
  });
}

void rope_backward(Type type, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v, const void* cos,
                   const void* sin, int64_t s, int64_t b, int64_t half, void* grad_qkv, cudaStream_t stream) {
  const int64_t heads = grad_q.count + grad_k.count + grad_v.count;
  if (heads * half == 0) return;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    bool wide = half % kWide<T> == 0 && aligned({cos, sin, grad_qkv});
    for (const Heads* from : {&grad_q, &grad_k, &grad_v}) {
      wide = wide && aligned({from->data}) && (from->position | from->sample | from->head) % kWide<T> == 0;
    }
    with_width<T>(wide, [&](auto width) {
      launch(backward<T, width()>, grid(s, b), threads_for(heads * half / width()), stream, grad_q, grad_k, grad_v,
             static_cast<const T*>(cos), static_cast<const T*>(sin), half, static_cast<T*>(grad_qkv));
    });
  });
}

}  // namespace hammer
