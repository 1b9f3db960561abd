// Launchers of adam_ema.cu: plain pointers, so that CUDA code sees no torch header (they need C++20).
#pragma once

#include <cstdint>

namespace fastambient {

constexpr int64_t kColumns = 9;       // of the table, before the addresses of the averages
constexpr int64_t kSettings = 6;      // of a group
constexpr int64_t kCoefficients = 9;  // of a row
constexpr int64_t kChunk = 8192;      // elements; CUDA_CHUNK in adam_ema_table.py

// Chunks [first, first + count) of one kind: bf16 gradients, and full: kChunk elements, 16-byte aligned tensors.
struct AdamEmaLaunch {
  int64_t first, count;
  bool bf16, full;
};

// On the device: table int64 [rows, kColumns + emas], chunks int64 [n, 2], squares double [n], counts int64 [n],
// groups double [groups, kSettings], betas double [emas], coefficients float [rows, kCoefficients].
// Each returns null, or CUDA's message.
const char* adam_ema_norm(const int64_t* table, int64_t emas, const int64_t* chunks, const AdamEmaLaunch& launch,
                          double* squares, int64_t* counts, void* stream);
const char* adam_ema_prepare(const int64_t* table, int64_t rows, int64_t emas, const double* groups,
                             float* coefficients, void* stream);
// clip: one float, or null; then squares and counts are written.
const char* adam_ema_update(const int64_t* table, int64_t emas, const double* betas, const int64_t* chunks,
                            const AdamEmaLaunch& launch, const float* coefficients, const float* clip, double* squares,
                            int64_t* counts, void* stream);

}  // namespace fastambient
