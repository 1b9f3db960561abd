// One forward or backward pass of group_norm_silu, described for the loops (group_norm_silu_kernel.cpp) and for the
// schedule (group_norm_silu_op.cpp).
#pragma once

#include "common.h"

namespace fastambient {

// Statistics never cross a unit, and what a piece computes depends on nothing but the shape: results do not depend on
// the number of threads or on whether a unit's pieces ran on one thread.
//
//                    unit             piece              a channel's values lie
//   channels-last    a sample         a block of pixels  `channels` apart
//   contiguous       (sample, group)  a channel          side by side
struct GroupNormJob {
  bool backward, low_precision, channels_last, silu;  // low_precision: x, y, dy, dx are bfloat16, else float32
  int64_t samples, channels, pixels, groups;
  float eps;
  const void *x, *dy;
  void* out;  // y or dx
  const float *weight, *bias;
  const float *scale, *shift, *add;  // [samples, channels] with these row strides; null where absent
  int64_t scale_stride, shift_stride, add_stride;
  float *mean, *rstd;                         // [samples, groups]: written forward, read backward
  float *sum_dv, *sum_dvz, *d_scale, *d_add;  // [samples, channels], backward; the last two may be null

  // Short rows of channels-last data are processed several at a time: `fold` pixels make one line.
  int64_t unit_channels, fold, piece_pixels, pieces, units;
  bool keep;  // backward: dv of a unit is kept between its two passes, as float32

  int64_t line() const { return fold * unit_channels; }
  int64_t part_floats() const { return channels_last ? 4 * line() : 0; }  // what a piece leaves for its unit to add up
};

// Sums of a unit's channels and the coefficients made of them; u = x + add is what is normalised.
//   v = a*x + b is the activation's input; dx = a*dv + c1*x + c0
struct GroupNormState {
  double *s0, *s1, *s2;  // forward: -, mean and sum of squared deviations of x; backward: sums of x-m, dv, dv*(x-m)
  float *a, *b, *m, *c1, *c0;  // each `line` long
  float* dv;                   // the unit's, piece after piece, or null

  static int64_t doubles(const GroupNormJob& job) { return 3 * job.unit_channels; }
  static int64_t floats(const GroupNormJob& job) {
    return 5 * job.line() + (job.keep ? job.unit_channels * job.pixels : 0);
  }
  GroupNormState(const GroupNormJob& job, double* d, float* f)
      : s0(d), s1(s0 + job.unit_channels), s2(s1 + job.unit_channels), a(f), b(a + job.line()), m(b + job.line()),
        c1(m + job.line()), c0(c1 + job.line()), dv(job.keep ? c0 + job.line() : nullptr) {}
};

}  // namespace fastambient
