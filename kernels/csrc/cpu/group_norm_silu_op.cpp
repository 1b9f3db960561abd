// group_norm_silu on the CPU: checks, threads, registration. Python allocates every output.
#include <algorithm>
#include <memory>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "group_norm_silu.h"
#include "huge_pages.h"

FA_DECLARE(void, gns_begin, (const GroupNormJob& job, int64_t unit, const GroupNormState& state))
FA_DECLARE(void, gns_partial,
           (const GroupNormJob& job, int64_t unit, int64_t piece, const GroupNormState& state, float* part))
FA_DECLARE(void, gns_gather,
           (const GroupNormJob& job, int64_t unit, int64_t piece, const GroupNormState& state, const float* part))
FA_DECLARE(void, gns_finish, (const GroupNormJob& job, int64_t unit, const GroupNormState& state))
FA_DECLARE(void, gns_apply, (const GroupNormJob& job, int64_t unit, int64_t piece, const GroupNormState& state))
FA_DECLARE(void, gns_parameters,
           (const GroupNormJob& job, int64_t first, int64_t last, float* d_weight, float* d_bias))

namespace fastambient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;  // elements that are worth a thread
constexpr int64_t kKept = int64_t{1} << 19;  // values of dv that a thread keeps: 2 MiB stay in the last-level cache

// Scratch for one unit or several.
struct Scratch {
  std::unique_ptr<double[]> d;
  std::unique_ptr<float[]> f, parts;
  Scratch(const GroupNormJob& job, int64_t units, int64_t parts_count)
      : d(new double[units * GroupNormState::doubles(job)]),
        f(new float[units * GroupNormState::floats(job)]),
        parts(new float[parts_count * job.part_floats()]) {}
  GroupNormState state(const GroupNormJob& job, int64_t i) const {
    return {job, d.get() + i * GroupNormState::doubles(job), f.get() + i * GroupNormState::floats(job)};
  }
  float* part(const GroupNormJob& job, int64_t i) const { return parts.get() + i * job.part_floats(); }
};

// A unit on one thread, while its data is in the thread's cache.
void run_units(const GroupNormJob& job, int64_t begin, int64_t end) {
  const Scratch scratch(job, 1, 1);
  const GroupNormState state = scratch.state(job, 0);
  float* part = scratch.part(job, 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    FA_CALL(gns_begin, job, unit, state);
    for (int64_t piece = 0; piece < job.pieces; ++piece) {
      FA_CALL(gns_partial, job, unit, piece, state, part);
      if (job.channels_last) FA_CALL(gns_gather, job, unit, piece, state, part);
    }
    FA_CALL(gns_finish, job, unit, state);
    for (int64_t piece = 0; piece < job.pieces; ++piece) FA_CALL(gns_apply, job, unit, piece, state);
  }
}

// Few units: their pieces shared among the threads, with the same arithmetic.
void run_pieces(const GroupNormJob& job, int64_t grain) {
  const int64_t total = job.units * job.pieces;
  const Scratch scratch(job, job.units, total);
  for (int64_t unit = 0; unit < job.units; ++unit) FA_CALL(gns_begin, job, unit, scratch.state(job, unit));
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      FA_CALL(gns_partial, job, i / job.pieces, i % job.pieces, scratch.state(job, i / job.pieces),
              scratch.part(job, i));
  });
  torch::stable::parallel_for(0, job.units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const GroupNormState state = scratch.state(job, unit);
      for (int64_t piece = 0; piece < job.pieces && job.channels_last; ++piece)
        FA_CALL(gns_gather, job, unit, piece, state, scratch.part(job, unit * job.pieces + piece));
      FA_CALL(gns_finish, job, unit, state);
    }
  });
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      FA_CALL(gns_apply, job, i / job.pieces, i % job.pieces, scratch.state(job, i / job.pieces));
  });
}

void run(const GroupNormJob& job) {
  const int64_t unit_elements = job.pixels * job.unit_channels;
  const int64_t elements = job.units * unit_elements;
  prefer_huge_pages(job.out, elements * (job.low_precision ? 2 : 4));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (elements + kGrain - 1) / kGrain);
  if (threads <= 1) return run_units(job, 0, job.units);
  // Whole units leave threads idle at the end; more than a quarter of the time is too much.
  const int64_t rounds = (job.units + threads - 1) / threads;
  if (4 * job.units >= 3 * rounds * threads) {
    torch::stable::parallel_for(0, job.units, (kGrain + unit_elements - 1) / unit_elements,
                                [&](int64_t begin, int64_t end) { run_units(job, begin, end); });
  } else {
    const int64_t piece_elements = (unit_elements + job.pieces - 1) / job.pieces;
    run_pieces(job, (kGrain + piece_elements - 1) / piece_elements);
  }
}

// --- tensors ---

void lay_out(GroupNormJob& job) {
  job.unit_channels = job.channels_last ? job.channels : job.channels / job.groups;
  job.units = job.samples * (job.channels / job.unit_channels);
  job.keep = job.backward && job.unit_channels * job.pixels <= kKept;
  job.fold = 1;
  job.piece_pixels = job.pixels;
  job.pieces = job.unit_channels;
  if (!job.channels_last) return;
  while (job.fold * job.channels < 128 && 2 * job.fold <= job.pixels) job.fold *= 2;
  job.piece_pixels = std::max<int64_t>(16, 16384 / job.channels);
  job.piece_pixels += (job.fold - job.piece_pixels % job.fold) % job.fold;
  job.pieces = (job.pixels + job.piece_pixels - 1) / job.piece_pixels;
}

const float* rows(const std::optional<Tensor>& t, const char* name, const GroupNormJob& job, int64_t& stride) {
  stride = 0;
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 &&
                      t->size(0) == job.samples && t->size(1) == job.channels &&
                      (t->stride(1) == 1 || job.channels == 1),
                  "group_norm_silu: ", name, " must be float32 [N, C] with rows side by side");
  stride = t->stride(0);
  return static_cast<const float*>(t->const_data_ptr());
}

float* floats(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.numel() == count && t.is_contiguous(),
                  "group_norm_silu: ", name, " must be contiguous float32 with ", count, " elements");
  return static_cast<float*>(t.data_ptr());
}

// One of the two dense layouts: channels side by side (true) or pixels side by side.
bool is_channels_last(const Tensor& t) {
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
  STD_TORCH_CHECK(dense, "group_norm_silu: x must be contiguous or channels-last");
  return true;
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = t.size(d) == x.size(d) && (x.size(d) == 1 || t.stride(d) == x.stride(d));
  STD_TORCH_CHECK(same, "group_norm_silu: ", name, " must have the dtype, shape and memory format of x");
}

GroupNormJob describe(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, const std::optional<Tensor>& add, const Tensor& out,
                      const Tensor& mean, const Tensor& rstd, int64_t groups, bool silu, bool backward) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 2 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "group_norm_silu: x must be [N, C, ...] in float32 or bfloat16 on the CPU");
  GroupNormJob job{};
  job.backward = backward;
  job.low_precision = dtype == ScalarType::BFloat16;
  job.channels_last = is_channels_last(x);
  job.silu = silu;
  job.samples = x.size(0);
  job.channels = x.size(1);
  job.pixels = x.numel() / std::max<int64_t>(1, job.samples * job.channels);
  job.groups = groups;
  STD_TORCH_CHECK(x.numel() > 0, "group_norm_silu: x is empty");
  STD_TORCH_CHECK(groups > 0 && job.channels % groups == 0, "group_norm_silu: ", groups, " groups cannot share ",
                  job.channels, " channels equally");
  check_like(out, x, "the output");
  job.x = x.const_data_ptr();
  job.out = out.data_ptr();
  job.weight = floats(weight, "weight", job.channels);
  job.bias = floats(bias, "bias", job.channels);
  job.scale = rows(scale, "scale", job, job.scale_stride);
  job.shift = rows(shift, "shift", job, job.shift_stride);
  job.add = rows(add, "add", job, job.add_stride);
  job.mean = floats(mean, "mean", job.samples * groups);
  job.rstd = floats(rstd, "rstd", job.samples * groups);
  lay_out(job);
  return job;
}

void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
             const std::optional<Tensor>& shift, const std::optional<Tensor>& add, const Tensor& y, const Tensor& mean,
             const Tensor& rstd, int64_t groups, double eps, bool silu) {
  GroupNormJob job = describe(x, weight, bias, scale, shift, add, y, mean, rstd, groups, silu, false);
  job.eps = eps;
  run(job);
}

void backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
              const Tensor& bias, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
              const std::optional<Tensor>& add, const Tensor& dx, const Tensor& sum_dv, const Tensor& sum_dvz,
              const Tensor& d_weight, const Tensor& d_bias, const std::optional<Tensor>& d_scale,
              const std::optional<Tensor>& d_add, int64_t groups, bool silu) {
  GroupNormJob job = describe(x, weight, bias, scale, shift, add, dx, mean, rstd, groups, silu, true);
  check_like(dy, x, "dy");
  job.dy = dy.const_data_ptr();
  const int64_t count = job.samples * job.channels;
  job.sum_dv = floats(sum_dv, "sum_dv", count);
  job.sum_dvz = floats(sum_dvz, "sum_dvz", count);
  if (d_scale) job.d_scale = floats(*d_scale, "d_scale", count);
  if (d_add) job.d_add = floats(*d_add, "d_add", count);
  float* gain = floats(d_weight, "d_weight", job.channels);
  float* offset = floats(d_bias, "d_bias", job.channels);
  run(job);
  torch::stable::parallel_for(0, job.channels, (kGrain + job.samples - 1) / job.samples,
                              [&](int64_t first, int64_t last) { FA_CALL(gns_parameters, job, first, last, gain, offset); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastambient_native, m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? add, Tensor(a!) y, "
      "Tensor(b!) mean, Tensor(c!) rstd, int groups, float eps, bool silu) -> ()");
  m.def(
      "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
      "Tensor? scale, Tensor? shift, Tensor? add, Tensor(a!) dx, Tensor(b!) sum_dv, Tensor(c!) sum_dvz, "
      "Tensor(d!) d_weight, Tensor(e!) d_bias, Tensor(f!)? d_scale, Tensor(g!)? d_add, int groups, bool silu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastambient_native, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_backward", TORCH_BOX(&backward));
}

}  // namespace fastambient
