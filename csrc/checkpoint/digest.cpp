// What a checkpoint keeps of bytes to know them again, made in one pass over them: their XXH3-128 (xxh3.hpp), and the
// sum of a rectangle of a tensor, for the digest of a run's state (megatron_hammer/checkpoint/one_pass.py):
//
//   sum over elements (r, c) of  bits(r, c) * rows[r] * cols[c]   modulo 2^64
//
// bits: uint16 or uint32, the elements of the rectangle row by row; rows, cols: odd uint64. Exact integers: the same
// value whatever the order, the unit and the number of calls. The twins in Python are in one_pass.py.
//
// A core waits for memory most of the time that it copies: 64 bytes take it some 20 cycles, hash and sum of them 4 or 5
// each. So bytes are hashed, added up and copied 1 KiB at a time, while the first cache has them and the memory already
// brings the next; and they are stored past the caches. On a Xeon a gigabyte is copied in 0.11 s; hashing it and adding
// it up costs 0.02 to 0.03 more so, and 0.07 in pieces of 256 KiB, each right after it was copied.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "past_caches.hpp"
#include "units.hpp"
#include "xxh3.hpp"

namespace py = pybind11;

// x86-64 has its loops for three units; which one runs is found out when the module is loaded. With AVX-512 a product
// of 64 bits is one instruction (33 to 40 GB/s in the cache on an AMD EPYC, against 26 with two of 32 bits; AVX2 has
// 10).
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
  if (units::has_avx512()) return avx512;
  return units::has_avx2() ? avx2 : portable;
}

const LineSum<uint16_t> line_sum_16 = choose<uint16_t>(portable_16, avx2_16, avx512_16);
const LineSum<uint32_t> line_sum_32 = choose<uint32_t>(portable_32, avx2_32, avx512_32);

uint64_t line_sum(const uint16_t* bits, const uint64_t* cols, int64_t n) { return line_sum_16(bits, cols, n); }
uint64_t line_sum(const uint32_t* bits, const uint64_t* cols, int64_t n) { return line_sum_32(bits, cols, n); }

constexpr int64_t AT_ONCE = 1024;  // bytes
constexpr int64_t AHEAD = 4096;  // of what is being taken: of 1, 2, 4 and 8 KiB the three longer ones are alike

// Have the memory bring AT_ONCE bytes; an address beyond what there is does no harm.
inline void prefetch(const uint8_t* at) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < AT_ONCE; i += 64) __builtin_prefetch(at + i);
#else
  static_cast<void>(at);
#endif
}

using Factors = py::array_t<uint64_t, py::array::c_style>;

// The sum over a rectangle whose elements come in parts of any length.
class RectangleSum {
 public:
  RectangleSum(Factors rows, Factors cols, int64_t item)
      : rows_(std::move(rows)),
        cols_(std::move(cols)),
        row_of_(rows_.data()),
        col_of_(cols_.data()),
        height_(rows_.size()),
        width_(cols_.size()),
        item_(item) {}

  bool is_whole(int64_t bytes) const { return bytes % item_ == 0; }

  bool has_room(int64_t bytes) const { return is_whole(bytes) && bytes / item_ <= (height_ - row_) * width_ - col_; }

  // bytes: AT_ONCE at most.
  void add(const uint8_t* data, int64_t bytes) {
    alignas(64) uint8_t aligned[AT_ONCE];
    if (reinterpret_cast<uintptr_t>(data) % item_ != 0) {
      std::memcpy(aligned, data, bytes);
      data = aligned;
    }
    if (item_ == 2) {
      add_as(reinterpret_cast<const uint16_t*>(data), bytes / 2);
    } else {
      add_as(reinterpret_cast<const uint32_t*>(data), bytes / 4);
    }
  }

  uint64_t total() const { return col_ == 0 ? total_ : total_ + line_ * row_of_[row_]; }

 private:
  template <class T>
  void add_as(const T* bits, int64_t n) {
    while (n > 0) {
      const int64_t run = std::min(width_ - col_, n);
      line_ += line_sum(bits, col_of_ + col_, run);
      bits += run;
      n -= run;
      col_ += run;
      if (col_ == width_) {
        total_ += line_ * row_of_[row_];
        line_ = 0;
        col_ = 0;
        ++row_;
      }
    }
  }

  Factors rows_, cols_;
  const uint64_t *row_of_, *col_of_;
  int64_t height_, width_, item_, row_ = 0, col_ = 0;
  uint64_t line_ = 0, total_ = 0;  // of the row that is begun, without its factor; of those before
};

class OnePass {
 public:
  // factors: of the rows and the columns, where the elements of `item` bytes are to be added up.
  OnePass(bool hashes, const std::optional<Factors>& rows, const std::optional<Factors>& cols, int64_t item) {
    if (hashes) hash_.emplace();
    if (rows && cols) {
      if (item != 2 && item != 4) throw py::type_error("elements must have 2 or 4 bytes");
      if (rows->ndim() != 1 || cols->ndim() != 1) {
        throw std::invalid_argument("factors must be vectors");
      }
      sum_.emplace(*rows, *cols, item);
    }
  }

  void add(const py::buffer& source) {
    const py::buffer_info from = checked(source, false);
    run(static_cast<const uint8_t*>(from.ptr), nullptr, from.size);
  }

  void copy(const py::buffer& target, const py::buffer& source) {
    const py::buffer_info to = checked(target, true), from = checked(source, false);
    if (to.size != from.size) throw std::invalid_argument("target and source must have as many bytes");
    run(static_cast<const uint8_t*>(from.ptr), static_cast<uint8_t*>(to.ptr), from.size);
  }

  uint64_t total() const { return sum_ ? sum_->total() : 0; }

  std::string hexdigest() const {
    if (!hash_ || hash_->total() < xxh3::SHORTEST) throw std::invalid_argument("too few bytes, or none hashed");
    const auto value = hash_->value();
    char text[33];
    std::snprintf(text, sizeof text, "%016llx%016llx", static_cast<unsigned long long>(value[0]),
                  static_cast<unsigned long long>(value[1]));
    return text;
  }

 private:
  static py::buffer_info checked(const py::buffer& buffer, bool writable) {
    py::buffer_info info = buffer.request(writable);
    if (info.itemsize != 1 || info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
      throw py::type_error("target and source must be flat, contiguous bytes");
    }
    return info;
  }

  void run(const uint8_t* source, uint8_t* target, int64_t n) {
    if (sum_ && !sum_->has_room(n)) throw std::invalid_argument("the elements must lie in the rectangle");
    py::gil_scoped_release release;
    int64_t part = AT_ONCE;
    bool streams = target != nullptr;
    if (streams) {  // the first part ends where a line of the target begins
      const int64_t head = past_caches::to_line(target);
      streams = !sum_ || sum_->is_whole(head);
      if (streams && head > 0) part = head;
    }
    for (int64_t at = 0; at < n; at += part, part = AT_ONCE) {
      part = std::min(part, n - at);
      prefetch(source + at + AHEAD);
      if (hash_) hash_->update(source + at, part);
      if (sum_) sum_->add(source + at, part);
      if (streams && part == AT_ONCE) {
        past_caches::copy_lines(target + at, source + at, part);
      } else if (target != nullptr) {
        std::memcpy(target + at, source + at, part);
      }
    }
    if (streams) past_caches::finish();
  }

  std::optional<xxh3::Hash> hash_;
  std::optional<RectangleSum> sum_;
};

}  // namespace

PYBIND11_MODULE(_digest, module) {
  module.attr("INTERFACE") = 2;
  py::class_<OnePass>(module, "OnePass")
      .def(py::init<bool, const std::optional<Factors>&, const std::optional<Factors>&, int64_t>(), py::arg("hashes"),
           py::arg("rows"), py::arg("cols"), py::arg("item_bytes"))
      .def("add", &OnePass::add, py::arg("source"))
      .def("copy", &OnePass::copy, py::arg("target"), py::arg("source"))
      .def("hexdigest", &OnePass::hexdigest)
      .def_property_readonly("total", &OnePass::total);
}
