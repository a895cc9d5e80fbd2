#include "index_builder.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace hammer {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

int64_t add_length(int64_t sum, int64_t length, int64_t document) {
  if (length < 0) {
    throw std::invalid_argument("length " + std::to_string(length) + " of document " + std::to_string(document) +
                                " is negative");
  }
  if (sum > std::numeric_limits<int64_t>::max() - length) {
    throw std::invalid_argument("the lengths sum up beyond 64 bits at document " + std::to_string(document));
  }
  return sum + length;
}

// Documents whose lengths are asked for ahead of their use: random reads of a large array wait for memory otherwise.
constexpr int64_t kAhead = 64;

}  // namespace

Permutation::Permutation(int64_t n, uint64_t key) : n_(n), rounds_(n < (1 << 16) ? kMostRounds : 8) {
  require(n >= 0 && n <= kLargest, "n must be in [0, 2^60]");
  uint64_t rows = static_cast<uint64_t>(std::sqrt(static_cast<double>(n)));
  while (rows * rows < static_cast<uint64_t>(n)) ++rows;  // the square root of a large n may be rounded either way
  while (rows > 1 && (rows - 1) * (rows - 1) >= static_cast<uint64_t>(n)) --rows;
  rows_ = std::max<uint64_t>(rows, 1);
  columns_ = std::max<uint64_t>((static_cast<uint64_t>(n) + rows_ - 1) / rows_, 1);
  for (auto& round_key : keys_) {
    key += 0x9E3779B97F4A7C15u;
    uint64_t z = key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    round_key = z ^ (z >> 31);
  }
}

void permute(int64_t n, uint64_t key, int64_t start, int64_t count, int64_t* out) {
  const Permutation permutation(n, key);
  require(start >= 0 && count >= 0 && start <= n && count <= n - start, "start and count must stay within [0, n)");
  for (int64_t i = 0; i < count; i += Permutation::kBlock) {
    permutation.block(start + i, std::min(Permutation::kBlock, count - i), out + i);
  }
}

template <class Length>
std::vector<int64_t> epoch_marks(View<Length> lengths, uint64_t key, int64_t stride) {
  require(stride >= 1, "stride must be at least 1");
  const int64_t n = lengths.size();
  const Permutation permutation(n, key);
  std::vector<int64_t> marks;
  marks.reserve(static_cast<size_t>(n / stride + 2));
  std::array<int64_t, Permutation::kBlock> now, next;
  int64_t ready = std::min(Permutation::kBlock, n), sum = 0;
  permutation.block(0, ready, now.data());
  for (int64_t done = 0; done < n;) {
    const int64_t following = std::min(Permutation::kBlock, n - done - ready);
    permutation.block(done + ready, following, next.data());
    for (int64_t k = 0; k < following; ++k) lengths.prefetch(next[k]);
    for (int64_t k = 0; k < ready; ++k) {
      if ((done + k) % stride == 0) marks.push_back(sum);
      sum = add_length(sum, lengths[now[k]], now[k]);
    }
    done += ready;
    ready = following;
    std::swap(now, next);
  }
  marks.push_back(sum);
  return marks;
}

template <class Length>
std::vector<Piece> find_pieces(View<Length> lengths, View<int64_t> marks, int64_t stride, uint64_t key, int64_t offset,
                               int64_t count) {
  require(stride >= 1, "stride must be at least 1");
  const int64_t n = lengths.size();
  const int64_t blocks = n / stride + (n % stride != 0);
  require(marks.size() == blocks + 1, "marks do not belong to these lengths");
  require(offset >= 0 && offset <= marks[blocks] && count >= 0, "offset or count is out of range");
  int64_t low = 0, high = blocks;  // the last mark at or before offset
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (marks[middle] <= offset ? low : high) = middle;
  }
  int64_t skip = offset - marks[low];
  const Permutation permutation(n, key);
  std::vector<Piece> pieces;
  std::array<int64_t, Permutation::kBlock> documents;
  for (int64_t position = low * stride; position < n && count > 0;) {
    const int64_t ready = std::min(Permutation::kBlock, n - position);
    permutation.block(position, ready, documents.data());
    for (int64_t k = 0; k < ready; ++k) lengths.prefetch(documents[k]);
    for (int64_t k = 0; k < ready && count > 0; ++k) {
      const int64_t length = lengths[documents[k]];
      require(length >= 0, "a length is negative");
      if (skip >= length) {  // also passes over empty documents
        skip -= length;
        continue;
      }
      const int64_t taken = std::min(length - skip, count);
      pieces.push_back({documents[k], skip, taken});
      count -= taken;
      skip = 0;
    }
    position += ready;
  }
  return pieces;
}

int64_t count_samples(int64_t total_tokens, int64_t seq_length, int64_t extra, bool drop_last) {
  require(seq_length >= 1, "seq_length must be at least 1");
  require(extra == 0 || extra == 1, "extra must be 0 or 1");
  require(total_tokens >= extra, "total_tokens must be at least extra");
  const int64_t usable = total_tokens - extra;
  return usable / seq_length + (!drop_last && usable % seq_length != 0);
}

template <class Index, class Length>
void sample_index(View<Length> lengths, View<int32_t> documents, int64_t seq_length, int64_t total_tokens, int64_t extra,
                  bool drop_last, Index* out) {
  const int64_t rows = count_samples(total_tokens, seq_length, extra, drop_last) + 1;
  const int64_t full = (total_tokens - extra) / seq_length;  // rows 1..full start on a token boundary
  const int64_t n = documents.size();
  require(n >= 1, "documents must not be empty");
  require(n - 1 <= static_cast<int64_t>(std::numeric_limits<Index>::max()), "documents are too many for this index type");
  auto document_at = [&](int64_t position) {
    const int64_t document = documents[position];
    if (document < 0 || document >= lengths.size()) {
      throw std::invalid_argument("document " + std::to_string(document) + " is not in [0, " +
                                  std::to_string(lengths.size()) + ")");
    }
    return document;
  };
  out[0] = out[1] = 0;
  int64_t row = 1, start = 0, last_length = 0;
  int64_t boundary = full >= 1 ? seq_length : std::numeric_limits<int64_t>::max();  // where row begins in the stream
  for (int64_t position = 0; position < n; ++position) {
    if (position + kAhead < n) {
      const int64_t ahead = documents[position + kAhead];
      if (ahead >= 0 && ahead < lengths.size()) lengths.prefetch(ahead);
    }
    const int64_t document = document_at(position);
    last_length = lengths[document];
    const int64_t end = add_length(start, last_length, document);
    // With an extra token a boundary needs a token of its own in this document; without, it may sit on the end.
    while (boundary < end || (extra == 0 && boundary == end)) {
      require(boundary - start <= static_cast<int64_t>(std::numeric_limits<Index>::max()),
              "an offset is too large for this index type");
      out[2 * row] = static_cast<Index>(position);
      out[2 * row + 1] = static_cast<Index>(boundary - start);
      ++row;
      boundary = row <= full ? boundary + seq_length : std::numeric_limits<int64_t>::max();
    }
    start = end;
  }
  require(total_tokens <= start, "total_tokens is more than the documents hold");
  require(drop_last || total_tokens == start, "total_tokens must be what the documents hold when drop_last is off");
  if (row < rows) {  // the partial sample that drop_last = false keeps
    out[2 * row] = static_cast<Index>(n - 1);
    out[2 * row + 1] = static_cast<Index>(last_length - extra);
  }
}

namespace {

int64_t checked_past(const std::vector<double>& weights, const std::vector<int64_t>& drawn, int64_t count) {
  require(!weights.empty(), "weights must not be empty");
  require(weights.size() <= static_cast<size_t>(std::numeric_limits<int16_t>::max()), "too many sources");
  require(drawn.size() == weights.size(), "drawn must have one count per weight");
  require(count >= 0, "count must not be negative");
  for (double weight : weights) require(weight >= 0 && std::isfinite(weight), "a weight is negative or not finite");
  int64_t past = 0;
  for (size_t k = 0; k < drawn.size(); ++k) past = add_length(past, drawn[k], static_cast<int64_t>(k));
  // 2^53: beyond it a sample number is no longer exact in float64.
  require(past <= (int64_t{1} << 53) - count, "too many samples");
  return past;
}

}  // namespace

void chairman_blend(const std::vector<double>& weights, std::vector<int64_t>& drawn, int64_t count, int16_t* source,
                    int64_t* position) {
  int64_t t = checked_past(weights, drawn, count);
  const size_t n = weights.size();
  for (double weight : weights) require(weight > 0, "a weight must be above zero");
  const double slack = n > 1 ? 1.0 / static_cast<double>(2 * n - 2) : 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double time = static_cast<double>(++t);
    size_t best = n, lagging = 0;
    double best_deadline = 0, largest_lag = -std::numeric_limits<double>::infinity();
    for (size_t k = 0; k < n; ++k) {
      const double lag = weights[k] * time - static_cast<double>(drawn[k]);
      if (lag > largest_lag) largest_lag = lag, lagging = k;
      if (lag >= slack) {
        const double deadline = ((1.0 - slack) - lag) / weights[k];  // how many steps the source can still wait
        if (best == n || deadline < best_deadline) best = k, best_deadline = deadline;
      }
    }
    // In exact arithmetic some source is always eligible; when rounding says none, the one that lags most is.
    if (best == n) best = lagging;
    source[i] = static_cast<int16_t>(best);
    position[i] = drawn[best]++;
  }
}

void greedy_blend(const std::vector<double>& weights, const std::vector<int64_t>& limits, std::vector<int64_t>& drawn,
                  int64_t count, int16_t* source, int64_t* position) {
  int64_t t = checked_past(weights, drawn, count);
  const size_t n = weights.size();
  require(limits.empty() || limits.size() == n, "limits must have one entry per weight");
  for (int64_t i = 0; i < count; ++i, ++t) {
    const double time = std::max(static_cast<double>(t), 1.0);
    size_t best = n;
    double largest = -std::numeric_limits<double>::infinity();
    for (size_t k = 0; k < n; ++k) {
      if (!limits.empty() && drawn[k] >= limits[k]) continue;
      const double lag = weights[k] * time - static_cast<double>(drawn[k]);
      if (lag > largest) largest = lag, best = k;
    }
    require(best < n, "all sources are spent");
    source[i] = static_cast<int16_t>(best);
    position[i] = drawn[best]++;
  }
}

// MT19937 (Matsumoto and Nishimura, 1998), seeded by its init_genrand as RandomState(int) does.
MersenneTwister::MersenneTwister(uint32_t seed) {
  state_[0] = seed;
  for (uint32_t i = 1; i < 624; ++i) state_[i] = 1812433253u * (state_[i - 1] ^ (state_[i - 1] >> 30)) + i;
}

void MersenneTwister::refill() {
  for (int k = 0; k < 624; ++k) {
    const uint32_t y = (state_[k] & 0x80000000u) | (state_[(k + 1) % 624] & 0x7fffffffu);
    state_[k] = state_[(k + 397) % 624] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
  }
  used_ = 0;
}

uint32_t MersenneTwister::next() {
  if (used_ == 624) refill();
  uint32_t y = state_[used_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

// Fisher-Yates from the end; each target by masked rejection. Targets do not depend on the values, so a block of them is
// drawn first and its memory asked for, then the swaps are made: the swaps of a large array wait for memory otherwise.
template <class T>
void MersenneTwister::shuffle(T* values, int64_t n) {
  require(n <= (int64_t{1} << 32), "more than 2^32 values");
  std::array<uint32_t, 128> target;
  for (int64_t i = n - 1; i >= 1;) {
    const int64_t block = std::min<int64_t>(i, static_cast<int64_t>(target.size()));
    for (int64_t k = 0; k < block; ++k) {
      const uint32_t largest = static_cast<uint32_t>(i - k);
      uint32_t mask = largest;
      for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
      uint32_t value;
      do value = next() & mask;
      while (value > largest);
      target[k] = value;
#if defined(__GNUC__)
      __builtin_prefetch(values + value, 1, 0);
#endif
    }
    for (int64_t k = 0; k < block; ++k) std::swap(values[i - k], values[target[k]]);
    i -= block;
  }
}

template std::vector<int64_t> epoch_marks(View<int32_t>, uint64_t, int64_t);
template std::vector<int64_t> epoch_marks(View<int64_t>, uint64_t, int64_t);
template std::vector<Piece> find_pieces(View<int32_t>, View<int64_t>, int64_t, uint64_t, int64_t, int64_t);
template std::vector<Piece> find_pieces(View<int64_t>, View<int64_t>, int64_t, uint64_t, int64_t, int64_t);
template void sample_index(View<int32_t>, View<int32_t>, int64_t, int64_t, int64_t, bool, int32_t*);
template void sample_index(View<int32_t>, View<int32_t>, int64_t, int64_t, int64_t, bool, int64_t*);
template void MersenneTwister::shuffle(uint32_t*, int64_t);
template void MersenneTwister::shuffle(uint64_t*, int64_t);

}  // namespace hammer
