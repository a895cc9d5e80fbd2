// Python bindings of the fused operations: they check types, shapes and layouts of the tensors (tensor.hpp) and release
// the GIL. Results are written into tensors that the caller has made.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "arena.hpp"
#include "attention_bindings.hpp"
#include "operations.hpp"
#include "tensor.hpp"

namespace py = pybind11;
using hammer::Bf16;
using hammer::Version;

namespace {

using hammer::Argument;
using hammer::expect;
using hammer::Tensor;
using hammer::Type;

// Calls work(threads, T{}) for the type T in memory, Bf16 or float, without the GIL.
template <class Work>
void compute(Type type, Work work) {
  const int threads = hammer::threads();
  py::gil_scoped_release release;
  if (type == Type::kBf16) {
    work(threads, Bf16{});
  } else {
    work(threads, float{});
  }
}

// A block of memory for a tensor.
class Memory {
 public:
  explicit Memory(size_t size) : data_(arena().take(size)), size_(size) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { arena().give(data_, size_); }

  py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(size_)}; }

 private:
  // Never destroyed: tensors may outlive the module.
  static hammer::Arena& arena() {
    static hammer::Arena& arena = *new hammer::Arena;
    return arena;
  }

  void* data_;
  size_t size_;
};

void add_rms_norm_forward(const Version& version, const Tensor& x, const Tensor& branch, const Tensor& weight,
                          float eps, const Tensor& normed, const Tensor& summed, const Tensor& rstd) {
  x.expect_computable("x", 2);
  const int64_t rows = x.size(0), h = x.size(1);
  if (branch.is_none() != summed.is_none()) hammer::fail("the sum is written where there is a branch, and only there");
  expect(x.type(), {rows, h}, {{"x", x}, {"normed", normed}});
  if (!branch.is_none()) expect(x.type(), {rows, h}, {{"branch", branch}, {"summed", summed}});
  weight.expect("weight", x.type(), {h});
  rstd.expect("rstd", Type::kFloat, {rows});
  compute(x.type(), [&](int threads, auto type) {
    using T = decltype(type);
    hammer::add_rms_norm_forward(version, threads, rows, h, x.data<const T>(), branch.data<const T>(),
                                 weight.data<const T>(), eps, normed.data<T>(), summed.data<T>(), rstd.data<float>());
  });
}

void add_rms_norm_backward(const Version& version, const Tensor& grad_normed, const Tensor& grad_summed,
                           const Tensor& summed, const Tensor& weight, const Tensor& rstd, const Tensor& grad_x,
                           const Tensor& grad_weight) {
  summed.expect_computable("summed", 2);
  const int64_t rows = summed.size(0), h = summed.size(1);
  expect(summed.type(), {rows, h}, {{"grad_normed", grad_normed}, {"summed", summed}, {"grad_x", grad_x}});
  if (!grad_summed.is_none()) grad_summed.expect("grad_summed", summed.type(), {rows, h});
  expect(summed.type(), {h}, {{"weight", weight}, {"grad_weight", grad_weight}});
  rstd.expect("rstd", Type::kFloat, {rows});
  compute(summed.type(), [&](int threads, auto type) {
    using T = decltype(type);
    hammer::add_rms_norm_backward(version, threads, rows, h, grad_normed.data<const T>(), grad_summed.data<const T>(),
                                  summed.data<const T>(), weight.data<const T>(), rstd.data<const float>(),
                                  grad_x.data<T>(), grad_weight.data<T>());
  });
}

// qkv [s, b, heads, d], of which the first `turned` heads are rotated in place; cos, sin [s, d/2].
void rope_forward(const Version& version, const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t turned) {
  qkv.expect_computable("qkv", 4);
  const int64_t s = qkv.size(0), b = qkv.size(1), heads = qkv.size(2), d = qkv.size(3);
  if (turned < 0 || turned > heads || d % 2) {
    hammer::fail(std::to_string(turned) + " of " + std::to_string(heads) + " heads of " + std::to_string(d) +
                 " cannot be turned");
  }
  qkv.expect("qkv", qkv.type(), {s, b, heads, d});
  expect(qkv.type(), {s, d / 2}, {{"cos", cos}, {"sin", sin}});
  compute(qkv.type(), [&](int threads, auto type) {
    using T = decltype(type);
    hammer::rope_forward(version, threads, s, b, heads, turned, d, qkv.data<T>(), cos.data<const T>(),
                         sin.data<const T>());
  });
}

template <class T>
hammer::Heads<T> heads_of(const Tensor& grad) {
  return {grad.data<const T>(), grad.stride(0), grad.stride(1), grad.stride(2), grad.size(2)};
}

// grad_qkv [s, b, n + 2g, d] from the gradients of q, k and v, [s, b, n or g, d].
void rope_backward(const Version& version, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                   const Tensor& cos, const Tensor& sin, const Tensor& grad_qkv) {
  grad_qkv.expect_computable("grad_qkv", 4);
  const int64_t s = grad_qkv.size(0), b = grad_qkv.size(1), heads = grad_qkv.size(2), d = grad_qkv.size(3);
  int64_t found = 0;
  for (const auto& [name, grad] :
       {Argument{"grad_q", grad_q}, Argument{"grad_k", grad_k}, Argument{"grad_v", grad_v}}) {
    grad.expect_computable(name, 4);
    grad.expect(name, grad_qkv.type(), {s, b, grad.size(2), d}, /*only_last=*/true);
    found += grad.size(2);
  }
  if (d % 2 || found != heads) {
    hammer::fail(std::to_string(heads) + " heads of " + std::to_string(d) + " are not those of q, k and v");
  }
  grad_qkv.expect("grad_qkv", grad_qkv.type(), {s, b, heads, d});
  expect(grad_qkv.type(), {s, d / 2}, {{"cos", cos}, {"sin", sin}});
  compute(grad_qkv.type(), [&](int threads, auto type) {
    using T = decltype(type);
    hammer::rope_backward(version, threads, s, b, d, heads_of<T>(grad_q), heads_of<T>(grad_k), heads_of<T>(grad_v),
                          cos.data<const T>(), sin.data<const T>(), grad_qkv.data<T>());
  });
}

void swiglu_forward(const Version& version, const Tensor& gate_up, const Tensor& product) {
  product.expect_computable("product", 2);
  const int64_t rows = product.size(0), f = product.size(1);
  gate_up.expect("gate_up", product.type(), {rows, 2 * f});
  product.expect("product", product.type(), {rows, f});
  compute(product.type(), [&](int threads, auto type) {
    using T = decltype(type);
    hammer::swiglu_forward(version, threads, rows, f, gate_up.data<const T>(), product.data<T>());
  });
}

void swiglu_backward(const Version& version, const Tensor& grad, const Tensor& gate_up, const Tensor& grad_gate_up) {
  grad.expect_computable("grad", 2);
  const int64_t rows = grad.size(0), f = grad.size(1);
  grad.expect("grad", grad.type(), {rows, f});
  expect(grad.type(), {rows, 2 * f}, {{"gate_up", gate_up}, {"grad_gate_up", grad_gate_up}});
  compute(grad.type(), [&](int threads, auto type) {
    using T = decltype(type);
    hammer::swiglu_backward(version, threads, rows, f, grad.data<const T>(), gate_up.data<const T>(),
                            grad_gate_up.data<T>());
  });
}

// Logits [n, width], of which a row is contiguous, and what the loss functions take beside them: labels [n] and the
// columns, from `start` on and `valid` of them, that they are of the vocabulary.
struct Logits {
  Logits(const Tensor& logits, const Tensor& labels, int64_t start, int64_t valid) : tensor(logits) {
    logits.expect_computable("logits", 2);
    rows = logits.size(0);
    columns = {start, valid, logits.size(1)};
    logits.expect("logits", logits.type(), logits.shape(), /*only_last=*/true);
    labels.expect("labels", Type::kInt64, {rows});
    if (valid < 0 || valid > columns.width) {
      hammer::fail(std::to_string(valid) + " of " + std::to_string(columns.width) + " columns cannot be valid");
    }
    stride = logits.stride(0);
    label_data = labels.data<const int64_t>();
  }

  const Tensor& tensor;
  int64_t rows, stride;
  hammer::Columns columns;
  const int64_t* label_data;
};

// statistics [3, n]: largest logit, sum of exp(z - largest), logit of the label or 0.
void row_statistics(const Version& version, const Tensor& logits, const Tensor& labels, int64_t start, int64_t valid,
                    const Tensor& statistics) {
  const Logits chunk(logits, labels, start, valid);
  statistics.expect("statistics", Type::kFloat, {3, chunk.rows});
  compute(logits.type(), [&](int threads, auto type) {
    hammer::row_statistics(version, threads, chunk.rows, chunk.stride, chunk.columns,
                           logits.data<const decltype(type)>(), chunk.label_data, statistics.data<float>());
  });
}

void softmax_gradient(const Version& version, const Tensor& logits, const Tensor& labels, int64_t start, int64_t valid,
                      const Tensor& lse, const Tensor& loss, const Tensor& weights, float z_loss) {
  const Logits chunk(logits, labels, start, valid);
  expect(Type::kFloat, {chunk.rows}, {{"lse", lse}, {"loss", loss}, {"weights", weights}});
  compute(logits.type(), [&](int threads, auto type) {
    hammer::softmax_gradient(version, threads, chunk.rows, chunk.stride, chunk.columns, logits.data<decltype(type)>(),
                             chunk.label_data, lse.data<const float>(), loss.data<const float>(),
                             weights.data<const float>(), z_loss);
  });
}

void loss_and_gradient(const Version& version, const Tensor& logits, const Tensor& labels, int64_t start, int64_t valid,
                       const Tensor& weights, float z_loss, const Tensor& loss) {
  const Logits chunk(logits, labels, start, valid);
  expect(Type::kFloat, {chunk.rows}, {{"weights", weights}, {"loss", loss}});
  bool labels_are_columns = true;
  compute(logits.type(), [&](int threads, auto type) {
    labels_are_columns = hammer::loss_and_gradient(version, threads, chunk.rows, chunk.stride, chunk.columns,
                                                   logits.data<decltype(type)>(), chunk.label_data,
                                                   weights.data<const float>(), z_loss, loss.data<float>());
  });
  if (!labels_are_columns) throw py::index_error("a label is not in the vocabulary");
}

void adamw(const Version& version, const Tensor& master, const Tensor& grad, const Tensor& exp_avg,
           const Tensor& exp_avg_sq, const Tensor& param, double lr, double beta1, double beta2, double eps,
           double decay, double divisor, double updates) {
  const auto& shape = master.shape();
  expect(Type::kFloat, shape, {{"master", master}, {"grad", grad}, {"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}});
  if (!param.is_none()) {
    param.expect_computable("param", shape.size());
    param.expect("param", param.type(), shape);
  }
  compute(param.is_none() ? Type::kFloat : param.type(), [&](int threads, auto type) {
    hammer::adamw(version, threads, master.elements(), master.data<float>(), grad.data<const float>(),
                  exp_avg.data<float>(), exp_avg_sq.data<float>(), param.data<decltype(type)>(), lr, beta1, beta2, eps,
                  decay, divisor, updates);
  });
}

// The sum of squares, in fp32 within blocks of a fixed size and in fp64 over them.
double square_sum(const Version& version, const Tensor& values) {
  values.expect("values", Type::kFloat, values.shape());
  double sum = 0;
  compute(Type::kFloat, [&](int threads, auto) {
    sum = hammer::square_sum(version, threads, values.elements(), values.data<const float>());
  });
  return sum;
}

// place, fp32, = values, or += with `add`; without a widened copy of values.
void accumulate(const Version& version, const Tensor& place, const Tensor& values, bool add) {
  values.expect_computable("values", place.shape().size());
  place.expect("place", Type::kFloat, values.shape());
  values.expect("values", values.type(), place.shape());
  compute(values.type(), [&](int threads, auto type) {
    hammer::accumulate(version, threads, values.elements(), place.data<float>(), values.data<const decltype(type)>(),
                       add);
  });
}

// Those that this machine can run, the fastest first.
std::vector<const Version*> versions() {
  std::vector<const Version*> found;
#ifdef HAMMER_X86
  for (const Version* version : {&hammer::kAvx512Bf16, &hammer::kAvx512, &hammer::kAvx2}) {
    if (version->runs_here()) found.push_back(version);
  }
#endif
  found.push_back(&hammer::kPortable);
  return found;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Compiled half of megatron_hammer.kernels.native.cpu; csrc/cpu/kernels.hpp documents the functions.";
  module.attr("INTERFACE") = 7;  // kernels/native/cpu.py refuses a module of another number
  py::class_<Memory>(module, "Memory", py::buffer_protocol()).def(py::init<size_t>()).def_buffer(&Memory::buffer);
  py::class_<Version>(module, "Version")
      .def_property_readonly("name", [](const Version& version) { return version.name; })
      .def("add_rms_norm_forward", &add_rms_norm_forward)
      .def("add_rms_norm_backward", &add_rms_norm_backward)
      .def("rope_forward", &rope_forward)
      .def("rope_backward", &rope_backward)
      .def("swiglu_forward", &swiglu_forward)
      .def("swiglu_backward", &swiglu_backward)
      .def("row_statistics", &row_statistics)
      .def("softmax_gradient", &softmax_gradient)
      .def("loss_and_gradient", &loss_and_gradient)
      .def("adamw", &adamw)
      .def("square_sum", &square_sum)
      .def("accumulate", &accumulate);
  module.def("versions", &versions, py::return_value_policy::reference);
  bind_attention(module);
}
