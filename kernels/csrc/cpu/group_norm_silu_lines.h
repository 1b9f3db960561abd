// The loops of group_norm_silu over lines of values, which the compiler vectorises; only its kernel file includes this.
#pragma once

#include <bit>
#include <cstdint>

#include "common.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kSpan = 256;  // values that are widened to float32 at a time

// Arithmetic runs on float32 in the first-level cache: loops over bfloat16 itself vectorise into half as many, wider
// steps with more shuffles, and are slower by a third.
inline const float* widen(const float* p, int64_t, float*) { return p; }
inline const float* widen(const bf16* p, int64_t count, float* buffer) {
  for (int64_t j = 0; j < count; ++j) buffer[j] = load(p + j);
  return buffer;
}
inline float* target(float* p, float*) { return p; }
inline float* target(bf16*, float* buffer) { return buffer; }
inline void narrow(const float*, int64_t, float*) {}
inline void narrow(const float* p, int64_t count, bf16* out) {  // as `store`, with one branch-free choice for NaN
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t u = std::bit_cast<uint32_t>(p[j]), nan = p[j] == p[j] ? 0u : 0x7fc00000u;
    out[j].bits = static_cast<uint16_t>(((u + (0x7fffu + ((u >> 16) & 1u))) | nan) >> 16);
  }
}

// 1 / (1 + exp(-v)), relative error below 1.5e-7 for |v| <= 87, and constant from there on. Bounds are set on the bits: a
// comparison of floats would become branches that the vectoriser turns into many selections.
inline float sigmoid(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const int32_t size = static_cast<int32_t>(bits & 0x7fffffffu);
  constexpr int32_t kMost = 0x42ae0000;  // 87
  const float w = std::bit_cast<float>(static_cast<uint32_t>(size < kMost ? size : kMost) | (bits & 0x80000000u));
  const float z = w * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are k = round(-w / ln 2)
  const float k = z - 12582912.0f;
  const float r = -w - k * 0.693145752f - k * 1.42860677e-6f;  // ln 2 in two parts, the first exact times k
  // Minimax polynomial of (exp(r) - 1 - r) / r^2, relative error 3e-9; as a tree, whose latency is shorter.
  const float q = r * r;
  float p = (0.0013814466740936678f * q + (0.008368780429109705f * r + 0.04166839421740409f)) * q;
  p = ((p + (0.16666520107626212f * r + 0.49999993412469634f)) * q + r) + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(z) << 23) + 0x3f800000u);
  return 1.0f / (1.0f + p * power);
}

template <bool kSilu>
inline float activation(float v) {
  return kSilu ? v * sigmoid(v) : v;
}

template <bool kSilu>
inline float slope(float v) {
  if constexpr (!kSilu) return 1.0f;
  const float s = sigmoid(v);
  return s * (1.0f + v * (1.0f - s));
}

// A line is `width` values side by side; its coefficients are arrays (channels-last) or one number (contiguous). The
// sums must be inlined: a call costs as much as a short line.

struct Same {
  float value;
  float operator[](int64_t) const { return value; }
  Same operator+(int64_t) const { return *this; }
};

// `lines` lines, and a last one of `tail` values.
struct Lines {
  int64_t lines, width, tail;
  int64_t size(int64_t i) const { return i < lines ? width : tail; }
};

// Sums of d and d^2, d = x - shift.
template <class T, class C>
[[gnu::always_inline]] inline void moments_of_lines(const T* x, C shift, const Lines& of, float* s1, float* s2) {
  constexpr int kTogether = 4;
  float buffer[kTogether][kSpan];
  for (int64_t j = 0; j < of.width; ++j) s1[j] = s2[j] = 0.0f;
  for (int64_t i = 0; i <= of.lines;) {
    const int64_t step = i + kTogether <= of.lines ? kTogether : 1, end = of.size(i);
    for (int64_t at = 0; at < end; at += kSpan) {
      const int64_t count = end - at < kSpan ? end - at : kSpan;
      const C k = shift + at;
      float *t1 = s1 + at, *t2 = s2 + at;
      const float* q[kTogether];
      for (int64_t l = 0; l < step; ++l) q[l] = widen(x + (i + l) * of.width + at, count, buffer[l]);
      if (step == kTogether) {
        const float *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3];
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          const float d0 = q0[j] - k[j], d1 = q1[j] - k[j], d2 = q2[j] - k[j], d3 = q3[j] - k[j];
          t1[j] += (d0 + d1) + (d2 + d3);
          t2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
        }
      } else {
        const float* q0 = q[0];
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          const float d = q0[j] - k[j];
          t1[j] += d;
          t2[j] += d * d;
        }
      }
    }
    i += step;
  }
}

// Sums of x - m, dv and dv*(x - m). dv of line i goes to kept + i*kept_pitch.
template <class T, bool kSilu, class C>
[[gnu::always_inline]] inline void sums_of_lines(const T* x, const T* dy, C a, C b, C m, const Lines& of, float* kept,
                                                 int64_t kept_pitch, float* s0, float* s1, float* s2) {
  float x_buffer[kSpan], dy_buffer[kSpan];
  for (int64_t j = 0; j < of.width; ++j) s0[j] = s1[j] = s2[j] = 0.0f;
  for (int64_t i = 0; i <= of.lines; ++i, x += of.width, dy += of.width, kept += kept_pitch) {
    const int64_t end = of.size(i);
    for (int64_t at = 0; at < end; at += kSpan) {
      const int64_t count = end - at < kSpan ? end - at : kSpan;
      const float *p = widen(x + at, count, x_buffer), *q = widen(dy + at, count, dy_buffer);
      const C aa = a + at, bb = b + at, mm = m + at;
      float *t0 = s0 + at, *t1 = s1 + at, *t2 = s2 + at, *to = kept + at;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        const float centred = p[j] - mm[j], dv = q[j] * slope<kSilu>(p[j] * aa[j] + bb[j]);
        to[j] = dv;
        t0[j] += centred;
        t1[j] += dv;
        t2[j] += dv * centred;
      }
    }
  }
}

template <class T, bool kSilu, class C>
void forward_line(const T* x, T* y, C a, C b, int64_t width) {
  float buffer[kSpan];
  for (int64_t at = 0; at < width; at += kSpan, x += kSpan, y += kSpan) {
    const int64_t count = width - at < kSpan ? width - at : kSpan;
    const float* p = widen(x, count, buffer);
    float* out = target(y, buffer);
    const C aa = a + at, bb = b + at;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) out[j] = activation<kSilu>(p[j] * aa[j] + bb[j]);
    narrow(out, count, y);
  }
}

// From the dv that was kept, or (null) from dy again.
template <class T, bool kSilu, class C>
void backward_line(const T* x, const T* dy, const float* kept, T* dx, C a, C b, C c1, C c0, int64_t width) {
  float x_buffer[kSpan], dy_buffer[kSpan], dv_buffer[kSpan];
  for (int64_t at = 0; at < width; at += kSpan, x += kSpan, dy += kSpan, dx += kSpan) {
    const int64_t count = width - at < kSpan ? width - at : kSpan;
    const float *p = widen(x, count, x_buffer), *dv = kept ? kept + at : dv_buffer;
    const C aa = a + at, bb = b + at, k1 = c1 + at, k0 = c0 + at;
    if (!kept) {
      const float* q = widen(dy, count, dy_buffer);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) dv_buffer[j] = q[j] * slope<kSilu>(p[j] * aa[j] + bb[j]);
    }
    float* out = target(dx, x_buffer);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) out[j] = aa[j] * dv[j] + (k1[j] * p[j] + k0[j]);
    narrow(out, count, dx);
  }
}

}  // namespace
}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
