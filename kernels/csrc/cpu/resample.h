// What resample_op.cpp hands to resample_kernel.cpp; mathematics and names are those of resample.py.
#pragma once

#include <cstdint>

#include "common.h"

namespace fastambient {

// The rows (columns) of x that one row (column) of y is a sum of, without those outside of the picture.
struct Reach {
  int64_t first, count;
  const float* weights;
};

struct ResampleJob {
  const void* x;  // [samples, height, width, channels], float32 or bfloat16
  void* y;        // [samples, out_height, out_width, channels]
  int64_t samples, channels, height, width, out_height, out_width;
  const Reach *rows, *columns;  // of each row and column of y
  int64_t tile;                 // columns of y that are computed at a time
  bool low_precision;
};

}  // namespace fastambient

// Rows begin .. end - 1 of all samples' outputs; `sums` holds what a tile needs of a row.
FA_DECLARE(void, resample_rows, (const ResampleJob& job, int64_t begin, int64_t end, float* sums))
