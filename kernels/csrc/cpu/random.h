// What random_op.cpp hands to random_kernel.cpp; the mathematics is in noise.py and dropout.py.
#pragma once

#include <cstdint>

#include "common.h"

namespace fastambient {

struct DropoutJob {
  const void* x;  // [samples, elements], float32 or bfloat16
  void* y;
  const int64_t* positions;
  int64_t samples, elements;
  uint64_t seed;
  uint32_t first, stream;  // first counter of the layer
  uint32_t threshold;      // a half word below it drops its element
  float scale;
  bool low_precision;
};

}  // namespace fastambient

// `count` words of one id, from the first word of counter `first` on.
FA_DECLARE(void, random_words_of,
           (int64_t * out, uint32_t first, int64_t count, uint64_t seed, int64_t id, uint32_t stream))
// Elements begin .. end - 1 of a sample; begin is a multiple of 8.
FA_DECLARE(void, dropout_elements, (const DropoutJob& job, int64_t sample, int64_t begin, int64_t end))
