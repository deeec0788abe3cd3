// The Cauchy kernel on the CPU: threads over features and ranges of nodes, vectors over nodes.
//
// All poles are visited for one vector of nodes with the R sums in registers, so nothing of size
// (states x nodes) exists. The vectors are those of GCC and Clang, as wide as the registers.
#include "kernel.h"
#include "parallel.h"

#include <algorithm>
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

template <typename T, int R> std::vector<Pole<T, R>> load_poles(const Problem& p, Index h) {
  std::vector<Pole<T, R>> poles;
  for (Index n = 0; n < p.states; ++n) poles.push_back(load_pole<T, R>(p, h, n));
  return poles;
}

template <typename T> struct Block {  // up to kBlock nodes, y = hi + lo
  static constexpr int W = Lanes<T>::count;
  typename Lanes<T>::V hi[kBlock / W], lo[kBlock / W];
  Index count, vectors;

  Block(const Problem& p, Index begin, Index end)
      : count(std::min<Index>(kBlock, end - begin)), vectors((count + W - 1) / W) {
    for (Index i = 0; i < vectors * W; ++i) {
      const double y = p.y[begin + std::min(i, count - 1)];  // idle lanes repeat the last node
      hi[i / W][i % W] = T(y);
      lo[i / W][i % W] = T(y - double(T(y)));
    }
  }
  Index lanes(Index i) const { return std::min<Index>(W, count - i * W); }
};

template <typename T, int R, typename V>
FN void sums(const std::vector<Pole<T, R>>& poles, V y_hi, V y_lo, V (&re)[R], V (&im)[R]) {
  for (int r = 0; r < R; ++r) re[r] = im[r] = V{};
  for (const Pole<T, R>& pole : poles) add_pole(pole, y_hi, y_lo, re, im);
}

template <typename T, int C> void forward(const Problem& p, Index h, Index begin, Index end) {
  constexpr int R = 2 * C + 2, W = Lanes<T>::count;
  typedef typename Lanes<T>::V V;
  const auto poles = load_poles<T, R>(p, h);
  for (Index j = begin; j < end; j += kBlock) {
    const Block<T> y(p, j, end);
    for (Index i = 0; i < y.vectors; ++i) {
      V re[R], im[R];
      sums<T, R, V>(poles, y.hi[i], y.lo[i], re, im);
      sums_to_spectrum<T, C, V>(T(p.rho[h]), y.hi[i], re, im);
      for (int c = 0; c < C; ++c) {
        T* to = spectrum_at<T>(p, c, h, j + i * W);
        for (Index l = 0; l < y.lanes(i); ++l) to[2 * l] = re[c][l], to[2 * l + 1] = im[c][l];
      }
    }
  }
}

// Block by block: first the gradient of every sum at every node, then every pole's share of them.
template <typename T, int C>
void backward(const Problem& p, Index h, Index split, Index begin, Index end) {
  constexpr int R = 2 * C + 2, rows = 2 * R + 3, W = Lanes<T>::count;
  typedef typename Lanes<T>::V V;
  const auto poles = load_poles<T, R>(p, h);
  std::vector<double> total(p.states * rows * W);  // lane by lane, in double
  V re[kBlock / W][R], im[kBlock / W][R];
  for (Index j = begin; j < end; j += kBlock) {
    const Block<T> y(p, j, end);
    for (Index i = 0; i < y.vectors; ++i) {
      V k_re[C] = {}, k_im[C] = {};
      for (int c = 0; c < C; ++c) {
        const T* from = spectrum_at<T>(p, c, h, j + i * W);
        for (Index l = 0; l < y.lanes(i); ++l) k_re[c][l] = from[2 * l], k_im[c][l] = from[2 * l + 1];
      }
      sums<T, R, V>(poles, y.hi[i], y.lo[i], re[i], im[i]);
      sums_to_gradients<T, C, V>(T(p.rho[h]), y.hi[i], k_re, k_im, re[i], im[i]);
    }
    for (Index n = 0; n < p.states; ++n) {
      const Pole<T, R> pole = poles[n];
      V acc[rows] = {};
      for (Index i = 0; i < y.vectors; ++i)
        add_gradients<T, R, V>(pole, y.hi[i], y.lo[i], re[i], im[i], acc);
      double* to = total.data() + n * rows * W;
      for (int row = 0; row < rows; ++row)
        for (int l = 0; l < W; ++l) to[row * W + l] += acc[row][l];
    }
  }
  double* d = p.d + (split * p.features + h) * rows * p.states;
  for (Index n = 0; n < p.states; ++n)
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (int l = 0; l < W; ++l) sum += total[(n * rows + row) * W + l];
      d[row * p.states + n] = sum;
    }
}

template <typename T, int C> void run(const Problem& p) {
  const Index blocks = (p.nodes + kBlock - 1) / kBlock;
  const auto run_one = [&](Index job) {
    const Index h = job / p.splits, split = job % p.splits;
    const Index begin = blocks * split / p.splits * kBlock;
    const Index end = std::min(p.nodes, blocks * (split + 1) / p.splits * kBlock);
    if (p.d)
      backward<T, C>(p, h, split, begin, end);
    else
      forward<T, C>(p, h, begin, end);
  };
  parallel(p.features * p.splits, p.threads, [&] { return run_one; });
}

}  // namespace

extern "C" void cauchy_kernel_cpu(const Problem* p) {
  if (p->channels == 1)
    p->is_double ? run<double, 1>(*p) : run<float, 1>(*p);
  else
    p->is_double ? run<double, 2>(*p) : run<float, 2>(*p);
}
