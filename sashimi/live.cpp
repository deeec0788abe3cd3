// The step engine for a page: realtime.cpp on one thread, and the uniforms of rawaudio/seeds.py.
//
// Compiled to WebAssembly it serves rawaudio/live.worker.js, compiled natively rawaudio/live.py.
// Vectors have 16 bytes in both and nothing is contracted to fused operations, so that both make
// the same bits.
#define SASHIMI_PORTABLE
#include "realtime.cpp"

#include <cstdlib>

#ifdef __wasm__
#define EXPORT(name) __attribute__((export_name(#name))) name
#else
#define EXPORT(name) name
#endif

namespace {

// Number `position` of the stream: Philox4x32-10 (Salmon et al. 2011), see seeds.py.
float uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {uint32_t(position / 4), uint32_t(position / 4 >> 32)};
  uint32_t k0 = seed, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c[0] = uint32_t(b >> 32) ^ c[1] ^ k0, c[1] = b;
    c[2] = uint32_t(a >> 32) ^ c[3] ^ k1, c[3] = a;
  }
  return (c[position % 4] >> 8) * 0x1p-24f;
}

struct Clip {
  Job job;
  uint64_t seed;
  int64_t last = 128;  // class
  Memory memory;
};

// Puts into a record what conditions add to the inputs of all S4 layers, in their order; returns
// the end of it.
const float* tell(const Model& m, const float* constants, float* record) {
  const auto put = [&](const Tier& t, const std::vector<Block>& blocks) {
    for (const Block& b : blocks) {
      if (!b.is_s4) continue;
      std::copy_n(constants, t.vectors * W, record + b.told);
      constants += t.vectors * W;
    }
  };
  for (const Tier& t : m.tiers) put(t, t.down);
  for (auto t = m.tiers.rbegin(); t != m.tiers.rend(); ++t) put(*t, t->up);
  return constants;
}

}  // namespace

extern "C" {

void* EXPORT(live_memory)(int32_t bytes) { return std::aligned_alloc(kBytes, bytes); }

// A clip from silence, see Job. constants: of the clip and, where per is 2, of its twin.
Clip* EXPORT(live_start)(const int64_t* plan, const float* weights, const float* constants,
                         int32_t per, double seed, float guidance, float temperature,
                         int32_t top_k, float nucleus) {
  const Model m(plan, weights);
  Clip* clip = new Clip{{plan, weights}, uint64_t(seed)};
  Job& job = clip->job;
  job.state = clip->memory.make(per * m.record);
  job.clips = job.all_clips = job.threads = 1, job.per = per, job.top_k = top_k;
  job.guidance = guidance, job.temperature = temperature, job.nucleus = nucleus;
  for (int64_t i = 0; m.told && i < per; ++i)
    constants = tell(m, constants, job.state + i * m.record);
  return clip;
}

// Its next classes.
void EXPORT(live_more)(Clip* clip, int32_t steps, uint8_t* out) {
  Job& job = clip->job;
  std::vector<float> uniforms(steps);
  std::vector<int64_t> classes(steps);
  for (int32_t i = 0; i < steps; ++i) uniforms[i] = uniform(clip->seed, job.position + i);
  job.start = &clip->last, job.uniforms = uniforms.data(), job.classes = classes.data();
  job.steps = job.all_steps = steps;
  engine_run(&job);
  std::copy(classes.begin(), classes.end(), out);
  job.position += steps, clip->last = classes.back();
}

void EXPORT(live_end)(Clip* clip) { delete clip; }
}
