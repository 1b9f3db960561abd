// conv_weight on the CPU: checks, threads, registration. Python allocates every output.
#include <algorithm>
#include <memory>
#include <new>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "conv_weight.h"

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;      // copied elements that are worth a thread
constexpr int64_t kWork = 1000 * 1000;  // multiplications that are

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Panels = std::unique_ptr<float[], Free>;
Panels panels(int64_t count) { return Panels(new (std::align_val_t{64}) float[count]); }

// A float32 picture whose channels lie side by side.
const float* pixels(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 4, "conv_weight: ", name,
                  " must be float32 [N, C, H, W] on the CPU");
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  STD_TORCH_CHECK(t.numel() > 0 && (c == 1 || t.stride(1) == 1) && (w == 1 || t.stride(3) == c) &&
                      (h == 1 || t.stride(2) == w * c) && (t.size(0) == 1 || t.stride(0) == h * w * c),
                  "conv_weight: ", name, " must be channels-last and not empty");
  return static_cast<const float*>(t.const_data_ptr());
}

void conv_weight(const Tensor& x, const Tensor& dy, const Tensor& d_weight, const std::optional<Tensor>& d_bias) {
  ConvWeightJob job{};
  job.x = pixels(x, "x"), job.dy = pixels(dy, "dy");
  job.d_weight = const_cast<float*>(pixels(d_weight, "d_weight"));
  job.samples = x.size(0), job.in = x.size(1), job.height = x.size(2), job.width = x.size(3);
  job.out = dy.size(1), job.kernel = d_weight.size(2);
  STD_TORCH_CHECK(dy.size(0) == job.samples && dy.size(2) == job.height && dy.size(3) == job.width,
                  "conv_weight: x and dy must have the same samples and pixels");
  STD_TORCH_CHECK(d_weight.size(0) == job.out && d_weight.size(1) == job.in && d_weight.size(3) == job.kernel &&
                      job.kernel % 2 == 1,
                  "conv_weight: d_weight must be [out, in, k, k] with k odd");
  if (d_bias) {
    STD_TORCH_CHECK(d_bias->is_cpu() && d_bias->scalar_type() == ScalarType::Float && d_bias->is_contiguous() &&
                        d_bias->numel() == job.out,
                    "conv_weight: d_bias must be contiguous float32 [out]");
    job.d_bias = static_cast<float*>(d_bias->data_ptr());
  }
  const ConvWeightTile tile = FA_CALL(conv_weight_tile, );
  const int64_t ins = (job.in + tile.in - 1) / tile.in, outs = (job.out + tile.out - 1) / tile.out;
  const Panels x_panels = panels(ins * tile.in * job.x_pixels()), dy_panels = panels(outs * tile.out * job.dy_pixels());
  job.x_panels = x_panels.get(), job.dy_panels = dy_panels.get();
  const int64_t padded = job.samples * job.padded_height(), rows = job.samples * job.height;
  torch::stable::parallel_for(0, padded + rows, kGrain / (job.width * std::max(job.in, job.out)) + 1,
                              [&](int64_t begin, int64_t end) {
                                if (begin < padded)
                                  FA_CALL(conv_weight_pack_x, job, begin, std::min(end, padded));
                                if (end > padded)
                                  FA_CALL(conv_weight_pack_dy, job, std::max(begin, padded) - padded, end - padded);
                              });
  const int64_t one = tile.in * tile.out * job.kernel * job.kernel * job.dy_pixels();
  torch::stable::parallel_for(0, ins * outs, kWork / one + 1,
                              [&](int64_t begin, int64_t end) { FA_CALL(conv_weight_tiles, job, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def("conv_weight(Tensor x, Tensor dy, Tensor(a!) d_weight, Tensor(b!)? d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) { m.impl("conv_weight", TORCH_BOX(&conv_weight)); }

}  // namespace fastambient
