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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cauchy_kernel.benchmark import peak_bytes
from rawaudio import benchmark_runs as runs
from rawaudio import command
from rawaudio.benchmark_runs import table_line
from rawaudio.config import check_name, from_dict, parse_args, setting, settings_of, usable_device
from rawaudio.errors import UserError
from rawaudio.families import FAMILIES, MODELS, family_of
from rawaudio.family import Family
from rawaudio.hub import load_asked, load_named
from rawaudio.model import Model
from rawaudio.progress import watched
from rawaudio.samplers import DEFAULT_STEPS
from rawaudio.sampling import Plain, runner_of, shift
from sashimi import mulaw

EXAMPLES = """\
python -m rawaudio.benchmark                              # minutes, on the CPU
python -m rawaudio.benchmark device=cuda
python -m rawaudio.benchmark rows=[generation,first_chunk] clips=[1,4,64] threads=1 seconds=10
python -m rawaudio.benchmark rows=[generation,float16] checkpoint=best.safetensors
python -m rawaudio.benchmark rows=[generation,training] model=wavenet
python -m rawaudio.benchmark models=all                   # one table of all families; minutes
python -m rawaudio.benchmark models=[wavenet,samplernn_digits]
python -m rawaudio.benchmark out=today.json               # kept, and drawn as today.webp
python -m rawaudio.benchmark compare=today.json           # that run beside this one
python -m rawaudio.benchmark tiny=true                    # toy models: does it run here?"""

NAMES = ["cold_start", "generation", "float16", "plain", "guidance", "first_chunk", "digits",
         "diffusion", "training", "digits_training"]  # fmt: skip

SIZES = ("published", "digits")  # of one model of each family


@dataclass
class BenchmarkConfig:
    rows: list[str] = setting(NAMES, "what to measure")
    model: str = setting("autoregressive", f"untrained: {', '.join(MODELS)}")
    checkpoint: str | None = setting(None, "weights to measure instead")
    models: list[str] = setting([], "models to compare in one table, or all: one of each family")
    size: str = setting("published", "of models=all: published, or digits: about 1.5M parameters")
    clips: list[int] = setting([1, 16], "clips at once, in rows of generation")
    lengths: list[int] = setting([4000, 16000, 64000], "samples of the clip in rows of training")
    threads: int | None = setting(None, "of PyTorch; none: its own choice")
    seconds: float = setting(1.0, "how long each line is repeated, at least")
    device: str = setting("cpu", "cpu or cuda")
    tiny: bool = setting(False, "toy models and lengths, to try the command")
    out: str | None = setting(None, "file for the figures, .json; a picture of them beside it")
    compare: str | None = setting(None, "such a file of an earlier run, to put beside this one")

    def __post_init__(self) -> None:
        for name in self.rows:
            check_name("row", name, NAMES)
        check_name("size", self.size, SIZES)
        if self.models == ["all"]:
            self.models = [sized(family, self.size) for family in FAMILIES.values()]
        for name in (self.model, *self.models):
            check_name("model", name, MODELS)
        for name in ("clips", "lengths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UserError(f"{name}: must be a list of numbers from 1")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads}: must be at least 1")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"seconds={self.seconds}: must be above 0")
        if self.models and (self.out or self.compare):
            raise UserError("out= and compare= are for rows=, not for models=")
        if self.out and Path(self.out).suffix != ".json":
            raise UserError(f"out={self.out}: must end in .json")
        for path in [Path(self.out), Path(self.out).with_suffix(".webp")] if self.out else []:
            if path.exists():
                raise UserError(f"out={self.out}: {path} is there already; give a new name")


SHIPPED_DIFFUSION = "sashimi_diffwave_digits"
CHECKED = 256  # steps over which the logits are compared with the parallel form's
TINY = {
    "d_model": 8, "n_layers": 1, "d_state": 8, "l_max": 64, "clip_length": 64, "layers": 2,
    "blocks": 1, "residual_channels": 8, "skip_channels": 8, "end_channels": 8,
}  # fmt: skip


def sized(family: Family, size: str) -> str:
    """The name in `MODELS` of the family's model of that size."""
    names = [name for name in family.models if name.endswith("_digits") == (size == "digits")]
    return names[0]


@dataclass
class Case:
    """One line of the table."""

    what: str
    job: Callable[[], object]  # what is timed
    audio: float | None = None  # seconds of audio that it makes
    error: Callable[[], float] | None = None  # largest error of its logits


# ---- the rows: (settings, one of the row's parts) -> a case -------------------------------------


def _generation(cfg: BenchmarkConfig, n: int, precision: str = "float32") -> Case:
    model, options, error = network(cfg), {}, None
    what = f"generation{', float16 weights' if precision == 'float16' else ''}: {_clips(n)}"
    if precision != "float32" or hasattr(model, "engine"):
        runner_of(_with(model, "engine"), n, precision)  # UserError where there is none
        options, error = {"precision": precision}, lambda: _error(model, n, precision)
    return Case(what, lambda: model.generate(n, **options), _audio(model, n), error)


def _plain(cfg: BenchmarkConfig, n: int) -> Case:
    """The reference, step by step in Python: as many steps as do not bore."""
    model = _with(network(cfg), "engine")
    steps = min(200, model.config.clip_length)
    runner = Plain(model, n)

    def job() -> None:
        runner.run(_silence(model, n), torch.rand(steps, n).to(model.device))

    return Case(f"plain recurrence: {_clips(n)}", job, n * steps / model.sample_rate)


def _guidance(cfg: BenchmarkConfig, n: int) -> Case:
    labels = {"label": [str(i) for i in range(10)]}
    told = {"conditions": labels, "condition_counts": {"label": [1] * 10}}
    model = network(cfg, **({} if cfg.checkpoint else told))
    model.checked_guidance(2.0)
    what = f"generation, told a label, guidance 2: {_clips(n)}"
    return Case(what, lambda: model.generate(n, guidance=2.0), _audio(model, n))


def _first_chunk(cfg: BenchmarkConfig, _: int) -> Case:
    model = _with(network(cfg), "stream")
    return Case("first 20 ms of a stream", lambda: next(model.stream(1)))


def _digits(cfg: BenchmarkConfig, n: int) -> Case:
    model = network(cfg) if cfg.tiny else load_named("sashimi_ar_digits", device=cfg.device)
    what = f"sashimi_ar_digits: unconditional_generate({n})"
    return Case(what, lambda: model.unconditional_generate(n), _audio(model, n))


COLD = """
from rawaudio.hub import load_named
next(load_named({!r}, device={!r}).stream(1))
"""


def _cold_start(cfg: BenchmarkConfig, name: str) -> Case:
    """A new Python, the first time with nothing in the computer's file cache, maybe."""
    command = [sys.executable, "-c", COLD.format(name, cfg.device)]
    return Case(f"python to the first 20 ms: {name}", lambda: subprocess.run(command, check=True))


def _diffusion(cfg: BenchmarkConfig, name: str) -> Case:
    if name == SHIPPED_DIFFUSION:
        model, n = network(cfg, "diffwave") if cfg.tiny else load_named(name, device=cfg.device), 16
        what = f"diffusion, 20 steps, {name}: {_clips(n)}"
        return Case(what, lambda: model.generate(n, steps=20), _audio(model, n))
    model = network(cfg, name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    what = f"diffusion, 20 steps, {name} ({millions:.1f}M): {_clips(1)}"
    return Case(what, lambda: model.generate(1, steps=20), _audio(model, 1))


def _training(cfg: BenchmarkConfig, length: int) -> Case:
    length = -(-length // 1000) if cfg.tiny else length
    job = _optimizer_step(network(cfg), length)
    return Case(f"optimizer step, one clip of {length:,} samples", job)


def _digits_training(cfg: BenchmarkConfig, precision: str) -> Case:
    """The step of an autoregressive model that is told what is said and by whom."""
    told = {"label": [str(i) for i in range(10)], "speaker": list("abcdef")}
    shares = {name: [1] * len(values) for name, values in told.items()}
    model = network(cfg, "autoregressive_digits", conditions=told, condition_counts=shares)
    length = 60 if cfg.tiny else 6000
    what = f"optimizer step, digits, 8 clips of {length:,} samples, {precision}"
    return Case(what, _optimizer_step(model, length, 8, precision == "bfloat16"))


def _optimizer_step(
    model: Model, length: int, n: int = 1, half: bool = False
) -> Callable[[], None]:
    """A step of every network that the model's task trains, on n clips; half: in bfloat16."""
    task, rng = family_of(model).task(model.config, length), torch.Generator()
    networks = task.networks(model.train())
    optimizers = {name: torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
                  for name, network in networks.items()}  # fmt: skip
    wav = torch.rand(n, length) - 0.5
    q = mulaw.encode(wav)
    batch = {"wav": model.heard(wav) if hasattr(model, "heard") else wav, "x": shift(q),
             "target": q, "mask": torch.ones(n, length, dtype=bool),
             "index": torch.zeros(n)}  # fmt: skip
    if model.conditions:
        batch["told"] = torch.ones(n, len(model.conditions), dtype=int)

    def job() -> None:
        for name, trained in networks.items():
            optimizers[name].zero_grad()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
                loss = task.loss(trained, batch, (0, n), lambda: rng)
            loss.backward()
            optimizers[name].step()
            task.updated(name, model.device)

    return job


# name: (its case, its parts)
ROWS: dict[str, tuple[Callable[..., Case], Callable[[BenchmarkConfig], list]]] = {
    "cold_start": (_cold_start, lambda cfg: ["sashimi_ar_digits"]),
    "generation": (_generation, lambda cfg: cfg.clips),
    "float16": (partial(_generation, precision="float16"), lambda cfg: cfg.clips),
    "plain": (_plain, lambda cfg: cfg.clips),
    "guidance": (_guidance, lambda cfg: cfg.clips),
    "first_chunk": (_first_chunk, lambda cfg: [1]),
    "digits": (_digits, lambda cfg: [4, 64]),
    "diffusion": (_diffusion, lambda cfg: ["diffwave", "diffwave_small", SHIPPED_DIFFUSION]),
    "training": (_training, lambda cfg: cfg.lengths),
    "digits_training": (_digits_training, lambda cfg: ["float32", "bfloat16"]),
}


def network(cfg: BenchmarkConfig, name: str | None = None, **settings: Any) -> Model:
    """The model of the checkpoint; untrained where there is none, or one of that name (`MODELS`) or
    with such settings is asked for."""
    if cfg.checkpoint and not name and not settings:
        return load_asked(cfg.model, cfg.checkpoint, cfg.device)
    family, own = MODELS[name or cfg.model]
    known = settings_of(family.config) if cfg.tiny else []
    small = {key: value for key, value in TINY.items() if key in known}
    config = from_dict(family.config, own | small | settings)
    return family.module(config).to(cfg.device).eval()


def _with(model: Model, method: str) -> Model:
    """The same model; UserError for a kind of model without the method."""
    if not hasattr(model, method):
        raise UserError(f"{model.KIND} model has no {method}")
    return model


def _error(model: Any, n: int, precision: str) -> float:
    """Largest difference of logits from the parallel pass over the classes that were drawn."""
    runner = runner_of(model, n, precision)
    q, uniforms = _silence(model, n), torch.rand(CHECKED, n).to(model.device)
    logits = torch.empty(n, CHECKED, mulaw.N_CLASSES, device=model.device)
    classes = runner.run(q, uniforms, logits_out=logits)
    with torch.no_grad():
        return (model(shift(classes)) - logits).abs().max().item()


def _silence(model: Model, n: int) -> Tensor:
    return torch.full((n,), mulaw.SILENCE, device=model.device)


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
    except UserError as why:
        return str(why)


def compared(cfg: BenchmarkConfig, name: str) -> str:
    """A model's line in the table of `models=`; for a process of its own.

    Of generation as much is measured as shows its speed: a sixteenth of a clip sample by sample, or
    one pass of a diffusion model, of the default number, over an eighth of it.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = network(cfg, name)
    length, part, passes = model.config.clip_length, {}, 1
    if "steps" in model.SETTINGS:
        length, passes = max(1, length // 8), DEFAULT_STEPS["dpm_solver_pp_2m_sde"]
        part = {"steps": 1}
    elif hasattr(model, "stream"):
        length = max(1, length // 16)
    cells = [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"]
    for n in cfg.clips:
        job = partial(model.generate, n, length=length, **part)
        cells.append(f"{n * length / passes / timings(job, cfg.seconds, cfg.device)[1]:,.0f}")
    step = _optimizer_step(model, model.config.training_length)
    cells.append(f"{timings(step, cfg.seconds, cfg.device)[1]:.3g} s")
    return f"| {' | '.join(cells)} | {peak_bytes(cfg.device) / 2**20:,.0f} MiB |"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(BenchmarkConfig, argv, prog="python -m rawaudio.benchmark", examples=EXAMPLES)
    return command.run(lambda: run(cfg))


def run(cfg: BenchmarkConfig) -> None:
    """Prints the table, line by line."""
    device = usable_device(cfg.device)
    network(cfg)  # refused here, before anything is measured
    before = runs.load(cfg.compare) if cfg.compare else None
    where = runs.machine(device, cfg.threads or torch.get_num_threads())
    print(where + (f"; earlier: {before['machine']}" if before else "") + "\n")
    print_models(cfg) if cfg.models else print_rows(cfg, where, before)


def print_models(cfg: BenchmarkConfig) -> None:
    """The table of `models=`."""
    heads = [f"{_clips(n)} at once, samples/s" for n in cfg.clips]
    print(f"| model | parameters | {' | '.join(heads)} | optimizer step | memory |")
    print("| --- |" + " --: |" * (len(heads) + 3), flush=True)
    hidden = not sys.stdout.isatty()  # else the lines themselves show how far it is
    for model in watched(cfg.models, "benchmark", len(cfg.models), "models", show=hidden):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(compared, (cfg, model)), flush=True)


def print_rows(cfg: BenchmarkConfig, where: str, before: dict[str, Any] | None) -> None:
    """The table of `rows=`, beside an earlier run; kept and drawn where asked to."""
    heads = ["first", "again", "real time", "memory", "logits off by"]
    heads += ["again, earlier", "times as fast"] if before else []
    print("| " + " | ".join(["what", *heads]) + " |")
    print("| --- |" + " --: |" * len(heads))
    rows = []
    for name in cfg.rows:
        for part in ROWS[name][1](cfg):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(_measured, (cfg, name, part))
            if isinstance(row, str):
                print(f"| {name}: not here, {row} |" + " |" * len(heads), flush=True)
                continue
            print(table_line(row, before), flush=True)
            rows.append(row)
            if cfg.out:
                runs.save(Path(cfg.out), where, rows, before)


if __name__ == "__main__":
    sys.exit(main())
