// Makes clips, away from the page. It is given {wasm, weights, told, plan, values} and answers
// {ready}; then jobs, of which the next one ends the one before: {id, length, seed, temperature,
// top_k, nucleus_p, guidance, rows}, answered with pieces {id, classes, made, seconds}.
"use strict";
const PIECE = 160;  // samples
const turn = new MessageChannel();  // lets messages in between, without the delay of a timer
let engine, plan, weights, out, constants, told, latest, clip = 0;

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function kept(bytes) {  // in the engine's memory
  const at = engine.live_memory(64 * Math.ceil((bytes.length + 1) / 64));
  if (!at) throw new Error("this model needs more memory than the browser gives");
  new Uint8Array(engine.memory.buffer).set(bytes, at);
  return at;
}

async function load(data) {
  const module = await WebAssembly.compile(await unpacked(data.wasm)), imports = {};
  for (const {module: from, name} of WebAssembly.Module.imports(module))
    (imports[from] ??= {})[name] = () => { throw new Error(`the engine calls ${name}`); };
  engine = (await WebAssembly.instantiate(module, imports)).exports;
  engine._initialize();
  plan = kept(new Uint8Array(BigInt64Array.from(data.plan, BigInt).buffer));
  weights = kept(await unpacked(data.weights));
  out = kept(new Uint8Array(PIECE));
  told = new Float32Array((await unpacked(data.told)).buffer);
  const width = data.values ? told.length / data.values : 0;
  told = Array.from({length: data.values}, (_, i) => told.subarray(i * width, (i + 1) * width));
  constants = kept(new Uint8Array(2 * 4 * width));
}

// rows: those of `told` that a clip is the sum of, and those of its twin, which is told nothing
function start(job) {
  job.rows.forEach((rows, i) => {
    const width = told.length && told[0].length;
    const sum = new Float32Array(engine.memory.buffer, constants + 4 * i * width, width).fill(0);
    for (const row of rows) told[row].forEach((x, k) => { sum[k] += x; });
  });
  return engine.live_start(plan, weights, constants, job.rows.length, job.seed, job.guidance,
                           job.temperature, job.top_k, job.nucleus_p);
}

async function make(job) {
  latest = job;
  if (!job.length) return;
  const begin = performance.now();
  engine.live_end(clip);
  clip = start(job);
  for (let made = 0; made < job.length && latest === job;) {
    const count = Math.min(PIECE, job.length - made);
    engine.live_more(clip, count, out);
    made += count;
    const classes = new Uint8Array(engine.memory.buffer, out, count).slice();
    postMessage({id: job.id, classes, made, seconds: (performance.now() - begin) / 1000});
    await new Promise(go => { turn.port1.onmessage = go; turn.port2.postMessage(0); });
  }
}

// Browsers compile well only what has run for a while: clips that nobody hears, until a job comes.
async function warm() {
  const job = {id: 0, length: 3000, seed: 0, guidance: 1, temperature: 1, top_k: 256, nucleus_p: 1};
  for (const rows of told.length ? [[[0]], [[0], [0]]] : [[[]]])
    if (!latest?.id) await make({...job, rows});
}

onmessage = async ({data}) => {
  try {
    if (!data.wasm) return await make(data);
    await load(data);
    postMessage({ready: true});
    await warm();
  } catch (error) {
    postMessage({problem: String(error)});
  }
};
