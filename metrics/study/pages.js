// No template literals here: a service would take what is in their braces for a name of its own.
const study = document.getElementById("study"), check = document.getElementById("check");
const who = document.querySelector("#who input"), left = document.getElementById("left");
const answered = question => question.querySelector("input:checked");

// A service brings a form of its own around the page, with its button. Else the page saves a file.
let form = study.closest("form, crowd-form");
const saves = !form;
if (saves) {
  form = document.createElement("form");
  form.noValidate = true;  // the script says what is missing
  study.replaceWith(form);
  form.append(study);
  who.value = new URLSearchParams(location.search).get("listener") || "";
} else {
  document.getElementById("who").remove();
  document.getElementById("save").remove();
}

// ---- headphones: six times three tones of 200 Hz, one 6 dB quieter, another in antiphase
const PASSED = 5;  // right answers: later pages in this browser do not ask again
let remembered = 0, speaker;
try { remembered = saves && check && localStorage.headphones || 0; } catch { /* not allowed to */ }
if (remembered) {
  check.querySelectorAll("fieldset").forEach(tone => tone.remove());
  check.querySelector(".caption").textContent = "Checked on an earlier page.";
}
const tones = check ? [...check.querySelectorAll("fieldset")] : [];
const questions = [...study.querySelectorAll("fieldset")];
for (const tone of tones) {
  const order = [1, 2, 3].sort(() => Math.random() - .5);
  tone.dataset.quiet = order[0];
  tone.querySelector("button").onclick = () => playTones(order[0], order[1]);
}

function playTones(quiet, opposed) {
  if (speaker) speaker.close();
  speaker = new AudioContext();
  const rate = speaker.sampleRate, buffer = speaker.createBuffer(2, 4 * rate, rate);
  const sides = [buffer.getChannelData(0), buffer.getChannelData(1)];
  for (const k of [1, 2, 3]) {
    for (let n = 0; n < rate; n++) {  // one second every 1.5, with ramps of 0.1
      const ramp = Math.min(1, 10 * n / rate, 10 * (1 - n / rate));
      const level = .25 * ramp * (k == quiet ? .5 : 1) * Math.sin(2 * Math.PI * 200 * n / rate);
      const at = Math.round((k - 1) * 1.5 * rate) + n;
      sides[0][at] = level;
      sides[1][at] = k == opposed ? -level : level;
    }
  }
  const source = speaker.createBufferSource();
  source.buffer = buffer;
  source.connect(speaker.destination);
  source.start();
}

// ---- answers
function update() {
  questions.forEach(q => answered(q) && q.classList.remove("missing"));
  const count = questions.filter(answered).length;
  left.textContent = count + " of " + questions.length + " answers";
  if (!check) return;
  const right = tones.filter(t => answered(t) && answered(t).value == t.dataset.quiet).length;
  check.querySelector("[name=headphones]").value = remembered || right;
  try { if (right >= PASSED) localStorage.headphones = right; } catch { /* asked again */ }
}

function answers() {
  const row = {WorkerId: who.value.trim(), SubmitTime: new Date().toISOString()};
  study.querySelectorAll("audio").forEach((clip, i) => {
    row["Input.recording_" + i + "_url"] = clip.dataset.url;
  });
  for (const [name, value] of new FormData(form)) row["Answer." + name] = value;
  return row;
}

const quoted = text => '"' + String(text).replaceAll('"', '""') + '"';

function save(kind) {
  const row = answers();
  const lines = [Object.keys(row), Object.values(row)].map(cells => cells.map(quoted).join(","));
  const text = kind == "csv" ? lines.join("\n") + "\n" : JSON.stringify(row, null, 1) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/" + kind}));
  const place = row["Input.recording_0_url"].split("/").slice(-3, -1);
  link.download = [...place, row.WorkerId].join("-").replace(/[^\p{L}\p{N}.-]+/gu, "_") + "." + kind;
  link.click();
  left.textContent = "Saved as " + link.download + ": please send this file.";
  window.onbeforeunload = null;
}

form.addEventListener("change", () => {
  update();
  if (saves) window.onbeforeunload = event => event.preventDefault();
});
form.addEventListener("submit", event => {
  const missing = questions.filter(q => !answered(q));
  missing.forEach(q => q.classList.add("missing"));
  if (missing.length || (saves && !who.value.trim())) {
    event.preventDefault();
    left.textContent = missing.length ? missing.length + " answers are missing"
      : "Please write your name or number";
    (missing.length ? missing[0].querySelector("input") : who).focus();
  } else if (saves) {
    event.preventDefault();
    save(event.submitter ? event.submitter.value : "json");
  }
});

// ---- keys
document.addEventListener("keydown", event => {
  const at = document.activeElement, key = event.key.toLowerCase();
  if (at === who || event.ctrlKey || event.metaKey || event.altKey) return;
  const question = at.closest("fieldset") || questions.find(q => !answered(q)) || questions[0];
  if (key == "p") {
    const clip = (at.closest("article") || question.closest("article")).querySelector("audio");
    if (!clip) question.querySelector("button")?.click();
    else if (clip.paused) { clip.currentTime = 0; clip.play(); } else clip.pause();
  }
  const choice = /^\d$/.test(key) && question.querySelector('input[value="' + key + '"]');
  if (!choice) return;
  choice.click();
  const next = questions[questions.indexOf(question) + 1];
  (next ? answered(next) || next.querySelector("input") : choice).focus();
});
update();
