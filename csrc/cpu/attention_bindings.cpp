// Python bindings of the attention kernels: pointers and strides come from the Python side, which has checked them.
#include "attention_bindings.hpp"

#include <pybind11/stl.h>

#include <array>
#include <new>
#include <vector>

#include "attention.hpp"

namespace py = pybind11;

namespace {

using Tensor = std::array<int64_t, 4>;  // address, strides of rows, batches and heads

hammer::Strided strided(const Tensor& x) { return {reinterpret_cast<void*>(x[0]), x[1], x[2], x[3]}; }

// bounds, [batches, heads, groups, size], scale, bfloat16, threads, address of lse, tensors in the order of
// `Attention`.
void call(bool (*pass)(const hammer::Attention&), const std::vector<int64_t>& bounds, const Tensor& sizes, float scale,
          bool half, int threads, int64_t lse, const std::vector<Tensor>& tensors) {
  hammer::Attention attention{};
  hammer::Strided* const slots[] = {&attention.q,        &attention.k,      &attention.v,      &attention.out,
                                    &attention.grad_out, &attention.grad_q, &attention.grad_k, &attention.grad_v};
  if (tensors.size() > 8) throw py::value_error("too many tensors");
  for (size_t i = 0; i < tensors.size(); ++i) *slots[i] = strided(tensors[i]);
  attention.lse = reinterpret_cast<float*>(lse);
  attention.bounds = bounds.data();
  attention.documents = static_cast<int64_t>(bounds.size()) - 1;
  attention.batches = sizes[0];
  attention.heads = sizes[1];
  attention.groups = sizes[2];
  attention.size = sizes[3];
  attention.scale = scale;
  attention.half = half;
  attention.threads = threads;
  const py::gil_scoped_release release;
  if (!pass(attention)) throw std::bad_alloc();
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_obstacle", &hammer::attention_obstacle, py::arg("half"));
  module.def("attention_forward", [](const std::vector<int64_t>& bounds, const Tensor& sizes, float scale, bool half,
                                     int threads, int64_t lse, const std::vector<Tensor>& tensors) {
    call(hammer::attention_forward, bounds, sizes, scale, half, threads, lse, tensors);
  });
  module.def("attention_backward", [](const std::vector<int64_t>& bounds, const Tensor& sizes, float scale, bool half,
                                      int threads, int64_t lse, const std::vector<Tensor>& tensors) {
    call(hammer::attention_backward, bounds, sizes, scale, half, threads, lse, tensors);
  });
}
