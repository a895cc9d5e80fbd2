// One thread's encoder: cuts UTF-8 into segments and turns each into ids, by its caches or by joining.

#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "table.hpp"
#include "vocabulary.hpp"

namespace hammer {

// Ids that grow at the end; room is not initialised.
class Ids {
 public:
  Ids() = default;
  Ids(Ids&& other) noexcept { swap(other); }
  Ids& operator=(Ids&& other) noexcept { return swap(other), *this; }
  ~Ids() { std::free(data_); }

  int32_t* data() const { return data_; }
  size_t size() const { return size_; }
  void resize(size_t size) { size_ = size; }  // within the room
  int32_t* make_room(size_t more) {
    if (capacity_ - size_ < more) {
      const size_t capacity = size_ + more + capacity_ / 2 + 1024;
      auto* data = static_cast<int32_t*>(std::realloc(data_, capacity * sizeof(int32_t)));
      if (data == nullptr) throw std::bad_alloc();
      data_ = data, capacity_ = capacity;
    }
    return data_ + size_;
  }
  void push_back(int32_t id) { *make_room(1) = id, ++size_; }
  int32_t* release() {
    int32_t* data = data_;
    data_ = nullptr, size_ = capacity_ = 0;
    return data;
  }

 private:
  void swap(Ids& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }
  int32_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

class Worker {
 public:
  explicit Worker(const Vocabulary& vocabulary);

  // Appends the ids of [begin, end): valid UTF-8 with ' ' for U+2581, cut safely at both ends.
  void encode(const char* begin, const char* end, Ids& out);

 private:
  static constexpr size_t kStrip = 256;    // bytes that are cut before their segments are looked up
  static constexpr size_t kShort = 15;     // bytes of a segment in the first cache, and its ids
  static constexpr size_t kShortIds = 4;
  static constexpr size_t kMedium = 38;    // of the second
  static constexpr size_t kMediumIds = 6;
  static constexpr int kShortBits = 17;    // lines of the first: 8 MB
  static constexpr int kMediumBits = 14;   // entries of the second: 1 MB

  struct Short {
    uint64_t low, high;  // the segment's bytes, zeros, then a byte: ids << 4 | bytes. All zero: empty
    int32_t ids[kShortIds];
  };
  struct alignas(64) Line {
    Short entry[2];
  };
  struct alignas(64) Medium {
    uint8_t bytes, count;  // 0 bytes: empty
    char text[kMedium];
    int32_t ids[kMediumIds];
  };
  struct Lookup {
    uint64_t low, high;
    union {
      Line* line;
      Medium* medium;
    };
    const char* text;
    size_t bytes;
  };

  bool can_cut(const char* begin, const char* p, const char* end) const;
  bool can_cut_indent(const char* p, const char* end) const;
  void look_up(const char* begin, size_t segments, Ids& out);
  size_t join_segment(const char* s, size_t bytes, int32_t* out) const;
  size_t join_few(uint32_t* symbols, size_t count, int32_t* out) const;
  size_t join_many(const uint32_t* symbols, size_t count, int32_t* out) const;
  int32_t* write_symbol(uint32_t symbol, int32_t* out) const;

  const Vocabulary& vocabulary_;
  Table<Line> short_;
  Table<Medium> medium_;
  const char* readable_end_ = nullptr;
  std::array<const char*, 2 * kStrip + 16> ends_;
  std::array<Lookup, 2 * kStrip + 16> lookups_;
  std::array<uint8_t, 256> fresh_row_, wide_row_;
};

}  // namespace hammer
