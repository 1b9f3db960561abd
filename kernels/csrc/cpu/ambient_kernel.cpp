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
inline float value(uint8_t x) { return static_cast<float>(2 * x - 255) * (1.0f / 255.0f); }  // x / 127.5 - 1
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
    y = memory_.data(), squares = y + size, fresh_ = y + 2 * size, fixed_ = y + 3 * size;
  }

  float* y;
  float* squares;  // room for the losses of the tile's pixels
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

  // Calls each(i, j, o) for the pixels of the tile in the order in which the network has them: i is where a pixel's y
  // and eps lie (a flip mirrors rows), j counts, and o is its place in the network's memory.
  template <class Each>
  void for_pixels(int64_t sample, int64_t count, Each each) const {
    const int64_t step = batch_.channels_last ? batch_.channels : 1, width = batch_.width;
    if (!batch_.flips || !batch_.flips[sample]) {
      if (step == 1)
        for (int64_t j = 0; j < count; ++j) each(j, j, j);
      else
        for (int64_t j = 0; j < count; ++j) each(j, j, j * step);
      return;
    }
    for (int64_t row = 0; row < count; row += width) {
      const int64_t last = row + width - 1;
      if (step == 1)
        for (int64_t w = 0; w < width; ++w) each(last - w, row + w, row + w);
      else
        for (int64_t w = 0; w < width; ++w) each(last - w, row + w, (row + w) * step);
    }
  }

 private:
  static const float* draw(float* to, int64_t element, int64_t count, uint64_t seed, int64_t id, uint32_t stream) {
    const int64_t skip = element & 3;
    normals(to, static_cast<uint32_t>(element >> 2), (skip + count + 3) / 4, seed, static_cast<uint64_t>(id), stream);
    return to + skip;
  }

  const AmbientBatch& batch_;
  std::vector<float> memory_;
  float *fresh_, *fixed_;
};

// In an order that depends on `count` alone.
double sum(const float* values, int64_t count) {
  constexpr int64_t kSums = 32;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t k = 0; k < kSums; ++k) sums[k] += values[i + k];
  for (; i < count; ++i) sums[i % kSums] += values[i];
  double total = 0;
  for (float part : sums) total += part;
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
  for_tiles(b, begin, end, [&](int64_t, int64_t sample, int64_t pixel, int64_t count) {
    const Scalars k = scalars(b.sigma[sample], b.sigma_tn, b.sigma_data, false);
    if (pixel == 0) {
      const float row[7] = {k.c_in, k.c_noise, k.tau, k.q, k.A, k.alpha, k.beta};
      for (int j = 0; j < 7; ++j) table[j * b.samples + sample] = row[j];
    }
    for (int64_t c = 0; c < b.channels; ++c) {
      channel.make(sample, k.tau, c, pixel, count);
      const float *__restrict y = channel.y, *__restrict eps = channel.eps;
      T* __restrict x = net_input + start_of(b, sample, c, pixel);
      const float c_in = k.c_in, q = k.q;
      channel.for_pixels(sample, count,
                         [=](int64_t i, int64_t, int64_t o) { store(x + o, c_in * (y[i] + q * eps[i])); });
    }
  });
}

template <class T>
void loss(const AmbientBatch& b, bool unit, const T* F, T* dF, double* partial, int64_t begin, int64_t end) {
  Channel channel(b);
  for_tiles(b, begin, end, [&](int64_t tile, int64_t sample, int64_t pixel, int64_t count) {
    const Scalars k = scalars(b.sigma[sample], b.sigma_tn, b.sigma_data, unit);
    double total = 0;
    for (int64_t c = 0; c < b.channels; ++c) {
      channel.make(sample, k.tau, c, pixel, count);
      const int64_t start = start_of(b, sample, c, pixel);
      const float *__restrict y = channel.y, *__restrict eps = channel.eps;
      const T* __restrict from = F + start;
      T* __restrict to = dF + start;
      float* __restrict squares = channel.squares;
      const float A = k.A, alpha = k.alpha, beta = k.beta;
      channel.for_pixels(sample, count, [=](int64_t i, int64_t j, int64_t o) {
        const float residual = A * load(from + o) - (alpha * y[i] + beta * eps[i]);
        store(to + o, 2.0f * A * residual);
        squares[j] = residual * residual;
      });
      total += sum(squares, count);
    }
    partial[tile] = total;
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
