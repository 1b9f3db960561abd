// convolution and conv_weight on the CPU: checks, threads, registration. Python allocates every output.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "convolution.h"
#include "pictures.h"

namespace fastambient {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;               // added elements that are worth a thread
constexpr int64_t kWork = 1000 * 1000;          // multiplications that are
constexpr int64_t kSpectra = 1 << 21, kValues = 1 << 20;  // numbers of spectra: of weights, and of pictures at a time
constexpr int64_t kSlots = 8, kSums = 1 << 20;  // most slots, and floats of all their sums

// Where spectra are faster than pixels: so many samples are worth the spectra of the weights, which must not leave the
// caches.
template <typename Job>
bool is_spectral(const Job& job, int64_t samples) {
  const bool square = job.height == job.width && (job.height == 4 || job.height == 8 || job.height == 16);
  return job.kernel == 3 && square && job.in % 8 == 0 && job.out % 8 == 0 && job.samples >= samples &&
         job.in * job.out * (job.height + 1) * (job.height + 1) <= kSpectra;
}

// Each thread takes the spectra of the weights for itself: for small ones to pass between threads takes longer.
void spectral_convolution(const ConvolutionJob& job) {
  const int64_t groups = (job.samples + kSpectralGroup - 1) / kSpectralGroup;
  const int64_t weights = FA_CALL(conv_spectra_floats, job), scratch = FA_CALL(conv_spectral_scratch_floats, job);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch own;
    float* spectra = own.take(weights + scratch);
    FA_CALL(conv_spectra, job, spectra);
    for (int64_t n = begin * kSpectralGroup; n < std::min(end * kSpectralGroup, job.samples); n += kSpectralGroup)
      FA_CALL(conv_spectral, job, spectra, n, std::min(job.samples, n + kSpectralGroup), spectra + weights);
  });
}

// Threads share samples, then points, then output channels: each sum is one thread's.
void spectral_conv_weight(const ConvWeightJob& job, float* bias) {
  ConvWeightJob chunk = job;
  const int64_t points = FA_CALL(conv_weight_points, job);
  const int64_t most = std::clamp<int64_t>(kValues / (points * (job.in + job.out)), 16, 64);
  chunk.samples = std::min(job.samples, most);
  const int64_t x_floats = FA_CALL(conv_weight_values_floats, chunk, job.in);
  const int64_t dy_floats = FA_CALL(conv_weight_values_floats, chunk, job.out);
  thread_local Scratch all;
  float* x = all.take(x_floats + dy_floats + FA_CALL(conv_weight_spectra_floats, job));
  float *dy = x + x_floats, *spectra = dy + dy_floats;
  std::vector<double> bias_sums(bias ? job.out : 0);
  for (int64_t first = 0; first < job.samples; first += most) {
    const int64_t pixel = first * job.height * job.width;
    chunk.samples = std::min(job.samples - first, most), chunk.x = job.x + pixel * job.in;
    chunk.dy = job.dy + pixel * job.out;
    torch::stable::parallel_for(0, chunk.samples, 1, [&](int64_t begin, int64_t end) {
      FA_CALL(conv_weight_spectra, chunk, begin, end, x, dy);
    });
    torch::stable::parallel_for(0, points, 1, [&](int64_t begin, int64_t end) {
      FA_CALL(conv_weight_products, chunk, x, dy, begin, end, first > 0, spectra);
    });
    for (int64_t n = 0; bias && n < chunk.samples; ++n)  // a spectrum's first number is the sum over pixels
      for (int64_t o = 0; o < job.out; ++o) bias_sums[o] += dy[n * job.out + o];
  }
  torch::stable::parallel_for(0, job.out, kGrain / (points * job.in) + 1, [&](int64_t begin, int64_t end) {
    FA_CALL(conv_weight_synthesis, job, spectra, begin, end);
  });
  for (int64_t o = 0; bias && o < job.out; ++o) bias[o] = static_cast<float>(bias_sums[o]);
}

void convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed,
                 const Tensor& y) {
  ConvolutionJob job{};
  job.x = pixels(x, "convolution: x"), job.weight = pixels(weight, "convolution: weight");
  job.y = const_cast<float*>(pixels(y, "convolution: y"));
  job.samples = x.size(0), job.in = x.size(1), job.height = x.size(2), job.width = x.size(3);
  job.out = y.size(1), job.kernel = weight.size(2), job.transposed = transposed;
  STD_TORCH_CHECK(y.size(0) == job.samples && y.size(2) == job.height && y.size(3) == job.width,
                  "convolution: x and y must have the same samples and pixels");
  STD_TORCH_CHECK(weight.size(transposed ? 1 : 0) == job.out && weight.size(transposed ? 0 : 1) == job.in &&
                      weight.size(3) == job.kernel && job.kernel % 2 == 1,
                  "convolution: weight must be [out, in, k, k], transposed [in, out, k, k], with k odd");
  if (bias) job.bias = channel_values(*bias, job.out, "convolution: bias");
  thread_local Scratch panels;
  job.panels = panels.take(FA_CALL(conv_panel_floats, job));
  FA_CALL(conv_pack, job);
  if (is_spectral(job, 16)) return spectral_convolution(job);
  const int64_t scratch = FA_CALL(conv_scratch_floats, job);
  const int64_t work = job.width * job.in * std::max<int64_t>(job.out, 8) * job.taps();  // a row's, in whole vectors
  torch::stable::parallel_for(0, job.samples * job.height, kWork / work + 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch copies;
    FA_CALL(conv_rows, job, begin, end, copies.take(scratch));
  });
}

void conv_weight(const Tensor& x, const Tensor& dy, const Tensor& d_weight, const std::optional<Tensor>& d_bias) {
  ConvWeightJob job{};
  job.x = pixels(x, "conv_weight: x"), job.dy = pixels(dy, "conv_weight: dy");
  job.d_weight = const_cast<float*>(pixels(d_weight, "conv_weight: d_weight"));
  job.samples = x.size(0), job.in = x.size(1), job.height = x.size(2), job.width = x.size(3);
  job.out = dy.size(1), job.kernel = d_weight.size(2);
  STD_TORCH_CHECK(dy.size(0) == job.samples && dy.size(2) == job.height && dy.size(3) == job.width,
                  "conv_weight: x and dy must have the same samples and pixels");
  STD_TORCH_CHECK(d_weight.size(0) == job.out && d_weight.size(1) == job.in && d_weight.size(3) == job.kernel &&
                      job.kernel % 2 == 1,
                  "conv_weight: d_weight must be [out, in, k, k] with k odd");
  float* bias = d_bias ? channel_values(*d_bias, job.out, "conv_weight: d_bias") : nullptr;
  if (is_spectral(job, 32)) return spectral_conv_weight(job, bias);
  job.slots = 1;
  while (job.slots < kSlots && 2 * job.slots <= FA_CALL(conv_weight_chunks, job) &&
         2 * job.slots * job.weights() <= kSums)
    job.slots *= 2;
  const int64_t tiles = FA_CALL(conv_weight_tiles, job), scratch = FA_CALL(conv_weight_scratch_floats, job);
  thread_local Scratch sums;
  const int64_t bias_floats = bias ? job.slots * job.out * 2 : 0;
  job.bias_sums = reinterpret_cast<double*>(sums.take(bias_floats + (job.slots - 1) * job.weights()));
  job.sums = reinterpret_cast<float*>(job.bias_sums) + bias_floats;
  if (!bias) job.bias_sums = nullptr;
  const int64_t work = job.samples * job.height * job.width * job.weights() / (job.slots * tiles);  // of a tile
  const int64_t grain = kWork / std::max<int64_t>(1, work) + 1;
  torch::stable::parallel_for(0, job.slots * tiles, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch taps;
    for (int64_t slot = begin / tiles; slot * tiles < end; ++slot)
      FA_CALL(conv_weight_slot, job, slot, std::max(begin - slot * tiles, int64_t{0}),
              std::min(end - slot * tiles, tiles), taps.take(scratch));
  });
  if (job.slots > 1)
    torch::stable::parallel_for(0, job.weights(), kGrain,
                                [&](int64_t begin, int64_t end) { FA_CALL(conv_weight_join, job, begin, end); });
  for (int64_t o = 0; bias && o < job.out; ++o) {
    double sum = 0;
    for (int64_t slot = 0; slot < job.slots; ++slot) sum += job.bias_sums[slot * job.out + o];
    bias[o] = static_cast<float>(sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def("convolution(Tensor x, Tensor weight, Tensor? bias, bool transposed, Tensor(a!) y) -> ()");
  m.def("conv_weight(Tensor x, Tensor dy, Tensor(a!) d_weight, Tensor(b!)? d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) {
  m.impl("convolution", TORCH_BOX(&convolution));
  m.impl("conv_weight", TORCH_BOX(&conv_weight));
}

}  // namespace fastambient
