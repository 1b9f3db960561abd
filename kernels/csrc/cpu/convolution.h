// What convolution_op.cpp hands to the kernels of convolutions; mathematics: convolution.py.
#pragma once

#include <cstdint>

#include "common.h"

namespace fastambient {

constexpr int64_t kSpectralGroup = 8;  // samples whose spectra are taken at once

// A convolution of x, or, transposed, of dy with the kernel turned around: the data gradient. Rows are those of all
// samples, one after another.
struct ConvolutionJob {
  const float* x;       // [samples, height, width, in]
  const float* weight;  // [out, kernel, kernel, in]; transposed: [in, kernel, kernel, out]
  const float* bias;    // [out] or null
  float* y;             // [samples, height, width, out]
  int64_t samples, height, width, in, out, kernel;
  bool transposed;
  float* panels;  // of conv_panel_floats

  int64_t pad() const { return kernel / 2; }
  int64_t padded_width() const { return width + kernel - 1; }
  int64_t taps() const { return kernel * kernel; }
};

// The gradient of the weights: sums over pixels, chunk by chunk. Slots are fixed shares of the chunks, each with sums of
// its own, so that threads share the samples and yet no sum depends on their number.
struct ConvWeightJob {
  const float* x;     // [samples, height, width, in]
  const float* dy;    // [samples, height, width, out]
  float* d_weight;    // [out, kernel, kernel, in], the sums of slot 0
  float* sums;        // [slots - 1, out, kernel, kernel, in]
  double* bias_sums;  // [slots, out] or null
  int64_t samples, height, width, in, out, kernel;
  int64_t slots;
  bool added;  // to what d_weight holds

  int64_t pad() const { return kernel / 2; }
  int64_t taps() const { return kernel * kernel; }
  int64_t weights() const { return out * taps() * in; }
};

}  // namespace fastambient

// Floats of the packed weights, and of what each thread needs.
FA_DECLARE(int64_t, conv_panel_floats, (const ConvolutionJob& job))
FA_DECLARE(int64_t, conv_scratch_floats, (const ConvolutionJob& job))
FA_DECLARE(void, conv_pack, (const ConvolutionJob& job))
// Rows begin .. end - 1 of samples * height.
FA_DECLARE(void, conv_rows, (const ConvolutionJob& job, int64_t begin, int64_t end, float* scratch))

// Blocks of pixels, of which each slot gets one or more.
FA_DECLARE(int64_t, conv_weight_chunks, (const ConvWeightJob& job))
// Parts of a slot's work that can go to different threads; floats that a thread needs.
FA_DECLARE(int64_t, conv_weight_tiles, (const ConvWeightJob& job))
FA_DECLARE(int64_t, conv_weight_scratch_floats, (const ConvWeightJob& job))
// Tiles begin .. end - 1 of a slot.
FA_DECLARE(void, conv_weight_slot,
           (const ConvWeightJob& job, int64_t slot, int64_t begin, int64_t end, float* scratch))
// Weights begin .. end - 1: the slots' sums into that of slot 0.
FA_DECLARE(void, conv_weight_join, (const ConvWeightJob& job, int64_t begin, int64_t end))

// How many channels the panel has whose first one is `first`.
FA_DECLARE(int64_t, conv_block_channels, (int64_t out, int64_t first))
// Products of [samples x in] and [in x out], a 1x1 kernel's, at `points` places: from one to the next packed weights
// are panel_floats apart, x and y `floats`. Samples come in groups of kSpectralGroup.
FA_DECLARE(void, conv_products, (const ConvolutionJob& job, int64_t points, int64_t panel_floats, int64_t floats))

// By spectra, 3x3 kernels of 4x4, 8x8 and 16x16 pictures whose channels come in eights. Floats of the kernel's spectra,
// and of what each thread needs.
FA_DECLARE(int64_t, conv_spectra_floats, (const ConvolutionJob& job))
FA_DECLARE(int64_t, conv_spectral_scratch_floats, (const ConvolutionJob& job))
// The spectra of panels that conv_pack made.
FA_DECLARE(void, conv_spectra, (const ConvolutionJob& job, float* spectra))
// Samples begin .. end - 1, at most kSpectralGroup.
FA_DECLARE(void, conv_spectral,
           (const ConvolutionJob& job, const float* spectra, int64_t begin, int64_t end, float* scratch))

// The gradient of the weights by spectra of all samples of a job. Numbers of a spectrum; floats of the values of so
// many channels, and of the gradient's spectra.
FA_DECLARE(int64_t, conv_weight_points, (const ConvWeightJob& job))
FA_DECLARE(int64_t, conv_weight_values_floats, (const ConvWeightJob& job, int64_t channels))
FA_DECLARE(int64_t, conv_weight_spectra_floats, (const ConvWeightJob& job))
// Those of samples begin .. end - 1.
FA_DECLARE(void, conv_weight_spectra, (const ConvWeightJob& job, int64_t begin, int64_t end, float* x, float* dy))
// Points begin .. end - 1, put or added to what is there.
FA_DECLARE(void, conv_weight_products,
           (const ConvWeightJob& job, const float* x, const float* dy, int64_t begin, int64_t end, bool added,
            float* spectra))
// Output channels begin .. end - 1 of d_weight.
FA_DECLARE(void, conv_weight_synthesis, (const ConvWeightJob& job, const float* spectra, int64_t begin, int64_t end))
