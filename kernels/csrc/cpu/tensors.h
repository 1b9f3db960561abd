// What operators over [N, C, ...] tensors share: the two memory formats, and pages for large outputs.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/tensor.h>

namespace fastambient {

// One of the two dense layouts: channels side by side (true) or pixels side by side.
inline bool is_channels_last(const torch::stable::Tensor& t, const char* operation) {
  if (t.is_contiguous()) {
    int64_t pixels = 1;
    for (int64_t d = 2; d < t.dim(); ++d) pixels *= t.size(d);
    return pixels == 1;
  }
  int64_t expected = t.size(1);
  bool dense = t.size(1) == 1 || t.stride(1) == 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    dense = dense && (t.size(d) == 1 || t.stride(d) == expected);
    expected *= t.size(d);
  }
  dense = dense && (t.size(0) == 1 || t.stride(0) == expected);
  STD_TORCH_CHECK(dense, operation, ": tensors must be contiguous or channels-last");
  return true;
}

inline void check_like(const torch::stable::Tensor& t, const torch::stable::Tensor& x, const char* operation,
                       const char* name) {
  bool same = t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = t.size(d) == x.size(d) && (x.size(d) == 1 || t.stride(d) == x.stride(d));
  STD_TORCH_CHECK(same, operation, ": ", name, " must have the dtype, shape and memory format of the input");
}

// Ask for 2 MiB pages under a large output. It is mostly fresh memory, and faults on 4 KiB pages then cost several times
// what the arithmetic does. A hint: it changes nothing where memory is in use already, or where the system has none.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastambient
