// A sentencepiece model file, read without protobuf.
//
//     ModelProto: 1 pieces* { 1 text, 2 score, 3 type }
//                 2 trainer_spec { 3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback, 45..48 names }
//                 3 normalizer_spec { 2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
//                                     5 escape_whitespaces }
//
// Only these fields decide ids; all others are walked over, so that a file that is cut or garbled anywhere is found.
// As in protobuf the last value of a field counts, a repeated message is merged, and a value of a foreign wire type or
// an unknown enumerator is ignored.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace hammer {

// What is wrong with a file, as a phrase.
struct DamagedModel : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class PieceType : uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };
enum class ModelType : uint8_t { kUnigram = 1, kBpe = 2, kWord = 3, kChar = 4 };

struct Piece {
  std::string_view text;  // UTF-8; U+2581 stands for a space
  float score = 0;
  PieceType type = PieceType::kNormal;
};

struct SpecialIds {
  int32_t bos, eos, unk, pad;  // -1: none
};

class Model {
 public:
  // Throws DamagedModel where the bytes are no model file.
  explicit Model(std::string content);
  Model(const Model&) = delete;  // pieces look into content_
  Model& operator=(const Model&) = delete;

  const std::vector<Piece>& pieces() const { return pieces_; }
  SpecialIds special_ids() const;

  ModelType type = ModelType::kUnigram;
  bool byte_fallback = false;
  bool treat_whitespace_as_suffix = false;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  std::string_view charsmap;  // of the normaliser; empty: identity

 private:
  void read_piece(std::string_view message);
  void read_trainer(std::string_view message);
  void read_normalizer(std::string_view message);

  std::string content_;
  std::vector<Piece> pieces_;
  std::string_view names_[4];  // of the unknown, bos, eos and pad pieces
};

}  // namespace hammer
