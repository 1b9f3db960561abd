// What the operators of convolutions check and allocate.
#pragma once

#include <memory>
#include <new>

#include <torch/csrc/stable/tensor.h>

#include "common.h"

namespace fastambient {

// A float32 picture, or a convolution's weights, whose channels lie side by side.
inline const float* pixels(const torch::stable::Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float && t.dim() == 4, name,
                  " must be float32 [N, C, H, W] on the CPU");
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  STD_TORCH_CHECK(t.numel() > 0 && (c == 1 || t.stride(1) == 1) && (w == 1 || t.stride(3) == c) &&
                      (h == 1 || t.stride(2) == w * c) && (t.size(0) == 1 || t.stride(0) == h * w * c),
                  name, " must be channels-last and not empty");
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* channel_values(const torch::stable::Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous() &&
                      t.numel() == channels,
                  name, " must be contiguous float32 [", channels, "]");
  return static_cast<float*>(t.data_ptr());
}

// Memory that is kept from call to call: fresh pages would cost as much as a small convolution.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > held_) {
      memory_.reset(new (std::align_val_t{64}) float[floats]);
      held_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t held_ = 0;
};

}  // namespace fastambient
