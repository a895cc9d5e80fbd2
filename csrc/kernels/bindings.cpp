// The operations torch.ops.hammer_cuda.*: checks their arguments, and calls the launchers in kernels.hpp on the current
// stream of the tensors' device.
//
// On torch's stable C++ ABI (torch/csrc/stable) as of torch 2.11, so that one build serves later versions. Outputs are
// written into tensors that the caller made; nothing here waits for the device. Tensors are contiguous unless a stride
// is said to be free, and outputs overlap no other argument. An optional amax receives max |output| as an fp32 scalar.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

#ifndef HAMMER_LIBRARY  // the test's build for a CPU has names of its own
#define HAMMER_LIBRARY hammer_cuda
#define HAMMER_DISPATCH CUDA
#endif

namespace {

using hammer::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxSmall = 2147483647;  // what the kernels count in 32 bits, and the grid's first dimension
constexpr int64_t kMaxGridY = 65535;

bool is_activation(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::fp32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::fp16;
    case ScalarType::Float8_e4m3fn: return Type::e4m3;
    default: return Type::e5m2;
  }
}

// The checks of one call: every tensor lies on the device of the first, which becomes the current one.
class Call {
 public:
  Call(const char* operation, const Tensor& first)
      : operation_(operation), first_(first), guard_(first.get_device_index()) {}

  // `name` and `rule` make the message: nothing is put together unless it is needed.
  void require(bool holds, const char* name, const char* rule) const {
    if (!holds) refuse(std::string(name) + " " + rule);
  }

  // Of this many elements on the device of the first.
  void place(const Tensor& tensor, const char* name, int64_t elements) const {
    require(tensor.device() == first_.device(), name, "must be on the device of the other tensors");
    if (tensor.numel() == elements) return;
    refuse(std::string(name) + " must have " + std::to_string(elements) + " elements, not " +
           std::to_string(tensor.numel()));
  }

  // Contiguous, of this type and number of elements.
  void dense(const Tensor& tensor, const char* name, ScalarType type, int64_t elements) const {
    place(tensor, name, elements);
    require(tensor.is_contiguous(), name, "must be contiguous");
    if (tensor.scalar_type() == type) return;
    refuse(std::string(name) + " must be " + torch::headeronly::toString(type) + ", not " +
           torch::headeronly::toString(tensor.scalar_type()));
  }

  // Rows of `width` elements, of activations.
  int64_t rows(const Tensor& tensor, const char* name, int64_t width) const {
    require(is_activation(tensor.scalar_type()), name, "must be float32, bfloat16 or float16");
    if (tensor.dim() > 0 && width > 0 && tensor.size(tensor.dim() - 1) == width) return tensor.numel() / width;
    refuse(std::string(name) + " must have rows of " + std::to_string(width) + " elements");
  }

  void* optional_dense(const std::optional<Tensor>& tensor, const char* name, ScalarType type, int64_t elements) const {
    if (!tensor.has_value()) return nullptr;
    dense(*tensor, name, type, elements);
    return tensor->data_ptr();
  }

  float* scalar(const Tensor& tensor, const char* name) const {
    dense(tensor, name, ScalarType::Float, 1);
    return static_cast<float*>(tensor.data_ptr());
  }

  float* optional_scalar(const std::optional<Tensor>& tensor, const char* name) const {
    return tensor.has_value() ? scalar(*tensor, name) : nullptr;
  }

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first_.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  // Uninitialised fp32 memory for what blocks leave for each other; freed in stream order.
  Tensor workspace(int64_t elements) const { return torch::stable::new_empty(first_, {elements}, ScalarType::Float); }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::invalid_argument(std::string("hammer_cuda.") + operation_ + ": " + what);
  }

  const char* operation_;
  const Tensor& first_;
  torch::stable::accelerator::DeviceGuard guard_;
};

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// x [.., h], branch, weight [h] -> normed, summed (with branch only), rstd [rows] fp32.
void add_rms_norm_forward(const Tensor& x, const std::optional<Tensor>& branch, const Tensor& weight, double eps,
                          const Tensor& normed, const std::optional<Tensor>& summed, const Tensor& rstd,
                          const std::optional<Tensor>& amax) {
  const Call call("add_rms_norm_forward", x);
  const int64_t h = weight.numel(), rows = call.rows(x, "x", h);
  const ScalarType type = x.scalar_type();
  call.dense(x, "x", type, rows * h);
  call.dense(weight, "weight", type, h);
  call.dense(normed, "normed", type, rows * h);
  call.dense(rstd, "rstd", ScalarType::Float, rows);
  call.require(branch.has_value() == summed.has_value(), "summed",
               "is written where there is a branch, and only there");
  const void* added = call.optional_dense(branch, "branch", type, rows * h);
  void* sums = call.optional_dense(summed, "summed", type, rows * h);
  hammer::rms_norm_forward(type_of(x), x.data_ptr(), added, weight.data_ptr(), static_cast<float>(eps), rows, h,
                           normed.data_ptr(), sums, floats(rstd), call.optional_scalar(amax, "amax"), call.stream());
}

void add_rms_norm_backward(const Tensor& grad_normed, const std::optional<Tensor>& grad_summed, const Tensor& summed,
                           const Tensor& weight, const Tensor& rstd, const Tensor& grad_x, const Tensor& grad_weight) {
  const Call call("add_rms_norm_backward", grad_normed);
  const int64_t h = weight.numel(), rows = call.rows(grad_normed, "grad_normed", h);
  const ScalarType type = grad_normed.scalar_type();
  call.dense(grad_normed, "grad_normed", type, rows * h);
  call.dense(summed, "summed", type, rows * h);
  call.dense(weight, "weight", type, h);
  call.dense(rstd, "rstd", ScalarType::Float, rows);
  call.dense(grad_x, "grad_x", type, rows * h);
  call.dense(grad_weight, "grad_weight", type, h);
  const void* through = call.optional_dense(grad_summed, "grad_summed", type, rows * h);
  const int64_t blocks = hammer::rms_norm_backward_blocks(type_of(grad_normed), rows, h);
  const Tensor partial = call.workspace(blocks * h);
  hammer::rms_norm_backward(type_of(grad_normed), grad_normed.data_ptr(), through, summed.data_ptr(), weight.data_ptr(),
                            floats(rstd), rows, h, floats(partial), blocks, grad_x.data_ptr(), grad_weight.data_ptr(),
                            call.stream());
}

// Sizes that the kernels of RoPE can count; cos and sin [s, half] in qkv's type.
void check_rope(const Call& call, const Tensor& qkv, const char* name, const Tensor& cos, const Tensor& sin) {
  call.require(qkv.dim() == 4 && qkv.size(3) % 2 == 0, name, "must be [s, b, heads, d] with an even d");
  call.require(is_activation(qkv.scalar_type()), name, "must be float32, bfloat16 or float16");
  call.require(qkv.size(0) <= kMaxSmall && qkv.size(1) <= kMaxGridY && qkv.size(2) * qkv.size(3) <= kMaxSmall, name,
               "may have 2^31 - 1 positions, 65535 samples and 2^31 - 1 elements a row");
  call.dense(qkv, name, qkv.scalar_type(), qkv.numel());
  call.dense(cos, "cos", qkv.scalar_type(), qkv.size(0) * qkv.size(3) / 2);
  call.dense(sin, "sin", qkv.scalar_type(), qkv.size(0) * qkv.size(3) / 2);
}

// The first `turned` heads of qkv [s, b, heads, d] in place.
void rope_forward(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t turned) {
  const Call call("rope_forward", qkv);
  check_rope(call, qkv, "qkv", cos, sin);
  call.require(turned >= 0 && turned <= qkv.size(2), "turned", "must be between 0 and the number of heads");
  hammer::rope_forward(type_of(qkv), qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), qkv.size(0), qkv.size(1),
                       qkv.size(2), turned, qkv.size(3) / 2, call.stream());
}

// grad_q [s, b, n, d], grad_k and grad_v [s, b, g, d], whose strides but the last are free -> grad_qkv [s, b, n + 2g,
// d].
void rope_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& cos,
                   const Tensor& sin, const Tensor& grad_qkv) {
  const Call call("rope_backward", grad_qkv);
  check_rope(call, grad_qkv, "grad_qkv", cos, sin);
  const auto heads = [&](const Tensor& grad, const char* name) {
    call.require(grad.dim() == 4, name, "must be [s, b, heads, d]");
    call.place(grad, name, grad_qkv.size(0) * grad_qkv.size(1) * grad.size(2) * grad_qkv.size(3));
    call.require(
        grad.size(0) == grad_qkv.size(0) && grad.size(1) == grad_qkv.size(1) && grad.size(3) == grad_qkv.size(3), name,
        "must be [s, b, heads, d] with the s, b and d of grad_qkv");
    call.require(grad.scalar_type() == grad_qkv.scalar_type(), name, "must have grad_qkv's type");
    call.require(grad.size(3) <= 1 || grad.stride(3) == 1, name, "must be contiguous in d");
    return hammer::Heads{grad.data_ptr(), grad.stride(0), grad.stride(1), grad.stride(2), grad.size(2)};
  };
  const hammer::Heads q = heads(grad_q, "grad_q"), k = heads(grad_k, "grad_k"), v = heads(grad_v, "grad_v");
  call.require(q.count + k.count + v.count == grad_qkv.size(2), "grad_qkv",
               "must have the heads of the three gradients");
  hammer::rope_backward(type_of(grad_qkv), q, k, v, cos.data_ptr(), sin.data_ptr(), grad_qkv.size(0), grad_qkv.size(1),
                        grad_qkv.size(3) / 2, grad_qkv.data_ptr(), call.stream());
}

// gate_up [.., 2f] -> product [.., f].
void swiglu_forward(const Tensor& gate_up, const Tensor& product, const std::optional<Tensor>& amax) {
  const Call call("swiglu_forward", gate_up);
  call.require(product.dim() > 0, "product", "must have rows");
  const int64_t f = product.size(product.dim() - 1), rows = call.rows(gate_up, "gate_up", 2 * f);
  call.dense(gate_up, "gate_up", gate_up.scalar_type(), rows * 2 * f);
  call.dense(product, "product", gate_up.scalar_type(), rows * f);
  hammer::swiglu_forward(type_of(gate_up), gate_up.data_ptr(), rows, f, product.data_ptr(),
                         call.optional_scalar(amax, "amax"), call.stream());
}

void swiglu_backward(const Tensor& grad, const Tensor& gate_up, const Tensor& grad_gate_up) {
  const Call call("swiglu_backward", gate_up);
  call.require(grad.dim() > 0, "grad", "must have rows");
  const int64_t f = grad.size(grad.dim() - 1), rows = call.rows(gate_up, "gate_up", 2 * f);
  call.dense(grad, "grad", gate_up.scalar_type(), rows * f);
  call.dense(gate_up, "gate_up", gate_up.scalar_type(), rows * 2 * f);
  call.dense(grad_gate_up, "grad_gate_up", gate_up.scalar_type(), rows * 2 * f);
  hammer::swiglu_backward(type_of(gate_up), grad.data_ptr(), gate_up.data_ptr(), rows, f, grad_gate_up.data_ptr(),
                          call.stream());
}

// Flat tensors of equal length; param bf16 or fp16; divisor, skip, updates fp32 scalars.
void adamw(const Tensor& master, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const std::optional<Tensor>& param, double lr, double beta1, double beta2, double eps, double decay,
           const Tensor& divisor, const Tensor& skip, const Tensor& updates) {
  const Call call("adamw", master);
  const int64_t n = master.numel();
  call.dense(master, "master", ScalarType::Float, n);
  call.dense(grad, "grad", ScalarType::Float, n);
  call.dense(exp_avg, "exp_avg", ScalarType::Float, n);
  call.dense(exp_avg_sq, "exp_avg_sq", ScalarType::Float, n);
  Type type = Type::bf16;
  void* copy = nullptr;
  if (param.has_value()) {
    type = type_of(*param);
    call.require(type == Type::bf16 || type == Type::fp16, "param", "must be bfloat16 or float16");
    copy = call.optional_dense(param, "param", param->scalar_type(), n);
  }
  const hammer::AdamW arguments{floats(master),
                                floats(grad),
                                floats(exp_avg),
                                floats(exp_avg_sq),
                                copy,
                                lr,
                                beta1,
                                beta2,
                                eps,
                                decay,
                                call.scalar(divisor, "divisor"),
                                call.scalar(skip, "skip"),
                                call.scalar(updates, "updates")};
  hammer::adamw(type, arguments, n, call.stream());
}

void add_square_sum(const Tensor& part, const Tensor& out) {
  const Call call("add_square_sum", part);
  call.dense(part, "part", ScalarType::Float, part.numel());
  const Tensor partial = call.workspace(hammer::square_sum_blocks(part.numel()));
  hammer::add_square_sum(floats(part), part.numel(), floats(partial), call.scalar(out, "out"), call.stream());
}

void amax(const Tensor& x, const Tensor& out) {
  const Call call("amax", x);
  call.require(is_activation(x.scalar_type()), "x", "must be float32, bfloat16 or float16");
  call.dense(x, "x", x.scalar_type(), x.numel());
  hammer::amax(type_of(x), x.data_ptr(), x.numel(), call.scalar(out, "out"), call.stream());
}

// x [.., c] -> out = saturated(x scale), in x's shape, and its transpose [c, rows].
void cast_fp8(const Tensor& x, const Tensor& scale, const Tensor& out, const std::optional<Tensor>& transposed) {
  const Call call("cast_fp8", x);
  call.require(x.dim() > 0, "x", "must have rows");
  const int64_t columns = x.size(x.dim() - 1), rows = call.rows(x, "x", columns);
  const ScalarType type = out.scalar_type();
  call.require(type == ScalarType::Float8_e4m3fn || type == ScalarType::Float8_e5m2, "out",
               "must be float8_e4m3fn or float8_e5m2");
  call.require(rows <= kMaxGridY * 128, "x", "may have 8388480 rows");  // tiles of 128
  call.dense(x, "x", x.scalar_type(), rows * columns);
  call.dense(out, "out", type, rows * columns);
  void* turned = call.optional_dense(transposed, "transposed", type, rows * columns);
  hammer::cast_fp8(type_of(x), type_of(out), x.data_ptr(), call.scalar(scale, "scale"), rows, columns, out.data_ptr(),
                   turned, call.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY(HAMMER_LIBRARY, library) {
  library.def(
      "add_rms_norm_forward(Tensor x, Tensor? branch, Tensor weight, float eps, Tensor(a!) normed, "
      "Tensor(b!)? summed, Tensor(c!) rstd, Tensor(d!)? amax=None) -> ()");
  library.def(
      "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor weight, Tensor rstd, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight) -> ()");
  library.def("rope_forward(Tensor(a!) qkv, Tensor cos, Tensor sin, int turned) -> ()");
  library.def(
      "rope_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, Tensor(a!) grad_qkv) -> ()");
  library.def("swiglu_forward(Tensor gate_up, Tensor(a!) product, Tensor(b!)? amax=None) -> ()");
  library.def("swiglu_backward(Tensor grad, Tensor gate_up, Tensor(a!) grad_gate_up) -> ()");
  library.def(
      "adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? param, float lr, "
      "float beta1, float beta2, float eps, float decay, Tensor divisor, Tensor skip, Tensor updates) -> ()");
  library.def("add_square_sum(Tensor part, Tensor(a!) out) -> ()");
  library.def("amax(Tensor x, Tensor(a!) out) -> ()");
  library.def("cast_fp8(Tensor x, Tensor scale, Tensor(a!) out, Tensor(b!)? transposed=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(HAMMER_LIBRARY, HAMMER_DISPATCH, library) {
  library.impl("add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward));
  library.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  library.impl("rope_forward", TORCH_BOX(&rope_forward));
  library.impl("rope_backward", TORCH_BOX(&rope_backward));
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  library.impl("adamw", TORCH_BOX(&adamw));
  library.impl("add_square_sum", TORCH_BOX(&add_square_sum));
  library.impl("amax", TORCH_BOX(&amax));
  library.impl("cast_fp8", TORCH_BOX(&cast_fp8));
}
