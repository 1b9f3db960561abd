// Gradient of a convolution's weight and bias: a product of two matrices that have a row a pixel, tile by tile.
//
// A tile of d_weight, kOut output by kIn input channels at one tap, stays in registers while the pixels of a block pass:
// for each pixel kOut broadcasts of dy and kVectors loads of x. Panels make both contiguous and hold the border's
// zeros, so that a tap is an offset. A block of pixels is as long as its two panels fit the first cache; all taps of a
// tile, then the next panel of x, are taken before the next block.
#include <algorithm>
#include <cstring>

#include "conv_weight.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kOut = 12;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kOut = 6;
#else
constexpr int kWidth = 4, kOut = 4;
#endif
constexpr int kVectors = 2, kIn = kVectors * kWidth;
constexpr int64_t kBlock = 256;  // pixels: 6 KiB of dy and about 20 KiB of x with AVX2

typedef float Vector __attribute__((vector_size(kWidth * 4)));

inline Vector load_vector(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Pixels of a block: whole samples, or some rows of one.
struct Block {
  int64_t sample, samples, row, rows;
};

// sum of dy * x over a block at one tap, added to or put into a tile of d_weight.
template <int vectors>
void tile(const ConvWeightJob& job, const Block& block, const float* dy, const float* x, float* out, int64_t outs,
          int64_t ins, int64_t stride, bool first) {
  Vector sum[kOut][vectors] = {};
  for (int64_t n = 0; n < block.samples; ++n) {
    for (int64_t h = 0; h < block.rows; ++h) {
      const float* g = dy + ((block.sample + n) * job.height + block.row + h) * job.width * kOut;
      const float* a = x + ((block.sample + n) * job.padded_height() + block.row + h) * job.padded_width() * kIn;
      for (int64_t w = 0; w < job.width; ++w, g += kOut, a += kIn) {
        Vector v[vectors];
        for (int j = 0; j < vectors; ++j) v[j] = load_vector(a + j * kWidth);
        for (int o = 0; o < kOut; ++o) {
          const Vector s = g[o] - Vector{};
          for (int j = 0; j < vectors; ++j) sum[o][j] += s * v[j];
        }
      }
    }
  }
  if (ins == vectors * kWidth) {
    for (int o = 0; o < kOut; ++o) {
      if (o >= outs) break;
      for (int j = 0; j < vectors; ++j) {
        float* to = out + o * stride + j * kWidth;
        const Vector v = first ? sum[o][j] : load_vector(to) + sum[o][j];
        std::memcpy(to, &v, sizeof v);
      }
    }
    return;
  }
  for (int64_t o = 0; o < outs; ++o) {
    float values[vectors * kWidth];
    std::memcpy(values, sum[o], sizeof values);
    float* to = out + o * stride;
    for (int64_t c = 0; c < ins; ++c) to[c] = first ? values[c] : to[c] + values[c];
  }
}

}  // namespace

ConvWeightTile conv_weight_tile() { return {kIn, kOut}; }

void conv_weight_pack_x(const ConvWeightJob& job, int64_t begin, int64_t end) {
  const int64_t width = job.padded_width(), panel = job.x_pixels() * kIn;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / job.padded_height(), h = row % job.padded_height() - job.pad();
    for (int64_t c = 0; c < job.in; c += kIn) {
      float* to = job.x_panels + c / kIn * panel + row * width * kIn;
      if (h < 0 || h >= job.height) {
        std::memset(to, 0, width * kIn * sizeof(float));
        continue;
      }
      const int64_t count = std::min<int64_t>(kIn, job.in - c);
      const float* from = job.x + (n * job.height + h) * job.width * job.in + c;
      std::memset(to, 0, job.pad() * kIn * sizeof(float));
      to += job.pad() * kIn;
      for (int64_t w = 0; w < job.width; ++w, to += kIn, from += job.in) {
        if (count == kIn) {
          std::memcpy(to, from, kIn * sizeof(float));
        } else {
          for (int64_t i = 0; i < kIn; ++i) to[i] = i < count ? from[i] : 0.0f;
        }
      }
      std::memset(to, 0, job.pad() * kIn * sizeof(float));
    }
  }
}

void conv_weight_pack_dy(const ConvWeightJob& job, int64_t begin, int64_t end) {
  const int64_t panel = job.dy_pixels() * kOut;
  for (int64_t o = 0; o < job.out; o += kOut) {
    const int64_t count = std::min<int64_t>(kOut, job.out - o);
    const float* from = job.dy + begin * job.width * job.out + o;
    float* to = job.dy_panels + o / kOut * panel + begin * job.width * kOut;
    for (int64_t pixel = begin * job.width; pixel < end * job.width; ++pixel, to += kOut, from += job.out) {
      if (count == kOut) {
        std::memcpy(to, from, kOut * sizeof(float));
      } else {
        for (int64_t i = 0; i < kOut; ++i) to[i] = i < count ? from[i] : 0.0f;
      }
    }
  }
}

void conv_weight_tiles(const ConvWeightJob& job, int64_t begin, int64_t end) {
  const int64_t x_count = (job.in + kIn - 1) / kIn, taps = job.kernel * job.kernel;
  const int64_t per_sample = job.height * job.width;
  const int64_t rows = std::max<int64_t>(1, std::min(job.height, kBlock / job.width));
  const int64_t samples = rows < job.height ? 1 : std::max<int64_t>(1, kBlock / per_sample);
  for (int64_t sample = 0; sample < job.samples; sample += samples) {
    for (int64_t row = 0; row < job.height; row += rows) {
      const Block block{sample, std::min(samples, job.samples - sample), row, std::min(rows, job.height - row)};
      const bool first = sample == 0 && row == 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t out = i / x_count * kOut, in = i % x_count * kIn;
        const int64_t outs = std::min<int64_t>(kOut, job.out - out), ins = std::min<int64_t>(kIn, job.in - in);
        const float* dy = job.dy_panels + out * job.dy_pixels();
        const float* x = job.x_panels + in * job.x_pixels();
        for (int64_t tap = 0; tap < taps; ++tap) {
          const float* shifted = x + (tap / job.kernel * job.padded_width() + tap % job.kernel) * kIn;
          float* to = job.d_weight + (out * taps + tap) * job.in + in;
          const auto run = ins > kWidth ? tile<kVectors> : tile<1>;
          run(job, block, dy, shifted, to, outs, ins, taps * job.in, first);
        }
      }
    }
  }
  if (job.d_bias == nullptr) return;
  for (int64_t i = begin; i < end; ++i) {
    if (i % x_count) continue;
    const int64_t out = i / x_count * kOut;
    const float* dy = job.dy_panels + out * job.dy_pixels();
    double sum[kOut] = {};  // thousands of pixels one after another
    for (int64_t pixel = 0; pixel < job.dy_pixels(); ++pixel, dy += kOut)
      for (int o = 0; o < kOut; ++o) sum[o] += dy[o];
    for (int64_t o = 0; o < std::min<int64_t>(kOut, job.out - out); ++o) job.d_bias[out + o] = static_cast<float>(sum[o]);
  }
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
