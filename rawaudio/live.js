"use strict";
const get = id => document.getElementById(id), textOf = id => get(id).textContent;
const facts = JSON.parse(textOf("facts")), RATE = facts.rate;
const make = (tag, values = {}) => Object.assign(document.createElement(tag), values);
const FIELDS = ["seed", "temperature", "guidance", "nucleus_p", "top_k", "length"];
const DEFAULTS = {...facts, seed: 0, top_k: 256};
const chosen = {};  // condition -> value
const levels = facts.levels;  // of audio, by class
let clip = {length: 0, made: 0, frames: []}, player = null, worker;

// ---- settings: controls <-> the link's hash -----------------------------------------------------

const MANY = 30;  // values of a condition: a list, not buttons

function makeControls() {
  for (const [name, values] of facts.conditions) {
    const set = make("fieldset"), row = make("div", {className: "row"});
    const many = values.length > MANY;
    const list = make("select", {onchange: () => { choose(name, list.value); showSame(); }});
    for (const value of values)
      (many ? list : row).append(many ? make("option", {textContent: value}) : make("button", {
        type: "button", textContent: value, onclick: () => { choose(name, value); speak(); }}));
    if (many) row.append(list);
    list.ariaLabel = set.dataset.name = name;
    set.append(make("legend", {textContent: name}), row);
    get("conditions").append(set);
  }
  get("guidance").parentElement.hidden = get("other").hidden = !facts.conditions.length;
}

function choose(name, value) {
  chosen[name] = value;
  for (const set of document.querySelectorAll("fieldset")) {
    if (set.dataset.name !== name) continue;
    for (const x of set.querySelectorAll("button")) x.ariaPressed = x.textContent === value;
    for (const x of set.querySelectorAll("select")) x.value = value;
  }
}

function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) {
    get(name).value = given.get(name) ?? DEFAULTS[name];
    if (!get(name).checkValidity() || get(name).value === "") get(name).value = DEFAULTS[name];
  }
  for (const [name, values] of facts.conditions)
    choose(name, values.includes(given.get(name)) ? given.get(name) : values[0]);
  showSame();
}

const settings = () => Object.fromEntries(FIELDS.map(name => [name, Number(get(name).value)]));

function showSame() {  // the link and the Python of what is set
  const now = settings(), hash = new URLSearchParams(now);
  if (!facts.conditions.length) hash.delete("guidance");
  for (const [name] of facts.conditions) hash.set(name, chosen[name]);
  if (`#${hash}` !== location.hash) location.replace(`#${hash}`);  // no entry in the history
  const words = facts.conditions.map(([name]) => `, ${name}=${JSON.stringify(chosen[name])}`);
  get("python").textContent = `rawaudio.live.clip(model, seed=${now.seed}, length=${now.length}`
    + `, temperature=${now.temperature}, nucleus_p=${now.nucleus_p}`
    + (now.top_k < 256 ? `, top_k=${now.top_k}` : "")
    + (facts.conditions.length ? `, guidance=${now.guidance}` : "") + facts.python
    + `${words.join("")})`;
}

function draw(values, counts) {  // by their shares of the training set
  let left = Math.random() * counts.reduce((a, b) => a + b);
  return values.find((_, i) => (left -= counts[i]) < 0) ?? values[0];
}

// ---- a clip -------------------------------------------------------------------------------------

function say(text) { get("status").textContent = text; }

function speak() {
  if (!get("form").reportValidity() || get("speak").disabled) return;
  showSame();
  stop();
  const job = settings(), rows = [[], []];
  let first = 0;  // of the condition's rows; "not told" is the first of them
  for (const [name, values] of facts.conditions) {
    rows[0].push(first + 1 + values.indexOf(chosen[name]));
    rows[1].push(facts.guided.includes(name) ? first : rows[0].at(-1));
    first += 1 + values.length;
  }
  if (!facts.conditions.length) job.guidance = 1;
  clip = {id: clip.id + 1 || 1, made: 0, length: job.length, wav: new Float32Array(job.length),
          name: [...Object.values(chosen), `seed ${job.seed}`].join(", "), asked: performance.now(),
          peak: 0, frames: [], top: -90};
  player = makePlayer(clip);
  get("save").hidden = true;
  get("stop").disabled = false;
  get("end").textContent = `${(clip.length / RATE).toFixed(2)} s`;
  say(`Speaking: ${clip.name}`);
  worker.postMessage({...job, id: clip.id, rows: job.guidance === 1 ? rows.slice(0, 1) : rows});
  requestAnimationFrame(paint);
}

function received({id, classes, made, seconds}) {
  if (id !== clip.id || clip.stopped) return;
  classes.forEach((q, i) => {
    clip.wav[made - classes.length + i] = levels[q];
    clip.peak = Math.max(clip.peak, Math.abs(levels[q]));
  });
  clip.made = made;
  clip.rate = made / seconds;
  player?.more();
  const started = player?.heard ? ` · heard after ${player.heard.toFixed(2)} s` : "";
  get("speed").textContent = `${Math.round(clip.rate).toLocaleString("en")} samples per second: `
    + `${(clip.rate / RATE).toFixed(1)} × real time${started}`;
  if (made === clip.length) finished();
}

function finished() {
  const link = get("save"), seconds = (clip.length / RATE).toFixed(2);
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(wavFile(clip.wav));
  link.download = `${facts.name}-${clip.name.replace(/[^\w-]+/g, "-")}.wav`;
  link.hidden = false;
  for (const [id, what] of [["wave", "Waveform"], ["spectrum", "Spectrogram"]])
    get(id).setAttribute("aria-label", `${what} of ${clip.name}, ${seconds} seconds`);
  say(`Made: ${clip.name}; ${seconds} seconds, ${(clip.rate / RATE).toFixed(1)} times real time`
      + (player ? "" : "; this browser cannot play it, but save it"));
  if (!player) get("stop").disabled = true;
}

function stop() {
  clip.stopped = true;
  player?.stop();
  player = null;
  get("stop").disabled = true;
  worker.postMessage({});
}

function wavFile(wav) {  // 16 bits, as rawaudio.audio.write makes them
  const view = new DataView(new ArrayBuffer(44 + 2 * wav.length));
  const put = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  put(0, "RIFF"); put(8, "WAVEfmt "); put(36, "data");
  const numbers = [[4, 36 + 2 * wav.length], [16, 16], [24, RATE], [28, 2 * RATE],
                   [40, 2 * wav.length]];
  for (const [at, value] of numbers) view.setUint32(at, value, true);
  for (const [at, value] of [[20, 1], [22, 1], [32, 2], [34, 16]]) view.setUint16(at, value, true);
  wav.forEach((x, i) => view.setInt16(44 + 2 * i, Math.min(32767, Math.round(x * 32768)), true));
  return new Blob([view], {type: "audio/wav"});
}

// ---- what is heard ------------------------------------------------------------------------------

let context = null;

// Pieces end where the next begin, to the sample: the context runs at the model's own rate. It
// starts when it will not be overtaken by what it plays.
function makePlayer(clip) {
  try {
    context ??= new AudioContext({sampleRate: RATE});
  } catch {
    return null;  // a rate that the browser has not, or no device: still made, drawn and saved
  }
  context.resume();
  const sources = [];
  let begin = null, sent = 0;
  return {
    heard: 0,
    more() {
      const now = context.currentTime, {made, length, rate} = clip;
      if (begin !== null && begin + sent / RATE < now) begin = null;  // overtaken: it waits again
      if (begin === null) {
        const enough = length - 0.9 * rate / RATE * (length - sent);
        if (made < Math.min(length, Math.max(sent + 0.06 * RATE, enough))) return;
        begin = (Math.ceil((now + 0.05) * RATE) - sent) / RATE;  // whole, or it interpolates
      }
      this.heard ||= (performance.now() - clip.asked) / 1000 + 0.05;
      const buffer = context.createBuffer(1, clip.made - sent, RATE);
      buffer.copyToChannel(clip.wav.subarray(sent, clip.made), 0);
      const source = new AudioBufferSourceNode(context, {buffer});
      source.connect(context.destination);
      source.start(begin + sent / RATE);
      sources.push(source);
      sent = clip.made;
    },
    place: () => begin === null ? sent : (context.currentTime - begin) * RATE,
    stop: () => sources.forEach(source => source.stop()),
  };
}

// ---- what is seen -------------------------------------------------------------------------------

const WINDOW = Math.max(2, Math.round(0.016 * RATE)), RANGE = 80;  // samples, dB; as in page.py
let painted = "";
const N = 4 * 2 ** Math.ceil(Math.log2(WINDOW));
const hann = Array.from({length: WINDOW}, (_, i) => (1 - Math.cos(2 * Math.PI * i / WINDOW)) / 2);
const colours = new Uint32Array(256);  // opaque, as pixels lie in memory
const channels = new Uint8Array(colours.buffer).fill(255);
for (let i = 0; i < 3 * 256; i++)
  channels[Math.floor(i / 3) * 4 + i % 3] = parseInt(facts.colours.slice(2 * i, 2 * i + 2), 16);

function decibel(wav, middle) {  // of frequencies 0 to RATE / 2 around a sample
  const re = new Float32Array(N), im = new Float32Array(N), first = middle - (WINDOW >> 1);
  for (let i = 0; i < WINDOW; i++) {
    let place = 0;  // bits of i reversed, for the transform
    for (let bit = 1; bit < N; bit *= 2) if (i & bit) place += N / 2 / bit;
    re[place] = (wav[first + i] ?? 0) * hann[i];
  }
  for (let half = 1; half < N; half *= 2)
    for (let k = 0; k < half; k++) {
      const c = Math.cos(Math.PI * k / half), s = -Math.sin(Math.PI * k / half);
      for (let a = k; a < N; a += 2 * half) {
        const b = a + half, x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x; im[b] = im[a] - y; re[a] += x; im[a] += y;
      }
    }
  for (let k = 0; k <= N / 2; k++) re[k] = 10 * Math.log10(re[k] ** 2 + im[k] ** 2 + 1e-9);
  return re.subarray(0, N / 2 + 1);
}

function fitted(canvas) {  // to the pixels of the screen
  const scale = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * scale);
  const height = Math.round(canvas.clientHeight * scale);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
  else canvas.getContext("2d").clearRect(0, 0, width, height);
  return canvas.getContext("2d");
}

function paintWave(pen, {width, height}) {
  const peak = 1.1 * Math.max(0.01, clip.peak);
  for (let x = 0; x < width; x++) {
    const from = Math.floor(x / width * clip.length);
    const to = Math.min(clip.made, Math.max(from + 1, Math.floor((x + 1) / width * clip.length)));
    if (from >= to) break;
    let low = 1, high = -1;
    for (let i = from; i < to; i++) {
      low = Math.min(low, clip.wav[i]);
      high = Math.max(high, clip.wav[i]);
    }
    const scale = height / peak / 2;
    pen.fillRect(x, (peak - high) * scale, 1, Math.max(1, (high - low) * scale));
  }
}

function paintSpectrum(pen, {width, height}) {
  const hop = Math.max(1, Math.round(0.004 * RATE), Math.floor(clip.length / 2000));
  const all = Math.floor(clip.length / hop) + 1, done = clip.made === clip.length;
  const frames = clip.frames, bins = N / 2 + 1;
  let first = frames.length;  // to be coloured: the new ones, or all where there is a louder one
  while (frames.length < all && (done || frames.length * hop + WINDOW / 2 < clip.made)) {
    frames.push(decibel(clip.wav, frames.length * hop));
    const top = Math.max(...frames.at(-1));
    if (top > clip.top) { clip.top = top; first = 0; }
  }
  clip.picture ??= make("canvas", {width: all, height: bins});
  if (first < frames.length) {
    const count = frames.length - first, image = new ImageData(count, bins);
    const pixels = new Uint32Array(image.data.buffer), scale = 255 / RANGE;
    for (let x = 0; x < count; x++)
      for (let k = 0, frame = frames[first + x]; k < bins; k++)
        pixels[(bins - 1 - k) * count + x] =
          colours[Math.max(0, Math.round(255 + scale * (frame[k] - clip.top)))];
    clip.picture.getContext("2d").putImageData(image, first, 0);
  }
  pen.drawImage(clip.picture, 0, 0, width, height);
}

function paint() {
  const now = [clip.id, clip.made, get("wave").clientWidth, devicePixelRatio].join();
  if (now !== painted && clip.length) {
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    for (const [id, drawer] of [["wave", paintWave], ["spectrum", paintSpectrum]]) {
      const canvas = get(id), pen = fitted(canvas);
      pen.fillStyle = ink;
      drawer(pen, canvas);
    }
    painted = now;
  }
  const place = player ? player.place() / clip.length : 0;
  get("head").hidden = !(place > 0 && place < 1);
  get("head").style.left = `${100 * place}%`;
  const making = clip.made < clip.length && !clip.stopped;
  if (player && !making && place >= 1) stop();
  if (player || making) requestAnimationFrame(paint);
}

// ---- begin --------------------------------------------------------------------------------------

// A function that returns a vector of 128 bits: browsers without SIMD find it invalid.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65,
              0, 253, 15, 11];

function problem(text) {
  get("status").setAttribute("role", "alert");
  say(text);
  for (const button of document.querySelectorAll(".live button")) button.disabled = true;
}

function begin() {
  if (!globalThis.WebAssembly?.validate(Uint8Array.from(SIMD)) || !globalThis.DecompressionStream)
    return problem("This browser cannot run the model: it lacks WebAssembly with SIMD. Chrome and "
                   + "Edge from 91, Firefox from 113 and Safari from 16.4 have it.");
  worker = new Worker(URL.createObjectURL(new Blob([textOf("worker")])));
  worker.onerror = event => problem(`The engine does not start: ${event.message}`);
  worker.onmessage = ({data}) => {
    if (data.problem) return problem(`The engine has failed: ${data.problem}`);
    if (data.ready) {
      for (const id of ["speak", "other", "surprise"]) get(id).disabled = false;
      return say("Ready");
    }
    received(data);
  };
  const values = facts.conditions.reduce((sum, [, values]) => sum + 1 + values.length, 0);
  worker.postMessage({wasm: textOf("wasm"), weights: textOf("weights"), told: textOf("told"),
                      plan: facts.plan, values});
  say("Loading the model");
}

makeControls();
readLink();
get("end").textContent = `${(facts.length / RATE).toFixed(2)} s`;
get("height").textContent = `0 to ${RATE / 2000} kHz, ${RANGE} dB`;
get("form").onsubmit = event => { event.preventDefault(); speak(); };
get("form").onchange = () => { if (get("form").checkValidity()) showSame(); };
get("stop").onclick = () => { stop(); say("Stopped"); };
get("other").onclick = () => { get("seed").value = Math.floor(Math.random() * 2 ** 32); speak(); };
get("surprise").onclick = () => {
  for (const [name, values, counts] of facts.conditions) choose(name, draw(values, counts));
  get("other").click();
};
get("copy").hidden = !navigator.clipboard;
get("copy").onclick = async () => {
  await navigator.clipboard.writeText(location.href);
  say("Link copied");
};
addEventListener("hashchange", readLink);
addEventListener("resize", paint);
paint();
begin();
