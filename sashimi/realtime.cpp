// Sampling loop of SashimiAR on the CPU: one call makes a block of samples of every clip.
//
// A sample is: embedding of the previous class, all tiers that are due, logits, one class drawn.
// Of a team of two threads, in the tiers that are large each owns half of every layer's features,
// the others are left to the first thread. Every sum over features is one over the first half plus
// one over the second.
#include "engine.h"

namespace {

// ---- the model: pointers into one piece of memory ---------------------------------------------

struct Halves {  // of the columns; the bias is the first one's
  Matrix half[2];
};

struct Block {  // x + layer(norm(x)); the layer is S4 or feed-forward
  const float *norm_weight, *norm_bias;
  bool is_s4;
  const float *a_c, *p_b;                       // (H/W, M, 4, W); (H/W, M, 3, W), tied (M, 3)
  const float *drive, *feed_s, *feed_u, *skip;  // (H)
  int64_t state, sum;                           // where in a clip's record: (H/W, M, 2, W); (H)
  int64_t told = -1;                            // the same: (H), what conditions add to the input
  Matrix inner = {};                            // feed-forward: H -> ff H
  Halves output;                                // S4: H -> 2 H or H; feed-forward: ff H -> H
};

struct Tier {
  int64_t width, vectors, stride, pool;  // width: features, without padding
  std::vector<Block> down, up;           // the centre's blocks are the coarsest tier's `up`
  Halves down_pool, up_pool;
  int64_t waiting, coming;  // in a clip's record: (pool, H) to be pooled, (pool, H) from above
  V inside = {};            // 1 in the lanes of the last vector that are features, 0 in its padding
};

struct Model : Weights {
  int64_t states;              // pairs per feature
  bool unet, glu, tied, told;  // told: the model has conditions
  const float *embedding, *norm_weight, *norm_bias;
  std::vector<Tier> tiers;
  int64_t large;  // the first tier of more than kLarge bytes; the coarser ones are no smaller
  Halves head;

  Halves halves(int64_t rows, int64_t columns) {
    const int64_t middle = (columns + W - 1) / W / 2 * W;
    return {matrix(rows, middle), matrix(rows, columns - middle)};
  }

  std::vector<Block> blocks(const Tier& t, int64_t layers, int64_t ff) {
    const int64_t h = t.vectors * W;
    std::vector<Block> out;
    for (int64_t i = 0; i < layers; ++i) {
      Block s4 = {take(h), take(h), true};
      s4.a_c = take(4 * h * states);
      s4.p_b = take(3 * states * (tied ? 1 : h));
      for (const float** x : {&s4.drive, &s4.feed_s, &s4.feed_u, &s4.skip}) *x = take(h);
      s4.state = reserve(2 * h * states);
      s4.sum = reserve(h);
      if (told) s4.told = reserve(h);
      s4.output = halves(glu ? 2 * h : h, t.width);
      out.push_back(s4);
      if (ff == 0) continue;
      Block block = {take(h), take(h), false};
      block.inner = matrix((ff * t.width + W - 1) / W * W, t.width);
      block.output = halves(h, ff * t.width);
      out.push_back(block);
    }
    return out;
  }

  int64_t bytes(const Tier& t) const {  // that a step of the tier reads, nearly
    int64_t weights = 0, floats = 0;
    for (const auto* blocks : {&t.down, &t.up})
      for (const Block& b : *blocks) {
        for (const Matrix& w : {b.inner, b.output.half[0], b.output.half[1]})
          weights += w.rows * w.columns;
        if (b.is_s4) floats += 6 * t.width * states;
      }
    return weights * (half ? 2 : 4) + floats * 4;
  }

  // plan: d_model, expand, ff, pairs of states, unet, glu, tied, float16, conditions, pools, pool
  // and then layers of each tier
  Model(const int64_t* plan, const float* weights) : Weights(weights, plan[7]) {
    const int64_t ff = plan[2], pools = plan[9], *layers = plan + 10 + pools;
    states = plan[3], unet = plan[4], glu = plan[5], tied = plan[6], told = plan[8];
    int64_t width = plan[0], stride = 1;
    for (int64_t i = 0; i <= pools; ++i) {
      Tier t = {width, (width + W - 1) / W, stride, i < pools ? plan[10 + i] : 1};
      for (int64_t k = 0; k < W; ++k) t.inside[k] = (t.vectors - 1) * W + k < width;
      tiers.push_back(t);
      stride *= t.pool, width *= plan[1];
    }
    embedding = take(kClasses * tiers[0].vectors * W);
    for (int64_t i = 0; i < pools; ++i) {
      Tier &fine = tiers[i], &coarse = tiers[i + 1];
      if (unet) fine.down = blocks(fine, layers[i], ff);
      fine.down_pool = halves(coarse.vectors * W, fine.pool * fine.vectors * W);
    }
    tiers[pools].up = blocks(tiers[pools], layers[pools], ff);
    for (int64_t i = pools - 1; i >= 0; --i) {
      Tier &fine = tiers[i], &coarse = tiers[i + 1];
      fine.up_pool = halves(fine.pool * fine.vectors * W, coarse.width);
      fine.up = blocks(fine, layers[i], ff);
    }
    for (int64_t i = 0; i < pools; ++i) {
      tiers[i].waiting = reserve(tiers[i].pool * tiers[i].vectors * W);
      tiers[i].coming = reserve(tiers[i].pool * tiers[i].vectors * W);
    }
    large = pools + 1;
    while (large && bytes(tiers[large - 1]) > kLarge) --large;
    norm_weight = take(tiers[0].vectors * W), norm_bias = take(tiers[0].vectors * W);
    head = halves(kClasses, tiers[0].width);
  }
  bool for_two() const { return large < int64_t(tiers.size()); }
};

struct Sharing : Team {
  float* sums[3][2];  // [product: joint even, joint odd, alone][half of its columns]: clips x rows

  Sharing(const Model& m, int64_t clips, int size) : Team(size) {
    int64_t rows = kClasses;
    for (const Tier& t : m.tiers) {
      const int64_t row = t.vectors * W;
      rows = std::max({rows, t.pool * row, 2 * row});
    }
    for (auto& product : sums)
      for (float*& half : product) half = memory.make(clips * rows);
  }
};

template <typename T> class Walker : public Part<Model, Sharing> {
 public:
  Walker(const Model& m, const Job& job, Shared& team, int rank) : Part(m, job, team, rank) {
    int64_t widest = 0, inner = 0;
    for (const Tier& t : m.tiers) {
      const int64_t row = t.vectors * W;
      x.push_back(memory.make(records * row));
      entry.push_back(memory.make(records * row));
      skips.push_back(memory.make(records * row * (t.down.size() + 1)));
      widest = std::max(widest, row);
      for (const Block& b : t.up) inner = std::max({inner, row, b.inner.rows});
    }
    u = memory.make(records * widest);
    hidden = memory.make(records * inner);
  }

  bool draws() { return joins(0); }

  struct Sums {  // the two halves of a product
    const float *first, *second;
    V operator()(int64_t at) const { return load(first + at) + load(second + at); }
  };

  // Classes -> logits of all records; the order of Sashimi.step.
  Sums step(int64_t position, const int64_t* q) {
    const int64_t pools = m.tiers.size() - 1;
    const auto index = [&](int64_t i) { return position / m.tiers[i].stride % m.tiers[i].pool; };
    int64_t due = 0;  // coarsest tier to run
    while (due < pools && index(due) + 1 == m.tiers[due].pool) ++due;

    if (joins(0))
      all(m.tiers[0].vectors, [&](int64_t c, int64_t at, int64_t lane) {
        store(x[0] + at, load(m.embedding + q[c] * m.tiers[0].vectors * W + lane));
      });
    for (int64_t i = 0; i < pools && i <= due; ++i) {
      const Tier& t = m.tiers[i];
      const int64_t row = t.vectors * W;
      float *skip = skips[i], *waiting = job.state + t.waiting;
      if (joins(i)) {
        set(t.vectors, Row{x[i]}, skip);
        for (const Block& b : t.down) {
          block(b, t, x[i]);
          set(t.vectors, Row{x[i]}, skip += records * row);
        }
        own(t.vectors, [&](int64_t c, int64_t at, int64_t lane) {
          store(waiting + c * m.record + index(i) * row + lane, load(x[i] + at));
        });
      }
      if (i < due && joins(i + 1)) {
        sync();
        set(m.tiers[i + 1].vectors, multiply(t.down_pool, waiting, m.record), x[i + 1]);
      }
    }
    if (due == pools && joins(pools)) {
      const Tier& t = m.tiers[pools];
      set(t.vectors, Row{x[pools]}, entry[pools]);
      for (const Block& b : t.up) block(b, t, x[pools]);
      add(t.vectors, Row{entry[pools]}, x[pools]);
    }
    for (int64_t i = std::min(due, pools - 1); i >= 0; --i) {
      const Tier& t = m.tiers[i];
      const int64_t row = t.vectors * W, rows = records * row;
      float *skip = skips[i] + t.down.size() * rows, *coming = job.state + t.coming;
      if (joins(i)) {
        all(t.vectors, [&](int64_t c, int64_t at, int64_t lane) {
          store(x[i] + at, load(coming + c * m.record + index(i) * row + lane) + load(skip + at));
        });
        set(t.vectors, Row{x[i]}, entry[i]);
      }
      if (i < due && joins(i + 1)) {  // what the coarse tier has just made serves the next samples
        const Sums y = multiply(t.up_pool, x[i + 1], m.tiers[i + 1].vectors * W);
        if (joins(i))
          own(t.pool * t.vectors, [&](int64_t c, int64_t at, int64_t lane) {
            store(coming + c * m.record + lane, y(at));
          });
      }
      if (!joins(i)) break;
      for (const Block& b : t.up) {
        block(b, t, x[i]);
        if (m.unet) add(t.vectors, Row{skip -= rows}, x[i]);
      }
      if (!m.unet) add(t.vectors, Row{entry[i]}, x[i]);
    }
    if (!joins(0)) return {};
    norm(m.tiers[0], m.norm_weight, m.norm_bias, x[0]);
    return multiply(m.head, u, m.tiers[0].vectors * W);
  }

 private:
  int parity = 0;
  bool together;  // both threads of the team are at work
  // A row per record; x, entry and skips for every tier. The halves of `hidden` that are the other
  // thread's stay empty, the rest both threads compute for themselves.
  std::vector<float*> x, entry, skips;
  float *u, *hidden;

  // Whether this thread has a part in the tier; it must ask before it does anything there.
  bool joins(int64_t tier) {
    together = team.size == 2 && tier >= m.large;
    return rank == 0 || together;
  }
  void sync() {
    if (together) team.sync(rank);
  }
  // The vectors of features that this thread owns.
  int64_t begin(int64_t vectors) const { return rank ? vectors / 2 : 0; }
  int64_t end(int64_t vectors) const { return together && !rank ? vectors / 2 : vectors; }

  // f(record, offset into the rows of all records, offset into a row)
  template <typename F> void each(int64_t first, int64_t last, int64_t vectors, F f) const {
    for (int64_t c = 0; c < records; ++c)
      for (int64_t v = first; v < last; ++v) f(c, (c * vectors + v) * W, v * W);
  }
  template <typename F> void all(int64_t vectors, F f) const { each(0, vectors, vectors, f); }
  template <typename F> void own(int64_t vectors, F f) const {
    each(begin(vectors), end(vectors), vectors, f);
  }

  struct Row {
    const float* x;
    V operator()(int64_t at) const { return load(x + at); }
  };
  // W x + bias of all records: this thread's half of the columns, and the other's.
  Sums multiply(const Halves& w, const float* x, int64_t x_stride) {
    float** sums = team.sums[together ? parity ^= 1 : 2];  // the last ones may still be read
    const int64_t middle = w.half[0].columns, rows = w.half[0].rows;
    for (int i = 0; i < 2; ++i)
      if (i == rank || !together)
        product<T>(w.half[i], 0, rows / W, records, x + i * middle, x_stride, sums[i], rows);
    sync();
    return {sums[0], sums[1]};
  }

  // u = norm(x), and what the record's conditions add to it, where they do.
  void norm(const Tier& t, const float* weight, const float* bias, const float* x,
            int64_t told = -1) {
    const int64_t row = t.vectors * W;
    for (int64_t c = 0; c < records; ++c, x += row) {
      V sum = {}, squares = {};
      for (int64_t i = 0; i < row; i += W) sum += load(x + i);
      const float mean = sum_of(sum) / t.width;
      for (int64_t i = 0; i < row; i += W) {
        V d = load(x + i) - mean;
        if (i + W == row) d *= t.inside;
        squares += d * d;
      }
      const float scale = 1 / std::sqrt(sum_of(squares) / t.width + 1e-5f);
      for (int64_t i = 0; i < row; i += W)
        store(u + c * row + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
      if (told < 0) continue;
      const float* extra = record(c) + told;
      for (int64_t i = 0; i < row; i += W)
        store(u + c * row + i, load(u + c * row + i) + load(extra + i));
    }
  }

  // One sweep over the states of a vector of features: the next state, y and s; see realtime.py.
  template <bool kTied> V sweep(const Block& b, int64_t v, V input, float* record) {
    const int64_t states = v * m.states, stride = kTied ? 1 : W;
    const float *ac = b.a_c + states * 4 * W, *pb = b.p_b + (kTied ? 0 : states * 3 * W);
    float *x = record + b.state + states * 2 * W, *sum = record + b.sum + v * W;
    const int64_t at = v * W;
    const V drive = load(b.drive + at) * input;
    const V feed = load(b.feed_s + at) * load(sum) + load(b.feed_u + at) * input;
    V y_re = load(b.skip + at) * input, y_im = {}, s = {};
    const auto shared = [](const float* x) { return kTied ? splat(*x) : load(x); };
    for (int64_t n = 0; n < m.states; ++n, ac += 4 * W, x += 2 * W, pb += 3 * stride) {
      const V a_re = load(ac), a_im = load(ac + W), p = shared(pb);
      const V k_re = shared(pb + stride) * drive + p * feed, k_im = shared(pb + 2 * stride) * drive;
      const V x_re = load(x) + k_re, x_im = load(x + W) + k_im;
      const V re = a_re * x_re - (a_im * x_im - k_re), im = a_re * x_im + (a_im * x_re + k_im);
      store(x, re);
      store(x + W, im);
      fetch(x + m.states * 2 * W, 2 * W);  // of the sweep after this one
      y_re += load(ac + 2 * W) * re;
      y_im += load(ac + 3 * W) * im;
      s += p * (re + a_re * re - a_im * im);
    }
    store(sum, s);
    return y_re + y_im;
  }

  void block(const Block& b, const Tier& t, float* x) {
    const int64_t n = t.vectors, row = n * W, inner = b.inner.rows;
    norm(t, b.norm_weight, b.norm_bias, x, b.told);
    if (b.is_s4) {
      own(n, [&](int64_t c, int64_t at, int64_t lane) {
        const V y = m.tied ? sweep<true>(b, lane / W, load(u + at), record(c))
                           : sweep<false>(b, lane / W, load(u + at), record(c));
        store(hidden + at, gelu(y));
      });
      const Sums y = multiply(b.output, hidden, row);
      if (m.glu)
        all(n, [&](int64_t c, int64_t at, int64_t) {
          store(x + at, load(x + at) + y(at + c * row) * sigmoid(y(at + c * row + row)));
        });
      else
        add(n, y, x);
    } else {
      const int64_t k = inner / W;
      product<T>(b.inner, begin(k), end(k), records, u, row, hidden + begin(k) * W, inner);
      own(k, [&](int64_t, int64_t at, int64_t) { store(hidden + at, gelu(load(hidden + at))); });
      add(n, multiply(b.output, hidden, inner), x);
    }
  }

  template <typename F> void add(int64_t vectors, const F& y, float* x) {
    all(vectors, [&](int64_t, int64_t at, int64_t) { store(x + at, load(x + at) + y(at)); });
  }
  template <typename F> void set(int64_t vectors, const F& y, float* x) {
    all(vectors, [&](int64_t, int64_t at, int64_t) { store(x + at, y(at)); });
  }
};

}  // namespace

extern "C" {

int64_t engine_lanes() { return W; }
void engine_sizes(const int64_t* plan, int64_t* sizes) { Model(plan, nullptr).sizes(sizes); }
void engine_run(const Job* job) { run<Walker>(Model(job->plan, job->weights), *job); }
}
