// adam_ema on the CPU: the loops over one chunk of one parameter.
//
// A chunk is walked in blocks that stay in the first-level cache: clean the gradient into a buffer, sum its squares,
// update, round, average. Each array is read from memory once and written once.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "adam_ema.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kBlock = 256;  // 6 arrays and the buffer: 7 KB
constexpr int64_t kLanes = 8;    // partial sums, the same on every instruction set
constexpr float kInfinity = 1e5f;  // what an infinite gradient becomes

template <typename G>
int32_t clean(const G* g, int64_t n, float* out) {
  int32_t nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float x = load(g + i);
    const bool finite = std::fabs(x) <= FLT_MAX;
    const float infinite = x > 0 ? kInfinity : x < 0 ? -kInfinity : 0.0f;  // NaN compares as neither
    out[i] = finite ? x : infinite;
    nonfinite += !finite;
  }
  return nonfinite;
}

// The buffer is a whole number of lanes, zeros behind the data.
void add_squares(const float* g, int64_t n, double* lanes) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const double x = g[i + l];
      lanes[l] += x * x;
    }
}

// start + weight * (end - start), from whichever end is nearer, as torch.lerp
inline float lerp(float start, float end, float weight, float one_minus_weight, bool near) {
  const float difference = end - start;
  return near ? start + weight * difference : end - one_minus_weight * difference;
}

template <bool kNear>
void update(const AdamEmaTensor& t, const float* __restrict g, float clip, float* __restrict p, float* __restrict m,
            float* __restrict v, int64_t n) {
  const float step_size = t.step_size, v_scale = t.v_scale, eps = t.eps, decay = t.decay, l2 = t.l2;
  const float beta1 = t.beta1, one_minus_beta1 = t.one_minus_beta1;
  const float beta2 = t.beta2, one_minus_beta2 = t.one_minus_beta2;
  for (int64_t i = 0; i < n; ++i) {
    const float x = g[i] * clip + l2 * p[i];
    const float mean = lerp(m[i], x, one_minus_beta1, beta1, kNear);
    const float square = beta2 * v[i] + one_minus_beta2 * x * x;
    m[i] = mean;
    v[i] = square;
    p[i] = decay * p[i] - step_size * mean / (std::sqrt(square) * v_scale + eps);
  }
}

void round(const float* __restrict p, bf16* __restrict leaf, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(leaf + i, p[i]);
}

void average(float* __restrict ema, const float* __restrict p, double beta, int64_t n) {
  const float keep = static_cast<float>(beta), weight = static_cast<float>(1 - beta);
  if (weight < 0.5f) {
    for (int64_t i = 0; i < n; ++i) ema[i] = lerp(ema[i], p[i], weight, keep, true);
  } else {
    for (int64_t i = 0; i < n; ++i) ema[i] = lerp(ema[i], p[i], weight, keep, false);
  }
}

struct Sums {
  double lanes[kLanes] = {};
  int64_t nonfinite = 0;

  // The cleaned gradients of a block in `out`.
  void block(const AdamEmaTensor& t, int64_t at, int64_t n, float* out) {
    nonfinite += t.g_bf16 ? clean(static_cast<const bf16*>(t.g) + at, n, out)
                          : clean(static_cast<const float*>(t.g) + at, n, out);
    const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(out + n, out + whole, 0.0f);
    add_squares(out, whole, lanes);
  }
  void store(AdamEmaStats* stats) const {
    stats->nonfinite = nonfinite;
    stats->squares = 0;
    for (const double lane : lanes) stats->squares += lane;
  }
};

}  // namespace

void adam_ema_norm(const AdamEmaTensor& t, int64_t begin, int64_t end, AdamEmaStats* stats) {
  alignas(64) float g[kBlock];
  Sums sums;
  for (int64_t at = begin; at < end; at += kBlock) sums.block(t, at, std::min(kBlock, end - at), g);
  sums.store(stats);
}

void adam_ema_update(const AdamEmaTensor& t, int64_t begin, int64_t end, float clip, const AdamEmaBetas& betas,
                     AdamEmaStats* stats) {
  alignas(64) float g[kBlock];
  Sums sums;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    sums.block(t, at, n, g);
    (t.one_minus_beta1 < 0.5f ? update<true> : update<false>)(t, g, clip, t.p + at, t.m + at, t.v + at, n);
    if (t.leaf != nullptr) round(t.p + at, t.leaf + at, n);
    for (int64_t k = 0; k < betas.count; ++k)
      average(reinterpret_cast<float*>(t.emas[k]) + at, t.p + at, betas.beta[k], n);
  }
  sums.store(stats);
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
