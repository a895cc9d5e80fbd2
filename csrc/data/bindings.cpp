// Python bindings of the index builder: arguments are checked here, the GIL is released around the work.
//
// Arrays must have the stated dtype and be C-contiguous (never converted: a hidden copy of a large array would cost more
// than the call); they may be unaligned. Bad values raise ValueError, bad dtypes TypeError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>

#include "index_builder.hpp"

namespace py = pybind11;

namespace {

template <class T>
bool holds(const py::array& array) {
  return array.dtype().kind() == (std::numeric_limits<T>::is_signed ? 'i' : 'u') && array.itemsize() == sizeof(T) &&
         array.dtype().byteorder() != '>';
}

void check_shape(const py::array& array, const char* name) {
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    throw py::type_error(std::string(name) + " must be a contiguous one-dimensional array");
  }
}

template <class T>
hammer::View<T> view(const py::array& array, const char* name) {
  check_shape(array, name);
  if (!holds<T>(array)) throw py::type_error(std::string(name) + " has another dtype than expected");
  return hammer::View<T>(array.data(), array.size());
}

// Calls `work` with a view of int32 or int64 lengths.
template <class Work>
auto with_lengths(const py::array& lengths, Work work) {
  check_shape(lengths, "lengths");
  if (holds<int32_t>(lengths)) return work(view<int32_t>(lengths, "lengths"));
  if (holds<int64_t>(lengths)) return work(view<int64_t>(lengths, "lengths"));
  throw py::type_error("lengths must be int32 or int64");
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<int64_t> permute(int64_t n, uint64_t key, int64_t start, int64_t count) {
  if (n < 0 || start < 0 || count < 0 || start > n || count > n - start) {
    throw std::invalid_argument("start and count must stay within [0, n)");
  }
  py::array_t<int64_t> out(count);
  int64_t* values = out.mutable_data();
  py::gil_scoped_release release;
  hammer::permute(n, key, start, count, values);
  return out;
}

py::array_t<int64_t> epoch_marks(const py::array& lengths, uint64_t key, int64_t stride) {
  const auto marks = with_lengths(lengths, [&](auto checked) {
    py::gil_scoped_release release;
    return hammer::epoch_marks(checked, key, stride);
  });
  return to_array(marks);
}

py::array_t<int64_t> find_pieces(const py::array& lengths, const py::array& marks, int64_t stride, uint64_t key,
                                 int64_t offset, int64_t count) {
  const auto marks_view = view<int64_t>(marks, "marks");
  const auto pieces = with_lengths(lengths, [&](auto checked) {
    py::gil_scoped_release release;
    return hammer::find_pieces(checked, marks_view, stride, key, offset, count);
  });
  py::array_t<int64_t> out({static_cast<py::ssize_t>(pieces.size()), py::ssize_t{3}});
  static_assert(sizeof(hammer::Piece) == 3 * sizeof(int64_t), "rows are copied as they lie");
  if (!pieces.empty()) std::memcpy(out.mutable_data(), pieces.data(), pieces.size() * sizeof(hammer::Piece));
  return out;
}

template <class Index>
py::array_t<Index> sample_index(const py::array& lengths, const py::array& documents, int64_t seq_length,
                                int64_t total_tokens, int64_t extra, bool drop_last) {
  const auto lengths_view = view<int32_t>(lengths, "lengths");
  const auto documents_view = view<int32_t>(documents, "documents");
  const int64_t samples = hammer::count_samples(total_tokens, seq_length, extra, drop_last);
  // A claimed total must not be able to ask for more memory than the documents can fill.
  const int64_t most = std::numeric_limits<int32_t>::max();
  if (documents.size() == 0) throw std::invalid_argument("documents must not be empty");
  if (total_tokens / most > documents.size()) {
    throw std::invalid_argument("total_tokens is more than the documents hold");
  }
  py::array_t<Index> out({static_cast<py::ssize_t>(samples + 1), py::ssize_t{2}});
  Index* rows = out.mutable_data();
  py::gil_scoped_release release;
  hammer::sample_index<Index>(lengths_view, documents_view, seq_length, total_tokens, extra, drop_last, rows);
  return out;
}

template <class Draw>
py::tuple blend(const std::vector<int64_t>& past, int64_t count, Draw draw) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  std::vector<int64_t> drawn = past;
  py::array_t<int16_t> source(count);
  py::array_t<int64_t> position(count);
  int16_t* source_values = source.mutable_data();
  int64_t* position_values = position.mutable_data();
  {
    py::gil_scoped_release release;
    draw(drawn, source_values, position_values);
  }
  return py::make_tuple(source, position, to_array(drawn));
}

py::tuple chairman_blend(const std::vector<double>& weights, const std::vector<int64_t>& drawn, int64_t count) {
  return blend(drawn, count, [&](std::vector<int64_t>& state, int16_t* source, int64_t* position) {
    hammer::chairman_blend(weights, state, count, source, position);
  });
}

py::tuple greedy_blend(const std::vector<double>& weights, const std::vector<int64_t>& drawn, int64_t count,
                       const std::vector<int64_t>& limits) {
  return blend(drawn, count, [&](std::vector<int64_t>& state, int16_t* source, int64_t* position) {
    hammer::greedy_blend(weights, limits, state, count, source, position);
  });
}

void shuffle(hammer::MersenneTwister& twister, py::array values) {
  check_shape(values, "values");
  const bool aligned = reinterpret_cast<std::uintptr_t>(values.data()) % static_cast<size_t>(values.itemsize()) == 0;
  if (!values.writeable() || !aligned) throw py::type_error("values must be writeable and aligned");
  const int64_t n = values.size();
  void* data = values.mutable_data();
  if (holds<int32_t>(values) || holds<uint32_t>(values)) {
    py::gil_scoped_release release;
    twister.shuffle(static_cast<uint32_t*>(data), n);
  } else if (holds<int64_t>(values) || holds<uint64_t>(values)) {
    py::gil_scoped_release release;
    twister.shuffle(static_cast<uint64_t*>(data), n);
  } else {
    throw py::type_error("values must be integers of 32 or 64 bits");
  }
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Compiled half of megatron_hammer.data.index, which documents the functions.";
  module.attr("INTERFACE") = 1;  // data/index.py refuses a module of another number
  module.def("permute", &permute, py::arg("n"), py::arg("key"), py::arg("start"), py::arg("count"));
  module.def("epoch_marks", &epoch_marks, py::arg("lengths"), py::arg("key"), py::arg("stride"));
  module.def("find_pieces", &find_pieces, py::arg("lengths"), py::arg("marks"), py::arg("stride"), py::arg("key"),
             py::arg("offset"), py::arg("count"));
  module.def("sample_index_int32", &sample_index<int32_t>, py::arg("lengths"), py::arg("documents"),
             py::arg("seq_length"), py::arg("total_tokens"), py::arg("extra"), py::arg("drop_last"));
  module.def("sample_index_int64", &sample_index<int64_t>, py::arg("lengths"), py::arg("documents"),
             py::arg("seq_length"), py::arg("total_tokens"), py::arg("extra"), py::arg("drop_last"));
  module.def("chairman_blend", &chairman_blend, py::arg("weights"), py::arg("drawn"), py::arg("count"));
  module.def("greedy_blend", &greedy_blend, py::arg("weights"), py::arg("drawn"), py::arg("count"),
             py::arg("limits"));
  py::class_<hammer::MersenneTwister>(module, "MersenneTwister")
      .def(py::init<uint32_t>(), py::arg("seed"))
      .def("shuffle", &shuffle, py::arg("values"));
}
