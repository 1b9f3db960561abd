// ambient_noise and ambient_loss, a tile at a time: normals, the visible image, then one pass that writes.

#include "ambient.h"

#include <vector>

#include "philox.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

struct Scalars {
  float c_in, c_noise, tau, q, A, alpha, beta;  // rows of the table
};

// In double: a few operations a sample, and every coefficient is right to its last bit. With rho = q/s and tau/s both
// regimes are one formula, which tau = 0 makes the clean one. The regime is decided in sigma's precision.
Scalars scalars(float sigma, float sigma_tn, float sigma_data, bool unit) {
  const float tau_f = sigma_tn > 0 && sigma >= sigma_tn ? sigma_tn : 0.0f;
  const double s = sigma, sd = sigma_data, tau = tau_f;
  const double h = std::sqrt(s * s + sd * sd), q = std::sqrt((s - tau) * (s + tau)), rho = q / s;
  const double clean = s / (sd * h), share = (tau / s) * (tau / s) * h / sd;
  double A = rho * rho, alpha = A * clean, beta = -rho * (share + A * sd / h);
  if (unit) {
    const bool kept = sigma >= tau_f * 1.1547005383792515f;  // sqrt(1 + 1/(m-1)), m = 4
    A = kept;
    alpha = kept ? clean : 0;
    beta = kept ? -(share / rho + rho * sd / h) : 0;
  }
  return {float(1 / h), float(std::log(s) / 4), tau_f, float(q), float(A), float(alpha), float(beta)};
}

struct half {
  uint16_t bits;
};
inline float value(float x) { return x; }
inline float value(uint8_t x) { return static_cast<float>(x) / 127.5f - 1.0f; }
inline float value(half x) {  // exact: the exponent moves by a multiplication, which also normalises
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

template <class T>
void read(float* __restrict y, const void* from, int64_t offset, int64_t count) {
  const T* __restrict p = static_cast<const T*>(from) + offset;
  for (int64_t i = 0; i < count; ++i) y[i] = value(p[i]);
}

// One channel of a tile, in unflipped order: `y` is the visible image, `eps` the fresh noise.
class Channel {
 public:
  explicit Channel(const AmbientBatch& batch) : batch_(batch) {
    // Normals come in blocks, and start up to 3 elements before the tile.
    const int64_t size = batch.tile_rows() * batch.width + 4 * (kBlock + 1);
    memory_.resize(4 * size);
    y = memory_.data(), mirrored_ = y + size, fresh_ = y + 2 * size, fixed_ = y + 3 * size;
  }

  float* y;
  const float* eps;

  void make(int64_t sample, float tau, int64_t channel, int64_t pixel, int64_t count) {
    const AmbientBatch& b = batch_;
    const int64_t element = channel * b.height * b.width + pixel;
    const int64_t offset = sample * b.channels * b.height * b.width + element;
    if (tau > 0 && b.x_n) {
      b.x_n_is_half ? read<half>(y, b.x_n, offset, count) : read<float>(y, b.x_n, offset, count);
    } else {
      b.images_are_bytes ? read<uint8_t>(y, b.images, offset, count) : read<float>(y, b.images, offset, count);
      if (tau > 0) {
        const float* __restrict fixed = draw(fixed_, element, count, b.noise_seed, b.ids[sample], 0);
        for (int64_t i = 0; i < count; ++i) y[i] += tau * fixed[i];
      }
    }
    eps = draw(fresh_, element, count, b.run_seed, b.positions[sample], 1);
  }

  // `values` (y or eps's memory, overwritten at will) as the network sees it: mirrored along the width, or as it is.
  const float* place(const float* values, int64_t sample, int64_t count) {
    if (!batch_.flips || !batch_.flips[sample]) return values;
    const int64_t width = batch_.width;
    for (int64_t row = 0; row < count; row += width) {
      const float* __restrict from = values + row;
      float* __restrict to = mirrored_ + row;
      for (int64_t w = 0; w < width; ++w) to[w] = from[width - 1 - w];
    }
    return mirrored_;
  }

 private:
  static const float* draw(float* to, int64_t element, int64_t count, uint64_t seed, int64_t id, uint32_t stream) {
    const int64_t skip = element & 3;
    normals(to, static_cast<uint32_t>(element >> 2), (skip + count + 3) / 4, seed, static_cast<uint64_t>(id), stream);
    return to + skip;
  }

  const AmbientBatch& batch_;
  std::vector<float> memory_;
  float *mirrored_, *fresh_, *fixed_;
};

// Pixels of one channel in the network's memory: apart by `step`, 1 or the number of channels.
template <class T>
void write(T* __restrict out, int64_t step, const float* __restrict x, int64_t count) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) store(out + i, x[i]);
  else
    for (int64_t i = 0; i < count; ++i) store(out + i * step, x[i]);
}

template <class T>
inline float residual(const T* F, T* dF, float A, float target) {
  const float r = A * load(F) - target;
  store(dF, 2.0f * A * r);
  return r * r;
}

// Writes dF and returns the sum of squares, in an order that depends on `count` alone.
template <class T>
double compare(const T* __restrict F, T* __restrict dF, int64_t step, float A, float* __restrict target, int64_t count) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) target[i] = residual(F + i, dF + i, A, target[i]);
  else
    for (int64_t i = 0; i < count; ++i) target[i] = residual(F + i * step, dF + i * step, A, target[i]);
  constexpr int64_t kSums = 32;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t k = 0; k < kSums; ++k) sums[k] += target[i + k];
  for (; i < count; ++i) sums[i % kSums] += target[i];
  double total = 0;
  for (float sum : sums) total += sum;
  return total;
}

// Calls work(sample, first pixel, pixels) for each tile.
template <class Work>
void for_tiles(const AmbientBatch& b, int64_t begin, int64_t end, const Work& work) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t % b.tiles() * b.tile_rows();
    work(t, t / b.tiles(), row * b.width, std::min(b.tile_rows(), b.height - row) * b.width);
  }
}

// Where a channel of a tile starts in the network's tensor.
int64_t start_of(const AmbientBatch& b, int64_t sample, int64_t channel, int64_t pixel) {
  const int64_t plane = b.height * b.width, base = sample * b.channels * plane;
  return base + (b.channels_last ? pixel * b.channels + channel : channel * plane + pixel);
}

template <class T>
void noise(const AmbientBatch& b, T* net_input, float* table, int64_t begin, int64_t end) {
  Channel channel(b);
  const int64_t step = b.channels_last ? b.channels : 1;
  for_tiles(b, begin, end, [&](int64_t, int64_t sample, int64_t pixel, int64_t count) {
    const Scalars k = scalars(b.sigma[sample], b.sigma_tn, b.sigma_data, false);
    if (pixel == 0) {
      const float row[7] = {k.c_in, k.c_noise, k.tau, k.q, k.A, k.alpha, k.beta};
      for (int j = 0; j < 7; ++j) table[j * b.samples + sample] = row[j];
    }
    for (int64_t c = 0; c < b.channels; ++c) {
      channel.make(sample, k.tau, c, pixel, count);
      float* __restrict x = channel.y;
      const float* __restrict eps = channel.eps;
      for (int64_t i = 0; i < count; ++i) x[i] = k.c_in * (x[i] + k.q * eps[i]);
      write(net_input + start_of(b, sample, c, pixel), step, channel.place(x, sample, count), count);
    }
  });
}

template <class T>
void loss(const AmbientBatch& b, bool unit, const T* F, T* dF, double* partial, int64_t begin, int64_t end) {
  Channel channel(b);
  const int64_t step = b.channels_last ? b.channels : 1;
  for_tiles(b, begin, end, [&](int64_t tile, int64_t sample, int64_t pixel, int64_t count) {
    const Scalars k = scalars(b.sigma[sample], b.sigma_tn, b.sigma_data, unit);
    double sum = 0;
    for (int64_t c = 0; c < b.channels; ++c) {
      channel.make(sample, k.tau, c, pixel, count);
      float* __restrict target = channel.y;
      const float* __restrict eps = channel.eps;
      for (int64_t i = 0; i < count; ++i) target[i] = k.alpha * target[i] + k.beta * eps[i];
      const int64_t start = start_of(b, sample, c, pixel);
      float* placed = const_cast<float*>(channel.place(target, sample, count));
      sum += compare(F + start, dF + start, step, k.A, placed, count);
    }
    partial[tile] = sum;
  });
}

}  // namespace

void ambient_noise_tiles(const AmbientBatch& b, void* net_input, float* table, int64_t begin, int64_t end) {
  b.network_is_bf16 ? noise(b, static_cast<bf16*>(net_input), table, begin, end)
                    : noise(b, static_cast<float*>(net_input), table, begin, end);
}

void ambient_loss_tiles(const AmbientBatch& b, bool unit, const void* F, void* dF, double* partial, int64_t begin,
                        int64_t end) {
  b.network_is_bf16 ? loss(b, unit, static_cast<const bf16*>(F), static_cast<bf16*>(dF), partial, begin, end)
                    : loss(b, unit, static_cast<const float*>(F), static_cast<float*>(dF), partial, begin, end);
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
