// A copy that goes past the core's caches, for the snapshot that a save in the background writes from
// (megatron_hammer/checkpoint/snapshot.py), while training uses the same caches and the same memory.
//
// An ordinary store first reads the line that it overwrites, and pushes another out of the cache. A streaming store
// does neither: two bytes move for each that is copied, not three. memcpy does so for sizes of the order of the last
// cache, which a virtual machine may take for the whole host's (260 MiB here). The same bytes as memcpy, whatever the
// machine.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace py = pybind11;

namespace {

constexpr int64_t LINE = 64;

void copy_past_caches(char* target, const char* source, int64_t n) {
#if defined(__x86_64__)  // SSE2 is part of it; the four parts of a line leave the core together
  const int64_t head = -reinterpret_cast<intptr_t>(target) & (LINE - 1);
  if (n >= head + LINE) {
    std::memcpy(target, source, head);
    int64_t at = head;
    for (; at + LINE <= n; at += LINE) {
      const auto* from = reinterpret_cast<const __m128i*>(source + at);
      auto* to = reinterpret_cast<__m128i*>(target + at);
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), c = _mm_loadu_si128(from + 2),
                    d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
    _mm_sfence();  // before anybody is told that the copy is there
    target += at;
    source += at;
    n -= at;
  }
#endif
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
