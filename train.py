"""Train a SaShiMi model on a CSV of audio files.

`python train.py --help` lists every setting. The run folder gets `last.pt` (everything that is
needed to go on), `best.safetensors` (the weights to use: load_checkpoint), `README.md` (how the run
went), `metrics.jsonl` and TensorBoard files (`tensorboard --logdir runs`). `model=` is
autoregressive (bits per sample are minimised), diffwave, diffwave_small or
diffwave_small_unidirectional (squared error of the noise); `recipe=` a set of published settings.

The same command goes on where a run stopped, whatever stopped it: on the CPU to the same bits as if
nothing had, unless it ends by minutes. Ctrl-C and SIGTERM finish the step, save, and exit with 130
or 143; a second Ctrl-C ends at once; 0 is a finished run, 2 a setting or file that cannot be
used, 1 another error. Under torchrun, `batch_size`
is that of all processes together: data, noise and loss are the same for any number of them (dropout
is not: each process draws its own).
"""

import contextlib
import copy
import dataclasses
import difflib
import gc
import hashlib
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from rawaudio.command import run as run_command
from rawaudio.config import (
    CONFIGS,
    AutoregressiveConfig,
    DiffusionConfig,
    as_written,
    parse_args,
    setting,
    to_dict,
    usable_device,
)
from rawaudio.errors import UserError

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

LN2 = math.log(2)
SKIPS = 10  # steps in a row without a finite gradient that end the run
SHORT_WARM_UP = 0.05  # of the run: a warm-up is no longer than that


# ---- settings ---------------------------------------------------------------------------------

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
        None, "the files are long recordings: samples of the pieces that they are cut into"
    )
    cache: str | None = setting(
        None, "folder for decoded long recordings; none: ~/.cache/simple-sashimi"
    )
    append_silence: int = setting(
        0, "samples of silence appended to each training clip: trimmed clips then teach to stop"
    )
    seq_len: int | None = setting(
        None, "samples per training clip at most, longer ones are cropped; none: model.l_max"
    )
    peak: float | None = setting(None, "scale every clip to this peak, up to 1; none: as recorded")
    gain_db: float = setting(0.0, "augmentation: random gain within +- this many dB")
    speed: float = setting(0.0, "augmentation: random speed within +- this fraction")
    # what the model is told
    conditions: list[str] = setting([], "columns of the CSVs, such as [label,speaker]")
    condition_dropout: float = setting(
        0.1, "probability with which each is withheld, and all of a clip together"
    )
    condition_lr: float = setting(1e-2, "learning rate of the conditions' embeddings")
    # run
    recipe: str | None = setting(
        None, "settings to start from: sc09, sc09-unet, youtubemix, beethoven, digits"
    )
    checkpoint_path: str = setting(MISSING, "folder for checkpoints and logs")
    resume: str = setting("auto", "auto: go on with the run in checkpoint_path; never: refuse to")
    resume_checkpoint: str | None = setting(None, "a last.pt of another folder to go on from")
    init_from: str | None = setting(None, "checkpoint whose weights a new run starts from")
    keep_last: int = setting(2, "states kept: last.pt, and earlier ones as last-STEP.pt")
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; none: the GPU if there is one")
    seed: int = setting(1775, "of initial weights, data order, crops, augmentation and dropout")
    threads: int | None = setting(None, "CPU threads of torch; none: all cores")
    max_steps: int | None = setting(200_000, "optimizer steps; 0: no limit [U]")
    max_minutes: float | None = setting(None, "end after this long, resumed runs included")
    # speed and memory
    precision: str = setting(
        "float32", "or bfloat16: of matrix products; kernels, FFTs and weights stay float32"
    )
    compile: bool = setting(
        False, "torch.compile: faster steps after minutes of compiling; clips are padded to seq_len"
    )
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other")
    recompute_tiers: int = setting(
        0, "finest tiers whose activations are computed again for the gradient: less memory"
    )
    # optimizer
    batch_size: int = setting(8, "clips per optimizer step, of all processes together [S]")
    start_lr: float = setting(4e-3, "learning rate at the start [S]")
    ssm_lr: float = setting(1e-3, "of the state spaces' own parameters [4]")
    weight_decay: float = setting(0.0, "AdamW's; never on the state spaces, norms, biases [S]")
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping [S]")
    schedule: str = setting("cosine", "to 0 at the end [U]; plateau [S]; constant")
    warmup_steps: int = setting(1000, "of linear warm-up, at most a twentieth of the run [U]")
    plateau_factor: float = setting(0.2, "plateau: rates are multiplied by this [S]")
    plateau_patience: int = setting(20, "plateau: validations without a better one [S]")
    ema: float = setting(0.0, "decay of the averaged weights that are validated and kept; 0: none")
    # log
    stdout_interval: int = setting(100, "steps between lines on the terminal")
    summary_interval: int = setting(25, "steps between points of the curves")
    validation_interval: int = setting(2500, "steps between validations [S]")
    checkpoint_interval: int = setting(2500, "steps between saves of last.pt")
    checkpoint_minutes: float = setting(10.0, "and minutes between them at most")
    n_listen: int = setting(2, "clips generated at every validation, for TensorBoard")
    model: AutoregressiveConfig = setting(AutoregressiveConfig, "the network")

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "stdout_interval", "summary_interval", "validation_interval",
                        "checkpoint_interval", "seq_len", "threads", "accumulate",
                        "keep_last")  # fmt: skip
        not_negative = ("append_silence", "gain_db", "speed", "ssm_lr", "weight_decay", "grad_clip",
                        "warmup_steps", "plateau_patience", "ema", "n_listen", "max_steps",
                        "max_minutes", "recompute_tiers", "condition_dropout")  # fmt: skip
        positive = ("start_lr", "condition_lr", "plateau_factor", "checkpoint_minutes")
        choices = {
            "schedule": ("plateau", "cosine", "constant"),
            "precision": ("float32", "bfloat16"),
            "resume": ("auto", "never"),
        }
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in at_least_one and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
            if name in not_negative and value < 0:
                raise UserError(f"{name}={value}: must be at least 0")
            if name in positive and value <= 0:
                raise UserError(f"{name}={value}: must be above 0")
            if name in ("ema", "speed", "condition_dropout") and value >= 1:
                raise UserError(f"{name}={value}: must be below 1")
            if name == "peak" and not 0 < value <= 1:
                raise UserError(f"{name}={value}: must be above 0 and at most 1")
            if name == "sample_len" and value < 2:
                raise UserError(f"{name}={value}: must be at least 2")
            if name in choices and value not in choices[name]:
                raise UserError(f"{name}={value}: must be {' or '.join(choices[name])}")
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


@dataclass
class DiffusionTrainConfig(TrainConfig):
    seq_len: int | None = setting(
        None, "samples per clip: longer ones are cropped, shorter ones padded; none: clip_length"
    )
    start_lr: float = setting(2e-4, "learning rate at the start [D]")
    ema: float = setting(
        0.9999, "decay of the averaged weights that are validated and kept; 0: none"
    )
    model: DiffusionConfig = setting(DiffusionConfig, "the network")


# what `model=` may be -> settings, and those of the network that differ from their defaults
KINDS = {"autoregressive": (TrainConfig, {})} | {
    "diffwave" if name == "large" else f"diffwave_{name}": (DiffusionTrainConfig, differing)
    for name, differing in CONFIGS.items()
}

# what `recipe=` may be -> settings; what is written on the command line counts more
PLATEAU = {"schedule": "plateau", "plateau_patience": 20, "warmup_steps": 0}  # [S], [M], [B]
RECIPES = {
    # 4.8M parameters, 16 kHz; [S]: batch 8, 4e-3, 1.1M steps, a validation every 2,500
    "sc09": PLATEAU | {"model.d_model": 64, "model.n_layers": 8, "batch_size": 8,
                       "start_lr": 4e-3, "max_steps": 1_100_000},
    # 6.8M parameters; [U], with a set of (Lambda, P, B) per feature (n_ssm: null)
    "sc09-unet": {"model.unet": True, "model.tied": False, "batch_size": 16, "start_lr": 1e-3,
                  "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 1000,
                  "max_steps": 200_000},
    # 4 hours of piano in pieces of 8 s; [M]: 131,072 samples, batch 1, 4e-3, 1,000 epochs with a
    # validation after each (about 1,550 pieces)
    "youtubemix": PLATEAU | {"sample_len": 131_072, "model.clip_length": 131_072, "batch_size": 1,
                             "start_lr": 4e-3, "max_steps": 1_550_000,
                             "validation_interval": 1550, "recompute_tiers": 1},
    # 10 hours of piano sonatas in pieces of 8 s; [B]: 128,000 samples, the same (3,960 pieces).
    # There linear classes; here mu-law, so its bits are not comparable.
    "beethoven": PLATEAU | {"sample_len": 128_000, "model.clip_length": 128_000, "batch_size": 1,
                            "start_lr": 4e-3, "max_steps": 3_960_000,
                            "validation_interval": 3960, "recompute_tiers": 1},
    # 1.5M parameters, 8 kHz; [C]: the settings of its first run
    "digits": {"model.sample_rate": 8000, "model.l_max": 8000, "model.clip_length": 8000,
               "model.d_model": 48, "model.n_layers": 4, "batch_size": 8, "start_lr": 4e-3,
               "schedule": "cosine", "warmup_steps": 100, "max_steps": 3115, "grad_clip": 1.0,
               "ema": 0.999, "append_silence": 2400, "validation_interval": 500,
               "checkpoint_interval": 250},
}  # fmt: skip


def parse(argv: list[str]) -> TrainConfig:
    """The settings; `model=` decides which there are, `recipe=` where they start from."""

    def last_of(key: str, known: dict[str, Any], default: str = "") -> str:
        values = [a.partition("=")[2] for a in argv if a.removeprefix("--").startswith(f"{key}=")]
        value = values[-1] if values else default
        if value in known or value.lower() in ("", "none"):
            return value
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        print(f"error: {key}={value}: did you mean {near}? ({', '.join(known)})", file=sys.stderr)
        raise SystemExit(2)

    cls, differing = KINDS[last_of("model", KINDS) or "autoregressive"]
    recipe = RECIPES.get(last_of("recipe", RECIPES), {})
    if recipe and cls is DiffusionTrainConfig:
        print("error: recipe= is for model=autoregressive; leave one of them out", file=sys.stderr)
        raise SystemExit(2)
    given = [a for a in argv if not a.removeprefix("--").startswith("model=")]
    defaults = [f"{k}={as_written(v)}" for k, v in ({f"model.{k}": v for k, v in
                differing.items()} | recipe).items()]  # fmt: skip
    all_given = [a.removeprefix("--").partition("=") for a in defaults + given]
    pieces = [value for key, _, value in all_given if key == "sample_len"]
    if pieces and pieces[-1].isdigit() and int(pieces[-1]):  # kernels as long as the pieces
        defaults.insert(0, f"model.l_max={pieces[-1]}")
    return parse_args(
        cls, defaults + given, prog="python train.py", examples=EXAMPLES, notes=SOURCES
    )


if __name__ == "__main__":  # answered before the imports below, which take seconds
    parse(sys.argv[1:])

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rawaudio import resume
from rawaudio.batches import Batch, GainSpeed, prefetched, sample_batches, split, wave_batches
from rawaudio.checkpoint import FORMAT, load_checkpoint, model_kind, save_checkpoint
from rawaudio.conditions import withhold
from rawaudio.data import ClipDataset, find_conditions, read_csv
from rawaudio.diffusion import (
    NOISE_ERRORS,
    SashimiDiffWave,
    linear_noise_error,
    trained_for,
)
from rawaudio.files import CheckpointError
from rawaudio.likelihood import masked_bits, total_bits
from rawaudio.logbook import Logbook, environment, memory, terminal_bar
from rawaudio.seeds import seed_of, seeded
from sashimi.autoregressive import SashimiAR
from sashimi.s4 import S4

# ---- the parts --------------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C or SIGTERM. Ends a validation early; ends a run when its state is saved."""


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW in groups: weights, biases and norms without decay, conditions, state spaces."""
    tables = {id(p) for p in model.told.parameters()}
    ssm = {
        id(getattr(layer, name))
        for layer in model.modules()
        if isinstance(layer, S4)
        for name in S4.SSM_PARAMETERS
    }
    groups = {"weights": [], "no decay": [], "conditions": [], "state space": []}
    for p in model.parameters():
        name = "state space" if id(p) in ssm else "weights" if p.dim() == 2 else "no decay"
        groups["conditions" if id(p) in tables else name].append(p)
    rates = {"state space": cfg.ssm_lr, "conditions": cfg.condition_lr}
    return torch.optim.AdamW(
        [
            {"params": params, "name": name, "lr": rates.get(name, cfg.start_lr),
             "base_lr": rates.get(name, cfg.start_lr),
             "weight_decay": cfg.weight_decay if name == "weights" else 0.0}
            for name, params in groups.items()
            if params
        ],
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )  # fmt: skip


def summed(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together; they stay as they are, also where it is not finite."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def first_bad(model: nn.Module) -> str:
    """The first parameter that is not finite, or else whose gradient is not."""
    for word in ("", "the gradient of "):
        for name, p in model.named_parameters():
            value = p.grad if word else p
            if value is not None and not value.isfinite().all():
                return f"{word}{name}"
    return "the loss alone"


# ---- the loop ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    cfg = parse(given)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each machine speaks
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")

    def body() -> int:
        try:
            train(cfg, f"python train.py {shlex.join(given)}")
        except Interrupted as stop:
            if first:
                print(f"\nstopped, {Path(cfg.checkpoint_path) / 'last.pt'} is saved; the same "
                      "command goes on")  # fmt: skip
            return 128 + stop.args[0]
        if dist.is_initialized():
            gc.collect()  # nothing may hold the group, and threads, when the interpreter ends
            dist.destroy_process_group()
        return 0

    smaller = "raise accumulate=, set recompute_tiers=1, or take a smaller seq_len= or batch_size="
    lost = "; what is not saved is lost"
    if status := run_command(body, kept=lambda: lost, smaller=smaller):
        raise SystemExit(status)


def train(cfg: TrainConfig, command: str = "") -> float:
    """Train as the settings say; returns the best validation: bits per sample, or noise error.

    command: as it was given, for the run's records.
    """
    # processes: torchrun's, or one
    rank, local, world = (
        int(os.environ.get(k, d)) for k, d in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)]
    )
    part = cfg.batch_size // (world * cfg.accumulate)  # clips that one process computes at once
    if part * world * cfg.accumulate != cfg.batch_size:
        raise UserError(
            f"batch_size={cfg.batch_size}: must be divisible by accumulate={cfg.accumulate} x "
            f"{world} processes (torchrun --nproc_per_node x --nnodes)"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if world > 1 and cfg.device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(local)
        device = usable_device(f"cuda:{local}")
    else:
        device = usable_device(cfg.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32
    run = Path(cfg.checkpoint_path)
    if cfg.resume == "never" and (run / "last.pt").exists():
        raise UserError(f"{run} holds a run: leave resume=never out, or choose another folder")
    if cfg.conditions:
        values, counts = find_conditions(
            read_csv(cfg.train_csv, cfg.data_root), cfg.conditions, cfg.train_csv
        )
        cfg.model = dataclasses.replace(cfg.model, conditions=values, condition_counts=counts)
    found = resume.find(run, cfg.resume_checkpoint, cfg.model)
    last, source = found or (None, None)
    init = None
    if cfg.init_from and last is None:
        init = load_checkpoint(cfg.init_from)
        if not isinstance(init, SashimiAR | SashimiDiffWave):
            raise CheckpointError(f"init_from={cfg.init_from}: a bare backbone, not a model")
        name, theirs = f"init_from={cfg.init_from}", to_dict(init.config)
        free = ["conditions"] if init.conditions else ["conditions", "d_condition"]
        if init.conditions and not cfg.conditions:
            names = ",".join(init.conditions)
            raise CheckpointError(
                f"{name}: these weights are used to being told: write conditions=[{names}]"
            )
        resume.check_architecture(name, model_kind(init), theirs, cfg.model, free)
    if world > 1 and not dist.is_initialized():
        # one process may decode hours of audio, or generate clips, while the others wait
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=30))

    # data
    rate, diffusion = cfg.model.sample_rate, isinstance(cfg.model, DiffusionConfig)
    unit = trained_for(cfg.model) if diffusion else "bits"
    kept = {"pcm": diffusion, "peak": cfg.peak, "sample_len": cfg.sample_len, "cache": cfg.cache}
    kept["progress"] = rank == 0
    in_turn = world > 1 and cfg.sample_len  # the first of each machine writes the cache
    if in_turn and local:
        dist.barrier()
    train_ds = ClipDataset(cfg.train_csv, rate, cfg.data_root, cfg.append_silence, **kept)
    valid_ds = ClipDataset(cfg.valid_csv, rate, cfg.data_root, **kept)
    if in_turn and not local:
        dist.barrier()
    if cfg.conditions:
        if last is not None:  # in the order of the run's embeddings
            cfg.model.conditions = last["config"]["conditions"]
            cfg.model.condition_counts = last["config"]["condition_counts"]
        for ds in (train_ds, valid_ds):
            ds.tell(cfg.model.conditions)
    augment = GainSpeed(cfg.gain_db, cfg.speed) if cfg.gain_db or cfg.speed else None
    size = sum(ds.data.numel() * ds.data.itemsize for ds in (train_ds, valid_ds))
    prefetch = on_gpu
    if on_gpu and train_ds.mapped is None and augment is None:  # held there, where it fits
        prefetch = size > torch.cuda.mem_get_info(device)[0] / 4
    if on_gpu and not prefetch:
        train_ds, valid_ds = train_ds.to(device), valid_ds.to(device)
    seq_len = cfg.seq_len or (cfg.model.clip_length if diffusion else cfg.model.l_max)
    pad_multiple = seq_len if cfg.compile else 16  # one shape: compiled once
    order = seeded("order", cfg.seed)
    depends = f"{cfg.batch_size} {seq_len} {train_ds.lengths.tolist()}"
    plan = hashlib.sha256(depends.encode()).hexdigest()[:16]

    # model
    torch.manual_seed(seed_of("weights", cfg.seed))
    model = (SashimiDiffWave if diffusion else SashimiAR)(cfg.model).to(device).train()
    if init is not None:
        # what the other has not was made to change nothing: embeddings of conditions are zero
        own = {k: v for k, v in init.state_dict().items() if not k.startswith("told.")}
        model.load_state_dict(own, strict=False)
        model.told.start_from(init.told)
    model.backbone.recomputed_tiers = cfg.recompute_tiers
    optimizer = make_optimizer(model, cfg)
    averaged = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    at = resume.Position(order.get_state(), plan=plan)
    if last is not None:
        model.load_state_dict(last["model"])
        if averaged is not None:
            averaged.load_state_dict(last["averaged"] or last["model"])
        chosen = [{k: group[k] for k in ("base_lr", "weight_decay", "fused")}
                  for group in optimizer.param_groups]  # fmt: skip
        optimizer.load_state_dict(last["optimizer"])
        for group, settings in zip(optimizer.param_groups, chosen, strict=True):
            group.update(settings)  # this command's, should they differ
        at.validated = last["step"]  # of a file that does not tell
        vars(at).update({k: last[k] for k in vars(at) if k in last})
        if source.parent.resolve() != run.resolve():
            at.origin = str(source.resolve())
        if source != run / "last.pt":
            at.saved = -1
        if at.plan != plan:
            logging.warning("data or batch_size changed since step %s: a new epoch begins", at.step)
            at.plan, at.epoch, at.batches_done = plan, at.epoch + 1, 0
    stepped = torch.compile(model) if cfg.compile else model
    if world > 1:
        stepped = DistributedDataParallel(
            stepped, [local] if on_gpu else None, gradient_as_bucket_view=True
        )

    if summed([at.step], device)[0] != world * at.step:
        raise UserError(f"checkpoint_path={run}: processes find different states; it must be on a "
                         "disk that all machines share")  # fmt: skip
    book = Logbook(run, at.step) if rank == 0 else None
    bar = terminal_bar() if rank == 0 else None
    facts = environment(device) | {
        "processes": f"{world}, {cfg.accumulate} parts of {part} clips each",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "training": f"{len(train_ds):,} clips, {len(train_ds.data) / rate / 60:.1f} minutes, "
        f"{Path(cfg.train_csv).name}",
        "validation": f"{len(valid_ds):,} clips, {len(valid_ds.data) / rate / 60:.1f} minutes, "
        f"{Path(cfg.valid_csv).name}",
    }  # fmt: skip

    def say(line: str) -> None:
        if rank == 0:
            print(line if bar is None else f"\n{line}", flush=True)

    going_on = f"; going on from step {at.step:,}" if last is not None else ""
    say(
        f"{facts['parameters']} parameters on {facts['device']}; {len(train_ds):,} training clips "
        f"({len(train_ds.data) / rate / 60:.1f} min), {len(valid_ds):,} for validation; "
        f"run folder {run}{going_on}"
    )
    if unit == "mse" and rank == 0:
        wavs = (batch["wav"] for batch in wave_batches(valid_ds, 64, seq_len, shuffle=False))
        power = sum(float(wav.square().sum()) for wav in wavs) / (len(valid_ds) * seq_len)
        linear = linear_noise_error(model.alpha_bar, power)
        say(f"for comparison: {unit} 1.0000 untrained, {linear:.4f} by scaling the input")

    # time: of the whole run, of the phases of a step, and of the phases since they were last told
    started = time.monotonic() - at.seconds
    laps, spent, whole = Counter(), Counter(), Counter()
    lap_began = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal lap_began
        if on_gpu and (at.step + 1) % cfg.summary_interval == 0:
            torch.cuda.synchronize(device)  # work is only queued: what is told needs its end
        now = time.perf_counter()
        laps[phase] += now - lap_began
        lap_began = now

    def progress() -> float:
        """0 at the start, 1 where the run ends by its steps or its minutes."""
        by_steps = at.step / cfg.max_steps if cfg.max_steps else 0.0
        by_time = at.seconds / 60 / cfg.max_minutes if cfg.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")

    def epoch_batches() -> Iterator[Batch]:
        order.set_state(at.epoch_order)
        given = (train_ds, cfg.batch_size, seq_len, order)
        kept = {"augment": augment, "start": at.batches_done, "shard": (rank, world)}
        if diffusion:
            batches = wave_batches(*given, **kept)
        else:
            batches = sample_batches(*given, **kept, pad_multiple=pad_multiple)
        return prefetched(batches, pin=True) if prefetch else batches

    def total_loss(piece: Batch, first: int, planned: int) -> Tensor:
        """Sum of the loss over a piece's samples, in `unit`; it begins at the batch's row `first`,
        of those planned."""
        if not diffusion:
            return masked_bits(stepped, piece)
        # a generator of each step's own: a resumed run draws the same noise, each process its part
        noise = seeded("noise", cfg.seed, at.step, device=device)
        n = len(piece["index"])
        place = (first, planned) if n else (0, 1)
        error = NOISE_ERRORS[unit](stepped, piece["wav"], noise, place, piece.get("told"))
        return error * (n * seq_len)

    def validation_loss(judged: nn.Module) -> float:
        """Mean over all samples of the validation clips, a share of them from each process."""
        total, count, noise = 0.0, 0, torch.Generator().manual_seed(0)
        shared, shard = cfg.batch_size // world, (rank, world)
        if not diffusion:
            for batch in sample_batches(valid_ds, cfg.batch_size, None, shuffle=False, shard=shard):
                total += total_bits(judged, batch)
                count += int(batch["samples"])
        else:
            for batch in wave_batches(
                valid_ds, cfg.batch_size, seq_len, shuffle=False, shard=shard
            ):
                n, planned = len(batch["index"]), int(batch["planned"])
                place = (rank * shared, planned) if n else (0, planned)
                with torch.no_grad():
                    error = NOISE_ERRORS[unit](
                        judged, batch["wav"], noise, place, batch.get("told")
                    )
                    total += error.item() * n
                count += n
        total, count = summed([total, count], device)
        return total / count

    def listen(judged: nn.Module) -> tuple[Tensor, list[str]]:
        """A few clips, always of the same conditions, and their names."""
        noise = torch.Generator().manual_seed(0)
        names = [str(i) for i in range(cfg.n_listen)]
        if diffusion and not cfg.model.unconditional:
            wav = next(wave_batches(valid_ds, cfg.n_listen, seq_len, shuffle=False))["wav"]
            return judged.vocode(judged.log_mel(wav), generator=noise), names[: len(wav)]
        told = judged.draw_conditions(cfg.n_listen, noise)
        names = [" ".join(words) for words in zip(names, *told.values(), strict=True)]
        return judged.generate(cfg.n_listen, generator=noise, **told), names

    def run_validation() -> None:
        judged = averaged or model
        with interruptible():
            loss = validation_loss(judged.eval())
        is_best = loss < at.best
        at.bad_validations = 0 if is_best else at.bad_validations + 1
        at.best, at.validated = min(loss, at.best), at.step
        if cfg.schedule == "plateau" and at.bad_validations > cfg.plateau_patience:
            at.scale, at.bad_validations = at.scale * cfg.plateau_factor, 0
        if rank:
            return
        say(f"step {at.step:,}: validation {loss:.4f} {unit}" + (" (best)" if is_best else ""))
        spectra = book.spectra(at.step, judged)
        book.numbers(at.step, at.seconds, **{f"valid_{unit}": loss}, **spectra)
        if is_best:
            save_checkpoint(
                run / "best.safetensors", judged, step=at.step, data=Path(cfg.train_csv).name,
                command=command, **{f"valid_{unit}": round(loss, 4)},
            )  # fmt: skip
        book.page(unit, command, facts, to_dict(cfg))
        if cfg.n_listen:
            with interruptible():
                wavs, names = listen(judged)
            book.clips(at.step, wavs, rate, names)

    def save_last() -> None:
        content = {"format": FORMAT, "kind": model_kind(model), "config": to_dict(cfg.model),
                   "model": model.state_dict(),
                   "averaged": averaged.state_dict() if averaged else None,
                   "optimizer": optimizer.state_dict()}  # fmt: skip
        resume.save(run, content, at, cfg.keep_last)

    # signals: the step is finished, its state saved; a second Ctrl-C ends at once
    signals: list[int] = []
    waiting = False

    def on_signal(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in signals:
            raise KeyboardInterrupt
        signals.append(number)
        if waiting:
            raise Interrupted(number)

    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        """What takes long and leaves nothing behind ends at once; several processes wait."""
        nonlocal waiting
        if world == 1 and signals:
            raise Interrupted(signals[0])
        waiting = world == 1
        try:
            yield
        finally:
            waiting = False

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}

    window_loss, window_samples, window_clips = 0.0, 0, 0
    window_began = time.monotonic()
    stopping, saved_at = 0, at.seconds
    seen = at.batches_done  # of this epoch: whether there was anything
    batches = epoch_batches()
    try:
        while True:
            # between steps: a state that can be saved, and gone on from
            finished = progress() >= 1
            due = at.step % cfg.validation_interval == 0 or finished
            lap("log")
            if due and not stopping and at.validated != at.step:
                try:
                    run_validation()
                except Interrupted as stop:
                    stopping = stop.args[0]
                model.train()
                window_began += time.perf_counter() - lap_began
                lap("validation")
            due = at.step % cfg.checkpoint_interval == 0 or finished or stopping
            due = due or at.seconds > saved_at + 60 * cfg.checkpoint_minutes
            if due and rank == 0 and at.saved != at.step:
                save_last()
                saved_at = at.seconds
            lap("save")
            if stopping:
                raise Interrupted(stopping)
            if finished:
                break

            batch = next(batches, None)
            if batch is None:
                if not seen:
                    raise UserError(f"{cfg.train_csv}: no clip of it can be read any more")
                seen = 0
                at.epoch, at.batches_done, at.epoch_order = at.epoch + 1, 0, order.get_state()
                batches = epoch_batches()
                continue
            count = summed([float(batch["samples"])], device)[0]
            seen += count
            lap("data")

            # forward and backward, part by part
            torch.manual_seed(seed_of("dropout", cfg.seed, at.step, rank))
            if "told" in batch:
                place = (rank * part * cfg.accumulate, int(batch["planned"]))
                some = seeded("conditions", cfg.seed, at.step)
                if len(batch["index"]):
                    batch["told"] = withhold(batch["told"], cfg.condition_dropout, some, place)
            optimizer.zero_grad(set_to_none=True)
            value = torch.zeros((), device=device)
            pieces = list(split(batch, part))
            for i, piece in enumerate(pieces):
                wait = world > 1 and i + 1 < len(pieces)  # gradients meet at the last part
                with stepped.no_sync() if wait else contextlib.nullcontext():
                    with autocast():
                        loss = total_loss(piece, rank * part * cfg.accumulate + i * part,
                                          int(batch["planned"]))  # fmt: skip
                    value += loss.detach()
                    lap("forward")
                    scale = (1 if diffusion else LN2) * world / max(1, count)
                    (loss * scale).backward()
                    lap("backward")
            summary = (at.step + 1) % cfg.summary_interval == 0
            grads = {
                f"grad_norm/{group['name']}".replace(" ", "_"):
                    [p.grad for p in group["params"] if p.grad is not None]
                for group in optimizer.param_groups
            }  # fmt: skip
            found = [norm_of(of_group) for of_group in grads.values()]
            value, norm, *found = torch.stack([value, norm_of(found), *found]).tolist()
            at.seconds = time.monotonic() - started
            if world > 1:  # what all processes must agree on
                mine = [value, 0.0 if rank else at.seconds, max(signals, default=0)]
                value, at.seconds, stopping = summed(mine, device)
                stopping = int(stopping > 0) and (max(signals, default=0) or signal.SIGTERM)
            else:
                stopping = max(signals, default=0)
            value /= max(1, count)

            # the step
            warm = min(1.0, max((at.step + 1) / max(1, cfg.warmup_steps),
                                progress() / SHORT_WARM_UP))  # fmt: skip
            cosine = (1 + math.cos(math.pi * progress())) / 2
            for group in optimizer.param_groups:
                anneal = cosine if cfg.schedule == "cosine" else at.scale
                group["lr"] = group["base_lr"] * warm * anneal
            good = math.isfinite(value) and math.isfinite(norm)
            if good:
                if 0 < cfg.grad_clip < norm:
                    torch._foreach_mul_(sum(grads.values(), []), cfg.grad_clip / norm)
                optimizer.step()
                at.skipped_in_a_row = 0
                window_loss += value * count
                window_samples += count
            else:
                at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
                say(f"step {at.step + 1:,}: loss {value}, gradient norm {norm}: skipped")
                if at.skipped_in_a_row == SKIPS:
                    raise UserError(
                        f"steps {at.step + 2 - SKIPS:,} to {at.step + 1:,}: not finite, first in "
                        f"{first_bad(model)}. Lower start_lr or set grad_clip; the last good state "
                        f"is {run / 'last.pt'}"
                    )
            at.step, at.batches_done = at.step + 1, at.batches_done + 1
            if averaged is not None and good:
                decay = min(cfg.ema, at.step / (at.step + 10))  # short memory while all is new
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(averaged.parameters()), list(model.parameters()), 1 - decay
                    )
            window_clips += int(batch["planned"])
            lap("optimizer")

            # what is told
            spent.update(laps)
            if summary and book:
                model_time = sum(spent[k] for k in ("forward", "backward", "optimizer"))
                all_time = sum(spent.values()) - spent["validation"]
                curves = {f"train_{unit}": value, "grad_norm": norm} if good else {}
                norms = dict(zip(grads, found, strict=True))
                book.numbers(
                    at.step, at.seconds, **curves, **norms, lr=optimizer.param_groups[0]["lr"],
                    **{"lr/state_space": optimizer.param_groups[-1]["lr"]},
                    **{f"seconds/{k}": round(laps[k], 6) for k in laps},
                    data_wait=round(spent["data"] / all_time, 6),
                    overhead=round(1 - model_time / all_time, 6), memory_gib=memory(device),
                    skipped_steps=at.skipped, broken_files=len(train_ds.broken),
                )  # fmt: skip
            if summary:
                whole.update(spent)
                spent.clear()
            laps.clear()
            if rank == 0 and (at.step % cfg.stdout_interval == 0 or progress() >= 1):
                per_second = window_clips / max(1e-9, time.monotonic() - window_began)
                left = at.seconds * (1 / max(1e-9, progress()) - 1) / 60
                mean = window_loss / window_samples if window_samples else math.nan
                line = (
                    f"step {at.step:,}  epoch {at.epoch}  {mean:.4f} {unit}  "
                    f"{per_second:.3g} clips/s  {left:.0f} min left"
                )
                if bar is None:
                    print(line, flush=True)
                else:
                    bar.comment = line
                window_loss, window_samples, window_clips = 0.0, 0, 0
                window_began = time.monotonic()
            if bar is not None:
                bar.update(min(999, int(progress() * 1000)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if book:
            book.close()
    whole.update(spent + laps)
    total = sum(whole.values()) or 1.0
    say("time: " + ", ".join(f"{100 * v / total:.2f} % {k}" for k, v in whole.most_common()))
    best = run / "best.safetensors"
    if not best.exists() and source:  # gone on with in a new folder, and nothing was better since
        best = source.parent / best.name
    say(f"finished: best validation {at.best:.4f} {unit}, weights {best}")
    return at.best


if __name__ == "__main__":
    main()
