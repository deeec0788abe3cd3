"""Score the answers of listeners: mean opinions with 95 % intervals, accuracy, Cohen's kappa.

Listeners who call spoilt clips good, or fail the headphone check, are left out with all they said;
so are the spoilt clips. Intervals are of resampled listeners, since what one person says of many
clips is not independent. `protocol=published` gives mean and 1.96 standard errors over all ratings,
and counts what is said of a page once for each of its clips, as the published tables do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from metrics.classifier import DIGITS
from metrics.pictures import share_of_rows
from metrics.scores import PROTOCOLS, bootstrap
from metrics.study import report
from metrics.study.layout import Condition, Key, read_condition, read_gold
from metrics.study.questions import DIGIT, GRADES, QUESTIONNAIRES, check_words
from metrics.study.report import Estimate, Report, Row
from metrics.study.results import Answer, Results, read_results
from rawaudio import command
from rawaudio.config import check_allowed, parse_args, setting, to_dict
from rawaudio.errors import UserError
from rawaudio.files import write_text

EXAMPLES = """\
python -m metrics.study score conditions=[study/digits] results=[answers]
python -m metrics.study score conditions=[final/sc09-sashimi,final/sc09-test] \\
  results=[Batch_1_batch_results.csv,Batch_2_batch_results.csv] samples_per_class=50 \\
  protocol=published
python -m metrics.study score conditions=[final/youtubemix] results=[Batch_3_batch_results.csv] \\
  protocol=published gold=published"""

# Spoilt clips of the published music study, and what no listener may exceed.
PUBLISHED_GOLD = {
    **{("test", f"{i}.wav"): {"quality": 2, "musicality": 2} for i in (4, 10, 17, 21)},
    ("test", "15.wav"): {"quality": 5, "musicality": 2},
}
FEW = 10  # listeners


@dataclass
class ScoreConfig:
    conditions: list[str] = setting(MISSING, "folders that `batches` made, or published ones")
    results: list[str] = setting(MISSING, "files of answers, .csv and .json, or folders of them")
    protocol: str = setting("exact", "exact or published", "|".join(PROTOCOLS))
    # who counts
    gold: str | None = setting(
        "conditions", "most that spoilt clips may get: conditions, their gold.csv; published; a CSV"
    )
    gold_failures: int = setting(1, "leave out who exceeds it for so many of them", ">0")
    headphones: int = setting(5, "leave out who had fewer tones of six right; 0: nobody", ">=0 <=6")
    # what is right
    words: list[str] = setting(DIGITS, "the answers to which word it is, as `pages` had them")
    samples_per_class: int | None = setting(
        None, "where there is no labels.csv: words are the clips' numbers over this, published 50",
        ">0",
    )  # fmt: skip
    bootstrap: int = setting(1000, "resamplings for intervals; 0: none", ">=0")
    seed: int = setting(0, "of the resamplings", ">=0")
    out_dir: str = setting("study/scores", "folder of scores.json, .md and .html")

    def __post_init__(self) -> None:
        check_allowed(self)
        check_words(self.words)
        if self.bootstrap == 1:
            raise UserError("bootstrap=1: must be 0, or at least 2")
        if not self.conditions or not self.results:
            raise UserError("conditions and results: give one or more of each")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(ScoreConfig, argv, prog="python -m metrics.study score", examples=EXAMPLES)
    return command.run(lambda: score(cfg))


def score(cfg: ScoreConfig) -> None:
    """Writes and prints the report."""
    result, out = run(cfg), Path(cfg.out_dir)
    write_text(out / "scores.json", report.as_json(result))
    write_text(out / "scores.md", report.markdown(result))
    write_text(out / "scores.html", report.as_html(result))
    print(report.plain(result))
    for note in result.notes:
        print(f"- {note}")
    print(f"scores.json, scores.md, scores.html in {out}")


def run(cfg: ScoreConfig) -> Report:
    """The scores of every method that has answers. Raises UserError or OSError for bad files."""
    conditions = [read_condition(Path(folder)) for folder in cfg.conditions]
    results = read_results(cfg.results, conditions, len(cfg.words))
    notes = [f"protocol: {cfg.protocol}", *results.notes]
    gold = _gold(cfg, conditions)
    dropped = _dropped(cfg, results, gold)
    answers = [a for a in results.answers if a.listener not in dropped and a.key not in gold]
    notes += _about(results, answers, dropped)
    if not answers:
        raise UserError(f"no answers are left to score: {'; '.join(notes[1:])}")
    truth = _truth(cfg, conditions) if results.questionnaire == "speech" else {}
    rows, confusions = [], {}
    for method in dict.fromkeys(m for condition in conditions for m in condition.methods):
        own = [answer for answer in answers if answer.key[0] == method]
        if not own:
            notes.append(f"{method}: no answers")
            continue
        estimates = _opinions(cfg, results.questionnaire, own)
        if known := [a for a in own if truth.get(a.key) is not None]:
            counts = _confusions(known, truth, len(cfg.words))
            confusions[method] = share_of_rows(sum(counts.values()))
            estimates |= _agreement(cfg, counts)
        rows.append(Row(method, len({a.listener for a in own}), len(own), estimates))
    if results.questionnaire == "speech" and len(confusions) < len(rows):
        notes.append("accuracy needs labels.csv, or samples_per_class= for published numbers")
    if (fewest := min(row.listeners for row in rows)) < FEW and cfg.protocol == "exact":
        notes.append(f"intervals of {fewest} listeners are too narrow: ask {FEW} or more")
    facts = {"settings": to_dict(cfg), "questionnaire": results.questionnaire, "dropped": dropped}
    return Report(results.questionnaire, rows, notes, cfg.words, confusions, facts)


# ---- who counts -----------------------------------------------------------------------------


def _gold(cfg: ScoreConfig, conditions: list[Condition]) -> dict[Key, dict[str, int]]:
    """Spoilt clips, and the most that each may get, by question."""
    if cfg.gold is None:
        return {}
    if cfg.gold == "published":
        return PUBLISHED_GOLD
    if cfg.gold == "conditions":
        return {key: most for condition in conditions for key, most in condition.gold.items()}
    return read_gold(Path(cfg.gold))


def _dropped(cfg: ScoreConfig, results: Results, gold: dict[Key, dict[str, int]]) -> dict[str, str]:
    """Listener -> why nothing that they said counts."""
    failures = Counter(
        a.listener
        for a in results.answers
        if a.key in gold and any(v > gold[a.key].get(k, v) for k, v in a.of_clip.items())
    )
    reasons = {
        listener: f"headphone check: {right} right"
        for listener, right in results.right_tones.items()
        if right < cfg.headphones
    }
    return reasons | {
        listener: f"gold clips: {count} called better than they are"
        for listener, count in failures.items()
        if count >= cfg.gold_failures
    }


def _about(results: Results, answers: list[Answer], dropped: dict[str, str]) -> list[str]:
    """What is left of the answers, in words."""
    everyone = {answer.listener for answer in results.answers}
    why = Counter(reason.partition(":")[0] for reason in dropped.values())
    reasons = ", ".join(f"{count} by {reason}" for reason, count in why.items())
    left = f"{len(everyone - dropped.keys())} of {len(everyone)} listeners count"
    spoilt = len(results.answers) - len(answers)
    return [
        left + (f"; left out: {reasons}" if reasons else ""),
        f"{len(answers):,} of {len(results.answers):,} answers count"
        + (f"; {spoilt:,} are of those listeners or of gold clips" if spoilt else ""),
    ]


# ---- what they say --------------------------------------------------------------------------


def _opinions(cfg: ScoreConfig, questionnaire: str, answers: list[Answer]) -> dict[str, Estimate]:
    """Mean opinion by question, of one method."""
    asked, estimates = QUESTIONNAIRES[questionnaire], {}
    for question in asked.of_clips:
        if question is not DIGIT:
            pairs = [(a.listener, a.of_clip[question.field]) for a in answers]
            estimates[question.field] = _mean(cfg, pairs, len(pairs))
    for question in asked.of_pages:
        on_pages = [a for a in answers if question.field in a.of_page]
        n = sum(1 / len(a.page) for a in on_pages)  # published: pages, if all clips are there
        if cfg.protocol == "exact":
            on_pages = list({(a.listener, a.page): a for a in on_pages}.values())
        if on_pages:
            pairs = [(a.listener, a.of_page[question.field]) for a in on_pages]
            estimates[question.field] = _mean(cfg, pairs, n)
    return estimates


def _mean(cfg: ScoreConfig, pairs: list[tuple[str, int]], n: float) -> Estimate:
    """Mean of grades by listener; n: how many independent ones they are, where published."""
    if cfg.protocol == "published":
        grades = np.array([grade for _, grade in pairs], dtype=float)
        if len(grades) < 2:
            return Estimate(float(grades.mean()))
        half = 1.96 * grades.std(ddof=1) / np.sqrt(n)
        return Estimate(float(grades.mean()), float(grades.mean() - half), grades.mean() + half)
    sums: dict[str, np.ndarray] = {}
    for listener, grade in pairs:
        sums[listener] = sums.get(listener, 0) + np.array([grade, 1])
    return _estimate(cfg, sums.values(), lambda t: t[:, 0].sum() / t[:, 1].sum(), (1, len(GRADES)))


def _truth(cfg: ScoreConfig, conditions: list[Condition]) -> dict[Key, int]:
    """What each clip says, as an index of words."""
    truth = {}
    for condition in conditions:
        for key, word in condition.labels.items():
            if word not in cfg.words:
                raise UserError(f"{condition.folder}/labels.csv: no {word!r} in words=: add it")
            truth[key] = cfg.words.index(word)
        if condition.labels or cfg.samples_per_class is None:
            continue
        for key in condition.clips.values():
            number = Path(key[1]).stem
            index = int(number) // cfg.samples_per_class if number.isdecimal() else -1
            if not 0 <= index < len(cfg.words):
                raise UserError(
                    f"samples_per_class={cfg.samples_per_class}: {'/'.join(key)} has no such number"
                )
            truth[key] = index
    return truth


def _confusions(answers: list[Answer], truth: dict[Key, int], words: int) -> dict[str, np.ndarray]:
    """Listener -> counts (words, words): rows are what clips say, columns what was heard."""
    counts: dict[str, np.ndarray] = {}
    for a in answers:
        own = counts.setdefault(a.listener, np.zeros((words, words)))
        own[truth[a.key], a.of_clip[DIGIT.field]] += 1
    return counts


def _agreement(cfg: ScoreConfig, counts: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Accuracy and Cohen's kappa of what was heard; published: without intervals."""
    rows = [own.ravel() for own in counts.values()]
    functions = {"accuracy": (accuracy, (0, 1)), "kappa": (kappa, (-1, 1))}
    return {
        name: _estimate(cfg, rows, lambda t, f=function: f(_square(t.sum(0))), limits)
        for name, (function, limits) in functions.items()
    }


def accuracy(counts: np.ndarray) -> float:
    """The share on the diagonal of a table of counts (C, C)."""
    return float(np.trace(counts) / counts.sum())


def kappa(counts: np.ndarray) -> float:
    """Cohen's kappa of a table of counts (C, C): agreement beyond chance, 1 at best (Cohen 1960).

    0 where chance alone agrees always: one class, which is always said.
    """
    by_chance = float(counts.sum(0) @ counts.sum(1) / counts.sum() ** 2)
    return (accuracy(counts) - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0


def _square(flat: np.ndarray) -> np.ndarray:
    side = round(len(flat) ** 0.5)
    return flat.reshape(side, side)


def _estimate(
    cfg: ScoreConfig,
    rows: Iterable[np.ndarray],
    function: Callable[[np.ndarray], float],
    limits: tuple[float, float],
) -> Estimate:
    """function of all listeners' rows (n, D), and its interval over resampled listeners."""
    table = np.stack(list(rows)).astype(float)
    value = float(function(table))
    if cfg.protocol == "published" or not cfg.bootstrap or len(table) < 2:
        return Estimate(value)
    low, high = bootstrap(function, table, n=cfg.bootstrap, seed=cfg.seed)
    return Estimate(value, max(low, limits[0]), min(high, limits[1]))
