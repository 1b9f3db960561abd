// 3x3 convolutions of square pictures of 4, 8 and 16 pixels by their spectra; mathematics: convolution.py.
//
// For each number of a spectrum, a product of two matrices: [samples x in] x [in x out], and over samples for the
// gradient of the weights. These are convolutions with a 1x1 kernel, whose tiles compute them. Forward, kSpectralGroup
// samples at a time go all the way, so that their spectra stay in the second cache.
#include <algorithm>
#include <cstring>

#include "conv_spectrum.h"
#include "convolution.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kEdge = 16;  // floats between points: powers of two would share the same few sets of the cache
constexpr int64_t kTaps = 9;

int64_t points_of(int64_t h) { return h == 4 ? kPoints<4> : h == 8 ? kPoints<8> : kPoints<16>; }

// Floats from one point to the next: of packed weights, of a group's numbers, of a chunk's, of the gradient's.
int64_t panel_floats(const ConvolutionJob& job) { return job.out * (1 + job.in) + kEdge; }
int64_t group_floats(const ConvolutionJob& job) { return kSpectralGroup * std::max(job.in, job.out) + kEdge; }
int64_t chunk_floats(int64_t samples, int64_t channels) { return samples * channels + kEdge; }
int64_t gradient_floats(const ConvWeightJob& job) { return job.out * job.in + kEdge; }

template <int h>
constexpr float kScale = 2.0 / ((h + 1) * (h + 1));  // what `invert` leaves out

template <int h>
void spectra_of_kernel(const ConvolutionJob& job, float* spectra) {
  const int64_t floats = panel_floats(job);
  for (int64_t o = 0, size; o < job.out; o += size) {
    size = conv_block_channels(job.out, o);
    const float* from = job.panels + o * (1 + kTaps * job.in);
    float* to = spectra + o * (1 + job.in);
    for (int64_t p = 0; p < kPoints<h>; ++p) std::memset(to + p * floats, 0, size * sizeof(float));
    for (int64_t v = 0; v < size; ++v) to[v] = 2 * from[v];  // the bias is a constant: in the first number alone
    for (int64_t c = 0; c < job.in; ++c) {
      for (int64_t v = 0; v < size; v += kWidth) {
        const float* last = from + (1 + (kTaps - 1) * job.in + c) * size + v;
        const int64_t row = 3 * job.in * size, step = job.in * size;
        transform<h, KernelLine>(  // turned around: y is a correlation
            [=](int i, int j) { return load_vector(last - i * row - j * step) * kScale<h>; },
            to + (1 + c) * size + v, floats);
      }
    }
  }
}

// Spectra of pictures, point by point: [points, samples, channels]; step is -channels to turn them around.
template <int h>
void spectra_of_pictures(const float* picture, int64_t step, int64_t samples, int64_t channels, float* to,
                         int64_t floats) {
  for (int64_t n = 0; n < samples; ++n, picture += h * h * channels, to += channels) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const float* from = picture + c;
      transform<h, PictureLine>([=](int i, int j) { return load_vector(from + (i * h + j) * step); }, to + c, floats);
    }
  }
}

template <int h>
void convolve(const ConvolutionJob& job, const float* spectra, int64_t begin, int64_t end, float* scratch) {
  const int64_t samples = end - begin, rest = kSpectralGroup - samples, floats = group_floats(job);
  float* values = scratch + floats;  // a point's products take the place of the values of the point before
  spectra_of_pictures<h>(job.x + begin * h * h * job.in, job.in, samples, job.in, values, floats);
  for (int64_t p = 0; rest && p < kPoints<h>; ++p)
    std::memset(values + p * floats + samples * job.in, 0, rest * job.in * sizeof(float));
  ConvolutionJob product = job;
  product.samples = kSpectralGroup, product.height = product.width = product.kernel = 1;
  product.x = values, product.y = scratch, product.panels = const_cast<float*>(spectra);
  conv_products(product, kPoints<h>, panel_floats(job), floats);
  float* y = job.y + begin * h * h * job.out;
  for (int64_t n = 0; n < samples; ++n, y += h * h * job.out) {
    for (int64_t o = 0; o < job.out; o += kWidth) {
      float* to = y + o;
      const int64_t step = job.out;
      invert<h, PictureLine>(scratch + n * job.out + o, floats,
                             [=](int i, int j, Vector value) { store_vector(to + (i * h + j) * step, value); });
    }
  }
}

template <int h>
void spectra_of_both(const ConvWeightJob& job, int64_t begin, int64_t end, float* x, float* dy) {
  spectra_of_pictures<h>(job.x + begin * h * h * job.in, job.in, end - begin, job.in, x + begin * job.in,
                         chunk_floats(job.samples, job.in));
  spectra_of_pictures<h>(job.dy + ((begin + 1) * h * h - 1) * job.out, -job.out, end - begin, job.out,
                         dy + begin * job.out, chunk_floats(job.samples, job.out));
}

template <int h>
void gradient_of_kernel(const ConvWeightJob& job, const float* spectra, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t c = 0; c < job.in; c += kWidth) {
      float* to = job.d_weight + o * kTaps * job.in + c;
      const int64_t step = job.in;
      invert<h, KernelLine>(spectra + o * job.in + c, gradient_floats(job), [=](int i, int j, Vector value) {
        store_vector(to + (3 * i + j) * step, value * kScale<h>);
      });
    }
  }
}

}  // namespace

int64_t conv_spectra_floats(const ConvolutionJob& job) { return points_of(job.height) * panel_floats(job); }
int64_t conv_spectral_scratch_floats(const ConvolutionJob& job) {
  return (points_of(job.height) + 1) * group_floats(job);
}

void conv_spectra(const ConvolutionJob& job, float* spectra) {
  const auto run = job.height == 4   ? spectra_of_kernel<4>
                   : job.height == 8 ? spectra_of_kernel<8>
                                     : spectra_of_kernel<16>;
  run(job, spectra);
}

void conv_spectral(const ConvolutionJob& job, const float* spectra, int64_t begin, int64_t end, float* scratch) {
  const auto run = job.height == 4 ? convolve<4> : job.height == 8 ? convolve<8> : convolve<16>;
  run(job, spectra, begin, end, scratch);
}

int64_t conv_weight_points(const ConvWeightJob& job) { return points_of(job.height); }
int64_t conv_weight_values_floats(const ConvWeightJob& job, int64_t channels) {
  return points_of(job.height) * chunk_floats(job.samples, channels);
}
int64_t conv_weight_spectra_floats(const ConvWeightJob& job) { return points_of(job.height) * gradient_floats(job); }

void conv_weight_spectra(const ConvWeightJob& job, int64_t begin, int64_t end, float* x, float* dy) {
  const auto run = job.height == 4 ? spectra_of_both<4> : job.height == 8 ? spectra_of_both<8> : spectra_of_both<16>;
  run(job, begin, end, x, dy);
}

void conv_weight_products(const ConvWeightJob& job, const float* x, const float* dy, int64_t begin, int64_t end,
                          bool added, float* spectra) {
  ConvWeightJob product = job;
  product.samples = product.height = product.kernel = product.slots = 1, product.width = job.samples;
  product.bias_sums = nullptr, product.added = added;
  const int64_t tiles = conv_weight_tiles(product);
  for (int64_t p = begin; p < end; ++p) {
    product.x = x + p * chunk_floats(job.samples, job.in), product.dy = dy + p * chunk_floats(job.samples, job.out);
    product.d_weight = spectra + p * gradient_floats(job);
    conv_weight_slot(product, 0, 0, tiles, nullptr);
  }
}

void conv_weight_synthesis(const ConvWeightJob& job, const float* spectra, int64_t begin, int64_t end) {
  const auto run = job.height == 4   ? gradient_of_kernel<4>
                   : job.height == 8 ? gradient_of_kernel<8>
                                     : gradient_of_kernel<16>;
  run(job, spectra, begin, end);
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
