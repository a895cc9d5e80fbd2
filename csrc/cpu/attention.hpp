// Causal attention with query groups on a CPU, forward and backward; attention.cpp says how.
#pragma once

#include <cstdint>

namespace hammer {

// A tensor [rows, batches, heads, size] of floats or bfloat16: its strides in elements, that of the last dimension
// is 1.
struct Strided {
  void* data;
  int64_t row, batch, head;
};

// One call: the same documents lie in each batch, document i is the rows [bounds[i], bounds[i + 1]).
struct Attention {
  Strided q, k, v, out;                      // k and v have `groups` heads, the others `heads`
  Strided grad_out, grad_q, grad_k, grad_v;  // backward only
  float* lse;  // [batches, heads, rows]: x with exp(scale x) = the sum of exp(scale S) over the row
  const int64_t* bounds;
  int64_t documents, batches, heads, groups, size;
  float scale;
  bool half;  // bfloat16, else float
  int threads;
};

// Why this processor cannot run the kernels, or an empty string. Asks the kernel for the tile registers.
const char* attention_obstacle(bool half);

// Each returns false where memory for its working buffers was not to be had.
bool attention_forward(const Attention& call);
bool attention_backward(const Attention& call);

}  // namespace hammer
