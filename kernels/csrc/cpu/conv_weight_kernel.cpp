// Gradient of a convolution's weights: for each tap, a product of two matrices that have a row a pixel, tile by tile.
//
// A tile of d_weight, kOut output channels by kVectors vectors of input channels at one tap, stays in registers while a
// chunk of pixels passes by: for each pixel kOut broadcasts of dy and kVectors loads of x, both from where they lie.
// Pixels whose tap falls outside the picture are left out, not multiplied by zeros. Where channels do not fill vectors,
// a copy of the chunk holds all taps of a pixel side by side, and there is one tap of so many channels.
#include <algorithm>
#include <cstring>

#include "conv_vector.h"
#include "convolution.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

#if defined(__AVX512VL__)
constexpr int kOut = 8;
#else
constexpr int kOut = 4;
#endif
constexpr int kVectors = 3;
constexpr int64_t kChunk = 256;  // pixels that are summed in one register

// Whole samples, or some rows of one.
struct Chunk {
  int64_t sample, samples, top, bottom;
};

int64_t chunk_samples(const ConvWeightJob& job) { return std::max<int64_t>(1, kChunk / (job.height * job.width)); }
int64_t chunk_rows(const ConvWeightJob& job) { return std::max<int64_t>(1, std::min(job.height, kChunk / job.width)); }

Chunk chunk_of(const ConvWeightJob& job, int64_t index) {
  const int64_t rows = chunk_rows(job), bands = (job.height + rows - 1) / rows, samples = chunk_samples(job);
  const int64_t sample = index / bands * samples, top = index % bands * rows;
  return {sample, std::min(samples, job.samples - sample), top, std::min(job.height, top + rows)};
}

// Pixels of a chunk for which a tap lies in the picture: samples x rows x width, and how far each step goes.
struct Pixels {
  const float* x;
  const float* dy;
  int64_t samples, rows, width, in, out;
  int64_t x_row, dy_row, x_sample, dy_sample;
};

// sum of dy * x over pixels, added to or put into a tile of d_weight.
template <int outs, int vectors>
void tile(const Pixels& p, float* to, int64_t stride, int64_t ins, bool first) {
  Vector sum[outs][vectors] = {};
  const int64_t in = p.in, out = p.out, width = p.width;
  for (int64_t n = 0; n < p.samples; ++n) {
    for (int64_t h = 0; h < p.rows; ++h) {
      const float* a = p.x + n * p.x_sample + h * p.x_row;
      const float* g = p.dy + n * p.dy_sample + h * p.dy_row;
      for (int64_t w = 0; w < width; ++w, a += in, g += out) {
        Vector v[vectors];
        for (int j = 0; j < vectors; ++j) v[j] = load_vector(a + j * kWidth);
#pragma GCC unroll 8
        for (int o = 0; o < outs; ++o) {
          const Vector s = g[o] - Vector{};
#pragma GCC unroll 4
          for (int j = 0; j < vectors; ++j) sum[o][j] += s * v[j];
        }
      }
    }
  }
  for (int o = 0; o < outs; ++o, to += stride) {
    if (ins == vectors * kWidth) {
      for (int j = 0; j < vectors; ++j) {
        const Vector v = first ? sum[o][j] : load_vector(to + j * kWidth) + sum[o][j];
        std::memcpy(to + j * kWidth, &v, sizeof v);
      }
    } else {
      float values[vectors * kWidth];
      std::memcpy(values, sum[o], sizeof values);
      for (int64_t c = 0; c < ins; ++c) to[c] = first ? values[c] : to[c] + values[c];
    }
  }
}

using Run = void (*)(const Pixels&, float*, int64_t, int64_t, bool);

template <int outs>
Run run_of(int64_t vectors) {
  return vectors == 3 ? tile<outs, 3> : vectors == 2 ? tile<outs, 2> : tile<outs, 1>;
}

// The pixels of a chunk at a tap.
Pixels pixels_of(const ConvWeightJob& job, const Chunk& chunk, int64_t i, int64_t j) {
  const int64_t pad = job.pad(), picture = job.height * job.width;
  const int64_t top = std::max(chunk.top, pad - i), bottom = std::min(chunk.bottom, job.height + pad - i);
  const int64_t left = std::max<int64_t>(0, pad - j), right = std::min(job.width, job.width + pad - j);
  const int64_t first = chunk.sample * picture + top * job.width + left;
  Pixels p{job.x + (first + (i - pad) * job.width + j - pad) * job.in, job.dy + first * job.out,
           chunk.samples, bottom - top, right - left, job.in, job.out,
           job.width * job.in, job.width * job.out, picture * job.in, picture * job.out};
  if (p.rows <= 0) p.rows = p.width = 0;
  if (p.width == job.width) p.width *= p.rows, p.rows = 1;  // without a border rows follow one another,
  if (p.width == picture) p.width *= p.samples, p.samples = 1;  // and samples do
  return p;
}

// All taps of the chunk's pixels side by side, zeros outside the picture and up to a whole vector.
void spread(const ConvWeightJob& job, const Chunk& chunk, float* to, int64_t wide) {
  const int64_t pad = job.pad(), length = job.kernel * job.in, filled = job.kernel * length;
  for (int64_t n = chunk.sample; n < chunk.sample + chunk.samples; ++n) {
    for (int64_t h = chunk.top; h < chunk.bottom; ++h) {
      for (int64_t w = 0; w < job.width; ++w, to += wide) {
        float* at = to;
        const int64_t left = std::max<int64_t>(0, pad - w), right = std::min(job.kernel, job.width + pad - w);
        for (int64_t i = h - pad; i <= h + pad; ++i) {
          const bool inside = i >= 0 && i < job.height;
          const float* from = job.x + ((n * job.height + i) * job.width + w - pad) * job.in;
          const int64_t first = inside ? left * job.in : length, last = inside ? right * job.in : length;
          for (int64_t k = 0; k < first; ++k) at[k] = 0.0f;
          for (int64_t k = first; k < last; ++k) at[k] = from[k];
          for (int64_t k = last; k < length; ++k) at[k] = 0.0f;
          at += length;
        }
        for (int64_t c = filled; c < wide; ++c) *at++ = 0.0f;
      }
    }
  }
}

// What the tiles are made of: taps of channels, or one tap of all that `spread` makes.
struct Plan {
  bool spread;
  int64_t taps, ins, vectors, blocks, outs;
};

Plan plan_of(const ConvWeightJob& job) {
  const bool spread = job.in % kWidth;
  const int64_t ins = spread ? job.taps() * job.in : job.in, vectors = (ins + kWidth - 1) / kWidth;
  return {spread,  spread ? 1 : job.taps(),           ins,
          vectors, (vectors + kVectors - 1) / kVectors, (job.out + kOut - 1) / kOut};
}

void bias_of(const ConvWeightJob& job, const Chunk& chunk, double* sums) {
  const int64_t pixels = chunk.samples * (chunk.bottom - chunk.top) * job.width;
  const float* dy = job.dy + (chunk.sample * job.height + chunk.top) * job.width * job.out;
  int64_t o = 0;
  for (; o + kWidth <= job.out; o += kWidth) {
    Vector sum{};
    for (int64_t p = 0; p < pixels; ++p) sum += load_vector(dy + p * job.out + o);
    for (int i = 0; i < kWidth; ++i) sums[o + i] += sum[i];
  }
  for (; o < job.out; ++o)
    for (int64_t p = 0; p < pixels; ++p) sums[o] += dy[p * job.out + o];
}

}  // namespace

int64_t conv_weight_chunks(const ConvWeightJob& job) {
  const int64_t rows = chunk_rows(job), samples = chunk_samples(job);
  return (job.samples + samples - 1) / samples * ((job.height + rows - 1) / rows);
}

int64_t conv_weight_tiles(const ConvWeightJob& job) {
  const Plan plan = plan_of(job);
  return plan.outs * plan.taps * plan.blocks;
}

int64_t conv_weight_scratch_floats(const ConvWeightJob& job) {
  const Plan plan = plan_of(job);
  return plan.spread ? chunk_samples(job) * chunk_rows(job) * job.width * plan.vectors * kWidth : 1;
}

void conv_weight_slot(const ConvWeightJob& job, int64_t slot, int64_t begin, int64_t end, float* scratch) {
  const Plan plan = plan_of(job);
  const int64_t chunks = conv_weight_chunks(job);
  const int64_t from = slot * chunks / job.slots, until = (slot + 1) * chunks / job.slots;
  float* sums = slot ? job.sums + (slot - 1) * job.weights() : job.d_weight;
  double* bias_sums = job.bias_sums && begin == 0 ? job.bias_sums + slot * job.out : nullptr;
  if (bias_sums) std::fill_n(bias_sums, job.out, 0.0);
  const int64_t wide = plan.vectors * kWidth;
  for (int64_t index = from; index < until; ++index) {
    const Chunk chunk = chunk_of(job, index);
    if (bias_sums) bias_of(job, chunk, bias_sums);
    if (plan.spread) spread(job, chunk, scratch, wide);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t block = t % plan.blocks, tap = t / plan.blocks % plan.taps;
      const int64_t out = t / plan.blocks / plan.taps * kOut;
      const int64_t vector = block * plan.vectors / plan.blocks;
      const int64_t vectors = (block + 1) * plan.vectors / plan.blocks - vector, in = vector * kWidth;
      Pixels p = pixels_of(job, chunk, plan.spread ? job.pad() : tap / job.kernel,
                           plan.spread ? job.pad() : tap % job.kernel);
      if (plan.spread) p.x = scratch, p.in = wide, p.x_row = wide * job.width, p.x_sample = p.x_row * job.height;
      p.x += in;
      const int64_t ins = std::min(vectors * kWidth, plan.ins - in), stride = job.taps() * job.in;
      float* to = sums + out * stride + tap * job.in + in;
      p.dy += out;
      for (int64_t left = std::min<int64_t>(kOut, job.out - out); left > 0;) {
        const int64_t outs = left >= kOut ? kOut : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const Run run = outs == 8   ? run_of<kOut>(vectors)
                        : outs == 4 ? run_of<4>(vectors)
                        : outs == 2 ? run_of<2>(vectors)
                                    : run_of<1>(vectors);
        run(p, to, stride, ins, index == from && !job.added);
        p.dy += outs, to += outs * stride, left -= outs;
      }
    }
  }
}

void conv_weight_join(const ConvWeightJob& job, int64_t begin, int64_t end) {
  float* to = job.d_weight;
  for (int64_t slot = 1; slot < job.slots; ++slot) {
    const float* from = job.sums + (slot - 1) * job.weights();
    for (int64_t i = begin; i < end; ++i) to[i] += from[i];
  }
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
