"""Split a folder of audio into train, valid and test CSVs with columns path,label."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from omegaconf import MISSING

from rawaudio import audio, command
from rawaudio.config import parse_args, setting
from rawaudio.errors import UserError
from rawaudio.files import natural, write_atomically

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "valid", "test")
SHIPPED = ("sc09", "fsdd")  # names of the CSVs that travel with the repository
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}

COLUMNS = ("path", "label", "speaker", "start", "stop")  # path and label always
Row = dict[str, str]  # column -> value
FRACTION = {"file": 0.05, "speaker": 0.05, "time": 0.06}  # time: YouTubeMix and Beethoven, 88/6/6

EXAMPLES = """\
python split_data.py --root_path speech_commands --sc09_only True     # the spoken digits (SC09)
python split_data.py --root_path speech_commands                      # all its words
python split_data.py --root_path fsdd/recordings --fsdd True          # FSDD's own split
python split_data.py --root_path my_audio --valid_fraction 0.1        # any folder, by file
python split_data.py --root_path my_audio --by speaker                # no speaker in two splits
python split_data.py --root_path piano --by time                      # hours of music, 88/6/6 %"""
NOTES = """\
Speech Commands is known by its validation_list.txt and testing_list.txt. Paths in the CSVs are
relative to root_path: train with data_root=ROOT_PATH. A column `speaker` is written where file
names tell who speaks: a model can be told it (train.py conditions=[label,speaker]). Splits by time
have two columns more, start and stop in seconds, for the recording that lies in two of them: train
with sample_len= too."""


@dataclasses.dataclass
class SplitConfig:
    root_path: str = setting(MISSING, "folder of audio")
    sc09_only: bool = setting(False, "Speech Commands: digits only; false: all words")
    fsdd: bool = setting(False, "Free Spoken Digit Dataset and its own split")
    valid_fraction: float | None = setting(None, "of any other folder; none: 0.05, 0.06 by time")
    test_fraction: float | None = setting(None, "the same for the test")
    by: str = setting("file", "what stays together: file, speaker or time")
    speaker_regex: str = setting(r"^[^_\-.]+", "speaker in the file name; its first group if any")
    out_dir: str = setting("splits", "folder of the CSVs")
    name: str | None = setting(None, "NAME-train.csv ...; none: sc09, commands, fsdd or the folder")
    overwrite: bool = setting(False, "replace CSVs that differ")


def check(cfg: SplitConfig) -> None:
    """Raises UserError for what does not go together; fills in the fractions."""
    root = Path(cfg.root_path)
    if not root.is_dir():
        raise UserError(f"root_path={root} is {'a file' if root.exists() else 'not there'}")
    if cfg.sc09_only and cfg.fsdd:
        raise UserError("sc09_only and fsdd are two data sets; choose one")
    if cfg.by not in FRACTION:
        raise UserError(f"by={cfg.by}: expected {', '.join(FRACTION)}")
    for name in ("valid_fraction", "test_fraction"):
        if getattr(cfg, name) is None:
            setattr(cfg, name, FRACTION[cfg.by])
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)}: expected a number from 0 to below 1")
    if cfg.valid_fraction + cfg.test_fraction >= 1:
        raise UserError("valid_fraction and test_fraction leave nothing to train on")
    try:
        re.compile(cfg.speaker_regex)
    except re.error as error:
        raise UserError(f"speaker_regex={cfg.speaker_regex}: {error}") from error


# ---- splits: (split, row) of every clip, and notes for whoever asked -----------------------

Splits = tuple[list[tuple[str, Row]], list[str]]


def split_speech_commands(root: Path, words: Iterable[str] | None = None) -> Splits:
    """The official split of Speech Commands, v0.01 or v0.02: two lists, and train is the rest.

    words: the folders to take; None takes every folder but _background_noise_. Who speaks is what
    the file names begin with, 8 hex digits. A note for each list tells what is not on disk.
    """

    def is_wanted(path: str) -> bool:
        folder, slash, _ = path.partition("/")
        return bool(slash) and (folder in words if words else not folder.startswith("_"))

    on_disk = list(filter(is_wanted, find_audio(root)))
    if not on_disk:
        what = "folders of digits (zero .. nine)" if words else "folders of words"
        raise UserError(f"{root} has the lists of Speech Commands, but no {what} with audio")
    split_of, notes = {}, []
    for split, name in LISTS.items():
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        listed = set(filter(is_wanted, map(str.strip, lines)))
        split_of |= dict.fromkeys(listed, split)
        if missing := len(listed.difference(on_disk)):
            notes.append(f"{name}: {missing:,} of {len(listed):,} files are not on disk, left out")
    speakers = {path: path.rpartition("/")[2].split("_")[0] for path in on_disk}
    rows = [(split_of.get(p, "train"), _row(p, speaker=speakers[p])) for p in on_disk]
    return rows, notes


def split_fsdd(root: Path) -> Splits:
    """FSDD, {digit}_{speaker}_{take}.wav: takes 0-4 are its test set, 5-49 its training set.

    Of the training set, takes 5-7 are held out for validation: 2,520 / 180 / 300 clips. Labels are
    words, zero to nine, as in Speech Commands.
    """
    rows, paths = [], find_audio(root)
    for path in paths:
        if match := re.fullmatch(r"(\d)_([^_/]+)_(\d+)\.wav", path):
            take = int(match[3])
            split = "test" if take < 5 else "valid" if take < 8 else "train"
            rows.append((split, _row(path, label=DIGITS[int(match[1])], speaker=match[2])))
    if not rows:
        deeper = root / "recordings"
        hint = f"; did you mean root_path={deeper}?" if deeper.is_dir() else ""
        raise UserError(f"no file in {root} is named {{digit}}_{{speaker}}_{{take}}.wav{hint}")
    other = len(paths) - len(rows)
    return rows, [f"{other:,} files with other names left out"] if other else []


def split_folder(root: Path, cfg: SplitConfig) -> Splits:
    """Any folder: each clip's split is a hash of its path, or of its speaker's name.

    No random numbers: a clip keeps its split when others are added. The label is the folder
    that the clip lies in, "" at the top; by speaker, rows name the speaker too.
    """
    rows, speakers = [], set()
    for path in find_audio(root):
        key, told = path, {}
        if cfg.by == "speaker":
            match = re.search(cfg.speaker_regex, path.rpartition("/")[2])
            if match is None:
                raise UserError(f"speaker_regex={cfg.speaker_regex} finds no speaker in {path}")
            key = match[1] if match.re.groups else match[0]
            told = {"speaker": key}
            speakers.add(key)
        digest = hashlib.sha256(key.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
        split = "valid" if place < cfg.test_fraction + cfg.valid_fraction else "train"
        rows.append(("test" if place < cfg.test_fraction else split, _row(path, **told)))
    return rows, [f"{len(speakers):,} speakers"] if speakers else []


def split_by_time(root: Path, cfg: SplitConfig) -> Splits:
    """Recordings, one after the other in natural order (2 before 10): the first part of the time is
    for training, the next for validation, the last for testing.

    Of a recording that lies in two splits, each gets its part: start and stop in seconds.
    """
    durations, notes = {}, []
    for path in sorted(find_audio(root), key=natural):
        try:
            durations[path] = audio.duration(root / path)
        except audio.AudioError as error:
            notes.append(f"{path} left out: {error.reason}")
    if notes:
        notes.append(f"{len(notes):,} of {len(notes) + len(durations):,} files are left out")
    total = sum(durations.values())
    shares = (1 - cfg.valid_fraction - cfg.test_fraction, 1 - cfg.test_fraction, 1)
    borders = [total * share for share in shares]
    spans = list(zip(SPLITS, [0.0, *borders], borders, strict=False))
    rows, begin = [], 0.0
    for path, seconds in durations.items():
        for split, first, last in spans:
            start, stop = max(first - begin, 0.0), min(last - begin, seconds)
            if stop - start >= 0.001:
                begins = f"{start:.3f}" if start > 0 else ""
                ends = f"{stop:.3f}" if stop < seconds else ""
                rows.append((split, _row(path, start=begins, stop=ends)))
        begin += seconds
    minutes = ", ".join(f"{split} {(b - a) / 60:,.1f}" for split, a, b in spans)
    return rows, [*notes, f"minutes: {minutes}"]


def find_audio(root: Path) -> list[str]:
    """Paths of all audio below root, relative to it, with / on every system, sorted."""
    paths = {path.relative_to(root).as_posix() for path in audio.find(root)}
    if not paths:
        raise UserError(f"no audio below {root}; looked for {' '.join(audio.AUDIO_SUFFIXES)}")
    if other := sorted(path for path in paths if audio.shown(path) != path):  # CSVs are UTF-8
        what = f"left out {len(other):,} files with names that are not UTF-8, the first"
        print(f"{what}: {audio.shown(other[0])}; rename them", file=sys.stderr)
    return sorted(paths.difference(other))


def _row(path: str, **cells: str) -> Row:
    """The label is the folder that the file lies in, where `cells` does not tell."""
    return {"path": path, "label": path.split("/")[-2] if "/" in path else ""} | cells


# ---- CSVs -----------------------------------------------------------------------------------


def write_splits(rows: list[tuple[str, Row]], out_dir: Path, name: str, overwrite: bool) -> str:
    """Writes {name}-{train,valid,test}.csv; returns a line about each.

    Raises UserError, before any is written, for one that is there already and differs, if not
    `overwrite`.
    """
    given = {"path", "label"}.union(*(row for _, row in rows))
    columns = [column for column in COLUMNS if column in given]
    texts, old, lines = {}, {}, []
    for split in SPLITS:
        own = [row for of, row in rows if of == split]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in own:
            # ./ keeps the spaces of a name that begins with some: readers drop them
            dot = "./" if row["path"].startswith(" ") else ""
            writer.writerow(row | {"path": dot + row["path"]})
        path = out_dir / f"{name}-{split}.csv"
        texts[path] = text.getvalue().encode()
        old[path] = path.read_bytes() if path.is_file() else None
        if old[path] is None:
            done = "written"
        else:
            done = "unchanged" if old[path] == texts[path] else "replaced"
        lines.append(f"  {str(path):<40} {len(own):>7,} clips  {done}")
    differ = [str(path) for path in texts if old[path] not in (None, texts[path])]
    if differ and not overwrite:
        raise UserError(
            f"already there, with other clips: {', '.join(differ)}. Nothing was written; choose "
            "another name=, or replace with overwrite=true"
        )
    for path, text in texts.items():
        write_atomically(path, text)
    return "\n".join(lines)


def run(cfg: SplitConfig) -> None:
    """Writes the splits that are asked for, and prints what they hold."""
    root, out_dir = Path(cfg.root_path), Path(cfg.out_dir)
    absent = [name for name in LISTS.values() if not (root / name).is_file()]
    if cfg.fsdd:
        kind, (rows, notes) = "fsdd", split_fsdd(root)
    elif not absent:
        kind = "sc09" if cfg.sc09_only else "commands"
        rows, notes = split_speech_commands(root, DIGITS if cfg.sc09_only else None)
    elif cfg.sc09_only or len(absent) == 1:  # one list alone: a broken copy, not any folder
        deeper = sorted([*root.glob(f"*/{LISTS['valid']}"), *root.glob(f"*/*/{LISTS['valid']}")])
        hint = f"; did you mean root_path={deeper[0].parent}?" if deeper else ""
        missing = " and no ".join(absent)
        raise UserError(f"{root} has no {missing}: not the whole of Speech Commands{hint}")
    else:
        kind = re.sub(r"[^\w.]+", "-", root.resolve().name) or "audio"
        rows, notes = (split_by_time if cfg.by == "time" else split_folder)(root, cfg)
    filled = {split for split, _ in rows}
    if "train" not in filled:
        raise UserError("no clip is left for training: smaller fractions, or by=file?")
    for split in SPLITS[1:]:
        if split not in filled and getattr(cfg, f"{split}_fraction"):
            notes.append(f"{split} is empty: more audio, a larger {split}_fraction or by=file")
    try:
        lines = write_splits(rows, out_dir, cfg.name or kind, cfg.overwrite)
    except UserError:
        if cfg.name or kind not in SHIPPED:
            raise
        # The shipped splits list the whole data set; what is on this disk gets its own name.
        lines = write_splits(rows, out_dir, f"{kind}-local", cfg.overwrite)
        notes.append(
            f"{kind}-*.csv in {out_dir} list other clips than are here and were kept; "
            f"these are {kind}-local-*.csv (overwrite=true replaces {kind}-*.csv)"
        )
    print(lines, *(f"  note: {note}" for note in notes), f"  train with data_root={root}", sep="\n")


def joined(argv: list[str]) -> list[str]:
    """`--key value` as `--key=value`, and a flag alone as true."""
    pairs: list[str] = []
    for argument in argv:
        if pairs and pairs[-1].startswith("--") and "=" not in pairs[-1] and argument[:2] != "--":
            pairs[-1] += f"={argument}"
        else:
            pairs.append(argument)
    flags = ("--sc09_only", "--fsdd", "--overwrite")
    return [f"{pair}=true" if pair in flags else pair for pair in pairs]


def main(argv: list[str] | None = None) -> int:
    argv = joined(sys.argv[1:] if argv is None else argv)
    prog = "python split_data.py"
    cfg = parse_args(SplitConfig, argv, prog=prog, examples=EXAMPLES, notes=NOTES, check=check)
    return command.run(lambda: run(cfg))


if __name__ == "__main__":
    sys.exit(main())
