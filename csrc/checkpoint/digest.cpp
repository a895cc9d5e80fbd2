// The sum of a rectangle of a tensor, for the digest of a run's state (megatron_hammer/checkpoint/digest.py):
//
//   sum over elements (r, c) of  bits(r, c) * rows[r] * cols[c]   modulo 2^64
//
// bits: [n] uint16 or uint32, elements `start` and following of the rectangle, row by row; rows, cols: odd uint64.
// Each element is read once; a product of 32 and 64 bits is two of 32 bits, which every vector unit has. Exact
// integers: the same value whatever the order, the unit and the number of calls. The NumPy twin is in digest.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace py = pybind11;

// x86-64 has its loops for three units; which one runs is found out when the module is loaded. With AVX-512 a product
// of 64 bits is one instruction (33 to 40 GB/s in the cache on an AMD EPYC, against 26 with two of 32 bits; AVX2 has
// 10).
#if defined(__x86_64__) && defined(__GNUC__)
#define UNIT(NAME) __attribute__((target(NAME)))
#else
#define UNIT(NAME)
#endif

namespace {

// bits, cols: [n]; the sum over a part of one row.
template <class T>
using LineSum = uint64_t (*)(const T* bits, const uint64_t* cols, int64_t n);

#define DEFINE_WITH_TWO_PRODUCTS(NAME, TYPE, TARGET)                        \
  TARGET uint64_t NAME(const TYPE* bits, const uint64_t* cols, int64_t n) { \
    uint64_t low = 0, high = 0;                                             \
    for (int64_t i = 0; i < n; ++i) {                                       \
      const uint64_t value = bits[i];                                       \
      low += value * (cols[i] & 0xffffffffu);                               \
      high += value * (cols[i] >> 32);                                      \
    }                                                                       \
    return low + (high << 32);                                              \
  }

#define DEFINE_WITH_ONE_PRODUCT(NAME, TYPE, TARGET)                                  \
  TARGET uint64_t NAME(const TYPE* bits, const uint64_t* cols, int64_t n) {          \
    uint64_t sum = 0;                                                                \
    for (int64_t i = 0; i < n; ++i) sum += static_cast<uint64_t>(bits[i]) * cols[i]; \
    return sum;                                                                      \
  }

DEFINE_WITH_TWO_PRODUCTS(portable_16, uint16_t, )
DEFINE_WITH_TWO_PRODUCTS(portable_32, uint32_t, )
DEFINE_WITH_TWO_PRODUCTS(avx2_16, uint16_t, UNIT("avx2"))
DEFINE_WITH_TWO_PRODUCTS(avx2_32, uint32_t, UNIT("avx2"))
DEFINE_WITH_ONE_PRODUCT(avx512_16, uint16_t, UNIT("avx512f,avx512dq,avx512bw,avx512vl"))
DEFINE_WITH_ONE_PRODUCT(avx512_32, uint32_t, UNIT("avx512f,avx512dq,avx512bw,avx512vl"))

template <class T>
LineSum<T> choose(LineSum<T> portable, LineSum<T> avx2, LineSum<T> avx512) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return avx512;
  }
  if (__builtin_cpu_supports("avx2")) return avx2;
#endif
  static_cast<void>(avx2);
  static_cast<void>(avx512);
  return portable;
}

const LineSum<uint16_t> line_sum_16 = choose<uint16_t>(portable_16, avx2_16, avx512_16);
const LineSum<uint32_t> line_sum_32 = choose<uint32_t>(portable_32, avx2_32, avx512_32);

uint64_t line_sum(const uint16_t* bits, const uint64_t* cols, int64_t n) { return line_sum_16(bits, cols, n); }
uint64_t line_sum(const uint32_t* bits, const uint64_t* cols, int64_t n) { return line_sum_32(bits, cols, n); }

template <class T>
uint64_t sum_of(const T* bits, int64_t n, int64_t start, const uint64_t* rows, const uint64_t* cols, int64_t width) {
  uint64_t total = 0;
  for (int64_t at = 0; at < n;) {
    const int64_t row = (start + at) / width, col = (start + at) % width;
    const int64_t length = std::min(width - col, n - at);
    total += line_sum(bits + at, cols + col, length) * rows[row];
    at += length;
  }
  return total;
}

using Factors = py::array_t<uint64_t, py::array::c_style>;

uint64_t rectangle_sum(const py::array& bits, int64_t start, const Factors& rows, const Factors& cols) {
  if (bits.ndim() != 1 || !(bits.flags() & py::array::c_style) || bits.dtype().kind() != 'u') {
    throw py::type_error("bits must be a contiguous one-dimensional array of unsigned integers");
  }
  const int64_t n = bits.size(), width = cols.size();
  if (rows.ndim() != 1 || cols.ndim() != 1 || start < 0 || width < 1 || (start + n + width - 1) / width > rows.size()) {
    throw std::invalid_argument("the elements must lie in the rectangle");
  }
  const uint64_t *row = rows.data(), *col = cols.data();
  const void* data = bits.data();
  const auto size = bits.itemsize();
  if (size != 2 && size != 4) throw py::type_error("bits must be uint16 or uint32");
  py::gil_scoped_release release;
  return size == 2 ? sum_of(static_cast<const uint16_t*>(data), n, start, row, col, width)
                   : sum_of(static_cast<const uint32_t*>(data), n, start, row, col, width);
}

}  // namespace

PYBIND11_MODULE(_digest, module) {
  module.attr("INTERFACE") = 1;
  module.def("rectangle_sum", &rectangle_sum, py::arg("bits"), py::arg("start"), py::arg("rows"), py::arg("cols"));
}
