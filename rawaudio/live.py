"""A page in which a model speaks: weights, engine and script in one HTML file, no server.

The compiled step engine (sashimi/realtime.cpp) becomes a WebAssembly module; the page runs it in a
worker and plays what it makes while it is made. A link to the page holds seed and settings, and

    clip(model, seed=7, label="seven", speaker="theo")

is that clip, to the bit: the same source, compiled for this machine, draws the same uniforms,
`seeds.uniforms`. (`generate` adds up in wider vectors; of 200 clips of a second, two come out
otherwise for that.)
"""

import base64
import ctypes
import functools
import gzip
import html
import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cauchy_kernel import build
from rawaudio import command
from rawaudio.arguments import integer
from rawaudio.autoregressive import Autoregressive
from rawaudio.config import check_allowed, parse_args, setting
from rawaudio.errors import UserError
from rawaudio.files import write_text
from rawaudio.hub import load_asked
from rawaudio.model import Model, in_eval
from rawaudio.page import html_page
from rawaudio.sampling import Plain, Walk
from rawaudio.seeds import seeded, uniforms
from sashimi import realtime
from sashimi.backbone import Sashimi
from sashimi.mulaw import N_CLASSES, SILENCE

EXAMPLES = """\
python -m rawaudio.live model=sashimi_ar_digits out=live.html
python -m rawaudio.live checkpoint=runs/run1/best.safetensors out=mine.html"""

ENGINE = Path(realtime.__file__).with_name("live.cpp")
LANES = 4  # floats in a vector of WebAssembly
FLAGS = ["-target", "wasm32-wasi", "-mexec-model=reactor", "-msimd128", "-O3", "-std=c++17",
         "-fno-exceptions", "-s"]  # fmt: skip
BODY, STYLE, SCRIPT, WORKER = (
    Path(__file__).with_name(f"live.{kind}").read_text()
    for kind in ("html", "css", "js", "worker.js")
)
MARK = '<main class="live">'  # of a page of this command, which it may replace
MAX_SEED = 2**32 - 1


@dataclass
class LiveConfig:
    model: str = setting("sashimi_ar_digits", "a model of the hub with the compiled step engine")
    checkpoint: str | None = setting(None, "weights file to use instead, any known format")
    out: str = setting("live.html", "the page")
    precision: str = setting(
        "float16",
        "of the matrices: half the size and nearly as exact, or float32",
        "float16|float32",
    )

    def __post_init__(self) -> None:
        check_allowed(self)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(LiveConfig, argv, prog="python -m rawaudio.live", examples=EXAMPLES)

    def body() -> None:
        out = Path(cfg.out)
        if out.is_file() and MARK not in out.read_text("utf-8", errors="replace"):
            raise UserError(f"out={out}: another file is there; give a new name, or delete it")
        name = cfg.model if cfg.checkpoint is None else Path(cfg.checkpoint).stem
        text = page(load_asked(cfg.model, cfg.checkpoint, "cpu"), name, cfg.precision)
        write_text(out, text)
        print(f"{out}: {len(text.encode()) / 1e6:.1f} MB; open it in a browser")

    return command.run(body)


@torch.no_grad()
def clip(
    model: Autoregressive,
    seed: int,
    length: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    nucleus_p: float | None = None,
    guidance: float | None = None,
    precision: str = "float16",
    **told: Any,
) -> Tensor:
    """The clip that the page makes of these settings, float (length,) in [-1, 1].

    seed: 0 to 2^32 - 1. precision: of the page's matrices. The others as in `generate`; what is not
    told is drawn with the seed (the page tells everything). Without a C++ compiler the plain
    recurrence makes it, with other rounding. Raises ValueError for an argument outside its range.
    """
    seed = integer("seed", seed, 0, MAX_SEED)
    if not isinstance(model, Autoregressive):
        raise UserError(f"{model.KIND} model: clips of a page are those of autoregressive models")
    length = model.config.clip_length if length is None else length
    length = integer("length", length, most=2**31 - 1)
    rng = seeded("conditions of a live clip", seed)
    walk = Walk(model, 1, None, temperature, top_k, nucleus_p, precision, guidance, rng, told)
    sampling = walk.temperature, walk.top_k, walk.nucleus_p
    with in_eval(model):
        if _is_served(model) and (library := _library()) is not None:
            q = _made(library, model, seed, length, walk)
        else:
            runner = Plain(model, 1, walk.rows, walk.guidance)
            silence = torch.full((1,), SILENCE, device=model.device)
            drawn = uniforms(seed, length)[:, None].to(model.device)
            q = runner.run(silence, drawn, *sampling)[0]
    return model.quantizer.decode(q, check=False)


def _made(
    library: ctypes.CDLL, model: Autoregressive, seed: int, length: int, walk: Walk
) -> Tensor:
    """Classes (length,) of the clip, made by live.cpp as the page's worker does."""
    plan, weights, told = realtime.packed_for(model, walk.precision, LANES)
    firsts = [0, *itertools.accumulate(1 + len(v) for v in model.conditions.values())]
    clips = [walk.rows] if walk.guidance == 1 else [walk.rows, model.untold(walk.rows)]
    rows = [[a + i for a, i in zip(firsts, of[0].tolist(), strict=False)] for of in clips]
    constants = (
        torch.stack([sum(told[i] for i in of_clip) for of_clip in rows]) if told.numel() else told
    )
    plan, out = torch.tensor(plan), torch.empty(length, dtype=torch.uint8)
    clip = library.live_start(
        plan.data_ptr(), weights.data_ptr(), constants.data_ptr(), len(rows), seed,
        walk.guidance, walk.temperature, walk.top_k or N_CLASSES, walk.nucleus_p,
    )  # fmt: skip
    library.live_more(clip, length, out.data_ptr())
    library.live_end(clip)
    return out


def _is_served(model: Model) -> bool:
    """Whether the step engine can run it."""
    is_sashimi = isinstance(model, Autoregressive) and hasattr(model, "backbone")
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    is_sashimi = is_sashimi and isinstance(model.backbone, Sashimi)
    return is_sashimi and on_cpu and model.backbone.scalar_norm == "none"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """live.cpp for this machine; None where it cannot be compiled."""
    try:
        library = ctypes.CDLL(str(build.cached_library(ENGINE, "-ffp-contract=off")))
    except (build.BuildError, OSError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_float
    library.live_start.restype = pointer
    library.live_start.argtypes = [
        *[pointer] * 3, ctypes.c_int32, ctypes.c_double, number, number, ctypes.c_int32, number,
    ]  # fmt: skip
    library.live_more.argtypes = [pointer, ctypes.c_int32, pointer]
    library.live_end.argtypes = [pointer]
    return library


# ---- the page ---------------------------------------------------------------------------------


def page(model: Model, name: str, precision: str = "float16") -> str:
    """The HTML of a model's page; UserError where there is no engine for it, or no compiler."""
    if not _is_served(model):
        serves = "it serves autoregressive SaShiMi alone, without scalar_norm"
        raise UserError(f"{name}: the page's audio comes from the compiled step engine, {serves}")
    plan, weights, told = realtime.packed_for(model, precision, LANES)
    facts = {
        "name": name,
        "rate": model.sample_rate,
        **{k: getattr(model.config, k) for k in ("temperature", "nucleus_p", "guidance")},
        "length": min(model.config.clip_length, 480_000),  # as live.html has it
        "guided": model.config.guided or list(model.conditions),
        "conditions": [[k, v, model.told.counts[k]] for k, v in model.conditions.items()],
        "plan": plan,
        "python": "" if precision == "float16" else f', precision="{precision}"',
        "levels": model.quantizer.decode(torch.arange(N_CLASSES)).tolist(),
        "colours": _colours(),
    }
    packed = {"wasm": module().read_bytes()}
    packed |= {k: x.numpy().tobytes() for k, x in (("weights", weights), ("told", told))}
    scripts = {k: base64.b64encode(gzip.compress(x, 9)).decode() for k, x in packed.items()}
    scripts |= {"facts": json.dumps(facts).replace("<", r"\u003c"), "worker": WORKER}
    numbers = sum(p.numel() for p in model.parameters()) / 1e6
    note = (
        f"SaShiMi, a state-space model of {numbers:.1f} million parameters, computes each of the "
        f"{model.sample_rate:,} samples of a second in your browser while you listen. Nothing is "
        "fetched and nothing is sent."
    )
    parts = [f'<p class="note">{html.escape(note)}</p>\n', BODY]
    for key, text in scripts.items():
        parts.append(f'<script type="text/plain" id="{key}">{text}</script>\n')
    return html_page(f"{name}, live", *parts, f"<script>\n{SCRIPT}</script>", style=STYLE)


def module() -> Path:
    """The WebAssembly module, compiled on first use (a minute, with its C++ library) and kept."""
    if importlib.util.find_spec("ziglang") is None:
        wanted = "pip install ziglang, or this package's extra [live]"
        raise UserError(f"a page needs a compiler for WebAssembly: {wanted}")
    compiler = [sys.executable, "-m", "ziglang", "c++", *FLAGS, str(ENGINE)]

    def compile_to(output: Path) -> None:
        done = subprocess.run([*compiler, "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise build.BuildError(f"ziglang failed: {reason}")

    try:
        return build.cached(ENGINE, [*FLAGS, version("ziglang")], ".wasm", compile_to)
    except build.BuildError as error:
        raise UserError(str(error)) from None


def _colours() -> str:
    """Matplotlib's magma, 256 times RRGGBB: spectrograms look like those of `page`."""
    import matplotlib  # slow

    colours = matplotlib.colormaps["magma"](range(256), bytes=True)[:, :3]
    return colours.tobytes().hex()


if __name__ == "__main__":
    sys.exit(main())
