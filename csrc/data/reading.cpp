#include "reading.hpp"

#include <algorithm>
#include <string>

namespace hammer {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// The last mark at or before `offset`. Marks grow almost evenly, so the search starts where `offset` would be if they
// did, and stays within a few cache lines instead of jumping through the whole array.
int64_t find_mark(View<int64_t> marks, int64_t blocks, int64_t offset) {
  const double share = static_cast<double>(offset) / std::max(static_cast<double>(marks[blocks]), 1.0);
  int64_t low = std::clamp<int64_t>(static_cast<int64_t>(share * static_cast<double>(blocks)), 0, blocks - 1);
  int64_t step = 8, high;  // one cache line at first
  while (low > 0 && marks[low] > offset) low = std::max<int64_t>(low - step, 0), step *= 2;
  step = 8;
  high = low + 1;
  while (high < blocks && marks[high] <= offset) low = high, high = std::min(high + step, blocks), step *= 2;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (marks[middle] <= offset ? low : high) = middle;
  }
  return low;
}

// A window that has been found in the marks and whose first documents' lengths have been asked for.
struct Prepared {
  int64_t skip = 0, position = 0, ready = 0;
  std::array<int64_t, Permutation::kBlock> documents;
};

// Documents looked at together: a window is found among `stride` documents, and most are not longer than some
// thousands.
constexpr int64_t kTogether = 16;

}  // namespace

template <class Length>
Located locate_windows(View<Length> lengths, View<int64_t> marks, int64_t stride, uint64_t key, View<int64_t> offsets,
                       int64_t count) {
  require(stride >= 1, "stride must be at least 1");
  const int64_t n = lengths.size();
  const int64_t blocks = n / stride + (n % stride != 0);
  require(marks.size() == blocks + 1, "marks do not belong to these lengths");
  require(count >= 0, "count must not be negative");
  const Permutation permutation(n, key);
  Located found;
  found.counts.reserve(static_cast<size_t>(offsets.size()));

  auto fetch = [&](Prepared& window) {
    window.ready = std::min(kTogether, n - window.position);
    permutation.block(window.position, window.ready, window.documents.data());
    for (int64_t k = 0; k < window.ready; ++k) lengths.prefetch(window.documents[k]);
  };
  auto prepare = [&](Prepared& window, int64_t offset) {
    require(offset >= 0 && offset <= marks[blocks], "an offset is out of range");
    if (n == 0) return;
    const int64_t mark = find_mark(marks, blocks, offset);
    window.skip = offset - marks[mark];
    window.position = mark * stride;
    fetch(window);
  };
  std::array<Prepared, 2> windows;
  if (offsets.size() > 0) prepare(windows[0], offsets[0]);
  for (int64_t r = 0; r < offsets.size(); ++r) {
    Prepared& window = windows[r % 2];
    if (r + 1 < offsets.size()) prepare(windows[(r + 1) % 2], offsets[r + 1]);
    const size_t before = found.pieces.size();
    for (int64_t missing = count; window.position < n && missing > 0;) {
      for (int64_t k = 0; k < window.ready && missing > 0; ++k) {
        const int64_t length = lengths[window.documents[k]];
        require(length >= 0, "a length is negative");
        if (window.skip >= length) {  // also passes over empty documents
          window.skip -= length;
          continue;
        }
        const int64_t taken = std::min(length - window.skip, missing);
        found.pieces.push_back({window.documents[k], window.skip, taken});
        missing -= taken;
        window.skip = 0;
      }
      window.position += window.ready;
      if (missing > 0 && window.position < n) fetch(window);
    }
    found.counts.push_back(static_cast<int64_t>(found.pieces.size() - before));
  }
  return found;
}

template <class Index>
Located megatron_windows(View<int32_t> lengths, View<int32_t> documents, View<Index> samples, View<int64_t> windows,
                         int64_t extra) {
  require(samples.size() >= 2 && samples.size() % 2 == 0, "samples must be rows of two");
  require(extra == 0 || extra == 1, "extra must be 0 or 1");
  const int64_t count = samples.size() / 2 - 1;
  Located found;
  found.counts.reserve(static_cast<size_t>(windows.size()));
  for (int64_t r = 0; r < windows.size(); ++r) {
    if (r + 4 < windows.size()) {  // rows of the windows to come
      const int64_t ahead = windows[r + 4];
      if (ahead >= 0 && ahead < count) samples.prefetch(2 * ahead), samples.prefetch(2 * ahead + 3);
    }
    if (r + 2 < windows.size()) {  // then what they point to
      const int64_t ahead = windows[r + 2];
      if (ahead >= 0 && ahead < count) {
        const int64_t position = samples[2 * ahead];
        if (position >= 0 && position < documents.size()) documents.prefetch(position);
      }
    }
    const int64_t window = windows[r];
    require(window >= 0 && window < count, "a window is out of range");
    const int64_t first = samples[2 * window], begin = samples[2 * window + 1];
    const int64_t last = samples[2 * window + 2], end = samples[2 * window + 3];
    require(first >= 0 && first <= last && last < documents.size(), "samples do not belong to these documents");
    for (int64_t position = first; position <= last; ++position) {
      const int64_t sequence = documents[position];
      require(sequence >= 0 && sequence < lengths.size(), "documents do not belong to these lengths");
      lengths.prefetch(sequence);
    }
    const size_t before = found.pieces.size();
    for (int64_t position = first; position <= last; ++position) {
      const int64_t sequence = documents[position], length = lengths[sequence];
      const int64_t start = position == first ? begin : 0, stop = position == last ? end + extra : length;
      require(start >= 0 && stop <= length, "samples do not belong to these lengths");
      if (stop > start) found.pieces.push_back({sequence, start, stop - start});
    }
    found.counts.push_back(static_cast<int64_t>(found.pieces.size() - before));
  }
  return found;
}

namespace {

template <class Token, class Out>
HAMMER_VECTOR void convert(const Token* __restrict from, int64_t count, Out* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Out>(from[i]);
}

constexpr int64_t kLine = 64;      // bytes of a cache line
constexpr int64_t kPieceAhead = 8;  // pieces whose byte offset is asked for ahead

}  // namespace

template <class Token, class Out>
void copy_windows(const Token* tokens, int64_t num_tokens, const Places& places, View<int64_t> pieces,
                  View<int64_t> counts, View<int64_t> rows, int64_t width, int64_t size, Out* out) {
  require(pieces.size() % 3 == 0, "pieces must be rows of three");
  require(rows.size() == counts.size(), "rows must have one entry per window");
  require(places.item_size == static_cast<int64_t>(sizeof(Token)), "the tokens have another size");
  const int64_t total = pieces.size() / 3;

  // Sequence of a piece, or -1.
  auto sequence_of = [&](int64_t piece) -> int64_t {
    int64_t unit = pieces[3 * piece];
    if (places.boundaries.size() > 0) {
      if (unit < 0 || unit >= places.boundaries.size()) return -1;
      unit = places.boundaries[unit];
    }
    return unit >= 0 && unit < places.pointers.size() ? unit : -1;
  };
  // First token of a piece after all checks.
  auto start_of = [&](int64_t piece) {
    const int64_t sequence = sequence_of(piece), offset = pieces[3 * piece + 1], length = pieces[3 * piece + 2];
    require(sequence >= 0, "a piece is of a document that is not there");
    const int64_t pointer = places.pointers[sequence];
    require(pointer >= 0 && pointer % places.item_size == 0, "a byte offset cannot be");
    const int64_t base = pointer / places.item_size;
    require(offset >= 0 && length >= 0 && base <= num_tokens && offset <= num_tokens - base &&
                length <= num_tokens - base - offset,
            "a piece reaches beyond the tokens");
    return base + offset;
  };
  for (int64_t k = 0; k < std::min(kPieceAhead, total); ++k) {
    const int64_t sequence = sequence_of(k);
    if (sequence >= 0) places.pointers.prefetch(sequence);
  }
  int64_t piece = 0, start = total > 0 ? start_of(0) : 0;
  for (int64_t r = 0; r < counts.size(); ++r) {
    const int64_t count = counts[r], row = rows[r];
    require(count >= 0 && count <= total - piece, "counts do not belong to these pieces");
    require(row >= 0 && row < size, "a row is out of range");
    Out* to = out + row * width;
    int64_t filled = 0;
    for (const int64_t last = piece + count; piece < last; ++piece) {
      const int64_t from = start, length = pieces[3 * piece + 2];
      if (piece + kPieceAhead < total) {
        const int64_t sequence = sequence_of(piece + kPieceAhead);
        if (sequence >= 0) places.pointers.prefetch(sequence);
      }
      if (piece + 1 < total) {
        start = start_of(piece + 1);
        const char* line = reinterpret_cast<const char*>(tokens + start);
        const char* end = reinterpret_cast<const char*>(tokens + start + std::min(pieces[3 * piece + 5], width));
        for (; line < end; line += kLine) HAMMER_PREFETCH(line, 0, 2);
      }
      require(length <= width - filled, "a window has more tokens than a row");
      convert(tokens + from, length, to + filled);
      filled += length;
    }
    require(filled == width, "a window has fewer tokens than a row");
  }
  require(piece == total, "counts do not belong to these pieces");
}

template Located locate_windows(View<int32_t>, View<int64_t>, int64_t, uint64_t, View<int64_t>, int64_t);
template Located locate_windows(View<int64_t>, View<int64_t>, int64_t, uint64_t, View<int64_t>, int64_t);
template Located megatron_windows(View<int32_t>, View<int32_t>, View<int32_t>, View<int64_t>, int64_t);
template Located megatron_windows(View<int32_t>, View<int32_t>, View<int64_t>, View<int64_t>, int64_t);

#define HAMMER_COPY(Token, Out)                                                                                 \
  template void copy_windows(const Token*, int64_t, const Places&, View<int64_t>, View<int64_t>, View<int64_t>, \
                             int64_t, int64_t, Out*);
#define HAMMER_COPIES(Token) HAMMER_COPY(Token, int32_t) HAMMER_COPY(Token, int64_t)
HAMMER_COPIES(uint8_t)
HAMMER_COPIES(int8_t)
HAMMER_COPIES(int16_t)
HAMMER_COPIES(uint16_t)
HAMMER_COPIES(int32_t)
HAMMER_COPY(int64_t, int64_t)

}  // namespace hammer
