// The launchers of the CUDA kernels, as bindings.cpp calls them. Arguments have been checked there; all arrays are
// contiguous unless a stride is passed, outputs overlap no other argument, counts are 64-bit, and work is enqueued on
// `stream` of the current device. A failed launch is a std::runtime_error with CUDA's own words.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hammer {

enum class Type { fp32, bf16, fp16, e4m3, e5m2 };

// rms_norm.cu. branch and summed together, or neither.
void rms_norm_forward(Type type, const void* x, const void* branch, const void* weight, float eps, int64_t rows,
                      int64_t h, void* normed, void* summed, float* rstd, float* amax, cudaStream_t stream);
// Blocks that share the rows in backward: partial is [blocks, h] fp32.
int64_t rms_norm_backward_blocks(Type type, int64_t rows, int64_t h);
void rms_norm_backward(Type type, const void* grad_normed, const void* grad_summed, const void* summed,
                       const void* weight, const float* rstd, int64_t rows, int64_t h, float* partial, int64_t blocks,
                       void* grad_x, void* grad_weight, cudaStream_t stream);

// rope.cu. Heads of [s, b, heads, 2 half]; strides are in elements, the last dimension is contiguous.
struct Heads {
  const void* data;
  int64_t position, sample, head;  // strides
  int64_t count;                   // heads
};
void rope_forward(Type type, void* qkv, const void* cos, const void* sin, int64_t s, int64_t b, int64_t heads,
                  int64_t turned, int64_t half, cudaStream_t stream);
void rope_backward(Type type, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v, const void* cos,
                   const void* sin, int64_t s, int64_t b, int64_t half, void* grad_qkv, cudaStream_t stream);

// swiglu.cu
void swiglu_forward(Type type, const void* gate_up, int64_t rows, int64_t f, void* product, float* amax,
                    cudaStream_t stream);
void swiglu_backward(Type type, const void* grad, const void* gate_up, int64_t rows, int64_t f, void* grad_gate_up,
                     cudaStream_t stream);

// adamw.cu
struct AdamW {
  float* master;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  void* param;  // 16-bit copy of the master, or null
  double lr, beta1, beta2, eps, decay;
  const float *divisor, *skip, *updates;  // scalars on the device
};
void adamw(Type param_type, const AdamW& arguments, int64_t n, cudaStream_t stream);

// square_sum.cu. partial has space for square_sum_blocks(n) numbers.
int64_t square_sum_blocks(int64_t n);
void add_square_sum(const float* part, int64_t n, float* partial, float* out, cudaStream_t stream);

// fp8.cu. transposed may be null.
void amax(Type type, const void* x, int64_t n, float* out, cudaStream_t stream);
void cast_fp8(Type from, Type to, const void* x, const float* scale, int64_t rows, int64_t columns, void* out,
              void* transposed, cudaStream_t stream);

}  // namespace hammer
