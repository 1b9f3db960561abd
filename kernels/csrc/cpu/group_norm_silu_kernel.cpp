// Loops of group_norm_silu; mathematics and names are those of group_norm_silu.py.
//
// Sums are float32 over a block of at most a few hundred values of one channel, shifted by the block's first value,
// and double from there on (Chan's update): no cancellation, whatever the mean.
#include <bit>
#include <cmath>
#include <initializer_list>

#include "group_norm_silu.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kSpan = 256;          // values that are widened to float32 at a time
constexpr int64_t kLine = 16;            // a contiguous channel is cut into lines of so many values
constexpr int64_t kChannelBlock = 8192;  // values of a contiguous channel that are summed in float32

using Job = GroupNormJob;
using State = GroupNormState;

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

// 1 / (1 + exp(-v)) within 1.5 units in the last place for |v| <= 87, and constant from there on. Bounds are set on the
// bits: a comparison of floats would become branches that the vectoriser turns into many selections.
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
  p = (p + (0.16666520107626212f * r + 0.49999993412469634f)) * q + (1.0f + r);
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

// Chan's update of (mean, m2) of `count` values by a block of others, given as its shift and shifted sums.
struct Merge {
  double inverse, share, cross;
  Merge(double count, double block)
      : inverse(1 / block), share(block / (count + block)), cross(count * block / (count + block)) {}
  void operator()(double& mean, double& m2, float shift, float s1, float s2) const {
    const double sum = s1, inside = s2 - sum * sum * inverse, delta = shift + sum * inverse - mean;
    mean += delta * share;
    m2 += (inside > 0 ? inside : 0) + delta * delta * cross;
  }
};

// --- lines: `width` values side by side, whose coefficients are arrays (channels-last) or one number (contiguous) ---

struct Same {
  float value;
  float operator[](int64_t) const { return value; }
  Same operator+(int64_t) const { return *this; }
};

// Sums of d and d^2, d = x - shift, of `lines` lines and a last one of `tail` values.
template <class T, class C>
[[gnu::always_inline]] inline void moments_of_lines(const T* x, C shift, int64_t lines, int64_t width, int64_t tail, float* s1, float* s2) {
  constexpr int kTogether = 4;
  float buffer[kTogether][kSpan];
  for (int64_t j = 0; j < width; ++j) s1[j] = s2[j] = 0.0f;
  for (int64_t i = 0; i <= lines;) {
    const int64_t step = i + kTogether <= lines ? kTogether : 1, end = i < lines ? width : tail;
    for (int64_t at = 0; at < end; at += kSpan) {
      const int64_t count = end - at < kSpan ? end - at : kSpan;
      const C k = shift + at;
      float *t1 = s1 + at, *t2 = s2 + at;
      const float* q[kTogether];
      for (int64_t l = 0; l < step; ++l) q[l] = widen(x + (i + l) * width + at, count, buffer[l]);
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

// Sums of x - m, dv and dv*(x - m).
template <class T, bool kSilu, class C>
[[gnu::always_inline]] inline void sums_of_lines(const T* x, const T* dy, C a, C b, C m, int64_t lines, int64_t width, int64_t tail, float* s0,
                   float* s1, float* s2) {
  float x_buffer[kSpan], dy_buffer[kSpan];
  for (int64_t j = 0; j < width; ++j) s0[j] = s1[j] = s2[j] = 0.0f;
  for (int64_t i = 0; i <= lines; ++i, x += width, dy += width) {
    const int64_t end = i < lines ? width : tail;
    for (int64_t at = 0; at < end; at += kSpan) {
      const int64_t count = end - at < kSpan ? end - at : kSpan;
      const float *p = widen(x + at, count, x_buffer), *q = widen(dy + at, count, dy_buffer);
      const C aa = a + at, bb = b + at, mm = m + at;
      float *t0 = s0 + at, *t1 = s1 + at, *t2 = s2 + at;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        const float centred = p[j] - mm[j], dv = q[j] * slope<kSilu>(p[j] * aa[j] + bb[j]);
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

template <class T, bool kSilu, class C>
void backward_line(const T* x, const T* dy, T* dx, C a, C b, C c1, C c0, int64_t width) {
  float x_buffer[kSpan], dy_buffer[kSpan];
  for (int64_t at = 0; at < width; at += kSpan, x += kSpan, dy += kSpan, dx += kSpan) {
    const int64_t count = width - at < kSpan ? width - at : kSpan;
    const float *p = widen(x, count, x_buffer), *q = widen(dy, count, dy_buffer);
    float* out = target(dx, x_buffer);
    const C aa = a + at, bb = b + at, k1 = c1 + at, k0 = c0 + at;
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j)
      out[j] = aa[j] * (q[j] * slope<kSilu>(p[j] * aa[j] + bb[j])) + (k1[j] * p[j] + k0[j]);
    narrow(out, count, dx);
  }
}

// --- channels-last pieces ---

// Where a piece of channels-last data lies.
struct Block {
  int64_t offset, count, lines, width, tail;
  Block(const Job& job, int64_t unit, int64_t piece) {
    const int64_t first = piece * job.piece_pixels;
    count = job.pixels - first < job.piece_pixels ? job.pixels - first : job.piece_pixels;
    const int64_t fold = count < job.fold ? count : job.fold;
    offset = (unit * job.pixels + first) * job.channels;
    lines = count / fold;
    width = fold * job.channels;
    tail = count % fold * job.channels;
  }
};

template <class T, bool kSilu>
void partial_block(const Job& job, int64_t unit, int64_t piece, const State& c, float* part) {
  const Block at(job, unit, piece);
  const T* x = static_cast<const T*>(job.x) + at.offset;
  float *s0 = part, *s1 = s0 + at.width, *s2 = s1 + at.width;
  if (job.backward) {
    sums_of_lines<T, kSilu, const float*>(x, static_cast<const T*>(job.dy) + at.offset, c.a, c.b, c.m, at.lines,
                                          at.width, at.tail, s0, s1, s2);
  } else {  // shifted by the first line
    for (int64_t j = 0; j < at.width; ++j) s0[j] = load(x + j);
    moments_of_lines<T, const float*>(x, s0, at.lines, at.width, at.tail, s1, s2);
  }
}

template <class T, bool kSilu>
void apply_block(const Job& job, int64_t unit, int64_t piece, const State& c) {
  const Block at(job, unit, piece);
  const T *x = static_cast<const T*>(job.x) + at.offset, *dy = static_cast<const T*>(job.dy);
  T* out = static_cast<T*>(job.out) + at.offset;
  if (job.backward) dy += at.offset;
  for (int64_t i = 0, j = 0; i <= at.lines; ++i, j += at.width) {
    const int64_t width = i < at.lines ? at.width : at.tail;
    if (job.backward)
      backward_line<T, kSilu, const float*>(x + j, dy + j, out + j, c.a, c.b, c.c1, c.c0, width);
    else
      forward_line<T, kSilu, const float*>(x + j, out + j, c.a, c.b, width);
  }
}

// --- contiguous pieces ---

template <int64_t kCount = kLine>
inline float add_up(const float* p) {  // pairwise
  if constexpr (kCount == 1) return *p;
  else return add_up<kCount / 2>(p) + add_up<kCount / 2>(p + kCount / 2);
}

template <class T, bool kSilu>
void partial_channel(const Job& job, int64_t unit, int64_t piece, const State& c) {
  const int64_t offset = (unit * job.pieces + piece) * job.pixels;
  const T *x = static_cast<const T*>(job.x) + offset, *dy = static_cast<const T*>(job.dy);
  if (job.backward) dy += offset;
  for (int64_t i = 0; i < job.pixels; i += kChannelBlock) {
    const int64_t size = job.pixels - i < kChannelBlock ? job.pixels - i : kChannelBlock;
    float s0[kLine], s1[kLine], s2[kLine];
    if (job.backward) {
      sums_of_lines<T, kSilu>(x + i, dy + i, Same{c.a[piece]}, Same{c.b[piece]}, Same{c.m[piece]}, size / kLine, kLine,
                              size % kLine, s0, s1, s2);
      c.s0[piece] += add_up(s0);
      c.s1[piece] += add_up(s1);
      c.s2[piece] += add_up(s2);
    } else {
      const float shift = load(x + i);
      moments_of_lines(x + i, Same{shift}, size / kLine, kLine, size % kLine, s1, s2);
      Merge(i, size)(c.s1[piece], c.s2[piece], shift, add_up(s1), add_up(s2));
    }
  }
}

template <class T, bool kSilu>
void apply_channel(const Job& job, int64_t unit, int64_t piece, const State& c) {
  const int64_t offset = (unit * job.pieces + piece) * job.pixels;
  const T* x = static_cast<const T*>(job.x) + offset;
  T* out = static_cast<T*>(job.out) + offset;
  const Same a{c.a[piece]}, b{c.b[piece]};
  if (job.backward)
    backward_line<T, kSilu>(x, static_cast<const T*>(job.dy) + offset, out, a, b, Same{c.c1[piece]}, Same{c.c0[piece]},
                            job.pixels);
  else
    forward_line<T, kSilu>(x, out, a, b, job.pixels);
}

// --- coefficients ---

struct Channel {  // per-sample, per-channel scalars of the formula
  double gain, scale, shift, add;
  Channel(const Job& job, int64_t n, int64_t c)
      : gain(job.weight[c]),
        scale(1.0 + (job.scale ? job.scale[n * job.scale_stride + c] : 0.0f)),
        shift(job.bias[c] * scale + (job.shift ? job.shift[n * job.shift_stride + c] : 0.0f)),
        add(job.add ? job.add[n * job.add_stride + c] : 0.0f) {}
};

// v = a*x + b and m = mean - add of channels first .. first+count of sample n, whose arrays start at channel `base`.
void affine(const Job& job, int64_t n, int64_t base, int64_t first, int64_t count, const State& state) {
  const int64_t group = n * job.groups + first / (job.channels / job.groups);
  const double mean = job.mean[group], rstd = job.rstd[group];
  for (int64_t c = first; c < first + count; ++c) {
    const Channel v(job, n, c);
    const float a = static_cast<float>(rstd * v.gain * v.scale);
    state.a[c - base] = a;
    state.b[c - base] = static_cast<float>((v.add - mean) * a + v.shift);
    state.m[c - base] = static_cast<float>(mean - v.add);
  }
}

void statistics(const Job& job, int64_t n, int64_t base, int64_t first, int64_t count, const State& state) {
  double mean = 0, m2 = 0;
  for (int64_t c = first; c < first + count; ++c) mean += state.s1[c - base] + Channel(job, n, c).add;
  mean /= count;
  for (int64_t c = first; c < first + count; ++c) {
    const double delta = state.s1[c - base] + Channel(job, n, c).add - mean;
    m2 += state.s2[c - base] + job.pixels * delta * delta;
  }
  const int64_t group = n * job.groups + first / count;
  job.mean[group] = static_cast<float>(mean);
  job.rstd[group] = static_cast<float>(1.0 / std::sqrt(m2 / (count * job.pixels) + job.eps));
}

void gradients(const Job& job, int64_t n, int64_t base, int64_t first, int64_t count, const State& state) {
  const int64_t group = n * job.groups + first / count;
  const double mean = job.mean[group], rstd = job.rstd[group];
  double g1 = 0, g2 = 0;  // means over the group of k*dv and k*dv*z, k = weight*(1+scale)
  for (int64_t c = first; c < first + count; ++c) {
    const Channel v(job, n, c);
    g1 += v.gain * v.scale * state.s1[c - base];
    g2 += v.gain * v.scale * (rstd * state.s2[c - base]);
  }
  g1 /= count * job.pixels;
  g2 /= count * job.pixels;
  for (int64_t c = first; c < first + count; ++c) {
    const Channel v(job, n, c);
    const double s1 = state.s1[c - base], s2 = rstd * state.s2[c - base], s0 = rstd * state.s0[c - base];
    const double c1 = -rstd * rstd * g2;
    const int64_t at = n * job.channels + c;
    state.c1[c - base] = static_cast<float>(c1);
    state.c0[c - base] = static_cast<float>((v.add - mean) * c1 - rstd * g1);
    job.sum_dv[at] = static_cast<float>(s1);
    job.sum_dvz[at] = static_cast<float>(s2);
    if (job.d_scale) job.d_scale[at] = static_cast<float>(v.gain * s2 + job.bias[c] * s1);
    if (job.d_add) job.d_add[at] = static_cast<float>(rstd * (v.gain * v.scale * s1 - job.pixels * g1 - s0 * g2));
  }
}

void repeat(const Job& job, float* line) {  // coefficients of one pixel, for all pixels of a line
  for (int64_t j = job.channels; j < job.line(); ++j) line[j] = line[j - job.channels];
}

// Call f(sample, first channel of the arrays, first channel, channels) for each group of a unit.
template <class F>
void each_group(const Job& job, int64_t unit, const F& f) {
  const int64_t count = job.channels / job.groups;
  if (!job.channels_last) {
    const int64_t first = unit % job.groups * count;
    f(unit / job.groups, first, first, count);
    return;
  }
  for (int64_t first = 0; first < job.channels; first += count) f(unit, int64_t{0}, first, count);
}

}  // namespace

// The four steps of a unit, in order: begin, for each piece partial, for each piece in order gather, finish, for each
// piece apply.

void gns_begin(const Job& job, int64_t unit, const State& state) {
  for (int64_t j = 0; j < State::doubles(job); ++j) state.s0[j] = 0;
  if (!job.backward) return;
  each_group(job, unit, [&](int64_t n, int64_t base, int64_t first, int64_t count) {
    affine(job, n, base, first, count, state);
  });
  if (job.channels_last)
    for (float* line : {state.a, state.b, state.m}) repeat(job, line);
}

#define FA_FOR_TYPES(name, ...)                                                                      \
  (job.low_precision ? (job.silu ? name<bf16, true>(__VA_ARGS__) : name<bf16, false>(__VA_ARGS__))   \
                     : (job.silu ? name<float, true>(__VA_ARGS__) : name<float, false>(__VA_ARGS__)))

void gns_partial(const Job& job, int64_t unit, int64_t piece, const State& state, float* part) {
  if (job.channels_last)
    FA_FOR_TYPES(partial_block, job, unit, piece, state, part);
  else
    FA_FOR_TYPES(partial_channel, job, unit, piece, state);
}

void gns_gather(const Job& job, int64_t unit, int64_t piece, const State& state, const float* part) {
  if (!job.channels_last) return;  // a contiguous piece has its own channel
  const Block at(job, unit, piece);
  double *__restrict s0 = state.s0, *__restrict s1 = state.s1, *__restrict s2 = state.s2;
  double seen = static_cast<double>(piece * job.piece_pixels);
  for (int64_t column = 0; column < at.width; column += job.channels) {
    const float *__restrict p0 = part + column, *__restrict p1 = p0 + at.width, *__restrict p2 = p1 + at.width;
    if (job.backward) {
      for (int64_t c = 0; c < job.channels; ++c) {
        s0[c] += p0[c];
        s1[c] += p1[c];
        s2[c] += p2[c];
      }
    } else {
      const double block = static_cast<double>(at.lines + (column < at.tail));
      const Merge merge(seen, block);
      for (int64_t c = 0; c < job.channels; ++c) merge(s1[c], s2[c], p0[c], p1[c], p2[c]);
      seen += block;
    }
  }
}

void gns_finish(const Job& job, int64_t unit, const State& state) {
  each_group(job, unit, [&](int64_t n, int64_t base, int64_t first, int64_t count) {
    if (job.backward) {
      gradients(job, n, base, first, count, state);
    } else {
      statistics(job, n, base, first, count, state);
      affine(job, n, base, first, count, state);
    }
  });
  if (!job.channels_last) return;
  if (job.backward)
    for (float* line : {state.c1, state.c0}) repeat(job, line);
  else
    for (float* line : {state.a, state.b}) repeat(job, line);
}

void gns_apply(const Job& job, int64_t unit, int64_t piece, const State& state) {
  if (job.channels_last)
    FA_FOR_TYPES(apply_block, job, unit, piece, state);
  else
    FA_FOR_TYPES(apply_channel, job, unit, piece, state);
}

// d_weight, d_bias [channels] from the samples' sums, in order.
void gns_parameters(const Job& job, int64_t first, int64_t last, float* d_weight, float* d_bias) {
  constexpr int64_t kChunk = 64;
  for (int64_t begin = first; begin < last; begin += kChunk) {
    const int64_t size = last - begin < kChunk ? last - begin : kChunk;
    double w[kChunk] = {}, b[kChunk] = {};
    for (int64_t n = 0; n < job.samples; ++n) {
      const float* dv = job.sum_dv + n * job.channels + begin;
      const float* dvz = job.sum_dvz + n * job.channels + begin;
      const float* scale = job.scale ? job.scale + n * job.scale_stride + begin : nullptr;
      for (int64_t j = 0; j < size; ++j) {
        const double gain = 1.0 + (scale ? scale[j] : 0.0f);
        w[j] += gain * dvz[j];
        b[j] += gain * dv[j];
      }
    }
    for (int64_t j = 0; j < size; ++j) {
      d_weight[begin + j] = static_cast<float>(w[j]);
      d_bias[begin + j] = static_cast<float>(b[j]);
    }
  }
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
