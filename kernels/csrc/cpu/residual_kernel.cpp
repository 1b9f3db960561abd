// Loops of residual: (y + x + bias) * scale, and in backward dy * scale with its sums.
//
// Sums are float32 within a piece or a block of a line, and double from there on, always in the same order.
#include "residual.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

constexpr int64_t kLanes = 16;     // sums side by side of a contiguous line
constexpr int64_t kBlock = 8192;   // values of a contiguous line that are summed in float32

using Job = ResidualJob;

struct Same {
  float value;
  float operator[](int64_t) const { return value; }
};

int64_t size_of(const Job& job, int64_t line) {
  const int64_t left = job.elements - line * job.width;
  return left < job.width ? left : job.width;
}

template <class T, class B>
inline void add(const T* __restrict y, const T* __restrict x, T* __restrict out, B bias, float scale, int64_t count) {
  for (int64_t j = 0; j < count; ++j) store(out + j, (load(y + j) + load(x + j) + bias[j]) * scale);
}

template <class T>
void forward(const Job& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * job.width, count = size_of(job, i);
    const T *y = static_cast<const T*>(job.y) + at, *x = static_cast<const T*>(job.x) + at;
    T* out = static_cast<T*>(job.out) + at;
    if (job.bias && job.channels_last)
      add<T, const float*>(y, x, out, job.bias, job.scale, count);
    else
      add(y, x, out, Same{job.bias ? job.bias[i % job.channels] : 0.0f}, job.scale, count);
  }
}

// out[j] = dy[j] * scale, added to sum[j]
template <class T, bool kStore>
inline void multiply(const T* __restrict dy, T* __restrict out, float* __restrict sum, float scale, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const float d = load(dy + j) * scale;
    sum[j] += d;
    if constexpr (kStore) store(out + j, d);
  }
}

// The sum over one channel of a sample.
template <class T, bool kStore>
float channel(const T* dy, T* out, float scale, int64_t count) {
  double total = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = count - start < kBlock ? count : start + kBlock;
    float sum[kLanes] = {};
    for (int64_t j = start; j < end; j += kLanes)
      multiply<T, kStore>(dy + j, kStore ? out + j : nullptr, sum, scale, end - j < kLanes ? end - j : kLanes);
    for (float lane : sum) total += lane;
  }
  return static_cast<float>(total);
}

template <class T, bool kStore>
void backward(const Job& job, int64_t piece) {
  const int64_t begin = piece * job.piece_lines;
  const int64_t end = begin + job.piece_lines < job.lines ? begin + job.piece_lines : job.lines;
  float* sum = job.channels_last ? job.partial + piece * job.width : nullptr;
  if (sum)
    for (int64_t j = 0; j < job.width; ++j) sum[j] = 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    const T* dy = static_cast<const T*>(job.y) + i * job.width;
    T* out = kStore ? static_cast<T*>(job.out) + i * job.width : nullptr;
    if (sum)
      multiply<T, kStore>(dy, out, sum, job.scale, size_of(job, i));
    else
      job.partial[i] = channel<T, kStore>(dy, out, job.scale, job.width);
  }
}

template <class T>
void scaled(const Job& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* __restrict dy = static_cast<const T*>(job.y) + i * job.width;
    T* __restrict out = static_cast<T*>(job.out) + i * job.width;
    const int64_t count = size_of(job, i);
    const float scale = job.scale;
    for (int64_t j = 0; j < count; ++j) store(out + j, load(dy + j) * scale);
  }
}

}  // namespace

void residual_forward(const Job& job, int64_t first, int64_t last) {
  const int64_t end = last * job.piece_lines < job.lines ? last * job.piece_lines : job.lines;
  job.low_precision ? forward<bf16>(job, first * job.piece_lines, end) : forward<float>(job, first * job.piece_lines, end);
}

void residual_backward(const Job& job, int64_t first, int64_t last) {
  if (!job.partial) {
    const int64_t begin = first * job.piece_lines;
    const int64_t end = last * job.piece_lines < job.lines ? last * job.piece_lines : job.lines;
    return job.low_precision ? scaled<bf16>(job, begin, end) : scaled<float>(job, begin, end);
  }
  for (int64_t piece = first; piece < last; ++piece) {
    if (job.low_precision)
      job.out ? backward<bf16, true>(job, piece) : backward<bf16, false>(job, piece);
    else
      job.out ? backward<float, true>(job, piece) : backward<float, false>(job, piece);
  }
}

void residual_bias(const Job& job, int64_t first, int64_t last, float* d_bias) {
  constexpr int64_t kChunk = 64;
  const int64_t rows = (job.channels_last ? job.pieces * job.width : job.lines) / job.channels;
  for (int64_t begin = first; begin < last; begin += kChunk) {
    const int64_t size = last - begin < kChunk ? last - begin : kChunk;
    double sum[kChunk] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const float* partial = job.partial + row * job.channels + begin;
      for (int64_t j = 0; j < size; ++j) sum[j] += partial[j];
    }
    for (int64_t j = 0; j < size; ++j) d_bias[begin + j] = static_cast<float>(sum[j]);
  }
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
