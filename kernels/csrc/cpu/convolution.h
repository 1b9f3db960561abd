// What convolution_op.cpp hands to convolution_kernel.cpp and conv_weight_kernel.cpp; mathematics: convolution.py.
#pragma once

#include <cstdint>

#include "common.h"

namespace fastambient {

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
