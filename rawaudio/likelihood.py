"""Likelihood of audio files under an autoregressive model, in bits per sample.

Every sample of every clip counts once, no padding. With `train_csv` the same samples are also
scored by two models that only count: the frequencies of the classes (order 0), and of the classes
after each pair of previous ones (order 2). A network that hears structure is far below both.

A model with conditions is scored when it is told the clips' columns, and when it is told nothing.
`classify` asks it the other way round: by Bayes' rule, how often is the value in the CSV the
likeliest one of the clip? A generative model is a classifier, too.
"""

import logging
import sys
from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch import Tensor

from rawaudio import command
from rawaudio.autoregressive import Autoregressive, bits_per_sample
from rawaudio.batches import sample_batches
from rawaudio.config import check_allowed, parse_args, setting
from rawaudio.data import ClipDataset
from rawaudio.errors import UserError
from rawaudio.hub import load_asked
from sashimi.mulaw import N_CLASSES, SILENCE

EXAMPLES = """\
python -m rawaudio.likelihood csv=splits/fsdd-test.csv data_root=fsdd/recordings
python -m rawaudio.likelihood csv=test.csv checkpoint=runs/run1/best.safetensors
python -m rawaudio.likelihood csv=test.csv data_root=DIR train_csv=train.csv
python -m rawaudio.likelihood csv=test.csv data_root=DIR classify=label"""


@dataclass
class LikelihoodConfig:
    csv: str = setting(MISSING, "CSV of clips, with a column `path`")
    data_root: str | None = setting(None, "folder that relative paths start from")
    model: str = setting("sashimi_ar_digits", "name of a hub entry")
    checkpoint: str | None = setting(None, "weights to load instead, any known format")
    train_csv: str | None = setting(None, "clips to count for the order-0 and order-2 models")
    classify: str | None = setting(None, "condition to recognise, such as label; a pass per value")
    batch_size: int = setting(16, "clips at once", ">0")
    device: str | None = setting(None, "none: the GPU if there is one")

    def __post_init__(self) -> None:
        check_allowed(self)


BACKOFF = 10.0  # weight of the next shorter context, in counts


def accuracy(model: Autoregressive, ds: ClipDataset, by: str, batch_size: int = 16) -> float:
    """Share of the clips whose value of that condition is the likeliest given the clip.

    Clips of `ds.tell(model.conditions)` whose value the model does not know are left out.
    """
    column = list(model.conditions).index(by)
    right = total = 0
    for batch in sample_batches(ds, batch_size, None, shuffle=False):
        truth = batch["told"][:, column] - 1
        wavs, lengths = model.quantizer.decode(batch["target"]), batch["mask"].sum(1)
        likeliest = model.classify(wavs, lengths, by=by).argmax(1).cpu()
        right += int((likeliest == truth).sum())
        total += int((truth >= 0).sum())
    if not total:
        raise UserError(f"classify={by}: no clip has a {by} that the model knows")
    return right / total


def count_model_bits(train: ClipDataset, test: ClipDataset, order: int) -> float:
    """Bits per sample of `test` under class counts of `train` after `order` previous classes.

    p_k(q | k previous) = (count + BACKOFF p_{k-1}) / (total + BACKOFF), p_0 with one extra count
    per class. Order 0, 1 or 2: the table has 256^(order + 1) entries.
    """

    def contexts(ds: ClipDataset) -> list[Tensor]:
        """For k = 0..order: index of (k previous classes, class) of every sample."""
        q = ds.data.long()
        begin = torch.zeros_like(q)  # 1 + position in its clip
        begin[ds.offsets[1:-1]] = ds.lengths[:-1]
        place = torch.arange(len(q)) - begin.cumsum(0)
        index, out = q, [q]
        for k in range(1, order + 1):
            previous = torch.where(place >= k, q.roll(k), SILENCE)
            index = index + previous * N_CLASSES**k
            out.append(index)
        return out

    p = torch.full((len(test.data),), 1 / N_CLASSES, dtype=torch.float64)
    for k, (seen, asked) in enumerate(zip(contexts(train), contexts(test), strict=True)):
        counts = torch.bincount(seen, minlength=N_CLASSES ** (k + 1)).view(-1, N_CLASSES)
        weight = BACKOFF if k else float(N_CLASSES)
        count = counts.view(-1)[asked]
        total = counts.sum(1)[asked // N_CLASSES]
        p = (count + weight * p) / (total + weight)
    return -p.log2().mean().item()


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(
        LikelihoodConfig, argv, prog="python -m rawaudio.likelihood", examples=EXAMPLES
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    smaller = f"take a batch_size= below {cfg.batch_size}"
    return command.run(lambda: measure(cfg), smaller=smaller)


def measure(cfg: LikelihoodConfig) -> None:
    """Prints the bits per sample of what the settings name."""
    name = cfg.checkpoint or cfg.model
    model = load_asked(cfg.model, cfg.checkpoint, cfg.device)
    if not hasattr(model, "nll"):
        raise UserError(f"{name}: {model.KIND} model; only autoregressive ones have a likelihood")
    if cfg.classify and cfg.classify not in model.conditions:
        known = ", ".join(model.conditions) or "nothing"
        raise UserError(f"classify={cfg.classify}: this model can be told {known}")
    options = {"quantizer": model.config.quantizer}
    test = ClipDataset(cfg.csv, model.sample_rate, cfg.data_root, **options)
    rows = [(name, bits_per_sample(model, test, cfg.batch_size))]
    if model.conditions:
        test.tell(model.conditions)
        told = bits_per_sample(model, test, cfg.batch_size)
        names = " and ".join(model.conditions)
        rows = [(f"{name}, told {names}", told), (f"{name}, told nothing", rows[0][1])]
    share = cfg.classify and accuracy(model, test, cfg.classify, cfg.batch_size)
    if cfg.train_csv:
        train = ClipDataset(cfg.train_csv, model.sample_rate, cfg.data_root, **options)
        rows += [(f"order-{k} counts", count_model_bits(train, test, k)) for k in (0, 2)]
    print(f"{len(test):,} clips, {len(test.data):,} samples at {model.sample_rate:,} Hz")
    for name, bits in rows:
        print(f"{bits:8.4f} bits per sample  {name}")
    if cfg.classify:
        print(f"{share:8.1%} of the clips: the likeliest {cfg.classify} is theirs")


if __name__ == "__main__":
    sys.exit(main())
