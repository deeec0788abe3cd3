"""From one clip to another: wav files, and a page of players.

way=path   clips on the way between two points: on the sphere of latents, straight between styles
way=mix    more and more layers, the finest first, have the style of the second clip (models with
           styles; ASGAN)
way=edit   a clip moves towards a class, across the plane that parts it from its own, as far as
           clips of that class are; planes are fitted to what the classifier hears
           (arXiv:1907.10786)

Points are drawn as `rawaudio.generate` draws them. Conditions are told by name: one value, or two
for the ends of a path.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.classifier import Classifier, load_classifier
from metrics.latents import classified, separating_planes
from rawaudio import audio, command
from rawaudio.config import as_written, check_allowed, check_name, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.families import ENTRIES
from rawaudio.hub import load_asked
from rawaudio.page import Clip, write_page
from rawaudio.seeds import seeded
from rawaudio.spaces import Space

EXAMPLES = """\
python -m rawaudio.interpolate                                 # eight clips, in interpolated/
python -m rawaudio.interpolate label=[one,nine] speaker=theo seed=3 out_dir=one-nine
python -m rawaudio.interpolate way=mix speaker=[george,nicolas] label=six out_dir=mixed
python -m rawaudio.interpolate way=edit label=one towards=seven out_dir=edited
python -m rawaudio.interpolate model=sashimi_diffwave_digits steps=50 out_dir=diffusion"""

FITTED = 1000  # clips that planes are fitted to


@dataclass
class InterpolateConfig:
    model: str = setting("asgan_digits", f"a model of the hub: {', '.join(ENTRIES)}")
    checkpoint: str | None = setting(None, "weights file to use instead, any known format")
    vocoder: str | None = setting(None, "what makes features audible; none: the model's own")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")
    way: str = setting("path", "path, mix or edit, see above", "path|mix|edit")
    n: int = setting(8, "clips on the way, ends included", ">=2")
    space: str | None = setting(None, "z or w; none: w, the styles, where there are any", "z|w")
    steps: int | None = setting(None, "diffusion: passes of the network", ">=1")
    towards: str | None = setting(None, "edit: the class, a word of the classifier")
    classifier: str = setting("digits", "edit: digits (shipped), or a file: .safetensors, .pth")
    seed: int = setting(0, "same seed, same clips")
    out_dir: str = setting("interpolated", "folder of the clips and the page; must be new")
    told: dict[str, list[str]] = setting({}, "conditions by name")

    def __post_init__(self) -> None:
        check_allowed(self)
        if (self.way == "edit") != (self.towards is not None):
            raise UserError("way=edit needs towards=, a class, which nothing else has")
        folder = Path(self.out_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"out_dir={folder} is there already: write out_dir= for another folder")


Way = tuple[Tensor, dict[str, list], list[str]]  # points, what is told, a name for each


def path(space: Space, cfg: InterpolateConfig) -> Way:
    given, two = {}, False
    for name, values in cfg.told.items():
        two = two or len(set(values)) == 2
        given[name] = values if len(values) == 2 else values[0]
    (a, b), told = space.draw(2, seeded("way", cfg.seed), **given)
    if space.name == "z":  # whose conditions stand beside it
        if two:
            raise UserError("space=z: what is told is the same all the way, one value each")
        told = {name: values[:1] * cfg.n for name, values in told.items()}
    fractions = torch.linspace(0, 1, cfg.n).tolist()
    points = torch.stack([space.between(a, b, t) for t in fractions])
    return points, told, [f"{t:.0%} of the way" for t in fractions]


def mix(space: Space, cfg: InterpolateConfig) -> Way:
    if space.name != "w":
        raise UserError("way=mix: layers have styles of their own in space=w alone (ASGAN)")
    ends, told, _ = path(space, cfg)
    styles, parts = ends[[0, -1]], len(space.model.layers) + 2
    theirs = torch.linspace(0, parts, cfg.n).round().long().tolist()
    points = torch.stack([styles[[0] * (parts - k) + [1] * k] for k in theirs])
    return points, told, [f"{k} of {parts} parts of the second" for k in theirs]


def edit(space: Space, cfg: InterpolateConfig, classifier: Classifier) -> Way:
    check_name("class", cfg.towards, classifier.labels)
    wanted, rate = classifier.labels.index(cfg.towards), space.model.sample_rate
    given = {name: values[0] for name, values in cfg.told.items()}
    start, told = space.draw(1, seeded("way", cfg.seed), **given)
    many, theirs = space.draw(FITTED, seeded("planes", cfg.seed))
    points = torch.cat([start, many])
    all_told = {name: values + theirs[name] for name, values in told.items()}

    def make(part: slice) -> Tensor:
        return space.hear(points[part], {name: v[part] for name, v in all_told.items()})

    probs, _ = classified(classifier, make, len(points), rate, "clips for the planes")
    labels, x = probs.argmax(1), points.flatten(1).cpu().double().numpy()
    if labels[0] == wanted or wanted not in labels:
        who = "the first clip is" if labels[0] == wanted else f"none of {FITTED} clips is"
        raise UserError(f"towards={cfg.towards}: {who} heard as that; take another seed= or word")
    normals, offsets = separating_planes(x, labels, len(classifier.labels))
    normal, offset = (y[wanted] - y[labels[0]] for y in (normals, offsets))
    depths = x @ normal + offset  # 0 where both classes are as near
    # along covariance times normal: the likeliest points at each depth, if points were normal
    way = (x - x.mean(0)).T @ (depths - depths.mean())
    way *= (depths[labels == wanted].mean() - depths[0]) / (way @ normal)
    fractions = np.linspace(0, 1, cfg.n)
    found = torch.from_numpy(x[0] + fractions[:, None] * way).to(start)
    told = {name: values * cfg.n for name, values in told.items()}
    return found.view(-1, *start.shape[1:]), told, [f"{t:.0%} of the way" for t in fractions]


def run(cfg: InterpolateConfig) -> None:
    """Makes the clips and the page in `cfg.out_dir`."""
    for name, values in cfg.told.items():
        if len(values) > (1 if cfg.way == "edit" else 2):
            words = "" if cfg.way == "edit" else ", or two for the two ends"
            raise UserError(f"{name}={as_written(values)}: way={cfg.way} takes one value{words}")
    model = load_asked(cfg.model, cfg.checkpoint, cfg.device, cfg.vocoder)
    space = Space(model, cfg.space, cfg.steps)
    ways: dict[str, Any] = {"path": path, "mix": mix}
    if cfg.way == "edit":
        classifier = load_classifier(cfg.classifier)
        ways["edit"] = partial(edit, classifier=classifier)
    points, told, names = ways[cfg.way](space, cfg)
    wavs, rate = space.hear(points, told, progress=True).cpu(), model.sample_rate
    if cfg.way == "edit":
        probs, _ = classified(classifier, lambda part: wavs[part], cfg.n, rate, "listening")
        heard = [f"{classifier.labels[p.argmax()]}, {p.max():.0%} sure" for p in probs]
    folder = Path(cfg.out_dir)
    clips = []
    for i, (name, wav) in enumerate(zip(names, wavs, strict=True)):
        caption = f"heard as {heard[i]}" if cfg.way == "edit" else ""
        clips.append(Clip(f"{i:02d}.wav · {name}", wav, rate, caption))
        audio.write(folder / f"{i:02d}.wav", wav, rate)
    ends = [" ".join(values[i] for values in told.values()) for i in (0, -1)]
    words = " to ".join(dict.fromkeys(filter(None, ends)))
    words += f" towards {cfg.towards}" if cfg.towards else ""
    note = " · ".join(filter(None, [f"seed {cfg.seed}", f"in {space.name}", words]))
    title = Path(cfg.checkpoint).name if cfg.checkpoint else cfg.model
    write_page(folder / "index.html", clips, f"{title}: {cfg.way}", note)
    print(f"{cfg.n} clips in {folder}; listen: {folder / 'index.html'}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    told: dict[str, list[str]] = {}
    prog = "python -m rawaudio.interpolate"
    cfg = parse_args(
        InterpolateConfig,
        argv,
        prog=prog,
        examples=EXAMPLES,
        notes=__doc__,
        others=told,
        check=lambda cfg: cfg.told.update(told),
    )
    return command.run(lambda: run(cfg))


if __name__ == "__main__":
    sys.exit(main())
