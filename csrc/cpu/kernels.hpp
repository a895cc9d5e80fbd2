// The fused operations on a range of rows: one table of functions for each instruction set, filled by kernels.inl.
//
// T is the type in memory, float or Bf16; arithmetic is fp32. Rows are contiguous and lie one after the other where no
// stride is given. A function changes nothing but its rows, takes no locks and starts no threads (operations.hpp does).
// Legend: h hidden, f feed-forward, d head size, s positions, b micro-batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hammer {

struct Bf16 {
  uint16_t bits;
};

// A gradient [s, b, heads, d] whose last dimension is contiguous; strides in elements.
template <class T>
struct Heads {
  const T* data;
  int64_t stride_s, stride_b, stride_head;
  int64_t count;
};

// What AdamW knows beyond its tensors.
struct Update {
  float rate;  // lr / (1 - beta1^k)
  float keep;  // 1 - lr decay
  float beta1, beta2;  // what moments keep,
  float new1, new2;  // and take: 1 - beta from fp64, as for 0.999 the difference in fp32 is off by 3e-5
  float root2;  // 1 / sqrt(1 - beta2^k)
  float eps;
  float scale;  // 1 / divisor of the gradients
};

// The part of a vocabulary that a row of logits is of, as `Columns` in kernels/linear_cross_entropy.py.
struct Columns {
  int64_t start, valid, width;
};

template <class T>
struct Table {
  // summed = x + branch in T, rstd = 1 / sqrt(mean(summed^2) + eps), normed = weight * T(summed * rstd).
  // Without a branch nothing is written to summed.
  void (*add_rms_norm_forward)(int64_t rows, int64_t h, const T* x, const T* branch, const T* weight, float eps,
                               T* normed, T* summed, float* rstd);
  // With n = summed * rstd and g = grad_normed * weight: grad_x = rstd (g - n mean(g n)) + grad_summed;
  // partial [h] += grad_normed * n.
  void (*add_rms_norm_backward)(int64_t rows, int64_t h, const T* grad_normed, const T* grad_summed, const T* summed,
                                const T* weight, const float* rstd, T* grad_x, float* partial);
  // out [h] = the sum of partials [parts, h], in order; the first of them is overwritten.
  void (*sum_partials)(int64_t parts, int64_t h, float* partials, T* out);
  // The first `turned` of `heads` heads of each position, in place: (a, b) -> (a cos - b sin, b cos + a sin) for the
  // halves a, b of a head; cos, sin [s, d/2].
  void (*rope_forward)(int64_t s, int64_t b, int64_t heads, int64_t turned, int64_t d, T* qkv, const T* cos,
                       const T* sin);
  // grad_qkv [positions, b, n + 2g, d]: q and k turned back, v copied. Positions [first, last) of all.
  void (*rope_backward)(int64_t first, int64_t last, int64_t b, int64_t d, const Heads<T>& q, const Heads<T>& k,
                        const Heads<T>& v, const T* cos, const T* sin, T* grad_qkv);
  // [rows, 2f] -> [rows, f]: silu(gate) * up.
  void (*swiglu_forward)(int64_t rows, int64_t f, const T* gate_up, T* product);
  void (*swiglu_backward)(int64_t rows, int64_t f, const T* grad, const T* gate_up, T* grad_gate_up);
  // Of each row: largest logit, sum of exp(z - largest), logit of the label or 0.
  void (*row_statistics)(int64_t rows, int64_t stride, Columns columns, const T* logits, const int64_t* labels,
                         float* largest, float* sum, float* target);
  // Logits -> gradient of weights * (loss + z_loss * lse^2), from lse and loss of the whole rows.
  void (*softmax_gradient)(int64_t rows, int64_t stride, Columns columns, T* logits, const int64_t* labels,
                           const float* lse, const float* loss, const float* weights, float z_loss);
  // Both in one, for rows that hold the whole vocabulary; scratch [width] floats (unused for float logits).
  void (*loss_and_gradient)(int64_t rows, int64_t stride, Columns columns, T* logits, const int64_t* labels,
                            const float* weights, float z_loss, float* loss, float* scratch);
  // The formula of kernels/adamw.py; param, the copy in T, may be absent.
  void (*adamw)(int64_t n, float* master, const float* grad, float* exp_avg, float* exp_avg_sq, T* param,
                const Update& update);
  // place = or += values.
  void (*accumulate)(int64_t n, float* place, const T* values, bool add);
};

struct Version {
  const char* name;
  bool (*runs_here)();
  Table<float> fp32;
  Table<Bf16> bf16;
  double (*square_sum)(int64_t n, const float* values);

  template <class T>
  const Table<T>& table() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return fp32;
    } else {
      return bf16;
    }
  }
};

extern const Version kPortable;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAMMER_X86 1
extern const Version kAvx2, kAvx512, kAvx512Bf16;
#endif

}  // namespace hammer
