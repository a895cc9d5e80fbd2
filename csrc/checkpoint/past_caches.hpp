// Stores that go past the core's caches. An ordinary one first reads the line that it overwrites, and pushes another
// out of the cache; a streaming one does neither: two bytes move for each that is copied, not three. memcpy stores so,
// too, from sizes of the order of the last cache on, which a virtual machine may take for the whole host's (260 MiB).

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace past_caches {

constexpr int64_t LINE = 64;

// Bytes before the first whole line.
inline int64_t to_line(const void* target) { return -reinterpret_cast<intptr_t>(target) & (LINE - 1); }

// target: at the begin of a line; n: whole lines. `finish` must follow before anybody else reads them.
inline void copy_lines(void* target, const void* source, int64_t n) {
#if defined(__x86_64__)  // SSE2 is part of it; the four parts of a line leave the core together
  const auto* from = static_cast<const __m128i*>(source);
  auto* to = static_cast<__m128i*>(target);
  for (int64_t i = 0; i < n / 16; i += 4) {
    const __m128i a = _mm_loadu_si128(from + i), b = _mm_loadu_si128(from + i + 1), c = _mm_loadu_si128(from + i + 2),
                  d = _mm_loadu_si128(from + i + 3);
    _mm_stream_si128(to + i, a);
    _mm_stream_si128(to + i + 1, b);
    _mm_stream_si128(to + i + 2, c);
    _mm_stream_si128(to + i + 3, d);
  }
#else
  std::memcpy(target, source, n);
#endif
}

inline void finish() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace past_caches
