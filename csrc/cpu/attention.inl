// Causal attention with query groups, forward and backward, compiled once for each instruction set (vectors.inl says
// what the including file sets).
//
// One thread takes one (document, batch, query group) at a time: nothing is summed across threads, so the result does
// not depend on their number. Keys and values of a group are packed once and serve all heads of the group. As in
// FlashAttention (arXiv 2307.08691) scores live only in blocks, the forward pass keeps one number a row (`lse`), and
// the backward pass computes the probabilities again. Everything is held transposed (rows are keys, columns are
// queries):
//
//   forward    S^T = K Q^T    P^T = 2^(S^T c - m)              O^T  = V^T P^T
//   backward   S^T, P^T = 2^((S^T - lse) c)                    dV  += P^T dO
//              dP^T = V dO^T  dS^T = P^T (dP^T - delta)        dK  += dS^T Q       dQ^T += K^T dS^T
//
// with c = scale log2(e): the numbers of a query (maximum, sum, lse, delta) then lie along a vector, and each product
// finds its operands in an order that the elementwise pass writes without transposing. `lse` is kept in the unit of S,
// not of the exponent: where one key takes all of the weight it is that key's score to the bit, and P is 1 to the bit,
// however large the score. (Operands in bfloat16 take S^T c - lse c, one operation less: at scores of 2000 this is
// exact to 1e-4.)
//
// T is the type of the tensors, E that of the packed operands of products: bfloat16 (`Half`) where the machine
// multiplies it, by AMX (HAMMER_AMX) or by AVX-512's dot products (HAMMER_BF16_INSTRUCTION), and float everywhere else,
// where bfloat16 tensors are widened as they are packed.
//
// Layouts (W = 32, everything padded with zeros to multiples of W); C += A B with
//   A [M x K]  panels of W columns [K/W][M][W]
//   B [K x N]  float: [N/W][K][W]; bfloat16: tiles [N/16][K/2][16][2], pairs of rows side by side
//   C [M x N]  float, [N/W][M][W]
// Blocks of W x W above the diagonal are skipped: the cost is half of that of the full products. Query j of a document
// stands at its key j + o, with o = keys - queries (`offset`), and sees the keys up to that one.
//
// Against torch 2.13's own attention on a Xeon with AMX, one thread, forward and backward: in bfloat16 4.9 times as
// fast at s 256, d 32 (b 4, n 8, g 2), 5.2 at s 512, d 64 and 4.0 at s 2048, d 64 (b 1); in float 2.0, 2.0 and 1.4
// times. docs/speed.md has the figures of other processors.
#include <cstring>

#include "attention.hpp"
#include "vectors.inl"

namespace hammer {
namespace HAMMER_VERSION {
namespace {
namespace attention {

#ifdef HAMMER_BF16_INSTRUCTION
using Half = uint16_t;
#endif
// What tensors of T are packed as.
template <class T>
struct Packed {
  using Type = float;
};
#ifdef HAMMER_BF16_INSTRUCTION
template <>
struct Packed<Bf16> {
  using Type = Half;
};
#endif

constexpr int64_t W = 32;  // edge of a block
constexpr int N = W / kLanes;  // vectors of a row of a block
constexpr int64_t KEYS_FORWARD = 256;  // keys between two updates of the running maximum
// Keys and queries of a block of the backward pass. Measured from 64 to 256 each on a Xeon with 2 MB of L2 cache.
constexpr int64_t KEYS = 128;
template <class E>
constexpr int64_t QUERIES = sizeof(E) == 2 ? 256 : 128;
constexpr float LOG2_E = 1.4426950408889634f;

HAMMER_INLINE int64_t round_up(int64_t n) { return (n + W - 1) / W * W; }
HAMMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
HAMMER_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Where row m (a multiple of W) and column k of A begin; row k and column n of B; row m and column n of C.
template <class E>
HAMMER_INLINE E* at_a(E* a, int64_t m, int64_t k, int64_t rows) {
  return a + k * rows + m * W;
}
HAMMER_INLINE float* at_b(float* b, int64_t k, int64_t n, int64_t depth) { return b + n * depth + k * W; }
#ifdef HAMMER_BF16_INSTRUCTION
HAMMER_INLINE Half* at_b(Half* b, int64_t k, int64_t n, int64_t depth) { return b + n * depth + k * 16; }
#endif
HAMMER_INLINE float* at_c(float* c, int64_t m, int64_t n, int64_t rows) { return c + n * rows + m * W; }

// ---- products of W x W blocks --------------------------------------------------------------------------------------

// Rows whose sums are held in registers at a time, two vectors each: x86-64 has 16 registers up to AVX2, else 32.
#if defined(__x86_64__) && HAMMER_LANES < 16
constexpr int ROWS = 4;
#else
constexpr int ROWS = 8;
#endif

// C = A B, or C += A B, over `depth`; `a_rows` and `b_depth` are the whole operands' sizes.
inline void product(float* c, bool add, const float* a, int64_t a_rows, const float* b, int64_t, int64_t depth) {
  for (int64_t n = 0; n < W; n += 2 * kLanes) {
    for (int64_t m = 0; m < W; m += ROWS) {
      V sum[ROWS][2];
      for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < 2; ++j) sum[i][j] = add ? load(c + (m + i) * W + n + kLanes * j) : V{};
      }
      for (int64_t panel = 0; panel < depth; panel += W) {
        const float* left = a + panel * a_rows + m * W;
        const float* right = b + panel * W + n;
        for (int64_t k = 0; k < W; ++k) {
          const V low = load(right + k * W), high = load(right + k * W + kLanes);
          for (int i = 0; i < ROWS; ++i) {
            sum[i][0] += left[i * W + k] * low;
            sum[i][1] += left[i * W + k] * high;
          }
        }
      }
      for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < 2; ++j) store(c + (m + i) * W + n + kLanes * j, sum[i][j]);
      }
    }
  }
}

#ifdef HAMMER_AMX
// The eight tile registers, each 16 rows of 64 bytes, for as long as this lives.
struct Tiles {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Tiles() {
    const Shapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

inline void product(float* c, bool add, const Half* a, int64_t a_rows, const Half* b, int64_t b_depth, int64_t depth) {
  constexpr int line = W * sizeof(float);
  if (add) {
    _tile_loadd(0, c, line);
    _tile_loadd(1, c + 16, line);
    _tile_loadd(2, c + 16 * W, line);
    _tile_loadd(3, c + 16 * W + 16, line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += W) {
    _tile_loadd(4, a + k * a_rows, 64);
    _tile_loadd(6, b + k * 16, 64);
    _tile_loadd(5, a + k * a_rows + 16 * W, 64);
    _tile_loadd(7, b + 16 * b_depth + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, line);
  _tile_stored(1, c + 16, line);
  _tile_stored(2, c + 16 * W, line);
  _tile_stored(3, c + 16 * W + 16, line);
}
#else
struct Tiles {
  Tiles() {}  // no trivial one: a variable of it is not unused
};

#ifdef HAMMER_BF16_INSTRUCTION
inline void product(float* c, bool add, const Half* a, int64_t a_rows, const Half* b, int64_t b_depth, int64_t depth) {
  for (int64_t m = 0; m < W; m += ROWS) {
    __m512 sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < 2; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + (m + i) * W + 16 * j) : _mm512_setzero_ps();
    }
    for (int64_t panel = 0; panel < depth; panel += W) {
      const Half* left = a + panel * a_rows + m * W;
      const Half* right = b + panel * 16;
      for (int64_t k = 0; k < W; k += 2) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(right + k * 16);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(right + 16 * b_depth + k * 16);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          int32_t pair;
          __builtin_memcpy(&pair, left + i * W + k, sizeof pair);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, low);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, high);
        }
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + (m + i) * W + 16 * j, sum[i][j]);
    }
  }
}
#endif
#endif

// ---- vectors -------------------------------------------------------------------------------------------------------

#if HAMMER_LANES == 16
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: in lane l the column 4 l + j of the rows i to i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88),
                  odd_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// to[i][j] = from[j][i] of 16 x 16 words; rows lie `to_stride` and `from_stride` bytes apart.
inline void transpose(void* to, int64_t to_stride, const void* from, int64_t from_stride) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512((const char*)from + i * from_stride);
  transpose(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512((char*)to + i * to_stride, r[i]);
}
#else
inline void transpose(void* to, int64_t to_stride, const void* from, int64_t from_stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      __builtin_memcpy((char*)to + i * to_stride + 4 * j, (const char*)from + j * from_stride + 4 * i, 4);
    }
  }
}
#endif

// 2^x: a polynomial for the fraction (least maximum relative error on [0, 1), fitted: 1e-7, and 3e-6 where the result
// is rounded to bfloat16, which loses 2e-3), the exponent by scaling. Results below the smallest normal number are 0:
// computing them costs some hundred cycles each. A NaN stays one. x is below 127 wherever it is a number.
template <class E>
HAMMER_INLINE V exp2(V x) {
  constexpr float FINE[] = {0.9999999403953552f,  0.6931530833244324f,   0.24015361070632935f,
                            0.05582631751894951f, 0.008989340625703335f, 0.0018775765784084797f};
  constexpr float COARSE[] = {1.0000026226043701f, 0.6930038332939148f, 0.2414427548646927f, 0.05201146379113197f,
                              0.013534166850149632f};
  constexpr int degree = sizeof(E) == 2 ? 4 : 5;
  const float* const factors = sizeof(E) == 2 ? COARSE : FINE;
#if HAMMER_LANES == 16
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  const V fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  constexpr float SHIFT = 12582912;  // 1.5 2^23: a sum with it has no fraction, and its last bits are the whole part
  const V inside = x > -126.f ? x : V{} - 126.f;
  const V shifted = inside - 0.5f + SHIFT, fraction = inside - (shifted - SHIFT);
#endif
  V y = V{} + factors[degree];
#pragma GCC unroll 8
  for (int i = degree - 1; i >= 0; --i) y = y * fraction + factors[i];
#if HAMMER_LANES == 16
  return _mm512_maskz_scalef_ps(normal, y, x);
#else
  y *= (V)((((U)shifted - 0x4b400000u) + 127u) << 23);
  return x < -126.f ? V{} : x == x ? y : x;
#endif
}

// The numbers of the lanes of vector j of a row: 0 to W - 1.
HAMMER_INLINE I columns(int j) {
  I x;
  for (int i = 0; i < kLanes; ++i) x[i] = i + j * kLanes;
  return x;
}

#ifdef HAMMER_BF16_INSTRUCTION
HAMMER_INLINE __m512i halves(V low, V high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#endif

// ---- packing W rows of a tensor ------------------------------------------------------------------------------------

HAMMER_INLINE void copy_row(float* to, const float* from, int64_t size) { memcpy(to, from, size * sizeof(float)); }
HAMMER_INLINE void copy_row(float* to, const Bf16* from, int64_t size) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d));
  if (d < size) Part{static_cast<int>(size - d)}.store(to + d, Part{static_cast<int>(size - d)}.load(from + d));
}
HAMMER_INLINE bool same_type(const float*, const float*) { return true; }
HAMMER_INLINE bool same_type(const Bf16*, const float*) { return false; }
#ifdef HAMMER_BF16_INSTRUCTION
HAMMER_INLINE void copy_row(Half* to, const Bf16* from, int64_t size) { memcpy(to, from, size * sizeof(Half)); }
HAMMER_INLINE bool same_type(const Bf16*, const Half*) { return true; }
#endif

// W rows of `padded` elements: those of the tensor, or a copy where they are of another type or some are missing, which
// is filled up with zeros.
template <class E>
struct Rows {
  const E* data;
  int64_t stride;

  template <class T>
  Rows(const T* source, int64_t source_stride, int64_t count, int64_t size, int64_t padded, E* buffer)
      : data((const E*)source), stride(source_stride) {
    const bool complete = count >= W && size == padded;
    if (complete && same_type(source, buffer)) return;
    if (!complete) memset(buffer, 0, W * padded * sizeof(E));
    for (int64_t i = 0; i < smaller(count, W); ++i) copy_row(buffer + i * padded, source + i * source_stride, size);
    data = buffer;
    stride = padded;
  }
  const E* operator()(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// A whose rows are these rows, from its row m on.
template <class E>
inline void pack_a(E* a, int64_t m, int64_t rows, const Rows<E>& x, int64_t padded) {
  for (int64_t k = 0; k < padded; k += W) {
    for (int64_t i = 0; i < W; ++i) memcpy(at_a(a, m, k, rows) + i * W, x(i, k), W * sizeof(E));
  }
}

// B whose rows are these rows, from its row k on.
inline void pack_b(float* b, int64_t k, int64_t depth, const Rows<float>& x, int64_t padded) {
  pack_a(b, k, depth, x, padded);
}

// B whose columns are these rows, from its column n on.
inline void pack_columns_b(float* b, int64_t n, int64_t depth, const Rows<float>& x, int64_t padded) {
  for (int64_t q = 0; q < W; q += 16) {
    for (int64_t k = 0; k < padded; k += 16) {
      transpose(at_b(b, k, n, depth) + q, W * sizeof(float), x(q, k), x.stride * sizeof(float));
    }
  }
}

// A whose columns are these rows, from its column k on: for floats this is the order of B's columns.
inline void pack_columns_a(float* a, int64_t k, int64_t rows, const Rows<float>& x, int64_t padded) {
  pack_columns_b(a, k, rows, x, padded);
}

// Two rows (i, i + 1) of W columns of a block, as A with K = columns ...
HAMMER_INLINE void write_a(float* a, const V x[2][N]) {
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < N; ++j) store(a + i * W + j * kLanes, x[i][j]);
  }
}
// ... and as B with K = rows.
HAMMER_INLINE void write_b(float* b, int64_t, const V x[2][N]) { write_a(b, x); }

#ifdef HAMMER_BF16_INSTRUCTION
inline void pack_b(Half* b, int64_t k, int64_t depth, const Rows<Half>& x, int64_t padded) {
  for (int64_t n = 0; n < padded; n += 16) {
    for (int64_t i = 0; i < W; i += 2) {
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x(i, n)));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x(i + 1, n)));
      _mm512_storeu_si512(at_b(b, k + i, n, depth), _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

inline void pack_columns_b(Half* b, int64_t n, int64_t depth, const Rows<Half>& x, int64_t padded) {
  for (int64_t q = 0; q < W; q += 16) {
    for (int64_t k = 0; k < padded; k += W) {
      transpose(at_b(b, k, n + q, depth), 32 * sizeof(Half), x(q, k), x.stride * sizeof(Half));
    }
  }
}

inline void pack_columns_a(Half* a, int64_t k, int64_t rows, const Rows<Half>& x, int64_t padded) {
  __m512i r[16];
  for (int64_t m = 0; m < padded; m += 16) {
    for (int i = 0; i < 16; ++i) {
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x(2 * i, m)));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x(2 * i + 1, m)));
      r[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(at_a(a, 0, k, rows) + (m + i) * W, r[i]);
  }
}

HAMMER_INLINE void write_a(Half* a, const V x[2][N]) {
  for (int i = 0; i < 2; ++i) _mm512_storeu_si512(a + i * W, halves(x[i][0], x[i][1]));
}
HAMMER_INLINE void write_b(Half* b, int64_t depth, const V x[2][N]) {
  alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(PAIRS);
  for (int j = 0; j < 2; ++j) {
    _mm512_storeu_si512(b + 16 * j * depth, _mm512_permutexvar_epi16(pairs, halves(x[0][j], x[1][j])));
  }
}
#endif

// `size` elements of a row from floats, all times one factor.
template <class T>
HAMMER_INLINE void write_row(T* to, int64_t size, const float* from, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d) * factor);
  if (d < size) Part{static_cast<int>(size - d)}.store(to + d, load(from + d) * factor);
}

// W columns of a C [padded x N] as `count` rows of a tensor, column q times factor[q].
template <class T>
inline void write_columns(T* to, int64_t stride, int64_t count, int64_t size, const float* c, const float* factor) {
  alignas(64) float rows[16 * 16];
  for (int64_t q = 0; q < smaller(count, W); q += 16) {
    for (int64_t d = 0; d < size; d += 16) {
      transpose(rows, 16 * sizeof(float), c + d * W + q, W * sizeof(float));
      for (int64_t i = 0; i < smaller(count - q, 16); ++i) {
        write_row(to + (q + i) * stride + d, smaller(size - d, 16), rows + i * 16, factor[q + i]);
      }
    }
  }
}

// `count` rows of a C [rows x padded], all times one factor.
template <class T>
inline void write_rows(T* to, int64_t stride, int64_t count, int64_t size, float* c, int64_t rows, float factor) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < size; d += W) {
      write_row(to + i * stride + d, smaller(size - d, W), at_c(c, i, d, rows), factor);
    }
  }
}

// ---- memory --------------------------------------------------------------------------------------------------------

// One thread's working memory, cut into pieces that begin with a cache line; without memory it counts what is needed.
struct Scratch {
  char* data = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t elements) {
    T* const piece = data == nullptr ? nullptr : (T*)(data + used);
    used += (elements * (int64_t)sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

template <class E>
struct ForwardBuffers {
  E *k_a, *vt_a, *qt_b, *pt_b, *copy;
  float *scores, *ot_c;

  ForwardBuffers(Scratch& from, int64_t rows, int64_t padded)
      : k_a(from.take<E>(rows * padded)),
        vt_a(from.take<E>(rows * padded)),
        qt_b(from.take<E>(W * padded)),
        pt_b(from.take<E>(KEYS_FORWARD * W)),
        copy(from.take<E>(W * padded)),
        scores(from.take<float>(KEYS_FORWARD * W)),
        ot_c(from.take<float>(W * padded)) {}
};

template <class E>
struct BackwardBuffers {
  E *k_a, *kt_a, *v_a, *q_b, *qt_b, *do_b, *dot_b, *p_a, *ds_a, *ds_b, *copy;
  float *dk_c, *dv_c, *dqt_c, *scores, *dp, *lse, *delta;

  BackwardBuffers(Scratch& from, int64_t rows, int64_t padded)
      : k_a(from.take<E>(rows * padded)),
        kt_a(from.take<E>(rows * padded)),
        v_a(from.take<E>(rows * padded)),
        q_b(from.take<E>(QUERIES<E> * padded)),
        qt_b(from.take<E>(QUERIES<E> * padded)),
        do_b(from.take<E>(QUERIES<E> * padded)),
        dot_b(from.take<E>(QUERIES<E> * padded)),
        p_a(from.take<E>(KEYS * QUERIES<E>)),
        ds_a(from.take<E>(KEYS * QUERIES<E>)),
        ds_b(sizeof(E) == 2 ? from.take<E>(KEYS * QUERIES<E>) : ds_a),  // of floats A and B have one order
        copy(from.take<E>(W * padded)),
        dk_c(from.take<float>(rows * padded)),
        dv_c(from.take<float>(rows * padded)),
        dqt_c(from.take<float>(QUERIES<E> * padded)),
        scores(from.take<float>(W * W)),
        dp(from.take<float>(W * W)),
        lse(from.take<float>(QUERIES<E>)),
        delta(from.take<float>(QUERIES<E>)) {}
};

// Row `row` of the queries of a unit, and of its keys.
template <class T>
inline T* rows_of(const Strided& x, const Unit& unit, int64_t head, int64_t row) {
  return (T*)x.data + (unit.first + row) * x.row + unit.batch * x.batch + head * x.head;
}
template <class T>
inline T* keys_of(const Strided& x, const Unit& unit, int64_t row) {
  return (T*)x.data + (unit.key_first + row) * x.row + unit.batch * x.batch + unit.group * x.head;
}

// Rows that are read or written soon, asked for a few at a time beside products: one lies some KiB after the other, so
// the machine's own prefetching finds none of them. The forward pass takes 7 to 10 % less (Xeon with AVX-512, after
// products that left nothing in the cache); in the backward pass it changed nothing. Beyond the last row it does no harm.
struct Coming {
  const char* next;
  int64_t stride, size, count;  // bytes, bytes, rows

  template <class T>
  Coming(const T* rows, int64_t row_stride, int64_t row_size, int64_t row_count)
      : next((const char*)rows),
        stride(row_stride * (int64_t)sizeof(T)),
        size(row_size * (int64_t)sizeof(T)),
        count(row_count) {}

  HAMMER_INLINE void fetch(int64_t rows) {
    for (; rows > 0 && count > 0; --rows, --count, next += stride) {
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(next + i);
    }
  }
};

inline float* lse_of(const Attention& call, const Unit& unit, int64_t head) {
  const int64_t rows = call.bounds[call.documents];
  return call.lse + (unit.batch * call.heads + head) * rows + unit.first;
}

// ---- the passes ----------------------------------------------------------------------------------------------------

// Largest score and sum of exponentials of W queries so far.
struct Running {
  V largest[N], sum[N];
};

// P^T of `keys` keys from their scores, and what the earlier sums must be multiplied with.
template <class E>
inline void softmax(const float* scores, int64_t keys, float c, Running& running, E* p, int64_t depth, V factor[N]) {
  constexpr bool half = sizeof(E) == 2;
  V m[N], base[N];
  for (int j = 0; j < N; ++j) m[j] = running.largest[j];
  for (int64_t i = 0; i < keys; ++i) {
    for (int j = 0; j < N; ++j) {
      const V score = load(scores + i * W + kLanes * j);
      m[j] = score > m[j] ? score : m[j];
    }
  }
  for (int j = 0; j < N; ++j) {
    factor[j] = exp2<E>((running.largest[j] - m[j]) * c);
    running.largest[j] = m[j];
    running.sum[j] *= factor[j];
    base[j] = half ? m[j] * c : m[j];
  }
  for (int64_t i = 0; i < keys; i += 2) {
    V x[2][N];
    for (int r = 0; r < 2; ++r) {
      for (int j = 0; j < N; ++j) {
        const V score = load(scores + (i + r) * W + kLanes * j);
        x[r][j] = exp2<E>(half ? score * c - base[j] : (score - base[j]) * c);
        running.sum[j] += x[r][j];
      }
    }
    write_b(at_b(p, i, 0, depth), depth, x);
  }
}

// Hides the keys of a block that come after a query; its first key stands `ahead` places after its first query.
inline void mask(float* scores, int64_t ahead) {
  const V never = V{} - __builtin_inff();
  for (int64_t i = 0; i < W; ++i) {
    for (int j = 0; j < N; ++j) {
      float* x = scores + i * W + kLanes * j;
      store(x, columns(j) < static_cast<int32_t>(i + ahead) ? never : load(x));
    }
  }
}

// The result of the queries i to i + W of one head, from packed keys and values.
template <class T, class E>
inline void attend(const Attention& call, const Unit& unit, const ForwardBuffers<E>& at, int64_t head, int64_t i) {
  const int64_t size = call.size, padded = round_up(size), rows = round_up(unit.keys);
  const int64_t count = smaller(unit.rows - i, W), at_key = i + unit.offset();
  const int64_t seen = smaller(round_up(at_key + W), rows);  // keys, up to the end of a block
  const float c = call.scale * LOG2_E;
  const Rows<E> q(rows_of<T>(call.q, unit, head, i), call.q.row, count, size, padded, at.copy);
  pack_columns_b(at.qt_b, 0, padded, q, padded);
  T* const to = rows_of<T>(call.out, unit, head, i);
  const bool last = i + W >= unit.rows;
  Coming out(to, call.out.row, size, count);
  Coming q_next(rows_of<T>(call.q, unit, last ? head + 1 : head, last ? 0 : i + W), call.q.row, size, W);
  Running running;
  for (int j = 0; j < N; ++j) {
    running.largest[j] = V{} - 3e38f;  // finite: the difference of two is a number
    running.sum[j] = V{};
  }
  for (int64_t first = 0; first < seen; first += KEYS_FORWARD) {
    const int64_t keys = smaller(KEYS_FORWARD, seen - first);
    for (int64_t m = 0; m < keys; m += W) {
      q_next.fetch(8);
      out.fetch(8);
      product(at.scores + m * W, false, at_a(at.k_a, first + m, 0, rows), rows, at.qt_b, padded, padded);
      if (first + m + W > at_key) mask(at.scores + m * W, first + m - at_key);
    }
    V factor[N];
    softmax(at.scores, keys, c, running, at.pt_b, KEYS_FORWARD, factor);
    for (int64_t d = 0; first > 0 && d < padded; ++d) {
      for (int j = 0; j < N; ++j) {
        float* x = at.ot_c + d * W + kLanes * j;
        store(x, load(x) * factor[j]);
      }
    }
    for (int64_t d = 0; d < padded; d += W) {
      product(at.ot_c + d * W, first > 0, at_a(at.vt_a, d, first, padded), padded, at.pt_b, KEYS_FORWARD, keys);
    }
  }
  alignas(64) float largest[W], rounded[W], sum[W];
  for (int j = 0; j < N; ++j) {
    const V base = running.largest[j] * c;
    store(largest + kLanes * j, running.largest[j]);
    store(rounded + kLanes * j, sizeof(E) == 2 ? running.largest[j] * c - base : V{});
    store(sum + kLanes * j, running.sum[j]);
  }
  float* lse = lse_of(call, unit, head) + i;
  for (int64_t r = 0; r < W; ++r) {
    // With operands in bfloat16 the exponentials are above their true values by what the product of maximum and c lost.
    if (r < count) lse[r] = largest[r] + (__builtin_log2f(sum[r]) - rounded[r]) / c;
    sum[r] = 1.f / sum[r];
  }
  write_columns(to, call.out.row, count, size, at.ot_c, sum);
}

template <class T>
void forward(const Attention& call, const Unit& unit, char* memory) {
  using E = typename Packed<T>::Type;
  const Tiles tiles;
  const int64_t size = call.size, padded = round_up(size), rows = round_up(unit.keys);
  Scratch scratch{memory};
  const ForwardBuffers<E> at(scratch, rows, padded);
  for (int64_t i = 0; i < unit.keys; i += W) {
    const T *k = keys_of<T>(call.k, unit, i), *v = keys_of<T>(call.v, unit, i);
    pack_a(at.k_a, i, rows, Rows<E>(k, call.k.row, unit.keys - i, size, padded, at.copy), padded);
    pack_columns_a(at.vt_a, i, padded, Rows<E>(v, call.v.row, unit.keys - i, size, padded, at.copy), padded);
  }
  const int64_t heads = call.heads / call.groups;
  for (int64_t head = unit.group * heads; head < (unit.group + 1) * heads; ++head) {
    for (int64_t i = 0; i < unit.rows; i += W) attend<T>(call, unit, at, head, i);
  }
}

// delta = the sum over a row of dO O, of `count` rows; the rest become zero.
template <class T>
inline void row_sums(float* delta, const T* grad_out, int64_t stride, const T* out, int64_t out_stride, int64_t count,
                     int64_t size) {
  for (int64_t r = 0; r < W; ++r) {
    V sum = {};
    int64_t d = 0;
    const T *x = grad_out + r * stride, *y = out + r * out_stride;
    for (; r < count && d + kLanes <= size; d += kLanes) sum += load(x + d) * load(y + d);
    const Part rest{static_cast<int>(size - d)};
    if (r < count && d < size) sum += rest.load(x + d) * rest.load(y + d);
    delta[r] = total(sum);
  }
}

// P^T and dS^T (without the scale) of a W x W block from scores and dP^T; `ahead` as in `mask`.
template <class E>
inline void gradients(const float* scores, const float* dp, const float* lse, const float* delta, float c,
                      int64_t ahead, E* p_a, E* ds_a, E* ds_b, int64_t depth) {
  constexpr bool half = sizeof(E) == 2;
  const bool masked = ahead > -W;
  V base[N], less[N];
  for (int j = 0; j < N; ++j) {
    base[j] = half ? load(lse + kLanes * j) * c : load(lse + kLanes * j);
    less[j] = load(delta + kLanes * j);
  }
  for (int64_t i = 0; i < W; i += 2) {
    V p[2][N], ds[2][N];
    for (int r = 0; r < 2; ++r) {
      for (int j = 0; j < N; ++j) {
        const int64_t x = (i + r) * W + kLanes * j;
        const V score = load(scores + x);
        p[r][j] = exp2<E>(half ? score * c - base[j] : (score - base[j]) * c);
        if (masked) p[r][j] = columns(j) < static_cast<int32_t>(i + r + ahead) ? V{} : p[r][j];
        ds[r][j] = p[r][j] * (load(dp + x) - less[j]);
      }
    }
    write_a(p_a + i * W, p);
    write_a(ds_a + i * W, ds);
    if (half) write_b(at_b(ds_b, i, 0, depth), depth, ds);
  }
}

// Everything of the queries q0 to q0 + `queries` of one head, in the orders of the four products.
template <class T, class E>
inline void pack_queries(const Attention& call, const Unit& unit, const BackwardBuffers<E>& at, int64_t head,
                         int64_t q0, int64_t queries) {
  const int64_t size = call.size, padded = round_up(size);
  for (int64_t i = 0; i < queries; i += W) {
    const int64_t count = smaller(unit.rows - q0 - i, W);
    const Rows<E> q(rows_of<T>(call.q, unit, head, q0 + i), call.q.row, count, size, padded, at.copy);
    pack_b(at.q_b, i, QUERIES<E>, q, padded);
    pack_columns_b(at.qt_b, i, padded, q, padded);
    const T* grad_out = rows_of<T>(call.grad_out, unit, head, q0 + i);
    const Rows<E> grad(grad_out, call.grad_out.row, count, size, padded, at.copy);
    pack_b(at.do_b, i, QUERIES<E>, grad, padded);
    pack_columns_b(at.dot_b, i, padded, grad, padded);
    const T* out = rows_of<T>(call.out, unit, head, q0 + i);
    row_sums(at.delta + i, grad_out, call.grad_out.row, out, call.out.row, count, size);
    const float* lse = lse_of(call, unit, head) + q0 + i;
    for (int64_t r = 0; r < W; ++r) at.lse[i + r] = r < count ? lse[r] : __builtin_inff();  // no query: P is 0
  }
}

// What the keys k0 to k0 + `keys` and the packed queries, whose first stands at key `at_key`, add to the gradients of
// both.
template <class E>
inline void add_gradients(float c, const BackwardBuffers<E>& at, int64_t rows, int64_t padded, int64_t at_key,
                          int64_t queries, int64_t k0, int64_t keys) {
  for (int64_t m = 0; m < keys; m += W) {
    const int64_t from = larger(k0 + m - at_key, 0) / W * W;  // the first block of queries that sees one of these keys
    for (int64_t n = from; n < queries; n += W) {
      product(at.scores, false, at_a(at.k_a, k0 + m, 0, rows), rows, at_b(at.qt_b, 0, n, padded), padded, padded);
      product(at.dp, false, at_a(at.v_a, k0 + m, 0, rows), rows, at_b(at.dot_b, 0, n, padded), padded, padded);
      gradients(at.scores, at.dp, at.lse + n, at.delta + n, c, k0 + m - at_key - n, at_a(at.p_a, m, n, KEYS),
                at_a(at.ds_a, m, n, KEYS), at_b(at.ds_b, m, n, KEYS), KEYS);
      // The query at the first key sees one key, whose P is 1: dS is 0, where dP - delta would keep what O lost in
      // rounding.
      if (k0 + m + at_key + n == 0) *at.ds_a = *at.ds_b = 0;
    }
    for (int64_t d = 0; d < padded; d += W) {
      product(at_c(at.dv_c, k0 + m, d, rows), true, at_a(at.p_a, m, from, KEYS), KEYS,
              at_b(at.do_b, from, d, QUERIES<E>), QUERIES<E>, queries - from);
      product(at_c(at.dk_c, k0 + m, d, rows), true, at_a(at.ds_a, m, from, KEYS), KEYS,
              at_b(at.q_b, from, d, QUERIES<E>), QUERIES<E>, queries - from);
    }
  }
  for (int64_t n = larger(k0 - at_key, 0) / W * W; n < queries; n += W) {
    const int64_t depth = smaller(keys, round_up(at_key + n + W - k0));  // of these keys, the blocks that queries see
    for (int64_t d = 0; d < padded; d += W) {
      product(at_c(at.dqt_c, d, n, padded), k0 > 0, at_a(at.kt_a, d, k0, padded), padded, at_b(at.ds_b, 0, n, KEYS),
              KEYS, depth);
    }
  }
}

template <class T>
void backward(const Attention& call, const Unit& unit, char* memory) {
  using E = typename Packed<T>::Type;
  const Tiles tiles;
  const int64_t size = call.size, padded = round_up(size), rows = round_up(unit.keys);
  Scratch scratch{memory};
  const BackwardBuffers<E> at(scratch, rows, padded);
  memset(at.dk_c, 0, rows * padded * sizeof(float));
  memset(at.dv_c, 0, rows * padded * sizeof(float));
  for (int64_t i = 0; i < unit.keys; i += W) {
    const T* v = keys_of<T>(call.v, unit, i);
    pack_a(at.v_a, i, rows, Rows<E>(v, call.v.row, unit.keys - i, size, padded, at.copy), padded);
    const Rows<E> k(keys_of<T>(call.k, unit, i), call.k.row, unit.keys - i, size, padded, at.copy);
    pack_a(at.k_a, i, rows, k, padded);
    pack_columns_a(at.kt_a, i, padded, k, padded);
  }
  float factors[W];
  for (int64_t i = 0; i < W; ++i) factors[i] = call.scale;
  const int64_t heads = call.heads / call.groups;
  for (int64_t head = unit.group * heads; head < (unit.group + 1) * heads; ++head) {
    for (int64_t q0 = 0; q0 < unit.rows; q0 += QUERIES<E>) {
      const int64_t queries = smaller(round_up(unit.rows - q0), QUERIES<E>);
      pack_queries<T>(call, unit, at, head, q0, queries);
      const int64_t at_key = q0 + unit.offset(), seen = smaller(round_up(at_key + queries), rows);
      for (int64_t k0 = 0; k0 < seen; k0 += KEYS) {
        add_gradients(call.scale * LOG2_E, at, rows, padded, at_key, queries, k0, smaller(KEYS, seen - k0));
      }
      for (int64_t i = 0; i < queries; i += W) {
        write_columns(rows_of<T>(call.grad_q, unit, head, q0 + i), call.grad_q.row, unit.rows - q0 - i, size,
                      at_c(at.dqt_c, 0, i, padded), factors);
      }
    }
  }
  T *grad_k = keys_of<T>(call.grad_k, unit, 0), *grad_v = keys_of<T>(call.grad_v, unit, 0);
  write_rows(grad_k, call.grad_k.row, unit.keys, size, at.dk_c, rows, call.scale);
  write_rows(grad_v, call.grad_v.row, unit.keys, size, at.dv_c, rows, 1.f);
}

template <class Buffers>
int64_t bytes(int64_t keys, int64_t size) {
  Scratch counted;
  const Buffers sizes(counted, round_up(keys), round_up(size));
  return counted.used;
}

template <class T>
constexpr Passes passes() {
  using E = typename Packed<T>::Type;
  return {bytes<ForwardBuffers<E>>, forward<T>, bytes<BackwardBuffers<E>>, backward<T>};
}

}  // namespace attention
}  // namespace
}  // namespace HAMMER_VERSION
}  // namespace hammer
