// The Cauchy kernel on the CPU: threads over features and ranges of nodes, vectors over nodes.
//
// All poles are visited for one vector of nodes with the R sums in registers, so nothing of size
// (states x nodes) exists. The vectors are those of GCC and Clang, as wide as the registers.
#include "kernel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kBlock = 256;  // nodes: the gradients of a block of nodes stay in the L1 cache

template <typename T> struct Lanes {
  static constexpr int count = kBytes / sizeof(T);
  typedef T V __attribute__((vector_size(kBytes)));
};

template <typename T, int R> std::vector<Pole<T, R>> load_poles(const Problem& p, int64_t h) {
  std::vector<Pole<T, R>> poles;
  for (int64_t n = 0; n < p.states; ++n) poles.push_back(load_pole<T, R>(p, h, n));
  return poles;
}

template <typename T> struct Block {  // up to kBlock nodes, y = hi + lo
  static constexpr int W = Lanes<T>::count;
  typename Lanes<T>::V hi[kBlock / W], lo[kBlock / W];
  int64_t count, vectors;

  Block(const Problem& p, int64_t begin, int64_t end)
      : count(std::min<int64_t>(kBlock, end - begin)), vectors((count + W - 1) / W) {
    for (int64_t i = 0; i < vectors * W; ++i) {
      const double y = p.y[begin + std::min(i, count - 1)];  // idle lanes repeat the last node
      hi[i / W][i % W] = T(y);
      lo[i / W][i % W] = T(y - double(T(y)));
    }
  }
  int64_t lanes(int64_t i) const { return std::min<int64_t>(W, count - i * W); }
};

template <typename T, int R, typename V>
FN void sums(const std::vector<Pole<T, R>>& poles, V y_hi, V y_lo, V (&re)[R], V (&im)[R]) {
  for (int r = 0; r < R; ++r) re[r] = im[r] = V{};
  for (const Pole<T, R>& pole : poles) add_pole(pole, y_hi, y_lo, re, im);
}

template <typename T, int C>
void forward(const Problem& p, T* out, int64_t stride, int64_t h, int64_t begin, int64_t end) {
  constexpr int R = 2 * C + 2, W = Lanes<T>::count;
  typedef typename Lanes<T>::V V;
  const auto poles = load_poles<T, R>(p, h);
  for (int64_t j = begin; j < end; j += kBlock) {
    const Block<T> y(p, j, end);
    for (int64_t i = 0; i < y.vectors; ++i) {
      V re[R], im[R];
      sums<T, R, V>(poles, y.hi[i], y.lo[i], re, im);
      sums_to_spectrum<T, C, V>(T(p.rho[h]), y.hi[i], re, im);
      for (int c = 0; c < C; ++c) {
        T* to = out + 2 * ((c * p.features + h) * stride + j + i * W);
        for (int64_t l = 0; l < y.lanes(i); ++l) to[2 * l] = re[c][l], to[2 * l + 1] = im[c][l];
      }
    }
  }
}

// Block by block: first the gradient of every sum at every node, then every pole's share of them.
template <typename T, int C>
void backward(const Problem& p, const T* grad, int64_t stride, double* d, int64_t h, int64_t begin,
              int64_t end) {
  constexpr int R = 2 * C + 2, rows = 2 * R + 3, W = Lanes<T>::count;
  typedef typename Lanes<T>::V V;
  const auto poles = load_poles<T, R>(p, h);
  std::vector<double> total(p.states * rows * W);  // lane by lane, in double
  V re[kBlock / W][R], im[kBlock / W][R];
  for (int64_t j = begin; j < end; j += kBlock) {
    const Block<T> y(p, j, end);
    for (int64_t i = 0; i < y.vectors; ++i) {
      V k_re[C] = {}, k_im[C] = {};
      for (int c = 0; c < C; ++c) {
        const T* from = grad + 2 * ((c * p.features + h) * stride + j + i * W);
        for (int64_t l = 0; l < y.lanes(i); ++l) {
          k_re[c][l] = from[2 * l];
          k_im[c][l] = from[2 * l + 1];
        }
      }
      sums<T, R, V>(poles, y.hi[i], y.lo[i], re[i], im[i]);
      sums_to_gradients<T, C, V>(T(p.rho[h]), y.hi[i], k_re, k_im, re[i], im[i]);
    }
    for (int64_t n = 0; n < p.states; ++n) {
      const Pole<T, R> pole = poles[n];
      V acc[rows] = {};
      for (int64_t i = 0; i < y.vectors; ++i)
        add_gradients<T, R, V>(pole, y.hi[i], y.lo[i], re[i], im[i], acc);
      double* to = total.data() + n * rows * W;
      for (int row = 0; row < rows; ++row)
        for (int l = 0; l < W; ++l) to[row * W + l] += acc[row][l];
    }
  }
  for (int64_t n = 0; n < p.states; ++n)
    for (int row = 0; row < rows; ++row)
      for (int l = 0; l < W; ++l) d[row * p.states + n] += total[(n * rows + row) * W + l];
}

// Runs job(0) .. job(count - 1). Threads are made anew: no pool to fork, to tune or to fight.
template <typename Job> void parallel(int64_t count, int threads, Job job) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < count;) job(i);
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < std::min<int64_t>(threads, count); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: fewer will do
  }
  work();
  for (std::thread& other : others) other.join();
}

template <typename T, int C>
void run(const Problem& p, T* spectrum, double* d, int64_t stride, int64_t splits, int threads) {
  constexpr int rows = 2 * (2 * C + 2) + 3;
  const int64_t blocks = (p.nodes + kBlock - 1) / kBlock;
  parallel(p.features * splits, threads, [&](int64_t job) {
    const int64_t h = job / splits, s = job % splits, begin = blocks * s / splits * kBlock;
    const int64_t end = std::min(p.nodes, blocks * (s + 1) / splits * kBlock);
    if (d)
      backward<T, C>(p, spectrum, stride, d + (s * p.features + h) * rows * p.states, h, begin,
                     end);
    else
      forward<T, C>(p, spectrum, stride, h, begin, end);
  });
}

}  // namespace

// spectrum: complex (C, H, stride), its first J nodes written; or, where d is given, read: then
// it is the gradient, and d, zeroed (splits, H, 4C + 7, M), receives `add_gradients`' rows.
extern "C" void cauchy_kernel_cpu(const double* weight, const double* a, const double* b,
                                  const double* rho, const double* y, void* spectrum,
                                  double* d, int64_t features, int64_t states, int64_t nodes,
                                  int64_t stride, int64_t splits, int channels, int is_double,
                                  int threads) {
  const Problem p{weight, a, b, rho, y, features, states, nodes};
  float* const f = static_cast<float*>(spectrum);
  double* const g = static_cast<double*>(spectrum);
  if (is_double && channels == 1) run<double, 1>(p, g, d, stride, splits, threads);
  if (is_double && channels == 2) run<double, 2>(p, g, d, stride, splits, threads);
  if (!is_double && channels == 1) run<float, 1>(p, f, d, stride, splits, threads);
  if (!is_double && channels == 2) run<float, 2>(p, f, d, stride, splits, threads);
}
