// Sampling loop of SampleRNN on the CPU, see sashimi/engine.h; samplernn.py packs for it.
//
// Of a team of two threads each owns half of every layer's features, and waits for the other before
// it reads all of them. Sums are never divided.
#include "../sashimi/engine.h"

namespace {

struct Recurrent {
  Matrix input, past;  // H -> 3 H: reset, update, candidate
  int64_t hidden;      // where in a clip's record: (H)
};

struct Tier {
  int64_t span, places;  // samples per frame; places that it tells something
  Matrix expand, upsample;
  std::vector<Recurrent> layers;
  int64_t told, above;  // in a clip's record: (H), what conditions add; (places, H)
};

struct Model : Weights {
  int64_t wide, taps, period;
  const float *values, *table;  // (256), what tiers see of a class; (taps, 256, H)
  int64_t tokens;               // in a clip's record: (period), the last classes
  std::vector<Tier> tiers;      // the finest first
  Matrix hidden, output;

  // plan: H, layers of each tier, float16, tiers, and their frame sizes
  Model(const int64_t* plan, const float* weights)
      : Weights(weights, plan[2]), wide(padded(plan[0])), taps(plan[4]), period(1), tiers(plan[3]) {
    values = take(kClasses);
    table = take(taps * kClasses * wide);
    for (size_t i = 0; i < tiers.size(); ++i) {
      Tier& t = tiers[i];
      t.places = plan[4 + i], t.span = period *= t.places;
      t.expand = matrix(wide, t.span);
      for (int64_t layer = 0; layer < plan[1]; ++layer) {
        const Matrix input = matrix(3 * wide, wide), past = matrix(3 * wide, wide);
        t.layers.push_back({input, past, reserve(wide)});
      }
      t.upsample = matrix(t.places * wide, wide);
      t.told = reserve(wide), t.above = reserve(t.places * wide);
    }
    tokens = reserve(padded(period));
    hidden = matrix(wide, wide), output = matrix(kClasses, wide);
  }
  bool for_two() const { return 4 * (at - start) > kLarge; }
};

struct Sharing : Team {
  float *x, *y, *logits;  // a row per record; layers go from x to y and back

  Sharing(const Model& m, int64_t records, int size) : Team(size) {
    x = memory.make(records * m.wide), y = memory.make(records * m.wide);
    logits = memory.make(records * kClasses);
  }
};

template <typename T> class Walker : public Part<Model, Sharing> {
 public:
  Walker(const Model& m, const Job& job, Shared& team, int rank)
      : Part(m, job, team, rank), x(team.x), y(team.y) {
    frame = memory.make(records * padded(m.period));
    now = memory.make(records * 3 * m.wide), before = memory.make(records * 3 * m.wide);
    slots.resize(records * m.period);
    for (int64_t c = 0; c < records; ++c)
      for (int64_t k = 0; k < m.period; ++k)
        slots[c * m.period + k] = int64_t(record(c)[m.tokens + k]);
  }

  // Classes -> logits of all records; the order of SampleRNN.step.
  auto step(int64_t t, const int64_t* q) {
    const int64_t newest = (t + m.period - 1) % m.period;
    for (int64_t c = 0; c < records; ++c) slots[c * m.period + newest] = q[c];
    int64_t above = -1;  // where in a record the coarser tier's words for the present frame are
    for (size_t i = m.tiers.size(); i--;) {
      const Tier& tier = m.tiers[i];
      if (t % tier.span == 0) run(tier, t, above);
      above = tier.above + t % tier.span / (tier.span / tier.places) * m.wide;
    }
    own([&](int64_t c, int64_t at, int64_t k) {
      V sum = load(record(c) + above + k);
      for (int64_t tap = 0; tap < m.taps; ++tap) {
        const int64_t slot = (t + m.period - m.taps + tap) % m.period;
        const int64_t row = tap * kClasses + slots[c * m.period + slot];
        sum += load(m.table + row * m.wide + k);
      }
      store(x + at, relu(sum));
    });
    sync();
    if (rank == 0)
      for (int64_t c = 0; c < records; ++c) record(c)[m.tokens + newest] = float(q[c]);
    own_rows(m.hidden, x, m.wide, y);
    own([&](int64_t, int64_t at, int64_t) { store(y + at, relu(load(y + at))); });
    sync();
    const int64_t half = kClasses / W / 2, first = rank ? half : 0;
    product<T>(m.output, first, team.size == 2 && !rank ? half : kClasses / W, records, y, m.wide,
               team.logits + first * W, kClasses);
    sync();
    return [this](int64_t at) { return load(team.logits + at); };
  }

 private:
  float *x, *y, *frame, *now, *before;  // a row per record; the gates' shares of both
  std::vector<int64_t> slots;           // the last classes, (records, period)

  static V relu(V v) { return v > 0.0f ? v : V{}; }
  // The vectors of features that this thread owns.
  int64_t begin() const { return rank ? m.wide / W / 2 : 0; }
  int64_t end() const { return team.size == 2 && !rank ? m.wide / W / 2 : m.wide / W; }

  // f(record, offset into the rows of all records, offset into a row)
  template <typename F> void own(F f) const {
    for (int64_t c = 0; c < records; ++c)
      for (int64_t k = begin() * W; k < end() * W; k += W) f(c, c * m.wide + k, k);
  }

  // to = W x + bias of all records: the features that this thread owns, at every place of the rows.
  void own_rows(const Matrix& w, const float* x, int64_t x_stride, float* to,
                int64_t to_stride = 0) const {
    for (int64_t place = 0; place < w.rows; place += m.wide) {
      const int64_t first = place / W + begin();
      product<T>(w, first, place / W + end(), records, x, x_stride, to + first * W,
                 to_stride ? to_stride : w.rows);
    }
  }

  void run(const Tier& tier, int64_t t, int64_t above) {
    const int64_t first = (t + m.period - tier.span) % m.period, row = tier.expand.columns;
    for (int64_t c = 0; c < records; ++c)
      for (int64_t k = 0; k < tier.span; ++k)
        frame[c * row + k] = m.values[slots[c * m.period + first + k]];
    own_rows(tier.expand, frame, row, x);
    own([&](int64_t c, int64_t at, int64_t k) {
      V u = load(x + at) + load(record(c) + tier.told + k);
      if (above >= 0) u += load(record(c) + above + k);
      store(x + at, u);
    });
    sync();
    for (const Recurrent& layer : tier.layers) {
      own_rows(layer.input, x, m.wide, now);
      own_rows(layer.past, record(0) + layer.hidden, m.record, before);
      own([&](int64_t c, int64_t at, int64_t k) {
        const float *a = now + 3 * c * m.wide + k, *b = before + 3 * c * m.wide + k;
        const auto both = [&](int64_t at) { return load(a + at) + load(b + at); };
        const V reset = sigmoid(both(0)), update = sigmoid(both(m.wide));
        const V old = load(record(c) + layer.hidden + k);
        const V made = hyperbolic_tangent(load(a + 2 * m.wide) + reset * load(b + 2 * m.wide));
        store(y + at, made + update * (old - made));
      });
      sync();
      own([&](int64_t c, int64_t at, int64_t k) {  // now that the other has read the old ones
        store(record(c) + layer.hidden + k, load(y + at));
      });
      std::swap(x, y);
    }
    own_rows(tier.upsample, x, m.wide, record(0) + tier.above, m.record);
    std::swap(x, y);  // the other may still read
  }
};

}  // namespace

extern "C" {

int64_t engine_lanes() { return W; }
void engine_sizes(const int64_t* plan, int64_t* sizes) { Model(plan, nullptr).sizes(sizes); }
void engine_run(const Job* job) { run<Walker>(Model(job->plan, job->weights), *job); }
}
