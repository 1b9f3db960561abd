// Convolution over channels-last pictures: kPixels pixels by up to kVectors vectors of output channels at a time.
//
// A tile's sums stay in registers while taps and input channels pass by: for each, kVectors loads of packed weights and
// a broadcast a pixel. Its pixels are the same one of kPixels samples, whose pixels are copied side by side: a tap that
// falls outside the picture does so for all of them and is left out, which saves 31 % of a 4x4 picture's arithmetic and
// 16 % of an 8x8 one's. Samples that are left over take neighbouring pixels of one sample, from rows with zeros around.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "conv_vector.h"
#include "convolution.h"

namespace fastambient {
namespace FA_KERNEL_NAMESPACE(FA_ISA) {
namespace {

#if defined(__AVX512VL__)
constexpr int kPixels = 8;
#else
constexpr int kPixels = 4;
#endif
constexpr int kVectors = 3;
constexpr int64_t kFlat = 32 * 1024;    // floats of x and y that a 1x1 kernel works on at once
constexpr int64_t kCopied = 96 * 1024;  // floats of a thread's copies of rows: they stay in the second cache

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FA_SHUFFLES
#endif
#endif

#ifdef FA_SHUFFLES
// Lanes of two vectors that change places, `d` apart.
template <int d, std::size_t... i>
inline void exchange(Vector& a, Vector& b, std::index_sequence<i...>) {
  const Vector low = __builtin_shufflevector(a, b, (i & d ? kWidth + i - d : i)...);
  b = __builtin_shufflevector(a, b, (i & d ? kWidth + i : i + d)...);
  a = low;
}

template <int d>
inline void exchange_all(Vector* rows) {
  for (int i = 0; i < kWidth; ++i)
    if (!(i & d)) exchange<d>(rows[i], rows[i + d], std::make_index_sequence<kWidth>());
}
#endif

// kWidth rows of as many values.
inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
#ifdef FA_SHUFFLES
  Vector rows[kWidth];
  for (int i = 0; i < kWidth; ++i) rows[i] = load_vector(from + i * from_row);
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  if (kWidth > 4) exchange_all<kWidth / 2>(rows);
  for (int i = 0; i < kWidth; ++i) std::memcpy(to + i * to_row, &rows[i], sizeof(Vector));
#else
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < kWidth; ++j) to[j * to_row + i] = from[i * from_row + j];
#endif
}

// Output channels of a tile: vectors are shared out evenly, 4 are 2 and 2.
struct Block {
  int64_t first;
  int vectors;
};

int64_t block_count(int64_t out) { return (out + kVectors * kWidth - 1) / (kVectors * kWidth); }

Block block_of(int64_t out, int64_t index) {
  const int64_t vectors = (out + kWidth - 1) / kWidth, blocks = block_count(out);
  const int64_t first = index * vectors / blocks, last = (index + 1) * vectors / blocks;
  return {first * kWidth, static_cast<int>(last - first)};
}

// Where a block's panel starts: a row for the bias, then one for each tap and input channel.
float* panel_of(const ConvolutionJob& job, const Block& block) {
  return job.panels + block.first * (1 + job.taps() * job.in);
}

// A run of rows of the panel and of the values that they multiply, `offset` after a pixel's place.
struct Run {
  int64_t row, offset, length;
};

// Pixels in groups of `group` that lie `step` apart in x and `y_step` in y.
struct Tile {
  const float* from[kPixels];
  float* to[kPixels];
  int64_t step, y_step, outs;
  const Run* runs;
  int64_t count;
};

template <int vectors, int group>
void compute(const float* panel, const Tile& tile) {
  Vector sum[kPixels][vectors];
  for (int p = 0; p < kPixels; ++p)
    for (int j = 0; j < vectors; ++j) sum[p][j] = load_vector(panel + j * kWidth);
  const int64_t step = tile.step, y_step = tile.y_step;
  for (int64_t i = 0; i < tile.count; ++i) {
    const Run run = tile.runs[i];
    const float* w = panel + (1 + run.row) * vectors * kWidth;
    const float* a[kPixels / group];
    for (int g = 0; g < kPixels / group; ++g) a[g] = tile.from[g] + run.offset;
    for (int64_t k = 0; k < run.length; ++k, w += vectors * kWidth) {
      Vector v[vectors];
      for (int j = 0; j < vectors; ++j) v[j] = load_vector(w + j * kWidth);
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        const Vector s = a[p / group][k + p % group * step] - Vector{};
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sum[p][j] += s * v[j];
      }
    }
  }
  for (int p = 0; p < kPixels; ++p) {
    float* to = tile.to[p / group] + p % group * y_step;
    if (tile.outs == vectors * kWidth) {
      for (int j = 0; j < vectors; ++j) std::memcpy(to + j * kWidth, &sum[p][j], sizeof(Vector));
    } else {
      float values[vectors * kWidth];
      std::memcpy(values, sum[p], sizeof values);
      std::memcpy(to, values, tile.outs * sizeof(float));
    }
  }
}

template <int group>
void compute(const Block& block, const float* panel, const Tile& tile) {
  (block.vectors == 3 ? compute<3, group> : block.vectors == 2 ? compute<2, group> : compute<1, group>)(panel, tile);
}

template <typename F>
void for_blocks(const ConvolutionJob& job, const F& f) {
  for (int64_t b = 0; b < block_count(job.out); ++b) {
    const Block block = block_of(job.out, b);
    f(block, panel_of(job, block), std::min<int64_t>(block.vectors * kWidth, job.out - block.first));
  }
}

// Pixels side by side: `count` rows of `width` of them, the first of which is a picture's row `top`; the corner of a
// row's first window is at rows[0], rows[1] ...
template <int group>
void neighbours(const ConvolutionJob& job, const float* const* rows, int64_t top, int64_t count, int64_t width,
                const Run* runs, float* y) {
  const int64_t pixels = count * width;
  for_blocks(job, [&](const Block& block, const float* panel, int64_t outs) {
    Tile tile{{}, {}, job.in, job.out, outs, runs, job.kernel};
    for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
      for (int g = 0; g < kPixels / group; ++g) {
        const int64_t first = std::min<int64_t>(pixel + g * group, pixels - group);  // the last may be computed twice
        tile.from[g] = rows[first / width] + first % width * job.in;
        tile.to[g] = y + first * job.out + block.first;
      }
      if (group == kPixels && job.kernel > 1) {  // all in one row: taps above and below the picture are left out
        const int64_t h = top + pixel / width, above = std::max<int64_t>(0, job.pad() - h);
        tile.runs = runs + above, tile.count = std::min(job.kernel, job.height + job.pad() - h) - above;
      }
      compute<group>(block, panel, tile);
    }
  });
}

// Floats of a copied row, of one sample with its border and of one among many: a power of two would put all samples'
// rows into the same few sets of the cache.
int64_t padded_row(const ConvolutionJob& job) { return (job.width + job.kernel - 1) * job.in; }
int64_t wide_row(const ConvolutionJob& job) { return job.width * job.in / 16 * 16 + 32; }

// Rows of pictures that are copied at once, where one takes so many floats.
int64_t band(const ConvolutionJob& job, int64_t row) {
  return std::min(job.height, std::max<int64_t>(1, kCopied / row - job.kernel + 1));
}

// Rows top .. bottom - 1 of one sample.
void one_sample(const ConvolutionJob& job, int64_t n, int64_t top, int64_t bottom, float* copy, const float** rows) {
  const int64_t row = padded_row(job), border = job.pad() * job.in, inner = job.width * job.in;
  float* to = copy;
  for (int64_t h = top - job.pad(); h < bottom + job.pad(); ++h, to += row) {
    if (h < 0 || h >= job.height) {
      std::memset(to, 0, row * sizeof(float));
      continue;
    }
    std::memset(to, 0, border * sizeof(float));
    std::memcpy(to + border, job.x + (n * job.height + h) * inner, inner * sizeof(float));
    std::memset(to + border + inner, 0, border * sizeof(float));
  }
  Run* runs = reinterpret_cast<Run*>(rows + job.height);
  for (int64_t i = 0; i < job.kernel; ++i) runs[i] = {i * job.kernel * job.in, i * row, job.kernel * job.in};
  for (int64_t h = top; h < bottom; ++h) rows[h - top] = copy + (h - top) * row;
  const auto run = job.width % kPixels == 0 ? neighbours<kPixels> : job.width % 4 == 0 ? neighbours<4> : neighbours<1>;
  run(job, rows, top, bottom - top, job.width, runs, job.y + (n * job.height + top) * job.width * job.out);
}

// Rows top .. bottom - 1 of kPixels samples: [row, sample, column, in].
void many_samples(const ConvolutionJob& job, int64_t n, int64_t top, int64_t bottom, float* copy, Run* runs) {
  const int64_t pad = job.pad(), inner = job.width * job.in, picture = job.height * job.width, row = wide_row(job);
  const int64_t above = std::max<int64_t>(0, top - pad), below = std::min(job.height, bottom + pad);
  for (int64_t h = above; h < below; ++h)
    for (int64_t s = 0; s < kPixels; ++s)
      std::memcpy(copy + ((h - above) * kPixels + s) * row, job.x + ((n + s) * job.height + h) * inner,
                  inner * sizeof(float));
  for_blocks(job, [&](const Block& block, const float* panel, int64_t outs) {
    Tile tile{{}, {}, row, picture * job.out, outs, runs, 0};
    for (int64_t h = top; h < bottom; ++h) {
      for (int64_t w = 0; w < job.width; ++w) {
        const int64_t left = std::max<int64_t>(0, pad - w), right = std::min(job.kernel, job.width + pad - w);
        tile.count = 0;
        for (int64_t i = std::max<int64_t>(0, pad - h); i < std::min(job.kernel, job.height + pad - h); ++i)
          runs[tile.count++] = {(i * job.kernel + left) * job.in, (i - pad) * kPixels * row + (left - pad) * job.in,
                                (right - left) * job.in};
        tile.from[0] = copy + (h - above) * kPixels * row + w * job.in;
        tile.to[0] = job.y + (n * picture + h * job.width + w) * job.out + block.first;
        compute<kPixels>(block, panel, tile);
      }
    }
  });
}

}  // namespace

int64_t conv_panel_floats(const ConvolutionJob& job) {
  return (job.out + kWidth - 1) / kWidth * kWidth * (1 + job.taps() * job.in);
}

int64_t conv_scratch_floats(const ConvolutionJob& job) {
  const int64_t wide = wide_row(job) * kPixels, one = padded_row(job), extra = job.kernel - 1;
  const int64_t copies = std::max((band(job, wide) + extra) * wide, (band(job, one) + extra) * one);
  return copies + (job.height * sizeof(float*) + job.taps() * sizeof(Run)) / sizeof(float) + 16;
}

int64_t conv_block_channels(int64_t out, int64_t first) {
  for (int64_t b = 0;; ++b)
    if (const Block block = block_of(out, b); block.first == first) return block.vectors * kWidth;
}

void conv_pack(const ConvolutionJob& job) {
  const int64_t taps = job.taps(), length = taps * job.in;
  for_blocks(job, [&](const Block& block, float* to, int64_t outs) {
    const int64_t size = block.vectors * kWidth;
    if (outs < size) std::memset(to, 0, (1 + length) * size * sizeof(float));
    std::memset(to, 0, size * sizeof(float));
    if (job.bias) std::memcpy(to, job.bias + block.first, outs * sizeof(float));
    to += size;
    if (job.transposed) {
      for (int64_t tap = taps - 1; tap >= 0; --tap)
        for (int64_t c = 0; c < job.in; ++c, to += size)
          std::memcpy(to, job.weight + (c * taps + tap) * job.out + block.first, outs * sizeof(float));
      return;
    }
    for (int64_t o = 0; o < outs; o += kWidth) {
      const int64_t rows = std::min<int64_t>(kWidth, outs - o);
      for (int64_t k = 0; k < length; k += kWidth) {
        const float* from = job.weight + (block.first + o) * length + k;
        const int64_t columns = std::min<int64_t>(kWidth, length - k);
        if (rows == kWidth && columns == kWidth) {
          transpose(from, length, to + k * size + o, size);
        } else {
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) to[(k + c) * size + o + r] = from[r * length + c];
        }
      }
    }
  });
}

void conv_rows(const ConvolutionJob& job, int64_t begin, int64_t end, float* scratch) {
  if (job.kernel == 1) {  // pixels alone count, and none is copied
    const Run run{0, 0, job.in};
    const int64_t step = std::max<int64_t>(1, kFlat / ((job.in + job.out) * kPixels)) * kPixels;
    for (int64_t pixel = begin * job.width; pixel < end * job.width; pixel += step) {
      const int64_t pixels = std::min(step, end * job.width - pixel);
      const float* from = job.x + pixel * job.in;
      const auto all = pixels >= kPixels ? neighbours<kPixels> : neighbours<1>;
      all(job, &from, 0, 1, pixels, &run, job.y + pixel * job.out);
    }
    return;
  }
  // The first rows are those of kPixels samples each, kPixels of the rows that are counted; then single samples'.
  const int64_t many = job.samples / kPixels * job.height;
  const int64_t wide = wide_row(job) * kPixels;
  Run* runs = reinterpret_cast<Run*>(scratch);
  float* copy = scratch + (job.height * sizeof(float*) + job.taps() * sizeof(Run)) / sizeof(float);
  const int64_t last = std::min(many, (end + kPixels - 1) / kPixels);
  for (int64_t row = (begin + kPixels - 1) / kPixels; row < last;) {
    const int64_t top = row % job.height;
    const int64_t count = std::min({band(job, wide), job.height - top, last - row});
    many_samples(job, row / job.height * kPixels, top, top + count, copy, runs);
    row += count;
  }
  const float** rows = reinterpret_cast<const float**>(scratch);
  for (int64_t row = std::max(begin, many * kPixels); row < end;) {
    const int64_t top = row % job.height;
    const int64_t count = std::min({band(job, padded_row(job)), job.height - top, end - row});
    one_sample(job, row / job.height, top, top + count, copy, rows);
    row += count;
  }
}

void conv_products(const ConvolutionJob& job, int64_t points, int64_t panel_floats, int64_t floats) {
  const Run run{0, 0, job.in};
  ConvolutionJob point = job;
  for (int64_t p = 0; p < points; ++p, point.panels += panel_floats, point.x += floats, point.y += floats) {
    for_blocks(point, [&](const Block& block, const float* panel, int64_t outs) {
      Tile tile{{point.x}, {point.y + block.first}, job.in, job.out, outs, &run, 1};
      for (int64_t n = 0; n < job.samples; n += kPixels) {
        compute<kPixels>(block, panel, tile);
        tile.from[0] += kPixels * job.in, tile.to[0] += kPixels * job.out;
      }
    });
  }
}

}  // namespace FA_KERNEL_NAMESPACE(FA_ISA)
}  // namespace fastambient
