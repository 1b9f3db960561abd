// What the loops of adam_ema and its operator share.
#pragma once

#include "common.h"

namespace fastambient {

// One parameter with its gradient, its state and the numbers of this step.
struct AdamEmaTensor {
  float* p;
  const void* g;  // float, or bf16 where g_bf16
  float* m;       // exp_avg
  float* v;       // exp_avg_sq
  bf16* leaf;     // gets p, rounded; may be null
  const int64_t* emas;  // addresses of its moving averages
  int64_t numel;
  bool g_bf16;
  float step_size;  // lr / (1 - beta1^step)
  float v_scale;    // 1 / sqrt(1 - beta2^step)
  float eps;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float decay;  // decoupled: p is multiplied by it first; else 1
  float l2;     // coupled: the gradient gets l2 * p; else 0
};

struct AdamEmaBetas {  // a decay for each moving average
  int64_t count;
  const double* beta;
};

struct AdamEmaStats {  // of cleaned gradients, before clipping
  double squares;
  int64_t nonfinite;
};

}  // namespace fastambient
