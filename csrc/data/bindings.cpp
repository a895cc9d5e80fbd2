// Python bindings of the index builder: arguments are checked here, the GIL is released around the work.
//
// Arrays must have the stated dtype and be C-contiguous (never converted: a hidden copy of a large array would cost
// more than the call); they may be unaligned. Bad values raise ValueError, bad dtypes TypeError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>

#include "index_builder.hpp"
#include "reading.hpp"

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

py::array_t<int64_t> to_rows(const std::vector<hammer::Piece>& pieces) {
  py::array_t<int64_t> out({static_cast<py::ssize_t>(pieces.size()), py::ssize_t{3}});
  static_assert(sizeof(hammer::Piece) == 3 * sizeof(int64_t), "rows are copied as they lie");
  if (!pieces.empty()) std::memcpy(out.mutable_data(), pieces.data(), pieces.size() * sizeof(hammer::Piece));
  return out;
}

py::array_t<int64_t> find_pieces(const py::array& lengths, const py::array& marks, int64_t stride, uint64_t key,
                                 int64_t offset, int64_t count) {
  const auto marks_view = view<int64_t>(marks, "marks");
  const auto pieces = with_lengths(lengths, [&](auto checked) {
    py::gil_scoped_release release;
    return hammer::find_pieces(checked, marks_view, stride, key, offset, count);
  });
  return to_rows(pieces);
}

py::tuple to_tuple(const hammer::Located& located) {
  return py::make_tuple(to_rows(located.pieces), to_array(located.counts));
}

py::tuple locate_windows(const py::array& lengths, const py::array& marks, int64_t stride, uint64_t key,
                         const py::array& offsets, int64_t count) {
  const auto marks_view = view<int64_t>(marks, "marks");
  const auto offsets_view = view<int64_t>(offsets, "offsets");
  return to_tuple(with_lengths(lengths, [&](auto checked) {
    py::gil_scoped_release release;
    return hammer::locate_windows(checked, marks_view, stride, key, offsets_view, count);
  }));
}

// A two-dimensional array as one row after the other.
template <class T>
hammer::View<T> rows_view(const py::array& array, py::ssize_t columns, const char* name) {
  if (array.ndim() != 2 || array.shape(1) != columns || !(array.flags() & py::array::c_style) || !holds<T>(array)) {
    throw py::type_error(std::string(name) + " must be contiguous rows of " + std::to_string(columns) +
                         " of the expected dtype");
  }
  return hammer::View<T>(array.data(), array.size());
}

py::tuple megatron_windows(const py::array& lengths, const py::array& documents, const py::array& samples,
                           const py::array& windows, int64_t extra) {
  const auto lengths_view = view<int32_t>(lengths, "lengths");
  const auto documents_view = view<int32_t>(documents, "documents");
  const auto windows_view = view<int64_t>(windows, "windows");
  hammer::Located located;
  if (holds<int32_t>(samples)) {
    const auto samples_view = rows_view<int32_t>(samples, 2, "samples");
    py::gil_scoped_release release;
    located = hammer::megatron_windows(lengths_view, documents_view, samples_view, windows_view, extra);
  } else {
    const auto samples_view = rows_view<int64_t>(samples, 2, "samples");
    py::gil_scoped_release release;
    located = hammer::megatron_windows(lengths_view, documents_view, samples_view, windows_view, extra);
  }
  return to_tuple(located);
}

template <class T>
T* aligned_rows(py::array& array, const char* name) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % sizeof(T) == 0;
  if (array.ndim() != 2 || !(array.flags() & py::array::c_style) || !array.writeable() || !aligned) {
    throw py::type_error(std::string(name) + " must be a contiguous, aligned and writeable array of rows");
  }
  return static_cast<T*>(array.mutable_data());
}

void copy_windows(const py::array& tokens, const py::array& pointers, const py::object& boundaries,
                  const py::array& pieces, const py::array& counts, const py::array& rows, py::array out) {
  const py::array no_boundaries = py::array_t<int64_t>(0);
  const py::array given = boundaries.is_none() ? no_boundaries : boundaries.cast<py::array>();
  const hammer::Places places{view<int64_t>(pointers, "pointers"), view<int64_t>(given, "boundaries"),
                              static_cast<int64_t>(tokens.itemsize())};
  const auto pieces_view = rows_view<int64_t>(pieces, 3, "pieces");
  const auto counts_view = view<int64_t>(counts, "counts");
  const auto rows_numbers = view<int64_t>(rows, "rows");
  check_shape(tokens, "tokens");
  if (reinterpret_cast<std::uintptr_t>(tokens.data()) % static_cast<size_t>(tokens.itemsize()) != 0) {
    throw py::type_error("tokens must be aligned");
  }
  bool done = false;
  auto copy = [&](auto token, auto id) {
    using Token = decltype(token);
    using Out = decltype(id);
    if (done || !holds<Token>(tokens) || !holds<Out>(out)) return;
    Out* values = aligned_rows<Out>(out, "out");
    const int64_t size = out.shape(0), width = out.shape(1);
    const auto* from = static_cast<const Token*>(tokens.data());
    const int64_t num_tokens = tokens.size();
    done = true;
    py::gil_scoped_release release;
    hammer::copy_windows(from, num_tokens, places, pieces_view, counts_view, rows_numbers, width, size, values);
  };
  auto copy_either = [&](auto token) {
    copy(token, int32_t{});
    copy(token, int64_t{});
  };
  copy_either(uint16_t{});
  copy_either(int32_t{});
  copy_either(uint8_t{});
  copy_either(int8_t{});
  copy_either(int16_t{});
  copy(int64_t{}, int64_t{});
  if (!done) throw py::type_error("tokens must be integers of at most the width of out, which is int32 or int64");
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

std::vector<int64_t> blend_counts(bool chairman, const std::vector<double>& weights, std::vector<int64_t> drawn,
                                  int64_t count) {
  py::gil_scoped_release release;
  if (chairman) {
    hammer::chairman_blend(weights, drawn, count, nullptr, nullptr);
  } else {
    hammer::greedy_blend(weights, {}, drawn, count, nullptr, nullptr);
  }
  return drawn;
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
  module.doc() = "Compiled twin of megatron_hammer.sampling.index_builder_numpy, which documents the functions.";
  module.attr("INTERFACE") = 2;  // sampling/index_builder.py refuses a module of another number
  module.def("permute", &permute, py::arg("n"), py::arg("key"), py::arg("start"), py::arg("count"));
  module.def("epoch_marks", &epoch_marks, py::arg("lengths"), py::arg("key"), py::arg("stride"));
  module.def("find_pieces", &find_pieces, py::arg("lengths"), py::arg("marks"), py::arg("stride"), py::arg("key"),
             py::arg("offset"), py::arg("count"));
  module.def("locate_windows", &locate_windows, py::arg("lengths"), py::arg("marks"), py::arg("stride"), py::arg("key"),
             py::arg("offsets"), py::arg("count"));
  module.def("megatron_windows", &megatron_windows, py::arg("lengths"), py::arg("documents"), py::arg("samples"),
             py::arg("windows"), py::arg("extra"));
  module.def("copy_windows", &copy_windows, py::arg("tokens"), py::arg("pointers"), py::arg("boundaries"),
             py::arg("pieces"), py::arg("counts"), py::arg("rows"), py::arg("out"));
  module.def("sample_index_int32", &sample_index<int32_t>, py::arg("lengths"), py::arg("documents"),
             py::arg("seq_length"), py::arg("total_tokens"), py::arg("extra"), py::arg("drop_last"));
  module.def("sample_index_int64", &sample_index<int64_t>, py::arg("lengths"), py::arg("documents"),
             py::arg("seq_length"), py::arg("total_tokens"), py::arg("extra"), py::arg("drop_last"));
  module.def("chairman_blend", &chairman_blend, py::arg("weights"), py::arg("drawn"), py::arg("count"));
  module.def("greedy_blend", &greedy_blend, py::arg("weights"), py::arg("drawn"), py::arg("count"), py::arg("limits"));
  module.def(
      "blend_counts",
      [](bool chairman, const std::vector<double>& weights, const std::vector<int64_t>& drawn, int64_t count) {
        return to_array(blend_counts(chairman, weights, drawn, count));
      },
      py::arg("chairman"), py::arg("weights"), py::arg("drawn"), py::arg("count"));
  py::class_<hammer::MersenneTwister>(module, "MersenneTwister")
      .def(py::init<uint32_t>(), py::arg("seed"))
      .def("shuffle", &shuffle, py::arg("values"));
}
