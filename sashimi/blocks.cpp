// The blocks of the backbone on the CPU, forward and backward: x + layer(norm(x)).
//
// Rows (positions) go through norm, products, activations and residual in tiles that stay in the
// cache; sequences go through the convolution W features at a time, so that nothing is transposed.
// Only the input of a block is kept for its backward, and of S4 what the convolution gave. Sums
// over rows are cut by shape alone: the bits are the same for any number of threads.
#include <algorithm>
#include <cstring>
#include <memory>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../cauchy_kernel/parallel.h"
#include "fft.h"

namespace {

constexpr int64_t kTile = 64;  // rows
#if defined(__AVX512F__)
constexpr int kRows = 8;  // of a product, whose sums for so many rows stay in registers
#else
constexpr int kRows = 4;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasHalf = true;
#else
constexpr bool kHasHalf = false;
#endif

struct Problem {  // blocks.py has the same; (B, L, H) of clips, positions and features
  const float *x, *told, *norm_weight, *norm_bias;  // (B, L, H); (B, H) or null; (H)
  const float *w1, *w1_t, *b1, *w2, *w2_t, *b2;     // (R, H), its transpose, (R); (H, R), (H)
  const float *skip, *kernel;                       // S4: (H), (channels, L, H)
  float *spectrum, *conv, *y;                       // (H / W, n / 2 + 1, 4, W), (B, L, H) twice
  const float* d_y;
  float *d_x, *d_told, *d_norm_weight, *d_norm_bias, *d_w1, *d_b1, *d_w2, *d_b2, *d_skip, *d_kernel;
  int64_t clips, length, features, inner, channels, points, half, threads;
};

struct Scratch {
  std::vector<float> memory;
  float* at;
  explicit Scratch(int64_t floats) : memory(floats + W) {
    at = memory.data() + -reinterpret_cast<uintptr_t>(memory.data()) % kBytes / sizeof(float);
  }
  float* take(int64_t floats) { return std::exchange(at, at + floats); }
};

// ---- products: pairs of bfloat16 take the place of a float where kHalf ---------------------------

// x (rows, n) as a left operand, whose sums go along the rows.
template <bool kHalf> const float* across(const float* x, int64_t count, float* to) {
  if (!kHalf) return x;
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < count; i += 2 * W)
    store(to + i / 2, (V)_mm512_cvtne2ps_pbh((__m512)load(x + i + W), (__m512)load(x + i)));
#endif
  return to;
}

// x (rows, n) as either operand, where the sums go down the rows; their number is even.
template <bool kHalf> const float* down(const float* x, int64_t rows, int64_t n, float* to) {
  if (!kHalf) return x;
#if defined(__AVX512BF16__)
  const auto upper = [](const float* x) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(x)));
  };
  for (int64_t r = 0; r < rows; r += 2, x += 2 * n, to += n)
    for (int64_t j = 0; j < n; j += W)
      store(to + j, (V)((Bits)upper(x + j) | (Bits)upper(x + n + j) << 16));
  return to - rows / 2 * n;
#endif
  return to;
}

struct Left {  // element (m, k) at x[m * row + k * step]
  const float* x;
  int64_t row, step;
};

// c = a b, to which `bias` is added, or with kAdd what c was: at the end, for fewer roundings.
template <bool kHalf, bool kAdd, int P>
inline void tile(Left a, const float* b, int64_t n, int64_t k, const float* bias, float* c) {
  V sum[kRows][P], w[P];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < P; ++p) sum[m][p] = bias ? load(bias + p * W) : V{};
  for (; k; --k, b += n, a.x += a.step) {
    for (int p = 0; p < P; ++p) w[p] = load(b + p * W);
    for (int m = 0; m < kRows; ++m) {
      uint32_t bits;
      std::memcpy(&bits, a.x + m * a.row, 4);
      const V x = (V)(bits + Bits{});
      for (int p = 0; p < P; ++p)
#if defined(__AVX512BF16__)
        if (kHalf)
          sum[m][p] = (V)_mm512_dpbf16_ps((__m512)sum[m][p], (__m512bh)x, (__m512bh)w[p]);
        else
#endif
          sum[m][p] += x * w[p];
    }
  }
  for (int m = 0; m < kRows; ++m, c += n)
    for (int p = 0; p < P; ++p) store(c + p * W, kAdd ? load(c + p * W) + sum[m][p] : sum[m][p]);
}

// The same for all of c (m, n), a (m, k), b (k, n); m is a multiple of kRows, n of W.
template <bool kHalf, bool kAdd = false>
void product(int64_t m, int64_t n, int64_t k, Left a, const float* b, float* c,
             const float* bias = nullptr) {
  k /= kHalf ? 2 : 1;
  for (int64_t j = 0; j < n;) {
    const int64_t left = (n - j) / W, take = left == 4 ? 2 : std::min<int64_t>(3, left);
    const auto run = take == 3   ? tile<kHalf, kAdd, 3>
                     : take == 2 ? tile<kHalf, kAdd, 2>
                                 : tile<kHalf, kAdd, 1>;
    for (int64_t i = 0; i < m; i += kRows)
      run({a.x + i * a.row, a.row, a.step}, b + j, n, k, bias ? bias + j : nullptr, c + i * n + j);
    j += take * W;
  }
}

// y = x b + bias for a tile: x (kTile, k), b (k, n). half: room for k values a row.
template <bool kHalf>
void rows_product(const float* x, int64_t k, int64_t n, const float* b, const float* bias,
                  float* half, float* y) {
  const Left rows = {across<kHalf>(x, kTile * k, half), kHalf ? k / 2 : k, 1};
  product<kHalf>(kTile, n, k, rows, b, y, bias);
}

// d (m, n) += z^T x and d_bias (m) += the sums of z, for tiles z (kTile, m) and x (kTile, n).
template <bool kHalf>
void gradient(const float* z, const float* x, int64_t m, int64_t n, float* half, float* d,
              float* d_bias) {
  const float *a = down<kHalf>(z, kTile, m, half), *b = down<kHalf>(x, kTile, n, half + kTile * m / 2);
  product<kHalf, true>(m, n, kTile, {a, 1, m}, b, d);
  for (int64_t j = 0; j < m; j += W) {
    V sum = {};
    for (int64_t r = 0; r < kTile; ++r) sum += load(z + r * m + j);
    store(d_bias + j, load(d_bias + j) + sum);
  }
}

// ---- rows ---------------------------------------------------------------------------------------

struct Moments {
  float mean, scale;
};

inline Moments moments(const float* x, int64_t n) {
  V sum = {}, squares = {};
  for (int64_t i = 0; i < n; i += W) sum += load(x + i);
  const float mean = sum_of(sum) / n;
  for (int64_t i = 0; i < n; i += W) squares += (load(x + i) - mean) * (load(x + i) - mean);
  return {mean, 1 / std::sqrt(sum_of(squares) / n + 1e-5f)};
}

inline void norm(const Problem& p, const float* x, float* u) {
  const Moments m = moments(x, p.features);
  for (int64_t i = 0; i < p.features; i += W)
    store(u + i, (load(x + i) - m.mean) * m.scale * load(p.norm_weight + i) + load(p.norm_bias + i));
}

// d_x = d_y + the gradient d_u through the norm, for rows; adds to those of its weight and bias.
// sums: room for two rows.
inline void norm_backward(const Problem& p, int64_t rows, const float* x, const float* d_u,
                          const float* d_y, float* d_x, float* d_parameters, float* sums) {
  const int64_t n = p.features;
  std::fill_n(sums, 2 * n, 0.0f);
  for (; rows; --rows, x += n, d_u += n, d_y += n, d_x += n) {
    const Moments m = moments(x, n);
    V sum = {}, dot = {};
    for (int64_t i = 0; i < n; i += W) {
      const V du = load(d_u + i), d = du * load(p.norm_weight + i);
      const V z = (load(x + i) - m.mean) * m.scale;
      store(sums + i, load(sums + i) + du * z);
      store(sums + n + i, load(sums + n + i) + du);
      sum += d, dot += d * z;
    }
    const float mean = sum_of(sum) / n, along = sum_of(dot) / n;
    for (int64_t i = 0; i < n; i += W) {
      const V d = load(d_u + i) * load(p.norm_weight + i), z = (load(x + i) - m.mean) * m.scale;
      store(d_x + i, load(d_y + i) + m.scale * (d - mean - z * along));
    }
  }
  for (int64_t i = 0; i < 2 * n; i += W) store(d_parameters + i, load(d_parameters + i) + load(sums + i));
}

// In place; slope: the derivative, if wanted.
inline void activate(float* x, int64_t count, float* slope = nullptr) {
  for (int64_t i = 0; i < count; i += W) {
    const V v = load(x + i), phi = normal_cdf(v);
    store(x + i, v * phi);
    if (slope) store(slope + i, phi + v * exponential(-0.5f * v * v) * 0.398942280f);
  }
}

// Copies rows of a matrix into a tile, zeros after the last.
inline const float* filled(const float* x, int64_t rows, int64_t n, float* to) {
  if (rows == kTile) return x;
  std::copy_n(x, rows * n, to);
  std::fill(to + rows * n, to + kTile * n, 0.0f);
  return to;
}

// Where the rows of all clips are cut, and the sums of each part: the same for all threads.
struct Parts {
  int64_t rows, count, floats;
  std::vector<float> sums;
  Parts(int64_t rows, int64_t floats)
      : rows(rows), count(std::clamp<int64_t>(rows / 1024, 1, 16)), floats(floats),
        sums(count * floats + W) {}
  float* of(int64_t part) {
    float* start = sums.data() + -reinterpret_cast<uintptr_t>(sums.data()) % kBytes / sizeof(float);
    return start + part * floats;
  }
  int64_t begin(int64_t part) const { return rows / kTile * part / count * kTile; }
  int64_t end(int64_t part) const { return part + 1 == count ? rows : begin(part + 1); }
  // The sums of all parts, one piece after the other.
  void share(std::initializer_list<std::pair<float*, int64_t>> pieces) {
    for (int64_t part = 1; part < count; ++part)
      for (int64_t i = 0; i < floats; i += W) store(of(0) + i, load(of(0) + i) + load(of(part) + i));
    const float* from = of(0);
    for (const auto& [to, size] : pieces) std::copy_n(from, size, to), from += size;
  }
};

// f(first row, rows, scratch, sums of the part) for every tile.
template <typename F> void each_tile(int64_t threads, Parts& parts, int64_t floats, F f) {
  parallel(parts.count, threads, [&] {
    return [&, memory = std::make_shared<Scratch>(floats * kTile)](int64_t part) {
      for (int64_t row = parts.begin(part), end = parts.end(part); row < end; row += kTile) {
        float* at = memory->at;
        f(row, std::min(kTile, end - row), [&](int64_t n) { return std::exchange(at, at + n * kTile); },
          parts.of(part));
      }
    };
  });
}

template <bool kHalf> class Weights {  // as right operands
  Scratch memory;
  const float* take(const float* w, int64_t rows, int64_t n) {
    return kHalf && w ? down<kHalf>(w, rows, n, memory.take(rows * n / 2)) : w;
  }

 public:
  const float *w1, *w1_t, *w2, *w2_t;
  explicit Weights(const Problem& p)
      : memory(kHalf ? 2 * p.inner * p.features : 0), w1(take(p.w1, p.inner, p.features)),
        w1_t(take(p.w1_t, p.features, p.inner)), w2(take(p.w2, p.features, p.inner)),
        w2_t(take(p.w2_t, p.inner, p.features)) {}
};

// u = norm(x), zeros after the last row.
void norm_rows(const Problem& p, int64_t first, int64_t rows, float* u) {
  const int64_t n = p.features;
  for (int64_t r = 0; r < rows; ++r) norm(p, p.x + (first + r) * n, u + r * n);
  std::fill(u + rows * n, u + kTile * n, 0.0f);
}

// ---- feed-forward: W2 gelu(W1 u + b1) + b2 ------------------------------------------------------

template <bool kHalf> void feed_forward(const Problem& p) {
  const int64_t n = p.features, inner = p.inner;
  const Weights<kHalf> w(p);
  Parts parts(p.clips * p.length, 0);
  each_tile(p.threads, parts, 2 * (n + inner), [&](int64_t first, int64_t rows, auto take, float*) {
    float *u = take(n), *h = take(inner), *half = take(n + inner);
    norm_rows(p, first, rows, u);
    rows_product<kHalf>(u, n, inner, w.w1_t, p.b1, half, h);
    activate(h, kTile * inner);
    rows_product<kHalf>(h, inner, n, w.w2_t, p.b2, half, u);
    const int64_t at = first * n;
    for (int64_t i = 0; i < rows * n; i += W) store(p.y + at + i, load(p.x + at + i) + load(u + i));
  });
}

template <bool kHalf> void feed_forward_backward(const Problem& p) {
  const int64_t n = p.features, inner = p.inner;
  const Weights<kHalf> w(p);
  Parts parts(p.clips * p.length, 2 * n * inner + inner + 3 * n);
  each_tile(p.threads, parts, 4 * (n + inner), [&](int64_t first, int64_t rows, auto take, float* d) {
    float *u = take(n), *h = take(inner), *slope = take(inner), *d_h = take(inner);
    float *copy = take(n), *d_u = take(n), *half = take(n + inner);
    float *d_w1 = d, *d_b1 = d_w1 + inner * n, *d_w2 = d_b1 + inner, *d_b2 = d_w2 + n * inner;
    const float* d_y = filled(p.d_y + first * n, rows, n, copy);
    norm_rows(p, first, rows, u);
    rows_product<kHalf>(u, n, inner, w.w1_t, p.b1, half, h);
    activate(h, kTile * inner, slope);
    gradient<kHalf>(d_y, h, n, inner, half, d_w2, d_b2);
    rows_product<kHalf>(d_y, n, inner, w.w2, nullptr, half, d_h);
    for (int64_t i = 0; i < kTile * inner; i += W) store(d_h + i, load(d_h + i) * load(slope + i));
    gradient<kHalf>(d_h, u, inner, n, half, d_w1, d_b1);
    rows_product<kHalf>(d_h, inner, n, w.w1, nullptr, half, d_u);
    norm_backward(p, rows, p.x + first * n, d_u, d_y, p.d_x + first * n, d_b2 + n, half);
  });
  parts.share({{p.d_w1, inner * n}, {p.d_b1, inner}, {p.d_w2, n * inner}, {p.d_b2, n},
               {p.d_norm_weight, n}, {p.d_norm_bias, n}});
}

// ---- S4: the convolution ------------------------------------------------------------------------

// The input of a vector of features of a clip, at any time.
struct Input {
  const float* x;
  int64_t row;
  const Moments* moments;
  V weight, bias;
  Input(const Problem& p, const Moments* all, int64_t clip, int64_t v)
      : x(p.x + clip * p.length * p.features + v), row(p.features), moments(all + clip * p.length),
        weight(load(p.norm_weight + v)), bias(load(p.norm_bias + v)) {
    if (p.told) bias += load(p.told + clip * p.features + v);
  }
  V operator()(int64_t t) const {
    return (load(x + t * row) - moments[t].mean) * moments[t].scale * weight + bias;
  }
};

struct Output {
  float* x;
  int64_t row;
  V operator()(int64_t t) const { return load(x + t * row); }
};

std::vector<Moments> all_moments(const Problem& p) {
  std::vector<Moments> all(p.clips * p.length);
  Parts parts(all.size(), 0);
  each_tile(p.threads, parts, 0, [&](int64_t first, int64_t rows, auto, float*) {
    for (int64_t r = first; r < first + rows; ++r)
      all[r] = moments(p.x + r * p.features, p.features);
  });
  return all;
}

template <typename F> void transform(const Fourier& fourier, C* z, int64_t length, F u) {
  for (int64_t t = 0; t < 2 * fourier.n; t += 2)
    z[t / 2] = {t < length ? u(t) : V{}, t + 1 < length ? u(t + 1) : V{}};
  fourier.forward(z);
}
inline V sample(const C* z, int64_t t) { return t % 2 ? z[t / 2].im : z[t / 2].re; }

// The spectrum of the kernel, pair by pair, scaled so that no product of spectra needs it.
void spectrum(const Problem& p) {
  const Fourier& fourier = Fourier::of(p.points);
  const int64_t n = fourier.n, row = p.features, pairs = n / 2 + 1;
  parallel(row / W, p.threads, [&] {
    return [&, memory = std::make_shared<Scratch>(n * 2 * W)](int64_t v) {
      C *z = reinterpret_cast<C*>(memory->at), *out = reinterpret_cast<C*>(p.spectrum) + v * 2 * pairs;
      const float *past = p.kernel + v * W, *future = past + p.length * row;
      transform(fourier, z, 2 * n, [&](int64_t t) {
        if (t < p.length) return load(past + t * row);
        const int64_t ahead = 2 * n - 1 - t;
        return p.channels == 2 && ahead < p.length ? load(future + ahead * row) : V{};
      });
      for (int64_t k = 0; k < pairs; ++k) {
        const auto [x, y] = fourier.pair(z, k);
        out[2 * k] = x * (0.125f / n), out[2 * k + 1] = y * (0.125f / n);
      }
    };
  });
}

void convolve(const Problem& p, const std::vector<Moments>& moments) {  // conv = K * u + D u
  const Fourier& fourier = Fourier::of(p.points);
  const int64_t row = p.features, vectors = row / W, pairs = fourier.n / 2 + 1;
  parallel(p.clips * vectors, p.threads, [&] {
    return [&, memory = std::make_shared<Scratch>(fourier.n * 2 * W)](int64_t job) {
      const int64_t v = job / p.clips, clip = job % p.clips;
      const Input u(p, moments.data(), clip, v * W);
      const Output y = {p.conv + clip * p.length * row + v * W, row};
      C* z = reinterpret_cast<C*>(memory->at);
      const C* kernel = reinterpret_cast<const C*>(p.spectrum) + v * 2 * pairs;
      transform(fourier, z, p.length, u);
      for (int64_t k = 0; k < pairs; ++k) {
        const auto [a, b] = fourier.pair(z, k);
        fourier.set_pair(z, k, a * kernel[2 * k], b * kernel[2 * k + 1]);
      }
      fourier.inverse(z);
      const V skip = load(p.skip + v * W);
      for (int64_t t = 0; t < p.length; ++t) store(y.x + t * row, sample(z, t) + skip * u(t));
    };
  });
}

// d_x holds the gradient of conv, and then that of u. d_told and d_skip (B, H) are sums of a clip.
void convolve_backward(const Problem& p, const std::vector<Moments>& moments) {
  const Fourier& fourier = Fourier::of(p.points);
  const int64_t n = fourier.n, row = p.features, vectors = row / W, pairs = n / 2 + 1;
  const int64_t groups = std::min(p.clips, (7 + vectors) / vectors);
  Scratch sums(vectors * groups * pairs * 4 * W);
  C* all = reinterpret_cast<C*>(sums.at);
  parallel(vectors * groups, p.threads, [&] {
    return [&, memory = std::make_shared<Scratch>(n * 4 * W)](int64_t job) {
      const int64_t v = job / groups, group = job % groups;
      C *z = reinterpret_cast<C*>(memory->at), *d = z + n, *sum = all + job * 2 * pairs;
      const C* kernel = reinterpret_cast<const C*>(p.spectrum) + v * 2 * pairs;
      const V skip = load(p.skip + v * W);
      for (int64_t clip = p.clips * group / groups; clip < p.clips * (group + 1) / groups; ++clip) {
        const Input u(p, moments.data(), clip, v * W);
        const Output d_y = {p.d_x + clip * p.length * row + v * W, row};
        transform(fourier, z, p.length, u);
        transform(fourier, d, p.length, d_y);
        for (int64_t k = 0; k < pairs; ++k) {
          const auto [a, b] = fourier.pair(z, k);
          const auto [d_a, d_b] = fourier.pair(d, k);
          sum[2 * k] = sum[2 * k] + conj(a) * d_a, sum[2 * k + 1] = sum[2 * k + 1] + conj(b) * d_b;
          fourier.set_pair(d, k, conj(kernel[2 * k]) * d_a, conj(kernel[2 * k + 1]) * d_b);
        }
        fourier.inverse(d);
        V d_told = {}, d_skip = {};
        for (int64_t t = 0; t < p.length; ++t) {
          const V d_u = sample(d, t) + skip * d_y(t);
          d_skip += d_y(t) * u(t), d_told += d_u;
          store(d_y.x + t * row, d_u);
        }
        store(p.d_skip + clip * row + v * W, d_skip);
        if (p.told) store(p.d_told + clip * row + v * W, d_told);
      }
    };
  });
  parallel(vectors, p.threads, [&] {
    return [&, memory = std::make_shared<Scratch>(n * 2 * W)](int64_t v) {
      C *z = reinterpret_cast<C*>(memory->at), *sum = all + v * groups * 2 * pairs;
      for (int64_t k = 0; k < 2 * pairs; ++k)
        for (int64_t group = 1; group < groups; ++group) sum[k] = sum[k] + sum[group * 2 * pairs + k];
      for (int64_t k = 0; k < pairs; ++k) fourier.set_pair(z, k, sum[2 * k], sum[2 * k + 1]);
      fourier.inverse(z);
      for (int64_t channel = 0; channel < p.channels; ++channel)
        for (int64_t t = 0; t < p.length; ++t)
          store(p.d_kernel + (channel * p.length + t) * row + v * W,
                sample(z, channel ? 2 * n - 1 - t : t) * (0.125f / n));
    };
  });
}

// ---- S4: activation, projection, gate -----------------------------------------------------------

template <bool kHalf> void project(const Problem& p) {
  const int64_t n = p.features, inner = p.inner;
  const Weights<kHalf> w(p);
  Parts parts(p.clips * p.length, 0);
  each_tile(p.threads, parts, 2 * n + inner, [&](int64_t first, int64_t rows, auto take, float*) {
    float *g = take(n), *z = take(inner), *half = take(n);
    std::copy_n(p.conv + first * n, rows * n, g);
    std::fill(g + rows * n, g + kTile * n, 0.0f);
    activate(g, rows * n);
    rows_product<kHalf>(g, n, inner, w.w1_t, p.b1, half, z);
    for (int64_t r = 0; r < rows; ++r, z += inner)
      for (int64_t i = 0, at = (first + r) * n; i < n; i += W) {
        const V gate = inner == n ? splat(1) : sigmoid(load(z + n + i));
        store(p.y + at + i, load(p.x + at + i) + load(z + i) * gate);
      }
  });
}

// d_x becomes the gradient of conv.
template <bool kHalf> void project_backward(const Problem& p) {
  const int64_t n = p.features, inner = p.inner;
  const Weights<kHalf> w(p);
  Parts parts(p.clips * p.length, inner * n + inner);
  each_tile(p.threads, parts, 4 * n + 2 * inner, [&](int64_t first, int64_t rows, auto take, float* d) {
    float *g = take(n), *slope = take(n), *z = take(inner), *d_g = take(n), *half = take(n + inner);
    std::copy_n(p.conv + first * n, rows * n, g);
    std::fill(g + rows * n, g + kTile * n, 0.0f);
    activate(g, kTile * n, slope);
    rows_product<kHalf>(g, n, inner, w.w1_t, p.b1, half, z);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; i += W) {
        float* at = z + r * inner + i;
        const V d_y = load(p.d_y + (first + r) * n + i);
        if (inner != n) {
          const V gate = sigmoid(load(at + n));
          store(at + n, d_y * load(at) * gate * (1 - gate));
          store(at, d_y * gate);
        } else {
          store(at, d_y);
        }
      }
    std::fill(z + rows * inner, z + kTile * inner, 0.0f);
    gradient<kHalf>(z, g, inner, n, half, d, d + inner * n);
    rows_product<kHalf>(z, inner, n, w.w1, nullptr, half, d_g);
    for (int64_t i = 0; i < rows * n; i += W)
      store(p.d_x + first * n + i, load(d_g + i) * load(slope + i));
  });
  parts.share({{p.d_w1, inner * n}, {p.d_b1, inner}});
}

void norm_backward_rows(const Problem& p) {
  const int64_t n = p.features;
  Parts parts(p.clips * p.length, 2 * n);
  each_tile(p.threads, parts, n, [&](int64_t first, int64_t rows, auto take, float* d) {
    const int64_t at = first * n;
    norm_backward(p, rows, p.x + at, p.d_x + at, p.d_y + at, p.d_x + at, d, take(n));
  });
  parts.share({{p.d_norm_weight, n}, {p.d_norm_bias, n}});
}

}  // namespace

extern "C" {

int64_t sashimi_vector() { return W; }  // features must be a multiple of it
void sashimi_spectrum(const Problem* p) { spectrum(*p); }
void sashimi_feed_forward(const Problem* p) {
  kHasHalf && p->half ? feed_forward<kHasHalf>(*p) : feed_forward<false>(*p);
}
void sashimi_feed_forward_backward(const Problem* p) {
  kHasHalf && p->half ? feed_forward_backward<kHasHalf>(*p) : feed_forward_backward<false>(*p);
}
void sashimi_s4(const Problem* p) {
  convolve(*p, all_moments(*p));
  kHasHalf && p->half ? project<kHasHalf>(*p) : project<false>(*p);
}
void sashimi_s4_backward(const Problem* p) {
  kHasHalf && p->half ? project_backward<kHasHalf>(*p) : project_backward<false>(*p);
  convolve_backward(*p, all_moments(*p));
  norm_backward_rows(*p);
}
}
