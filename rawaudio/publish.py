"""From the weights of a finished run to the file that is shipped: small, scored, documented.

Writes, below `out_dir`, sashimi/weights/NAME.safetensors, NAME.webp (spectrograms of twenty clips),
docs/listen.html (twenty clips of every shipped model, unselected: of one with conditions, every
value of the first in turn), and, for the tests, tests/fixtures/golden-NAME.json: outputs that these
weights must go on giving.

Matrices are stored as bfloat16, the state spaces' own parameters, norms and biases as float32: a
state space forgets over thousands of steps, and a rounding of 0.4 % in its poles is heard. What
that costs is measured on the validation clips, and refused if it is too much.
"""

import hashlib
import itertools
import json
import logging
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import MISSING
from torch import Tensor

from rawaudio import command
from rawaudio.checkpoint import load_checkpoint, load_model, save_checkpoint
from rawaudio.config import check_name, parse_args, setting
from rawaudio.data import ClipDataset
from rawaudio.errors import UserError
from rawaudio.families import ENTRIES, family_of
from rawaudio.files import read_metadata, read_pt, write_atomically, write_text
from rawaudio.hub import BEST_FIRST, check_entry
from rawaudio.model import Model
from rawaudio.page import Clip, new_figure, spectrogram, webp, write_page

EXAMPLES = r"""
python -m rawaudio.publish checkpoint=runs/digits/best.safetensors name=sashimi_ar_digits \
    train_csv=splits/fsdd-train.csv valid_csv=splits/fsdd-valid.csv \
    test_csv=splits/fsdd-test.csv data_root=fsdd/recordings \
    data="Free Spoken Digit Dataset" licence="CC BY-SA 4.0"
"""


@dataclass
class PublishConfig:
    checkpoint: str = setting(MISSING, "weights of a run: its best.safetensors")
    name: str = setting(MISSING, f"the hub entry they are for: {', '.join(ENTRIES)}")
    train_csv: str = setting(MISSING, "clips that it was trained on, for the hash of the data")
    valid_csv: str = setting(MISSING, "clips for validation")
    test_csv: str = setting(MISSING, "clips of the official test set")
    data_root: str | None = setting(None, "folder that the paths of the CSVs start from")
    peak: float | None = setting(None, "what clips were scaled to in training; none: as recorded")
    before: list[str] = setting([], "weights or last.pt that it started from: their steps count")
    data: str = setting(MISSING, "name of the data set")
    licence: str = setting(MISSING, "of the weights")
    temperature: float | None = setting(None, "of its clips by default; none: as it is")
    nucleus_p: float | None = setting(None, "the same for the nucleus; none: as it is")
    guidance: float | None = setting(None, "the same for the guidance; none: as it is")
    guided: list[str] = setting([], "conditions that it pushes towards; none given: as it is")
    most: float = setting(0.002, "loss that storing it small may cost: bits, or relative error")
    out_dir: str = setting(".", "the repository")

    def __post_init__(self) -> None:
        check_name("entry", self.name, ENTRIES)


N_CLIPS = 20  # of a model, to look at and to listen to


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`; 1 too where too much is lost."""
    cfg = parse_args(PublishConfig, argv, prog="python -m rawaudio.publish", examples=EXAMPLES)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return command.run(lambda: publish(cfg))


def publish(cfg: PublishConfig) -> int:
    """Writes everything; the shipped weights last, so that no file is newer than its weights."""
    model = load_model(cfg.checkpoint, key="checkpoint")
    check_entry(cfg.name, model, cfg.checkpoint)
    task = family_of(model).task
    steps = [_step(Path(path)) for path in (*cfg.before, cfg.checkpoint)]
    own = {k: getattr(cfg, k) for k in ("temperature", "nucleus_p", "guidance", "guided")}
    own = {k: v for k, v in own.items() if v not in (None, [])}
    if strange := [k for k in own if not hasattr(model.config, k)]:
        raise UserError(f"{strange[0]}={own[strange[0]]}: {model.KIND} model has no {strange[0]}")
    model.config = replace(model.config, **own)
    sets = {
        kind: ClipDataset(
            getattr(cfg, f"{kind}_csv"),
            model.sample_rate,
            cfg.data_root,
            pcm=task.pcm,
            peak=cfg.peak,
            progress=False,
            quantizer=getattr(model.config, "quantizer", "mulaw"),
        )
        for kind in ("train", "valid", "test")
    }
    if model.conditions:
        for ds in sets.values():
            ds.tell(model.conditions)
    unit, full = next(iter(task.scores(model, sets["valid"]).items()))
    pack(model)
    scores = {f"valid_{k}": v for k, v in task.scores(model, sets["valid"]).items()}
    lost = scores[f"valid_{unit}"] - full
    print(f"validation {unit}: {full:.5f} in float32, {lost:+.5f} as stored")
    if lost >= cfg.most:
        print(f"error: {cfg.checkpoint} loses {lost:.5f} {unit}, most={cfg.most}", file=sys.stderr)
        return 1
    scores |= {f"test_{k}": v for k, v in task.scores(model, sets["test"]).items()}
    print(", ".join(f"{k} {v:.4f}" for k, v in scores.items()))

    root = Path(cfg.out_dir)
    golden = root / "tests" / "fixtures" / f"golden-{cfg.name}.json"
    write_text(golden, json.dumps(task.golden(model)) + "\n")
    clips = first_clips(model)
    picture = webp(sheet(clips, model.sample_rate))
    write_atomically(root / "sashimi" / "weights" / f"{cfg.name}.webp", picture)
    path = root / "sashimi" / "weights" / f"{cfg.name}.safetensors"
    save_checkpoint(
        path,
        model,
        compact(model),
        step=sum(steps),
        data=cfg.data,
        licence=cfg.licence,
        command=f"bash sashimi/weights/{cfg.name}.sh",
        data_sha256=sha256(sets["train"].data),
        **{k: round(v, 5) for k, v in scores.items()},
        made_with=f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    )
    listening_page(root / "docs" / "listen.html", path.parent, {cfg.name: clips})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB; listen: {root / 'docs' / 'listen.html'}")
    return 0


def _step(path: Path) -> int:
    """Of training, after which these weights or this last.pt were written."""
    return (read_pt(path) if path.suffix == ".pt" else read_metadata(path)).get("step") or 0


# ---- stored small ---------------------------------------------------------------------------


def compact(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """The type that every tensor is stored in: bfloat16 for matrices outside the state spaces.

    C of a state space, (channels, H, N, 2), and its poles are none; embeddings are.
    """
    return {
        k: torch.bfloat16 if v.dim() == 2 and k.endswith("weight") else v.dtype
        for k, v in model.state_dict().items()
    }


@torch.no_grad()
def pack(model: torch.nn.Module) -> None:
    """Rounds the weights to what will be stored."""
    state = model.state_dict()
    for name, dtype in compact(model).items():
        state[name].copy_(state[name].to(dtype))


def sha256(samples: Tensor) -> str:
    """Of decoded samples, clip after clip."""
    return hashlib.sha256(samples.contiguous().view(torch.uint8).numpy()).hexdigest()


# ---- to look at and to listen to -------------------------------------------------------------


def sheet(clips: list[tuple[str, Tensor]], sample_rate: int, columns: int = 5) -> Figure:
    """Spectrograms of clips (T,) below their names, in rows, on one picture."""
    rows = -(-len(clips) // columns)
    figure = new_figure(2.2 * columns, 1.3 * rows, dpi=100)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for (name, wav), axes in zip(clips, places, strict=False):
        axes.set_title(name, fontsize=7, pad=2)
        image = spectrogram(wav, sample_rate).numpy()
        axes.imshow(image, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0)
        axes.set_axis_off()
    return figure


def first_clips(model: Model) -> list[tuple[str, Tensor]]:
    """Twenty clips (T,) with seed 0, unselected, and their names: what they were told, or numbers.

    The first condition takes its values in turn, the others are drawn.
    """
    generator, given = torch.Generator().manual_seed(0), {}
    for name, values in itertools.islice(model.conditions.items(), 1):
        given[name] = [values[i % len(values)] for i in range(N_CLIPS)]
    told = model.draw_conditions(N_CLIPS, generator, **given)
    wavs = model.generate(N_CLIPS, generator=generator.manual_seed(0), **told)
    names = [" · ".join(words) for words in zip(*told.values(), strict=True)]
    return list(zip(names or [str(i + 1) for i in range(N_CLIPS)], wavs, strict=True))


def listening_page(path: Path, weights: Path, made: dict[str, list[tuple[str, Tensor]]]) -> None:
    """`first_clips` of every model whose weights travel with the code; made: those at hand."""
    clips = []
    for name in BEST_FIRST:
        if not (weights / f"{name}.safetensors").exists():
            continue
        model = load_checkpoint(weights / f"{name}.safetensors")
        named = made[name] if name in made else first_clips(model)
        clips += [Clip(f"{name} · {what}", wav, model.sample_rate) for what, wav in named]
    note = (
        "The first twenty clips of each model with seed 0: nothing was chosen or left out. Words "
        "and names beside a clip are what the model was told to say, and in whose voice."
    )
    write_page(path, clips, "simple-sashimi: listen", note)


if __name__ == "__main__":
    sys.exit(main())
