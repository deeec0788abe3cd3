"""Train a model of raw audio on a CSV of audio files.

`python train.py --help` lists every setting. `model=` is a network with its task, `recipe=` a set
of published settings for one. The run folder gets `last.pt` (everything that is needed to go on),
`best.safetensors` (the weights to use: load_checkpoint), `README.md` (how the run went),
`metrics.jsonl` and TensorBoard files (`tensorboard --logdir runs`).

The same command goes on where a run stopped, whatever stopped it: on the CPU to the same bits as if
nothing had, unless it ends by minutes. Ctrl-C and SIGTERM finish the step, save, and exit with 130
or 143; a second Ctrl-C ends at once; 0 is a finished run, 2 a setting or file that cannot be used,
1 another error. Under torchrun, `batch_size` is that of all processes together: data, noise and
loss are the same for any number of them (dropout is not: each process draws its own).
"""

import contextlib
import dataclasses
import gc
import logging
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from rawaudio import command, processes
from rawaudio.batches import Batch, split
from rawaudio.conditions import withhold
from rawaudio.config import as_written, check_allowed, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.families import MODELS, RECIPES, named
from rawaudio.family import Family
from rawaudio.logbook import memory
from rawaudio.processes import rank, world
from rawaudio.run import Run, norm_of, skip
from rawaudio.seeds import seed_of, seeded
from rawaudio.signals import Interrupted

EXAMPLES = r"""
python train.py train_csv=splits/sc09-train.csv valid_csv=splits/sc09-valid.csv \
    data_root=speech_commands checkpoint_path=runs/run1/ validation_interval=2500

python train.py recipe=digits train_csv=splits/fsdd-train.csv \
    valid_csv=splits/fsdd-valid.csv data_root=fsdd/recordings checkpoint_path=runs/digits \
    max_minutes=60

python split_data.py --root_path piano --by time                # long recordings
python train.py recipe=youtubemix train_csv=splits/piano-train.csv \
    valid_csv=splits/piano-valid.csv data_root=piano checkpoint_path=runs/piano

torchrun --nproc_per_node=8 train.py ...                        # eight GPUs of one machine
torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST train.py ...

python train.py model=diffwave train_csv=splits/sc09-train.csv valid_csv=splits/sc09-valid.csv \
    data_root=speech_commands checkpoint_path=runs/diffusion max_steps=500000

python train.py model=diffwave_small unconditional=false seq_len=8192 ...     # a vocoder

python train.py conditions=[label,speaker] train_csv=splits/fsdd-train.csv ...   # to be told
"""

SOURCES = """
Where defaults come from: [S] the published SC09 model of simple-sashimi; [U] sashimi-sc09-unet, [M]
sashimi-youtubemix, [B] sashimi-beethoven of state-spaces (configs/experiment/audio, with their data
sets); [D] DiffWave, arXiv:2009.09761; [4] S4, arXiv:2111.00396; [C] the card of sashimi_ar_digits.
"""


@dataclass
class TrainConfig:
    # data
    train_csv: str = setting(MISSING, "CSV of training clips, with a column `path`")
    valid_csv: str = setting(MISSING, "CSV of validation clips")
    data_root: str | None = setting(None, "folder that relative paths in the CSVs start from")
    sample_len: int | None = setting(
        None, "the files are long recordings: samples of the pieces that they are cut into", ">=2"
    )
    cache: str | None = setting(
        None, "folder for decoded long recordings; none: ~/.cache/simple-sashimi"
    )
    append_silence: int = setting(
        0, "samples of silence after each training clip: trimmed clips then teach to stop", ">=0"
    )
    seq_len: int | None = setting(
        None,
        "samples per training clip at most, longer ones are cropped; none: model.l_max, or "
        "model.clip_length",
        ">=1",
    )
    peak: float | None = setting(
        None, "scale every clip to this peak, up to 1; none: as recorded", ">0 <=1"
    )
    gain_db: float = setting(0.0, "augmentation: random gain within +- this many dB", ">=0")
    speed: float = setting(0.0, "augmentation: random speed within +- this fraction", ">=0 <1")
    augmented: float = setting(1.0, "share of the clips that gain_db and speed change", ">0 <=1")
    # what the model is told
    conditions: list[str] = setting([], "columns of the CSVs, such as [label,speaker]")
    condition_dropout: float = setting(
        0.1, "probability with which each is withheld, and all of a clip together", ">=0 <1"
    )
    condition_lr: float = setting(1e-2, "learning rate of the conditions' embeddings", ">0")
    # run
    recipe: str | None = setting(None, f"settings to start from: {', '.join(RECIPES)}")
    checkpoint_path: str = setting(MISSING, "folder for checkpoints and logs")
    resume: str = setting(
        "auto", "auto: go on with the run in checkpoint_path; never: refuse to", "auto|never"
    )
    resume_checkpoint: str | None = setting(None, "a last.pt of another folder to go on from")
    init_from: str | None = setting(None, "checkpoint whose weights a new run starts from")
    keep_last: int = setting(2, "states kept: last.pt, and earlier ones as last-STEP.pt", ">=1")
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; none: the GPU if there is one")
    seed: int = setting(1775, "of initial weights, data order, crops, augmentation and dropout")
    threads: int | None = setting(None, "CPU threads of torch; none: all cores", ">=1")
    max_steps: int | None = setting(200_000, "optimizer steps; 0: no limit [U]", ">=0")
    max_minutes: float | None = setting(None, "end after this long, resumed runs included", ">=0")
    # speed and memory
    precision: str = setting(
        "float32", "of matrix products; kernels, FFTs, weights stay float32", "float32|bfloat16"
    )
    compile: bool = setting(
        False, "torch.compile: faster steps after minutes of compiling; clips are padded to seq_len"
    )
    tbptt: int | None = setting(
        None, "truncated back-propagation: samples of the clips per step; none: all", ">=1"
    )
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other", ">=1")
    recompute_tiers: int = setting(
        0, "finest tiers whose activations are computed again for the gradient: less memory", ">=0"
    )
    # optimizer
    batch_size: int = setting(8, "clips per optimizer step, of all processes together [S]", ">=1")
    optimizer: str = setting(
        "adamw", "muon: for the matrices inside, with adamw for the rest; fewer steps", "adamw|muon"
    )
    start_lr: float = setting(4e-3, "learning rate at the start [S], of diffusion [D]", ">0")
    ssm_lr: float = setting(1e-3, "of the state spaces' own parameters [4]", ">=0")
    weight_decay: float = setting(0.0, "never on the state spaces, norms, biases [S]", ">=0")
    betas: list[float] = setting([0.9, 0.999], "memory of gradients and their squares", ">=0 <1")
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping [S]", ">=0")
    grad_clip_value: float = setting(0.0, "largest entry of a gradient; 0: no clipping", ">=0")
    schedule: str = setting(
        "cosine", "to 0 at the end [U]; plateau [S]; constant", "cosine|plateau|constant"
    )
    warmup_steps: int = setting(1000, "linear, at most a twentieth of the run [U]", ">=0")
    plateau_factor: float = setting(0.2, "plateau: rates are multiplied by this [S]", ">0")
    plateau_patience: int = setting(20, "plateau: validations without a better one [S]", ">=0")
    ema: float = setting(
        0.0, "decay of the averaged weights that are validated and kept; 0: none", ">=0 <1"
    )
    # log
    stdout_interval: int = setting(100, "steps between lines on the terminal", ">=1")
    summary_interval: int = setting(25, "steps between points of the curves", ">=1")
    validation_interval: int = setting(2500, "steps between validations [S]", ">=1")
    checkpoint_interval: int = setting(2500, "steps between saves of last.pt", ">=1")
    checkpoint_minutes: float = setting(10.0, "and minutes between them at most", ">0")
    n_listen: int = setting(2, "clips generated at every validation, for TensorBoard", ">=0")

    def __post_init__(self) -> None:
        check_allowed(self)
        if len(self.betas) != 2:
            raise UserError(
                f"betas={as_written(self.betas)}: must be two numbers from 0 to below 1"
            )
        if not (self.max_steps or self.max_minutes):
            raise UserError(
                f"max_steps={as_written(self.max_steps)} and max_minutes="
                f"{as_written(self.max_minutes)}: a run needs an end, set one of them"
            )
        if self.resume_checkpoint and (self.init_from or self.resume == "never"):
            other = f"init_from={self.init_from}" if self.init_from else "resume=never"
            raise UserError(
                f"resume_checkpoint={self.resume_checkpoint} and {other}: either go on with that "
                "run, or start a new one"
            )


def parse(argv: list[str]) -> TrainConfig:
    """The settings; `model=` and `recipe=` decide which there are, and where they start from."""

    def last_of(key: str) -> str:
        values = [a.partition("=")[2] for a in argv if a.removeprefix("--").startswith(f"{key}=")]
        return values[-1] if values and values[-1].lower() != "none" else ""

    try:
        family, defaults = starting_point(*map(last_of, ("model", "recipe", "sample_len")))
        for argument in argv:
            more = family.follows.get(argument.removeprefix("--").removeprefix("model."), {})
            defaults |= {f"model.{k}": v for k, v in more.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    network = ("model", family.config, setting(family.config, "the network"))
    cls = dataclasses.make_dataclass("TrainConfig", [network], bases=(TrainConfig,))
    others = [a for a in argv if not a.removeprefix("--").startswith("model=")]
    return parse_args(
        cls, others, prog="python train.py", examples=EXAMPLES, notes=SOURCES, defaults=defaults
    )


def starting_point(model: str, recipe: str, sample_len: str) -> tuple[Family, dict[str, Any]]:
    """The family and the defaults that differ, dotted key -> value; what is not given is ""."""
    settings = {}
    if recipe:
        family, settings = named("recipe", recipe, RECIPES)
        own = settings.get("model", next(iter(family.models)))
        if model and named("model", model, MODELS)[0] is not family:
            raise UserError(f"recipe={recipe} is for model={own}; leave one of them out")
        model = model or own
    family, network = named("model", model or next(iter(MODELS)), MODELS)
    defaults = family.training | {f"model.{k}": v for k, v in network.items()} | settings
    defaults.pop("model", None)
    pieces = sample_len or str(defaults.get("sample_len", ""))
    if pieces.isdigit() and int(pieces) and hasattr(family.config, "l_max"):
        defaults.setdefault("model.l_max", int(pieces))  # kernels as long as the pieces
    return family, defaults


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(argv)
    first = processes.local_rank() == 0  # one process of each machine speaks
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")

    def body() -> int:
        try:
            train(cfg, f"python train.py {shlex.join(argv)}")
        except Interrupted as stop:
            if first:
                saved = Path(cfg.checkpoint_path) / "last.pt"
                print(f"\nstopped, {saved} is saved; the same command goes on")
            return 128 + stop.args[0]
        gc.collect()  # nothing may hold the group, and threads, when the interpreter ends
        processes.leave()
        return 0

    smaller = "raise accumulate=, set recompute_tiers=1, or take a smaller seq_len= or batch_size="
    lost = "; what is not saved is lost"
    if status := command.run(body, kept=lambda: lost, smaller=smaller):
        raise SystemExit(status)


# ---- the loop ---------------------------------------------------------------------------------


def train(cfg: TrainConfig, command: str = "") -> float:
    """Train as the settings say; returns the best validation, in the unit of the model's task.

    command: as it was given, for the run's records.
    """
    with Run(cfg, command) as run:
        position, clock, window = run.position, run.clock, Counter()
        batches, stopping = run.batches(), 0  # stopping: by this signal
        while True:
            # between two steps the state can be saved, and gone on from
            clock.lap("log")
            finished = run.progress() >= 1
            if run.validation_due(finished) and not stopping:
                try:
                    run.validate()
                except Interrupted as interrupted:
                    stopping = interrupted.args[0]
                run.model.train()
                clock.lap("validation")
            if run.save_due(finished or stopping > 0):
                run.save()
            clock.lap("save")
            if stopping:
                raise Interrupted(stopping)
            if finished:
                break

            clock.exact = (position.step + 1) % cfg.summary_interval == 0
            batch, count = next(batches)
            clock.lap("data")
            curves, good = {}, True
            for name in run.task.turns(position.step):
                # the gradients of a batch
                loss, norm, norms = gradients(run, name, batch, count)
                loss, stopping = run.agree(loss, count)
                run.set_rates()
                curves |= norms
                good = math.isfinite(loss) and math.isfinite(norm)
                if not good:
                    skip(run, name, loss, norm)
                    break

                # a step along them
                parameters = list(run.networks[name].parameters())
                if 0 < cfg.grad_clip < norm:
                    torch._foreach_mul_(gradients_of(parameters), cfg.grad_clip / norm)
                if cfg.grad_clip_value:
                    torch.nn.utils.clip_grad_value_(parameters, cfg.grad_clip_value)
                run.optimizer.step()
                run.task.updated(name, run.device)
                curves |= {f"train_{name}": loss, "grad_norm": norm}
                window.update({name: loss * count, f"samples of {name}": count})
            if good:
                run.average()
                position.skipped_in_a_row = 0
            position.move_on(bool(batch.get("last", True)))
            window["clips"] += 0 if position.pieces_done else int(batch["planned"])
            clock.lap("optimizer")
            summarise(run, curves, window)
    run.finish()
    return position.best


def gradients(
    run: Run, name: str, batch: Batch, count: float
) -> tuple[float, float, dict[str, float]]:
    """Forward and backward of that network, part by part: the sum of this process's loss, the norm
    of the gradients, and that of each group of parameters. count: samples of all processes."""
    cfg, step, pieces_done = run.cfg, run.position.step, run.position.pieces_done
    torch.manual_seed(seed_of("dropout", cfg.seed, step, rank()))
    first, planned = rank() * run.part * cfg.accumulate, int(batch["planned"])
    if "told" in batch and len(batch["index"]):
        rng = seeded("conditions", cfg.seed, step - pieces_done)  # the same ones for all pieces
        place = (first, planned)
        batch["told"] = withhold(batch["told"], cfg.condition_dropout, rng, place)
    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    network, pieces = run.stepped[name], list(split(batch, run.part))
    for i, piece in enumerate(pieces):
        alone = world() > 1 and i + 1 < len(pieces)  # gradients meet at the last part
        with network.no_sync() if alone else contextlib.nullcontext():
            # a generator of each step's own: a resumed run draws the same noise
            rng = partial(seeded, "noise", cfg.seed, step, device=run.device)
            with run.autocast():
                state = []
                if cfg.tbptt:
                    rows = run.model.rows_of(piece, len(piece["x"]))
                    state = [run.carried.begin(run.model, i, rows, pieces_done * cfg.tbptt)]
                place = (first + i * run.part, planned)
                loss = run.task.loss(network, piece, place, rng, *state)
            total += loss.detach()
            run.clock.lap("forward")
            (loss * (run.task.scale * world() / max(1, count))).backward()
            run.clock.lap("backward")
    groups = {group["name"]: gradients_of(group["params"]) for group in run.optimizer.param_groups}
    groups = {name: of_group for name, of_group in groups.items() if of_group}
    norms = [norm_of(of_group) for of_group in groups.values()]
    total, norm, *norms = torch.stack([total, norm_of(norms), *norms]).tolist()
    names = [f"grad_norm/{name}".replace(" ", "_") for name in groups]
    return total, norm, dict(zip(names, norms, strict=True))


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def summarise(run: Run, numbers: dict[str, float], window: Counter) -> None:
    """Numbers for the log, and a line for the terminal, where it is time for them.

    window: losses by name, their samples, and `clips`, since the last line, which empties it.
    """
    cfg, position, clock = run.cfg, run.position, run.clock
    summary = position.step % cfg.summary_interval == 0
    times = clock.end_step(summary)
    if summary and run.book:
        rates = {f"lr/{g['name']}".replace(" ", "_"): g["lr"] for g in run.optimizer.param_groups}
        run.book.numbers(
            position.step,
            position.seconds,
            **numbers,
            **run.task.numbers(),
            lr=next(iter(rates.values())),
            **rates,
            **times,
            memory_gib=memory(run.device),
            skipped_steps=position.skipped,
            broken_files=len(run.train_ds.broken),
        )
    progress = run.progress()
    if rank() == 0 and (position.step % cfg.stdout_interval == 0 or progress >= 1):
        left = position.seconds * (1 / max(1e-9, progress) - 1) / 60
        samples = {name: window[f"samples of {name}"] for name in run.networks}
        means = [f"{window[k] / n if n else math.nan:.4f} {k}" for k, n in samples.items()]
        line = (
            f"step {position.step:,}  epoch {position.epoch}  {'  '.join(means)}  "
            f"{window['clips'] / max(1e-9, clock.window):.3g} clips/s  {left:.0f} min left"
        )
        if run.bar is None:
            print(line, flush=True)
        else:
            run.bar.comment = line
        window.clear()
        clock.window = 0.0
    if run.bar is not None:
        run.bar.update(min(999, int(progress * 1000)))


if __name__ == "__main__":
    main()
