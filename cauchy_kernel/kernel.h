// The arithmetic that kernel.cpp and kernel.cu share; plain.py explains it and is the reference.
//
// V is a T, or a vector of T whose lanes are neighbouring nodes. C is the number of channels and
// R = 2 C + 2 the number of Cauchy sums: (Ct B') x C, (Ct P) x C, (Q B'), (Q P). Nothing is
// included: NVRTC has no standard headers.
#pragma once

#ifdef __CUDACC__
#define FN __device__ __forceinline__
#else
#define FN inline __attribute__((always_inline))
#endif

// What a pair of poles a +- i b adds to sum r at z = i y:
// (alpha[r] + i beta[r] y) / (a^2 + (b - y)(b + y) - 2 i a y), with b = b_hi + b_lo.
template <typename T, int R> struct Pole {
  T a2, two_a, b_hi, b_lo, alpha[R], beta[R];
};

typedef long long Index;

struct Problem {  // native.py fills it
  const double *weight, *a, *b, *rho, *y;  // alpha and beta (H, 2R, M); (H, M) twice; (H); (J)
  void* spectrum;  // complex (C, H, stride): the first J nodes are written, or read as a gradient
  double* d;       // null, or backward's result, `add_gradients`' rows: (splits, H, 2R + 3, M)
  Index features, states, nodes, stride;       // H, M, J, L / 2 + 1
  Index splits, channels, is_double, threads;  // ranges of nodes; 1 or 2; ...; of the CPU
};

// Real and imaginary part at node j.
template <typename T> FN T* spectrum_at(const Problem& p, Index c, Index h, Index j) {
  return static_cast<T*>(p.spectrum) + 2 * ((c * p.features + h) * p.stride + j);
}

template <typename T, int R> FN Pole<T, R> load_pole(const Problem& p, Index h, Index n) {
  const double a = p.a[h * p.states + n], b = p.b[h * p.states + n];
  const double* weight = p.weight + h * 2 * R * p.states + n;
  Pole<T, R> pole;
  pole.a2 = T(a * a);
  pole.two_a = T(2 * a);
  pole.b_hi = T(b);
  pole.b_lo = T(b - double(pole.b_hi));
  for (int r = 0; r < R; ++r) {
    pole.alpha[r] = T(weight[r * p.states]);
    pole.beta[r] = T(weight[(R + r) * p.states]);
  }
  return pole;
}

template <typename T, int R, typename V>
FN void green(const Pole<T, R>& pole, V y_hi, V y_lo, V& re, V& im) {
  const V difference = (pole.b_hi - y_hi) + (pole.b_lo - y_lo);  // exact where b is close to y
  const V real = pole.a2 + difference * (pole.b_hi + y_hi), imag = pole.two_a * y_hi;
  const V scale = T(1) / (real * real + imag * imag);
  re = real * scale;
  im = imag * scale;
}

// Adds one pair of poles to the R sums.
template <typename T, int R, typename V>
FN void add_pole(const Pole<T, R>& pole, V y_hi, V y_lo, V (&re)[R], V (&im)[R]) {
  V g_re, g_im;
  green(pole, y_hi, y_lo, g_re, g_im);
  const V yg_re = y_hi * g_re, yg_im = y_hi * g_im;
  for (int r = 0; r < R; ++r) {
    re[r] += pole.alpha[r] * g_re - pole.beta[r] * yg_im;
    im[r] += pole.alpha[r] * g_im + pole.beta[r] * yg_re;
  }
}

// t = 1 / (1 + QP) and u = (QB - rho) t
template <typename T, int R, typename V>
FN void woodbury(T rho, const V (&re)[R], const V (&im)[R], V& t_re, V& t_im, V& u_re, V& u_im) {
  const V d_re = T(1) + re[R - 1], d_im = im[R - 1];
  const V scale = T(1) / (d_re * d_re + d_im * d_im);
  t_re = d_re * scale;
  t_im = -d_im * scale;
  const V n_re = re[R - 2] - rho, n_im = im[R - 2];
  u_re = n_re * t_re - n_im * t_im;
  u_im = n_re * t_im + n_im * t_re;
}

// The R sums become the spectrum of C channels, in place: (CB - CP u) (1 + i y / 2).
template <typename T, int C, typename V>
FN void sums_to_spectrum(T rho, V y, V (&re)[2 * C + 2], V (&im)[2 * C + 2]) {
  V t_re, t_im, u_re, u_im;
  woodbury(rho, re, im, t_re, t_im, u_re, u_im);
  const V half = y * T(0.5);
  for (int c = 0; c < C; ++c) {
    const V k_re = re[c] - (re[C + c] * u_re - im[C + c] * u_im);
    const V k_im = im[c] - (re[C + c] * u_im + im[C + c] * u_re);
    re[c] = k_re - half * k_im;
    im[c] = k_im + half * k_re;
  }
}

// The R sums and the gradient k of the spectrum become the gradients of the sums, in place.
template <typename T, int C, typename V>
FN void sums_to_gradients(T rho, V y, const V (&k_re)[C], const V (&k_im)[C],
                          V (&re)[2 * C + 2], V (&im)[2 * C + 2]) {
  V t_re, t_im, u_re, u_im, qb_re = V(), qb_im = V();
  woodbury(rho, re, im, t_re, t_im, u_re, u_im);
  const V half = y * T(0.5);
  for (int c = 0; c < C; ++c) {
    const V s_re = re[C + c] * t_re - im[C + c] * t_im, s_im = re[C + c] * t_im + im[C + c] * t_re;
    const V cb_re = k_re[c] + half * k_im[c], cb_im = k_im[c] - half * k_re[c];
    re[c] = cb_re;
    im[c] = cb_im;
    re[C + c] = -(cb_re * u_re + cb_im * u_im);
    im[C + c] = cb_re * u_im - cb_im * u_re;
    qb_re -= cb_re * s_re + cb_im * s_im;
    qb_im -= cb_im * s_re - cb_re * s_im;
  }
  re[2 * C] = qb_re;
  im[2 * C] = qb_im;
  re[2 * C + 1] = -(qb_re * u_re + qb_im * u_im);
  im[2 * C + 1] = qb_re * u_im - qb_im * u_re;
}

// Gradients g of the sums at one node (or vector of nodes) -> this pole's share, added to acc:
// of alpha (R), of beta (R), of |pole|^2, of a where it multiplies y, and of log y in 1 / G.
template <typename T, int R, typename V>
FN void add_gradients(const Pole<T, R>& pole, V y_hi, V y_lo, const V (&re)[R], const V (&im)[R],
                      V (&acc)[2 * R + 3]) {
  V g_re, g_im, a_re = V(), a_im = V(), b_re = V(), b_im = V();
  green(pole, y_hi, y_lo, g_re, g_im);
  const V yg_re = y_hi * g_re, yg_im = y_hi * g_im;
  for (int r = 0; r < R; ++r) {
    acc[r] += re[r] * g_re + im[r] * g_im;
    acc[R + r] += im[r] * yg_re - re[r] * yg_im;
    a_re += pole.alpha[r] * re[r];
    a_im += pole.alpha[r] * im[r];
    b_re += pole.beta[r] * re[r];
    b_im += pole.beta[r] * im[r];
  }
  const V q_re = a_re + y_hi * b_im, q_im = y_hi * b_re - a_im;
  const V s_re = g_re * g_re - g_im * g_im, s_im = T(2) * g_re * g_im;  // d(1/x) = -dx / x^2
  const V w_re = q_re * s_re - q_im * s_im, y_2 = T(2) * y_hi;
  acc[2 * R] -= w_re;
  acc[2 * R + 1] -= y_2 * (q_re * s_im + q_im * s_re);
  acc[2 * R + 2] -= y_2 * y_hi * w_re;
}
