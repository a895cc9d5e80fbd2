// Divides attention into units, which the passes of attention.inl compute, over threads.
#include "attention.hpp"

#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hammer {
namespace {

constexpr int64_t kPage = 4096;

// No unit's result depends on another's, so none depends on the number of threads.
bool run(const Attention& call, int64_t (*bytes)(int64_t, int64_t), Pass pass) {
  int64_t longest = 0;
  for (int64_t i = 0; i < call.documents; ++i) {
    const int64_t keys = call.key_bounds[i + 1] - call.key_bounds[i];
    if (keys > longest) longest = keys;
  }
  const int64_t units = call.documents * call.batches * call.groups;
  const int threads = static_cast<int>(units < call.threads ? units : call.threads);
  const int64_t each = (bytes(longest, call.size) + kPage - 1) / kPage * kPage;  // no two threads write to one page
  char* const memory = static_cast<char*>(aligned_alloc(kPage, static_cast<size_t>(each * threads)));
  if (memory == nullptr) return false;
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    char* const own = memory + each * omp_get_thread_num();
#else
    char* const own = memory;
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; ++i) {
      const int64_t document = i / (call.batches * call.groups);
      const int64_t first = call.bounds[document], key_first = call.key_bounds[document];
      const int64_t rows = call.bounds[document + 1] - first, keys = call.key_bounds[document + 1] - key_first;
      pass(call, Unit{first, rows, key_first, keys, i / call.groups % call.batches, i % call.groups}, own);
    }
  }
  free(memory);
  return true;
}

}  // namespace

bool attention_forward(const AttentionVersion& version, const Attention& call) {
  const Passes& passes = version.passes(call.half);
  return run(call, passes.forward_bytes, passes.forward);
}

bool attention_backward(const AttentionVersion& version, const Attention& call) {
  const Passes& passes = version.passes(call.half);
  return run(call, passes.backward_bytes, passes.backward);
}

}  // namespace hammer
