// Python bindings of the encoder: arguments are checked here, the GIL is released around the work.
//
// Strings are read where Python keeps them, without a UTF-8 copy of each; a tuple of our own keeps them alive. Wrong
// types raise TypeError, damaged models ValueError, half a surrogate pair UnicodeError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "encoder.hpp"

namespace py = pybind11;

namespace {

using hammer::Encoded;
using hammer::Encoder;
using hammer::Model;

std::vector<hammer::Text> view_texts(const py::tuple& texts) {
  std::vector<hammer::Text> views;
  views.reserve(texts.size());
  for (const py::handle item : texts) {
    PyObject* text = item.ptr();
    if (!PyUnicode_Check(text)) throw py::type_error("texts must be str");
    if (PyUnicode_READY(text) != 0) throw py::error_already_set();
    views.push_back({PyUnicode_DATA(text), static_cast<size_t>(PyUnicode_GET_LENGTH(text)),
                     static_cast<int>(PyUnicode_KIND(text)), PyUnicode_IS_ASCII(text) != 0});
  }
  return views;
}

Encoded encode(Encoder& encoder, const py::tuple& texts, int threads, int32_t first, int32_t last,
               bool continued = false) {
  const std::vector<hammer::Text> views = view_texts(texts);
  py::gil_scoped_release release;
  return encoder.encode(views, threads, first, last, continued);
}

int32_t id_or_none(const py::object& id) {
  if (id.is_none()) return -1;
  const auto value = id.cast<int32_t>();
  if (value < 0) throw py::value_error("an id must not be negative");
  return value;
}

py::tuple encode_documents(Encoder& encoder, const py::object& texts, int threads, const py::object& first,
                           const py::object& last, bool continued) {
  Encoded encoded = encode(encoder, py::tuple(texts), threads, id_or_none(first), id_or_none(last), continued);
  py::array_t<int64_t> lengths(static_cast<py::ssize_t>(encoded.lengths.size()), encoded.lengths.data());
  const auto total = static_cast<py::ssize_t>(encoded.total());
  if (encoded.buffers.size() == 1 && total > 0) {  // in order as they lie: handed over
    int32_t* data = encoded.buffers[0].release();
    const py::capsule owner(data, [](void* pointer) { std::free(pointer); });
    return py::make_tuple(py::array_t<int32_t>(total, data, owner), lengths);
  }
  py::array_t<int32_t> ids(total);
  int32_t* out = ids.mutable_data();
  {
    py::gil_scoped_release release;
    encoded.gather(out);
    encoded = Encoded();
  }
  return py::make_tuple(ids, lengths);
}

py::list to_list(const int32_t* ids, size_t count) {
  py::list list(count);
  for (size_t i = 0; i < count; ++i) PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLong(ids[i]));
  return list;
}

py::list encode_batch(Encoder& encoder, const py::object& texts, int threads) {
  const Encoded encoded = encode(encoder, py::tuple(texts), threads, -1, -1);
  std::vector<int32_t> ids(encoded.total());
  encoded.gather(ids.data());
  py::list lists(encoded.lengths.size());
  const int32_t* at = ids.data();
  for (size_t i = 0; i < encoded.lengths.size(); ++i) {
    const auto count = static_cast<size_t>(encoded.lengths[i]);
    lists[i] = to_list(at, count);
    at += count;
  }
  return lists;
}

// What the fingerprint hashes of the pieces: for each its length (u32), score (f32), type (u8) and text.
py::bytes packed_pieces(const Model& model) {
  std::string packed;
  for (const hammer::Piece& piece : model.pieces()) {
    const auto length = static_cast<uint32_t>(piece.text.size());
    char header[9];
    std::memcpy(header, &length, 4);
    std::memcpy(header + 4, &piece.score, 4);
    header[8] = static_cast<char>(piece.type);
    packed.append(header, sizeof(header)).append(piece.text);
  }
  return packed;
}

// Bytes of text that each id stands for: see Tokenizer.piece_bytes.
py::array_t<int32_t> piece_bytes(const Model& model) {
  py::array_t<int32_t> lengths(static_cast<py::ssize_t>(model.pieces().size()));
  int32_t* out = lengths.mutable_data();
  for (const hammer::Piece& piece : model.pieces()) {
    auto bytes = static_cast<int32_t>(piece.text.size());
    for (size_t at = 0; (at = piece.text.find("\xE2\x96\x81", at)) != std::string_view::npos; at += 3) bytes -= 2;
    const bool shows = piece.type == hammer::PieceType::kNormal || piece.type == hammer::PieceType::kUserDefined;
    *out++ = piece.type == hammer::PieceType::kByte ? 1 : shows ? bytes : 0;
  }
  return lengths;
}

py::dict settings(const Model& model) {
  py::dict values;
  values["model_type"] = static_cast<int>(model.type);
  values["byte_fallback"] = model.byte_fallback;
  values["treat_whitespace_as_suffix"] = model.treat_whitespace_as_suffix;
  values["add_dummy_prefix"] = model.add_dummy_prefix;
  values["remove_extra_whitespaces"] = model.remove_extra_whitespaces;
  values["escape_whitespaces"] = model.escape_whitespaces;
  return values;
}

py::tuple special_ids(const Model& model) {
  const hammer::SpecialIds ids = model.special_ids();
  const auto id = [](int32_t value) { return value < 0 ? py::object(py::none()) : py::object(py::int_(value)); };
  return py::make_tuple(id(ids.bos), id(ids.eos), id(ids.unk), id(ids.pad));
}

}  // namespace

PYBIND11_MODULE(_encoder, module) {
  module.doc() = "Compiled half of megatron_hammer.tokenizer.encode, which documents the classes.";
  module.attr("INTERFACE") = 2;  // tokenizer/encode.py refuses a module of another number
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const hammer::DamagedModel& damaged) {
      PyErr_SetString(PyExc_ValueError, damaged.what());
    } catch (const hammer::Surrogate&) {
      PyErr_SetString(PyExc_UnicodeError, "half of a surrogate pair");
    }
  });
  py::class_<Model>(module, "Model")
      .def(py::init([](const py::bytes& content) { return std::make_unique<Model>(std::string(content)); }),
           py::arg("content"))
      .def("__len__", [](const Model& model) { return model.pieces().size(); })
      .def("settings", &settings)
      .def("charsmap", [](const Model& model) { return py::bytes(model.charsmap); })
      .def("special_ids", &special_ids)
      .def("packed_pieces", &packed_pieces)
      .def("piece_bytes", &piece_bytes)
      .def("unsupported", [](const Model& model) { return hammer::Vocabulary::unsupported(model); });
  py::class_<Encoder>(module, "Encoder")
      .def(py::init<const Model&>(), py::arg("model"))
      .def("encode_documents", &encode_documents, py::arg("texts"), py::arg("threads"), py::arg("first"),
           py::arg("last"), py::arg("continued") = false)
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("threads"))
      .def("parts_are_independent", &Encoder::parts_are_independent)
      .def(
          "safe_cut",
          [](const Encoder& encoder, const py::str& text, size_t from) {
            if (from == 0) throw py::value_error("a cut is between two characters");
            return encoder.safe_cut(view_texts(py::make_tuple(text))[0], from);
          },
          py::arg("text"), py::arg("start"));
}
