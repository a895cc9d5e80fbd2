// Sample index, keyed permutation and blending for indexed datasets. No torch, no CUDA, no Python.
//
// Everything here is deterministic and single-threaded; the NumPy twins in sampling/index_builder_numpy.py state the
// same functions in a few lines each and give identical results. Counts and offsets are int64_t throughout.
//
//   Permutation      p: [0, n) -> [0, n), a bijection chosen by a 64-bit key, O(1) memory, random access
//   epoch_marks      marks[m] = tokens before document position m * stride of a permuted epoch; reads n lengths
//   find_pieces      which (document, offset, length) hold tokens [offset, offset + count) of a permuted epoch
//   sample_index     row k = (position in documents, offset) of token k * seq_length of the document stream
//   chairman_blend   Tijdeman's chairman assignment (1980): every prefix of the mix is off by less than one sample
//   greedy_blend     Megatron-LM's rule: the source that lags most, argmax of w * max(i, 1) - drawn
//   MersenneTwister  shuffles exactly as numpy.random.RandomState(seed).shuffle does
//
// Functions throw std::invalid_argument on bad values, so that no input leads to undefined behaviour.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(__GNUC__)
#define HAMMER_PREFETCH(address, write, locality) __builtin_prefetch(address, write, locality)
#else
#define HAMMER_PREFETCH(address, write, locality) ((void)(address))
#endif

// Loops over blocks of integers come in several versions, and the loader takes the widest that the machine has. Not in
// sanitizer builds, whose runtime is not up yet when the loader asks.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(HAMMER_ONE_VERSION)
#define HAMMER_VECTOR __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define HAMMER_VECTOR
#endif

namespace hammer {

// A read-only array that may be unaligned: an .idx file puts int32 at byte 34. memcpy compiles to a plain load.
template <class T>
class View {
 public:
  View(const void* data, int64_t size) : data_(static_cast<const unsigned char*>(data)), size_(size) {}
  int64_t size() const { return size_; }
  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, data_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  // Into the second level of the cache, which has room for more requests at a time than the first.
  void prefetch(int64_t i) const { HAMMER_PREFETCH(data_ + i * static_cast<int64_t>(sizeof(T)), 0, 2); }

 private:
  const unsigned char* data_;
  int64_t size_;
};

// A generalised Feistel network over rows x columns >= n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
// 2002): rows = ceil(sqrt(n)), columns = ceil(n / rows), so at most rows - 1 points lie outside [0, n) and a walk along
// the cycle (apply again while outside) is rarely needed. Rounds alternate
//     row += f(column) mod rows,    column += f(row) mod columns
// with f(x) = high half of a two-multiply hash of x xor the round key, scaled to the modulus; round keys come from
// splitmix64. Eight rounds; 24 below 2^16, where few rows leave a round little to choose from: with eight, the 120
// orders of five values came out visibly uneven. Not cryptographic: it has to look random, not to hide anything.
class Permutation {
 public:
  Permutation(int64_t n, uint64_t key);

  int64_t operator()(int64_t i) const {
    do {
      uint64_t row = static_cast<uint64_t>(i) / columns_, column = static_cast<uint64_t>(i) % columns_;
      for (int round = 0; round < rounds_; round += 2) {
        row = shift(row, column, keys_[round], rows_);
        column = shift(column, row, keys_[round + 1], columns_);
      }
      i = static_cast<int64_t>(row * columns_ + column);
    } while (i >= n_);
    return i;
  }

  static constexpr int64_t kBlock = 64;

  // Values first to first + count, count at most kBlock. One value waits for its own multiplications most of the time;
  // a block of them, round by round, does not, and is vectorised: 3 to 9 instead of 29 ns a value.
  void block(int64_t first, int64_t count, int64_t* out) const;

  static constexpr int kMostRounds = 24;
  static constexpr int64_t kLargest = int64_t{1} << 60;  // keeps rows and columns below 2^31

  // side + f(other) mod modulus
  static uint64_t shift(uint64_t side, uint64_t other, uint64_t key, uint64_t modulus) {
    uint64_t x = (other ^ key) * 0xD6E8FEB86659FD93u;  // odd multipliers of published mixers; any good pair would do
    x ^= x >> 32;
    x *= 0xFF51AFD7ED558CCDu;
    side += ((x >> 32) * modulus) >> 32;
    return side >= modulus ? side - modulus : side;
  }

 private:
  int64_t n_;
  uint64_t rows_, columns_;
  int rounds_;
  std::array<uint64_t, kMostRounds> keys_;
};

void permute(int64_t n, uint64_t key, int64_t start, int64_t count, int64_t* out);

// Length is int32_t (sequence lengths of an .idx) or int64_t (documents of several sequences).
template <class Length>
std::vector<int64_t> epoch_marks(View<Length> lengths, uint64_t key, int64_t stride);

struct Piece {
  int64_t document, offset, length;
};

// Stops early at the end of the epoch.
template <class Length>
std::vector<Piece> find_pieces(View<Length> lengths, View<int64_t> marks, int64_t stride, uint64_t key, int64_t offset,
                               int64_t count);

// Number of samples; the index has one row more.
int64_t count_samples(int64_t total_tokens, int64_t seq_length, int64_t extra, bool drop_last);

// Index is the type of the result; out has room for 2 * (count_samples(...) + 1) values.
template <class Index, class Length>
void sample_index(View<Length> lengths, View<int32_t> documents, int64_t seq_length, int64_t total_tokens,
                  int64_t extra, bool drop_last, Index* out);

// Both draw the next `count` samples of an endless mix whose past is `drawn`, and advance `drawn`. With null pointers
// only the counts are wanted.
void chairman_blend(const std::vector<double>& weights, std::vector<int64_t>& drawn, int64_t count, int16_t* source,
                    int64_t* position);
// limits: most samples of each source (empty: no limits); a source leaves the contest once it is spent.
void greedy_blend(const std::vector<double>& weights, const std::vector<int64_t>& limits, std::vector<int64_t>& drawn,
                  int64_t count, int16_t* source, int64_t* position);

class MersenneTwister {
 public:
  explicit MersenneTwister(uint32_t seed);
  template <class T>
  void shuffle(T* values, int64_t n);

 private:
  void refill();
  std::array<uint32_t, 624> state_;
  std::array<uint32_t, 624> ready_;  // the state, tempered: what is drawn
  int used_ = 624;
};

}  // namespace hammer
