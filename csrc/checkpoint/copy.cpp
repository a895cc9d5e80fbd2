// A copy that goes past the core's caches, for the snapshot that a save in the background writes from
// (megatron_hammer/checkpoint/snapshot.py), while training uses the same caches and the same memory.
//
// memcpy stores so, too, from sizes of the order of the last cache on, which a virtual machine may take for the whole
// host's (260 MiB here). The same bytes as memcpy, whatever the machine.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "past_caches.hpp"

namespace py = pybind11;

namespace {

void copy_past_caches(char* target, const char* source, int64_t n) {
  const int64_t head = past_caches::to_line(target), lines = (n - head) / past_caches::LINE * past_caches::LINE;
  if (lines > 0) {
    std::memcpy(target, source, head);
    past_caches::copy_lines(target + head, source + head, lines);
    past_caches::finish();  // before anybody is told that the copy is there
    target += head + lines;
    source += head + lines;
    n -= head + lines;
  }
  std::memcpy(target, source, n);
}

// target, source: contiguous bytes, as many.
void copy(const py::buffer& target, const py::buffer& source) {
  const py::buffer_info to = target.request(true), from = source.request();
  const auto contiguous = [](const py::buffer_info& info) {
    return info.itemsize == 1 && info.ndim == 1 && info.strides[0] == 1;
  };
  if (!contiguous(to) || !contiguous(from)) throw py::type_error("target and source must be flat, contiguous bytes");
  if (to.size != from.size) throw std::invalid_argument("target and source must have as many bytes");
  py::gil_scoped_release release;
  copy_past_caches(static_cast<char*>(to.ptr), static_cast<const char*>(from.ptr), to.size);
}

}  // namespace

PYBIND11_MODULE(_copy, module) {
  module.attr("INTERFACE") = 1;
  module.def("copy", &copy, py::arg("target"), py::arg("source"));
}
