#include "model.hpp"

#include <cstring>

#include "utf8.hpp"

namespace hammer {
namespace {

enum Wire : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kGroup = 3, kEndGroup = 4, kFixed32 = 5 };

constexpr int kMostGroups = 100;  // protobuf's own limit on nesting

[[noreturn]] void cut_off() { throw DamagedModel("it does not parse"); }

struct Field {
  uint32_t number;
  Wire wire;
  uint64_t value;          // of kVarint, kFixed32 and kFixed64
  std::string_view bytes;  // of kBytes
};

// Walks over the fields of one message.
class Reader {
 public:
  explicit Reader(std::string_view message) : at_(message.data()), end_(at_ + message.size()) {}

  bool next(Field& field) {
    if (at_ == end_) return false;
    read(field);
    if (field.wire == kEndGroup) cut_off();
    if (field.wire == kGroup) skip_group(field.number, 0);
    return true;
  }

 private:
  void read(Field& field) {
    const uint64_t tag = varint();
    if (tag > UINT32_MAX || tag >> 3 == 0) cut_off();
    field = {static_cast<uint32_t>(tag >> 3), static_cast<Wire>(tag & 7), 0, {}};
    switch (field.wire) {
      case kVarint: field.value = varint(); break;
      case kFixed64: field.value = fixed(8); break;
      case kFixed32: field.value = fixed(4); break;
      case kBytes: field.bytes = take(varint()); break;
      case kGroup:
      case kEndGroup: break;
      default: cut_off();
    }
  }

  void skip_group(uint32_t number, int depth) {
    if (depth == kMostGroups) cut_off();
    for (Field field;;) {
      if (at_ == end_) cut_off();
      read(field);
      if (field.wire == kGroup) skip_group(field.number, depth + 1);
      if (field.wire != kEndGroup) continue;
      if (field.number != number) cut_off();
      return;
    }
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      if (at_ == end_) cut_off();
      const auto byte = static_cast<unsigned char>(*at_++);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    cut_off();
  }

  uint64_t fixed(size_t width) {
    const std::string_view bytes = take(width);
    uint64_t value = 0;
    for (size_t i = 0; i < width; ++i) value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
    return value;
  }

  std::string_view take(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_)) cut_off();
    const std::string_view bytes(at_, size);
    at_ += size;
    return bytes;
  }

  const char* at_;
  const char* end_;
};

// A message of which nothing is asked must parse all the same.
void walk(std::string_view message) {
  Reader reader(message);
  for (Field field; reader.next(field);) {
  }
}

void set(bool& target, const Field& field) {
  if (field.wire == kVarint) target = field.value != 0;
}

void set(std::string_view& target, const Field& field) {
  if (field.wire == kBytes) target = field.bytes;
}

template <class Enum>
void set(Enum& target, const Field& field, Enum last) {
  const auto value = static_cast<uint32_t>(field.value);
  if (field.wire == kVarint && value >= 1 && value <= static_cast<uint32_t>(last)) target = static_cast<Enum>(value);
}

}  // namespace

Model::Model(std::string content) : content_(std::move(content)) {
  bool has_trainer = false, has_normalizer = false;
  Reader reader(content_);
  for (Field field; reader.next(field);) {
    if (field.wire != kBytes) continue;
    switch (field.number) {
      case 1: read_piece(field.bytes); break;
      case 2: read_trainer(field.bytes), has_trainer = true; break;
      case 3: read_normalizer(field.bytes), has_normalizer = true; break;
      case 5: walk(field.bytes); break;  // denormalizer_spec
      default: break;
    }
  }
  // Pieces come first in the file: where the settings behind them are missing, the end was cut off.
  if (pieces_.empty() || !has_trainer || !has_normalizer) throw DamagedModel("pieces or settings are missing");
}

void Model::read_piece(std::string_view message) {
  Piece piece;
  Reader reader(message);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 1: set(piece.text, field); break;
      case 2:
        if (field.wire == kFixed32) {
          const auto bits = static_cast<uint32_t>(field.value);
          std::memcpy(&piece.score, &bits, sizeof(bits));
        }
        break;
      case 3: set(piece.type, field, PieceType::kByte); break;
      default: break;
    }
  }
  if (!is_utf8(piece.text)) throw DamagedModel("piece " + std::to_string(pieces_.size()) + " is not valid UTF-8");
  pieces_.push_back(piece);
}

void Model::read_trainer(std::string_view message) {
  Reader reader(message);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 3: set(type, field, ModelType::kChar); break;
      case 24: set(treat_whitespace_as_suffix, field); break;
      case 35: set(byte_fallback, field); break;
      case 45:
      case 46:
      case 47:
      case 48: set(names_[field.number - 45], field); break;
      default: break;
    }
  }
}

void Model::read_normalizer(std::string_view message) {
  Reader reader(message);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 2: set(charsmap, field); break;
      case 3: set(add_dummy_prefix, field); break;
      case 4: set(remove_extra_whitespaces, field); break;
      case 5: set(escape_whitespaces, field); break;
      default: break;
    }
  }
}

SpecialIds Model::special_ids() const {
  static constexpr std::string_view kDefaults[4] = {"<unk>", "<s>", "</s>", "<pad>"};
  int32_t ids[4] = {-1, -1, -1, -1};
  bool named[4] = {};  // a piece has the name, of whatever type
  int32_t unknown = -1;
  for (size_t id = 0; id < pieces_.size(); ++id) {
    const Piece& piece = pieces_[id];
    if (piece.type == PieceType::kUnknown) unknown = static_cast<int32_t>(id);
    for (int k = 0; k < 4; ++k) {
      if (piece.text != (names_[k].empty() ? kDefaults[k] : names_[k])) continue;
      named[k] = true;
      if (piece.type == (k == 0 ? PieceType::kUnknown : PieceType::kControl)) ids[k] = static_cast<int32_t>(id);
    }
  }
  // A piece that no name finds is the unknown one to sentencepiece: so the unknown one needs no name.
  if (!named[0]) ids[0] = unknown;
  return {ids[1], ids[2], ids[0], ids[3]};
}

}  // namespace hammer
