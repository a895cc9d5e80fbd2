// The fused operations on whole tensors: kernels.hpp's row functions, divided over threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"

namespace hammer {

// Elements that a thread should have at least: about 5 us of work, what starting a team of threads costs.
constexpr int64_t kGrain = 1 << 14;

// Calls work(first, last) for ranges that cover [0, count). The ranges depend on `threads`, so the work must not.
template <class Work>
void divide(int64_t count, int64_t elements_each, int threads, Work work) {
  const int64_t useful = count * elements_each / kGrain;
  if (threads <= 1 || useful <= 1 || count <= 1) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  const int64_t parts = useful < threads ? useful : threads;
  // All of torch's threads, though some may find nothing to do: another number would end and start threads every time.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = count * part / parts, last = count * (part + 1) / parts;
    if (first < last) work(first, last);
  }
}

// Calls work(block, first, last) for blocks of a fixed size: what each computes does not depend on `threads`.
template <class Work>
void in_blocks(int64_t count, int64_t size, int threads, Work work) {
  const int64_t blocks = (count + size - 1) / size;
  divide(blocks, kGrain, threads, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      work(block, block * size, (block + 1) * size < count ? (block + 1) * size : count);
    }
  });
}

template <class T>
void add_rms_norm_forward(const Version& version, int threads, int64_t rows, int64_t h, const T* x, const T* branch,
                          const T* weight, float eps, T* normed, T* summed, float* rstd) {
  divide(rows, h, threads, [&](int64_t first, int64_t last) {
    const int64_t start = first * h;
    version.table<T>().add_rms_norm_forward(last - first, h, x + start, branch ? branch + start : nullptr, weight, eps,
                                            normed + start, summed ? summed + start : nullptr, rstd + first);
  });
}

template <class T>
void add_rms_norm_backward(const Version& version, int threads, int64_t rows, int64_t h, const T* grad_normed,
                           const T* grad_summed, const T* summed, const T* weight, const float* rstd, T* grad_x,
                           T* grad_weight) {
  const int64_t size = h < kGrain / 16 ? kGrain / h : 16;  // rows: so many that the partial sums are little to write
  const int64_t blocks = (rows + size - 1) / size;
  std::vector<float> partials(static_cast<size_t>((blocks > 0 ? blocks : 1) * h));
  in_blocks(rows, size, threads, [&](int64_t block, int64_t first, int64_t last) {
    const int64_t start = first * h;
    version.table<T>().add_rms_norm_backward(last - first, h, grad_normed + start,
                                             grad_summed ? grad_summed + start : nullptr, summed + start, weight,
                                             rstd + first, grad_x + start, partials.data() + block * h);
  });
  version.table<T>().sum_partials(blocks, h, partials.data(), grad_weight);
}

template <class T>
void rope_forward(const Version& version, int threads, int64_t s, int64_t b, int64_t heads, int64_t turned, int64_t d,
                  T* qkv, const T* cos, const T* sin) {
  divide(s, b * turned * d, threads, [&](int64_t first, int64_t last) {
    version.table<T>().rope_forward(last - first, b, heads, turned, d, qkv + first * b * heads * d,
                                    cos + first * (d / 2), sin + first * (d / 2));
  });
}

template <class T>
void rope_backward(const Version& version, int threads, int64_t s, int64_t b, int64_t d, const Heads<T>& q,
                   const Heads<T>& k, const Heads<T>& v, const T* cos, const T* sin, T* grad_qkv) {
  divide(s, b * (q.count + k.count + v.count) * d, threads, [&](int64_t first, int64_t last) {
    version.table<T>().rope_backward(first, last, b, d, q, k, v, cos, sin, grad_qkv);
  });
}

template <class T>
void swiglu_forward(const Version& version, int threads, int64_t rows, int64_t f, const T* gate_up, T* product) {
  divide(rows, f, threads, [&](int64_t first, int64_t last) {
    version.table<T>().swiglu_forward(last - first, f, gate_up + 2 * first * f, product + first * f);
  });
}

template <class T>
void swiglu_backward(const Version& version, int threads, int64_t rows, int64_t f, const T* grad, const T* gate_up,
                     T* grad_gate_up) {
  divide(rows, f, threads, [&](int64_t first, int64_t last) {
    version.table<T>().swiglu_backward(last - first, f, grad + first * f, gate_up + 2 * first * f,
                                       grad_gate_up + 2 * first * f);
  });
}

// statistics [3, rows]: largest logit, sum of exponentials, logit of the label.
template <class T>
void row_statistics(const Version& version, int threads, int64_t rows, int64_t stride, Columns columns, const T* logits,
                    const int64_t* labels, float* statistics) {
  divide(rows, columns.width, threads, [&](int64_t first, int64_t last) {
    float* place = statistics + first;
    version.table<T>().row_statistics(last - first, stride, columns, logits + first * stride, labels + first, place,
                                      place + rows, place + 2 * rows);
  });
}

template <class T>
void softmax_gradient(const Version& version, int threads, int64_t rows, int64_t stride, Columns columns, T* logits,
                      const int64_t* labels, const float* lse, const float* loss, const float* weights, float z_loss) {
  divide(rows, columns.width, threads, [&](int64_t first, int64_t last) {
    version.table<T>().softmax_gradient(last - first, stride, columns, logits + first * stride, labels + first,
                                        lse + first, loss + first, weights + first, z_loss);
  });
}

// False, with nothing changed, where a label is not a column.
template <class T>
bool loss_and_gradient(const Version& version, int threads, int64_t rows, int64_t stride, Columns columns, T* logits,
                       const int64_t* labels, const float* weights, float z_loss, float* loss) {
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] < columns.start || labels[row] - columns.start >= columns.valid) return false;
  }
  divide(rows, columns.width, threads, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(sizeof(T) == sizeof(float) ? nullptr
                                                                      : new float[static_cast<size_t>(columns.width)]);
    version.table<T>().loss_and_gradient(last - first, stride, columns, logits + first * stride, labels + first,
                                         weights + first, z_loss, loss + first, scratch.get());
  });
  return true;
}

// `updates`: those applied before this one. T is the type of param, or float where there is none.
template <class T>
void adamw(const Version& version, int threads, int64_t n, float* master, const float* grad, float* exp_avg,
           float* exp_avg_sq, T* param, double lr, double beta1, double beta2, double eps, double decay, double divisor,
           double updates) {
  const double k = updates + 1;
  const Update update = {static_cast<float>(lr / (1 - std::pow(beta1, k))),
                         static_cast<float>(1 - lr * decay),
                         static_cast<float>(beta1),
                         static_cast<float>(beta2),
                         static_cast<float>(1 - beta1),
                         static_cast<float>(1 - beta2),
                         static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, k))),
                         static_cast<float>(eps),
                         static_cast<float>(1 / divisor)};
  divide(n, 1, threads, [&](int64_t first, int64_t last) {
    version.table<T>().adamw(last - first, master + first, grad + first, exp_avg + first, exp_avg_sq + first,
                             param ? param + first : nullptr, update);
  });
}

// Blocks of 64 KiB, each summed in fp32, and their sums in fp64 and in order.
inline double square_sum(const Version& version, int threads, int64_t n, const float* values) {
  std::vector<double> sums(static_cast<size_t>((n + kGrain - 1) / kGrain));
  in_blocks(n, kGrain, threads, [&](int64_t block, int64_t first, int64_t last) {
    sums[static_cast<size_t>(block)] = version.square_sum(last - first, values + first);
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

template <class T>
void accumulate(const Version& version, int threads, int64_t n, float* place, const T* values, bool add) {
  divide(n, 1, threads, [&](int64_t first, int64_t last) {
    version.table<T>().accumulate(last - first, place + first, values + first, add);
  });
}

}  // namespace hammer
