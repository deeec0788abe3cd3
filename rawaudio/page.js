const clips = [...document.querySelectorAll("audio")], all = document.getElementById("all");
let chain = false;  // is "play all" running?
const show = on => { chain = on; all.textContent = on ? "Stop" : "Play all"; };
all.hidden = clips.length < 2;
all.onclick = () => {
  if (chain) { show(false); clips.forEach(a => a.pause()); return; }
  show(true); clips.forEach(a => { a.pause(); a.currentTime = 0; }); clips[0].play();
};
clips.forEach((a, i) => {
  const card = a.closest("article");
  a.onplay = () => {
    clips.forEach(b => b !== a && b.pause());
    card.classList.add("playing");
    if (chain) card.scrollIntoView({block: "nearest"});
  };
  a.onpause = () => card.classList.remove("playing");
  a.onended = () => {
    if (chain && i + 1 < clips.length) { clips[i + 1].currentTime = 0; clips[i + 1].play(); }
    else show(false);
  };
});
