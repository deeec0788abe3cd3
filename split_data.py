"""Split a folder of audio into train, valid and test CSVs with columns path,label."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from rawaudio import command
from rawaudio.errors import UserError
from rawaudio.files import natural

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "valid", "test")
SHIPPED = ("sc09", "fsdd")  # names of the CSVs that travel with the repository
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}

COLUMNS = ("path", "label", "speaker", "start", "stop")  # path and label always
Rows = dict[str, list[dict[str, str]]]  # split -> column -> value of each clip
FRACTION = {"file": 0.05, "speaker": 0.05, "time": 0.06}  # time: YouTubeMix and Beethoven, 88/6/6

ABOUT = """\
Split a folder of audio into train, valid and test CSVs with columns path,label.

examples:
  python split_data.py --root_path speech_commands --sc09_only True     the spoken digits (SC09)
  python split_data.py --root_path speech_commands                      all its words
  python split_data.py --root_path fsdd/recordings --fsdd True          FSDD's own split
  python split_data.py --root_path my_audio --valid_fraction 0.1        any folder, by file
  python split_data.py --root_path my_audio --by speaker                no speaker in two splits
  python split_data.py --root_path piano --by time                      hours of music, 88/6/6 %

Speech Commands is known by its validation_list.txt and testing_list.txt. Paths in the CSVs are
relative to --root_path: train with data_root=ROOT_PATH. A column `speaker` is written where file
names tell who speaks: a model can be told it (train.py conditions=[label,speaker]). Splits by time
have two columns more, start and stop in seconds, for the recording that lies in two of them: train
with sample_len= too."""


class SplitError(UserError):
    """What the user asked for cannot be done; the message says why and what to do."""


# ---- the command line -----------------------------------------------------------------------


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"True or False expected, not {text!r}")
    return known[text.lower()]


def _folder(text: str) -> Path:
    """A path; the shell leaves the ~ of --root_path=~/x alone."""
    return Path(os.path.expanduser(text))


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to below 1 expected, not {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python split_data.py --root_path DIR [--name value ...]",
        description=ABOUT,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=100
        ),
    )
    add = parser.add_argument
    boolean = {"type": _boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add(
        "--root_path", type=_folder, required=True, metavar="DIR", help="folder of audio (required)"
    )
    add("--sc09_only", **boolean, help="Speech Commands: digits only (False: all words)")
    add("--fsdd", **boolean, help="Free Spoken Digit Dataset and its own split (False)")
    defaults = "any folder (0.05; 0.06 by time)"
    add("--valid_fraction", type=_fraction, metavar="X", help=defaults)
    add("--test_fraction", type=_fraction, metavar="X", help=defaults)
    add("--by", choices=tuple(FRACTION), default="file", help="what stays together (file)")
    add(
        "--speaker_regex",
        default=r"^[^_\-.]+",
        metavar="REGEX",
        help="speaker in the file name; its first group if any (up to the first _ - or .)",
    )
    add("--out_dir", type=_folder, default=Path("splits"), metavar="DIR", help="for CSVs (splits)")
    add("--name", metavar="NAME", help="NAME-train.csv ... (sc09, commands, fsdd or the folder)")
    add("--overwrite", **boolean, help="replace CSVs that differ (False)")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """What is asked for. Ends the process, with a line, where that cannot be followed."""
    command.forgiving_console()
    args = _parser().parse_args(argv)
    if status := command.run(lambda: check(args)):
        raise SystemExit(status)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises SplitError for what does not go together; fills in the fractions."""
    root: Path = args.root_path
    if not root.is_dir():
        raise SplitError(f"--root_path {root} is {'a file' if root.exists() else 'not there'}")
    if args.sc09_only and args.fsdd:
        raise SplitError("--sc09_only and --fsdd are two data sets; choose one")
    for name in ("valid_fraction", "test_fraction"):
        if getattr(args, name) is None:
            setattr(args, name, FRACTION[args.by])
    if args.valid_fraction + args.test_fraction >= 1:
        raise SplitError("--valid_fraction and --test_fraction leave nothing to train on")
    try:
        re.compile(args.speaker_regex)
    except re.error as error:
        raise SplitError(f"--speaker_regex {args.speaker_regex!r}: {error}") from error


if __name__ == "__main__":  # answered before the imports below, which take seconds
    parse()

from rawaudio import audio

# ---- splits ---------------------------------------------------------------------------------


def find_audio(root: Path) -> list[str]:
    """Paths of all audio below root, relative to it, with / on every system, sorted."""
    found = [path.relative_to(root).as_posix() for path in audio.find(root)]
    if not found:
        raise SplitError(f"no audio below {root}; looked for {' '.join(audio.AUDIO_SUFFIXES)}")
    if other := [path for path in found if audio.shown(path) != path]:  # CSVs are UTF-8
        print(
            f"left out {len(other):,} files with names that are not UTF-8, the first: "
            f"{audio.shown(other[0])}; rename them",
            file=sys.stderr,
        )
    return sorted(set(found) - set(other))


def split_speech_commands(root: Path, words: Iterable[str] | None = None) -> tuple[Rows, list[str]]:
    """The official split of Speech Commands, v0.01 or v0.02: two lists, and train is the rest.

    words: the folders to take; None takes every folder but _background_noise_.
    Returns the rows and one note for each list: how many of its files are not on disk.
    """
    wanted = set(words) if words is not None else None

    def is_wanted(path: str) -> bool:
        folder = path.split("/")[0]
        listed = "/" in path and not folder.startswith("_")
        return listed and (wanted is None or folder in wanted)

    on_disk = set(filter(is_wanted, find_audio(root)))
    if not on_disk:
        what = "folders of digits (zero .. nine)" if wanted else "folders of words"
        raise SplitError(f"{root} has the lists of Speech Commands, but no {what} with audio")
    rows, notes, rest = {}, [], set(on_disk)
    for split, name in LISTS.items():
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        listed = set(filter(is_wanted, map(str.strip, lines)))
        here = listed & on_disk
        if missing := len(listed) - len(here):
            notes.append(f"{name}: {missing:,} of {len(listed):,} files are not on disk, left out")
        rows[split] = _spoken(here)
        rest -= listed
    rows["train"] = _spoken(rest)
    return rows, notes


def _spoken(paths: Iterable[str]) -> list[dict[str, str]]:
    """Rows of Speech Commands; who speaks is what its file names begin with, 8 hex digits."""
    return [row | {"speaker": row["path"].split("/")[-1].split("_")[0]} for row in _labelled(paths)]


def split_fsdd(root: Path) -> tuple[Rows, list[str]]:
    """FSDD, {digit}_{speaker}_{take}.wav: takes 0-4 are its test set, 5-49 its training set.

    Of the training set, takes 5-7 are held out for validation: 2,520 / 180 / 300 clips. Labels are
    words, zero to nine, as in Speech Commands.
    """
    rows: Rows = {split: [] for split in SPLITS}
    other = 0
    for path in find_audio(root):
        match = re.fullmatch(r"(\d)_([^_/]+)_(\d+)\.wav", path)
        if match is None:
            other += 1
            continue
        take = int(match[3])
        split = "test" if take < 5 else "valid" if take < 8 else "train"
        rows[split].append({"path": path, "label": DIGITS[int(match[1])], "speaker": match[2]})
    if not any(rows.values()):
        hint = ""
        if (root / "recordings").is_dir():
            hint = f"; did you mean --root_path {root / 'recordings'}?"
        raise SplitError(f"no file in {root} is named {{digit}}_{{speaker}}_{{take}}.wav{hint}")
    return rows, [f"{other:,} files with other names left out"] if other else []


def split_folder(
    root: Path, valid_fraction: float, test_fraction: float, by: str, speaker_regex: str
) -> tuple[Rows, list[str]]:
    """Any folder: each clip's split is a hash of its path, or of its speaker's name.

    No random numbers: a clip keeps its split when others are added. The label is the folder
    that the clip lies in, "" at the top; by speaker, rows name the speaker too.
    """
    rows: Rows = {split: [] for split in SPLITS}
    speakers = set()
    for path in find_audio(root):
        key = path
        if by == "speaker":
            match = re.search(speaker_regex, path.split("/")[-1])
            if match is None:
                raise SplitError(
                    f"--speaker_regex {speaker_regex!r} finds no speaker in the file name of {path}"
                )
            key = match[1] if match.re.groups else match[0]
            speakers.add(key)
        digest = hashlib.sha256(key.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
        if place < test_fraction:
            split = "test"
        elif place < test_fraction + valid_fraction:
            split = "valid"
        else:
            split = "train"
        speaker = {"speaker": key} if by == "speaker" else {}
        rows[split].append(_labelled([path])[0] | speaker)
    return rows, [f"{len(speakers):,} speakers"] if speakers else []


def split_by_time(
    root: Path, valid_fraction: float, test_fraction: float
) -> tuple[Rows, list[str]]:
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
    borders = [0.0, total * (1 - valid_fraction - test_fraction), total * (1 - test_fraction)]
    rows: Rows = {split: [] for split in SPLITS}
    begin = 0.0
    for path, seconds in durations.items():
        for split, first, last in zip(SPLITS, borders, [*borders[1:], total], strict=True):
            start, stop = max(first - begin, 0.0), min(last - begin, seconds)
            if stop - start < 0.001:
                continue
            part = {
                "start": f"{start:.3f}" if start > 0 else "",
                "stop": f"{stop:.3f}" if stop < seconds else "",
            }
            rows[split].append(_labelled([path])[0] | part)
        begin += seconds
    lengths = [b - a for a, b in zip(borders, [*borders[1:], total], strict=True)]
    minutes = ", ".join(f"{s} {n / 60:,.1f}" for s, n in zip(SPLITS, lengths, strict=True))
    return rows, [*notes, f"minutes: {minutes}"]


def _labelled(paths: Iterable[str]) -> list[dict[str, str]]:
    """Rows with the folder that each file lies in as its label."""
    return [{"path": p, "label": p.split("/")[-2] if "/" in p else ""} for p in sorted(paths)]


def write_splits(rows: Rows, out_dir: Path, name: str, overwrite: bool) -> list[str]:
    """Writes {name}-{train,valid,test}.csv, all or none; returns a line about each.

    A file that is there already and differs is replaced only when `overwrite`; else SplitError.
    """
    texts = {}
    for split in SPLITS:
        text = io.StringIO()
        found = {column for some in rows.values() for row in some for column in row}
        columns = [c for c in COLUMNS if c in found | {"path", "label"}]
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows[split]:
            # ./ keeps the spaces of a name that begins with some: readers drop them
            dot = "./" if row["path"].startswith(" ") else ""
            writer.writerow(row | {"path": dot + row["path"]})
        texts[out_dir / f"{name}-{split}.csv"] = text.getvalue().encode()
    old = {path: path.read_bytes() if path.is_file() else None for path in texts}
    differ = [path for path, text in texts.items() if old[path] not in (None, text)]
    if differ and not overwrite:
        raise SplitError(
            f"already there, with other clips: {', '.join(map(str, differ))}. Nothing was written; "
            f"choose another --name, or replace with --overwrite True"
        )

    out_dir.mkdir(parents=True, exist_ok=True)
    drafts = {path: path.with_suffix(f".csv.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            drafts[path].write_bytes(text)
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    lines = []
    for split, path in zip(SPLITS, texts, strict=True):
        done = "written" if old[path] is None else "replaced" if path in differ else "unchanged"
        lines.append(f"  {str(path):<40} {len(rows[split]):>7,} clips  {done}")
    return lines


def run(args: argparse.Namespace) -> list[str]:
    """Splits as asked; returns the lines to print. Raises SplitError, having written nothing."""
    root: Path = args.root_path
    if args.fsdd:
        kind, (rows, notes) = "fsdd", split_fsdd(root)
    elif not (absent := [name for name in LISTS.values() if not (root / name).is_file()]):
        kind = "sc09" if args.sc09_only else "commands"
        rows, notes = split_speech_commands(root, DIGITS if args.sc09_only else None)
    elif args.sc09_only or len(absent) == 1:  # one list alone: a broken copy, not any folder
        deeper = sorted([*root.glob(f"*/{LISTS['valid']}"), *root.glob(f"*/*/{LISTS['valid']}")])
        hint = f"; did you mean --root_path {deeper[0].parent}?" if deeper else ""
        missing = " and no ".join(absent)
        raise SplitError(f"{root} has no {missing}: not the whole of Speech Commands{hint}")
    else:
        kind = re.sub(r"[^\w.]+", "-", root.resolve().name) or "audio"
        fractions = args.valid_fraction, args.test_fraction
        if args.by == "time":
            rows, notes = split_by_time(root, *fractions)
        else:
            rows, notes = split_folder(root, *fractions, args.by, args.speaker_regex)
    if not rows["train"]:
        raise SplitError("no clip is left for training: smaller fractions, or --by file?")
    for split in SPLITS[1:]:
        if not rows[split] and getattr(args, f"{split}_fraction"):
            notes.append(f"{split} is empty: more audio, a larger --{split}_fraction or --by file")

    names = [args.name or kind]
    if not args.name and kind in SHIPPED:
        # The shipped splits list the whole data set; what is on this disk gets its own name.
        names.append(f"{kind}-local")
    for name in names:
        try:
            lines = write_splits(rows, args.out_dir, name, args.overwrite)
            break
        except SplitError:
            if name == names[-1]:
                raise
    if name != names[0]:
        notes.append(
            f"{kind}-*.csv in {args.out_dir} list other clips than are here and were kept; "
            f"these are {name}-*.csv (--overwrite True replaces {kind}-*.csv)"
        )
    return [*lines, *(f"  note: {note}" for note in notes), f"  train with data_root={root}"]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return command.run(lambda: print("\n".join(run(args))))


if __name__ == "__main__":
    sys.exit(main())
