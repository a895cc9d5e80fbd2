// Causal attention with query groups for Intel's AVX-512 (float) and AMX (bfloat16), forward and backward.
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
// however large the score. (bfloat16 takes S^T c - lse c, one operation less: at scores of 2000 this is exact to 1e-4.)
//
// Layouts (W = 32, everything padded with zeros to multiples of W); C += A B with
//   A [M x K]  panels of W columns [K/W][M][W]
//   B [K x N]  float: [N/W][K][W]; bfloat16: tiles for AMX [N/16][K/2][16][2], pairs of rows side by side
//   C [M x N]  float, [N/W][M][W]
// Blocks of W x W above the diagonal are skipped: the cost is half of that of the full products.
//
// Against torch 2.13's own attention on a Xeon with AMX, one thread, forward and backward: in bfloat16 4.9 times as
// fast at s 256, d 32 (b 4, n 8, g 2), 5.2 at s 512, d 64 and 4.0 at s 2048, d 64 (b 1); in float 2.0, 2.0 and 1.4
// times.
#include "attention.hpp"

#include <cstdlib>
#include <cstring>

// Clang gives the code of a parallel region none of the instructions that are asked for below.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

// Nothing of the standard library's templates is instantiated below: their code would be shared with other files and
// would then need these instructions everywhere.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")
// GCC 12 takes the intrinsics' own undefined values for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

namespace hammer {
namespace {

using Half = uint16_t;

constexpr int64_t W = 32;  // edge of a block
constexpr int64_t KEYS_FORWARD = 256;  // keys between two updates of the running maximum
// Keys and queries of a block of the backward pass. Measured from 64 to 256 each on a Xeon with 2 MB of L2 cache.
constexpr int64_t KEYS = 128;
template <class T>
constexpr int64_t QUERIES = sizeof(T) == 2 ? 256 : 128;
constexpr __mmask16 ALL = 0xffff;
constexpr float LOG2_E = 1.4426950408889634f;

inline int64_t round_up(int64_t n) { return (n + W - 1) / W * W; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Where row m (a multiple of W) and column k of A begin; row k and column n of B; row m and column n of C.
template <class T>
inline T* at_a(T* a, int64_t m, int64_t k, int64_t rows) {
  return a + k * rows + m * W;
}
inline float* at_b(float* b, int64_t k, int64_t n, int64_t depth) { return b + n * depth + k * W; }
inline Half* at_b(Half* b, int64_t k, int64_t n, int64_t depth) { return b + n * depth + k * 16; }
inline float* at_c(float* c, int64_t m, int64_t n, int64_t rows) { return c + n * rows + m * W; }

// ------------------------------------------------------------------------------------------- products of W x W blocks

// C = A B, or C += A B, over `depth`; `a_rows` and `b_depth` are the whole operands' sizes.
inline void product(float* c, bool add, const float* a, int64_t a_rows, const float* b, int64_t, int64_t depth) {
  for (int64_t m = 0; m < W; m += 8) {
    __m512 sum[8][2];
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 2; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + (m + i) * W + 16 * j) : _mm512_setzero_ps();
    }
    for (int64_t panel = 0; panel < depth; panel += W) {
      const float* left = a + panel * a_rows + m * W;
      const float* right = b + panel * W;
      for (int64_t k = 0; k < W; ++k) {
        const __m512 low = _mm512_loadu_ps(right + k * W), high = _mm512_loadu_ps(right + k * W + 16);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512 x = _mm512_set1_ps(left[i * W + k]);
          sum[i][0] = _mm512_fmadd_ps(x, low, sum[i][0]);
          sum[i][1] = _mm512_fmadd_ps(x, high, sum[i][1]);
        }
      }
    }
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + (m + i) * W + 16 * j, sum[i][j]);
    }
  }
}

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

// The eight tile registers, each 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// ------------------------------------------------------------------------------------------------- vectors of 16 words

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

// 2^x: a polynomial for the fraction (least maximum relative error on [0, 1), fitted: 1e-7, and 3e-6 where the result
// is rounded to bfloat16, which loses 2e-3), the exponent by scaling, which takes the whole part. Results below the
// smallest normal number are 0: computing them costs some hundred cycles each. A NaN stays one.
template <class T>
inline __m512 exp2(__m512 x) {
  constexpr float FINE[] = {0.9999999403953552f,  0.6931530833244324f,   0.24015361070632935f,
                            0.05582631751894951f, 0.008989340625703335f, 0.0018775765784084797f};
  constexpr float COARSE[] = {1.0000026226043701f, 0.6930038332939148f, 0.2414427548646927f, 0.05201146379113197f,
                              0.013534166850149632f};
  constexpr int degree = sizeof(T) == 2 ? 4 : 5;
  const float* const factors = sizeof(T) == 2 ? COARSE : FINE;
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(factors[degree]);
#pragma GCC unroll 8
  for (int i = degree - 1; i >= 0; --i) y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(factors[i]));
  return _mm512_maskz_scalef_ps(normal, y, x);
}

inline __m512i halves(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline __mmask16 lanes(int64_t count) {
  return count >= 16 ? ALL : count <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load(const Half* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
inline void store(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }
inline void store(Half* p, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// ------------------------------------------------------------------------------------------ packing W rows of a tensor

// W rows of `padded` elements: those of the tensor, or where some are missing a copy filled up with zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  Rows(const T* source, int64_t source_stride, int64_t count, int64_t size, int64_t padded, T* buffer)
      : data(source), stride(source_stride) {
    if (count >= W && size == padded) return;
    memset(buffer, 0, W * padded * sizeof(T));
    for (int64_t i = 0; i < smaller(count, W); ++i)
      memcpy(buffer + i * padded, source + i * source_stride, size * sizeof(T));
    data = buffer;
    stride = padded;
  }
  const T* operator()(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// A whose rows are these rows, from its row m on.
template <class T>
inline void pack_a(T* a, int64_t m, int64_t rows, const Rows<T>& x, int64_t padded) {
  for (int64_t k = 0; k < padded; k += W) {
    for (int64_t i = 0; i < W; ++i) memcpy(at_a(a, m, k, rows) + i * W, x(i, k), W * sizeof(T));
  }
}

// B whose rows are these rows, from its row k on.
inline void pack_b(float* b, int64_t k, int64_t depth, const Rows<float>& x, int64_t padded) {
  pack_a(b, k, depth, x, padded);
}
inline void pack_b(Half* b, int64_t k, int64_t depth, const Rows<Half>& x, int64_t padded) {
  for (int64_t n = 0; n < padded; n += 16) {
    for (int64_t i = 0; i < W; i += 2) {
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x(i, n)));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x(i + 1, n)));
      _mm512_storeu_si512(at_b(b, k + i, n, depth), _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// B whose columns are these rows, from its column n on.
inline void pack_columns_b(float* b, int64_t n, int64_t depth, const Rows<float>& x, int64_t padded) {
  __m512i r[16];
  for (int64_t q = 0; q < W; q += 16) {
    for (int64_t k = 0; k < padded; k += 16) {
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x(q + i, k));
      transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(at_b(b, k + i, n, depth) + q, r[i]);
    }
  }
}
inline void pack_columns_b(Half* b, int64_t n, int64_t depth, const Rows<Half>& x, int64_t padded) {
  __m512i r[16];
  for (int64_t q = 0; q < W; q += 16) {
    for (int64_t k = 0; k < padded; k += W) {
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x(q + i, k));
      transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(at_b(b, k + 2 * i, n + q, depth), r[i]);
    }
  }
}

// A whose columns are these rows, from its column k on: for floats this is the order of B's columns.
inline void pack_columns_a(float* a, int64_t k, int64_t rows, const Rows<float>& x, int64_t padded) {
  pack_columns_b(a, k, rows, x, padded);
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

// Two rows (i, i + 1) of W columns of a block, as A with K = columns ...
inline void write_a(float* a, const __m512 x[2][2]) {
  for (int i = 0; i < 2; ++i) {
    _mm512_storeu_ps(a + i * W, x[i][0]);
    _mm512_storeu_ps(a + i * W + 16, x[i][1]);
  }
}
inline void write_a(Half* a, const __m512 x[2][2]) {
  for (int i = 0; i < 2; ++i) _mm512_storeu_si512(a + i * W, halves(x[i][0], x[i][1]));
}
// ... and as B with K = rows.
inline void write_b(float* b, int64_t, const __m512 x[2][2]) { write_a(b, x); }
inline void write_b(Half* b, int64_t depth, const __m512 x[2][2]) {
  alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(PAIRS);
  for (int j = 0; j < 2; ++j) {
    _mm512_storeu_si512(b + 16 * j * depth, _mm512_permutexvar_epi16(pairs, halves(x[0][j], x[1][j])));
  }
}

// W columns of a C [padded x N] as `count` rows of a tensor, column q times factor[q].
template <class T>
inline void write_columns(T* to, int64_t stride, int64_t count, int64_t size, const float* c, int64_t padded,
                          const float* factor) {
  __m512i r[16];
  for (int64_t q = 0; q < smaller(count, W); q += 16) {
    for (int64_t d = 0; d < padded; d += 16) {
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(c + (d + i) * W + q);
      transpose(r);
      for (int64_t i = 0; i < smaller(count - q, 16); ++i) {
        const __m512 x = _mm512_mul_ps(_mm512_castsi512_ps(r[i]), _mm512_set1_ps(factor[q + i]));
        store(to + (q + i) * stride + d, lanes(size - d), x);
      }
    }
  }
}

// `count` rows of a C [rows x padded], all times one factor.
template <class T>
inline void write_rows(T* to, int64_t stride, int64_t count, int64_t size, const float* c, int64_t rows, float factor) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < size; d += 16) {
      const __m512 x = _mm512_loadu_ps(at_c(const_cast<float*>(c), i, d / W * W, rows) + d % W);
      store(to + i * stride + d, lanes(size - d), _mm512_mul_ps(x, _mm512_set1_ps(factor)));
    }
  }
}

// ----------------------------------------------------------------------------------------------------- units and
// memory

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

template <class T>
struct ForwardBuffers {
  T *k_a, *vt_a, *qt_b, *pt_b, *copy;
  float *scores, *ot_c;

  ForwardBuffers(Scratch& from, int64_t rows, int64_t padded)
      : k_a(from.take<T>(rows * padded)),
        vt_a(from.take<T>(rows * padded)),
        qt_b(from.take<T>(W * padded)),
        pt_b(from.take<T>(KEYS_FORWARD * W)),
        copy(from.take<T>(W * padded)),
        scores(from.take<float>(KEYS_FORWARD * W)),
        ot_c(from.take<float>(W * padded)) {}
};

template <class T>
struct BackwardBuffers {
  T *k_a, *kt_a, *v_a, *q_b, *qt_b, *do_b, *dot_b, *p_a, *ds_a, *ds_b, *copy;
  float *dk_c, *dv_c, *dqt_c, *scores, *dp, *lse, *delta;

  BackwardBuffers(Scratch& from, int64_t rows, int64_t padded)
      : k_a(from.take<T>(rows * padded)),
        kt_a(from.take<T>(rows * padded)),
        v_a(from.take<T>(rows * padded)),
        q_b(from.take<T>(QUERIES<T> * padded)),
        qt_b(from.take<T>(QUERIES<T> * padded)),
        do_b(from.take<T>(QUERIES<T> * padded)),
        dot_b(from.take<T>(QUERIES<T> * padded)),
        p_a(from.take<T>(KEYS * QUERIES<T>)),
        ds_a(from.take<T>(KEYS * QUERIES<T>)),
        ds_b(sizeof(T) == 2 ? from.take<T>(KEYS * QUERIES<T>) : ds_a),  // of floats A and B have one order
        copy(from.take<T>(W * padded)),
        dk_c(from.take<float>(rows * padded)),
        dv_c(from.take<float>(rows * padded)),
        dqt_c(from.take<float>(QUERIES<T> * padded)),
        scores(from.take<float>(W * W)),
        dp(from.take<float>(W * W)),
        lse(from.take<float>(QUERIES<T>)),
        delta(from.take<float>(QUERIES<T>)) {}
};

// The rows of one document in one batch, and one query group.
struct Unit {
  int64_t first, rows, batch, group;
};

template <class T>
inline T* rows_of(const Strided& x, const Unit& unit, int64_t head, int64_t row) {
  return (T*)x.data + (unit.first + row) * x.row + unit.batch * x.batch + head * x.head;
}

inline float* lse_of(const Attention& call, const Unit& unit, int64_t head) {
  const int64_t rows = call.bounds[call.documents];
  return call.lse + (unit.batch * call.heads + head) * rows + unit.first;
}

// ---------------------------------------------------------------------------------------------------------- the passes

// Largest score and sum of exponentials of W queries so far.
struct Running {
  __m512 largest[2], sum[2];
};

// P^T of `keys` keys from their scores, and what the earlier sums must be multiplied with.
template <class T>
inline void softmax(const float* scores, int64_t keys, float c, Running& running, T* p, int64_t depth,
                    __m512 factor[2]) {
  __m512 m[2] = {running.largest[0], running.largest[1]}, base[2];
  for (int64_t i = 0; i < keys; ++i) {
    for (int j = 0; j < 2; ++j) m[j] = _mm512_max_ps(m[j], _mm512_loadu_ps(scores + i * W + 16 * j));
  }
  const __m512 scale = _mm512_set1_ps(c);
  for (int j = 0; j < 2; ++j) {
    factor[j] = exp2<T>(_mm512_mul_ps(_mm512_sub_ps(running.largest[j], m[j]), scale));
    running.largest[j] = m[j];
    running.sum[j] = _mm512_mul_ps(running.sum[j], factor[j]);
    base[j] = _mm512_mul_ps(m[j], scale);
  }
  for (int64_t i = 0; i < keys; i += 2) {
    __m512 x[2][2];
    for (int r = 0; r < 2; ++r) {
      for (int j = 0; j < 2; ++j) {
        x[r][j] = exp2<T>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + (i + r) * W + 16 * j), scale, base[j]));
        running.sum[j] = _mm512_add_ps(running.sum[j], x[r][j]);
      }
    }
    write_b(at_b(p, i, 0, depth), depth, x);
  }
}

// Key i of a block on the diagonal is seen by its queries i, i + 1, ...
inline uint32_t seen(int64_t i) { return 0xffffffffu << i; }

inline void mask_diagonal(float* scores) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < W; ++i) {
    _mm512_mask_storeu_ps(scores + i * W, (__mmask16)~seen(i), never);
    _mm512_mask_storeu_ps(scores + i * W + 16, (__mmask16) ~(seen(i) >> 16), never);
  }
}

// The result of the queries i to i + W of one head, from packed keys and values.
template <class T>
inline void attend(const Attention& call, const Unit& unit, const ForwardBuffers<T>& at, int64_t head, int64_t i) {
  const int64_t size = call.size, padded = round_up(size), rows = round_up(unit.rows);
  const int64_t count = smaller(unit.rows - i, W);
  const float c = call.scale * LOG2_E;
  const Rows<T> q(rows_of<T>(call.q, unit, head, i), call.q.row, count, size, padded, at.copy);
  pack_columns_b(at.qt_b, 0, padded, q, padded);
  Running running;
  for (int j = 0; j < 2; ++j) {
    running.largest[j] = _mm512_set1_ps(-3e38f);  // finite: the difference of two is a number
    running.sum[j] = _mm512_setzero_ps();
  }
  for (int64_t first = 0; first <= i; first += KEYS_FORWARD) {
    const int64_t keys = smaller(KEYS_FORWARD, i + W - first);
    for (int64_t m = 0; m < keys; m += W) {
      product(at.scores + m * W, false, at_a(at.k_a, first + m, 0, rows), rows, at.qt_b, padded, padded);
    }
    if (first + keys > i) mask_diagonal(at.scores + (i - first) * W);
    __m512 factor[2];
    softmax(at.scores, keys, c, running, at.pt_b, KEYS_FORWARD, factor);
    for (int64_t d = 0; first > 0 && d < padded; ++d) {
      for (int j = 0; j < 2; ++j) {
        float* x = at.ot_c + d * W + 16 * j;
        _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_loadu_ps(x), factor[j]));
      }
    }
    for (int64_t d = 0; d < padded; d += W) {
      product(at.ot_c + d * W, first > 0, at_a(at.vt_a, d, first, padded), padded, at.pt_b, KEYS_FORWARD, keys);
    }
  }
  alignas(64) float largest[W], rounded[W], sum[W];
  for (int j = 0; j < 2; ++j) {
    const __m512 scale = _mm512_set1_ps(c), base = _mm512_mul_ps(running.largest[j], scale);
    _mm512_store_ps(largest + 16 * j, running.largest[j]);
    _mm512_store_ps(rounded + 16 * j, _mm512_fmsub_ps(running.largest[j], scale, base));
    _mm512_store_ps(sum + 16 * j, running.sum[j]);
  }
  float* lse = lse_of(call, unit, head) + i;
  for (int64_t r = 0; r < W; ++r) {
    // The exponentials are above their true values by what the product of maximum and c lost in rounding.
    if (r < count) lse[r] = largest[r] + (__builtin_log2f(sum[r]) - rounded[r]) / c;
    sum[r] = 1.f / sum[r];
  }
  write_columns(rows_of<T>(call.out, unit, head, i), call.out.row, count, size, at.ot_c, padded, sum);
}

template <class T>
void forward(const Attention& call, const Unit& unit, Scratch scratch) {
  const int64_t size = call.size, padded = round_up(size), rows = round_up(unit.rows);
  const ForwardBuffers<T> at(scratch, rows, padded);
  for (int64_t i = 0; i < unit.rows; i += W) {
    const T *k = rows_of<T>(call.k, unit, unit.group, i), *v = rows_of<T>(call.v, unit, unit.group, i);
    pack_a(at.k_a, i, rows, Rows<T>(k, call.k.row, unit.rows - i, size, padded, at.copy), padded);
    pack_columns_a(at.vt_a, i, padded, Rows<T>(v, call.v.row, unit.rows - i, size, padded, at.copy), padded);
  }
  const int64_t heads = call.heads / call.groups;
  for (int64_t head = unit.group * heads; head < (unit.group + 1) * heads; ++head) {
    for (int64_t i = 0; i < unit.rows; i += W) attend(call, unit, at, head, i);
  }
}

// delta = the sum over a row of dO O, of `count` rows; the rest become zero.
template <class T>
inline void row_sums(float* delta, const T* grad_out, int64_t stride, const T* out, int64_t out_stride, int64_t count,
                     int64_t size) {
  for (int64_t r = 0; r < W; ++r) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t d = 0; r < count && d < size; d += 16) {
      const __mmask16 mask = lanes(size - d);
      total = _mm512_fmadd_ps(load(grad_out + r * stride + d, mask), load(out + r * out_stride + d, mask), total);
    }
    delta[r] = _mm512_reduce_add_ps(total);
  }
}

// P^T and dS^T (without the scale) of a W x W block from scores and dP^T.
template <class T>
inline void gradients(const float* scores, const float* dp, const float* lse, const float* delta, float c,
                      bool diagonal, T* p_a, T* ds_a, T* ds_b, int64_t depth) {
  constexpr bool half = sizeof(T) == 2;
  const __m512 scale = _mm512_set1_ps(c), unit = half ? scale : _mm512_set1_ps(1.f);
  const __m512 base[2] = {_mm512_mul_ps(_mm512_loadu_ps(lse), unit), _mm512_mul_ps(_mm512_loadu_ps(lse + 16), unit)};
  const __m512 less[2] = {_mm512_loadu_ps(delta), _mm512_loadu_ps(delta + 16)};
  for (int64_t i = 0; i < W; i += 2) {
    __m512 p[2][2], ds[2][2];
    for (int r = 0; r < 2; ++r) {
      for (int j = 0; j < 2; ++j) {
        const int64_t x = (i + r) * W + 16 * j;
        const __m512 score = _mm512_loadu_ps(scores + x);
        p[r][j] = exp2<T>(half ? _mm512_fmsub_ps(score, scale, base[j])
                               : _mm512_mul_ps(_mm512_sub_ps(score, base[j]), scale));
        if (diagonal) p[r][j] = _mm512_maskz_mov_ps((__mmask16)(seen(i + r) >> (16 * j)), p[r][j]);
        ds[r][j] = _mm512_mul_ps(p[r][j], _mm512_sub_ps(_mm512_loadu_ps(dp + x), less[j]));
      }
    }
    write_a(p_a + i * W, p);
    write_a(ds_a + i * W, ds);
    if (half) write_b(at_b(ds_b, i, 0, depth), depth, ds);
  }
}

// Everything of the queries q0 to q0 + `queries` of one head, in the orders of the four products.
template <class T>
inline void pack_queries(const Attention& call, const Unit& unit, const BackwardBuffers<T>& at, int64_t head,
                         int64_t q0, int64_t queries) {
  const int64_t size = call.size, padded = round_up(size);
  for (int64_t i = 0; i < queries; i += W) {
    const int64_t count = smaller(unit.rows - q0 - i, W);
    const Rows<T> q(rows_of<T>(call.q, unit, head, q0 + i), call.q.row, count, size, padded, at.copy);
    pack_b(at.q_b, i, QUERIES<T>, q, padded);
    pack_columns_b(at.qt_b, i, padded, q, padded);
    const T* grad_out = rows_of<T>(call.grad_out, unit, head, q0 + i);
    const Rows<T> grad(grad_out, call.grad_out.row, count, size, padded, at.copy);
    pack_b(at.do_b, i, QUERIES<T>, grad, padded);
    pack_columns_b(at.dot_b, i, padded, grad, padded);
    const T* out = rows_of<T>(call.out, unit, head, q0 + i);
    row_sums(at.delta + i, grad_out, call.grad_out.row, out, call.out.row, count, size);
    const float* lse = lse_of(call, unit, head) + q0 + i;
    for (int64_t r = 0; r < W; ++r) at.lse[i + r] = r < count ? lse[r] : __builtin_inff();  // no query: P is 0
  }
}

// What the keys k0 to k0 + `keys` and the packed queries from q0 on add to the gradients of both.
template <class T>
inline void add_gradients(float c, const BackwardBuffers<T>& at, int64_t rows, int64_t padded, int64_t q0,
                          int64_t queries, int64_t k0, int64_t keys) {
  for (int64_t m = 0; m < keys; m += W) {
    const int64_t from = larger(k0 + m - q0, 0);  // the first of these queries that sees these keys
    for (int64_t n = from; n < queries; n += W) {
      product(at.scores, false, at_a(at.k_a, k0 + m, 0, rows), rows, at_b(at.qt_b, 0, n, padded), padded, padded);
      product(at.dp, false, at_a(at.v_a, k0 + m, 0, rows), rows, at_b(at.dot_b, 0, n, padded), padded, padded);
      gradients(at.scores, at.dp, at.lse + n, at.delta + n, c, k0 + m == q0 + n, at_a(at.p_a, m, n, KEYS),
                at_a(at.ds_a, m, n, KEYS), at_b(at.ds_b, m, n, KEYS), KEYS);
      // The first query sees one key, whose P is 1: dS is 0, where dP - delta would keep what O lost in rounding.
      if (k0 + m + q0 + n == 0) *at.ds_a = *at.ds_b = 0;
    }
    for (int64_t d = 0; d < padded; d += W) {
      product(at_c(at.dv_c, k0 + m, d, rows), true, at_a(at.p_a, m, from, KEYS), KEYS,
              at_b(at.do_b, from, d, QUERIES<T>), QUERIES<T>, queries - from);
      product(at_c(at.dk_c, k0 + m, d, rows), true, at_a(at.ds_a, m, from, KEYS), KEYS,
              at_b(at.q_b, from, d, QUERIES<T>), QUERIES<T>, queries - from);
    }
  }
  for (int64_t n = larger(k0 - q0, 0); n < queries; n += W) {
    const int64_t depth = smaller(keys, q0 + n + W - k0);  // of these keys, those that the queries see
    for (int64_t d = 0; d < padded; d += W) {
      product(at_c(at.dqt_c, d, n, padded), k0 > 0, at_a(at.kt_a, d, k0, padded), padded, at_b(at.ds_b, 0, n, KEYS),
              KEYS, depth);
    }
  }
}

template <class T>
void backward(const Attention& call, const Unit& unit, Scratch scratch) {
  const int64_t size = call.size, padded = round_up(size), rows = round_up(unit.rows);
  const BackwardBuffers<T> at(scratch, rows, padded);
  memset(at.dk_c, 0, rows * padded * sizeof(float));
  memset(at.dv_c, 0, rows * padded * sizeof(float));
  for (int64_t i = 0; i < unit.rows; i += W) {
    const T* v = rows_of<T>(call.v, unit, unit.group, i);
    pack_a(at.v_a, i, rows, Rows<T>(v, call.v.row, unit.rows - i, size, padded, at.copy), padded);
    const Rows<T> k(rows_of<T>(call.k, unit, unit.group, i), call.k.row, unit.rows - i, size, padded, at.copy);
    pack_a(at.k_a, i, rows, k, padded);
    pack_columns_a(at.kt_a, i, padded, k, padded);
  }
  float factors[W];
  for (int64_t i = 0; i < W; ++i) factors[i] = call.scale;
  const int64_t heads = call.heads / call.groups;
  for (int64_t head = unit.group * heads; head < (unit.group + 1) * heads; ++head) {
    for (int64_t q0 = 0; q0 < unit.rows; q0 += QUERIES<T>) {
      const int64_t queries = smaller(round_up(unit.rows - q0), QUERIES<T>);
      pack_queries(call, unit, at, head, q0, queries);
      for (int64_t k0 = 0; k0 < q0 + queries; k0 += KEYS) {
        const int64_t keys = smaller(KEYS, q0 + queries - k0);
        add_gradients(call.scale * LOG2_E, at, rows, padded, q0, queries, k0, keys);
      }
      for (int64_t i = 0; i < queries; i += W) {
        write_columns(rows_of<T>(call.grad_q, unit, head, q0 + i), call.grad_q.row, unit.rows - q0 - i, size,
                      at_c(at.dqt_c, 0, i, padded), padded, factors);
      }
    }
  }
  T *grad_k = rows_of<T>(call.grad_k, unit, unit.group, 0), *grad_v = rows_of<T>(call.grad_v, unit, unit.group, 0);
  write_rows(grad_k, call.grad_k.row, unit.rows, size, at.dk_c, rows, call.scale);
  write_rows(grad_v, call.grad_v.row, unit.rows, size, at.dv_c, rows, 1.f);
}

// All units; `Buffers` are those of the pass.
template <class T, class Buffers>
bool run(const Attention& call, void (*pass)(const Attention&, const Unit&, Scratch)) {
  int64_t longest = 0;
  for (int64_t i = 0; i < call.documents; ++i) longest = larger(longest, call.bounds[i + 1] - call.bounds[i]);
  const int64_t units = call.documents * call.batches * call.groups;
  const int threads = (int)smaller(call.threads, units);
  Scratch counted;
  const Buffers sizes(counted, round_up(longest), round_up(call.size));
  const int64_t each = (counted.used + 4095) / 4096 * 4096;  // no two threads write to one page
  char* const memory = (char*)aligned_alloc(4096, each * threads);
  if (memory == nullptr) return false;
#pragma omp parallel num_threads(threads)
  {
    if (sizeof(T) == 2) {
      const TileShapes shapes;
      _tile_loadconfig(&shapes);
    }
#ifdef _OPENMP
    const Scratch scratch{memory + each * omp_get_thread_num()};
#else
    const Scratch scratch{memory};
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; ++i) {
      const int64_t document = i / (call.batches * call.groups), first = call.bounds[document];
      pass(call, Unit{first, call.bounds[document + 1] - first, i / call.groups % call.batches, i % call.groups},
           scratch);
    }
    if (sizeof(T) == 2) _tile_release();
  }
  free(memory);
  return true;
}

}  // namespace

const char* attention_obstacle(bool half) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return "the processor has no AVX-512";
  }
  if (!half) return "";
  unsigned a, b, c, d = 0;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  if (!tiles || !__builtin_cpu_supports("avx512bf16")) return "the processor has no AMX for bfloat16";
  // Linux 5.16 and later, Documentation/arch/x86/xstate.rst
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? "" : "the system grants no AMX tiles";
}

bool attention_forward(const Attention& call) {
  return call.half ? run<Half, ForwardBuffers<Half>>(call, forward<Half>)
                   : run<float, ForwardBuffers<float>>(call, forward<float>);
}

bool attention_backward(const Attention& call) {
  return call.half ? run<Half, BackwardBuffers<Half>>(call, backward<Half>)
                   : run<float, BackwardBuffers<float>>(call, backward<float>);
}

}  // namespace hammer

#else

namespace hammer {

const char* attention_obstacle(bool) { return "it is written for x86-64, Linux and GCC"; }
bool attention_forward(const Attention&) { return false; }
bool attention_backward(const Attention&) { return false; }

}  // namespace hammer

#endif
