// What every CPU operator needs: torch's stable ABI, checks, bfloat16, and the choice of instruction set.
//
// A file `*_kernel.cpp` holds the loops and is compiled once for each instruction set, with FA_ISA naming it; a file
// `*_op.cpp` holds checks, threads and the registration, is compiled once, and calls FA_CALL(kernel, ...).
#pragma once

#include <cstdint>
#include <cstring>

namespace fastambient {

struct bf16 {  // storage only; all arithmetic is float32
  uint16_t bits;
};

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) {
  uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
static inline void store(float* p, float v) { *p = v; }
static inline void store(bf16* p, float v) {  // round to nearest even; NaN stays a quiet NaN
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
}

// 0: baseline x86-64 or another architecture, 1: AVX2 and FMA, 2: AVX-512 (F, BW, DQ, VL)
int isa_level();

}  // namespace fastambient

#ifdef FA_ISA
#define FA_KERNEL_NAMESPACE(isa) FA_CONCAT(isa_, isa)
#define FA_CONCAT(a, b) FA_CONCAT2(a, b)
#define FA_CONCAT2(a, b) a##b
#endif

// Declare a kernel for all instruction sets: FA_DECLARE(void, scale, (float* x, int64_t n))
#define FA_DECLARE(result, name, arguments)     \
  namespace fastambient {                       \
  namespace isa_base { result name arguments; } \
  namespace isa_avx2 { result name arguments; } \
  namespace isa_avx512 { result name arguments; } }

#ifdef FA_HAVE_X86
#define FA_CALL(name, ...)                                                                  \
  (::fastambient::isa_level() == 2   ? ::fastambient::isa_avx512::name(__VA_ARGS__)         \
   : ::fastambient::isa_level() == 1 ? ::fastambient::isa_avx2::name(__VA_ARGS__)           \
                                     : ::fastambient::isa_base::name(__VA_ARGS__))
#else
#define FA_CALL(name, ...) ::fastambient::isa_base::name(__VA_ARGS__)
#endif
