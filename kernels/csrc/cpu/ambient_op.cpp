// ambient_noise and ambient_loss on the CPU: checks, threads, registration. Python allocates every output.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ambient.h"

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const void* dense(const Tensor& t, const char* name, ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.numel() == count && t.is_contiguous(), "ambient: ", name,
                  " must be contiguous on the CPU, of the expected dtype, with ", count, " elements");
  return t.const_data_ptr();
}

uint64_t seed_of(const Tensor& t, const char* name) {
  return static_cast<uint64_t>(*static_cast<const int64_t*>(dense(t, name, ScalarType::Long, 1)));
}

AmbientBatch describe(const Tensor& images, const Tensor& ids, const std::optional<Tensor>& flips,
                      const Tensor& positions, const Tensor& sigma, const std::optional<Tensor>& x_n,
                      const Tensor& noise_seed, const Tensor& run_seed, double sigma_tn, double sigma_data,
                      const Tensor& network, bool channels_last) {
  STD_TORCH_CHECK(images.dim() == 4 && images.numel() > 0, "ambient: images must be [N, C, H, W] and not empty");
  AmbientBatch b{};
  b.samples = images.size(0), b.channels = images.size(1), b.height = images.size(2), b.width = images.size(3);
  const int64_t count = images.numel();
  b.images_are_bytes = images.scalar_type() == ScalarType::Byte;
  b.images = dense(images, "images", b.images_are_bytes ? ScalarType::Byte : ScalarType::Float, count);
  if (x_n) {
    b.x_n_is_half = x_n->scalar_type() == ScalarType::Half;
    b.x_n = dense(*x_n, "x_n", b.x_n_is_half ? ScalarType::Half : ScalarType::Float, count);
  }
  if (flips) b.flips = static_cast<const bool*>(dense(*flips, "flips", ScalarType::Bool, b.samples));
  b.ids = static_cast<const int64_t*>(dense(ids, "ids", ScalarType::Long, b.samples));
  b.positions = static_cast<const int64_t*>(dense(positions, "positions", ScalarType::Long, b.samples));
  b.sigma = static_cast<const float*>(dense(sigma, "sigma", ScalarType::Float, b.samples));
  b.noise_seed = seed_of(noise_seed, "noise_seed");
  b.run_seed = seed_of(run_seed, "run_seed");
  // An infinite sigma_tn is plain EDM, as 0 is: no sigma reaches it.
  b.sigma_tn = static_cast<float>(sigma_tn), b.sigma_data = static_cast<float>(sigma_data);
  b.channels_last = channels_last;
  const ScalarType dtype = network.scalar_type();
  STD_TORCH_CHECK(network.is_cpu() && network.numel() == count &&
                      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "ambient: the network's tensors must be float32 or bfloat16 of the images' shape");
  b.network_is_bf16 = dtype == ScalarType::BFloat16;
  return b;
}

constexpr int64_t kGrain = 8;  // tiles worth a thread: about 1000 pixels of each channel, tens of microseconds each

void noise(const Tensor& images, const Tensor& ids, const std::optional<Tensor>& flips, const Tensor& positions,
           const Tensor& sigma, const std::optional<Tensor>& x_n, const Tensor& noise_seed, const Tensor& run_seed,
           double sigma_tn, double sigma_data, bool channels_last, const Tensor& net_input, const Tensor& table) {
  const AmbientBatch b = describe(images, ids, flips, positions, sigma, x_n, noise_seed, run_seed, sigma_tn, sigma_data,
                                  net_input, channels_last);
  float* rows = static_cast<float*>(const_cast<void*>(dense(table, "table", ScalarType::Float, 7 * b.samples)));
  void* out = net_input.data_ptr();
  torch::stable::parallel_for(0, b.samples * b.tiles(), kGrain, [&](int64_t begin, int64_t end) {
    FA_CALL(ambient_noise_tiles, b, out, rows, begin, end);
  });
}

void loss(const Tensor& F, const Tensor& images, const Tensor& ids, const std::optional<Tensor>& flips,
          const Tensor& positions, const Tensor& sigma, const std::optional<Tensor>& x_n, const Tensor& noise_seed,
          const Tensor& run_seed, double sigma_tn, double sigma_data, bool unit, bool channels_last, const Tensor& dF,
          const Tensor& losses) {
  const AmbientBatch b = describe(images, ids, flips, positions, sigma, x_n, noise_seed, run_seed, sigma_tn, sigma_data,
                                  F, channels_last);
  STD_TORCH_CHECK(dF.scalar_type() == F.scalar_type() && dF.numel() == F.numel(), "ambient: dF must be like F");
  float* out = static_cast<float*>(const_cast<void*>(dense(losses, "losses", ScalarType::Float, b.samples)));
  const int64_t tiles = b.tiles();
  std::vector<double> partial(b.samples * tiles);
  const void* f = F.const_data_ptr();
  void* df = dF.data_ptr();
  torch::stable::parallel_for(0, b.samples * tiles, kGrain, [&](int64_t begin, int64_t end) {
    FA_CALL(ambient_loss_tiles, b, unit, f, df, partial.data(), begin, end);
  });
  for (int64_t n = 0; n < b.samples; ++n) {  // in order: the sum does not depend on the threads
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += partial[n * tiles + t];
    out[n] = static_cast<float>(sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def(
      "ambient_noise(Tensor images, Tensor ids, Tensor? flips, Tensor positions, Tensor sigma, Tensor? x_n, "
      "Tensor noise_seed, Tensor run_seed, float sigma_tn, float sigma_data, bool channels_last, "
      "Tensor(a!) net_input, Tensor(b!) table) -> ()");
  m.def(
      "ambient_loss(Tensor F, Tensor images, Tensor ids, Tensor? flips, Tensor positions, Tensor sigma, Tensor? x_n, "
      "Tensor noise_seed, Tensor run_seed, float sigma_tn, float sigma_data, bool unit, bool channels_last, "
      "Tensor(a!) dF, Tensor(b!) losses) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) {
  m.impl("ambient_noise", TORCH_BOX(&noise));
  m.impl("ambient_loss", TORCH_BOX(&loss));
}

}  // namespace fastambient
