// Python bindings of the fused operations. Tensors come as addresses, since this module is built without torch:
// megatron_hammer/kernels/native/cpu.py checks dtypes, sizes and layouts, and is the only caller. The GIL is released.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "attention_bindings.hpp"
#include "operations.hpp"

namespace py = pybind11;
using hammer::Bf16;
using hammer::Version;

namespace {

using Address = std::uintptr_t;  // 0: no tensor

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls work with a value of the type that half says: Bf16, else float.
template <class Work>
void with_type(bool half, Work work) {
  py::gil_scoped_release release;
  if (half) {
    work(Bf16{});
  } else {
    work(float{});
  }
}

// A block of memory as malloc gives it; kernels/native/cpu.py says why not an aligned one.
class Memory {
 public:
  explicit Memory(size_t size) : size_(size) {
#ifdef __GLIBC__
    // Backward ends with a heap that is mostly free. Handed back to the system, each page of it would cost a fault in
    // the next micro-batch. Larger blocks than 32 MiB glibc always asks the system for.
    static const bool kept = mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, -1);
    (void)kept;
#endif
    data_ = std::malloc(size);
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(size_)}; }

 private:
  void* data_;
  size_t size_;
};

void add_rms_norm_forward(const Version& version, int threads, bool half, int64_t rows, int64_t h, Address x,
                          Address branch, Address weight, float eps, Address normed, Address summed, Address rstd) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::add_rms_norm_forward(version, threads, rows, h, at<const T>(x), at<const T>(branch), at<const T>(weight),
                                 eps, at<T>(normed), at<T>(summed), at<float>(rstd));
  });
}

void add_rms_norm_backward(const Version& version, int threads, bool half, int64_t rows, int64_t h, Address grad_normed,
                           Address grad_summed, Address summed, Address weight, Address rstd, Address grad_x,
                           Address grad_weight) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::add_rms_norm_backward(version, threads, rows, h, at<const T>(grad_normed), at<const T>(grad_summed),
                                  at<const T>(summed), at<const T>(weight), at<const float>(rstd), at<T>(grad_x),
                                  at<T>(grad_weight));
  });
}

void rope_forward(const Version& version, int threads, bool half, int64_t s, int64_t b, int64_t heads, int64_t turned,
                  int64_t d, Address qkv, Address cos, Address sin) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::rope_forward(version, threads, s, b, heads, turned, d, at<T>(qkv), at<const T>(cos), at<const T>(sin));
  });
}

using Strided = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // data, strides of s, b and heads, heads

template <class T>
hammer::Heads<T> heads_of(const Strided& grad) {
  const auto [data, stride_s, stride_b, stride_head, count] = grad;
  return {at<const T>(data), stride_s, stride_b, stride_head, count};
}

void rope_backward(const Version& version, int threads, bool half, int64_t s, int64_t b, int64_t d, const Strided& q,
                   const Strided& k, const Strided& v, Address cos, Address sin, Address grad_qkv) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::rope_backward(version, threads, s, b, d, heads_of<T>(q), heads_of<T>(k), heads_of<T>(v), at<const T>(cos),
                          at<const T>(sin), at<T>(grad_qkv));
  });
}

void swiglu_forward(const Version& version, int threads, bool half, int64_t rows, int64_t f, Address gate_up,
                    Address product) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::swiglu_forward(version, threads, rows, f, at<const T>(gate_up), at<T>(product));
  });
}

void swiglu_backward(const Version& version, int threads, bool half, int64_t rows, int64_t f, Address grad,
                     Address gate_up, Address grad_gate_up) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::swiglu_backward(version, threads, rows, f, at<const T>(grad), at<const T>(gate_up), at<T>(grad_gate_up));
  });
}

void row_statistics(const Version& version, int threads, bool half, int64_t rows, int64_t stride, int64_t start,
                    int64_t valid, int64_t width, Address logits, Address labels, Address statistics) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::row_statistics(version, threads, rows, stride, {start, valid, width}, at<const T>(logits),
                           at<const int64_t>(labels), at<float>(statistics));
  });
}

void softmax_gradient(const Version& version, int threads, bool half, int64_t rows, int64_t stride, int64_t start,
                      int64_t valid, int64_t width, Address logits, Address labels, Address lse, Address loss,
                      Address weights, float z_loss) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::softmax_gradient(version, threads, rows, stride, {start, valid, width}, at<T>(logits),
                             at<const int64_t>(labels), at<const float>(lse), at<const float>(loss),
                             at<const float>(weights), z_loss);
  });
}

void loss_and_gradient(const Version& version, int threads, bool half, int64_t rows, int64_t stride, int64_t start,
                       int64_t valid, int64_t width, Address logits, Address labels, Address weights, float z_loss,
                       Address loss) {
  bool labels_are_columns = true;
  with_type(half, [&](auto type) {
    using T = decltype(type);
    labels_are_columns =
        hammer::loss_and_gradient(version, threads, rows, stride, {start, valid, width}, at<T>(logits),
                                  at<const int64_t>(labels), at<const float>(weights), z_loss, at<float>(loss));
  });
  if (!labels_are_columns) throw py::index_error("a label is not in the vocabulary");
}

void adamw(const Version& version, int threads, bool half, int64_t n, Address master, Address grad, Address exp_avg,
           Address exp_avg_sq, Address param, double lr, double beta1, double beta2, double eps, double decay,
           double divisor, double updates) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::adamw(version, threads, n, at<float>(master), at<const float>(grad), at<float>(exp_avg),
                  at<float>(exp_avg_sq), at<T>(param), lr, beta1, beta2, eps, decay, divisor, updates);
  });
}

double square_sum(const Version& version, int threads, int64_t n, Address values) {
  py::gil_scoped_release release;
  return hammer::square_sum(version, threads, n, at<const float>(values));
}

void accumulate(const Version& version, int threads, bool half, int64_t n, Address place, Address values, bool add) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    hammer::accumulate(version, threads, n, at<float>(place), at<const T>(values), add);
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
  module.attr("INTERFACE") = 3;  // kernels/native/cpu.py refuses a module of another number
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
