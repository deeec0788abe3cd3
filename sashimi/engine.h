// The loop of every compiled step engine: matrix products of a few rows, classes drawn from logits,
// threads over clips. A network adds a Model and a Walker, see `run`; realtime.cpp is the example.
//
// Lanes are neighbouring features: a vector holds W of them, features are padded with zeros to
// whole vectors. rawaudio/engine.py packs weights and states in the order in which they are read.
//
// Clips are independent: threads take clips each. Where there are two threads for every clip, they
// make a team, which shares a clip's work so that the bits are the same for any number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>
#ifndef SASHIMI_PORTABLE  // see live.cpp: one thread, vectors of 16 bytes
#include <system_error>
#include <thread>
#endif

#include "vectors.h"

namespace {

constexpr int kTile = kBytes == 64 ? 16 : 8;  // accumulators of a matrix product
constexpr int kClasses = 256;
constexpr int64_t kGroup = 8;  // records that walk together: weights are read once for all of them
constexpr int64_t kLarge = 2 << 20;  // bytes: below, a tier stays in a core's cache, fast for one

struct Matrix {
  const void* weight;  // float or float16 (rows / W, columns, W)
  const float* bias;
  int64_t rows, columns;  // whole vectors, an even number
};

inline int64_t padded(int64_t features) { return (features + W - 1) / W * W; }

// What every Model is: pointers into one piece of memory, and the layout of a clip's state.
struct Weights {
  const float *start, *at;
  bool half;           // float16 matrices
  int64_t record = 0;  // floats of a clip's state

  Weights(const float* weights, bool half) : start(weights), at(weights), half(half) {}

  const float* take(int64_t floats) {
    const float* here = at;
    at += padded(floats);
    return here;
  }
  int64_t reserve(int64_t floats) { return std::exchange(record, record + floats); }

  Matrix matrix(int64_t rows, int64_t columns) {
    Matrix m = {nullptr, nullptr, rows, columns + columns % 2};
    m.weight = take(half ? rows * m.columns / 2 : rows * m.columns);
    m.bias = take(rows);
    return m;
  }
  void sizes(int64_t* out) const { out[0] = at - start, out[1] = record; }
};


// ---- matrix products --------------------------------------------------------------------------

// A vector of rows, two columns.
inline void two(const float* w, V& even, V& odd) { even = load(w), odd = load(w + W); }
inline void two(const uint16_t* w, V& even, V& odd) { even = widened(w), odd = widened(w + W); }

// P vectors of rows times C clips, all sums in registers, each in the order of the columns.
template <typename T, int P, int C>
void tile(const T* w, const float* bias, int64_t columns, const float* x, int64_t x_stride,
          float* y, int64_t y_stride) {
  V sum[C][P], even[P], odd[P];
  for (int c = 0; c < C; ++c)
    for (int p = 0; p < P; ++p) sum[c][p] = load(bias + p * W);
  for (int64_t k = 0; k < columns; k += 2) {
    for (int p = 0; p < P; ++p) {
      two(w + (p * columns + k) * W, even[p], odd[p]);
      if (C > 1) fetch(w + ((p + P) * columns + k) * W, 2 * W);  // of the tile after this one
    }
    for (int c = 0; c < C; ++c) {
      const V x0 = splat(x[c * x_stride + k]), x1 = splat(x[c * x_stride + k + 1]);
      for (int p = 0; p < P; ++p) sum[c][p] += even[p] * x0;
      for (int p = 0; p < P; ++p) sum[c][p] += odd[p] * x1;
    }
  }
  for (int c = 0; c < C; ++c)
    for (int p = 0; p < P; ++p) store(y + c * y_stride + p * W, sum[c][p]);
}

template <typename T, int P, int C>
void tiles(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t x_stride, float* y,
           int64_t y_stride) {
  for (; begin + P <= end; begin += P, y += P * W)
    tile<T, P, C>(static_cast<const T*>(m.weight) + begin * m.columns * W, m.bias + begin * W,
                  m.columns, x, x_stride, y, y_stride);
  if constexpr (P > 1) tiles<T, P / 2, C>(m, begin, end, x, x_stride, y, y_stride);
}

// y = (W x + bias)[rows of the vectors begin..end] for all clips.
template <typename T>
void product(const Matrix& m, int64_t begin, int64_t end, int64_t clips, const float* x,
             int64_t x_stride, float* y, int64_t y_stride) {
  for (int64_t c = 0; c < clips;) {
    const float* from = x + c * x_stride;
    float* to = y + c * y_stride;
    if (clips - c >= 8) {
      tiles<T, kTile / 8, 8>(m, begin, end, from, x_stride, to, y_stride), c += 8;
    } else if (clips - c >= 4) {
      tiles<T, kTile / 4, 4>(m, begin, end, from, x_stride, to, y_stride), c += 4;
    } else if (clips - c >= 2) {
      tiles<T, kTile / 4, 2>(m, begin, end, from, x_stride, to, y_stride), c += 2;
    } else {
      tiles<T, 8, 1>(m, begin, end, from, x_stride, to, y_stride), c += 1;
    }
  }
}

// ---- one class from 256 logits ----------------------------------------------------------------

// p = e^(x - max); returns the largest x.
float exponentials(const float* x, float* p) {
  float largest = x[0];
  for (int i = 1; i < kClasses; ++i) largest = std::max(largest, x[i]);
  for (int i = 0; i < kClasses; i += W) store(p + i, exponential(load(x + i) - largest));
  return largest;
}

double log_likelihood(const float* logits, int64_t found) {
  alignas(kBytes) float p[kClasses];
  const float largest = exponentials(logits, p);
  double sum = 0;
  for (float v : p) sum += v;
  return double(logits[found]) - largest - std::log(sum);
}

// ---- the walk of one or two threads over a group of clips ---------------------------------------

struct Memory {  // zeros, aligned
  std::vector<std::vector<float>> pieces;
  float* make(int64_t floats) {
    float* piece = pieces.emplace_back(floats + W).data();
    return piece + -reinterpret_cast<uintptr_t>(piece) % kBytes / sizeof(float);
  }
};

struct Team {  // what the threads of a clip share; a Walker's `Shared` adds buffers
  struct alignas(128) Count {
    std::atomic<uint32_t> value{0};
  };
  Count counts[2];
  int size = 1;
  Memory memory;

  explicit Team(int size) : size(size) {}
  void sync(int rank) {  // wait until both have come here; what either wrote, both see
#ifndef SASHIMI_PORTABLE
    const uint32_t now = counts[rank].value.load(std::memory_order_relaxed) + 1;
    counts[rank].value.store(now, std::memory_order_release);
    for (int spin = 0; counts[1 - rank].value.load(std::memory_order_acquire) + 1 == now;)
      if (++spin > 1 << 15) std::this_thread::yield();  // the other may have lost its core
#endif
  }
};

// What `run` is asked for, or a part of it, for one group of clips; rawaudio/engine.py has the
// same. With guidance a clip has two records, that of its conditions and that of its twin, which
// is told nothing; they walk together.
struct Job {
  const int64_t* plan;    // see Model
  const float* weights;   // of the model
  float* state;           // (clips x per, record)
  const int64_t* start;   // (clips)
  const float* uniforms;  // (steps, all clips)
  double* log_p;          // (clips) or null
  float* logits;          // (clips, all steps, 256) or null
  int64_t* classes;       // (clips, all steps)
  int64_t position, clips, steps, all_clips, all_steps;  // of the arrays, in which this is a part
  int64_t per;                                           // records of a clip, 1 or 2
  int64_t threads, top_k;
  float guidance, temperature, nucleus;
};

// What every Walker is: its thread's part of a job, see `run`.
template <typename Model, typename Sharing> struct Part {
  using Shared = Sharing;
  const Model& m;
  const Job& job;
  Shared& team;
  const int rank;
  const int64_t records;
  Memory memory;  // this thread's own

  Part(const Model& m, const Job& job, Shared& team, int rank)
      : m(m), job(job), team(team), rank(rank), records(job.clips * job.per) {}
  float* record(int64_t c) const { return job.state + c * m.record; }
  bool draws() const { return true; }
  void sync() {
    if (team.size == 2) team.sync(rank);
  }
};

// The same operations in the same order as `sample` in sampling.py.
int64_t draw(const float* logits, float uniform, const Job& how) {
  alignas(kBytes) float x[kClasses], p[kClasses];
  for (int i = 0; i < kClasses; i += W) store(x + i, load(logits + i) / how.temperature);
  if (how.top_k < kClasses) {
    std::copy(x, x + kClasses, p);
    std::nth_element(p, p + how.top_k - 1, p + kClasses, std::greater<float>());
    const float least = p[how.top_k - 1];
    for (float& v : x) v = v < least ? -INFINITY : v;
  }
  exponentials(x, p);
  V sums = {};
  for (int i = 0; i < kClasses; i += W) sums += load(p + i);
  const float sum = sum_of(sums);
  for (int i = 0; i < kClasses; i += W) store(p + i, load(p + i) / sum);
  if (how.nucleus < 1) {
    // Classes so rare that all of them together are less than what is cut off need no order.
    const float rare = how.nucleus < 0.999f ? 0.9f * (1 - how.nucleus) / kClasses : 0;
    std::pair<float, int> heap[kClasses];
    int count = 0;
    for (int i = 0; i < kClasses; ++i)
      if (p[i] >= rare) heap[count++] = {p[i], -i};
    std::make_heap(heap, heap + count);
    std::fill(p, p + kClasses, 0.0f);
    double mass = 0;
    for (int left = count; left; --left) {
      const auto [likeliest, index] = heap[0];
      mass += likeliest;
      if (!(float(mass) - likeliest < how.nucleus)) break;
      p[-index] = likeliest;
      std::pop_heap(heap, heap + left);
    }
  }
  double cdf = 0;
  for (float& v : p) v = float(cdf += v);
  const float all = p[kClasses - 1];
  const float target = std::min(uniform * all, std::nextafter(all, 0.0f));
  int64_t found = 0;
  for (float v : p) found += v <= target;
  return found;  // at most 255: the target is below the last
}

// f(rank, threads) in `threads` threads: `count`, or fewer where the system gives no more.
template <typename F> void in_threads(int64_t count, F f) {
#ifdef SASHIMI_PORTABLE
  f(0, 1);
#else
  std::vector<std::thread> others;
  std::atomic<int64_t> threads{0};
  try {
    while (int64_t(others.size()) + 1 < count)
      others.emplace_back([&, rank = int64_t(others.size()) + 1] {
        while (!threads.load(std::memory_order_acquire)) std::this_thread::yield();
        f(rank, threads.load());
      });
  } catch (const std::system_error&) {
  }
  threads.store(others.size() + 1, std::memory_order_release);
  f(0, threads.load());
  for (std::thread& thread : others) thread.join();
#endif
}

// Draws the classes of a group of clips. Walker::step gives the logits of all records, (R, 256), as
// a function of the offset, to the threads that `draws()`: cheaper than to wait for the other's.
template <typename Walker> void walk(Walker& walker, const Job& job, int rank) {
  std::vector<int64_t> q(job.clips * job.per);
  for (size_t r = 0; r < q.size(); ++r) q[r] = job.start[r / job.per];
  for (int64_t i = 0; i < job.steps; ++i) {
    const auto logits_of = walker.step(job.position + i, q.data());
    if (!walker.draws()) continue;
    for (int64_t c = 0; c < job.clips; ++c) {
      alignas(kBytes) float logits[kClasses], chosen[kClasses];
      const int64_t told = c * job.per * kClasses;
      for (int64_t k = 0; k < kClasses; k += W) {
        const V own = logits_of(told + k), twin = logits_of(told + (job.per - 1) * kClasses + k);
        store(logits + k, own);
        store(chosen + k, job.per == 1 ? own : twin + job.guidance * (own - twin));
      }
      const int64_t next = draw(chosen, job.uniforms[i * job.all_clips + c], job);
      std::fill_n(q.begin() + c * job.per, job.per, next);
      if (rank) continue;
      const int64_t at = c * job.all_steps + i;
      job.classes[at] = next;
      if (job.log_p) job.log_p[c] += log_likelihood(logits, next);
      if (job.logits) std::copy_n(logits, kClasses, job.logits + at * kClasses);
    }
  }
}

template <typename Walker, typename Model> void run_as(const Model& m, const Job& all) {
  using Shared = typename Walker::Shared;
  std::vector<std::unique_ptr<Shared>> pairs;
  if (all.threads >= 2 * all.clips && m.for_two())
    for (int64_t c = 0; c < all.clips; ++c)
      pairs.push_back(std::make_unique<Shared>(m, all.per, 2));
  const auto part = [&](int64_t clip, int64_t clips) {
    Job job = all;
    job.clips = clips;
    job.state += clip * all.per * m.record, job.start += clip, job.uniforms += clip;
    job.classes += clip * all.all_steps;
    if (job.log_p) job.log_p += clip;
    if (job.logits) job.logits += clip * all.all_steps * kClasses;
    return job;
  };
  const auto go = [&](const Job& job, Shared& shared, int rank) {
    Walker walker(m, job, shared, rank);
    walk(walker, job, rank);
  };
  const int64_t most = all.clips + pairs.size();
  in_threads(std::min(all.threads, most), [&](int64_t rank, int64_t count) {
    if (count == 2 * all.clips) return go(part(rank / 2, 1), *pairs[rank / 2], rank % 2);
    int64_t clip = all.clips * rank / count;
    const int64_t end = all.clips * (rank + 1) / count;
    const int64_t most = kGroup / all.per;
    for (int64_t groups = (end - clip + most - 1) / most; groups; --groups) {
      const Job job = part(clip, (end - clip) / groups);
      Shared alone(m, job.clips * job.per, 1);
      go(job, alone, 0);
      clip += job.clips;
    }
  });
}

// Model: derived from `Weights`, with for_two(), whether it pays that two threads share a clip.
// Walker<T>(model, job, shared, rank): a `Part` that walks over a group of clips; T is the type of
// the matrices, Walker::Shared(model, records, threads) a `Team`.
template <template <typename> class Walker, typename Model>
void run(const Model& m, const Job& job) {
  m.half ? run_as<Walker<uint16_t>>(m, job) : run_as<Walker<float>>(m, job);
}

}  // namespace
