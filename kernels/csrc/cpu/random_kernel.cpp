// Words of the generator, and dropout by them.

#include "random.h"

#include <algorithm>

#include "philox.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

template <class T>
void drop(const DropoutJob& job, int64_t sample, int64_t begin, int64_t end) {
  uint32_t words[4][kBlock];
  uint32_t halves[8 * kBlock];
  const T* __restrict x = static_cast<const T*>(job.x) + sample * job.elements;
  T* __restrict y = static_cast<T*>(job.y) + sample * job.elements;
  const uint64_t id = static_cast<uint64_t>(job.positions[sample]);
  const uint32_t threshold = job.threshold;
  const float scale = job.scale;
  for (int64_t start = begin; start < end; start += 8 * kBlock) {
    philox(words, job.first + static_cast<uint32_t>(start / 8), job.seed, id, job.stream);
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t j = 0; j < 4; ++j) {
        halves[8 * i + 2 * j] = words[j][i] & 0xffffu;
        halves[8 * i + 2 * j + 1] = words[j][i] >> 16;
      }
    const int64_t count = std::min<int64_t>(8 * kBlock, end - start);
    for (int64_t e = 0; e < count; ++e)
      store(y + start + e, halves[e] >= threshold ? load(x + start + e) * scale : 0.0f);
  }
}

}  // namespace

void random_words_of(int64_t* out, uint32_t first, int64_t count, uint64_t seed, int64_t id, uint32_t stream) {
  uint32_t words[4][kBlock];
  for (int64_t start = 0; start < count; start += 4 * kBlock) {
    philox(words, first + static_cast<uint32_t>(start / 4), seed, static_cast<uint64_t>(id), stream);
    const int64_t here = std::min<int64_t>(4 * kBlock, count - start);
    for (int64_t e = 0; e < here; ++e) out[start + e] = words[e & 3][e >> 2];
  }
}

void dropout_elements(const DropoutJob& job, int64_t sample, int64_t begin, int64_t end) {
  job.low_precision ? drop<bf16>(job, sample, begin, end) : drop<float>(job, sample, begin, end);
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
