// Philox4x32-10 and normals by Box-Muller, as in noise.py, in loops that the compiler vectorises.
//
// Only *_kernel.cpp files include this. Everything is written for one counter; `normals` runs it over a block of
// counters, without branches or calls, so that one vector lane is one counter.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {

constexpr int64_t kBlock = 16;  // counters a vectorised pass makes: two AVX2 vectors or one AVX-512 vector

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// Natural logarithm of a normal number in (0, 1]; relative error 1e-7, also next to 1.
inline float log_unit(float u) {
  const int32_t exponent = static_cast<int32_t>(bits_of(u) - 0x3f2aaaabu) >> 23;  // u = 2^exponent * m, m in [2/3, 4/3)
  const float f = float_of(bits_of(u) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  // Minimax polynomial of (log(1+f) - f + f^2/2) / f^3, relative error 5e-9 in the logarithm.
  const float z = f * f;  // the polynomial in pairs: half the latency of one chain
  const float low =
      (0.3333321511745453f - 0.24999797344207764f * f) + z * (0.20010407269001007f - 0.16680486500263214f * f);
  const float high =
      (0.14005857706069946f - 0.12184272706508636f * f) + z * (0.13984493911266327f - 0.12891626358032227f * f);
  const float p = low + z * z * high;
  return e * 0.693359375f + (f + (z * (p * f - 0.5f) - e * 2.12194440054690583e-4f));
}

// Two normals of two words.
inline void box_muller(uint32_t word_a, uint32_t word_b, float& z_a, float& z_b) {
  float u = static_cast<float>(static_cast<int32_t>(word_a >> 8)) * 0x1p-24f;
  u = u > 1e-7f ? u : 1e-7f;
  const float radius = std::sqrt(-2.0f * log_unit(u));
  // The word's 24 bits are a fraction of a turn: its quarter and the rest, in [-pi/4, pi/4], come out of a shift.
  const uint32_t turn = word_b >> 8, quarter = (turn + 0x200000u) >> 22;
  const float f = static_cast<float>(static_cast<int32_t>(turn - (quarter << 22))) * 3.7450702829238412e-07f;
  const float z = f * f;
  // Minimax polynomials of (sin f - f)/f^3 and (cos f - 1 + f^2/2)/f^4, relative error below 4e-9.
  const float sine = f + f * z * (-0.16666655242443085f + z * (0.008332177996635437f - z * 0.00019517296459525824f));
  const float cosine =
      1.0f + z * (-0.5f + z * (0.04166664555668831f + z * (-0.001388736767694354f + z * 2.4438448235741816e-05f)));
  const bool odd = quarter & 1u;
  // Signs of the quarter turn: cosine is negative in 1 and 2, sine in 2 and 3.
  z_a = radius * float_of(bits_of(odd ? sine : cosine) ^ (((quarter + 1u) & 2u) << 30));
  z_b = radius * float_of(bits_of(odd ? cosine : sine) ^ ((quarter & 2u) << 30));
}

// A vector of 64-bit lanes, one counter in each: 32-bit products need the room, and their high words a shift only. What
// stands above the low 32 bits of a lane is ignored.
#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));

inline Lanes product(Lanes a, Lanes b) {  // of the low 32 bits
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // maskz: GCC 12 warns of the plain one
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline Lanes broadcast(uint32_t x) { return Lanes{} + x; }

struct Counter {
  Lanes w0, w1, w2, w3;
  void round(uint32_t k0, uint32_t k1) {
    const Lanes p0 = product(w0, broadcast(0xD2511F53u)), p1 = product(w2, broadcast(0xCD9E8D57u));
    w0 = (p1 >> 32) ^ w1 ^ broadcast(k0);
    w1 = p1;
    w2 = (p0 >> 32) ^ w3 ^ broadcast(k1);
    w3 = p0;
  }
};

// The words of kBlock counters from `first`: words[j][i] is word j of counter first + i.
inline void philox(uint32_t (&words)[4][kBlock], uint32_t first, uint64_t seed, uint64_t id, uint32_t stream) {
  for (int start = 0; start < kBlock; start += 2 * kLanes) {
    Lanes even{};  // even counters in one vector and odd ones in another: their words merge into 32-bit lanes
    for (int i = 0; i < kLanes; ++i) even[i] = first + static_cast<uint32_t>(start + 2 * i);
    const Lanes w1 = broadcast(static_cast<uint32_t>(id)), w2 = broadcast(static_cast<uint32_t>(id >> 32));
    Counter a{even, w1, w2, broadcast(stream)}, b{even + 1, w1, w2, broadcast(stream)};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) a.round(k0, k1), b.round(k0, k1);
    const Lanes merged[4] = {(a.w0 & 0xffffffffu) | (b.w0 << 32), (a.w1 & 0xffffffffu) | (b.w1 << 32),
                             (a.w2 & 0xffffffffu) | (b.w2 << 32), (a.w3 & 0xffffffffu) | (b.w3 << 32)};
    for (int j = 0; j < 4; ++j) std::memcpy(&words[j][start], &merged[j], sizeof(Lanes));
  }
}

// Normals of elements 4*first .. 4*(first + blocks) - 1 of one id; `blocks` is rounded up to a multiple of kBlock.
inline void normals(float* __restrict out, uint32_t first, int64_t blocks, uint64_t seed, uint64_t id,
                    uint32_t stream) {
  uint32_t words[4][kBlock];
  for (int64_t start = 0; start < blocks; start += kBlock) {
    philox(words, first + static_cast<uint32_t>(start), seed, id, stream);
    float* __restrict o = out + 4 * start;
    for (int64_t i = 0; i < kBlock; ++i) {
      box_muller(words[0][i], words[1][i], o[4 * i], o[4 * i + 1]);
      box_muller(words[2][i], words[3][i], o[4 * i + 2], o[4 * i + 3]);
    }
  }
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
