// What residual_op.cpp hands to residual_kernel.cpp; the mathematics is in residual.py.
#pragma once

#include "common.h"

namespace fastambient {

// A tensor is a row of lines of `width` values, of which the last may be shorter, and a piece is `piece_lines` of them.
// Pieces depend on the shape alone, so that sums do not depend on the number of threads.
//
//                  a line                                  along a line
//   channels-last  some pixels, all channels of each       bias and sums differ, alike in every line
//   contiguous     the pixels of one channel of a sample   one bias, one sum
struct ResidualJob {
  const void *y, *x;  // forward; backward: y is dy
  void* out;          // null backward: sums alone
  const float* bias;  // forward: of a line (channels-last) or [channels], or null
  float* partial;     // backward: sums of pieces [pieces, width] (channels-last) or of lines [lines], or null
  float scale;
  int64_t elements, channels, width, lines, piece_lines, pieces;
  bool low_precision, channels_last;
};

}  // namespace fastambient

// Pieces first .. last - 1. Backward: without `partial` dy * scale alone.
FA_DECLARE(void, residual_forward, (const ResidualJob& job, int64_t first, int64_t last))
FA_DECLARE(void, residual_backward, (const ResidualJob& job, int64_t first, int64_t last))
// Channels first .. last - 1 of the bias' gradient, from the partial sums, in order.
FA_DECLARE(void, residual_bias, (const ResidualJob& job, int64_t first, int64_t last, float* d_bias))
