// Loops of group_norm_silu; mathematics and names are those of group_norm_silu.py.
//
// Sums are float32 over a block of a channel, at most 512 additions in a row, shifted by the block's first value, and
// double from there on (Chan's update): no cancellation, whatever the mean.
#include <cmath>
#include <initializer_list>

#include "group_norm_silu.h"
#include "group_norm_silu_lines.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kLine = 16;            // a contiguous channel is cut into lines of so many values
constexpr int64_t kChannelBlock = 8192;  // values of a contiguous channel that are summed in float32

using Job = GroupNormJob;
using State = GroupNormState;

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

// --- channels-last pieces ---

// Where a piece of channels-last data lies.
struct Block : Lines {
  int64_t first, offset;
  Block(const Job& job, int64_t unit, int64_t piece) {
    first = piece * job.piece_pixels;
    const int64_t count = job.pixels - first < job.piece_pixels ? job.pixels - first : job.piece_pixels;
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
  float *s0 = part, *s1 = s0 + at.width, *s2 = s1 + at.width, *unkept = s2 + at.width;
  if (job.backward) {
    float* kept = c.dv ? c.dv + at.first * job.channels : unkept;
    sums_of_lines<T, kSilu, const float*>(x, static_cast<const T*>(job.dy) + at.offset, c.a, c.b, c.m, at, kept,
                                          c.dv ? at.width : 0, s0, s1, s2);
  } else {  // shifted by the first line
    for (int64_t j = 0; j < at.width; ++j) s0[j] = load(x + j);
    moments_of_lines<T, const float*>(x, s0, at, s1, s2);
  }
}

template <class T, bool kSilu>
void apply_block(const Job& job, int64_t unit, int64_t piece, const State& c) {
  const Block at(job, unit, piece);
  const T *x = static_cast<const T*>(job.x) + at.offset, *dy = static_cast<const T*>(job.dy);
  T* out = static_cast<T*>(job.out) + at.offset;
  if (job.backward) dy += at.offset;
  const float* kept = c.dv ? c.dv + at.first * job.channels : nullptr;
  for (int64_t i = 0, j = 0; i <= at.lines; ++i, j += at.width) {
    if (job.backward)
      backward_line<T, kSilu, const float*>(x + j, dy + j, kept ? kept + j : nullptr, out + j, c.a, c.b, c.c1, c.c0,
                                            at.size(i));
    else
      forward_line<T, kSilu, const float*>(x + j, out + j, c.a, c.b, at.size(i));
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
    const Lines of{size / kLine, kLine, size % kLine};
    float s0[kLine], s1[kLine], s2[kLine], unkept[kLine];
    if (job.backward) {
      float* kept = c.dv ? c.dv + piece * job.pixels + i : unkept;
      sums_of_lines<T, kSilu>(x + i, dy + i, Same{c.a[piece]}, Same{c.b[piece]}, Same{c.m[piece]}, of, kept,
                              c.dv ? kLine : 0, s0, s1, s2);
      c.s0[piece] += add_up(s0);
      c.s1[piece] += add_up(s1);
      c.s2[piece] += add_up(s2);
    } else {
      const float shift = load(x + i);
      moments_of_lines(x + i, Same{shift}, of, s1, s2);
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
    backward_line<T, kSilu>(x, static_cast<const T*>(job.dy) + offset, c.dv ? c.dv + piece * job.pixels : nullptr, out,
                            a, b, Same{c.c1[piece]}, Same{c.c0[piece]}, job.pixels);
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
  for (int64_t j = job.unit_channels; j < job.line(); ++j) line[j] = line[j - job.unit_channels];
}

// Call f(sample, first channel of the unit, first channel, channels) for each group of a unit.
template <class F>
void each_group(const Job& job, int64_t unit, const F& f) {
  const int64_t blocks = job.channels / job.unit_channels, count = job.channels / job.groups;
  const int64_t n = unit / blocks, base = unit % blocks * job.unit_channels;
  for (int64_t first = base; first < base + job.unit_channels; first += count) f(n, base, first, count);
}

}  // namespace

// The steps of a unit, in order: begin; partial for each piece; gather for each piece in order (channels-last only: a
// contiguous piece has its own channel); finish; apply for each piece.

void gns_begin(const Job& job, int64_t unit, const State& state) {
  for (int64_t j = 0; j < State::doubles(job); ++j) state.s0[j] = 0;
  if (!job.backward) return;
  each_group(job, unit, [&](int64_t n, int64_t base, int64_t first, int64_t count) {
    affine(job, n, base, first, count, state);
  });
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
