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

#if defined(__GNUC__)
#define INLINED inline __attribute__((always_inline))  // also into a function for another unit
#else
#define INLINED inline
#endif

// bits: parts of N rows, `apart` elements from one to the next; cols: [n]; adds the sum over each part to sums: [N].
template <class T>
using RowSums = void (*)(const T* bits, int64_t apart, const uint64_t* cols, int64_t n, uint64_t* sums);

template <class T, int N, bool ONE_PRODUCT>
INLINED void row_sums(const T* bits, int64_t apart, const uint64_t* cols, int64_t n, uint64_t* sums) {
  uint64_t low[N] = {}, high[N] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int k = 0; k < N; ++k) {
      const uint64_t value = bits[k * apart + i];
      if (ONE_PRODUCT) {
        low[k] += value * cols[i];
      } else {
        low[k] += value * (cols[i] & 0xffffffffu);
        high[k] += value * (cols[i] >> 32);
      }
    }
  }
  for (int k = 0; k < N; ++k) sums[k] += low[k] + (high[k] << 32);
}

#define DEFINE(NAME, ONE_PRODUCT, TARGET)                                                           \
  template <class T, int N>                                                                         \
  TARGET void NAME(const T* bits, int64_t apart, const uint64_t* cols, int64_t n, uint64_t* sums) { \
    row_sums<T, N, ONE_PRODUCT>(bits, apart, cols, n, sums);                                        \
  }

DEFINE(portable, false, )
DEFINE(avx2, false, UNIT("avx2"))
DEFINE(avx512, true, UNIT("avx512f,avx512dq,avx512bw,avx512vl"))

template <class T, int N>
RowSums<T> choose() {
  if (units::has_avx512()) return avx512<T, N>;
  return units::has_avx2() ? avx2<T, N> : portable<T, N>;
}

constexpr int BANDS = 4;

template <class T>
struct Sums {
  static inline const RowSums<T> one_row = choose<T, 1>(), rows_of_bands = choose<T, BANDS>();
};

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

  // As many bytes as lie in whole rows of memory that is read for this alone: BANDS bands of rows side by side, since a
  // core has only so much of one stream on its way (7.7 GB/s on a Xeon, of four 11.8). Returns how many those are.
  int64_t add_bands(const uint8_t* data, int64_t bytes) {
    if (col_ != 0 || width_ == 0 || reinterpret_cast<uintptr_t>(data) % item_ != 0) return 0;
    const int64_t band = bytes / (item_ * width_) / BANDS;
    if (item_ == 2) {
      add_bands_as(reinterpret_cast<const uint16_t*>(data), band);
    } else {
      add_bands_as(reinterpret_cast<const uint32_t*>(data), band);
    }
    row_ += BANDS * band;
    return BANDS * band * width_ * item_;
  }

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
      Sums<T>::one_row(bits, 0, col_of_ + col_, run, &line_);
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

  // band: rows of each.
  template <class T>
  void add_bands_as(const T* bits, int64_t band) {
    constexpr int64_t STRIP = AT_ONCE / sizeof(T);
    for (int64_t row = 0; row < band; ++row) {
      uint64_t lines[BANDS] = {};
      for (int64_t col = 0; col < width_; col += STRIP) {
        const T* strip = bits + row * width_ + col;
        for (int k = 0; k < BANDS; ++k) prefetch(reinterpret_cast<const uint8_t*>(strip + k * band * width_) + AT_ONCE);
        Sums<T>::rows_of_bands(strip, band * width_, col_of_ + col, std::min(STRIP, width_ - col), lines);
      }
      for (int k = 0; k < BANDS; ++k) total_ += lines[k] * row_of_[row_ + k * band + row];
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
    if (sum_ && !hash_ && target == nullptr) {
      const int64_t taken = sum_->add_bands(source, n);
      source += taken;
      n -= taken;
    }
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
