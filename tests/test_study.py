"""The listening study: which clips, in which files, asked how, and what the answers say."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import browser
import pytest
import torch
from commands import error_of
from levels import RATE, Level, folder_of
from test_page import Elements

from metrics.study.__main__ import main
from metrics.study.batches import spoil
from metrics.study.layout import read_condition
from metrics.study.pages import PagesConfig, questionnaire
from metrics.study.score import ScoreConfig, run
from metrics.study.select import SelectConfig, select
from rawaudio import audio


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_the_surest_of_each_class_are_numbered_so_that_the_number_tells_the_class(tmp_path, capsys):
    levels = [0.13, 0.3, 0.1, 0.11, 0.29, 0.2, 0.12]  # four quiet, one middle, two loud
    made, out = folder_of(tmp_path / "made", levels), tmp_path / "out"
    cfg = SelectConfig([str(made)], out_dir=str(out), samples_per_class=2, cache_dir=None)
    select(cfg, Level())
    assert "5 of 7 clips, 2 of each class; fewer of middle 1" in capsys.readouterr().out
    rows = table(out / "made" / "selected.csv")
    sources = {row["path"]: Path(row["source"]).name for row in rows}
    # within a class in the clips' own order; 3.wav is not there
    assert sources == {
        "0.wav": "2.wav", "1.wav": "3.wav", "2.wav": "5.wav", "4.wav": "1.wav", "5.wav": "4.wav",
    }  # fmt: skip
    for row in rows:
        assert row["label"] == Level.labels[int(Path(row["path"]).stem) // 2]
        assert torch.equal(audio.read(out / "made" / row["path"])[0], audio.read(row["source"])[0])
    with pytest.raises(ValueError, match="is there already"):
        select(cfg, Level())


def test_all_clips_need_no_classifier(tmp_path):
    folder_of(tmp_path / "b", [0.1] * 3)
    (tmp_path / "a.csv").write_text("path,label\nb/2.wav,x\nb/0.wav,y\n")
    argv = [f"methods=[{tmp_path}/a.csv,{tmp_path}/b]", f"out_dir={tmp_path}/out"]
    assert main(["select", *argv, "samples_per_class=none", "n_samples=2"]) == 0
    rows = table(tmp_path / "out" / "a" / "selected.csv")
    assert [(row["path"], row["label"]) for row in rows] == [("0.wav", "x"), ("1.wav", "y")]
    assert len(list((tmp_path / "out" / "b").glob("*.wav"))) == 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two methods of thirty clips; what those of one say is known."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, method in enumerate(("ours", "test")):
        folder_of(folder / method, [0.1] * 30, 100 * seed)
    words = [f"{i}.wav,{('zero', 'one', 'two')[i // 10]}\n" for i in range(30)]
    (folder / "test" / "selected.csv").write_text("path,label\n" + "".join(words))
    return folder


def batched(clips: Path, out: Path, *more: str) -> Path:
    assert main(["batches", f"clips={clips}", f"out_dir={out}", "condition=c", *more]) == 0
    return out / "c"


def batches_of(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "batches.txt").read_text().splitlines()]


def ids_of(folder: Path) -> dict[tuple[str, str], str]:
    lines = [line.split() for line in (folder / "uids.txt").read_text().splitlines()]
    return {(method, name): uid for method, name, uid in lines}


def test_batches_have_the_published_layout_and_ids_that_name_no_method(clips, tmp_path):
    url = "url=https://example.org/{}/{}/{}.wav"
    folder = batched(clips, tmp_path, "batch_size=10", url)
    batches, ids, pages = batches_of(folder), ids_of(folder), table(folder / "urls.csv")
    assert [len(batch) for batch in batches] == [10, 10, 10]
    assert batches[0][:4] == ["19.wav", "14.wav", "10.wav", "26.wav"], "published, with seed 42"
    assert len(ids) == len(set(ids.values())) == 60
    assert all(re.fullmatch("[0-9a-f]{32}", uid) for uid in ids.values())
    assert list(pages[0]) == [f"recording_{i}_url" for i in range(20)]
    for k, (batch, page) in enumerate(zip(batches, pages, strict=True)):
        assert table(folder / f"urls_{k}.csv") == [page]
        expected = {ids[method, name] for method in ("ours", "test") for name in batch}
        assert {x.name for x in (folder / str(k)).iterdir()} == {f"{x}.wav" for x in expected}
        assert set(page.values()) == {f"https://example.org/c/{k}/{x}.wav" for x in expected}
    for (method, name), uid in ids.items():
        (copy,) = folder.glob(f"*/{uid}.wav")
        assert torch.equal(audio.read(copy)[0], audio.read(clips / method / name)[0])
    again = ids_of(batched(clips, tmp_path / "again", "batch_size=10", "methods=[ours]"))
    assert again == {key: ids[key] for key in ids if key[0] == "ours"}, "by method and name alone"


def test_gold_clips_are_spoilt_and_spread_over_the_pages(clips, tmp_path):
    folder = batched(clips, tmp_path, "batch_size=3", "gold=10")
    condition = read_condition(folder)
    assert len(condition.gold) == 10 and {method for method, _ in condition.gold} == {"test"}
    for batch in batches_of(folder):
        assert sum(("test", name) in condition.gold for name in batch) == 1
    for uid, key in condition.clips.items():
        (copy,) = folder.glob(f"*/{uid}.wav")
        source = audio.read(Path(clips, *key))[0]
        assert torch.equal(audio.read(copy)[0], source) == (key not in condition.gold)
    assert {row["kind"] for row in table(folder / "gold.csv")} == {"noise", "shuffled"}
    assert condition.labels["test", "25.wav"] == "two" and len(condition.labels) == 30


@pytest.mark.parametrize("kind", ["noise", "shuffled"])
def test_spoilt_clips_are_as_loud_and_of_something_else(kind):
    wav = 0.1 * torch.sin(torch.arange(RATE) * 0.2)
    spoilt = spoil(wav, RATE, kind, torch.Generator().manual_seed(0))
    assert len(spoilt) == len(wav) and spoilt.abs().max() <= 1
    power = [float(x.square().mean()) for x in (wav, spoilt)]
    assert power[1] == pytest.approx(power[0], rel=0.01)
    like = float(torch.corrcoef(torch.stack([wav, spoilt]))[0, 1].abs())
    assert like == pytest.approx((1 + 10**1.5) ** -0.5, abs=0.02) if kind == "noise" else like < 0.3


def test_pages_hold_their_clips_and_the_template_names_them(clips, tmp_path):
    folder = batched(clips, tmp_path, "batch_size=15", "methods=[ours]")
    argv = ["pages", f"condition={folder}", "questionnaire=speech"]
    assert main(argv) == 0 and main(argv) == 2, "pages that were sent are not overwritten"
    assert {x.name for x in (folder / "pages").iterdir()} == {"0.html", "1.html", "template.html"}
    text = (folder / "pages" / "0.html").read_text()
    assert "${" not in text and "http" not in text
    elements, urls = Elements(inputs_closed(text)), list(table(folder / "urls_0.csv")[0].values())
    assert [player["data-url"] for player in elements["audio"]] == urls
    assert all(player["src"].startswith("data:audio/wav;") for player in elements["audio"])
    assert "ours" not in re.sub('base64,[^"]*', "", text), "no method is named"

    template = (folder / "pages" / "template.html").read_text()
    named = re.findall(r"\$\{(.*?)\}", template)
    assert set(named) == {f"recording_{i}_url" for i in range(15)}
    assert "<form" not in template, "a service has one around it"


def inputs_closed(text: str) -> str:
    """Elements knows no void tag but meta and img."""
    return re.sub(r"(<input[^>]*)>", r"\1></input>", text)


@pytest.mark.parametrize(
    "kind, of_clip, of_page",
    [("music", {"quality": 5, "musicality": 5}, {}),
     ("speech", {"digit": 4, "intelligibility": 5}, {"quality": 5, "diversity": 5})],
)  # fmt: skip
def test_every_question_is_named_and_requires_an_answer(kind, of_clip, of_page):
    words = ["yes", "no", "a < b", "go"]
    cfg = PagesConfig("x", kind, words=words, headphones=False)
    elements = Elements(inputs_closed(questionnaire(cfg, "T", ["a", "b"], ["c", "d"], True)))
    radios = [x for x in elements["input"] if x["type"] == "radio"]
    counts = Counter(x["name"] for x in radios)
    asked = {f"recording_{i}_{name}": n for i in range(2) for name, n in of_clip.items()}
    assert counts == asked | of_page and all("required" in x for x in radios)
    assert len(elements["fieldset"]) == len(elements["legend"]) == len(counts)
    assert len(elements["label"]) == len(radios) + 1
    assert ("a < b" in elements.text) == (kind == "speech")


def condition_of(folder: Path, methods: list[str], names: list[str], **files: str) -> Path:
    """As published: the same ids for every condition."""
    folder.mkdir(parents=True)
    keys = [f"{method} {name}" for method in methods for name in names]
    lines = [f"{key} {i:032x}\n" for i, key in enumerate(keys)]
    (folder / "uids.txt").write_text("".join(lines))
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def page_of(worker: str, condition: str, ids: list[int], answers: dict[str, list], **page) -> dict:
    """A row of a service: answers of one listener to one page."""
    row = {"HITId": "x", "WorkerId": worker}
    for i, uid in enumerate(ids):
        row[f"Input.recording_{i}_url"] = f"https://s.org/a b/{condition}/0/{uid:032x}.wav"
        row |= {f"Answer.recording_{i}_{name}": values[i] for name, values in answers.items()}
    return row | {f"Answer.{name}": value for name, value in page.items()}


def test_published_rules_of_the_music_study(tmp_path):
    """Whoever praises a spoilt clip goes, with all answers; spoilt clips go; 1.96 s / sqrt(n)."""
    condition = condition_of(tmp_path / "yt", ["ours", "test"], ["3.wav", "4.wav", "15.wav"])
    pages = [[0, 3], [1, 4], [2, 5]]  # of both methods: 3.wav, 4.wav, 15.wav
    said = {  # quality and musicality of ours and test, by page
        "ann": [([4, 5], [2, 5]), ([3, 2], [2, 2]), ([2, 5], [1, 2])],
        "bob": [([5, 4], [3, 4]), ([1, 1], [1, 1]), ([3, 4], [3, 3])],  # 15.wav: musicality 3
        "eve": [([2, 5], [3, 3]), ([4, 1], [3, 1]), ([2, 3], [5, 1])],
        "joe": [([1, 1], [1, 1]), ([1, 3], [1, 1]), ([1, 1], [1, 1])],  # 4.wav: quality 3
    }
    rows = [
        page_of(who, "yt", ids, {"quality": quality, "musicality": musicality})
        for who, answers in said.items()
        for ids, (quality, musicality) in zip(pages, answers, strict=True)
    ]
    results = write_rows(tmp_path / "Batch_1_batch_results.csv", rows)
    cfg = ScoreConfig([str(condition)], [results], protocol="published", gold="published")
    report = run(cfg)
    assert report.facts["dropped"].keys() == {"bob", "joe"}
    ours, test = report.rows
    assert (ours.ratings, ours.listeners, test.ratings, test.listeners) == (6, 2, 2, 2)
    # 4 3 2 2 4 2: mean 17/6, variance (53 - 289/6) / 5
    half = 1.96 * ((53 - 289 / 6) / 5 / 6) ** 0.5
    assert ours.scores["quality"] == pytest.approx((17 / 6, 17 / 6 - half, 17 / 6 + half))
    # 5 5, and 5 3: mean 4, standard deviation sqrt(2)
    assert test.scores["quality"] == (5, 5, 5)
    assert test.scores["musicality"] == pytest.approx((4, 4 - 1.96, 4 + 1.96))

    everyone = run(ScoreConfig([str(condition)], [results], gold=None, bootstrap=0))
    assert [row.ratings for row in everyone.rows] == [12, 12] and not everyone.facts["dropped"]
    patient = ScoreConfig([str(condition)], [results], gold="published", gold_failures=2)
    assert not run(patient).facts["dropped"]


def test_published_rules_of_the_speech_study(tmp_path):
    """Ids repeat between conditions; the number of a clip tells its word; page answers count once
    a page; answers without a word are dropped."""
    names = [f"{i}.wav" for i in range(4)]  # two of each word
    folders = [condition_of(tmp_path / f"sc-{m}", [m], names) for m in ("a", "b")]
    grades = {"digit": [0, 1, 1, ""], "intelligibility": [4, 4, 5, 5]}
    others = grades | {"digit": [1, 1, 0, 0]}
    rows = [
        page_of("w1", "sc-a", [0, 1, 2, 3], grades, quality=4, diversity=2),
        page_of("w2", "sc-a", [3, 2, 1, 0], others, quality=2, diversity=2),
        page_of("w1", "sc-b", [0, 1, 2, 3], others, quality=1, diversity=1),
    ]
    results = write_rows(tmp_path / "r.csv", rows)
    cfg = ScoreConfig(
        [str(x) for x in folders], [results], protocol="published", samples_per_class=2,
        words=["zero", "one"],
    )  # fmt: skip
    report = run(cfg)
    a, b = report.rows
    assert (a.ratings, b.ratings) == (7, 4)
    assert a.scores["accuracy"].value == pytest.approx(6 / 7) and b.scores["accuracy"].value == 0
    assert a.scores["kappa"].value == pytest.approx((6 / 7 - 24 / 49) / (1 - 24 / 49))
    assert b.scores["kappa"].value == -1
    quality = [4, 4, 4, 2, 2, 2, 2]  # of seven clips on 7/4 pages
    mean = sum(quality) / 7
    spread = (sum((x - mean) ** 2 for x in quality) / 6) ** 0.5
    half = 1.96 * spread / (7 / 4) ** 0.5
    assert a.scores["quality"] == pytest.approx((mean, mean - half, mean + half))
    exact = run(ScoreConfig(cfg.conditions, [results], samples_per_class=2, words=cfg.words))
    assert exact.rows[0].scores["quality"].value == 3, "two pages"
    report.words = ["zero", "one"]
    assert report.confusions["b"].tolist() == [[0, 1], [1, 0]]


def test_intervals_are_of_listeners_and_not_of_answers(tmp_path):
    """Twenty listeners, each with one opinion of fifty clips: as sure as twenty answers are."""
    condition = condition_of(tmp_path / "c", ["m"], [f"{i}.wav" for i in range(50)])
    rows = []
    for k in range(20):
        same = [2 + k % 2 * 2] * 50
        rows.append(page_of(f"w{k}", "c", range(50), {"quality": same, "musicality": same}))
    results = write_rows(tmp_path / "r.csv", rows)
    wide, narrow = (
        run(ScoreConfig([str(condition)], [results], protocol=p)).rows[0].scores["quality"]
        for p in ("exact", "published")
    )
    assert wide.value == narrow.value == 3
    assert narrow.high - 3 == pytest.approx(1.96 / 1000**0.5, rel=0.01)
    assert [3 - wide.low, wide.high - 3] == pytest.approx([1.96 / 20**0.5] * 2, rel=0.15)


@pytest.mark.parametrize(
    "times",
    [
        ("2025-01-01", "2025-02-01"),
        ("Wed Jan 29 20:35:14 PST 2025", "Sat Feb 01 10:35:14 PST 2025"),
    ],
)
def test_other_forms_of_answers_and_who_does_not_count(times, tmp_path, capsys):
    gold = "method,name,kind,quality\nm,1.wav,noise,2\n"
    condition = condition_of(tmp_path / "c", ["m"], ["0.wav", "1.wav"], gold=gold)
    good = {"quality": [4, 1], "musicality": [5, 5]}
    ann = page_of("ann", "c", [0, 1], good, headphones=6)
    again = ann | {"SubmitTime": times[1], "Answer.recording_0_quality": "3.0"}
    bob = page_of("bob", "c", [0, 1], good | {"quality": [5, 3]}, headphones=6)  # praises noise
    eve = page_of("eve", "c", [0, 1], good, headphones=2)
    radio = page_of("joe", "c", [0, 1], good)  # of a form that names its buttons
    for i, value in enumerate((2, 1)):
        del radio[f"Answer.recording_{i}_quality"]
        radio |= {f"Answer.recording_{i}_quality.{k}": str(k == value).lower() for k in range(1, 6)}
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "1.json").write_text(json.dumps(again))
    (answers / "2.json").write_text(json.dumps([ann | {"SubmitTime": times[0]}, bob, eve]))
    write_rows(answers / "3.csv", [radio])
    (answers / "notes.txt").write_text("not answers")
    argv = [f"conditions=[{condition}]", f"results=[{answers}]", f"out_dir={tmp_path}/out"]
    assert main(["score", *argv]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 listeners count; left out: 1 by headphone check, 1 by gold clips" in printed
    assert "whose last answers count: 1\n" in printed
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["methods"][0]["scores"]["quality"]["value"] == 2.5  # 3 of ann, 2 of joe
    assert scores["dropped"].keys() == {"bob", "eve"}
    markdown = (tmp_path / "out" / "scores.md").read_text()
    assert markdown.startswith("|  | listeners | ratings | Fidelity | Musicality |")
    elements = Elements((tmp_path / "out" / "scores.html").read_text())
    assert [picture["alt"][:8] for picture in elements["img"]] == ["Fidelity", "Musicali"]


FILL = """
const saved = [], names = [], said = [];
URL.createObjectURL = blob => { saved.push(blob); return "data:,"; };
HTMLAnchorElement.prototype.click = function () { names.push(this.download); };
const press = key => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", {key: String(key), bubbles: true}));
const submit = document.querySelector("SUBMIT");
let posted = null;
form.addEventListener("submit", event => {
  if (!event.defaultPrevented) posted = Object.fromEntries(new FormData(form));
  event.preventDefault();
});
if (saves) who.value = "too early";
submit.click();
said.push(left.textContent, saved.length, posted);
if (saves) who.value = "";
document.activeElement.blur();
for (const tone of tones) press(tone.dataset.quiet);
for (const key of KEYS) press(key);
submit.click();
if (saves) {
  said.push(left.textContent, saved.length);
  who.value = "ann, 7";
  submit.click();
  document.querySelector("#save .second").click();
}
Promise.all(saved.map(blob => blob.text())).then(texts => ({texts, names, said, posted}));
"""


def browse(page: Path, keys: list[int], submit: str) -> dict:
    """What the page saves or posts when a real browser answers its questions by those keys."""
    tab = browser.Browser(str(page.parent / "profile"))
    tab.open(page.absolute().as_uri())
    found = tab.js(FILL.replace("KEYS", json.dumps(keys)).replace("SUBMIT", submit))
    tab.close()
    return found


@pytest.mark.skipif(not browser.found(), reason="no Chromium")
def test_a_browser_fills_in_the_page_and_the_template_and_both_are_scored(clips, tmp_path):
    """By keyboard: every word right, spoilt clips hard to understand, then the page."""
    folder = batched(clips, tmp_path, "batch_size=6", "n_max=12", "methods=[test]", "gold=2")
    assert main(["pages", f"condition={folder}", "questionnaire=speech"]) == 0
    condition = read_condition(folder)
    urls, answers = condition.pages(), []
    for page in urls:
        answers.append([])
        for key in (condition.clips[Path(url).stem] for url in page):
            word = ("zero", "one", "two").index(condition.labels[key])
            answers[-1] += [word, 1 if key in condition.gold else 4]
        answers[-1] += [5, 3]

    own = browse(folder / "pages" / "0.html", answers[0], "#save button")
    assert own["said"] == ["20 answers are missing", 0, None, "Please write your name or number", 0]
    assert own["names"] == ["c-0-ann_7.json", "c-0-ann_7.csv"]
    row = json.loads(own["texts"][0])
    assert row["WorkerId"] == "ann, 7" and row["Answer.headphones"] == "6"
    (tmp_path / "0.json").write_text(own["texts"][0])
    (tmp_path / "0.csv").write_text(own["texts"][1])

    template = (folder / "pages" / "template.html").read_text()
    for i, url in enumerate(urls[1]):
        template = template.replace("${recording_" + str(i) + "_url}", url)
    form = re.sub("</(body|html)>", "", template) + '<input type="submit" id="service"></form>'
    service = tmp_path / "service.html"
    service.write_text(f'<!doctype html><body><form id="mturk_form">{form}</body></html>')
    posted = browse(service, answers[1], "#service")
    assert posted["said"][1:] == [0, None] and not posted["names"], "the service saves, not we"
    row = {"WorkerId": "W2"} | {f"Answer.{k}": v for k, v in posted["posted"].items()}
    row |= {f"Input.recording_{i}_url": url for i, url in enumerate(urls[1])}
    write_rows(tmp_path / "1.csv", [row])

    wanted = {"intelligibility": 4, "quality": 5, "diversity": 3, "accuracy": 1, "kappa": 1}
    for own_file in ("0.json", "0.csv"):
        results = [str(tmp_path / own_file), str(tmp_path / "1.csv")]
        report = run(ScoreConfig([str(folder)], results))
        (scores,) = report.rows
        assert not report.facts["dropped"] and (scores.listeners, scores.ratings) == (2, 10)
        assert {name: estimate.value for name, estimate in scores.scores.items()} == wanted


@pytest.mark.parametrize(
    "argv, message",
    [("select methods=[{clips}/ours,{clips}/ours]", "2 methods are called ours"),
     ("select methods=[{clips}/ours] names=[a b]", "'a b'"),
     ("select methods=[{clips}]", "no audio in this folder"),
     ("batches condition=c clips={clips} batch_size=7", "write n_max=28"),
     ("batches condition=c clips={clips} gold=30", "gold=30"),
     ("batches condition=c clips={clips} methods=[their]", "it has ours, test"),
     ("batches condition=c clips={clips} url=https://x.org/", "url=https://x.org/"),
     ("batches condition=c clips={clips} url={{uid}}/a.wav", "url={uid}/a.wav"),
     ("batches condition=c clips={clips} url={{uid.x}}.wav", "url={uid.x}.wav"),
     ("batches condition=c clips={tmp}/spaces", "'a\\xa0b.wav'"),
     ("batches condition=../c clips={clips}", "condition"),
     ("batches condition=c clips={clips}/nowhere", "select"),
     ("pages condition={clips} questionnaire=music", "uids.txt"),
     ("pages condition={clips} questionnaire=dance", "music or speech"),
     ("pages condition={c} questionnaire=music", "urls.csv names no clips"),
     ("score conditions=[{c}] results=[{tmp}/none]", "none is not there"),
     ("score conditions=[{c}] results=[{tmp}/none] words=[]", "words=[]: two or more"),
     ("score conditions=[{c}] results=[{tmp}/none] headphones=7", "headphones=7: must be"),
     ("score conditions=[{c}] results=[{tmp}/other.json]", "in none or several"),
     ("score conditions=[{c}] results=[{tmp}/range.json]", "'6', expected 1 to 5"),
     ("score conditions=[{c}] results=[{tmp}/broken.json]", "is no JSON"),
     ("score conditions=[{c}] results=[{tmp}/empty.csv]", "no column WorkerId")],
)  # fmt: skip
def test_slips_are_answered_with_one_line(argv, message, clips, tmp_path, capsys):
    condition = condition_of(tmp_path / "c", ["m"], ["0.wav"], urls="recording_0_url\n")
    audio.write(tmp_path / "spaces" / "m" / "a\xa0b.wav", torch.full((RATE,), 0.1), RATE)
    for name, uid, quality in (("other", 7, 1), ("range", 0, 6)):
        page = page_of("w", "c", [uid], {"quality": [quality], "musicality": [2]})
        (tmp_path / f"{name}.json").write_text(json.dumps(page))
    (tmp_path / "broken.json").write_text('{"WorkerId": ')
    (tmp_path / "empty.csv").write_text("a,b\n")
    name, *settings = re.split(r" (?=\w+=)", argv.format(clips=clips, c=condition, tmp=tmp_path))
    out = [f"out_dir={tmp_path}/out"] if name != "pages" else []
    assert message in error_of(main, [name, *settings, *out], capsys)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
