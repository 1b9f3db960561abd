// What conv_weight_op.cpp hands to conv_weight_kernel.cpp; the mathematics is in convolution.py.
#pragma once

#include <cstdint>

#include "common.h"

namespace fastambient {

// Copies of x and dy in panels: of the channels that a tile of registers takes, pixel after pixel, zeros at the border.
struct ConvWeightJob {
  const float* x;   // [samples, height, width, in]
  const float* dy;  // [samples, height, width, out]
  float* d_weight;  // [out, kernel, kernel, in]
  float* d_bias;    // [out] or null
  int64_t samples, height, width, in, out, kernel;
  float* x_panels;   // [in / tile, samples, height + kernel - 1, width + kernel - 1, tile]
  float* dy_panels;  // [out / tile, samples, height, width, tile]

  int64_t pad() const { return kernel / 2; }
  int64_t padded_height() const { return height + kernel - 1; }
  int64_t padded_width() const { return width + kernel - 1; }
  int64_t x_pixels() const { return samples * padded_height() * padded_width(); }
  int64_t dy_pixels() const { return samples * height * width; }
};

struct ConvWeightTile {
  int64_t in, out;
};

}  // namespace fastambient

// Channels of a tile of registers on this instruction set.
FA_DECLARE(ConvWeightTile, conv_weight_tile, ())
// Fill the panels' rows begin .. end - 1 of samples * padded_height (x) and of samples * height (dy).
FA_DECLARE(void, conv_weight_pack_x, (const ConvWeightJob& job, int64_t begin, int64_t end))
FA_DECLARE(void, conv_weight_pack_dy, (const ConvWeightJob& job, int64_t begin, int64_t end))
// Tiles begin .. end - 1 of panels of dy * panels of x, all taps of each, over all pixels in a fixed order.
FA_DECLARE(void, conv_weight_tiles, (const ConvWeightJob& job, int64_t begin, int64_t end))
