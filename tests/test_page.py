"""A page is one file that holds everything, and the pictures show what is in the audio."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import soundfile
import torch

from rawaudio import audio, page
from rawaudio.page import Clip, html_page, spectrogram, spectrogram_figure, write_page

RATE = 8000
pytestmark = pytest.mark.usefixtures("pictures")


def tone(frequency: float, seconds: float = 0.5, rate: int = RATE) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_a_tone_is_a_line_at_its_frequency(rate):
    db = spectrogram(tone(1000, rate=rate), rate)
    middle = db[:, 10:-10]
    bins_per_hz = (db.shape[0] - 1) / (rate / 2)
    assert (middle.argmax(0) / bins_per_hz - 1000).abs().max() < 20
    far = middle[int(2500 * bins_per_hz) :]  # Hann: side lobes fall fast
    assert db.max() == 0 and far.max() <= -79


def test_a_click_is_a_line_at_its_time():
    db = spectrogram(torch.eye(RATE)[RATE // 4], RATE)
    assert abs(db.amax(0).argmax() * page.HOP - 0.25) <= page.HOP
    assert (db.amax(0) > -80).sum() * page.HOP <= page.WINDOW + page.HOP


@pytest.mark.parametrize("wav", [torch.zeros(4000), torch.zeros(1), torch.ones(1), tone(50, 0.01)])
def test_silent_and_tiny_clips_have_a_picture(wav):
    db = spectrogram(wav, RATE)
    assert db.isfinite().all() and db.min() >= -80 and db.max() <= 0
    assert wav.any() or (db == -80).all()
    spectrogram_figure(wav, RATE).canvas.draw()


def test_long_clips_do_not_make_long_pictures():
    wav = tone(300, 60)
    assert spectrogram(wav, RATE).shape[1] <= page.MAX_COLUMNS + 2
    line = spectrogram_figure(wav, RATE).axes[0].lines[0]
    assert len(line.get_xdata()) < 5000
    assert line.get_ydata().max() == pytest.approx(0.5, abs=1e-3), "blocks keep their extremes"


def test_figures_have_axes_in_seconds_and_khz_with_letters_for_a_phone():
    """A card leaves 334 of 400 pixels; smaller letters than 10 pixels are guessed."""
    figure = spectrogram_figure(tone(1000), RATE)
    wave, picture = figure.axes[:2]
    assert picture.get_xlabel() == "seconds" and picture.get_ylabel() == "kHz"
    assert wave.get_xlim() == picture.get_xlim() == (0, 0.5) and picture.get_ylim() == (0, 4)
    assert picture.images[0].get_clim() == (-80, 0)
    figure.canvas.draw()
    texts = [
        text
        for axes in figure.axes
        for text in (
            *axes.get_xticklabels(),
            *axes.get_yticklabels(),
            axes.xaxis.label,
            axes.yaxis.label,
        )
        if text.get_text() and text.get_visible()
    ]
    pixels_per_point = 334 / (figure.get_size_inches()[0] * 72)
    assert len(texts) > 5 and min(text.get_size() for text in texts) * pixels_per_point >= 10


class Elements(HTMLParser):
    """Every element of a page as (tag, attributes); checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def __getitem__(self, tag):
        return [attributes for name, attributes in self.all if name == tag]


CLIPS = [
    Clip("0000.wav", tone(440), RATE, "log-likelihood -2.310 nats per sample"),
    Clip('<b>"7" & 8', tone(880, 0.25, 16000), 16000),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "index.html"
    title, note = "Digits </title><script>alert(1)</script>", "seed 0\n<i>two</i> lines"
    write_page(path, CLIPS, title, note, body="<table></table>")
    return path, Elements(path.read_text(encoding="utf-8"))


def test_a_page_refers_to_nothing_outside_of_itself_and_is_hardly_larger_than_its_audio(written):
    path, elements = written
    for _, attributes in elements.all:
        for name in ("src", "href", "srcset", "poster", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    text = re.sub(r"base64,[^\"]*", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    sound = sum(2 * len(clip.wav) * 4 / 3 for clip in CLIPS)
    assert path.stat().st_size - sound < len(CLIPS) * 100_000


def test_players_hold_the_clips_as_on_disk_and_everything_has_a_name(written, tmp_path):
    _, elements = written
    pictures, players = elements["img"], elements["audio"]
    for clip, picture, player in zip(CLIPS, pictures, players, strict=True):
        assert clip.name in picture["alt"] and player["aria-label"] == clip.name
        assert int(picture["width"]) > 1.7 * int(picture["height"])
        kind, data = player["src"].split(";base64,")
        assert kind == "data:audio/wav" and "controls" in player
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
        audio.write(tmp_path / "clip.wav", clip.wav, clip.sample_rate)
        assert rate == clip.sample_rate
        assert torch.equal(torch.from_numpy(samples), audio.read(tmp_path / "clip.wav")[0])
    assert elements["html"][0]["lang"] == "en"
    assert any("width=device-width" in meta.get("content", "") for meta in elements["meta"])


def test_text_is_shown_and_never_becomes_markup(written):
    _, elements = written
    for text in [CLIPS[0].caption, CLIPS[1].name, "alert(1)", "<i>two</i> lines",
                 "2 clips · 0.8 s", "0.25 s · 16 kHz"]:  # fmt: skip
        assert text in elements.text
    assert len(elements["script"]) == 1 and not elements["i"] and not elements["b"]


def test_pages_of_other_parts_have_the_same_frame():
    text = html_page("Scores & <more>", "<p>one</p>", "<p>two</p>", facts="a < b", style="td {}")
    assert "<p>one</p><p>two</p>" in text and "td {}" in text
    assert "Scores & <more>" in Elements(text).text and "a < b" in Elements(text).text
    for scheme in ("prefers-color-scheme: dark", 'content="light dark"'):
        assert scheme in text


def test_a_clip_that_cannot_be_written_leaves_the_old_page(tmp_path):
    write_page(tmp_path / "index.html", [], "empty")
    before = (tmp_path / "index.html").read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        write_page(tmp_path / "index.html", [Clip("x", tone(9) * torch.nan, RATE)], "bad")
    assert (tmp_path / "index.html").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
