"""Train a SaShiMi model on a CSV of audio files.

    python train.py train_csv=splits/sc09-train.csv valid_csv=splits/sc09-valid.csv \
        data_root=speech_commands checkpoint_path=runs/run1/ validation_interval=2500

    python train.py train_csv=splits/fsdd-train.csv valid_csv=splits/fsdd-valid.csv \
        data_root=fsdd/recordings checkpoint_path=runs/digits model.sample_rate=8000 \
        model.l_max=8000 model.clip_length=8000 append_silence=400 max_minutes=60

    python train.py model=diffwave train_csv=splits/sc09-train.csv valid_csv=splits/sc09-valid.csv \
        data_root=speech_commands checkpoint_path=runs/diffusion max_steps=500000

    python train.py model=diffwave_small unconditional=false seq_len=8192 ...     # a vocoder

    python train.py ... resume_checkpoint=runs/run1/last.pt         # go on where it stopped

`python train.py --help` lists every setting. The run folder gets `last.pt` (everything that is
needed to resume), `best.safetensors` (the weights to use: load_checkpoint), `metrics.jsonl` and
TensorBoard files (`tensorboard --logdir runs`). `model=` is autoregressive (bits per sample are
minimised), diffwave, diffwave_small or diffwave_small_unidirectional (squared error of the noise).
"""

import copy
import difflib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from sashimi.autoregressive import SashimiAR
from sashimi.checkpoint import (
    FORMAT,
    MODELS,
    CheckpointError,
    model_kind,
    save_checkpoint,
    usable_device,
    write_atomically,
)
from sashimi.config import (
    AutoregressiveConfig,
    DiffusionConfig,
    as_written,
    parse_args,
    setting,
    to_dict,
)
from sashimi.data import ClipDataset, GainSpeed, sample_batches, wave_batches
from sashimi.diffusion import CONFIGS, SashimiDiffWave, linear_noise_error, noise_error
from sashimi.likelihood import bits_per_sample, masked_bits
from sashimi.page import spectrogram_figure
from sashimi.s4 import S4

LN2 = math.log(2)
EXAMPLES = "\n".join(line[4:] for line in __doc__.splitlines() if line.startswith("    "))


# ---- settings ---------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    # data
    train_csv: str = setting(MISSING, "CSV of training clips, with a column `path`")
    valid_csv: str = setting(MISSING, "CSV of validation clips")
    data_root: str | None = setting(None, "folder that relative paths in the CSVs start from")
    append_silence: int = setting(
        0, "samples of silence appended to each training clip: trimmed clips then teach to stop"
    )
    seq_len: int | None = setting(
        None, "samples per training clip at most, longer ones are cropped; none: model.l_max"
    )
    peak: float | None = setting(None, "scale every clip to this peak, up to 1; none: as recorded")
    gain_db: float = setting(0.0, "augmentation: random gain within +- this many dB")
    speed: float = setting(0.0, "augmentation: random speed within +- this fraction")
    # run
    checkpoint_path: str = setting(MISSING, "folder for checkpoints and logs")
    resume_checkpoint: str | None = setting(None, "a last.pt to go on from")
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; none: the GPU if there is one")
    seed: int = setting(1775, "of initial weights, data order, crops and augmentation")
    threads: int | None = setting(None, "CPU threads of torch; none: all cores")
    compile: bool = setting(
        False, "torch.compile: faster steps after minutes of compiling; clips are padded to seq_len"
    )
    max_steps: int | None = setting(None, "optimizer steps; none: no limit (published: 1.1M)")
    max_minutes: float | None = setting(None, "stop after this long, resumed runs included")
    # optimizer
    batch_size: int = setting(8, "clips per optimizer step (published: 8)")
    start_lr: float = setting(4e-3, "learning rate at the start (published: 4e-3)")
    ssm_lr: float = setting(1e-3, "of the state spaces' own parameters (S4 paper: 1e-3)")
    weight_decay: float = setting(0.0, "AdamW's; never on the state spaces, norms, biases")
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping (published)")
    schedule: str = setting("plateau", "plateau (published), cosine or constant")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    plateau_factor: float = setting(0.2, "plateau: rates are multiplied by this (published: 0.2)")
    plateau_patience: int = setting(20, "plateau: validations without a better one (published: 20)")
    ema: float = setting(0.0, "decay of the averaged weights that are validated and kept; 0: none")
    # log
    stdout_interval: int = setting(100, "steps between lines on the terminal")
    summary_interval: int = setting(25, "steps between TensorBoard points")
    validation_interval: int = setting(2500, "steps between validations")
    checkpoint_interval: int = setting(2500, "steps between saves of last.pt")
    n_listen: int = setting(2, "clips generated at every validation, for TensorBoard")
    model: AutoregressiveConfig = setting(AutoregressiveConfig, "the network")

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "stdout_interval", "summary_interval", "validation_interval",
                        "checkpoint_interval", "seq_len", "max_steps", "threads")  # fmt: skip
        not_negative = ("append_silence", "gain_db", "speed", "ssm_lr", "weight_decay", "grad_clip",
                        "warmup_steps", "plateau_patience", "ema", "n_listen")  # fmt: skip
        positive = ("max_minutes", "start_lr", "plateau_factor")
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in at_least_one and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
            if name in not_negative and value < 0:
                raise ValueError(f"{name}={value}: must be at least 0")
            if name in positive and value <= 0:
                raise ValueError(f"{name}={value}: must be above 0")
            if name in ("ema", "speed") and value >= 1:
                raise ValueError(f"{name}={value}: must be below 1")
            if name == "peak" and not 0 < value <= 1:
                raise ValueError(f"{name}={value}: must be above 0 and at most 1")
        if self.schedule not in ("plateau", "cosine", "constant"):
            raise ValueError(f"schedule={self.schedule}: must be plateau, cosine or constant")
        if self.schedule == "cosine" and not (self.max_steps or self.max_minutes):
            raise ValueError("schedule=cosine needs an end: set max_steps= or max_minutes=")


@dataclass
class DiffusionTrainConfig(TrainConfig):
    seq_len: int | None = setting(
        None, "samples per clip: longer ones are cropped, shorter ones padded; none: clip_length"
    )
    start_lr: float = setting(2e-4, "learning rate at the start (DiffWave: 2e-4)")
    ema: float = setting(
        0.9999, "decay of the averaged weights that are validated and kept; 0: none"
    )
    model: DiffusionConfig = setting(DiffusionConfig, "the network")


# what `model=` may be -> settings, and those of the network that differ from their defaults
KINDS = {"autoregressive": (TrainConfig, {})} | {
    "diffwave" if name == "large" else f"diffwave_{name}": (DiffusionTrainConfig, differing)
    for name, differing in CONFIGS.items()
}


def parse(argv: list[str]) -> TrainConfig:
    """The settings; `model=` decides which there are."""
    is_kind = [a.removeprefix("--").startswith("model=") for a in argv]
    names = [a.partition("=")[2] for a, yes in zip(argv, is_kind, strict=True) if yes]
    kind = names[-1] if names else "autoregressive"
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        print(f"error: model={kind}: did you mean {near}? ({', '.join(KINDS)})", file=sys.stderr)
        raise SystemExit(2)
    cls, differing = KINDS[kind]
    given = [a for a, yes in zip(argv, is_kind, strict=True) if not yes]
    defaults = [f"model.{key}={as_written(value)}" for key, value in differing.items()]
    return parse_args(cls, defaults + given, prog="python train.py", examples=EXAMPLES)


# ---- the parts --------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW in three groups: weights, biases and norms without decay, state spaces."""
    ssm = {
        id(getattr(layer, name))
        for layer in model.modules()
        if isinstance(layer, S4)
        for name in S4.SSM_PARAMETERS
    }
    groups = {"weights": [], "no decay": [], "state space": []}
    for p in model.parameters():
        name = "state space" if id(p) in ssm else "weights" if p.dim() == 2 else "no decay"
        groups[name].append(p)
    rates = {"state space": cfg.ssm_lr}
    return torch.optim.AdamW(
        [
            {"params": params, "name": name, "lr": rates.get(name, cfg.start_lr),
             "base_lr": rates.get(name, cfg.start_lr),
             "weight_decay": cfg.weight_decay if name == "weights" else 0.0}
            for name, params in groups.items()
        ]
    )  # fmt: skip


LAST_KEYS = {
    "kind", "config", "model", "averaged", "optimizer", "step", "epoch", "batches_done",
    "epoch_order", "best", "scale", "bad_validations", "seconds", "rng", "cuda_rng",
}  # fmt: skip


def read_last(path: str, cfg: TrainConfig) -> dict:
    """The content of a last.pt of the same architecture."""
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"resume_checkpoint={path}: no such file") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"resume_checkpoint={path}: not readable ({reason})") from None
    if not isinstance(last, dict) or last.get("format") != FORMAT:
        raise CheckpointError(f"resume_checkpoint={path}: not a last.pt of this trainer")
    if missing := LAST_KEYS - last.keys():
        raise CheckpointError(
            f"resume_checkpoint={path} lacks {', '.join(sorted(missing))}: written by another "
            "version of this trainer, which can go on with it"
        )
    kind = next(name for name, (_, settings) in MODELS.items() if isinstance(cfg.model, settings))
    if last["kind"] != kind:
        raise CheckpointError(
            f"resume_checkpoint={path} holds a model of kind {last['kind']}, this run has {kind}: "
            f"write model={last['kind']}"
        )
    theirs, ours = last["config"], to_dict(cfg.model)
    if differing := [k for k in ours if theirs.get(k) != ours[k]]:
        key = differing[0]
        value = as_written(theirs.get(key))
        raise CheckpointError(
            f"resume_checkpoint={path} was trained with model.{key}={value}, "
            f"this run has {as_written(ours[key])}: write model.{key}={value}"
        )
    return last


# ---- the loop ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    cfg = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train(cfg)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with resume_checkpoint={Path(cfg.checkpoint_path) / 'last.pt'}")
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train(cfg: TrainConfig) -> float:
    """Train as the settings say; returns the best validation: bits per sample, or noise error."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = usable_device(cfg.device)
    last = read_last(cfg.resume_checkpoint, cfg) if cfg.resume_checkpoint else None
    run = Path(cfg.checkpoint_path)
    resumed = cfg.resume_checkpoint and Path(cfg.resume_checkpoint).resolve().parent
    if resumed != run.resolve() and any(
        (run / name).exists() for name in ("last.pt", "best.safetensors", "metrics.jsonl")
    ):
        raise ValueError(
            f"{run} holds a run already: go on with resume_checkpoint={run / 'last.pt'}, "
            "or choose another checkpoint_path"
        )

    # data
    rate, diffusion = cfg.model.sample_rate, isinstance(cfg.model, DiffusionConfig)
    unit = "mse" if diffusion else "bits"
    kept = {"pcm": diffusion, "peak": cfg.peak}
    train_ds = ClipDataset(cfg.train_csv, rate, cfg.data_root, cfg.append_silence, **kept)
    valid_ds = ClipDataset(cfg.valid_csv, rate, cfg.data_root, **kept)
    augment = GainSpeed(cfg.gain_db, cfg.speed) if cfg.gain_db or cfg.speed else None
    order = torch.Generator().manual_seed(cfg.seed)

    # model
    model = (SashimiDiffWave if diffusion else SashimiAR)(cfg.model).to(device).train()
    optimizer = make_optimizer(model, cfg)
    averaged = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    stepped = torch.compile(model) if cfg.compile else model
    seq_len = cfg.seq_len or (cfg.model.clip_length if diffusion else cfg.model.l_max)
    pad_multiple = seq_len if cfg.compile else 16  # one shape: compiled once
    step = epoch = batches_done = bad_validations = 0
    best, scale, seconds_before = math.inf, 1.0, 0.0
    epoch_order = order.get_state()
    if last is not None:
        model.load_state_dict(last["model"])
        if averaged is not None:
            averaged.load_state_dict(last["averaged"] or last["model"])
        optimizer.load_state_dict(last["optimizer"])
        step, epoch, batches_done = last["step"], last["epoch"], last["batches_done"]
        best, scale, bad_validations = last["best"], last["scale"], last["bad_validations"]
        seconds_before, epoch_order = last["seconds"], last["epoch_order"]
        torch.set_rng_state(last["rng"])
        if model.device.type == "cuda" and last["cuda_rng"]:
            torch.cuda.set_rng_state_all(last["cuda_rng"])

    run.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(run, purge_step=step + 1)  # a resumed run repeats what was not saved
    metrics = open(run / "metrics.jsonl", "a", buffering=1)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {model.device}; "
        f"{len(train_ds):,} training clips ({len(train_ds.data) / rate / 60:.1f} min), "
        f"{len(valid_ds):,} for validation; run folder {run}"
    )
    if diffusion:
        wavs = (batch["wav"] for batch in wave_batches(valid_ds, 64, seq_len, shuffle=False))
        power = sum(float(wav.square().sum()) for wav in wavs) / (len(valid_ds) * seq_len)
        linear = linear_noise_error(model.alpha_bar, power)
        print(f"for comparison: {unit} 1.0000 untrained, {linear:.4f} by scaling the input")
    started = time.monotonic()

    def elapsed() -> float:
        return seconds_before + time.monotonic() - started

    def progress() -> float:
        """0 at the start, 1 where the run ends by its steps or its minutes."""
        by_steps = step / cfg.max_steps if cfg.max_steps else 0.0
        by_time = elapsed() / 60 / cfg.max_minutes if cfg.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def epoch_batches() -> Iterator[dict[str, Tensor]]:
        order.set_state(epoch_order)
        if diffusion:
            return wave_batches(
                train_ds, cfg.batch_size, seq_len, order, augment=augment, start=batches_done
            )
        return sample_batches(
            train_ds, cfg.batch_size, seq_len, order, augment=augment, pad_multiple=pad_multiple,
            start=batches_done,
        )  # fmt: skip

    def batch_loss(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Mean over the batch's samples, in `unit`, and how many they are."""
        if diffusion:
            # a generator of each step's own: a resumed run draws the same noise
            noise = torch.Generator(model.device).manual_seed(cfg.seed + step)
            return noise_error(stepped, batch["wav"], noise), batch["wav"].numel()
        samples = int(batch["mask"].sum())
        return masked_bits(stepped, batch) / samples, samples

    def validation_loss(judged: nn.Module) -> float:
        if not diffusion:
            return bits_per_sample(judged, valid_ds, cfg.batch_size)
        noise, total = torch.Generator().manual_seed(0), 0.0
        with torch.no_grad():
            for batch in wave_batches(valid_ds, cfg.batch_size, seq_len, shuffle=False):
                total += noise_error(judged, batch["wav"], noise).item() * len(batch["wav"])
        return total / len(valid_ds)

    def listen(judged: nn.Module) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        if not diffusion:
            return judged.generate(cfg.n_listen, generator=noise)
        if cfg.model.unconditional:
            return judged.unconditional_generate(cfg.n_listen, generator=noise)
        wav = next(wave_batches(valid_ds, cfg.n_listen, seq_len, shuffle=False))["wav"]
        return judged.vocode(judged.log_mel(wav), generator=noise)

    def save_last() -> None:
        buffer = io.BytesIO()
        torch.save(
            {"format": FORMAT, "kind": model_kind(model), "config": to_dict(cfg.model),
             "model": model.state_dict(),
             "averaged": averaged.state_dict() if averaged else None,
             "optimizer": optimizer.state_dict(), "step": step, "epoch": epoch,
             "batches_done": batches_done, "epoch_order": epoch_order, "best": best,
             "scale": scale, "bad_validations": bad_validations, "seconds": elapsed(),
             "rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []},
            buffer,
        )  # fmt: skip
        write_atomically(run / "last.pt", buffer.getvalue())

    def log(**values: float) -> None:
        metrics.write(json.dumps({"step": step, "seconds": round(elapsed(), 1)} | values) + "\n")
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    def run_validation() -> None:
        nonlocal best, bad_validations, scale
        judged = averaged or model
        loss = validation_loss(judged.eval())
        log(**{f"valid_{unit}": loss})
        is_best = loss < best
        said = f"step {step:,}: validation {loss:.4f} {unit}" + (" (best)" if is_best else "")
        print(said if bar is None else f"\n{said}", flush=True)
        bad_validations = 0 if is_best else bad_validations + 1
        if is_best:
            best = loss
            save_checkpoint(
                run / "best.safetensors", judged, step=step, data=Path(cfg.train_csv).name,
                command=" ".join(sys.argv), **{f"valid_{unit}": round(loss, 4)},
            )  # fmt: skip
        if cfg.schedule == "plateau" and bad_validations > cfg.plateau_patience:
            scale, bad_validations = scale * cfg.plateau_factor, 0
        if cfg.n_listen:
            for i, wav in enumerate(listen(judged).cpu()):
                writer.add_audio(f"generated/{i}", wav[None], step, sample_rate=rate)
                writer.add_figure(f"generated/{i}", spectrogram_figure(wav, rate), step)
        model.train()

    bar = None
    if sys.stdout.isatty():
        from fastprogress.fastprogress import progress_bar

        bar = progress_bar(range(1000))
        bar.update(0)
    window_loss, window_samples, window_clips = 0.0, 0, 0
    window_started = time.monotonic()
    finished = progress() >= 1
    try:
        while not finished:
            for batch in epoch_batches():
                warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
                cosine = (1 + math.cos(math.pi * progress())) / 2
                for group in optimizer.param_groups:
                    anneal = cosine if cfg.schedule == "cosine" else scale
                    group["lr"] = group["base_lr"] * warm * anneal
                loss, samples = batch_loss(batch)
                optimizer.zero_grad(set_to_none=True)
                (loss if diffusion else loss * LN2).backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
                value = loss.item()
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise ValueError(
                        f"step {step + 1}: loss {value}, gradient norm {norm}: not finite. Lower "
                        f"start_lr or set grad_clip; {run / 'last.pt'}, if there, is before it"
                    )
                optimizer.step()
                step, batches_done = step + 1, batches_done + 1
                if averaged is not None:
                    decay = min(cfg.ema, step / (step + 10))  # short memory while all is new
                    with torch.no_grad():
                        torch._foreach_lerp_(
                            list(averaged.parameters()), list(model.parameters()), 1 - decay
                        )
                window_loss += value * samples
                window_samples += samples
                window_clips += len(batch["index"])
                finished = progress() >= 1
                if step % cfg.summary_interval == 0:
                    lr = optimizer.param_groups[0]["lr"]
                    log(**{f"train_{unit}": value}, lr=lr, grad_norm=float(norm))
                if step % cfg.stdout_interval == 0 or finished:
                    per_second = window_clips / max(1e-9, time.monotonic() - window_started)
                    left = elapsed() * (1 / progress() - 1) / 60 if progress() else math.inf
                    line = (
                        f"step {step:,}  epoch {epoch}  {window_loss / window_samples:.4f} {unit}  "
                        f"{per_second:.1f} clips/s  "
                    ) + (f"{left:.0f} min left" if left < math.inf else "no end set")
                    if bar is None:
                        print(line, flush=True)
                    else:
                        bar.comment = line
                    window_loss, window_samples, window_clips = 0.0, 0, 0
                    window_started = time.monotonic()
                if bar is not None:
                    bar.update(min(999, int(progress() * 1000)))
                if step % cfg.validation_interval == 0 or finished:
                    run_validation()
                    window_started = time.monotonic()
                if step % cfg.checkpoint_interval == 0 or finished:
                    save_last()
                if finished:
                    break
            else:
                epoch, batches_done, epoch_order = epoch + 1, 0, order.get_state()
    except KeyboardInterrupt:
        save_last()
        raise
    finally:
        writer.close()
        metrics.close()
    kept = run / "best.safetensors"
    if not kept.exists():  # resumed into a new folder, and nothing was better since
        kept = resumed / kept.name
    print(f"finished: best validation {best:.4f} {unit}, weights {kept}")
    return best


if __name__ == "__main__":
    main()
