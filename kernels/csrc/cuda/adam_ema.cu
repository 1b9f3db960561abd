// adam_ema in CUDA C++: the kernels of adam_ema_triton.py, for GPUs without triton and as a second implementation to
// test it against. One block is one chunk; 8 elements a thread and turn, in 128-bit accesses where the chunk is full.
#include <cfloat>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "adam_ema.h"

namespace fastambient {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr float kGradLimit = 1e5f;  // what an infinite gradient becomes
// Columns of the table.
enum : int { kParam, kGrad, kExpAvg, kExpAvgSq, kStep, kNumel, kGroup, kGradBf16, kLeaf };

struct Coefficients {  // as adam_ema_prepare_kernel writes them
  float step_size, v_scale, eps, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, l2;
};
static_assert(sizeof(Coefficients) == kCoefficients * sizeof(float));

struct Sums {
  double squares = 0;
  int nonfinite = 0;
};

__device__ float clean(float g, Sums& sums) {
  if (!(fabsf(g) <= FLT_MAX)) {
    g = g > 0 ? kGradLimit : g < 0 ? -kGradLimit : 0.0f;  // NaN compares as neither
    ++sums.nonfinite;
  }
  sums.squares += static_cast<double>(g) * g;
  return g;
}

// start + weight * (end - start), from whichever end is nearer, as torch.lerp
__device__ float lerp(float start, float end, float weight, float one_minus_weight) {
  const float difference = end - start;
  return weight < 0.5f ? start + weight * difference : end - one_minus_weight * difference;
}

__device__ void load8(const float* at, float* out) {
  const float4 a = reinterpret_cast<const float4*>(at)[0], b = reinterpret_cast<const float4*>(at)[1];
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

__device__ void load8(const __nv_bfloat16* at, float* out) {
  const uint4 a = *reinterpret_cast<const uint4*>(at);
  const unsigned words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[2 * k] = __uint_as_float(words[k] << 16);
    out[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
}

__device__ void store8(float* at, const float* in) {
  reinterpret_cast<float4*>(at)[0] = make_float4(in[0], in[1], in[2], in[3]);
  reinterpret_cast<float4*>(at)[1] = make_float4(in[4], in[5], in[6], in[7]);
}

__device__ void store8(__nv_bfloat16* at, const float* in) {
  uint4 out;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&out);
#pragma unroll
  for (int k = 0; k < 4; ++k) pairs[k] = __floats2bfloat162_rn(in[2 * k], in[2 * k + 1]);
  *reinterpret_cast<uint4*>(at) = out;
}

// The block's sums in a fixed order, written by its first thread.
__device__ void write_sums(Sums sums, double* squares, int64_t* counts, int64_t index) {
  __shared__ double shared_squares[kThreads / 32];
  __shared__ int shared_counts[kThreads / 32];
  for (int lane = 16; lane; lane /= 2) {
    sums.squares += __shfl_down_sync(0xffffffffu, sums.squares, lane);
    sums.nonfinite += __shfl_down_sync(0xffffffffu, sums.nonfinite, lane);
  }
  if (threadIdx.x % 32 == 0) {
    shared_squares[threadIdx.x / 32] = sums.squares;
    shared_counts[threadIdx.x / 32] = sums.nonfinite;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      sums.squares += shared_squares[warp];
      sums.nonfinite += shared_counts[warp];
    }
    squares[index] = sums.squares;
    counts[index] = sums.nonfinite;
  }
}

template <typename T>
__device__ T* address(const int64_t* row, int64_t column, int64_t begin) {
  return reinterpret_cast<T*>(row[column]) + begin;
}

template <bool kBf16, bool kFull>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const int64_t* table, int64_t width, const int64_t* chunks, int64_t first, double* squares,
                int64_t* counts) {
  using G = std::conditional_t<kBf16, const __nv_bfloat16, const float>;
  const int64_t index = first + blockIdx.x, begin = chunks[2 * index + 1];
  const int64_t* row = table + chunks[2 * index] * width;
  const G* g = address<G>(row, kGrad, begin);
  Sums sums;
  if constexpr (kFull) {
    for (int i = threadIdx.x * kVector; i < kChunk; i += kThreads * kVector) {
      float x[kVector];
      load8(g + i, x);
#pragma unroll
      for (int k = 0; k < kVector; ++k) clean(x[k], sums);
    }
  } else {
    const int64_t left = min(kChunk, row[kNumel] - begin);
    for (int i = threadIdx.x; i < left; i += kThreads) clean(static_cast<float>(g[i]), sums);
  }
  write_sums(sums, squares, counts, index);
}

__device__ void adam(const Coefficients& c, float g, float& p, float& m, float& v) {
  g += c.l2 * p;
  m = lerp(m, g, c.one_minus_beta1, c.beta1);
  v = c.beta2 * v + c.one_minus_beta2 * g * g;
  p = c.decay * p - c.step_size * m / (sqrtf(v) * c.v_scale + c.eps);
}

template <bool kBf16, bool kFull, bool kClip>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const int64_t* table, int64_t emas, const double* betas, const int64_t* chunks, int64_t first,
                  const float* coefficients, const float* clip, double* squares, int64_t* counts) {
  using G = std::conditional_t<kBf16, const __nv_bfloat16, const float>;
  const int64_t index = first + blockIdx.x, which = chunks[2 * index], begin = chunks[2 * index + 1];
  const int64_t* row = table + which * (kColumns + emas);
  const Coefficients c = reinterpret_cast<const Coefficients*>(coefficients)[which];
  const float scale = kClip ? *clip : 1.0f;
  const G* g_at = address<G>(row, kGrad, begin);
  float* p_at = address<float>(row, kParam, begin);
  float* m_at = address<float>(row, kExpAvg, begin);
  float* v_at = address<float>(row, kExpAvgSq, begin);
  __nv_bfloat16* leaf_at = row[kLeaf] ? address<__nv_bfloat16>(row, kLeaf, begin) : nullptr;
  Sums sums;
  if constexpr (kFull) {
    for (int i = threadIdx.x * kVector; i < kChunk; i += kThreads * kVector) {
      float g[kVector], p[kVector], m[kVector], v[kVector], e[kVector];
      load8(g_at + i, g);
      load8(p_at + i, p);
      load8(m_at + i, m);
      load8(v_at + i, v);
#pragma unroll
      for (int k = 0; k < kVector; ++k) adam(c, clean(g[k], sums) * scale, p[k], m[k], v[k]);
      store8(m_at + i, m);
      store8(v_at + i, v);
      store8(p_at + i, p);
      if (leaf_at) store8(leaf_at + i, p);
      for (int64_t a = 0; a < emas; ++a) {
        float* e_at = address<float>(row, kColumns + a, begin);
        const float keep = static_cast<float>(betas[a]), weight = static_cast<float>(1 - betas[a]);
        load8(e_at + i, e);
#pragma unroll
        for (int k = 0; k < kVector; ++k) e[k] = lerp(e[k], p[k], weight, keep);
        store8(e_at + i, e);
      }
    }
  } else {
    const int64_t left = min(kChunk, row[kNumel] - begin);
    for (int i = threadIdx.x; i < left; i += kThreads) {
      float p = p_at[i];
      adam(c, clean(static_cast<float>(g_at[i]), sums) * scale, p, m_at[i], v_at[i]);
      p_at[i] = p;
      if (leaf_at) leaf_at[i] = __float2bfloat16_rn(p);
      for (int64_t a = 0; a < emas; ++a) {
        float* e_at = address<float>(row, kColumns + a, begin);
        e_at[i] = lerp(e_at[i], p, static_cast<float>(1 - betas[a]), static_cast<float>(betas[a]));
      }
    }
  }
  if constexpr (!kClip) write_sums(sums, squares, counts, index);
}

__global__ void prepare_kernel(const int64_t* table, int64_t rows, int64_t width, const double* groups,
                               Coefficients* coefficients) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= rows) return;
  const int64_t* row = table + i * width;
  auto* step = reinterpret_cast<float*>(row[kStep]);
  *step += 1;
  const double* group = groups + row[kGroup] * kSettings;
  const double lr = group[0], beta1 = group[1], beta2 = group[2], weight_decay = group[4];
  const bool decoupled = group[5] != 0;
  Coefficients& c = coefficients[i];
  c.step_size = static_cast<float>(lr / (1 - pow(beta1, static_cast<double>(*step))));
  c.v_scale = static_cast<float>(1 / sqrt(1 - pow(beta2, static_cast<double>(*step))));
  c.eps = static_cast<float>(group[3]);
  c.beta1 = static_cast<float>(beta1);
  c.one_minus_beta1 = static_cast<float>(1 - beta1);
  c.beta2 = static_cast<float>(beta2);
  c.one_minus_beta2 = static_cast<float>(1 - beta2);
  c.decay = static_cast<float>(decoupled ? 1 - lr * weight_decay : 1);
  c.l2 = static_cast<float>(decoupled ? 0 : weight_decay);
}

// f(bf16, full) with both as constants
template <typename F>
void choose(const AdamEmaLaunch& launch, const F& f) {
  using True = std::true_type;
  using False = std::false_type;
  if (launch.bf16) {
    launch.full ? f(True(), True()) : f(True(), False());
  } else {
    launch.full ? f(False(), True()) : f(False(), False());
  }
}

const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* adam_ema_norm(const int64_t* table, int64_t emas, const int64_t* chunks, const AdamEmaLaunch& launch,
                          double* squares, int64_t* counts, void* stream) {
  choose(launch, [&](auto bf16, auto full) {
    norm_kernel<decltype(bf16)::value, decltype(full)::value>
        <<<static_cast<unsigned>(launch.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            table, kColumns + emas, chunks, launch.first, squares, counts);
  });
  return outcome();
}

const char* adam_ema_prepare(const int64_t* table, int64_t rows, int64_t emas, const double* groups,
                             float* coefficients, void* stream) {
  const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
  prepare_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      table, rows, kColumns + emas, groups, reinterpret_cast<Coefficients*>(coefficients));
  return outcome();
}

const char* adam_ema_update(const int64_t* table, int64_t emas, const double* betas, const int64_t* chunks,
                            const AdamEmaLaunch& launch, const float* coefficients, const float* clip, double* squares,
                            int64_t* counts, void* stream) {
  choose(launch, [&](auto bf16, auto full) {
    constexpr bool kBf16 = decltype(bf16)::value, kFull = decltype(full)::value;
    auto* kernel = clip ? update_kernel<kBf16, kFull, true> : update_kernel<kBf16, kFull, false>;
    kernel<<<static_cast<unsigned>(launch.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        table, emas, betas, chunks, launch.first, coefficients, clip, squares, counts);
  });
  return outcome();
}

}  // namespace fastambient
