// residual on the CPU: checks, threads, registration. Python allocates every output.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "residual.h"
#include "tensors.h"

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements that are worth a thread
constexpr int64_t kPiece = 16384;  // elements of a piece, more or less
constexpr int64_t kLine = 128;     // values that a line has at least: short ones leave lanes idle

ResidualJob describe(const Tensor& y, double scale, bool by_channel) {
  const ScalarType dtype = y.scalar_type();
  STD_TORCH_CHECK(y.is_cpu() && y.dim() >= 2 && y.numel() > 0 &&
                      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "residual: the input must be [N, C, ...] in float32 or bfloat16 on the CPU, not empty");
  ResidualJob job{};
  job.y = y.const_data_ptr();
  job.low_precision = dtype == ScalarType::BFloat16;
  job.scale = static_cast<float>(scale);
  job.elements = y.numel(), job.channels = y.size(1);
  job.channels_last = is_channels_last(y, "residual") || !by_channel;
  if (!by_channel)
    job.width = std::min(job.elements, kPiece);  // no channel matters: long lines
  else if (job.channels_last)
    job.width = (kLine + job.channels - 1) / job.channels * job.channels;
  else
    job.width = job.elements / (y.size(0) * job.channels);
  job.lines = (job.elements + job.width - 1) / job.width;
  job.piece_lines = std::max<int64_t>(1, kPiece / job.width);
  job.pieces = (job.lines + job.piece_lines - 1) / job.piece_lines;
  return job;
}

template <class F>
void share(const ResidualJob& job, const F& pieces) {
  torch::stable::parallel_for(0, job.pieces, kGrain / (job.piece_lines * job.width) + 1, pieces);
}

float* floats(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.numel() == count && t.is_contiguous(),
                  "residual: ", name, " must be contiguous float32 with ", count, " elements");
  return static_cast<float*>(t.data_ptr());
}

void* output(const Tensor& t, const Tensor& like, const char* name) {
  check_like(t, like, "residual", name);
  prefer_huge_pages(t.data_ptr(), t.numel() * (t.scalar_type() == ScalarType::BFloat16 ? 2 : 4));
  return t.data_ptr();
}

void forward(const Tensor& y, const Tensor& x, const std::optional<Tensor>& bias, double scale, const Tensor& out) {
  ResidualJob job = describe(y, scale, bias.has_value());
  check_like(x, y, "residual", "x");
  job.x = x.const_data_ptr();
  job.out = output(out, y, "the output");
  std::vector<float> line;
  if (bias) {
    job.bias = floats(*bias, "bias", job.channels);
    if (job.channels_last && job.width > job.channels) {
      for (int64_t j = 0; j < job.width; ++j) line.push_back(job.bias[j % job.channels]);
      job.bias = line.data();
    }
  }
  share(job, [&](int64_t first, int64_t last) { FA_CALL(residual_forward, job, first, last); });
}

void backward(const Tensor& dy, double scale, const std::optional<Tensor>& d, const std::optional<Tensor>& d_bias) {
  ResidualJob job = describe(dy, scale, d_bias.has_value());
  STD_TORCH_CHECK(d || d_bias, "residual: nothing to compute");
  if (d) job.out = output(*d, dy, "d");
  std::vector<float> partial;
  if (d_bias) {
    partial.resize(job.channels_last ? job.pieces * job.width : job.lines);
    job.partial = partial.data();
  }
  share(job, [&](int64_t first, int64_t last) { FA_CALL(residual_backward, job, first, last); });
  if (!d_bias) return;
  float* gradient = floats(*d_bias, "d_bias", job.channels);
  torch::stable::parallel_for(
      0, job.channels, kGrain * job.channels / static_cast<int64_t>(partial.size()) + 1,
      [&](int64_t first, int64_t last) { FA_CALL(residual_bias, job, first, last, gradient); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def("residual(Tensor y, Tensor x, Tensor? bias, float scale, Tensor(a!) out) -> ()");
  m.def("residual_backward(Tensor dy, float scale, Tensor(a!)? d, Tensor(b!)? d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) {
  m.impl("residual", TORCH_BOX(&forward));
  m.impl("residual_backward", TORCH_BOX(&backward));
}

}  // namespace fastambient
