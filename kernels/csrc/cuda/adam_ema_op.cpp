// The operators of libfastambient_cuda.so. Python builds and checks the table, and passes its current stream.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "adam_ema.h"

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cuda() && t.is_contiguous() && t.scalar_type() == type, "adam_ema: ", name,
                  " has another dtype, device or layout than the optimizer gives it");
  return static_cast<T*>(t.data_ptr());
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "adam_ema: ", error); }

// Four numbers a launch: first, count, bf16, full.
std::vector<AdamEmaLaunch> launches_of(const std::vector<int64_t>& numbers) {
  std::vector<AdamEmaLaunch> launches;
  for (size_t i = 0; i + 4 <= numbers.size(); i += 4)
    launches.push_back({numbers[i], numbers[i + 1], numbers[i + 2] != 0, numbers[i + 3] != 0});
  return launches;
}

void norm(const Tensor& table, const Tensor& chunks, std::vector<int64_t> launches, const Tensor& squares,
          const Tensor& counts, int64_t stream) {
  for (const AdamEmaLaunch& launch : launches_of(launches))
    check(adam_ema_norm(data<const int64_t>(table, "table", ScalarType::Long), table.size(1) - kColumns,
                        data<const int64_t>(chunks, "chunks", ScalarType::Long), launch,
                        data<double>(squares, "squares", ScalarType::Double),
                        data<int64_t>(counts, "counts", ScalarType::Long), reinterpret_cast<void*>(stream)));
}

void update(const Tensor& table, const Tensor& groups, const Tensor& betas, const Tensor& chunks,
            std::vector<int64_t> launches, std::optional<Tensor> clip, const Tensor& coefficients,
            const Tensor& squares, const Tensor& counts, int64_t stream) {
  const auto* rows = data<const int64_t>(table, "table", ScalarType::Long);
  auto* numbers = data<float>(coefficients, "coefficients", ScalarType::Float);
  const int64_t emas = table.size(1) - kColumns;
  STD_TORCH_CHECK(betas.numel() == emas && coefficients.size(0) == table.size(0) &&
                      coefficients.size(1) == kCoefficients && groups.size(1) == kSettings,
                  "adam_ema: a table has another shape than the optimizer gives it");
  check(adam_ema_prepare(rows, table.size(0), emas, data<const double>(groups, "groups", ScalarType::Double), numbers,
                         reinterpret_cast<void*>(stream)));
  for (const AdamEmaLaunch& launch : launches_of(launches))
    check(adam_ema_update(rows, emas, data<const double>(betas, "betas", ScalarType::Double),
                          data<const int64_t>(chunks, "chunks", ScalarType::Long), launch, numbers,
                          clip ? data<const float>(*clip, "clip", ScalarType::Float) : nullptr,
                          data<double>(squares, "squares", ScalarType::Double),
                          data<int64_t>(counts, "counts", ScalarType::Long), reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace fastambient

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def(
      "adam_ema_cuda_norm(Tensor table, Tensor chunks, int[] launches, Tensor(a!) squares, Tensor(b!) counts, "
      "int stream) -> ()");
  m.def(
      "adam_ema_cuda_update(Tensor table, Tensor groups, Tensor betas, Tensor chunks, int[] launches, Tensor? clip, "
      "Tensor(a!) coefficients, Tensor(b!) squares, Tensor(c!) counts, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CUDA, m) {
  m.impl("adam_ema_cuda_norm", TORCH_BOX(&fastambient::norm));
  m.impl("adam_ema_cuda_update", TORCH_BOX(&fastambient::update));
}
