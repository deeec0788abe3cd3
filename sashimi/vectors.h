// Vectors of floats, as wide as the registers, and the functions that the layers apply to each.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(SASHIMI_PORTABLE)  // see live.cpp
constexpr int kBytes = 16;
#elif defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int W = kBytes / sizeof(float);

typedef float V __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));

inline V load(const float* x) { return *reinterpret_cast<const V*>(x); }
inline void store(float* x, V v) { *reinterpret_cast<V*>(x) = v; }
template <typename T> inline void fetch(const T* x, int64_t count) {  // into the cache, for later
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(x + i, 0, 2);
}
inline V splat(float x) { return x - V{}; }  // x + 0 would turn -0 into 0: an addition
inline V clamp(V x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

inline float sum_of(V v) {
  alignas(kBytes) float x[W];
  store(x, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline V widened(const uint16_t* x) {  // of float16
#if defined(__AVX512F__) && !defined(SASHIMI_PORTABLE)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__) && !defined(SASHIMI_PORTABLE)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits);
  const V size = (V)((bits & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormal numbers too
  return (V)((Bits)size | (bits & 0x8000u) << 16);
#endif
}

// e^x to one unit in the last place; 0 below -87.
inline V exponential(V x) {
  const V c = clamp(x, -87.0f, 88.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds
  const V n = (c * 1.44269504f + magic) - magic;
  const V r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = splat(1.0f / 720);
  for (float k : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + k;
  y *= (V)(__builtin_convertvector(n + 127.0f, Bits) << 23);
  return x < -87.0f ? V{} : y;
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }
inline V hyperbolic_tangent(V x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// Phi(x), of the normal distribution. Phi(x) - 1/2 is x times a polynomial in x^2 up to |x| = 5.375, fitted for the least
// largest error: 1.2e-7 in Phi, evaluation included.
inline V normal_cdf(V x) {
  const V c = clamp(x, -5.375f, 5.375f), t = c * c * (2 / (5.375f * 5.375f)) - 1.0f;
  V y = splat(3.62517894e-4f);
  for (float k : {-9.55866941e-4f, 8.38393171e-4f, -1.16734707e-3f, 3.522994e-3f, -6.49056165e-3f,
                  9.44554526e-3f, -1.37747861e-2f, 1.94723643e-2f, -2.56423242e-2f, 3.2114394e-2f,
                  -3.93061601e-2f, 4.86907139e-2f, -6.56223968e-2f, 1.31535769e-1f})
    y = y * t + k;
  return c * y + 0.5f;
}

inline V gelu(V x) { return x * normal_cdf(x); }

}  // namespace
