"""The page speaks in a real browser, and says what Python says for the same link."""

import functools
import importlib.util
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import browser
import pytest
import torch
from commands import error_of
from models import make

from rawaudio import audio, live
from rawaudio.checkpoint import save_checkpoint
from rawaudio.engine import Engine
from rawaudio.errors import UserError
from rawaudio.hub import load_named
from rawaudio.sampling import Plain
from rawaudio.seeds import uniforms

compiled = pytest.mark.skipif(live._library() is None, reason="no C++ compiler")
TOLD = {"label": "b", "speaker": "y"}


@compiled
@pytest.mark.parametrize(
    "shape, how",
    [
        ({}, {}),
        ({"unet": True, "n_layers": [1, 2, 3], "tied": False}, {"top_k": 20}),
        ({"d_model": 5, "glu": False}, {"nucleus_p": 0.8, "temperature": 0.7}),
        ({"told": True}, TOLD),
        ({"told": True, "unet": True, "d_model": 6}, TOLD | {"guidance": 1.7}),
        ({"told": True, "guided": ["label"]}, TOLD | {"guidance": 3.0}),
    ],
    ids=str,
)
def test_a_seeds_clip_is_what_the_engine_and_the_plain_recurrence_make_of_its_uniforms(shape, how):
    """live.cpp == Engine == Plain."""
    model = make(**shape)
    told = {k: v for k, v in how.items() if k in TOLD}
    sampling = {k: v for k, v in how.items() if k not in (*TOLD, "guidance")}
    rows, guidance = model.told.rows(1, told), how.get("guidance", 1.0)
    wav = live.clip(model, 3, 90, precision="float32", **how)
    for runner in (Engine(model, 1, rows=rows, guidance=guidance), Plain(model, 1, rows, guidance)):
        q = runner.run(torch.tensor([128]), uniforms(3, 90)[:, None], **sampling)
        assert torch.equal(model.quantizer.encode(wav), q[0])
    assert not torch.equal(live.clip(model, 4, 90, precision="float32", **how), wav)


@compiled
def test_without_a_compiler_it_is_the_same_clip(monkeypatch):
    """Conditions are drawn the same, too."""
    model, clips = make(told=True), []
    for _ in range(2):
        clips.append(live.clip(model, 3, 60, precision="float32", **TOLD, guidance=2.0))
        clips.append(live.clip(model, 5, 60, precision="float32"))
        monkeypatch.setattr(live, "_library", lambda: None)
    assert torch.equal(clips[0], clips[2]) and torch.equal(clips[1], clips[3])


@pytest.mark.parametrize(
    "how, message",
    [({"seed": -1}, "seed=-1: must be an integer from 0 to 4294967295"), ({"seed": 2**32}, "seed="),
     ({"length": 0}, "length=0"), ({"label": "z"}, "label=z: not a value"),
     ({"temperature": 0}, "temperature=0"), ({"kind": "diffwave"}, "a diffusion model")],
    ids=str,
)  # fmt: skip
def test_what_no_page_can_make_is_refused(how, message):
    with pytest.raises(UserError, match=re.escape(message)):
        live.clip(make(how.pop("kind", "autoregressive"), told=True), **{"seed": 1} | how)


def test_what_makes_no_page_is_refused(tmp_path, monkeypatch, capsys):
    """A model without the engine; another file in the place; no compiler for WebAssembly."""
    save_checkpoint(tmp_path / "other.safetensors", make("wavenet"))
    (tmp_path / "thesis.html").write_text("mine")
    for argv, words in (
        ([f"checkpoint={tmp_path}/other.safetensors"], "serves autoregressive SaShiMi alone"),
        ([f"out={tmp_path}/thesis.html"], "another file is there"),
        ([], "a page needs a compiler for WebAssembly: pip install ziglang"),
    ):
        if not argv:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert words in error_of(live.main, [f"out={tmp_path}/x.html", *argv], capsys)
        assert not (tmp_path / "x.html").exists()
    assert (tmp_path / "thesis.html").read_text() == "mine"
    monkeypatch.setattr(live, "page", lambda *_: "")
    for folder in ("", tmp_path):
        assert "Is a directory" in error_of(live.main, [f"out={folder}"], capsys)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if not browser.found():
        pytest.skip("no Chromium")
    tab = browser.Browser(str(tmp_path_factory.mktemp("profile")))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def tiny():
    """A model that is told a label and a speaker."""
    return make(told=True, guidance=1.5, guided=["label"], nucleus_p=0.9, clip_length=700,
                sample_rate=8000)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """tiny.html, untold.html and digits.html."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("no ziglang")
    folder = tmp_path_factory.mktemp("pages")
    save_checkpoint(folder / "tiny.safetensors", tiny)
    argv = [f"checkpoint={folder}/tiny.safetensors", "precision=float32"]
    assert live.main([*argv, f"out={folder}/tiny.html"]) == 0
    assert live.main([*argv, f"out={folder}/tiny.html"]) == 0, "its own page is replaced"
    assert live.main([f"out={folder}/digits.html"]) == 0
    untold = make(clip_length=700, sample_rate=8000)
    (folder / "untold.html").write_text(live.page(untold, "untold", "float32"))
    return folder


def ready(tab, page):
    """Opens it, and waits until it can speak."""
    tab.open(page)
    tab.wait("!document.getElementById('speak').disabled")


def made(tab, begin):
    """The bytes of Save .wav after `begin`, an expression."""
    tab.js(begin)
    tab.wait("!document.getElementById('save').hidden")
    read = "fetch(save.href).then(x => x.arrayBuffer()).then(x => [...new Uint8Array(x)])"
    return bytes(tab.js(read))


def press(text):
    return f"[...document.querySelectorAll('button')].find(x => x.textContent === '{text}').click()"


def assert_same(tmp_path, data, wav, rate):
    audio.write(tmp_path / "clip.wav", wav, rate)
    assert data == (tmp_path / "clip.wav").read_bytes()


def assert_quiet(tab):
    """Nothing was fetched and nothing went wrong."""
    assert not [e for e in tab.events if e["method"] == "Runtime.exceptionThrown"]
    assert not [e for e in tab.events if e["method"] == "Log.entryAdded"]
    sent = [e["params"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    urls = [x["request"]["url"] for x in sent if x.get("type") != "Document"]
    assert all(url.startswith(("blob:", "data:")) for url in urls), urls


def test_a_told_model_says_what_a_button_says_and_a_link_says_it_again(tab, folder, tiny, tmp_path):
    """The saved .wav == audio.write(clip(...)); for the settings of the link, too."""
    ready(tab, f"file://{folder}/tiny.html#seed=77&speaker=y&temperature=0.8&top_k=40")
    data = made(tab, press("b"))
    how = dict(temperature=0.8, nucleus_p=0.9, top_k=40, precision="float32")
    wav = live.clip(tiny, 77, 700, guidance=1.5, **how, label="b", speaker="y")
    assert_same(tmp_path, data, wav, 8000)
    assert tab.js("getComputedStyle(guidance).display") != "none"
    python = tab.js("document.getElementById('python').textContent")
    again = eval(python, {"rawaudio": __import__("rawaudio.live"), "model": tiny})
    assert torch.equal(again, wav)
    link = tab.js("location.href")
    assert "label=b" in link and "seed=77" in link and "guidance=1.5" in link
    ready(tab, link)
    assert made(tab, "speak()") == data
    assert_quiet(tab)


def test_surprises_and_other_takes_are_new_and_in_the_link(tab, folder, tiny, tmp_path):
    ready(tab, f"file://{folder}/tiny.html#guidance=1")
    clips = {made(tab, press(x)) for x in ("Surprise me", "Another take", "Another take")}
    assert len(clips) == 3
    link = tab.js("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    told = {name: link[name] for name in TOLD}
    how = dict(guidance=1, precision="float32", nucleus_p=0.9, **told)
    wav = live.clip(tiny, int(link["seed"]), 700, **how)
    assert_same(tmp_path, made(tab, "speak()"), wav, 8000)


def test_a_condition_of_many_values_is_a_list(tab, folder, tmp_path):
    names = [f"<b>{i}" for i in range(40)]
    model = make(conditions={"who": names}, condition_counts={"who": [1] * 40}, sample_rate=8000)
    (folder / "many.html").write_text(live.page(model, "many", "float32"))
    ready(tab, f"file://{folder}/many.html")
    tab.js("list = document.querySelector('select'), list.value = '<b>33', list.onchange()")
    wav = live.clip(model, 0, precision="float32", who="<b>33")
    assert_same(tmp_path, made(tab, "speak()"), wav, 8000)


def test_odd_links_fall_back_to_the_models_own_settings(tab, folder):
    tab.open(f"file://{folder}/tiny.html#seed=-4&label=nobody&temperature=x&length=1e99&top_k=0")
    values = tab.js("FIELDS.map(name => document.getElementById(name).value)")
    assert values == ["0", "1", "1.5", "0.9", "256", "700"]
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(x => x.textContent)"
    assert tab.js(pressed) == ["a", "x"]


def test_the_digits_page_speaks_and_stays_alive(tab, folder, tmp_path, record_property):
    """Below 6 MB; the page's own timers go on; time per sample is told."""
    assert (folder / "digits.html").stat().st_size < 6e6
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ready(tab, f"http://127.0.0.1:{server.server_port}/digits.html#seed=1")
        tab.js("beats = 0, setInterval(() => ++beats, 5)")
        data = made(tab, "speak()")
        assert tab.js("beats") > 4
        server.shutdown()
    model = load_named("sashimi_ar_digits", device="cpu")
    told = {"label": "zero", "speaker": "george"}  # the buttons that are pressed at first
    assert_same(tmp_path, data, live.clip(model, 1, **told), 8000)
    speed = tab.js("document.getElementById('speed').textContent")
    record_property("speed", speed)
    assert int(re.match(r"[\d,]+", speed)[0].replace(",", "")) > 800, speed
    assert tab.js("player === null || player.heard > 0"), "it is heard"


def test_a_clip_can_be_stopped(tab, folder):
    ready(tab, f"file://{folder}/digits.html#length=480000")
    tab.js("speak()")
    tab.wait("clip.made > 1000")
    tab.js(press("Stop"))
    made_then = tab.js("clip.made")
    tab.js("new Promise(done => setTimeout(done, 200))")
    assert tab.js("clip.made") == made_then < 480000
    assert tab.js("document.getElementById('status').textContent") == "Stopped"
    assert tab.js("document.getElementById('save').hidden")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("page", ["tiny", "untold"])
def test_pages_fit_their_screens_and_every_control_has_a_name(tab, folder, page, width):
    tab.open(f"file://{folder}/{page}.html", (width, 900))
    assert tab.js("document.documentElement.scrollWidth") <= width
    tree = tab.do("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "spinbutton", "image", "link")
    nodes = [x for x in tree if not x.get("ignored") and x.get("role", {}).get("value") in roles]
    assert len(nodes) > 8 and all(x["name"]["value"] for x in nodes)
    assert any(x.get("role", {}).get("value") == "status" for x in tree)
    assert tab.js("document.getElementById('other').hidden") == (page == "untold")


def test_the_keyboard_is_enough(tab, folder):
    """Tab leads to a value, Space says it; Enter in a field speaks."""
    ready(tab, f"file://{folder}/tiny.html")
    for _ in range(2):
        tab.press("Tab", 9)
    assert tab.js("document.activeElement.textContent") == "b"
    tab.press(" ", 32, " ")
    tab.wait("!document.getElementById('save').hidden")
    assert tab.js("clip.name") == "b, x, seed 0"
    assert tab.js("document.getElementById('status').textContent").startswith("Made: b, x, seed 0")
    tab.js("seed.focus(), seed.select()")
    tab.press("7", 55, "7")
    tab.press("Enter", 13, "\r")
    tab.wait("clip.name === 'b, x, seed 7' && clip.made === clip.length")


def test_a_browser_without_simd_is_told_so(tab, folder):
    source = "WebAssembly.validate = () => false"
    added = tab.do("Page.addScriptToEvaluateOnNewDocument", source=source)
    tab.open(f"file://{folder}/tiny.html")
    tab.do("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
    said = tab.js("document.querySelector('[role=alert]').textContent")
    assert "lacks WebAssembly with SIMD" in said
    assert tab.js("document.getElementById('speak').disabled")
