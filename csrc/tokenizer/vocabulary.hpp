// What a sentencepiece-BPE model says about text, as tables for a fast and exact encoder.
//
// sentencepiece replaces every space by U+2581 and splits the text into characters and user-defined symbols (left to
// right, longest first). As long as two neighbours join to a piece, it joins the pair of best score, the leftmost of
// equals; user-defined symbols never join. What is no piece in the end becomes the byte pieces of its UTF-8.
//
// Here a *symbol* is a number for what can stand between two joins: a piece's id, or a number from pieces() on for a
// character that occurs in pieces without being one. Text reads ' ' where sentencepiece reads U+2581.
//
// A cut between two characters is *safe* if no piece that can be made by joining spans it: then no join ever crosses
// it, joins on its two sides do not see each other, and both sides can be encoded on their own. Tables tell so
// - from the two characters alone: side by side they stand in no piece (`adjacent`);
// - from one more on each side: the two are no piece by themselves, and no longer piece with them inside has what
//   stands around them here (`may_span`);
// - behind a newline that spaces follow: all pieces with such spaces go on to one of a few characters
//   (`newline_follow`), and the text has another one there, or ends.
// Each is about pieces as text, so it holds whatever the order of joins. A filter may say that a piece is there where
// none is: then two segments stay one, which changes nothing but time.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model.hpp"
#include "table.hpp"
#include "utf8.hpp"

namespace hammer {

class Vocabulary {
 public:
  // Why this model is not for us, as a phrase; empty: it is.
  static std::string unsupported(const Model& model);

  // Throws DamagedModel where sentencepiece would refuse the model.
  explicit Vocabulary(const Model& model);

  static constexpr uint32_t kNone = (1u << 21) - 1;  // no symbol: the character occurs in no piece

  // ---- characters ----

  struct Character {
    uint32_t symbol : 21;
    uint32_t starts_symbol : 1;  // a user-defined symbol of more than one character begins with it
    uint32_t inside_symbol : 1;  // occurs in a user-defined symbol
  };
  Character character(uint32_t c) const { return pages_[page_of_[c >> 8] << 8 | (c & 0xFF)]; }

  // The id and bytes of the longest user-defined symbol at `s`; bytes 0: none.
  struct Match {
    int32_t id;
    size_t bytes;
  };
  Match match_symbol(const char* s, const char* end) const;

  // ---- cuts ----

  // How two characters stand side by side in pieces: in none, in longer ones only, or as a piece.
  enum Adjacency : uint8_t { kApart = 0, kInside = 1, kPiece = 2 };
  Adjacency adjacent(uint32_t left, uint32_t right) const {
    const uint64_t h = hash(left, right, kAny, kAny);
    const bool somewhere = adjacent_.may_hold(h), piece = two_characters_.may_hold(h);
    return static_cast<Adjacency>(somewhere + (somewhere & piece));  // no branch: text gives no hint which one it is
  }
  Adjacency adjacent_ascii(unsigned char left, unsigned char right) const { return ascii_adjacency_[left][right]; }

  // Whether a longer piece may span the cut between left and right, with `before` and `behind` around them in the text;
  // kNone where the text begins or ends.
  bool may_span(uint32_t before, uint32_t left, uint32_t right, uint32_t behind) const {
    return contexts_.may_hold(hash(left, right, before, kAny)) || contexts_.may_hold(hash(left, right, kAny, behind)) ||
           contexts_.may_hold(hash(left, right, before, behind));
  }

  // What lies between an ASCII character and the next byte.
  enum Boundary : uint8_t { kJoin = 0, kCut = 1, kLook = 2 };
  const uint8_t* boundaries_after(unsigned char ascii) const { return boundaries_[ascii]; }

  // Whether a piece can span the cut behind a newline that is followed by spaces and then by this byte; the rule says
  // that none can where the text ends behind the spaces.
  bool newline_follow(unsigned char byte) const { return newline_follow_[byte]; }
  bool newline_rule() const { return newline_rule_; }

  // ---- joining ----

  // The piece that two symbols join to, or kNone, and its rank: 0 is the best score, equal scores have equal ranks.
  struct Join {
    uint64_t right : 21, piece : 21, rank : 20;
  };
  Join join(uint32_t left, uint32_t right) const {
    constexpr Join kNothing{kNone, kNone, 0};
    if (left >= rows_.size()) return kNothing;
    const Row row = rows_[left];
    if (row.bits == 0) return kNothing;
    const uint32_t mask = (1u << row.bits) - 1;
    for (uint32_t i = first_place(row, right);; i = (i + 1) & mask) {
      const Join found = joins_[row.begin + i];
      if (found.right == right || found.right == kNone) return found;
    }
  }
  // Asks memory for what `join` will read.
  void prefetch_join(uint32_t left, uint32_t right) const {
    const Row row = rows_[left];
    __builtin_prefetch(&joins_[row.begin + first_place(row, right)]);
  }

  // ---- ids ----

  uint32_t pieces() const { return piece_count_; }
  uint32_t symbol_character(uint32_t symbol) const { return extra_characters_[symbol - piece_count_]; }
  int32_t byte_id(unsigned char byte) const { return byte_ids_[byte]; }

 private:
  // The places of one left symbol in joins_: an open hash table of 2^bits of them, at most half full. Neighbours in the
  // text are neighbours in memory, then: most rows fit into a line or two.
  struct Row {
    uint32_t begin : 27, bits : 5;
  };
  static uint32_t first_place(Row row, uint32_t right) {
    return static_cast<uint32_t>(static_cast<uint64_t>(right * 0x9E3779B1u) << row.bits >> 32);
  }

  static constexpr uint32_t kAny = 1u << 21;  // in the place of a character: the piece begins or ends before it
  static uint64_t hash(uint32_t left, uint32_t right, uint32_t before, uint32_t behind) {
    return left * 0x9E3779B97F4A7C15u + right * 0xD6E8FEB86659FD93u + before * 0xA0761D6478BD642Fu +
           behind * 0xE7037ED1A0B428DBu;
  }

  // A set that may seem to hold a few more: two bits in one word for each.
  class Filter {
   public:
    Filter() = default;
    explicit Filter(size_t words);  // or somewhat more
    void add(uint64_t h) { words_[h >> shift_] |= bits(h); }
    bool may_hold(uint64_t h) const { return (words_[h >> shift_] & bits(h)) == bits(h); }

   private:
    static uint64_t bits(uint64_t h) { return uint64_t{1} << (h >> 24 & 63) | uint64_t{1} << (h >> 30 & 63); }
    std::vector<uint64_t> words_;
    int shift_ = 63;
  };

  class PieceIndex;
  void check_pieces(const Model& model, PieceIndex& index);
  void number_characters(const Model& model);
  void rank_pieces(const Model& model);
  void find_boundaries(const Model& model);
  void build_joins(const Model& model, const PieceIndex& index);
  void build_symbols(const Model& model);
  Character& character_entry(uint32_t c);

  uint32_t piece_count_ = 0;
  std::vector<uint16_t> page_of_;
  std::vector<Character> pages_;
  std::vector<uint32_t> extra_characters_;
  int32_t byte_ids_[256] = {};

  Filter adjacent_, two_characters_, contexts_;
  uint8_t boundaries_[128][256] = {};
  Adjacency ascii_adjacency_[128][128] = {};
  bool newline_follow_[256] = {}, newline_rule_ = true;

  std::vector<Row> rows_;        // of each symbol as the left one
  Table<Join> joins_;            // in rows
  std::vector<uint32_t> ranks_;  // for the time of building

  struct Node {  // of a trie over the bytes of user-defined symbols
    unsigned char byte;
    int32_t id;  // -1: no symbol ends here
    int32_t child, sibling;
  };
  std::vector<Node> trie_;
  int32_t first_node_[256];
};

}  // namespace hammer
