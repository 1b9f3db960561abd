// The vectors of float32 that kernels of convolutions compute with. Included by files that are compiled with FA_ISA.
#pragma once

#include <cstring>

#include "common.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

#if defined(__AVX2__)
constexpr int kWidth = 8;  // with AVX-512, too: 24 and 72 channels fill vectors of 8, of which there are 32 registers
#else
constexpr int kWidth = 4;
#endif

typedef float Vector __attribute__((vector_size(kWidth * 4)));

inline Vector load_vector(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_vector(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

}  // namespace
}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
