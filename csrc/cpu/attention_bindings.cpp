// Python bindings of the attention kernels: they check the tensors (tensor.hpp) and release the GIL.
#include "attention_bindings.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <string>
#include <vector>

#include "attention.hpp"
#include "tensor.hpp"

namespace py = pybind11;

namespace {

using hammer::Argument;
using hammer::AttentionVersion;
using hammer::Tensor;
using Bounds = std::vector<int64_t>;

// Those that this machine can run in a type, the fastest first; asked once for each type, as AMX takes a system call.
std::vector<const AttentionVersion*> find_versions(bool half) {
  std::vector<const AttentionVersion*> found;
  for (const AttentionVersion* version : {
#ifdef HAMMER_X86
#ifdef __linux__
           &hammer::kAttentionAmx,
#endif
           &hammer::kAttentionAvx512Bf16, &hammer::kAttentionAvx512, &hammer::kAttentionAvx2,
#endif
           &hammer::kAttentionPortable}) {
    if (version->passes(half).forward != nullptr && version->runs_here()) found.push_back(version);
  }
  return found;
}

const std::vector<const AttentionVersion*>& versions(bool half) {
  static const std::vector<const AttentionVersion*> of_float = find_versions(false), of_bf16 = find_versions(true);
  return half ? of_bf16 : of_float;
}

void expect_bounds(const Bounds& bounds, const char* of, int64_t rows) {
  if (bounds.size() < 2 || bounds.front() != 0 || bounds.back() != rows ||
      !std::is_sorted(bounds.begin(), bounds.end())) {
    hammer::fail(std::string("the bounds of ") + of + " must rise from 0 to " + std::to_string(rows));
  }
}

// q, out and their gradients are [s, b, n, d], k, v and theirs [keys, b, g, d], each with a contiguous last dimension;
// lse is [b, n, s]. Document i has the rows [bounds[i], bounds[i + 1]), and its keys lie within `key_bounds` alike.
hammer::Attention describe(const AttentionVersion& version, const Bounds& bounds, const Bounds& key_bounds,
                           const Tensor& q, const Tensor& k, const Tensor& lse, std::initializer_list<Argument> as_q,
                           std::initializer_list<Argument> as_k) {
  q.expect_computable("q", 4);
  k.expect_computable("k", 4);
  const int64_t s = q.size(0), b = q.size(1), n = q.size(2), g = k.size(2), d = q.size(3);
  for (const auto& [name, tensor] : as_q) tensor.expect(name, q.type(), {s, b, n, d}, /*only_last=*/true);
  for (const auto& [name, tensor] : as_k) tensor.expect(name, q.type(), {k.size(0), b, g, d}, /*only_last=*/true);
  lse.expect("lse", hammer::Type::kFloat, {b, n, s});
  if (g < 1 || n % g) hammer::fail(std::to_string(n) + " heads do not divide into " + std::to_string(g) + " groups");
  expect_bounds(bounds, "documents", s);
  expect_bounds(key_bounds, "keys", k.size(0));
  if (bounds.size() != key_bounds.size()) hammer::fail("documents of queries and of keys are not the same number");
  for (size_t i = 1; i < bounds.size(); ++i) {
    if (bounds[i] - bounds[i - 1] > key_bounds[i] - key_bounds[i - 1]) {
      hammer::fail("document " + std::to_string(i - 1) + " has more queries than keys");
    }
  }
  hammer::Attention call{};
  call.lse = lse.data<float>();
  call.bounds = bounds.data();
  call.key_bounds = key_bounds.data();
  call.documents = static_cast<int64_t>(bounds.size()) - 1;
  call.batches = b;
  call.heads = n;
  call.groups = g;
  call.size = d;
  call.scale = static_cast<float>(std::pow(static_cast<double>(d), -0.5));
  call.half = q.type() == hammer::Type::kBf16;
  call.threads = hammer::threads();
  const auto& able = versions(call.half);
  if (std::find(able.begin(), able.end(), &version) == able.end()) {
    hammer::fail(std::string("attention by ") + version.name + " cannot run here in this type");
  }
  return call;
}

hammer::Strided strided(const Tensor& x) { return {x.data<void>(), x.stride(0), x.stride(1), x.stride(2)}; }

void run(bool (*pass)(const AttentionVersion&, const hammer::Attention&), const AttentionVersion& version,
         const hammer::Attention& call) {
  const py::gil_scoped_release release;
  if (!pass(version, call)) throw std::bad_alloc();
}

void forward(const AttentionVersion& version, const Bounds& bounds, const Bounds& key_bounds, const Tensor& q,
             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse) {
  hammer::Attention call =
      describe(version, bounds, key_bounds, q, k, lse, {{"q", q}, {"out", out}}, {{"k", k}, {"v", v}});
  call.q = strided(q);
  call.k = strided(k);
  call.v = strided(v);
  call.out = strided(out);
  run(hammer::attention_forward, version, call);
}

void backward(const AttentionVersion& version, const Bounds& bounds, const Bounds& key_bounds, const Tensor& q,
              const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& grad_out,
              const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  hammer::Attention call = describe(version, bounds, key_bounds, q, k, lse,
                                    {{"q", q}, {"out", out}, {"grad_out", grad_out}, {"grad_q", grad_q}},
                                    {{"k", k}, {"v", v}, {"grad_k", grad_k}, {"grad_v", grad_v}});
  call.q = strided(q);
  call.k = strided(k);
  call.v = strided(v);
  call.out = strided(out);
  call.grad_out = strided(grad_out);
  call.grad_q = strided(grad_q);
  call.grad_k = strided(grad_k);
  call.grad_v = strided(grad_v);
  run(hammer::attention_backward, version, call);
}

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<AttentionVersion>(module, "AttentionVersion")
      .def_property_readonly("name", [](const AttentionVersion& version) { return version.name; })
      .def("attention_forward", &forward)
      .def("attention_backward", &backward);
  module.def("attention_versions", &versions, py::return_value_policy::reference, py::arg("half"));
}
