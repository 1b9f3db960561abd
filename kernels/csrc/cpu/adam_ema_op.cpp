// adam_ema on the CPU: the table, chunks, threads, registration. Python builds and checks the table.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "adam_ema.h"

FA_DECLARE(void, adam_ema_norm, (const AdamEmaTensor& t, int64_t begin, int64_t end, AdamEmaStats* stats))
FA_DECLARE(void, adam_ema_update, (const AdamEmaTensor& t, int64_t begin, int64_t end, float clip,
                                   const AdamEmaBetas& betas, AdamEmaStats* stats))

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 16384;  // elements: sums are taken over chunks, whatever the number of threads
constexpr int64_t kGrain = 2;      // chunks that are worth a thread

// Columns of `table`, then the addresses of the moving averages.
enum : int64_t { kParam, kGrad, kExpAvg, kExpAvgSq, kStep, kNumel, kGroup, kGradBf16, kLeaf, kColumns };
// Columns of `groups`.
enum : int64_t { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kSettings };

struct Chunk {
  int64_t tensor, begin, end;
};

// Counts the step of one parameter and derives its numbers, in double precision as torch does.
AdamEmaTensor prepare(const int64_t* row, const double* group) {
  auto* step = reinterpret_cast<float*>(row[kStep]);
  *step += 1;
  const double lr = group[kLr], beta1 = group[kBeta1], beta2 = group[kBeta2], weight_decay = group[kWeightDecay];
  const bool decoupled = group[kDecoupled] != 0;
  return {
      .p = reinterpret_cast<float*>(row[kParam]),
      .g = reinterpret_cast<const void*>(row[kGrad]),
      .m = reinterpret_cast<float*>(row[kExpAvg]),
      .v = reinterpret_cast<float*>(row[kExpAvgSq]),
      .leaf = reinterpret_cast<bf16*>(row[kLeaf]),
      .emas = row + kColumns,
      .numel = row[kNumel],
      .g_bf16 = row[kGradBf16] != 0,
      .step_size = static_cast<float>(lr / (1 - std::pow(beta1, *step))),
      .v_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, *step))),
      .eps = static_cast<float>(group[kEps]),
      .beta1 = static_cast<float>(beta1),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .decay = static_cast<float>(decoupled ? 1 - lr * weight_decay : 1),
      .l2 = static_cast<float>(decoupled ? 0 : weight_decay),
  };
}

template <typename T>
T* data(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type,
                  "adam_ema: ", name, " has another dtype, device or layout than the optimizer gives it");
  return static_cast<T*>(t.data_ptr());
}

AdamEmaStats total(const std::vector<AdamEmaStats>& chunks) {
  AdamEmaStats sum{};
  for (const AdamEmaStats& chunk : chunks) {
    sum.squares += chunk.squares;
    sum.nonfinite += chunk.nonfinite;
  }
  return sum;
}

// table int64 [tensors, 9 + averages]: addresses, sizes, groups. groups double [groups, 6], betas double [averages].
// max_norm infinite: no clipping. Writes norm (double) and nonfinite (int64), and through the addresses.
void adam_ema(const Tensor& table, const Tensor& groups, const Tensor& betas, double max_norm, const Tensor& norm,
              const Tensor& nonfinite) {
  const auto* rows = data<const int64_t>(table, "table", ScalarType::Long);
  const auto* settings = data<const double>(groups, "groups", ScalarType::Double);
  const AdamEmaBetas averages{betas.numel(), data<const double>(betas, "betas", ScalarType::Double)};
  auto* norm_out = data<double>(norm, "norm", ScalarType::Double);
  auto* nonfinite_out = data<int64_t>(nonfinite, "nonfinite", ScalarType::Long);
  const int64_t width = kColumns + averages.count;
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == width && groups.dim() == 2 && groups.size(1) == kSettings,
                  "adam_ema: table or groups has another shape than the optimizer gives it");

  std::vector<AdamEmaTensor> tensors;
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < table.size(0); ++i) {
    const int64_t* row = rows + i * width;
    tensors.push_back(prepare(row, settings + row[kGroup] * kSettings));
    for (int64_t begin = 0; begin < row[kNumel]; begin += kChunk)
      chunks.push_back({i, begin, std::min(begin + kChunk, row[kNumel])});
  }

  std::vector<AdamEmaStats> stats(chunks.size());
  const auto count = static_cast<int64_t>(chunks.size());
  float clip = 1;
  if (max_norm < std::numeric_limits<double>::infinity()) {
    torch::stable::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        FA_CALL(adam_ema_norm, tensors[chunks[i].tensor], chunks[i].begin, chunks[i].end, &stats[i]);
    });
    clip = static_cast<float>(std::min(1.0, max_norm / (std::sqrt(total(stats).squares) + 1e-6)));
  }
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      FA_CALL(adam_ema_update, tensors[chunks[i].tensor], chunks[i].begin, chunks[i].end, clip, averages, &stats[i]);
  });
  const AdamEmaStats sum = total(stats);
  *norm_out = std::sqrt(sum.squares);
  *nonfinite_out = sum.nonfinite;
}

}  // namespace
}  // namespace fastambient

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def(
      "adam_ema(Tensor table, Tensor groups, Tensor betas, float max_norm, Tensor(a!) norm, Tensor(b!) nonfinite) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) { m.impl("adam_ema", TORCH_BOX(&fastambient::adam_ema)); }
