"""Speed and memory of everything that takes time, as a Markdown table.

Every line is a process of its own, and one thing that a user waits for, done again and again.
`first` is the first time in that process, with the model loaded and nothing prepared: weights are
packed for the engine, S4 kernels computed, a CUDA graph recorded, and native code compiled if it
never was on this machine. `again` is the median of the times after it. `memory` is the most that
the process has held from its start, Python and PyTorch included; on a GPU, the most of the GPU's.
Weights do not matter for speed, so that models are untrained where none are given.
(`python -m cauchy_kernel.benchmark` does the same for the S4 kernel alone.)
"""

import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cauchy_kernel.benchmark import peak_bytes
from rawaudio import command
from rawaudio.autoregressive import Autoregressive, shift
from rawaudio.checkpoint import load_model
from rawaudio.config import parse_args, setting, usable_device
from rawaudio.errors import UserError
from rawaudio.hub import load_named
from rawaudio.model import Model
from rawaudio.sampling import Graph, Plain
from sashimi.autoregressive import AutoregressiveConfig, SashimiAR
from sashimi.diffwave import CONFIGS, DiffusionConfig, SashimiDiffWave
from sashimi.mulaw import N_CLASSES, SILENCE
from sashimi.realtime import Engine

EXAMPLES = """\
python -m rawaudio.benchmark                              # minutes, on the CPU
python -m rawaudio.benchmark device=cuda
python -m rawaudio.benchmark rows=[generation,first_chunk] clips=[1,4,64] threads=1 seconds=10
python -m rawaudio.benchmark rows=[generation,bfloat16] checkpoint=best.safetensors
python -m rawaudio.benchmark tiny=true                    # toy models: does it run here?"""

NAMES = ["generation", "bfloat16", "plain", "guidance", "first_chunk", "digits", "diffusion",
         "training"]  # fmt: skip


@dataclass
class BenchmarkConfig:
    rows: list[str] = setting(NAMES, "what to measure")
    checkpoint: str | None = setting(
        None, "autoregressive weights to measure; none: the 4.8M-parameter model, untrained"
    )
    clips: list[int] = setting([1, 16], "clips at once, in rows of generation")
    lengths: list[int] = setting([4000, 16000, 64000], "samples of the clip in rows of training")
    threads: int | None = setting(None, "of PyTorch; none: its own choice")
    seconds: float = setting(1.0, "how long each line is repeated, at least")
    device: str = setting("cpu", "cpu or cuda")
    tiny: bool = setting(False, "toy models and lengths, to try the command")

    def __post_init__(self) -> None:
        for name in self.rows:
            if name not in NAMES:
                raise UserError(f"rows=[{name}]: no such row; there are {', '.join(NAMES)}")
        for name in ("clips", "lengths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UserError(f"{name}: must be a list of numbers from 1")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads}: must be at least 1")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"seconds={self.seconds}: must be above 0")


def parse(argv: list[str] | None = None) -> BenchmarkConfig:
    """The settings. Ends the process, with one line, for those that cannot be followed."""
    return parse_args(BenchmarkConfig, argv, prog="python -m rawaudio.benchmark", examples=EXAMPLES)


CHECKED = 256  # steps over which the logits are compared with the parallel form's
TINY = {"d_model": 8, "n_layers": 1, "d_state": 8, "l_max": 64, "clip_length": 64}


@dataclass
class Case:
    """One line of the table."""

    what: str
    job: Callable[[], object]  # what is timed
    audio: float | None = None  # seconds of audio that it makes
    error: Callable[[], float] | None = None  # largest error of its logits


class NotHere(Exception):
    """Why a line cannot be measured on this machine."""


# ---- the rows: (settings, one of the row's parts) -> a case -------------------------------------


def _generation(cfg: BenchmarkConfig, n: int) -> Case:
    model = _autoregressive(cfg)
    kind = "float32" if isinstance(model, SashimiAR) else "plain"
    kind = "graph" if model.device.type == "cuda" else kind
    return _walk(model, f"generation: {_clips(n)}", n, kind)


def _bfloat16(cfg: BenchmarkConfig, n: int) -> Case:
    return _walk(_autoregressive(cfg), f"generation, bf16 weights: {_clips(n)}", n, "bfloat16")


def _plain(cfg: BenchmarkConfig, n: int) -> Case:
    """The reference, step by step in Python: as many steps as do not bore."""
    model = _autoregressive(cfg)
    steps = min(200, model.config.clip_length)
    runner = Plain(model, n)

    def job() -> None:
        runner.run(_silence(model, n), torch.rand(steps, n).to(model.device))

    return Case(f"plain recurrence: {_clips(n)}", job, n * steps / model.sample_rate)


def _guidance(cfg: BenchmarkConfig, n: int) -> Case:
    labels = [str(i) for i in range(10)]
    model = _autoregressive(cfg, conditions={"label": labels}, condition_counts={"label": [1] * 10})
    what = f"generation, told a label, guidance 2: {_clips(n)}"
    return Case(what, lambda: model.generate(n, guidance=2.0), _audio(model, n))


def _first_chunk(cfg: BenchmarkConfig, _: int) -> Case:
    model = _autoregressive(cfg)
    return Case("first 20 ms of a stream", lambda: next(model.stream(1)))


def _digits(cfg: BenchmarkConfig, n: int) -> Case:
    if cfg.tiny:
        model = _autoregressive(cfg)
    else:
        model = load_named("sashimi_ar_digits", device=cfg.device)
    what = f"sashimi_ar_digits: unconditional_generate({n})"
    return Case(what, lambda: model.unconditional_generate(n), _audio(model, n))


def _diffusion(cfg: BenchmarkConfig, size: str) -> Case:
    config = DiffusionConfig(**TINY) if cfg.tiny else DiffusionConfig(**CONFIGS[size])
    model = SashimiDiffWave(config).to(cfg.device).eval()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    what = f"diffusion, 20 steps, {size} ({millions:.1f}M): {_clips(1)}"
    return Case(what, lambda: model.generate(1, steps=20), _audio(model, 1))


def _training(cfg: BenchmarkConfig, length: int) -> Case:
    model = _autoregressive(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    length = -(-length // 1000) if cfg.tiny else length
    q = torch.randint(N_CLASSES, (1, length), device=model.device)

    def job() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(shift(q)).transpose(1, 2), q).backward()
        optimizer.step()

    return Case(f"optimizer step, one clip of {length:,} samples", job)


# name: (its case, its parts)
ROWS: dict[str, tuple[Callable[..., Case], Callable[[BenchmarkConfig], list]]] = {
    "generation": (_generation, lambda cfg: cfg.clips),
    "bfloat16": (_bfloat16, lambda cfg: cfg.clips),
    "plain": (_plain, lambda cfg: cfg.clips),
    "guidance": (_guidance, lambda cfg: cfg.clips),
    "first_chunk": (_first_chunk, lambda cfg: [1]),
    "digits": (_digits, lambda cfg: [4]),
    "diffusion": (_diffusion, lambda cfg: ["large", "small"]),
    "training": (_training, lambda cfg: cfg.lengths),
}


def _autoregressive(cfg: BenchmarkConfig, **conditions) -> Autoregressive:
    if cfg.checkpoint and not conditions:
        model = load_model(cfg.checkpoint, cfg.device, key="checkpoint")
        if not isinstance(model, Autoregressive):
            raise UserError(f"checkpoint={cfg.checkpoint}: {model.KIND} model, not autoregressive")
        return model
    settings = (TINY if cfg.tiny else {}) | conditions
    return SashimiAR(AutoregressiveConfig(**settings)).to(cfg.device).eval()


RUNNERS = {"graph": Graph, "plain": Plain}


def _walk(model: Autoregressive, what: str, n: int, kind: str) -> Case:
    """Whole clips by one of `RUNNERS`, or by the engine with weights of that precision."""
    if kind not in RUNNERS:
        own = isinstance(model, SashimiAR)
        served, why = Engine.available(model) if own else (False, "it serves SashimiAR alone")
        if not served:
            raise NotHere(why)
    precision = "float32" if kind in RUNNERS else kind
    return Case(what, lambda: model.generate(n, precision=precision), _audio(model, n),
                lambda: _error(model, kind, n))  # fmt: skip


def _error(model: Autoregressive, kind: str, n: int) -> float:
    """Largest difference of logits from the parallel pass over the classes that were drawn."""
    runner = RUNNERS[kind](model, n) if kind in RUNNERS else Engine(model, n, kind)
    q, uniforms = _silence(model, n), torch.rand(CHECKED, n).to(model.device)
    logits = torch.empty(n, CHECKED, N_CLASSES, device=model.device)
    classes = runner.run(q, uniforms, logits_out=logits)
    with torch.no_grad():
        return (model(shift(classes)) - logits).abs().max().item()


def _silence(model: Autoregressive, n: int) -> Tensor:
    return torch.full((n,), SILENCE, device=model.device)


def _audio(model: Model, n: int) -> float:
    return n * model.config.clip_length / model.sample_rate


def _clips(n: int) -> str:
    return f"{n} clip" + "s" * (n > 1)


# ---- measuring ----------------------------------------------------------------------------------


def timings(job: Callable[[], object], seconds: float, device: str = "cpu") -> tuple[float, float]:
    """Seconds of the first call and the median of the calls after it, which last `seconds` in all,
    and of which there is one at least."""

    def timed() -> float:
        start = time.perf_counter()
        job()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first, again = timed(), []
    while sum(again) < seconds:
        again.append(timed())
    return first, statistics.median(again)


def measure(cfg: BenchmarkConfig, name: str, part: int | str) -> dict[str, float | str]:
    """One line of the table; for a process of its own, whose peak memory it is."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    case = ROWS[name][0](cfg, part)
    first, again = timings(case.job, cfg.seconds, cfg.device)
    row = {"what": case.what, "first": first, "again": again}
    row["mib"] = peak_bytes(cfg.device) / 2**20
    if case.audio is not None:
        row["audio"] = case.audio / again
    if case.error is not None:
        row["error"] = case.error()
    return row


def _measured(*arguments) -> dict[str, float | str] | str:
    """`measure`, or why there is nothing to measure."""
    try:
        return measure(*arguments)
    except NotHere as why:
        return str(why)


def table_line(row: dict[str, float | str]) -> str:
    """A row as it stands in the table."""

    def number(key: str, text: str) -> str:
        return text.format(row[key]) if key in row else ""

    cells = [row["what"], number("first", "{:.3g} s"), number("again", "{:.3g} s")]
    cells += [number("audio", "{:.2g} x"), number("mib", "{:,.0f} MiB")]
    return "| " + " | ".join([*cells, number("error", "{:.0e}")]) + " |"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse(argv)
    return command.run(lambda: run(cfg))


def run(cfg: BenchmarkConfig) -> None:
    """Prints the table, line by line."""
    device = usable_device(cfg.device)
    _autoregressive(cfg)  # refused here, before anything is measured
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = cfg.threads or torch.get_num_threads()
    print(f"{name}, {threads} threads of {os.cpu_count()} cores, PyTorch {torch.__version__}\n")
    print("| what | first | again | real time | memory | logits off by |")
    print("| --- | --: | --: | --: | --: | --: |")
    context = multiprocessing.get_context("spawn")
    for name in cfg.rows:
        for part in ROWS[name][1](cfg):
            with context.Pool(1) as pool:
                row = pool.apply(_measured, (cfg, name, part))
            if isinstance(row, str):
                print(f"| {name}: not here, {row} | | | | | |", flush=True)
            else:
                print(table_line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
