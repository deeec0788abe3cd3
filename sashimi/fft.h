// Fourier transforms of W real sequences side by side, one in each lane.
//
// A sequence of 2n samples goes as n complex points, even samples real, odd ones imaginary. The
// transform leaves frequencies where they fall (`place`), its inverse takes them from there: a
// convolution needs no order. Blocks that fit in the L1 cache are finished before others are begun.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

struct C {  // complex numbers
  V re, im;
};
inline C operator+(C a, C b) { return {a.re + b.re, a.im + b.im}; }
inline C operator-(C a, C b) { return {a.re - b.re, a.im - b.im}; }
inline C operator*(C a, float b) { return {a.re * b, a.im * b}; }
inline C operator*(C a, C b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
inline C conj(C a) { return {a.re, -a.im}; }
inline C swap(C a) { return {a.im, a.re}; }
inline C turn(C a) { return {a.im, -a.re}; }  // -i a
inline C rotate(C a, float re, float im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

template <int R> inline void dft(C* x) {
  if constexpr (R == 2) {
    const C a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if constexpr (R == 3) {
    const C sum = x[1] + x[2], side = turn(x[1] - x[2]) * 0.866025404f, mid = x[0] - sum * 0.5f;
    x[0] = x[0] + sum, x[1] = mid + side, x[2] = mid - side;
  } else if constexpr (R == 4) {
    const C a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = turn(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else {
    static_assert(R == 5);
    const C a = x[1] + x[4], b = x[2] + x[3], c = turn(x[1] - x[4]), d = turn(x[2] - x[3]);
    const C p = x[0] + a * 0.309016994f - b * 0.809016994f;
    const C q = x[0] - a * 0.809016994f + b * 0.309016994f;
    const C s = c * 0.951056516f + d * 0.587785252f, t = c * 0.587785252f - d * 0.951056516f;
    x[0] = x[0] + a + b, x[1] = p + s, x[2] = q + t, x[3] = q - t, x[4] = p - s;
  }
}

class Fourier {
 public:
  const int64_t n;
  std::vector<int64_t> place;  // where the transform leaves each frequency

  explicit Fourier(int64_t n) : n(n), place(n) {
    for (int64_t size = n, radix; size > 1; size /= radix) {
      radix = size % 4 == 0 ? 4 : size % 2 == 0 ? 2 : size % 3 == 0 ? 3 : 5;
      Level level = {int(radix), size, {}};
      for (int64_t j = 0; j < size / radix; ++j)
        for (int64_t q = 1; q < radix; ++q) root(double(j * q) / size, level.twiddles);
      levels.push_back(std::move(level));
    }
    for (int64_t k = 0; k < n; ++k) {
      int64_t rest = k, size = n;
      for (const Level& level : levels) {
        size /= level.radix;
        place[k] += rest % level.radix * size;
        rest /= level.radix;
      }
    }
    for (int64_t k = 0; k <= n / 2; ++k) root(k / (2.0 * n), half);
  }

  static const Fourier& of(int64_t n) {  // each is kept
    static std::mutex mutex;
    static std::map<int64_t, Fourier> made;
    const std::lock_guard<std::mutex> guard(mutex);
    return made.try_emplace(n, n).first->second;
  }

  void forward(C* z) const { walk<false>(z, 0, n); }
  void inverse(C* z) const { walk<true>(z, 0, n); }  // without the division by n

  // X[k] and X[n - k] of the real sequences, twice as large, k <= n / 2; and the same way back: z
  // is then twice as large again.
  std::pair<C, C> pair(const C* z, int64_t k) const {
    const C a = z[place[k]], b = conj(z[place[k ? n - k : 0]]);
    const C even = a + b, odd = rotate(turn(a - b), half[2 * k], half[2 * k + 1]);
    return {even + odd, conj(even - odd)};
  }
  void set_pair(C* z, int64_t k, C x, C y) const {
    const C even = x + conj(y), odd = rotate(x - conj(y), half[2 * k], -half[2 * k + 1]);
    z[place[k]] = even - turn(odd);
    z[place[k ? n - k : 0]] = conj(even + turn(odd));
  }

 private:
  struct Level {
    int radix;
    int64_t size;
    std::vector<float> twiddles;  // (size / radix, radix - 1, 2)
  };
  std::vector<Level> levels;
  std::vector<float> half;  // e^(-pi i k / n)

  static constexpr int64_t kNear = (24 << 10) / sizeof(C);

  static void root(double turns, std::vector<float>& to) {
    const double angle = 2 * M_PI * turns;
    to.push_back(float(std::cos(angle))), to.push_back(float(-std::sin(angle)));
  }

  template <bool kBack> void walk(C* z, size_t first, int64_t size) const {
    const size_t left = levels.size() - first;
    if (size <= kNear) {
      for (size_t i = 0; i < left; ++i)
        for (int64_t at = 0; at < size;) {
          const Level& level = levels[kBack ? levels.size() - 1 - i : first + i];
          pass<kBack>(z + at, level), at += level.size;
        }
      return;
    }
    if (!kBack) pass<kBack>(z, levels[first]);
    const int64_t step = size / levels[first].radix;
    for (int64_t at = 0; at < size; at += step) walk<kBack>(z + at, first + 1, step);
    if (kBack) pass<kBack>(z, levels[first]);
  }

  template <bool kBack> static void pass(C* z, const Level& level) {
    const int64_t step = level.size / level.radix;
    const float* w = level.twiddles.data();
    switch (level.radix) {
      case 2: return butterflies<kBack, 2>(z, step, w);
      case 3: return butterflies<kBack, 3>(z, step, w);
      case 4: return butterflies<kBack, 4>(z, step, w);
      default: return butterflies<kBack, 5>(z, step, w);
    }
  }
  template <bool kBack, int R>
  static void butterflies(C* z, int64_t step, const float* w) {
    for (int64_t j = 0; j < step; ++j, ++z, w += 2 * (R - 1)) {
      C x[R];
      for (int q = 0; q < R; ++q) x[q] = kBack ? swap(z[q * step]) : z[q * step];
      if (kBack && j)
        for (int q = 1; q < R; ++q) x[q] = rotate(x[q], w[2 * q - 2], w[2 * q - 1]);
      dft<R>(x);
      if (!kBack && j)
        for (int q = 1; q < R; ++q) x[q] = rotate(x[q], w[2 * q - 2], w[2 * q - 1]);
      for (int q = 0; q < R; ++q) z[q * step] = kBack ? swap(x[q]) : x[q];
    }
  }
};

}  // namespace
