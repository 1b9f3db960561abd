// What ambient_op.cpp hands to ambient_kernel.cpp; the mathematics is in ambient.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common.h"

namespace fastambient {

struct AmbientBatch {
  const void* images;  // [N, C, H, W]: uint8 or float32
  const void* x_n;     // float16 or float32, or null
  const bool* flips;   // or null
  const int64_t *ids, *positions;
  const float* sigma;
  uint64_t noise_seed, run_seed;
  float sigma_tn, sigma_data;
  int64_t samples, channels, height, width;
  bool images_are_bytes, x_n_is_half;
  bool channels_last;  // of the network's tensors: its input, or F and dF
  bool network_is_bf16;

  // A tile is whole rows of all channels, some 1024 pixels: buffers stay in the first cache, flips inside a tile, and
  // sums in one order whatever the threads, the batch and the memory format.
  int64_t tile_rows() const { return std::min(height, std::max<int64_t>(1, 1024 / width)); }
  int64_t tiles() const { return (height + tile_rows() - 1) / tile_rows(); }  // of a sample
};

}  // namespace fastambient

// Tiles begin .. end - 1 of the batch's samples * tiles(). `table` is [7, samples].
FA_DECLARE(void, ambient_noise_tiles,
           (const AmbientBatch& batch, void* net_input, float* table, int64_t begin, int64_t end))
// `partial`: the sum of each tile's losses.
FA_DECLARE(void, ambient_loss_tiles,
           (const AmbientBatch& batch, bool unit, const void* F, void* dF, double* partial, int64_t begin, int64_t end))
