// Causal attention with query groups on a CPU, forward and backward; attention.inl says how.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace hammer {

// A tensor [rows, batches, heads, size] of floats or bfloat16: its strides in elements, that of the last dimension
// is 1.
struct Strided {
  void* data;
  int64_t row, batch, head;
};

// One call: the same documents lie in each batch. Document i has the rows [bounds[i], bounds[i + 1]) of q and the rows
// [key_bounds[i], key_bounds[i + 1]) of k and v. Where it has fewer queries than keys, its queries are the end of its
// keys: the last of both stand at the same place of the document.
struct Attention {
  Strided q, k, v, out;                      // k and v have `groups` heads, the others `heads`
  Strided grad_out, grad_q, grad_k, grad_v;  // backward only
  float* lse;  // [batches, heads, rows]: x with exp(scale x) = the sum of exp(scale S) over the row
  const int64_t *bounds, *key_bounds;
  int64_t documents, batches, heads, groups, size;
  float scale;
  bool half;  // bfloat16, else float
  int threads;
};

// The rows of one document in one batch, and one query group: what a thread takes at a time.
struct Unit {
  int64_t first, rows;      // queries
  int64_t key_first, keys;  // at least as many as queries
  int64_t batch, group;

  // At which key the first query stands.
  int64_t offset() const { return keys - rows; }
};

using Pass = void (*)(const Attention& call, const Unit& unit, char* memory);

// Both passes over a unit for one type of tensor, and the bytes of working memory that each needs for a document of so
// many keys and heads of a size. A version that cannot compute in a type has none.
struct Passes {
  int64_t (*forward_bytes)(int64_t keys, int64_t size);
  Pass forward;
  int64_t (*backward_bytes)(int64_t keys, int64_t size);
  Pass backward;
};

// The passes of one instruction set.
struct AttentionVersion {
  const char* name;
  bool (*runs_here)();
  Passes fp32, bf16;

  const Passes& passes(bool half) const { return half ? bf16 : fp32; }
};

extern const AttentionVersion kAttentionPortable;
#ifdef HAMMER_X86
extern const AttentionVersion kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Bf16;
#ifdef __linux__
extern const AttentionVersion kAttentionAmx;
#endif
#endif

// Each returns false where memory for its working buffers was not to be had.
bool attention_forward(const AttentionVersion& version, const Attention& call);
bool attention_backward(const AttentionVersion& version, const Attention& call);

}  // namespace hammer
