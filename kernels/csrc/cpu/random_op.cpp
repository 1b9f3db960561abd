// random_words and dropout on the CPU: checks, threads, registration. Python allocates every output.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "random.h"

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16384;  // words or elements worth a thread: tens of microseconds
constexpr int64_t kPiece = 8192;   // elements of a sample that one thread drops

const int64_t* integers(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.numel() == count && t.is_contiguous(),
                  "random: ", name, " must be contiguous int64 on the CPU with ", count, " elements");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

uint32_t counter(int64_t first, int64_t words) {
  STD_TORCH_CHECK(first >= 0 && first % 4 == 0 && first + words <= (int64_t{1} << 34),
                  "random: words ", first, " to ", first + words, " are not all of 2^34, or do not start at a counter");
  return static_cast<uint32_t>(first / 4);
}

void random_words(const Tensor& ids, const Tensor& seed, int64_t stream, int64_t first, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2, "random: out must be [N, count]");
  const int64_t samples = out.size(0), count = out.size(1);
  const int64_t* id = integers(ids, "ids", samples);
  const uint64_t key = static_cast<uint64_t>(*integers(seed, "seed", 1));
  int64_t* words = const_cast<int64_t*>(integers(out, "out", samples * count));
  const uint32_t start = counter(first, count);
  if (count == 0) return;
  torch::stable::parallel_for(0, samples, (kGrain + count - 1) / count, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      FA_CALL(random_words_of, words + n * count, start, count, key, id[n], static_cast<uint32_t>(stream));
  });
}

void dropout(const Tensor& x, const Tensor& positions, const Tensor& seed, int64_t stream, int64_t first,
             int64_t threshold, double scale, const Tensor& y) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_cpu() && y.is_cpu() && y.scalar_type() == dtype && x.numel() == y.numel() && x.dim() >= 1 &&
                      x.numel() > 0 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "dropout: x and y must be alike, float32 or bfloat16 on the CPU, not empty");
  DropoutJob job{};
  job.samples = x.size(0), job.elements = x.numel() / job.samples;
  job.x = x.const_data_ptr(), job.y = y.data_ptr();
  job.positions = integers(positions, "positions", job.samples);
  job.seed = static_cast<uint64_t>(*integers(seed, "seed", 1));
  job.stream = static_cast<uint32_t>(stream);
  job.first = counter(first, (job.elements + 1) / 2);
  job.threshold = static_cast<uint32_t>(threshold), job.scale = static_cast<float>(scale);
  job.low_precision = dtype == ScalarType::BFloat16;
  const int64_t pieces = (job.elements + kPiece - 1) / kPiece;
  const int64_t piece = job.elements < kPiece ? job.elements : kPiece;
  torch::stable::parallel_for(0, job.samples * pieces, (kGrain + piece - 1) / piece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % pieces * kPiece, to = from + kPiece < job.elements ? from + kPiece : job.elements;
      FA_CALL(dropout_elements, job, i / pieces, from, to);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def("random_words(Tensor ids, Tensor seed, int stream, int first, Tensor(a!) out) -> ()");
  m.def(
      "dropout(Tensor x, Tensor positions, Tensor seed, int stream, int first, int threshold, float scale, "
      "Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) {
  m.impl("random_words", TORCH_BOX(&random_words));
  m.impl("dropout", TORCH_BOX(&dropout));
}

}  // namespace fastambient
