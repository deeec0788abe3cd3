// Sampling loop of WaveNet on the CPU, see sashimi/engine.h; wavenet.py packs for it.
//
// The layers are small matrices, one after another: the first thread of a team walks them. What
// follows, nine tenths of the weights, both share.
#include "../sashimi/engine.h"

namespace {

struct Layer {
  Matrix gates, residual;  // taps C -> 2 D, filter and gate; D -> C
  int64_t queue, told;     // where in a clip's record: (inputs, C); (2 D), what conditions add
  int64_t inputs, dilation;
};

struct Model : Weights {
  int64_t taps, channels, dilated;
  bool told;           // the model has conditions
  const float* table;  // (256, C)
  std::vector<Layer> layers;
  Matrix skip, end, last;

  // plan: taps, features: C, D, of the skips and of the end; float16, conditions, layers, and
  // their dilations
  Model(const int64_t* plan, const float* weights)
      : Weights(weights, plan[5]), taps(plan[0]), channels(padded(plan[1])),
        dilated(padded(plan[2])), told(plan[6]), layers(plan[7]) {
    table = take(kClasses * channels);
    for (size_t i = 0; i < layers.size(); ++i) {
      Layer& l = layers[i];
      l.dilation = plan[8 + i], l.inputs = (taps - 1) * l.dilation;
      l.gates = matrix(2 * dilated, taps * channels);
      l.residual = matrix(channels, dilated);
      l.queue = reserve(l.inputs * channels);
      l.told = told ? reserve(2 * dilated) : 0;
    }
    skip = matrix(padded(plan[3]), layers.size() * dilated);
    end = matrix(padded(plan[4]), skip.rows);
    last = matrix(kClasses, end.rows);
  }
  bool for_two() const { return 4 * (at - start) > kLarge; }
};

struct Sharing : Team {
  float *z, *skip, *end, *logits;  // of all records: results of all layers, and what follows

  Sharing(const Model& m, int64_t records, int size) : Team(size) {
    z = memory.make(records * m.skip.columns);
    skip = memory.make(records * m.skip.rows), end = memory.make(records * m.end.rows);
    logits = memory.make(records * kClasses);
  }
};

template <typename T> class Walker : public Part<Model, Sharing> {
 public:
  Walker(const Model& m, const Job& job, Shared& team, int rank) : Part(m, job, team, rank) {
    h = memory.make(records * m.channels), r = memory.make(records * m.channels);
    window = memory.make(records * m.taps * m.channels);
    gates = memory.make(records * 2 * m.dilated);
  }

  // Classes -> logits of all records.
  auto step(int64_t position, const int64_t* q) {
    if (rank == 0) {
      for (int64_t c = 0; c < records; ++c)
        std::copy_n(m.table + q[c] * m.channels, m.channels, h + c * m.channels);
      for (size_t i = 0; i < m.layers.size(); ++i)
        layer(m.layers[i], position, team.z + i * m.dilated, i + 1 < m.layers.size());
    }
    sync();
    multiply(m.skip, team.z, team.skip, true);
    multiply(m.end, team.skip, team.end, true);
    multiply(m.last, team.end, team.logits, false);
    return [this](int64_t at) { return load(team.logits + at); };
  }

 private:
  float *h, *r, *window, *gates;  // a row per record: input, residual, the inputs of all taps

  // h, what the layer sees, becomes what the next one sees, z its result.
  void layer(const Layer& l, int64_t position, float* z, bool goes_on) {
    const int64_t wide = m.channels, row = m.taps * wide, z_row = m.skip.columns;
    for (int64_t c = 0; c < records; ++c) {
      float *queue = record(c) + l.queue, *to = window + c * row;
      for (int64_t tap = 0; tap + 1 < m.taps; ++tap, to += wide)  // the oldest first
        std::copy_n(queue + (position + tap * l.dilation) % l.inputs * wide, wide, to);
      std::copy_n(h + c * wide, wide, to);
      std::copy_n(h + c * wide, wide, queue + position % l.inputs * wide);
    }
    product<T>(l.gates, 0, l.gates.rows / W, records, window, row, gates, l.gates.rows);
    for (int64_t c = 0; c < records; ++c) {
      const float *a = gates + c * l.gates.rows, *told = record(c) + l.told;
      for (int64_t k = 0; k < m.dilated; k += W) {
        V filter = load(a + k), gate = load(a + m.dilated + k);
        if (m.told) filter += load(told + k), gate += load(told + m.dilated + k);
        store(z + c * z_row + k, hyperbolic_tangent(filter) * sigmoid(gate));
      }
    }
    if (!goes_on) return;
    product<T>(l.residual, 0, wide / W, records, z, z_row, r, wide);
    for (int64_t k = 0; k < records * wide; k += W) store(h + k, load(h + k) + load(r + k));
  }

  // y = W x + bias of all records, cut off below 0 if `relu`: this thread's half of the rows.
  void multiply(const Matrix& w, const float* x, float* y, bool relu) {
    const int64_t vectors = w.rows / W, first = rank ? vectors / 2 : 0;
    const int64_t end = team.size == 2 && !rank ? vectors / 2 : vectors;
    product<T>(w, first, end, records, x, w.columns, y + first * W, w.rows);
    for (int64_t c = 0; relu && c < records; ++c)
      for (int64_t k = c * w.rows + first * W; k < c * w.rows + end * W; k += W) {
        const V v = load(y + k);
        store(y + k, v > 0.0f ? v : V{});
      }
    sync();
  }
};

}  // namespace

extern "C" {

int64_t engine_lanes() { return W; }
void engine_sizes(const int64_t* plan, int64_t* sizes) { Model(plan, nullptr).sizes(sizes); }
void engine_run(const Job* job) { run<Walker>(Model(job->plan, job->weights), *job); }
}
