// resample on the CPU: checks, threads, registration. Python allocates the output.
#include <algorithm>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensors.h"
#include "resample.h"

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements that are worth a thread
constexpr int64_t kSums = 4096;    // sums of rows at a time: 16 KiB, which stay in the first cache

// Whether the values of a 4-dimensional tensor lie side by side, the dimensions in this order from the fastest.
bool dense(const Tensor& t, const int (&order)[4]) {
  int64_t stride = 1;
  for (const int dim : order) {
    if (t.size(dim) != 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}

void resample(const Tensor& x, std::vector<double> weights, int64_t phases, int64_t stride, int64_t offset,
              const Tensor& y) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_cpu() && y.is_cpu() && x.dim() == 4 && y.dim() == 4 && y.scalar_type() == dtype &&
                      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && x.numel() > 0 && y.numel() > 0,
                  "resample: x and y must be float32 or bfloat16 [N, C, H, W] on the CPU, alike, not empty");
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(1) == y.size(1),
                  "resample: x and y must have the same samples and channels");
  constexpr int kContiguous[4] = {3, 2, 1, 0}, kChannelsLast[4] = {1, 3, 2, 0};
  const bool contiguous = dense(x, kContiguous) && dense(y, kContiguous);
  STD_TORCH_CHECK(contiguous || (dense(x, kChannelsLast) && dense(y, kChannelsLast)),
                  "resample: x and y must both be contiguous, or both channels-last");
  STD_TORCH_CHECK((phases == 1 || phases == 2) && (stride == 1 || stride == 2) && !weights.empty() &&
                      weights.size() % static_cast<size_t>(phases) == 0,
                  "resample: phases and stride must be 1 or 2, and each phase must have as many weights");
  const std::vector<float> single(weights.begin(), weights.end());
  const int64_t taps = static_cast<int64_t>(weights.size()) / phases;
  ResampleJob job{};
  job.x = x.const_data_ptr(), job.y = y.data_ptr();
  // A contiguous picture is one of a single channel for each of its channels.
  job.channels = contiguous ? 1 : x.size(1);
  job.samples = contiguous ? x.size(0) * x.size(1) : x.size(0);
  job.height = x.size(2), job.width = x.size(3), job.out_height = y.size(2), job.out_width = y.size(3);
  job.low_precision = dtype == ScalarType::BFloat16;

  const auto reaches = [&](int64_t size, int64_t outputs) {
    std::vector<Reach> made(outputs);
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t at = stride * o + offset, start = phases == 2 ? at >> 1 : at;
      const int64_t skip = std::max<int64_t>(0, -start), count = std::min(taps, size - start) - skip;
      made[o] = {std::min(start + skip, size), std::max<int64_t>(0, count), single.data() + o % phases * taps + skip};
    }
    return made;
  };
  const std::vector<Reach> rows = reaches(job.height, job.out_height), columns = reaches(job.width, job.out_width);
  job.rows = rows.data(), job.columns = columns.data();
  job.tile = std::clamp<int64_t>((kSums / job.channels - taps) * phases / stride, 1, job.out_width);
  const int64_t scratch = std::min(job.width, job.tile * stride / phases + taps + 1) * job.channels;

  const int64_t row = job.out_width * job.channels;
  prefer_huge_pages(job.y, y.numel() * (job.low_precision ? 2 : 4));
  torch::stable::parallel_for(0, job.samples * job.out_height, (kGrain + row - 1) / row,
                              [&](int64_t begin, int64_t end) {
                                const std::unique_ptr<float[]> sums(new float[scratch]);
                                FA_CALL(resample_rows, job, begin, end, sums.get());
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def("resample(Tensor x, float[] weights, int phases, int stride, int offset, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) { m.impl("resample", TORCH_BOX(&resample)); }

}  // namespace fastambient
