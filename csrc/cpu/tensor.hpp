// A torch.Tensor as the bindings see it, read through its Python attributes: this module is built without torch.
//
// The compiled code reads raw memory, so the bindings check every tensor first, with the functions below. A wrong one
// is a fault of this package: an AssertionError that names the argument, what it should be and what it is.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace hammer {

namespace py = pybind11;

enum class Type { kFloat, kBf16, kInt64, kOther };

[[noreturn]] inline void fail(const std::string& message) {
  PyErr_SetString(PyExc_AssertionError, message.c_str());
  throw py::error_already_set();
}

// What this module asks of torch and of its tensors; looked up once.
struct [[gnu::visibility("hidden")]] Torch {
  py::object float32, bfloat16, int64, get_num_threads;
  py::str dtype{"dtype"}, shape{"shape"}, stride{"stride"}, is_cpu{"is_cpu"}, data_ptr{"data_ptr"};

  static const Torch& get() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> stored;
    return stored
        .call_once_and_store_result([] {
          const py::module_ torch = py::module_::import("torch");
          return Torch{torch.attr("float32"), torch.attr("bfloat16"), torch.attr("int64"),
                       torch.attr("get_num_threads")};
        })
        .get_stored();
  }
};

// As many as torch uses in the calling thread.
inline int threads() { return Torch::get().get_num_threads().cast<int>(); }

// A shape or strides: of so few dimensions that no memory has to be asked for.
class Numbers {
 public:
  Numbers() = default;
  Numbers(std::initializer_list<int64_t> numbers) {
    for (const int64_t number : numbers) append(number);
  }
  explicit Numbers(const py::object& tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple.ptr()); ++i) {
      append(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i)));
    }
  }

  size_t size() const { return size_; }
  int64_t operator[](size_t i) const { return numbers_[i]; }
  const int64_t* begin() const { return numbers_; }
  const int64_t* end() const { return numbers_ + size_; }
  bool operator==(const Numbers& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  void append(int64_t number) {
    if (size_ == kMost) fail("the compiled kernels take no tensors of more than 8 dimensions");
    numbers_[size_++] = number;
  }

  static constexpr size_t kMost = 8;
  int64_t numbers_[kMost] = {};
  size_t size_ = 0;
};

// Valid during the call that it was passed to. None is a tensor without memory.
class [[gnu::visibility("hidden")]] Tensor {  // as what it holds of pybind11
 public:
  Tensor() = default;

  explicit Tensor(py::handle tensor) {
    if (tensor.is_none()) return;
    object_ = tensor;
    const Torch& torch = Torch::get();
    const py::object dtype = tensor.attr(torch.dtype);
    type_ = dtype.is(torch.float32)    ? Type::kFloat
            : dtype.is(torch.bfloat16) ? Type::kBf16
            : dtype.is(torch.int64)    ? Type::kInt64
                                       : Type::kOther;
    shape_ = Numbers(tensor.attr(torch.shape));
    strides_ = Numbers(call(tensor, torch.stride));
    on_cpu_ = tensor.attr(torch.is_cpu).ptr() == Py_True;
    if (on_cpu_) data_ = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
  }

  bool is_none() const { return !object_; }
  Type type() const { return type_; }
  int64_t size(size_t dimension) const { return shape_[dimension]; }
  int64_t stride(size_t dimension) const { return strides_[dimension]; }  // in elements
  const Numbers& shape() const { return shape_; }

  int64_t elements() const {
    int64_t product = 1;
    for (const int64_t size : shape_) product *= size;
    return product;
  }

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

  // It has a type that the kernels compute in and so many dimensions: what the sizes of a call are read from.
  void expect_computable(const char* name, size_t dimensions) const {
    if (type_ != Type::kFloat && type_ != Type::kBf16) {
      fail("the compiled kernels compute in float32 and bfloat16, found " + described(name));
    }
    if (shape_.size() != dimensions) {
      fail("expected " + std::to_string(dimensions) + " dimensions, found " + described(name));
    }
  }

  // It lies on a CPU, with this type and shape; all elements follow one another, or those of the last dimension do.
  void expect(const char* name, Type type, const Numbers& shape, bool only_last = false) const {
    if (on_cpu_ && type_ == type && shape_ == shape && is_contiguous(only_last ? shape.size() - 1 : 0)) return;
    static constexpr const char* kNames[] = {"torch.float32", "torch.bfloat16", "torch.int64", "another type"};
    fail(std::string("expected ") + kNames[static_cast<int>(type)] + " " + listed(shape) + " on a CPU, " +
         (only_last ? "the last dimension " : "") + "contiguous, found " + described(name));
  }

 private:
  static py::object call(py::handle object, const py::str& method) {
    PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method.ptr());
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  bool is_contiguous(size_t first) const {
    if (elements() == 0) return true;
    int64_t expected = 1;
    for (size_t i = shape_.size(); i-- > first;) {
      if (shape_[i] != 1 && strides_[i] != expected) return false;
      expected *= shape_[i];
    }
    return true;
  }

  std::string described(const char* name) const {
    if (is_none()) return std::string(name) + ": None";
    return std::string(name) + ": " + py::str(object_.attr("dtype")).cast<std::string>() + " " + listed(shape_) +
           ", strides " + listed(strides_) + ", on " + py::str(object_.attr("device")).cast<std::string>();
  }

  static std::string listed(const Numbers& numbers) {
    std::string text;
    for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
    return "(" + text + ")";
  }

  py::handle object_;
  void* data_ = nullptr;
  Type type_ = Type::kOther;
  bool on_cpu_ = false;
  Numbers shape_, strides_;
};

struct [[gnu::visibility("hidden")]] Argument {
  const char* name;
  const Tensor& tensor;
};

// Each that is not None has this type and shape, and is contiguous.
inline void expect(Type type, const Numbers& shape, std::initializer_list<Argument> arguments) {
  for (const Argument& each : arguments) each.tensor.expect(each.name, type, shape);
}

}  // namespace hammer

namespace pybind11::detail {

// Lets bound functions take tensors, and None.
template <>
struct type_caster<hammer::Tensor> {
  PYBIND11_TYPE_CASTER(hammer::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (!source.is_none() && !hasattr(source, hammer::Torch::get().dtype)) return false;
    value = hammer::Tensor(source);
    return true;
  }
};

}  // namespace pybind11::detail
