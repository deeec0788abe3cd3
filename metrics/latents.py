"""How a model's latents are arranged: how well planes part its classes, how far a clip is moved.

linear separability   of linear classifiers of the points, with the classifier's class of each clip
                      as the truth (StyleGAN, arXiv:1812.04948, section 4.2): exp H(class | side),
                      from 1, all are told apart, to the number of classes
path length           mean of |f(t + e) - f(t)|^2 / e^2 of the classifier's features f along ways
                      between two points (the same, section 4.1): how suddenly clips change

The published linear separability of simple-asgan takes exp(H - I) with H of soft probabilities and
I of hard labels, and scores the points that it was fitted to; here both are of labels, and the
points of each half are judged by planes that were fitted to the other.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from torch import Tensor

from metrics.classifier import Classifier, load_classifier
from rawaudio import command
from rawaudio.audio import resample
from rawaudio.config import check_allowed, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.families import ENTRIES
from rawaudio.hub import load_asked
from rawaudio.progress import watched
from rawaudio.seeds import seeded
from rawaudio.spaces import Space

EXAMPLES = "python -m metrics.latents model=asgan_digits"
EXTREMES = 0.01  # of the shortest and of the longest steps are left out, as in StyleGAN
AT_ONCE = 64  # clips


@dataclass
class LatentsConfig:
    model: str = setting("asgan_digits", f"a model of the hub: {', '.join(ENTRIES)}")
    checkpoint: str | None = setting(None, "weights file to use instead, any known format")
    vocoder: str | None = setting(None, "what makes features audible; none: the model's own")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")
    classifier: str = setting("digits", "digits (shipped, 8 kHz), or a file: .safetensors, .pth")
    n: int = setting(2000, "clips, and steps along ways", ">=100")
    keep: float = setting(0.5, "share of the clips that separability is of, the surest", ">0 <=1")
    epsilon: float = setting(
        0.05,
        "length of a step, of a whole way; below, Griffin-Lim's phases jump",
        ">=0.0001 <1",
    )
    steps: int | None = setting(None, "diffusion: passes of the network", ">=1")
    seed: int = setting(0, "of the clips")

    def __post_init__(self) -> None:
        check_allowed(self)
        if self.keep * self.n < 50:
            raise UserError(f"keep={self.keep} of n={self.n} clips: must be 50 clips or more")


# ---- planes -------------------------------------------------------------------------------------


def separating_planes(
    points: ArrayLike, labels: ArrayLike, classes: int, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Normals (C, D) and offsets (C,) of a plane for each class, between it and all others.

    points (n, D), labels (n,) from 0 to C - 1. points @ normals.T + offsets is above 0 on the side
    of the class. Linear support vector machines with squared hinge loss, `strength` its weight, of
    points that are scaled to variance 1.
    """
    x, labels = np.asarray(points, np.float64), np.asarray(labels)
    mean, scale = x.mean(0), max(x.std(), 1e-12)
    x = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], 1)
    side = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)  # (n, C)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(-1, classes)
        slack = np.maximum(0, 1 - side * (x @ w))
        slope = -2 * strength * x.T @ (side * slack)
        slope[:-1] += w[:-1]
        value = np.square(w[:-1]).sum() / 2 + strength * np.square(slack).sum()
        return value, slope.ravel()

    found = minimize(loss, np.zeros(x.shape[1] * classes), jac=True, method="L-BFGS-B")
    w = found.x.reshape(-1, classes)
    normals = w[:-1].T / scale
    return normals, w[-1] - normals @ mean


def conditional_entropy(labels: ArrayLike, decisions: ArrayLike) -> float:
    """H(label | decision) of two columns of whole numbers (n,), in nats."""
    pairs = np.stack([np.asarray(decisions), np.asarray(labels)])
    joint = np.unique(pairs, axis=1, return_counts=True)[1] / pairs.shape[1]
    alone = np.unique(pairs[0], return_counts=True)[1] / pairs.shape[1]
    return float((alone * np.log(alone)).sum() - (joint * np.log(joint)).sum())


def linear_separability(points: ArrayLike, probs: ArrayLike, keep: float = 0.5) -> float:
    """exp of how uncertain the class of a clip is once its side of the planes is known: 1 to C.

    points (n, D), probs (n, C) of the clips' classes. keep: share of the clips, the surest.
    """
    probs = np.asarray(probs)
    kept = np.argsort(-probs.max(1), kind="stable")[: math.ceil(keep * len(probs))]
    x, labels = np.asarray(points, np.float64)[kept], probs[kept].argmax(1)
    decisions, halves = np.empty_like(labels), [slice(0, None, 2), slice(1, None, 2)]
    for own, other in (halves, halves[::-1]):
        normals, offsets = separating_planes(x[other], labels[other], probs.shape[1])
        decisions[own] = (x[own] @ normals.T + offsets).argmax(1)
    return math.exp(conditional_entropy(labels, decisions))


# ---- paths --------------------------------------------------------------------------------------


def path_length(here: ArrayLike, there: ArrayLike, epsilon: float) -> float:
    """From features (n, D) of clips at t and at t + epsilon, without the extreme ones."""
    here, there = np.asarray(here, np.float64), np.asarray(there, np.float64)
    each = np.sort(np.square(there - here).sum(1)) / epsilon**2
    cut = int(EXTREMES * len(each))
    return float(each[cut : len(each) - cut].mean())


# ---- the command --------------------------------------------------------------------------------


@torch.no_grad()
def classified(
    classifier: Classifier, make: Callable[[slice], Tensor], n: int, rate: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, C) and features (n, F) of n clips, which are made a few at a time."""
    logits, features = [], []
    parts = [slice(i, min(n, i + AT_ONCE)) for i in range(0, n, AT_ONCE)]
    for part in watched(parts, what, n, each=AT_ONCE):
        wavs = resample(make(part).cpu(), rate, classifier.sample_rate)
        for found, of_part in zip((logits, features), classifier(wavs), strict=True):
            found.append(of_part)
    return torch.cat(logits).double().softmax(1).numpy(), torch.cat(features).numpy()


def measure(space: Space, classifier: Classifier, cfg: LatentsConfig) -> tuple[float, float]:
    """Linear separability and path length of a space."""
    rng, rate, n = seeded("latents", cfg.seed), space.model.sample_rate, cfg.n
    a, told = space.draw(n, rng)
    b, _ = space.draw(n, rng, **told)  # the same is said all the way
    t = torch.rand(n, 1, generator=rng).to(a) * (1 - cfg.epsilon)

    def features(points: Tensor, what: str) -> tuple[np.ndarray, np.ndarray]:
        def make(part: slice) -> Tensor:
            return space.hear(points[part], {name: v[part] for name, v in told.items()})

        return classified(classifier, make, n, rate, what)

    probs, _ = features(a, f"{space.name}: clips")
    here, there = (
        features(space.between(a, b, at), f"{space.name}: ways")[1] for at in (t, t + cfg.epsilon)
    )
    separability = linear_separability(a.cpu().numpy(), probs, cfg.keep)
    return separability, path_length(here, there, cfg.epsilon)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(LatentsConfig, argv, prog="python -m metrics.latents", examples=EXAMPLES)

    def body() -> None:
        model = load_asked(cfg.model, cfg.checkpoint, cfg.device, cfg.vocoder)
        classifier = load_classifier(cfg.classifier)
        names = ("z", "w") if hasattr(model, "z2w") else ("z",)
        spaces = [Space(model, name, cfg.steps) for name in names]
        print("| space | linear separability ↓ | path length ↓ |\n| --- | --: | --: |")
        for space in spaces:
            separability, length = measure(space, classifier, cfg)
            print(f"| {space.name} | {separability:.3f} | {length:,.1f} |", flush=True)

    return command.run(body)


if __name__ == "__main__":
    sys.exit(main())
