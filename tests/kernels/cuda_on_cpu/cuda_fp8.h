// The cast to fp8 (arXiv 2209.05433): e4m3 without infinities, e5m2; nearest even. Without saturation all that is too
// large becomes NaN here.
#pragma once

#include "cuda_runtime.h"

enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };

inline uint8_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturation, __nv_fp8_interpretation_t kind) {
  const int mantissa = kind == __NV_E4M3 ? 3 : 2, bias = kind == __NV_E4M3 ? 7 : 15;
  const float largest = kind == __NV_E4M3 ? 448.f : 57344.f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x || (saturation == __NV_NOSAT && std::fabs(x) > largest)) return 0x7f;
  const float size = std::fmin(std::fabs(x), largest);
  int exponent = size > 0.f ? std::ilogb(size) : 1 - bias;
  if (exponent < 1 - bias) exponent = 1 - bias;                               // subnormal: the spacing stays
  const float steps = std::nearbyint(std::ldexp(size, mantissa - exponent));  // 2^mantissa and more for a normal number
  const int code = ((exponent + bias - 1) << mantissa) + static_cast<int>(steps);  // a carry goes into the exponent
  return static_cast<uint8_t>(sign | code);
}

using __nv_fp8x2_storage_t = uint16_t;

inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t kind) {
  const unsigned first = __nv_cvt_float_to_fp8(x.x, saturation, kind);
  return static_cast<uint16_t>(first | __nv_cvt_float_to_fp8(x.y, saturation, kind) << 8);
}
