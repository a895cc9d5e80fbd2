#include "vocabulary.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hammer {
namespace {

constexpr std::string_view kNul("\0", 1);
constexpr uint32_t kSpaceCharacter = 0x2581;
constexpr size_t kLongestPiece = 8000;  // sentencepiece's limit
constexpr size_t kMostPieces = 900000;  // with all characters of Unicode behind them, symbols fit into 21 bits
constexpr uint32_t kMostRanks = (1u << 20) - 1;
constexpr uint32_t kMostPlaces = (1u << 27) - 1;
constexpr int kMostMatches = 64;        // sentencepiece looks at no more symbols that begin at one place

// A piece can be joined from characters unless it is a NUL, which sentencepiece takes out of use, or holds a plain
// space, which no text has after spaces became U+2581.
bool can_be_joined(const Piece& piece) {
  return piece.type == PieceType::kNormal && piece.text.find(' ') == std::string_view::npos && piece.text != kNul;
}

bool can_be_matched(const Piece& piece) {
  return piece.type == PieceType::kUserDefined && piece.text.find(' ') == std::string_view::npos && piece.text != kNul;
}

// The next character of a piece, a space for U+2581.
uint32_t next_character(std::string_view text, size_t& at) {
  int length;
  const uint32_t c = utf8_decode(text.data() + at, length);
  at += length;
  return c == kSpaceCharacter ? ' ' : c;
}

uint64_t hash_text(std::string_view text) {
  uint64_t h = text.size() * 0x9E3779B97F4A7C15u;
  for (size_t i = 0; i < text.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
    const auto product = static_cast<unsigned __int128>(h ^ word) * 0xA0761D6478BD642Fu;
    h = static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  return h;
}

int bits_for(size_t slots) {
  int bits = 1;
  while (size_t{1} << bits < slots) ++bits;
  return bits;
}

}  // namespace

// Piece text -> id, for the time of building. Open addressing.
class Vocabulary::PieceIndex {
 public:
  explicit PieceIndex(const std::vector<Piece>& pieces)
      : pieces_(pieces), mask_((size_t{1} << bits_for(2 * pieces.size())) - 1), slots_(mask_ + 1, Slot{0, -1}) {}

  bool insert(int32_t id) {
    const uint64_t h = hash_text(pieces_[id].text);
    for (size_t i = h & mask_;; i = (i + 1) & mask_) {
      Slot& slot = slots_[i];
      if (slot.id < 0) return slot = {static_cast<uint32_t>(h >> 32), id}, true;
      if (slot.tag == h >> 32 && pieces_[slot.id].text == pieces_[id].text) return false;
    }
  }

  int32_t find(std::string_view text) const {
    const uint64_t h = hash_text(text);
    for (size_t i = h & mask_;; i = (i + 1) & mask_) {
      const Slot& slot = slots_[i];
      if (slot.id < 0) return -1;
      if (slot.tag == h >> 32 && pieces_[slot.id].text == text) return slot.id;
    }
  }

 private:
  struct Slot {
    uint32_t tag;
    int32_t id;
  };
  const std::vector<Piece>& pieces_;
  size_t mask_;
  std::vector<Slot> slots_;
};

std::string Vocabulary::unsupported(const Model& model) {
  static constexpr const char* kNames[] = {"", "unigram", "BPE", "word", "character"};
  if (model.type != ModelType::kBpe) return std::string("a ") + kNames[static_cast<int>(model.type)] + " model";
  if (!model.charsmap.empty()) return "the model normalises text";
  if (!model.byte_fallback) return "the model has no byte fallback";
  if (model.treat_whitespace_as_suffix) return "the model takes spaces as suffixes";
  if (!model.escape_whitespaces) return "the model keeps plain spaces";
  if (model.pieces().size() > kMostPieces) return "the model has more than 900,000 pieces";
  bool plus_zero = false, minus_zero = false;
  for (const Piece& piece : model.pieces()) {
    if (piece.type == PieceType::kUnused && piece.text != kNul) return "the model has unused pieces";
    if (model.remove_extra_whitespaces && piece.type == PieceType::kUserDefined &&
        piece.text.find(' ') != std::string_view::npos) {
      return "a user-defined symbol holds a space that the model would remove";
    }
    if (piece.type != PieceType::kNormal) continue;
    // Releases of sentencepiece differ in how they compare these.
    if (std::isnan(piece.score)) return "a score is not a number";
    if (piece.score == 0) (std::signbit(piece.score) ? minus_zero : plus_zero) = true;
  }
  if (plus_zero && minus_zero) return "scores of 0 and -0 compete";
  return "";
}

Vocabulary::Filter::Filter(size_t words) {
  const int bits = bits_for(words);
  words_.assign(size_t{1} << bits, 0);
  shift_ = 64 - bits;
}

Vocabulary::Vocabulary(const Model& model) : piece_count_(static_cast<uint32_t>(model.pieces().size())) {
  PieceIndex index(model.pieces());
  check_pieces(model, index);
  number_characters(model);
  build_symbols(model);
  rank_pieces(model);
  find_boundaries(model);
  build_joins(model, index);
}

void Vocabulary::check_pieces(const Model& model, PieceIndex& index) {
  const auto refuse = [](uint32_t id, const char* cause) {
    throw DamagedModel("piece " + std::to_string(id) + " " + cause);
  };
  bool has_byte[256] = {}, has_unknown = false;
  for (uint32_t id = 0; id < piece_count_; ++id) {
    const Piece& piece = model.pieces()[id];
    if (piece.text.size() >= kLongestPiece) refuse(id, "is too long");
    if (piece.text.empty()) refuse(id, "is empty");
    if (piece.text == kNul) continue;  // out of use beside byte fallback, like sentencepiece 0.2.3
    if (piece.text.find('\0') != std::string_view::npos) refuse(id, "holds a NUL character");
    if (!index.insert(static_cast<int32_t>(id))) refuse(id, "is there twice");
    if (piece.type == PieceType::kUnknown) {
      if (has_unknown) refuse(id, "is a second unknown piece");
      has_unknown = true;
    }
    if (piece.type == PieceType::kByte) {
      static constexpr std::string_view kDigits = "0123456789ABCDEF";
      const size_t high = piece.text.size() == 6 ? kDigits.find(piece.text[3]) : std::string_view::npos;
      const size_t low = piece.text.size() == 6 ? kDigits.find(piece.text[4]) : std::string_view::npos;
      if (high == std::string_view::npos || low == std::string_view::npos || piece.text.substr(0, 3) != "<0x" ||
          piece.text[5] != '>') {
        refuse(id, "is no byte");
      }
      has_byte[high << 4 | low] = true;
      byte_ids_[high << 4 | low] = static_cast<int32_t>(id);
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (!has_byte[byte]) throw DamagedModel("byte " + std::to_string(byte) + " has no piece");
  }
}

Vocabulary::Character& Vocabulary::character_entry(uint32_t c) {
  uint16_t& page = page_of_[c >> 8];
  if (page == 0) {  // page 0 is that of all characters without a symbol
    page = static_cast<uint16_t>(pages_.size() >> 8);
    pages_.resize(pages_.size() + 256, Character{kNone, 0, 0});
  }
  return pages_[static_cast<size_t>(page) << 8 | (c & 0xFF)];
}

void Vocabulary::number_characters(const Model& model) {
  page_of_.assign(0x110000 >> 8, 0);
  pages_.assign(256, Character{kNone, 0, 0});
  character_entry(0);  // ASCII never shares a page
  for (uint32_t id = 0; id < piece_count_; ++id) {  // a character that is a piece: its id
    const Piece& piece = model.pieces()[id];
    if (utf8_length(static_cast<unsigned char>(piece.text[0])) != static_cast<int>(piece.text.size())) continue;
    if (!can_be_joined(piece) && !can_be_matched(piece)) continue;
    size_t at = 0;
    character_entry(next_character(piece.text, at)).symbol = id & kNone;
  }
  for (const Piece& piece : model.pieces()) {  // others: numbers behind the pieces
    if (!can_be_joined(piece)) continue;
    for (size_t at = 0; at < piece.text.size();) {
      const uint32_t c = next_character(piece.text, at);
      Character& entry = character_entry(c);
      if (entry.symbol != kNone) continue;
      entry.symbol = (piece_count_ + static_cast<uint32_t>(extra_characters_.size())) & kNone;
      extra_characters_.push_back(c);
    }
  }
}

void Vocabulary::build_symbols(const Model& model) {
  std::fill(std::begin(first_node_), std::end(first_node_), -1);
  for (uint32_t id = 0; id < piece_count_; ++id) {
    const Piece& piece = model.pieces()[id];
    if (!can_be_matched(piece)) continue;
    std::string text;  // as it reads in ours
    size_t characters = 0;
    uint32_t first = 0;
    for (size_t at = 0; at < piece.text.size(); ++characters) {
      const uint32_t c = next_character(piece.text, at);
      if (characters == 0) first = c;
      character_entry(c).inside_symbol = 1;
      char bytes[4];
      text.append(bytes, utf8_encode(c, bytes));
    }
    // One character needs no matching: its entry has the symbol's id, and no pair holds that.
    if (characters > 1) character_entry(first).starts_symbol = 1;
    int32_t node = -1;
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      const int32_t parent = node;
      const int32_t first_child = parent < 0 ? first_node_[byte] : trie_[parent].child;
      for (node = first_child; node >= 0 && trie_[node].byte != byte;) node = trie_[node].sibling;
      if (node >= 0) continue;
      node = static_cast<int32_t>(trie_.size());
      trie_.push_back({byte, -1, -1, first_child});
      (parent < 0 ? first_node_[byte] : trie_[parent].child) = node;
    }
    trie_[node].id = static_cast<int32_t>(id);
  }
}

Vocabulary::Match Vocabulary::match_symbol(const char* s, const char* end) const {
  Match longest{-1, 0};
  int matches = 0;
  int32_t node = first_node_[static_cast<unsigned char>(*s)];
  for (const char* p = s; node >= 0;) {
    if (trie_[node].id >= 0) {
      longest = {trie_[node].id, static_cast<size_t>(p - s) + 1};
      if (++matches == kMostMatches) break;
    }
    if (++p == end) break;
    node = trie_[node].child;
    while (node >= 0 && trie_[node].byte != static_cast<unsigned char>(*p)) node = trie_[node].sibling;
  }
  return longest;
}

void Vocabulary::rank_pieces(const Model& model) {
  std::vector<uint32_t> order;
  for (uint32_t id = 0; id < piece_count_; ++id) {
    if (can_be_joined(model.pieces()[id])) order.push_back(id);
  }
  const auto score = [&](uint32_t id) { return model.pieces()[id].score; };
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return score(a) > score(b); });
  ranks_.assign(piece_count_, 0);
  uint32_t rank = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    if (i > 0 && score(order[i]) != score(order[i - 1])) ++rank;
    ranks_[order[i]] = rank;
  }
}

void Vocabulary::find_boundaries(const Model& model) {
  // Sized for what merged vocabularies have: one pair of characters in four pieces, fewer contexts than pieces. So a
  // pair has 16 bits or more, and about one answer in a hundred is wrong.
  adjacent_ = Filter(model.pieces().size() / 16);
  two_characters_ = Filter(model.pieces().size() / 16);
  contexts_ = Filter(model.pieces().size() / 4);
  std::vector<uint32_t> text, symbols;
  for (const Piece& piece : model.pieces()) {
    if (!can_be_joined(piece)) continue;
    text.clear();
    symbols.clear();
    for (size_t at = 0; at < piece.text.size();) {
      text.push_back(next_character(piece.text, at));
      symbols.push_back(character(text.back()).symbol);
    }
    const size_t last = text.size() - 1;
    bool after_newline = false;  // a newline and at least one space stand before
    for (size_t i = 0; i < last; ++i) {
      const Adjacency adjacency = last == 1 ? kPiece : kInside;
      const uint64_t h = hash(symbols[i], symbols[i + 1], kAny, kAny);
      adjacent_.add(h);
      if (adjacency == kPiece)
        two_characters_.add(h);
      else
        contexts_.add(
            hash(symbols[i], symbols[i + 1], i > 0 ? symbols[i - 1] : kAny, i + 1 < last ? symbols[i + 2] : kAny));
      if ((text[i] | text[i + 1]) < 0x80) {
        Adjacency& known = ascii_adjacency_[text[i]][text[i + 1]];
        known = std::max(known, adjacency);
      }
      if (text[i + 1] == ' ') {
        after_newline = after_newline || text[i] == '\n';
      } else if (after_newline) {
        after_newline = false;
        if (text[i + 1] >= 0x80)
          newline_rule_ = false;  // only ASCII is looked up
        else
          newline_follow_[text[i + 1]] = true;
      }
    }
    if (after_newline) newline_rule_ = false;  // it ends in these spaces: whatever follows them
  }
  // A character that is a user-defined symbol by itself never joins, whatever pieces hold it.
  for (unsigned c = 0; c < 0x80; ++c) {
    const uint32_t symbol = character(c).symbol;
    if (symbol >= piece_count_ || model.pieces()[symbol].type != PieceType::kUserDefined) continue;
    for (unsigned other = 0; other < 0x80; ++other) {
      ascii_adjacency_[c][other] = ascii_adjacency_[other][c] = kApart;
    }
  }
  for (unsigned left = 0; left < 0x80; ++left) {
    for (unsigned right = 0; right < 0x100; ++right) {
      uint8_t& boundary = boundaries_[left][right];
      if (right >= 0x80 || character(right).starts_symbol || ascii_adjacency_[left][right] == kInside)
        boundary = kLook;
      else
        boundary = ascii_adjacency_[left][right] == kPiece ? kJoin : kCut;
    }
  }
  if (newline_rule_) {
    uint8_t& indent = boundaries_['\n'][' '];
    if (indent == kJoin) indent = kLook;
  } else {
    std::fill(std::begin(newline_follow_), std::end(newline_follow_), true);
  }
}

void Vocabulary::build_joins(const Model& model, const PieceIndex& index) {
  // Of every split of a piece: both sides must be symbols, else the joins never come to this pair. A user-defined
  // symbol is no side: it does not join.
  struct Pair {
    uint32_t left, right, piece;
  };
  std::vector<Pair> pairs;
  pairs.reserve(2 * model.pieces().size());
  const auto symbol = [&](std::string_view text, uint32_t first) {
    if (utf8_length(static_cast<unsigned char>(text[0])) == static_cast<int>(text.size())) {
      const uint32_t found = character(first).symbol;
      const bool joins = found >= piece_count_ || model.pieces()[found].type != PieceType::kUserDefined;
      return joins ? found : kNone;
    }
    const int32_t id = index.find(text);
    return id >= 0 && can_be_joined(model.pieces()[static_cast<size_t>(id)]) ? static_cast<uint32_t>(id) : kNone;
  };
  std::vector<uint32_t> lengths(piece_count_ + extra_characters_.size());  // of each row
  for (uint32_t id = 0; id < piece_count_; ++id) {
    const Piece& piece = model.pieces()[id];
    if (!can_be_joined(piece)) continue;
    size_t at = 0;
    const uint32_t first = next_character(piece.text, at);
    while (at < piece.text.size()) {
      const size_t split = at;
      const uint32_t next = next_character(piece.text, at);
      const uint32_t left = symbol(piece.text.substr(0, split), first);
      if (left == kNone) continue;
      const uint32_t right = symbol(piece.text.substr(split), next);
      if (right == kNone) continue;
      pairs.push_back({left, right, id});
      ++lengths[left];
    }
  }
  rows_.assign(lengths.size(), Row{0, 0});
  size_t places = 0;
  for (size_t left = 0; left < lengths.size(); ++left) {
    if (lengths[left] == 0) continue;
    const int bits = bits_for(2 * lengths[left]);
    rows_[left] = {static_cast<uint32_t>(places) & kMostPlaces, static_cast<uint32_t>(bits) & 31};
    places += size_t{1} << bits;
    if (places > kMostPlaces) throw DamagedModel("its pieces have more than 30 million ways to be joined");
  }
  joins_ = Table<Join>(places);
  std::fill(joins_.begin(), joins_.end(), Join{kNone, kNone, 0});
  for (const Pair& pair : pairs) {
    const Row row = rows_[pair.left];
    uint32_t i = first_place(row, pair.right);
    while (joins_[row.begin + i].right != kNone) i = (i + 1) & ((1u << row.bits) - 1);
    joins_[row.begin + i] = {pair.right & kNone, pair.piece & kNone, ranks_[pair.piece] & kMostRanks};
  }
  ranks_ = {};
}

}  // namespace hammer
