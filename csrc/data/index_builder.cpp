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
constexpr int64_t kAhead = 128;

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

namespace {

// The rounds of Permutation::block, before any walk along the cycle.
HAMMER_VECTOR void network(uint64_t rows, uint64_t columns, int rounds, const uint64_t* keys, int64_t first,
                           int64_t count, int64_t* out) {
  uint64_t row[Permutation::kBlock], column[Permutation::kBlock];
  uint64_t next_row = static_cast<uint64_t>(first) / columns, next_column = static_cast<uint64_t>(first) % columns;
  for (int64_t k = 0; k < count; ++k) {
    row[k] = next_row;
    column[k] = next_column;
    if (++next_column == columns) next_column = 0, ++next_row;
  }
  for (int round = 0; round < rounds; round += 2) {
    const uint64_t even = keys[round], odd = keys[round + 1];
    for (int64_t k = 0; k < count; ++k) row[k] = Permutation::shift(row[k], column[k], even, rows);
    for (int64_t k = 0; k < count; ++k) column[k] = Permutation::shift(column[k], row[k], odd, columns);
  }
  for (int64_t k = 0; k < count; ++k) out[k] = static_cast<int64_t>(row[k] * columns + column[k]);
}

}  // namespace

void Permutation::block(int64_t first, int64_t count, int64_t* out) const {
  network(rows_, columns_, rounds_, keys_.data(), first, count, out);
  for (int64_t k = 0; k < count; ++k) {
    if (out[k] >= n_) out[k] = (*this)(out[k]);
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
void sample_index(View<Length> lengths, View<int32_t> documents, int64_t seq_length, int64_t total_tokens,
                  int64_t extra, bool drop_last, Index* out) {
  const int64_t rows = count_samples(total_tokens, seq_length, extra, drop_last) + 1;
  const int64_t full = (total_tokens - extra) / seq_length;  // rows 1..full start on a token boundary
  const int64_t n = documents.size();
  require(n >= 1, "documents must not be empty");
  static_assert(sizeof(Length) <= sizeof(Index), "an offset must fit");
  static_assert(sizeof(Length) == 4, "fewer than 2^32 lengths of 31 bits cannot add up beyond 64 bits");
  require(n < int64_t{1} << 32, "more than 2^32 documents");
  require(n - 1 <= static_cast<int64_t>(std::numeric_limits<Index>::max()),
          "documents are too many for this index type");
  out[0] = out[1] = 0;
  int64_t row = 1, start = 0, last_length = 0;
  const int64_t most = lengths.size();
  auto ask = [&](int64_t from) {
    for (int64_t k = from; k < std::min(from + kAhead, n); ++k) {
      if (documents[k] >= 0 && documents[k] < most) lengths.prefetch(documents[k]);
    }
  };
  // Boundary of row k in the stream: k * seq_length. With an extra token it needs a token of its own in this document;
  // without, it may sit on the end. An offset is at most a length, so Index holds it.
  const int64_t slack = extra == 0 ? 1 : 0;
  int64_t boundary = seq_length;
  std::array<Length, kAhead> block;
  ask(0);
  for (int64_t first = 0; first < n; first += kAhead) {
    ask(first + kAhead);
    const int64_t count = std::min(kAhead, n - first);
    Length signs = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t document = documents[first + k];
      if (document < 0 || document >= most) {
        throw std::invalid_argument("document " + std::to_string(document) + " is not in [0, " + std::to_string(most) +
                                    ")");
      }
      block[k] = lengths[document];
      signs |= block[k];
    }
    for (int64_t k = 0; signs < 0 && k < count; ++k) add_length(0, block[k], documents[first + k]);  // throws
    int64_t k = 0;
    for (; k < count && row <= full; ++k) {
      const int64_t position = first + k, end = start + block[k];
      // Most documents hold no boundary or one, at random: a row is written in any case and kept or not, no branch.
      out[2 * row] = static_cast<Index>(position);
      out[2 * row + 1] = static_cast<Index>(boundary - start);
      const int64_t inside = boundary < end + slack;
      row += inside;
      boundary += seq_length & -inside;
      for (; row <= full && boundary < end + slack; ++row, boundary += seq_length) {
        out[2 * row] = static_cast<Index>(position);
        out[2 * row + 1] = static_cast<Index>(boundary - start);
      }
      start = end;
    }
    for (; k < count; ++k) start += block[k];
    last_length = block[count - 1];
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

namespace {

// One step of either rule as its twin states it: the source of sample t (from 1) after `drawn`.
size_t chairman_step(const double* weights, const int64_t* drawn, size_t n, double slack, int64_t t) {
  const double time = static_cast<double>(t);
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
  return best == n ? lagging : best;
}

size_t greedy_step(const double* weights, const int64_t* drawn, size_t n, const int64_t* limits, int64_t t) {
  const double time = std::max(static_cast<double>(t - 1), 1.0);
  size_t best = n;
  double largest = -std::numeric_limits<double>::infinity();
  for (size_t k = 0; k < n; ++k) {
    if (limits != nullptr && drawn[k] >= limits[k]) continue;
    const double lag = weights[k] * time - static_cast<double>(drawn[k]);
    if (lag > largest) largest = lag, best = k;
  }
  require(best < n, "all sources are spent");
  return best;
}

// The fast paths compute the same decisions in 64-bit integers, a few instructions a source, and hand every step whose
// decision is closer than all rounding errors together to the functions above. So they are exact, not approximate.
constexpr int64_t kSpan = 1024;          // samples between two fresh starts from the counts, which keep errors small
constexpr int kFraction = 28;            // chairman: bits of a step
constexpr int kLagFraction = 38;         // greedy: bits of a sample
constexpr int64_t kIndexed = 8;          // a key is value * 8 + source, so that one comparison finds both
constexpr double kFar = 1 << 26;         // steps or samples beyond which a span goes the slow way, against overflow
constexpr double kTooClose = 1 << 24;    // and the same where the error bound is no longer small against a step

// Chairman: sample d of a source (from 0) may be drawn from step (d + slack) / w on and must be by (d + 1 - slack) / w;
// both stay the same while other sources are drawn, and grow by 1 / w when this one is.
// Returns how many of `count` samples it drew: less when the fast path cannot go on.
template <size_t N>
int64_t chairman_span(const double* weights, int64_t* drawn, double slack, int64_t past, int64_t count, int16_t* source,
                      int64_t* position) {
  constexpr int64_t one = int64_t{1} << kFraction;
  std::array<int64_t, N> release, key, step, key_step;
  double longest = 0;
  for (size_t k = 0; k < N; ++k) {
    const double period = 1.0 / weights[k], done = static_cast<double>(drawn[k]), start = static_cast<double>(past);
    const double open = (done + slack) / weights[k] - start, deadline = (done + (1.0 - slack)) / weights[k] - start;
    if (!(period < kFar && open > -kFar && open < kFar && deadline > -kFar && deadline < kFar)) return 0;
    longest = std::max(longest, period);
    release[k] = static_cast<int64_t>(std::llround(std::ldexp(open, kFraction)));
    key[k] = static_cast<int64_t>(std::llround(std::ldexp(deadline, kFraction))) * kIndexed + static_cast<int64_t>(k);
    step[k] = static_cast<int64_t>(std::llround(std::ldexp(period, kFraction)));
    key_step[k] = step[k] * kIndexed;
  }
  // In units of 2^-28 steps. Ours: half a unit a sum and conversion. Of the float64 rule and of the two quotients
  // above: a few times 2^-53 of the sample number and of the longest period, taken as 2^-49.
  const double bound =
      static_cast<double>(kSpan + 8) + std::ldexp(static_cast<double>(past + kSpan) + longest + 1.0, kFraction - 49);
  if (bound > kTooClose) return 0;
  const int64_t error = static_cast<int64_t>(bound);
  constexpr int64_t never = std::numeric_limits<int64_t>::max();
  int64_t now = 0;
  for (int64_t i = 0; i < count; ++i) {
    now += one;
    int64_t best = never, second = never;
    bool close = false;
    for (size_t k = 0; k < N; ++k) {
      const int64_t waited = now - release[k];
      const int64_t candidate = waited >= 0 ? key[k] : never;
      close |= static_cast<uint64_t>(waited + error) <= static_cast<uint64_t>(2 * error);
      second = std::min(second, std::max(best, candidate));
      best = std::min(best, candidate);
    }
    size_t chosen = static_cast<size_t>(best & (kIndexed - 1));
    close |= best == never || (second != never && second - best <= (2 * error + 1) * kIndexed);
    if (close) [[unlikely]] {
      chosen = chairman_step(weights, drawn, N, slack, past + i + 1);
    }
    for (size_t k = 0; k < N; ++k) {
      release[k] += k == chosen ? step[k] : 0;
      key[k] += k == chosen ? key_step[k] : 0;
    }
    if (source != nullptr) {
      source[i] = static_cast<int16_t>(chosen);
      position[i] = drawn[chosen];
    }
    ++drawn[chosen];
    if (close) [[unlikely]] {  // an odd choice may have moved a source far ahead
      if (release[chosen] > one * static_cast<int64_t>(2 * kFar)) return i + 1;
    }
  }
  return count;
}

// Greedy: all lags grow by their weight each step, and the chosen one falls by a sample.
template <size_t N>
int64_t greedy_span(const double* weights, int64_t* drawn, int64_t past, int64_t count, int16_t* source,
                    int64_t* position) {
  constexpr int64_t one = (int64_t{1} << kLagFraction) * kIndexed;
  if (past == 0) return 0;  // sample 0 has the time of sample 1
  std::array<int64_t, N> key, step;
  for (size_t k = 0; k < N; ++k) {
    const double lag = weights[k] * static_cast<double>(past) - static_cast<double>(drawn[k]);
    if (!(std::abs(lag) < 1 << 18 && weights[k] <= 1.0))
      return 0;  // with 38 + 3 bits, and kSpan more steps: below 2^63
    step[k] = static_cast<int64_t>(std::llround(std::ldexp(weights[k], kLagFraction))) * kIndexed;
    // The first source wins a tie, so it has the largest number in the key.
    key[k] = static_cast<int64_t>(std::llround(std::ldexp(lag, kLagFraction))) * kIndexed +
             (kIndexed - 1 - static_cast<int64_t>(k)) - step[k];
  }
  const double bound =
      static_cast<double>(kSpan + 8) + std::ldexp(static_cast<double>(past + kSpan), kLagFraction - 51);
  if (bound > std::ldexp(1.0, kLagFraction - 4)) return 0;
  const int64_t error = static_cast<int64_t>(bound);
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = std::numeric_limits<int64_t>::min(), second = best;
    for (size_t k = 0; k < N; ++k) {
      key[k] += step[k];
      second = std::max(second, std::min(best, key[k]));
      best = std::max(best, key[k]);
    }
    size_t chosen = static_cast<size_t>(kIndexed - 1 - (best & (kIndexed - 1)));
    if (N > 1 && best - second <= (2 * error + 1) * kIndexed) [[unlikely]] {
      chosen = greedy_step(weights, drawn, N, nullptr, past + i + 1);
    }
    for (size_t k = 0; k < N; ++k) key[k] -= k == chosen ? one : 0;
    if (source != nullptr) {
      source[i] = static_cast<int16_t>(chosen);
      position[i] = drawn[chosen];
    }
    ++drawn[chosen];
  }
  return count;
}

// Draws `count` samples, span by span by `fast` where that goes on, else by `step`.
template <class Fast, class Step>
void draw(std::vector<int64_t>& drawn, int64_t past, int64_t count, int16_t* source, int64_t* position, Fast fast,
          Step step) {
  for (int64_t i = 0; i < count;) {
    const int64_t span = std::min(kSpan, count - i);
    int64_t done =
        fast(past + i, span, source == nullptr ? nullptr : source + i, position == nullptr ? nullptr : position + i);
    for (; done < span; ++done) {
      const size_t chosen = step(past + i + done + 1);
      if (source != nullptr) {
        source[i + done] = static_cast<int16_t>(chosen);
        position[i + done] = drawn[chosen];
      }
      ++drawn[chosen];
    }
    i += span;
  }
}

}  // namespace

void chairman_blend(const std::vector<double>& weights, std::vector<int64_t>& drawn, int64_t count, int16_t* source,
                    int64_t* position) {
  const int64_t past = checked_past(weights, drawn, count);
  const size_t n = weights.size();
  for (double weight : weights) require(weight > 0, "a weight must be above zero");
  const double slack = n > 1 ? 1.0 / static_cast<double>(2 * n - 2) : 0.0;
  const double* w = weights.data();
  int64_t* d = drawn.data();
  auto fast = [&](int64_t before, int64_t span, int16_t* s, int64_t* p) -> int64_t {
    switch (n) {
      case 2: return chairman_span<2>(w, d, slack, before, span, s, p);
      case 3: return chairman_span<3>(w, d, slack, before, span, s, p);
      case 4: return chairman_span<4>(w, d, slack, before, span, s, p);
      case 5: return chairman_span<5>(w, d, slack, before, span, s, p);
      case 6: return chairman_span<6>(w, d, slack, before, span, s, p);
      case 7: return chairman_span<7>(w, d, slack, before, span, s, p);
      case 8: return chairman_span<8>(w, d, slack, before, span, s, p);
      default: return 0;  // more sources than a key has room for
    }
  };
  draw(drawn, past, count, source, position, fast, [&](int64_t t) { return chairman_step(w, d, n, slack, t); });
}

void greedy_blend(const std::vector<double>& weights, const std::vector<int64_t>& limits, std::vector<int64_t>& drawn,
                  int64_t count, int16_t* source, int64_t* position) {
  const int64_t past = checked_past(weights, drawn, count);
  const size_t n = weights.size();
  require(limits.empty() || limits.size() == n, "limits must have one entry per weight");
  const double* w = weights.data();
  int64_t* d = drawn.data();
  auto fast = [&](int64_t before, int64_t span, int16_t* s, int64_t* p) -> int64_t {
    if (!limits.empty()) return 0;
    switch (n) {
      case 2: return greedy_span<2>(w, d, before, span, s, p);
      case 3: return greedy_span<3>(w, d, before, span, s, p);
      case 4: return greedy_span<4>(w, d, before, span, s, p);
      case 5: return greedy_span<5>(w, d, before, span, s, p);
      case 6: return greedy_span<6>(w, d, before, span, s, p);
      case 7: return greedy_span<7>(w, d, before, span, s, p);
      case 8: return greedy_span<8>(w, d, before, span, s, p);
      default: return 0;
    }
  };
  const int64_t* most = limits.empty() ? nullptr : limits.data();
  draw(drawn, past, count, source, position, fast, [&](int64_t t) { return greedy_step(w, d, n, most, t); });
}

// MT19937 (Matsumoto and Nishimura, 1998), seeded by its init_genrand as RandomState(int) does.
MersenneTwister::MersenneTwister(uint32_t seed) {
  state_[0] = seed;
  for (uint32_t i = 1; i < 624; ++i) state_[i] = 1812433253u * (state_[i - 1] ^ (state_[i - 1] >> 30)) + i;
}

namespace {

// Next 624 words of the state, and what is drawn from them. Each loop reads nothing that it has written within one
// vector's width: state[k] needs words k + 1 and k + 397 of the old state, or k - 227 of the new one.
HAMMER_VECTOR void next_state(uint32_t* state, uint32_t* ready) {
  auto step = [&](int k, int after, int far) {
    const uint32_t y = (state[k] & 0x80000000u) | (state[after] & 0x7fffffffu);
    state[k] = state[far] ^ (y >> 1) ^ ((0u - (y & 1u)) & 0x9908b0dfu);
  };
#pragma GCC ivdep
  for (int k = 0; k < 227; ++k) step(k, k + 1, k + 397);
#pragma GCC ivdep
  for (int k = 227; k < 623; ++k) step(k, k + 1, k - 227);
  step(623, 0, 396);
  for (int k = 0; k < 624; ++k) {
    uint32_t y = state[k];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    ready[k] = y ^ (y >> 18);
  }
}

}  // namespace

void MersenneTwister::refill() {
  next_state(state_.data(), ready_.data());
  used_ = 0;
}

// Fisher-Yates from the end; each target by masked rejection. Targets do not depend on the values, so a block of them
// is drawn first and its memory asked for, then the swaps are made: the swaps of a large array wait for memory
// otherwise. Into the second level of the cache, which has room for more requests at a time than the first.
template <class T>
void MersenneTwister::shuffle(T* values, int64_t n) {
  require(n <= (int64_t{1} << 32), "more than 2^32 values");
  constexpr int64_t kTargets = 512;  // the best of 128 to 2048 for 50 million values
  std::array<uint32_t, kTargets + 1> target;
  for (int64_t i = n - 1; i >= 1;) {
    uint32_t mask = static_cast<uint32_t>(i);
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    const int64_t smallest = static_cast<int64_t>(mask >> 1) + 1;  // of those that have this mask
    const int64_t block = std::min(kTargets, i - smallest + 1);
    for (int64_t found = 0; found < block;) {
      if (used_ == 624) refill();
      // Whether a draw is taken is as good as random: it is always written, and kept or not without a branch.
      for (; used_ < 624 && found < block; ++used_) {
        const uint32_t value = ready_[used_] & mask;
        target[found] = value;
        found += value <= static_cast<uint32_t>(i - found);
      }
    }
    for (int64_t k = 0; k < block; ++k) HAMMER_PREFETCH(values + target[k], 1, 2);
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
