// Discrete Fourier transforms of square pictures, channels side by side in vectors; mathematics: convolution.py.
//
// A picture of h x h pixels has period N = h + 1 in both directions: its border of zeros is the one more pixel. A
// spectrum is 1 real and (N^2 - 1) / 2 complex numbers, of which three reals are kept: a, b and a + b, so that three
// real products make a complex one. Compiled with FA_ISA.
#pragma once

#include "conv_vector.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

// cos or sin (odd) of 2 pi k / n by its series; k is first brought to -n/2 .. n/2.
constexpr double circle(int k, int n, bool odd) {
  k %= n;
  if (2 * k > n) k -= n;
  const double angle = 6.283185307179586476925 * k / n;
  double term = odd ? angle : 1.0, sum = term;
  for (int i = odd ? 2 : 1; i < 40; i += 2) sum += term *= -angle * angle / (i * (i + 1));
  return sum;
}

template <int h>
struct Angles {
  static constexpr int period = h + 1, pairs = h / 2;
  float cosine[pairs + 1][pairs + 1], sine[pairs + 1][pairs + 1];  // of 2 pi k j / period
  constexpr Angles() : cosine{}, sine{} {
    for (int k = 0; k <= pairs; ++k)
      for (int j = 0; j <= pairs; ++j) {
        cosine[k][j] = static_cast<float>(circle(k * j, period, false));
        sine[k][j] = static_cast<float>(circle(k * j, period, true));
      }
  }
};

// A line of h pixels at places 1 .. h: z[0] its sum, z[k] and z[pairs + k] its products with cosines and sines.
template <int h>
struct PictureLine {
  static constexpr int size = h, pairs = h / 2;
  static constexpr Angles<h> angles{};

  static void transform(const Vector* x, Vector* z) {
    Vector even[pairs], odd[pairs];
#pragma GCC unroll 8
    for (int j = 0; j < pairs; ++j) even[j] = x[j] + x[h - 1 - j], odd[j] = x[j] - x[h - 1 - j];
    z[0] = even[0];
#pragma GCC unroll 8
    for (int j = 1; j < pairs; ++j) z[0] += even[j];
#pragma GCC unroll 8
    for (int k = 1; k <= pairs; ++k) {
      Vector c = even[0] * angles.cosine[k][1], s = odd[0] * angles.sine[k][1];
#pragma GCC unroll 8
      for (int j = 1; j < pairs; ++j) c += even[j] * angles.cosine[k][j + 1], s += odd[j] * angles.sine[k][j + 1];
      z[k] = c, z[pairs + k] = s;
    }
  }

  static void invert(const Vector* z, Vector* y) {
#pragma GCC unroll 8
    for (int j = 1; j <= pairs; ++j) {
      Vector even = z[0] + z[1] * angles.cosine[1][j], odd = z[pairs + 1] * angles.sine[1][j];
#pragma GCC unroll 8
      for (int k = 2; k <= pairs; ++k) even += z[k] * angles.cosine[k][j], odd += z[pairs + k] * angles.sine[k][j];
      y[j - 1] = even + odd, y[h - j] = even - odd;
    }
  }
};

// The same of a kernel's three taps, at places -1, 0 and 1.
template <int h>
struct KernelLine {
  static constexpr int size = 3, pairs = h / 2;
  static constexpr Angles<h> angles{};

  static void transform(const Vector* x, Vector* z) {
    const Vector even = x[0] + x[2], odd = x[2] - x[0];
    z[0] = x[1] + even;
#pragma GCC unroll 8
    for (int k = 1; k <= pairs; ++k)
      z[k] = x[1] + even * angles.cosine[k][1], z[pairs + k] = odd * angles.sine[k][1];
  }

  static void invert(const Vector* z, Vector* y) {
    Vector middle = z[0], even = z[0], odd{};
#pragma GCC unroll 8
    for (int k = 1; k <= pairs; ++k) {
      middle += z[k];
      even += z[k] * angles.cosine[k][1], odd += z[pairs + k] * angles.sine[k][1];
    }
    y[0] = even - odd, y[1] = middle, y[2] = even + odd;
  }
};

template <int h>
constexpr int kPoints = 1 + 3 * ((h + 1) * (h + 1) - 1) / 2;

// From load(i, j), a pixel, to numbers `floats` apart: sums over pixels of exp(2 pi i (k i + l j) / N).
template <int h, template <int> class Line, typename Load>
inline void transform(const Load load, float* to, int64_t floats) {
  constexpr int size = Line<h>::size, pairs = h / 2;
  Vector lines[h + 1][size];
  for (int j = 0; j < size; ++j) {
    Vector x[size], z[h + 1];
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) x[i] = load(i, j);
    Line<h>::transform(x, z);
#pragma GCC unroll 17
    for (int k = 0; k <= h; ++k) lines[k][j] = z[k];
  }
  const auto put = [&](Vector a, Vector b) {
    store_vector(to, a), store_vector(to + floats, b), store_vector(to + 2 * floats, a + b);
    to += 3 * floats;
  };
  Vector z[h + 1];
  Line<h>::transform(lines[0], z);
  store_vector(to, z[0]);
  to += floats;
#pragma GCC unroll 8
  for (int l = 1; l <= pairs; ++l) put(z[l], z[pairs + l]);
  for (int k = 1; k <= pairs; ++k) {
    Vector c[h + 1], s[h + 1];
    Line<h>::transform(lines[k], c);
    Line<h>::transform(lines[pairs + k], s);
    put(c[0], s[0]);
#pragma GCC unroll 8
    for (int l = 1; l <= pairs; ++l) {
      put(c[l] - s[pairs + l], s[l] + c[pairs + l]);
      put(c[l] + s[pairs + l], s[l] - c[pairs + l]);
    }
  }
}

// The way back, times N^2 / 2, from numbers `floats` apart, each three products of what was kept: store(i, j, value).
template <int h, template <int> class Line, typename Store>
inline void invert(const float* from, int64_t floats, const Store store) {
  constexpr int size = Line<h>::size, pairs = h / 2;
  Vector lines[h + 1][size];
  const auto get = [&](Vector& a, Vector& b) {
    const Vector first = load_vector(from), second = load_vector(from + floats);
    a = first - second, b = load_vector(from + 2 * floats) - (first + second);
    from += 3 * floats;
  };
  Vector z[h + 1];
  z[0] = load_vector(from) * 0.5f;  // the others stand for two: for their conjugates, too
  from += floats;
#pragma GCC unroll 8
  for (int l = 1; l <= pairs; ++l) get(z[l], z[pairs + l]);
  Line<h>::invert(z, lines[0]);
  for (int k = 1; k <= pairs; ++k) {
    Vector c[h + 1], s[h + 1];
    get(c[0], s[0]);
#pragma GCC unroll 8
    for (int l = 1; l <= pairs; ++l) {
      Vector a, b, a2, b2;
      get(a, b);
      get(a2, b2);
      c[l] = a + a2, s[pairs + l] = a2 - a, s[l] = b + b2, c[pairs + l] = b - b2;
    }
    Line<h>::invert(c, lines[k]);
    Line<h>::invert(s, lines[pairs + k]);
  }
  for (int j = 0; j < size; ++j) {
    Vector y[size];
#pragma GCC unroll 17
    for (int k = 0; k <= h; ++k) z[k] = lines[k][j];
    Line<h>::invert(z, y);
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) store(i, j, y[i]);
  }
}

}  // namespace
}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
