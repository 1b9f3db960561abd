// Loops of resample: a row of y is a weighted sum of rows of x, and then of columns of that sum.

#include "resample.h"

#include <algorithm>

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kNarrow = 8;  // channels that are not worth a loop of vectors

template <int kCount, class From, class To>
void sum_of(const From* __restrict from, int64_t step, const float* weights, To* __restrict to, int64_t n) {
  float w[kCount];
  for (int m = 0; m < kCount; ++m) w[m] = weights[m];
  for (int64_t i = 0; i < n; ++i) {
    float s = w[0] * load(from + i);
    for (int m = 1; m < kCount; ++m) s += w[m] * load(from + m * step + i);
    store(to + i, s);
  }
}

// to[i] = sum over m of weights[m] * from[m * step + i]
template <class From, class To>
void weighted_sum(const From* from, int64_t step, const Reach& reach, To* to, int64_t n) {
  switch (reach.count) {
    case 1: return sum_of<1>(from, step, reach.weights, to, n);
    case 2: return sum_of<2>(from, step, reach.weights, to, n);
    case 3: return sum_of<3>(from, step, reach.weights, to, n);
    case 4: return sum_of<4>(from, step, reach.weights, to, n);
  }
  constexpr int64_t kBlock = 256;
  float sums[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = std::min(kBlock, n - i);
    for (int64_t j = 0; j < size; ++j) sums[j] = 0.0f;
    for (int64_t m = 0; m < reach.count; ++m)
      for (int64_t j = 0; j < size; ++j) sums[j] += reach.weights[m] * load(from + m * step + i + j);
    for (int64_t j = 0; j < size; ++j) store(to + i + j, sums[j]);
  }
}

template <class T>
void rows_of(const ResampleJob& job, int64_t begin, int64_t end, float* sums) {
  const int64_t channels = job.channels, line = job.width * channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / job.out_height;
    const Reach& rows = job.rows[i - sample * job.out_height];
    const T* x = static_cast<const T*>(job.x) + (sample * job.height + rows.first) * line;
    T* y = static_cast<T*>(job.y) + i * job.out_width * channels;
    for (int64_t w = 0; w < job.out_width;) {
      const int64_t stop = std::min(job.out_width, w + job.tile), from = job.columns[w].first;
      const Reach& last = job.columns[stop - 1];
      weighted_sum(x + from * channels, line, rows, sums, (last.first + last.count - from) * channels);
      for (; w < stop; ++w) {
        const Reach& columns = job.columns[w];
        const float* source = sums + (columns.first - from) * channels;
        if (channels >= kNarrow) {
          weighted_sum(source, channels, columns, y + w * channels, channels);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) {
          float s = 0.0f;
          for (int64_t m = 0; m < columns.count; ++m) s += columns.weights[m] * source[m * channels + c];
          store(y + w * channels + c, s);
        }
      }
    }
  }
}

}  // namespace

void resample_rows(const ResampleJob& job, int64_t begin, int64_t end, float* sums) {
  job.low_precision ? rows_of<bf16>(job, begin, end, sums) : rows_of<float>(job, begin, end, sums);
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
