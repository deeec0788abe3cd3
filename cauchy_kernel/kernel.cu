// The Cauchy kernel on CUDA: the same arithmetic as on the CPU, one thread for one node.
//
// Poles pass through shared memory; the R sums stay in registers. Backward has two phases for
// each tile of nodes: a thread per node makes the gradients of its sums, then a thread per pole
// gathers them from shared memory. Every block writes its own partial sums and the caller adds
// them up, so results repeat bit by bit. cuda.py compiles and launches the kernels.
#include "kernel.h"

constexpr int kThreads = 128;  // of a block: as many nodes in a tile, at most as many poles
constexpr int kPoles = 32;     // poles in shared memory at a time

// The R sums at this thread's node. All threads of the block take part in the loading.
template <typename T, int R>
FN void sums(const Problem& p, Index h, T y_hi, T y_lo, Pole<T, R>* poles, T (&re)[R], T (&im)[R]) {
  for (int r = 0; r < R; ++r) re[r] = im[r] = T(0);
  for (Index first = 0; first < p.states; first += kPoles) {
    const int count = int(p.states - first < kPoles ? p.states - first : kPoles);
    __syncthreads();  // the poles of before are done with
    if (int(threadIdx.x) < count) poles[threadIdx.x] = load_pole<T, R>(p, h, first + threadIdx.x);
    __syncthreads();
    for (int n = 0; n < count; ++n) add_pole<T, R, T>(poles[n], y_hi, y_lo, re, im);
  }
}

// Grid: features x tiles of nodes (x, for there may be more than 65,535 features).
template <typename T, int C> FN void forward(const Problem& p) {
  constexpr int R = 2 * C + 2;
  __shared__ Pole<T, R> poles[kPoles];
  const Index h = blockIdx.x % p.features, j = blockIdx.x / p.features * kThreads + threadIdx.x;
  const double y = p.y[j < p.nodes ? j : p.nodes - 1];  // idle threads repeat the last node
  const T y_hi = T(y), y_lo = T(y - double(y_hi));
  T re[R], im[R];
  sums<T, R>(p, h, y_hi, y_lo, poles, re, im);
  if (j >= p.nodes) return;
  sums_to_spectrum<T, C, T>(T(p.rho[h]), y_hi, re, im);
  for (int c = 0; c < C; ++c) {
    T* to = spectrum_at<T>(p, c, h, j);
    to[0] = re[c];
    to[1] = im[c];
  }
}

// Grid: (features x splits of the nodes, groups of kThreads poles).
template <typename T, int C> FN void backward(const Problem& p) {
  constexpr int R = 2 * C + 2, rows = 2 * R + 3;
  __shared__ Pole<T, R> poles[kPoles];
  __shared__ T node_hi[kThreads], node_lo[kThreads], g_re[kThreads][R], g_im[kThreads][R];
  const Index h = blockIdx.x % p.features, split = blockIdx.x / p.features;
  const Index tiles = (p.nodes + kThreads - 1) / kThreads;
  const Index begin = tiles * split / p.splits * kThreads;
  const Index limit = tiles * (split + 1) / p.splits * kThreads;
  const Index end = limit < p.nodes ? limit : p.nodes;
  // The second phase gives each pole of the group `lanes` threads, which share the nodes.
  const Index first = Index(blockIdx.y) * kThreads;
  const int group = int(p.states - first < kThreads ? p.states - first : kThreads);
  const int lanes = kThreads / group, own = threadIdx.x % group, lane = threadIdx.x / group;
  const Pole<T, R> pole = load_pole<T, R>(p, h, first + own);
  T acc[rows];
  for (int row = 0; row < rows; ++row) acc[row] = T(0);
  for (Index tile = begin; tile < end; tile += kThreads) {
    const int count = int(end - tile < kThreads ? end - tile : kThreads);
    const bool active = int(threadIdx.x) < count;
    const Index j = tile + (active ? threadIdx.x : count - 1);
    const T y_hi = T(p.y[j]), y_lo = T(p.y[j] - double(y_hi));
    T re[R], im[R], k_re[C], k_im[C];
    sums<T, R>(p, h, y_hi, y_lo, poles, re, im);
    for (int c = 0; c < C; ++c) {
      const T* from = spectrum_at<T>(p, c, h, j);
      k_re[c] = from[0];
      k_im[c] = from[1];
    }
    sums_to_gradients<T, C, T>(T(p.rho[h]), y_hi, k_re, k_im, re, im);
    if (active) {
      node_hi[threadIdx.x] = y_hi;
      node_lo[threadIdx.x] = y_lo;
      for (int r = 0; r < R; ++r) {
        g_re[threadIdx.x][r] = re[r];
        g_im[threadIdx.x][r] = im[r];
      }
    }
    __syncthreads();  // `sums` of the next tile synchronises before anything is overwritten
    if (lane < lanes)
      for (int i = lane; i < count; i += lanes)
        add_gradients<T, R, T>(pole, node_hi[i], node_lo[i], g_re[i], g_im[i], acc);
  }
  // Add up the lanes of a pole, row by row; node_hi has room for one row.
  double* to = p.d + (split * p.features + h) * rows * p.states + first;
  for (int row = 0; row < rows; ++row) {
    __syncthreads();
    node_hi[threadIdx.x] = acc[row];
    __syncthreads();
    if (int(threadIdx.x) < group) {
      double sum = 0;
      for (int i = 0; i < lanes; ++i) sum += double(node_hi[i * group + threadIdx.x]);
      to[row * p.states + threadIdx.x] = sum;
    }
  }
}

// The kernels by name, such as forward_float_1 for one channel of complex64.
#define KERNELS(T, C)                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads) forward_##T##_##C(Problem p) {  \
    forward<T, C>(p);                                                             \
  }                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) backward_##T##_##C(Problem p) { \
    backward<T, C>(p);                                                            \
  }
KERNELS(float, 1)
KERNELS(float, 2)
KERNELS(double, 1)
KERNELS(double, 2)
