"""Speed and memory of generation, as a table and a plot.

    python -m sashimi.benchmark                              # the 4.8M-parameter model, 16 kHz
    python -m sashimi.benchmark model=sashimi_ar_digits
    python -m sashimi.benchmark checkpoint=best.safetensors batches=[1,64] seconds=10

Every row is a process of its own. The real-time factor counts seconds of audio, all clips
together, per second; weights do not matter for it, so the default model is untrained.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .autoregressive import SashimiAR
from .checkpoint import ENTRIES, load_named
from .config import parse_args, setting
from .diffusion import CONFIGS, DEFAULT_STEPS, SashimiDiffWave, named_config
from .mulaw import N_CLASSES, SILENCE
from .realtime import Engine
from .sampling import Graph, Plain

EXAMPLES = "\n".join(line[4:] for line in __doc__.splitlines() if line.startswith("    "))
CHECKED = 256  # steps over which the logits are compared with the plain recurrence's


@dataclass
class BenchmarkConfig:
    model: str = setting("sashimi_ar_sc09", "name of a hub entry: " + ", ".join(ENTRIES))
    checkpoint: str | None = setting(None, "weights to load; none: fresh ones")
    config: str | None = setting(
        None, f"size of a fresh diffusion model: {', '.join(CONFIGS)}; none: the entry's"
    )
    batches: list[int] = setting([1, 4, 16], "clips at once")
    threads: list[int] | None = setting(None, "threads; none: 1 and the number of cores")
    seconds: float = setting(4.0, "how long each engine row is timed, at least")
    plain_steps: int = setting(300, "steps over which the plain recurrence is timed")
    device: str = setting("cpu", "cpu or cuda")
    out: str = setting("benchmark.png", "the plot")

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or min(self.threads or [1]) < 1:
            raise ValueError("batches and threads must be lists of numbers from 1")
        if self.seconds <= 0 or self.plain_steps < 1:
            raise ValueError("seconds and plain_steps must be above 0")


def measure(cfg: BenchmarkConfig, kind: str, n: int, threads: int) -> dict:
    """One row. kind: plain, graph (a GPU's), float32 or bfloat16 (the engine's weights)."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = _load(cfg)
    before = _resident()
    if kind == "diffusion":
        return _measure_passes(cfg, model, n, threads) | {"mib": (_peak() - before) / 2**20}
    q = torch.full((n,), SILENCE, device=model.device)
    count = cfg.plain_steps if kind == "plain" else 256
    if kind == "plain":
        os.environ["SASHIMI_ENGINE"] = "off"  # for the first chunk, too
    steps = _runner(model, kind, n, threads)
    steps.run(q, torch.rand(32, n).to(q.device))  # warm-up
    passed = 0.0
    while passed < (cfg.seconds if kind != "plain" else 0) or not passed:
        uniforms = torch.rand(count, n).to(q.device)
        start = time.perf_counter()
        steps.run(q, uniforms)
        if q.is_cuda:
            torch.cuda.synchronize()
        passed = time.perf_counter() - start
        rate = count * n / passed
        count = max(2 * count, int(1.1 * cfg.seconds / passed * count))
    row = {"kind": kind, "n": n, "threads": threads, "rate": rate, "sample_rate": model.sample_rate}
    row["mib"] = (_peak() - before) / 2**20
    generated = "graph" if q.is_cuda else kind  # what `stream` takes here, in float32
    if kind == generated != "bfloat16" and n == 1:
        next(model.stream(1))
        start = time.perf_counter()
        next(model.stream(1))
        row["first_chunk"] = time.perf_counter() - start
    if kind != "plain":
        row["error"] = _error(model, kind, n, threads)
    return row


def _load(cfg: BenchmarkConfig) -> SashimiAR | SashimiDiffWave:
    size = named_config(cfg.config) if cfg.config else None
    return load_named(cfg.model, False, device=cfg.device, checkpoint=cfg.checkpoint, config=size)


@torch.no_grad()
def _measure_passes(
    cfg: BenchmarkConfig, model: SashimiDiffWave, n: int, threads: int
) -> dict[str, float | str]:
    """The rate of clips of 20 passes each; the kernels are computed once, before."""
    c = model.config
    x, t = torch.randn(n, c.clip_length).to(model.device), torch.full((n,), 100.0)
    mel = None if c.unconditional else model.log_mel(x)
    model(x, t, mel)
    passes, start = 0, time.perf_counter()
    while passes < 1 or time.perf_counter() - start < cfg.seconds:
        model(x, t, mel)
        passes += 1
        if x.is_cuda:
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / passes
    rate = n * c.clip_length / (DEFAULT_STEPS["dpm_solver_pp_2m"] * seconds)
    row = {"kind": "diffusion", "n": n, "threads": threads, "seconds": seconds}
    return row | {"rate": rate, "sample_rate": model.sample_rate}


def _runner(model: SashimiAR, kind: str, n: int, threads: int) -> Plain | Graph | Engine:
    if kind in ("plain", "graph"):
        return {"plain": Plain, "graph": Graph}[kind](model, n)
    return Engine(model, n, kind, threads)


def _error(model: SashimiAR, kind: str, n: int, threads: int) -> float:
    """Largest difference of logits from the parallel pass over the classes that were drawn."""
    q = torch.full((n,), SILENCE, device=model.device)
    uniforms = torch.rand(CHECKED, n).to(q.device)
    logits = torch.empty(n, CHECKED, N_CLASSES, device=q.device)
    classes = _runner(model, kind, n, threads).run(q, uniforms, logits_out=logits)
    inputs = torch.cat([q[:, None], classes[:, :-1]], 1)
    with torch.no_grad():
        return (model(inputs) - logits).abs().max().item()


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot(rows: list[dict], path: str) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, threads in dict.fromkeys((row["kind"], row["threads"]) for row in rows):
        line = [row for row in rows if (row["kind"], row["threads"]) == (kind, threads)]
        axes.plot(
            [row["n"] for row in line],
            [row["rate"] / row["sample_rate"] for row in line],
            marker="o", label=f"{_NAMES[kind]}, {threads} thread{'s' * (threads > 1)}",
        )  # fmt: skip
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="clips at once")
    axes.set_ylabel("seconds of audio per second, all clips together")
    batches = sorted({row["n"] for row in rows})
    axes.set_xticks(batches, [str(n) for n in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


_NAMES = {
    "plain": "plain recurrence",
    "graph": "CUDA graph",
    "float32": "engine",
    "bfloat16": "engine, bf16 weights",
    "diffusion": "diffusion, 20 steps",
}


def main(argv: list[str] | None = None) -> None:
    cfg = parse_args(BenchmarkConfig, argv, prog="python -m sashimi.benchmark", examples=EXAMPLES)
    try:
        model = _load(cfg)
        diffusion = isinstance(model, SashimiDiffWave)
        engine, why = (False, "not for diffusion") if diffusion else Engine.available(model)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f}M parameters, {model.sample_rate:,} Hz, {model.device}; engine: {why}")
    print(
        "weights         clips  threads  samples/s  real time  first chunk  memory   logits off by"
    )
    kinds = ["plain"] + ["float32", "bfloat16"] * engine
    if model.device.type == "cuda":
        kinds.append("graph")
    kinds = ["diffusion"] if diffusion else kinds
    counts = cfg.threads or sorted({1, os.cpu_count() or 1})
    rows = []
    context = multiprocessing.get_context("spawn")  # a clean process, with threads of its own
    for kind in kinds:
        for threads in counts:
            for n in cfg.batches:
                with context.Pool(1) as pool:
                    row = pool.apply(measure, (cfg, kind, n, threads))
                rows.append(row)
                first = f"{1000 * row['first_chunk']:.0f} ms" if "first_chunk" in row else ""
                error = f"{row['error']:.1e}" if "error" in row else ""
                error = f"a pass: {row['seconds']:.2f} s" if "seconds" in row else error
                print(
                    f"{_NAMES[kind]:20} {n:4}  {threads:7}  {row['rate']:9,.0f}  "
                    f"{row['rate'] / row['sample_rate']:8.2f}x  {first:>11}  "
                    f"{row['mib']:4.0f} MiB  {error:>8}",
                    flush=True,
                )
    plot(rows, cfg.out)
    print(f"plot: {cfg.out}")


if __name__ == "__main__":
    main()
