// XXH3-128 of a stream (seed 0, default secret) of more than 240 bytes, as its specification has it: eight sums of 64
// bits take 64 bytes (a stripe) at a time; after 16 stripes (1 KiB) they are scrambled; the last 64 bytes of all are
// taken once more at the end. Written here so that it can run on what the core has just fetched for another purpose
// (digest.cpp); the library `xxhash` is its twin, and hashes what is shorter.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "units.hpp"

namespace xxh3 {

constexpr int64_t STRIPE = 64, STRIPES_IN_BLOCK = 16, SECRET = 192, SHORTEST = 241;
constexpr uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu, PRIME64_3 = 0x165667B19E3779F9u,
                   PRIME64_4 = 0x85EBCA77C2B2AE63u, PRIME64_5 = 0x27D4EB2F165667C5u;

alignas(64) constexpr uint8_t secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint64_t word(const uint8_t* at) {  // of a little-endian machine, as all that the package runs on are
  uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// sums: [8]; takes `n` stripes, the first of which is number `at` of its block.
using TakeStripes = void (*)(uint64_t* sums, const uint8_t* data, int64_t at, int64_t n);

constexpr const uint8_t* SCRAMBLER = secret + SECRET - STRIPE;

inline void take_stripe(uint64_t* sums, const uint8_t* data, const uint8_t* key) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t value = word(data + 8 * i), mixed = value ^ word(key + 8 * i);
    sums[i ^ 1] += value;
    sums[i] += (mixed & 0xffffffffu) * (mixed >> 32);
  }
}

inline void take_stripes_portable(uint64_t* sums, const uint8_t* data, int64_t at, int64_t n) {
  for (; n > 0; --n, data += STRIPE) {
    take_stripe(sums, data, secret + 8 * at);
    if (++at == STRIPES_IN_BLOCK) {
      for (int i = 0; i < 8; ++i) sums[i] = (sums[i] ^ (sums[i] >> 47) ^ word(SCRAMBLER + 8 * i)) * PRIME32_1;
      at = 0;
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
UNIT("avx2") inline void take_stripes_avx2(uint64_t* sums, const uint8_t* data, int64_t at, int64_t n) {
  auto* to = reinterpret_cast<__m256i*>(sums);
  __m256i half[2] = {_mm256_loadu_si256(to), _mm256_loadu_si256(to + 1)};
  const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
  for (; n > 0; --n, data += STRIPE) {
    for (int i = 0; i < 2; ++i) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + i);
      const __m256i with = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret + 8 * at) + i);
      const __m256i mixed = _mm256_xor_si256(value, with);
      half[i] = _mm256_add_epi64(half[i], _mm256_shuffle_epi32(value, 0x4e));  // each sum gets its neighbour's value
      half[i] = _mm256_add_epi64(half[i], _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32)));
    }
    if (++at == STRIPES_IN_BLOCK) {
      for (int i = 0; i < 2; ++i) {
        const __m256i with = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(SCRAMBLER) + i);
        const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(half[i], _mm256_srli_epi64(half[i], 47)), with);
        const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime), 32);
        half[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), high);
      }
      at = 0;
    }
  }
  _mm256_storeu_si256(to, half[0]);
  _mm256_storeu_si256(to + 1, half[1]);
}

// The forms with a mask are the same instructions; those without make GCC 12 warn of its own headers.
UNIT("avx512f,avx512dq,avx512bw,avx512vl")
inline void take_stripes_avx512(uint64_t* sums, const uint8_t* data, int64_t at, int64_t n) {
  __m512i sum = _mm512_loadu_si512(sums);
  const __m512i prime = _mm512_set1_epi64(PRIME32_1), scrambler = _mm512_loadu_si512(SCRAMBLER);
  while (n > 0) {
    const int64_t end = std::min(STRIPES_IN_BLOCK, at + n);
    n -= end - at;
    for (; at < end; ++at, data += STRIPE) {
      const __m512i value = _mm512_loadu_si512(data);
      const __m512i mixed = _mm512_xor_si512(value, _mm512_loadu_si512(secret + 8 * at));
      const __m512i high = _mm512_maskz_srli_epi64(0xff, mixed, 32);
      const __m512i neighbour = _mm512_maskz_shuffle_epi32(0xffff, value, static_cast<_MM_PERM_ENUM>(0x4e));
      sum = _mm512_add_epi64(sum, _mm512_add_epi64(neighbour, _mm512_maskz_mul_epu32(0xff, mixed, high)));
    }
    if (at == STRIPES_IN_BLOCK) {
      const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_maskz_srli_epi64(0xff, sum, 47)), scrambler);
      sum = _mm512_mullo_epi64(mixed, prime);
      at = 0;
    }
  }
  _mm512_storeu_si512(sums, sum);
}
#endif

inline TakeStripes choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (units::has_avx512()) return take_stripes_avx512;
  if (units::has_avx2()) return take_stripes_avx2;
#endif
  return take_stripes_portable;
}

inline const TakeStripes take_stripes = choose();

// The hash of a stream that comes in parts of any length.
class Hash {
 public:
  void update(const uint8_t* data, int64_t n) {
    if (n == 0) return;
    total_ += n;
    if (waiting_ > 0) {  // at least a byte must follow a stripe before it is taken: the last one is another's
      const int64_t part = std::min(STRIPE - waiting_, n);
      std::memcpy(rest_.data() + waiting_, data, part);
      waiting_ += part;
      data += part;
      n -= part;
      if (n == 0) return;
      take(rest_.data(), 1);
      before_ = rest_;
    }
    const int64_t stripes = (n - 1) / STRIPE;
    if (stripes > 0) {
      take(data, stripes);
      data += stripes * STRIPE;
      std::memcpy(before_.data(), data - STRIPE, STRIPE);
    }
    waiting_ = n - stripes * STRIPE;
    std::memcpy(rest_.data(), data, waiting_);
  }

  int64_t total() const { return total_; }

  // (high, low) of 64 bits each; of SHORTEST bytes and more.
  std::array<uint64_t, 2> value() const {
    alignas(64) uint64_t sums[8];
    std::memcpy(sums, sums_, sizeof sums);
    std::array<uint8_t, STRIPE> last;
    std::memcpy(last.data(), before_.data() + waiting_, STRIPE - waiting_);
    std::memcpy(last.data() + STRIPE - waiting_, rest_.data(), waiting_);
    take_stripe(sums, last.data(), SCRAMBLER - 7);
    const auto length = static_cast<uint64_t>(total_);
    return {merged(sums, SCRAMBLER - 11, ~(length * PRIME64_2)), merged(sums, secret + 11, length * PRIME64_1)};
  }

 private:
  void take(const uint8_t* data, int64_t n) {
    take_stripes(sums_, data, in_block_, n);
    in_block_ = (in_block_ + n) % STRIPES_IN_BLOCK;
  }

  static uint64_t merged(const uint64_t* sums, const uint8_t* key, uint64_t start) {
    for (int i = 0; i < 8; i += 2) {
      const auto product =
          static_cast<unsigned __int128>(sums[i] ^ word(key + 8 * i)) * (sums[i + 1] ^ word(key + 8 * i + 8));
      start += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    start ^= start >> 37;
    start *= 0x165667919E3779F9u;
    return start ^ (start >> 32);
  }

  alignas(64) uint64_t sums_[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                   PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
  std::array<uint8_t, STRIPE> before_{}, rest_{};  // the stripe taken last; what follows it, 1 to 64 bytes
  int64_t total_ = 0, waiting_ = 0, in_block_ = 0;
};

}  // namespace xxh3
