// UTF-8, as much of it as an encoder needs. Text is valid by then: Python's str, or checked by is_utf8.

#pragma once

#include <cstdint>
#include <string_view>

namespace hammer {

// Bytes of the character that begins with this byte.
inline int utf8_length(unsigned char lead) { return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

// The character at `s`; `length` becomes its bytes.
inline uint32_t utf8_decode(const char* s, int& length) {
  const auto* u = reinterpret_cast<const unsigned char*>(s);
  const uint32_t lead = u[0];
  if (lead < 0x80) return length = 1, lead;
  if (lead < 0xE0) return length = 2, (lead & 0x1F) << 6 | (u[1] & 0x3Fu);
  if (lead < 0xF0) return length = 3, (lead & 0x0F) << 12 | (u[1] & 0x3Fu) << 6 | (u[2] & 0x3Fu);
  return length = 4, (lead & 0x07) << 18 | (u[1] & 0x3Fu) << 12 | (u[2] & 0x3Fu) << 6 | (u[3] & 0x3Fu);
}

// Writes the character to `out` (room for 4 bytes) and returns its bytes.
inline int utf8_encode(uint32_t c, char* out) {
  if (c < 0x80) return out[0] = static_cast<char>(c), 1;
  const auto tail = [c](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x800) return out[0] = static_cast<char>(0xC0 | c >> 6), out[1] = tail(0), 2;
  if (c < 0x10000) return out[0] = static_cast<char>(0xE0 | c >> 12), out[1] = tail(6), out[2] = tail(0), 3;
  return out[0] = static_cast<char>(0xF0 | c >> 18), out[1] = tail(12), out[2] = tail(6), out[3] = tail(0), 4;
}

inline bool is_surrogate(uint32_t c) { return c >= 0xD800 && c < 0xE000; }

// Whether all of it is valid: no stray, missing or overlong bytes, no surrogates, nothing beyond U+10FFFF.
inline bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const int expected = utf8_length(lead);
    if ((lead >= 0x80 && lead < 0xC2) || lead > 0xF4 || text.size() - i < static_cast<size_t>(expected)) return false;
    for (int k = 1; k < expected; ++k) {
      if ((static_cast<unsigned char>(text[i + k]) & 0xC0) != 0x80) return false;
    }
    int length;
    const uint32_t c = utf8_decode(text.data() + i, length);
    if (c > 0x10FFFF || is_surrogate(c) || (expected == 3 && c < 0x800) || (expected == 4 && c < 0x10000)) return false;
    i += expected;
  }
  return true;
}

}  // namespace hammer
