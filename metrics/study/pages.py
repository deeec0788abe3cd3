"""Questionnaires of a listening study: pages for a browser, and a template for services.

CONDITION/pages/0.html, 1.html, ...: one for each batch, with its clips inside: it needs no network,
and saves the answers as a file for `score`. template.html is the same page with ${recording_0_url}
in place of the clips, for the form of a crowd-sourcing service that fills it from urls.csv.

The headphone check is the one of Woods et al. 2017 (doi:10.3758/s13414-017-1361-2): of three tones,
which is the quietest? One tone is in antiphase, which loudspeakers cancel.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from metrics.classifier import DIGITS
from metrics.study.layout import new_folder, parts_of, read_condition
from metrics.study.questions import QUESTIONNAIRES, Question, check_words
from rawaudio import command, page
from rawaudio.config import check_allowed, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.files import write_text
from rawaudio.progress import watched

EXAMPLES = """\
python -m metrics.study pages condition=study/music questionnaire=music
python -m metrics.study pages condition=study/digits-sashimi questionnaire=speech"""

STYLE, SCRIPT = (Path(__file__).with_name(f"pages.{kind}").read_text() for kind in ("css", "js"))
TRIALS = 6  # of the headphone check
HELP = (
    "Keys: Tab goes on, P plays the clip, a number answers the question you are at and goes to the "
    "next one."
)


@dataclass
class PagesConfig:
    condition: str = setting(MISSING, "folder that `batches` made")
    questionnaire: str = setting(MISSING, "music or speech", "|".join(QUESTIONNAIRES))
    words: list[str] = setting(DIGITS, "what the voices of questionnaire=speech may say")
    headphones: bool = setting(True, "begin with a check that the listener wears headphones")
    title: str = setting("Listening study", "of the pages")

    def __post_init__(self) -> None:
        check_allowed(self)
        check_words(self.words)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(PagesConfig, argv, prog="python -m metrics.study pages", examples=EXAMPLES)
    return command.run(lambda: make(cfg))


def make(cfg: PagesConfig) -> None:
    """Writes the pages. Raises UserError where they are already, or clips of theirs are gone."""
    condition = read_condition(Path(cfg.condition))
    pages, folder = condition.pages(), Path(cfg.condition, "pages")
    whole = len(condition.methods) == 1
    with new_folder(folder, "delete it to make the pages anew") as draft:
        for k, urls in enumerate(watched(pages, "writing pages", len(pages), "pages")):
            files = [Path(cfg.condition, str(k), parts_of(url)[-1]) for url in urls]
            if gone := next((file for file in files if not file.is_file()), None):
                raise UserError(f"{gone} is not there, which urls.csv names")
            sources = [page.data_uri("audio/wav", file.read_bytes()) for file in files]
            title = f"{cfg.title}, page {k + 1} of {len(pages)}"
            write_text(draft / f"{k}.html", questionnaire(cfg, title, sources, urls, whole))
        marks = ["${recording_" + str(i) + "_url}" for i in range(len(pages[0]))]
        write_text(draft / "template.html", questionnaire(cfg, cfg.title, marks, marks, whole))
    print(f"{folder}: {len(pages):,} pages, and template.html for a service, with urls.csv")
    if not whole and QUESTIONNAIRES[cfg.questionnaire].of_pages:
        print("quality and diversity are of pages with one method: these have several, none asked")


def questionnaire(
    cfg: PagesConfig, title: str, sources: list[str], urls: list[str], whole: bool
) -> str:
    """A page. sources, urls: of the clips, as they are played and as the answers name them.
    whole: ask for the page as a whole, too.
    """
    asked = QUESTIONNAIRES[cfg.questionnaire]
    cards = []
    for i, (source, url) in enumerate(zip(sources, urls, strict=True)):
        fields = [_fieldset(cfg, question, f"recording_{i}_") for question in asked.of_clips]
        player = f'<audio controls preload="auto" aria-label="Clip {i + 1}" src="{source}"'
        player += f' data-url="{html.escape(url)}"></audio>'
        cards.append(_card(f"clip-{i}", f"Clip {i + 1}", player, *fields))
    if asked.of_pages and whole:
        fields = [_fieldset(cfg, question) for question in asked.of_pages]
        cards.append(_card("page", "All clips of this page", *fields))
    parts = [
        f'<div id="study"><p class="note">{html.escape(asked.task)}\n{HELP}</p>',
        '<label id="who">Your name, or the number you were given'
        '<input type="text" required autocomplete="off"></label>',
        _headphones() if cfg.headphones else "",
        f"<main>{''.join(cards)}</main>",
        _ENDING,
        f"</div><script>\n{SCRIPT}</script>",
    ]
    return page.html_page(title, *parts, style=STYLE)


def _card(name: str, title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f'\n<article aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}</article>'


def _fieldset(cfg: PagesConfig, question: Question, prefix: str = "") -> str:
    """A question and its answers, of which one is required."""
    labels = []
    for value, word in enumerate(question.words or cfg.words, question.first):
        radio = f'<input type="radio" name="{prefix}{question.field}" value="{value}" required>'
        labels.append(f"<label>{radio}<b>{value}</b> <span>{html.escape(word)}</span></label>")
    legend = f"<legend>{question.title} <small>{question.text}</small></legend>"
    return f'<fieldset>{legend}<div class="scale">{"".join(labels)}</div></fieldset>'


def _headphones() -> str:
    """The check, as one card; its tones are made by the script."""
    trials = []
    for i in range(TRIALS):
        play = f'<button type="button" aria-label="Play tones {i + 1}">Play</button>'
        labels = "".join(
            f'<label><input type="radio" name="headphones_{i}" value="{k}" required><b>{k}</b>'
            "</label>"
            for k in (1, 2, 3)
        )
        scale = f'<div class="scale tones">{play}{labels}</div>'
        trials.append(f"<fieldset><legend>Tones {i + 1}</legend>{scale}</fieldset>")
    text = "Please wear headphones. Play each three tones: which one is the quietest?"
    hidden = '<input type="hidden" name="headphones" value="0">'
    card = _card("headphones", "Headphones", f'<p class="caption">{text}</p>', hidden, *trials)
    return f'<section id="check">{card}</section>'


_ENDING = """
<footer>
  <p id="left" role="status"></p>
  <p id="save"><button value="json">Save answers</button>
    <button value="csv" class="second">Save as CSV</button></p>
</footer>"""
