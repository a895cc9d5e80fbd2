// The arithmetic of kernels.hpp, compiled once for each instruction set (vectors.inl says what the including file
// sets).
//
// Bytes moved are the least that each operation can do with (kernels/norm.py, rope.py, swiglu.py, adamw.py); what a row
// needs twice comes from the core's own cache the second time. Sums have a fixed order, so results depend on the
// instruction set but never on the threads.
// Infinities and NaN pass through every function: the training step that meets them is skipped, not hidden.

#include "vectors.inl"

namespace hammer {
namespace HAMMER_VERSION {
namespace {

// Calls work(i, lanes) for all elements of a row, a vector at a time.
template <class Work>
HAMMER_INLINE void each(int64_t n, Work work) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) work(i, Whole{});
  if (i < n) work(i, Part{static_cast<int>(n - i)});
}

HAMMER_INLINE float largest_of(V x) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i + width] > x[i] ? x[i + width] : x[i];
  }
  return x[0];
}

template <class T>
HAMMER_INLINE T narrow_one(float x) {
  T values[kLanes];
  store(values, V{} + x);
  return values[0];
}

template <class T>
HAMMER_INLINE float widen_one(T x) {
  T values[kLanes] = {x};
  return load(values)[0];
}

// ---- functions -------------------------------------------------------------------------------------------------

// e^x for x <= 88: 2^n e^r, n the whole number nearest to x / ln 2, which adding 1.5 * 2^23 leaves in the low bits; e^r
// by a polynomial fitted to |r| <= ln 2 / 2 with a relative error of 4e-9, so that rounding decides (1 ulp). 0 below
// -87.7 (2^-126.5). The factor 2^n is multiplied, not added to the exponent: NaN stays.
HAMMER_INLINE V exponential(V x) {
  const V low = V{} - 88.0f;
  x = low > x ? low : x;
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in few bits
  V p = r * 0.0013814539f + 0.008368745f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + (r + 1.0f);
  return p * (V)(((I)shifted << 23) + (127 << 23));
}

HAMMER_INLINE V sigmoid(V x) {
  const V low = V{} - 80.0f;  // 1 + e^80 and its reciprocal are normal numbers
  return 1.0f / (1.0f + exponential(-(low > x ? low : x)));
}

// ---- residual add and RMSNorm ------------------------------------------------------------------------------------

template <class T>
void add_rms_norm_forward(int64_t rows, int64_t h, const T* x, const T* branch, const T* weight, float eps, T* normed,
                          T* summed, float* rstd) {
  for (int64_t row = 0; row < rows; ++row) {
    V squares{};
    if (branch == nullptr) {
      each(h, [&](int64_t i, auto lanes) {
        const V value = lanes.load(x + i);
        squares += value * value;
      });
    } else {
      each(h, [&](int64_t i, auto lanes) {
        ahead(x + i), ahead(branch + i), ahead(summed + i);
        const V value = rounded<T>(lanes.load(x + i) + lanes.load(branch + i));
        lanes.store(summed + i, value);
        squares += value * value;
      });
    }
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(h) + eps);
    const T* source = branch == nullptr ? x : summed;
    each(h, [&](int64_t i, auto lanes) {
      ahead(normed + i);
      lanes.store(normed + i, lanes.load(weight + i) * rounded<T>(lanes.load(source + i) * scale));
    });
    rstd[row] = scale;
    x += h, normed += h;
    if (branch != nullptr) branch += h, summed += h;
  }
}

// In fp32 the machine's own prefetching follows the four streams better than `ahead` does, which doubles the time of
// rows of 1 KiB and adds 40 % to those of 2 KiB; in bf16 `ahead` saves a fifth (two threads of a Xeon with AVX-512, in
// a step).
template <class T>
void add_rms_norm_backward(int64_t rows, int64_t h, const T* grad_normed, const T* grad_summed, const T* summed,
                           const T* weight, const float* rstd, T* grad_x, float* partial) {
  constexpr bool asks = sizeof(T) == 2;
  for (int64_t row = 0; row < rows; ++row) {
    const float scale = rstd[row];
    V dot{};
    each(h, [&](int64_t i, auto lanes) {
      if (asks) ahead(grad_normed + i), ahead(summed + i);
      dot += lanes.load(grad_normed + i) * lanes.load(weight + i) * lanes.load(summed + i);
    });
    const float mean = total(dot) * scale / static_cast<float>(h);  // of g n
    each(h, [&](int64_t i, auto lanes) {
      if (asks) ahead(grad_x + i);
      const V grad = lanes.load(grad_normed + i), n = lanes.load(summed + i) * scale;
      V result = (grad * lanes.load(weight + i) - n * mean) * scale;
      if (grad_summed != nullptr) {
        if (asks) ahead(grad_summed + i);
        result += lanes.load(grad_summed + i);
      }
      lanes.store(grad_x + i, result);
      lanes.store(partial + i, lanes.load(partial + i) + grad * n);
    });
    grad_normed += h, summed += h, grad_x += h;
    if (grad_summed != nullptr) grad_summed += h;
  }
}

template <class T>
void sum_partials(int64_t parts, int64_t h, float* partials, T* out) {
  for (int64_t part = 1; part < parts; ++part) {
    each(h, [&](int64_t i, auto lanes) {
      lanes.store(partials + i, lanes.load(partials + i) + lanes.load(partials + part * h + i));
    });
  }
  each(h, [&](int64_t i, auto lanes) { lanes.store(out + i, lanes.load(partials + i)); });
}

// ---- RoPE --------------------------------------------------------------------------------------------------------

// One head: from -> to, which may be the same; sign -1 turns back.
template <class T>
HAMMER_INLINE void turn(int64_t half, const T* from, T* to, const T* cos, const T* sin, float sign) {
  each(half, [&](int64_t i, auto lanes) {
    const V a = lanes.load(from + i), b = lanes.load(from + half + i);
    const V c = lanes.load(cos + i), s = lanes.load(sin + i) * sign;
    lanes.store(to + i, a * c - b * s);
    lanes.store(to + half + i, b * c + a * s);
  });
}

template <class T>
void rope_forward(int64_t s, int64_t b, int64_t heads, int64_t turned, int64_t d, T* qkv, const T* cos, const T* sin) {
  const int64_t half = d / 2;
  for (int64_t position = 0; position < s; ++position) {
    for (int64_t sample = 0; sample < b; ++sample) {
      for (int64_t head = 0; head < turned; ++head) {
        turn(half, qkv + head * d, qkv + head * d, cos, sin, 1.0f);
      }
      qkv += heads * d;
    }
    cos += half, sin += half;
  }
}

template <class T>
void rope_backward(int64_t first, int64_t last, int64_t b, int64_t d, const Heads<T>& q, const Heads<T>& k,
                   const Heads<T>& v, const T* cos, const T* sin, T* grad_qkv) {
  const int64_t half = d / 2;
  T* to = grad_qkv + first * b * (q.count + k.count + v.count) * d;
  for (int64_t position = first; position < last; ++position) {
    for (int64_t sample = 0; sample < b; ++sample) {
      const Heads<T>* const turned[] = {&q, &k};
      for (const Heads<T>* part : turned) {
        const T* from = part->data + position * part->stride_s + sample * part->stride_b;
        for (int64_t head = 0; head < part->count; ++head, to += d) {
          turn(half, from + head * part->stride_head, to, cos + position * half, sin + position * half, -1.0f);
        }
      }
      const T* from = v.data + position * v.stride_s + sample * v.stride_b;
      for (int64_t head = 0; head < v.count; ++head, to += d) {
        __builtin_memcpy(to, from + head * v.stride_head, static_cast<size_t>(d) * sizeof(T));
      }
    }
  }
}

// ---- SwiGLU ------------------------------------------------------------------------------------------------------

template <class T>
void swiglu_forward(int64_t rows, int64_t f, const T* gate_up, T* product) {
  for (int64_t row = 0; row < rows; ++row) {
    each(f, [&](int64_t i, auto lanes) {
      ahead(gate_up + i), ahead(gate_up + f + i), ahead(product + i);
      const V gate = lanes.load(gate_up + i), up = lanes.load(gate_up + f + i);
      lanes.store(product + i, gate * sigmoid(gate) * up);
    });
    gate_up += 2 * f, product += f;
  }
}

template <class T>
void swiglu_backward(int64_t rows, int64_t f, const T* grad, const T* gate_up, T* grad_gate_up) {
  for (int64_t row = 0; row < rows; ++row) {
    each(f, [&](int64_t i, auto lanes) {
      ahead(gate_up + i), ahead(gate_up + f + i), ahead(grad + i);
      ahead(grad_gate_up + i), ahead(grad_gate_up + f + i);
      const V gate = lanes.load(gate_up + i), up = lanes.load(gate_up + f + i), g = lanes.load(grad + i);
      const V share = sigmoid(gate), silu = gate * share;
      lanes.store(grad_gate_up + i, g * up * (share + silu * (1.0f - share)));
      lanes.store(grad_gate_up + f + i, g * silu);
    });
    grad += f, gate_up += 2 * f, grad_gate_up += 2 * f;
  }
}

// ---- softmax and cross-entropy -----------------------------------------------------------------------------------

constexpr float kInfinity = __builtin_inff();

template <class T>
HAMMER_INLINE float row_largest(int64_t n, const T* row) {
  V found = V{} - kInfinity;
  each(n, [&](int64_t i, auto lanes) {
    ahead(row + i);
    const V z = lanes.load(row + i, -kInfinity);
    found = z > found ? z : found;
  });
  return largest_of(found);
}

// Padding, and the label's own entry in full precision: p - 1 would lose all to rounding where p is close to 1.
template <class T>
HAMMER_INLINE void finish_gradient(Columns columns, T* row, int64_t label, float lse, float loss, float weight,
                                   float z_loss) {
  for (int64_t i = columns.valid; i < columns.width; ++i) row[i] = T{};
  const int64_t column = label - columns.start;
  if (column < 0 || column >= columns.valid) return;
  row[column] = narrow_one<T>(weight * (__builtin_expm1f(-loss) + 2.0f * z_loss * lse * __builtin_expf(-loss)));
}

template <class T>
void row_statistics(int64_t rows, int64_t stride, Columns columns, const T* logits, const int64_t* labels,
                    float* largest, float* sum, float* target) {
  for (int64_t row = 0; row < rows; ++row, logits += stride) {
    const int64_t column = labels[row] - columns.start;
    target[row] = column >= 0 && column < columns.valid ? widen_one(logits[column]) : 0.0f;
    const float top = row_largest(columns.valid, logits);
    V sums{};
    each(columns.valid, [&](int64_t i, auto lanes) { sums += exponential(lanes.load(logits + i, -kInfinity) - top); });
    largest[row] = top, sum[row] = total(sums);
  }
}

template <class T>
void softmax_gradient(int64_t rows, int64_t stride, Columns columns, T* logits, const int64_t* labels, const float* lse,
                      const float* loss, const float* weights, float z_loss) {
  for (int64_t row = 0; row < rows; ++row, logits += stride) {
    const float shift = lse[row], slope = weights[row] * (1.0f + 2.0f * z_loss * shift);
    each(columns.valid, [&](int64_t i, auto lanes) {
      ahead(logits + i);
      lanes.store(logits + i, exponential(lanes.load(logits + i) - shift) * slope);
    });
    finish_gradient(columns, logits, labels[row], shift, loss[row], weights[row], z_loss);
  }
}

template <class T>
void loss_and_gradient(int64_t rows, int64_t stride, Columns columns, T* logits, const int64_t* labels,
                       const float* weights, float z_loss, float* loss, float* scratch) {
  for (int64_t row = 0; row < rows; ++row, logits += stride) {
    const float target = widen_one(logits[labels[row] - columns.start]);
    const float largest = row_largest(columns.valid, logits);
    float* exponentials = scratch;
    if constexpr (sizeof(T) == sizeof(float)) exponentials = logits;
    V sums{};
    each(columns.valid, [&](int64_t i, auto lanes) {
      const V e = exponential(lanes.load(logits + i, -kInfinity) - largest);
      lanes.store(exponentials + i, e);
      sums += e;
    });
    const float sum = total(sums), log_sum = __builtin_logf(sum), lse = log_sum + largest;
    loss[row] = log_sum + (largest - target);  // a small loss keeps its digits
    const float slope = weights[row] * (1.0f + 2.0f * z_loss * lse) / sum;
    each(columns.valid, [&](int64_t i, auto lanes) { lanes.store(logits + i, lanes.load(exponentials + i) * slope); });
    finish_gradient(columns, logits, labels[row], lse, loss[row], weights[row], z_loss);
  }
}

// ---- optimizer ---------------------------------------------------------------------------------------------------

HAMMER_INLINE V square_root(V x) {
  V root;
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
}

template <class T>
void adamw(int64_t n, float* master, const float* grad, float* exp_avg, float* exp_avg_sq, T* param,
           const Update& update) {
  const Update u = update;
  each(n, [&](int64_t i, auto lanes) {
    ahead(grad + i), ahead(exp_avg + i), ahead(exp_avg_sq + i), ahead(master + i);
    const V g = lanes.load(grad + i) * u.scale;
    const V m = lanes.load(exp_avg + i) * u.beta1 + g * u.new1;
    const V v = lanes.load(exp_avg_sq + i) * u.beta2 + g * g * u.new2;
    const V w = lanes.load(master + i) * u.keep - u.rate * m / (square_root(v) * u.root2 + u.eps);
    lanes.store(exp_avg + i, m);
    lanes.store(exp_avg_sq + i, v);
    lanes.store(master + i, w);
    if (param != nullptr) lanes.store(param + i, w);
  });
}

double square_sum(int64_t n, const float* values) {
  V sums[4] = {};  // four sums: one would wait for its own last addition
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) {
      ahead(values + i + k * kLanes);
      const V x = load(values + i + k * kLanes);
      sums[k] += x * x;
    }
  }
  each(n - i, [&](int64_t k, auto lanes) {
    const V x = lanes.load(values + i + k);
    sums[0] += x * x;
  });
  return static_cast<double>(total(sums[0] + sums[1] + (sums[2] + sums[3])));
}

template <class T>
void accumulate(int64_t n, float* place, const T* values, bool add) {
  if (add) {
    each(n, [&](int64_t i, auto lanes) { lanes.store(place + i, lanes.load(place + i) + lanes.load(values + i)); });
  } else {
    each(n, [&](int64_t i, auto lanes) { lanes.store(place + i, lanes.load(values + i)); });
  }
}

// ---- table -------------------------------------------------------------------------------------------------------

template <class T>
constexpr Table<T> table() {
  return {add_rms_norm_forward<T>, add_rms_norm_backward<T>, sum_partials<T>,    rope_forward<T>,
          rope_backward<T>,        swiglu_forward<T>,        swiglu_backward<T>, row_statistics<T>,
          softmax_gradient<T>,     loss_and_gradient<T>,     adamw<T>,           accumulate<T>};
}

}  // namespace
}  // namespace HAMMER_VERSION
}  // namespace hammer
