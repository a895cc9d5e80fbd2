#include "worker.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace hammer {
namespace {

constexpr uint32_t kUnknown = 1u << 31;  // with a character that no piece holds, in the place of a symbol
constexpr size_t kFew = 64;  // symbols up to which a scan for the best pair beats a heap

uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t hash_bytes(const char* s, size_t bytes) {
  uint64_t h = bytes * 0x9E3779B97F4A7C15u;
  for (; bytes >= 8; s += 8, bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, s, 8);
    h = mix(h ^ word, 0xA0761D6478BD642Fu);
  }
  uint64_t word = 0;
  std::memcpy(&word, s, bytes);
  return mix(h ^ word, 0xE7037ED1A0B428DBu);
}

}  // namespace

Worker::Worker(const Vocabulary& vocabulary)
    : vocabulary_(vocabulary), short_(size_t{1} << kShortBits), medium_(size_t{1} << kMediumBits) {
  wide_row_.fill(Vocabulary::kLook);
  for (unsigned c = 0; c < 256; ++c) {
    const bool plain = c < 0x80 && !vocabulary.character(c).starts_symbol;
    fresh_row_[c] = plain ? Vocabulary::kJoin : Vocabulary::kLook;
  }
}

void Worker::encode(const char* begin, const char* end, Ids& out) {
  readable_end_ = end;
  const char* p = begin;
  const char* pending = begin;  // where the first segment that is not looked up begins
  size_t n = 0;                 // ends_ known
  // What stands before p, as the row of boundaries to read: an ASCII character's own, or one of two others: nothing
  // (the text's begin, or a user-defined symbol), or a wide character, whose symbol is `left`.
  const uint8_t* row = fresh_row_.data();
  uint32_t left = 0;
  while (p < end) {
    const char* strip = p + std::min<size_t>(kStrip, end - p);
    while (p < strip) {
      const auto c = static_cast<unsigned char>(*p);
      const uint8_t boundary = row[c];
      if (boundary != Vocabulary::kLook) {
        ends_[n] = p;  // taken back by the next one unless it is a cut: cheaper than a branch that is hard to foresee
        n += boundary;
        row = vocabulary_.boundaries_after(c);
        ++p;
        continue;
      }
      int length;
      const Vocabulary::Character entry = vocabulary_.character(utf8_decode(p, length));
      if (entry.starts_symbol) {
        if (const size_t bytes = vocabulary_.match_symbol(p, end).bytes) {
          if (row != fresh_row_.data()) ends_[n++] = p;
          ends_[n++] = p += bytes;
          row = fresh_row_.data();
          continue;
        }
      }
      if (row != fresh_row_.data()) {
        ends_[n] = p;
        if (row != wide_row_.data() && c < 0x80) {
          const auto before = static_cast<unsigned char>(p[-1]);
          const Vocabulary::Adjacency adjacency = vocabulary_.adjacent_ascii(before, c);
          if (before == '\n' && c == ' ')
            n += can_cut_indent(p, end);
          else if (adjacency == Vocabulary::kInside)
            n += can_cut(begin, p, end);
          else
            n += adjacency == Vocabulary::kApart;
        } else {
          if (row != wide_row_.data()) left = vocabulary_.character(static_cast<unsigned char>(p[-1])).symbol;
          const Vocabulary::Adjacency adjacency = vocabulary_.adjacent(left, entry.symbol);
          n += adjacency == Vocabulary::kInside ? can_cut(begin, p, end) : adjacency == Vocabulary::kApart;
        }
      }
      if (c < 0x80) {
        row = vocabulary_.boundaries_after(c);
      } else {
        row = wide_row_.data();
        left = entry.symbol;
      }
      p += length;
    }
    if (n >= kStrip / 2) {
      look_up(pending, n, out);
      pending = ends_[n - 1];
      n = 0;
    }
  }
  if (n == 0 ? pending < end : ends_[n - 1] < end) ends_[n++] = end;
  look_up(pending, n, out);
}

// Whether the cut at p is safe by two characters on each side, where the inner ones stand in longer pieces only.
bool Worker::can_cut(const char* begin, const char* p, const char* end) const {
  const auto previous = [begin](const char* s) {
    do --s;
    while (s > begin && (*s & 0xC0) == 0x80);
    return s;
  };
  const auto symbol = [this](const char* s, int& bytes) { return vocabulary_.character(utf8_decode(s, bytes)).symbol; };
  int length, behind_length;
  const char* const left = previous(p);
  const uint32_t before = left > begin ? symbol(previous(left), length) : Vocabulary::kNone;
  const uint32_t right = symbol(p, length);
  const uint32_t behind = p + length < end ? symbol(p + length, behind_length) : Vocabulary::kNone;
  return !vocabulary_.may_span(before, symbol(left, length), right, behind);
}

// Whether the cut at p, between a newline and a space, is safe by what follows the spaces.
bool Worker::can_cut_indent(const char* p, const char* end) const {
  while (p < end && *p == ' ') ++p;
  return p == end ? vocabulary_.newline_rule() : !vocabulary_.newline_follow(static_cast<unsigned char>(*p));
}

void Worker::look_up(const char* begin, size_t segments, Ids& out) {
  static constexpr auto kMasks = [] {
    std::array<std::array<uint64_t, 2>, kShort + 1> masks{};
    for (size_t bytes = 1; bytes <= kShort; ++bytes) {
      masks[bytes][0] = bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1;
      masks[bytes][1] = bytes <= 8 ? 0 : (uint64_t{1} << 8 * (bytes - 8)) - 1;
    }
    return masks;
  }();
  for (size_t i = 0; i < segments; ++i) {
    Lookup& lookup = lookups_[i];
    lookup.text = begin;
    lookup.bytes = static_cast<size_t>(ends_[i] - begin);
    if (lookup.bytes <= kShort) {
      uint64_t word[2] = {};
      std::memcpy(word, begin, readable_end_ - begin >= 16 ? 16 : lookup.bytes);
      lookup.low = word[0] & kMasks[lookup.bytes][0];
      lookup.high = (word[1] & kMasks[lookup.bytes][1]) | lookup.bytes << 56;
      const uint64_t h = mix(lookup.low ^ 0x9E3779B97F4A7C15u, lookup.high ^ 0xA0761D6478BD642Fu);
      lookup.line = &short_[h & ((size_t{1} << kShortBits) - 1)];
      __builtin_prefetch(lookup.line, 1);
    } else if (lookup.bytes <= kMedium) {
      lookup.medium = &medium_[hash_bytes(begin, lookup.bytes) & ((size_t{1} << kMediumBits) - 1)];
      __builtin_prefetch(lookup.medium, 1);
    }
    begin = ends_[i];
  }
  // A segment's ids are written as four and counted as what they are: room for all of these at once.
  int32_t* at = out.make_room(kShortIds * segments);
  const auto room_for = [&](size_t bytes, size_t left) {  // the worst: U+2581 is no piece, three ids for a space
    out.resize(static_cast<size_t>(at - out.data()));
    at = out.make_room(3 * bytes + kShortIds * left);
  };
  for (size_t i = 0; i < segments; ++i) {
    const Lookup& lookup = lookups_[i];
    if (lookup.bytes <= kShort) {
      Short* entry = lookup.line->entry;
      // The count lies in the high bits of what is compared: shifted out.
      const auto differs = [&](const Short& e) { return (e.low ^ lookup.low) | ((e.high ^ lookup.high) << 4); };
      if (differs(entry[0])) {
        if (differs(entry[1])) {
          room_for(lookup.bytes, segments - i);
          const size_t count = join_segment(lookup.text, lookup.bytes, at);
          if (count <= kShortIds) {
            Short& rare = entry[1];
            rare.low = lookup.low;
            rare.high = lookup.high | static_cast<uint64_t>(count) << 60;
            std::copy_n(at, count, rare.ids);
          }
          at += count;
          continue;
        }
        std::swap(entry[0], entry[1]);
      }
      std::memcpy(at, entry[0].ids, sizeof(entry[0].ids));
      at += entry[0].high >> 60;
    } else if (lookup.bytes <= kMedium) {
      Medium& entry = *lookup.medium;
      if (entry.bytes == lookup.bytes && std::memcmp(entry.text, lookup.text, lookup.bytes) == 0) {
        room_for(lookup.bytes, segments - i);
        std::copy_n(entry.ids, entry.count, at);
        at += entry.count;
        continue;
      }
      room_for(lookup.bytes, segments - i);
      const size_t count = join_segment(lookup.text, lookup.bytes, at);
      if (count <= kMediumIds) {
        entry.bytes = static_cast<uint8_t>(lookup.bytes);
        entry.count = static_cast<uint8_t>(count);
        std::memcpy(entry.text, lookup.text, lookup.bytes);
        std::copy_n(at, count, entry.ids);
      }
      at += count;
    } else {
      room_for(lookup.bytes, segments - i);
      at += join_segment(lookup.text, lookup.bytes, at);
    }
  }
  out.resize(static_cast<size_t>(at - out.data()));
}

// The ids of one segment by joining; `out` has room for three a byte.
size_t Worker::join_segment(const char* s, size_t bytes, int32_t* out) const {
  int length;
  const uint32_t first = utf8_decode(s, length);
  if (vocabulary_.character(first).starts_symbol) {
    const Vocabulary::Match match = vocabulary_.match_symbol(s, s + bytes);
    if (match.bytes == bytes) return *out = match.id, 1;  // else the symbol does not begin here: `encode` looked
  }
  uint32_t few[kFew];
  std::vector<uint32_t> many(bytes > kFew ? bytes : 0);
  uint32_t* const symbols = bytes > kFew ? many.data() : few;
  size_t count = 0;
  for (const char* end = s + bytes; s < end; s += length) {
    const uint32_t c = utf8_decode(s, length);
    const uint32_t symbol = vocabulary_.character(c).symbol;
    symbols[count++] = symbol == Vocabulary::kNone ? kUnknown | c : symbol;
  }
  return count <= kFew ? join_few(symbols, count, out) : join_many(symbols, count, out);
}

int32_t* Worker::write_symbol(uint32_t symbol, int32_t* out) const {
  if (symbol < vocabulary_.pieces()) return *out = static_cast<int32_t>(symbol), out + 1;
  uint32_t c = symbol & kUnknown ? symbol ^ kUnknown : vocabulary_.symbol_character(symbol);
  if (c == ' ') c = 0x2581;
  char bytes[4];
  const int length = utf8_encode(c, bytes);
  for (int i = 0; i < length; ++i) *out++ = vocabulary_.byte_id(static_cast<unsigned char>(bytes[i]));
  return out;
}

// Joins in place: the pair of best rank, the leftmost of equals, until no two neighbours join.
size_t Worker::join_few(uint32_t* symbols, size_t count, int32_t* out) const {
  static_assert(kFew <= 64, "places have 6 bits");
  constexpr int32_t kNoPair = INT32_MAX;
  // Of each symbol with its right neighbour: the piece, and rank << 6 | place, whose smallest is the pair to join.
  uint32_t joined[kFew];
  int32_t keys[kFew];
  uint8_t next[kFew], previous[kFew];
  const auto look = [&](size_t left, size_t right) {
    const Vocabulary::Join join = vocabulary_.join(symbols[left], symbols[right]);
    joined[left] = join.piece;
    keys[left] = kNoPair;
    if (join.piece == Vocabulary::kNone) return;
    keys[left] = static_cast<int32_t>(join.rank << 6 | left);
    // Should the two be joined, these are asked for next.
    if (left > 0 && symbols[previous[left]] < kUnknown) vocabulary_.prefetch_join(symbols[previous[left]], join.piece);
    if (next[right] < count) vocabulary_.prefetch_join(join.piece, symbols[next[right]]);
  };
  const size_t places = (count + 7) & ~size_t{7};  // in whole vectors
  for (size_t i = 0; i < count; ++i) next[i] = static_cast<uint8_t>(i + 1), previous[i] = static_cast<uint8_t>(i - 1);
  for (size_t i = 0; i + 1 < count; ++i) look(i, i + 1);
  for (size_t i = count - 1; i < places; ++i) keys[i] = kNoPair;
  for (;;) {
    int32_t best = kNoPair;
    for (size_t i = 0; i < places; ++i) best = std::min(best, keys[i]);
    if (best == kNoPair) break;
    const size_t left = best & 63, right = next[left], behind = next[right];
    symbols[left] = joined[left];
    keys[left] = keys[right] = kNoPair;
    next[left] = static_cast<uint8_t>(behind);
    if (behind < count) {
      previous[behind] = static_cast<uint8_t>(left);
      look(left, behind);
    }
    if (left > 0) look(previous[left], left);
  }
  int32_t* at = out;
  for (size_t i = 0; i < count; i = next[i]) at = write_symbol(symbols[i], at);
  return static_cast<size_t>(at - out);
}

// The same with a heap. An entry is stale when one of its two symbols has been joined since.
size_t Worker::join_many(const uint32_t* symbols, size_t count, int32_t* out) const {
  constexpr uint32_t kEnd = UINT32_MAX, kGone = UINT32_MAX;
  struct Link {
    uint32_t symbol, previous, next;
  };
  struct Candidate {
    uint32_t rank, left, right_symbol, left_symbol;
  };
  if (count >= kEnd) throw std::bad_alloc();
  std::vector<Link> links(count);
  std::vector<Candidate> heap;
  const auto worse = [](const Candidate& a, const Candidate& b) {
    return a.rank > b.rank || (a.rank == b.rank && a.left > b.left);
  };
  const auto look = [&](uint32_t left) {
    const Link& link = links[left];
    if (link.next == kEnd) return false;
    const uint32_t right = links[link.next].symbol;
    const Vocabulary::Join join = vocabulary_.join(link.symbol, right);
    if (join.piece == Vocabulary::kNone) return false;
    heap.push_back({static_cast<uint32_t>(join.rank), left, right, link.symbol});
    return true;
  };
  for (size_t i = 0; i < count; ++i) {
    const auto at = static_cast<uint32_t>(i);
    links[i] = {symbols[i], at - 1, i + 1 < count ? at + 1 : kEnd};
  }
  for (size_t i = 0; i < count; ++i) look(static_cast<uint32_t>(i));
  std::make_heap(heap.begin(), heap.end(), worse);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const Candidate best = heap.back();
    heap.pop_back();
    Link& left = links[best.left];
    // Symbols only grow, so equal symbols are unchanged ones.
    if (left.symbol != best.left_symbol || left.next == kEnd || links[left.next].symbol != best.right_symbol) continue;
    Link& right = links[left.next];
    left.symbol = vocabulary_.join(best.left_symbol, best.right_symbol).piece;
    left.next = right.next;
    right.symbol = kGone;
    if (left.next != kEnd) links[left.next].previous = best.left;
    if (look(best.left)) std::push_heap(heap.begin(), heap.end(), worse);
    if (left.previous != kEnd && look(left.previous)) std::push_heap(heap.begin(), heap.end(), worse);
  }
  int32_t* at = out;
  for (uint32_t i = 0; i != kEnd; i = links[i].next) at = write_symbol(links[i].symbol, at);
  return static_cast<size_t>(at - out);
}

}  // namespace hammer
