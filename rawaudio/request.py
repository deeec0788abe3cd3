"""What `python -m rawaudio.generate` can be asked for, and what it refuses."""

import difflib
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rawaudio.arguments import integer
from rawaudio.conditions import check_guidance
from rawaudio.config import as_written, check_name, parse_args, setting, settings_of
from rawaudio.errors import UserError
from rawaudio.families import ENTRIES, FAMILIES
from rawaudio.hub import BEST_FIRST, shipped
from rawaudio.model import Model
from rawaudio.processes import world
from rawaudio.samplers import SAMPLERS
from rawaudio.sampling import PRECISIONS, check_sampling
from sashimi.mulaw import N_CLASSES

EXAMPLES = """\
python -m rawaudio.generate                               # four spoken digits, in generated/
python -m rawaudio.generate model=sashimi_ar_sc09 n_samples=64 nucleus_p=0.95
python -m rawaudio.generate checkpoint=runs/run1/best.safetensors out_dir=run1
python -m rawaudio.generate prefix=half.wav l_prefix=4000 n_reps=4
python -m rawaudio.generate play=wav length=80000 | aplay
python -m rawaudio.generate model=sashimi_diffwave_digits n_samples=8 steps=50
python -m rawaudio.generate checkpoint=vocoder.safetensors mel_from=speech.wav
python -m rawaudio.generate label=seven speaker=theo      # told, by names: model.conditions
python -m rawaudio.generate label=[one,two,three]         # one clip each
torchrun --nproc-per-node 4 -m rawaudio.generate n_samples=10240 n_batch=256"""

ELSEWHERE = ("device", "told", "data_root", "out_dir", "page", "play")  # the clips are the same

OWN = ("guidance", "temperature", "nucleus_p")  # a model has its own, if any


@dataclass
class GenerateConfig:
    # what speaks
    model: str | None = setting(
        None,
        f"a model of the hub: {', '.join(ENTRIES)}; none: the one that is understood best of those "
        "with the settings that are given",
    )
    checkpoint: str | None = setting(None, "weights file to use instead, any known format")
    device: str | None = setting(None, "cpu, cuda, ...; none: the GPU if there is one")

    # how much
    n_samples: int | None = setting(
        None,
        "clips; with prefix=, how many prefixes are continued at most; none: 4, or one for "
        "each value of a list",
    )
    n_batch: int = setting(16, "clips made at once; another n_batch gives other clips")
    length: int | None = setting(None, "samples per clip, prefix included; none: the model's own")

    seed: int = setting(0, "same seed, same settings: same clips")

    # models with conditions, which are told as label=seven or label=[one,two]
    guidance: float | None = setting(
        None, "push towards what is told, at least 0; 1: off; none: the model's own"
    )
    told: dict[str, list[str]] = setting({}, "conditions by name")

    # autoregressive models
    temperature: float | None = setting(
        None, "divides the logits, above 0; 1: as learned; none: the model's own"
    )
    top_k: int | None = setting(None, "sample among the k likeliest classes, 1..256")
    nucleus_p: float | None = setting(
        None, "sample among classes of this much probability, (0, 1]; none: the model's own"
    )
    precision: str = setting(
        "float32",
        "of the weights; float16: faster; auto: float16 if that is exact enough",
    )
    prefix: str | None = setting(None, "audio to continue: a file, a folder or a split CSV")

    # diffusion models
    steps: int | None = setting(None, "passes of the network, 1..T; none: what suits the sampler")
    sampler: str | None = setting(
        None, f"{', '.join(SAMPLERS)}; none: dpm_solver_pp_2m_sde, fast for vocoders"
    )
    mel_from: str | None = setting(
        None, "vocoders: audio whose mel spectrograms are spoken: a file, a folder or a split CSV"
    )

    # adversarial models of features
    vocoder: str | None = setting(
        None, "what makes them audible: griffin_lim, or weights of a HiFi-GAN or of our vocoders"
    )

    # prefix and mel_from
    data_root: str | None = setting(None, "folder that the paths of a split CSV start from")
    l_prefix: int | None = setting(None, "samples of each file, from its start; none: all")
    n_reps: int = setting(1, "clips per file")

    # where it goes
    out_dir: str | None = setting(
        None,
        "folder of the clips, the CSV and the page; none: generated, with the settings that "
        "differ, as in generated-seed-1",
    )
    page: bool = setting(True, "write the listening page")
    play: str | None = setting(
        None, "wav or raw (16-bit PCM): one clip to standard output, as it is made; no files"
    )

    @property
    def source(self) -> str | None:
        """Audio that clips are made from."""
        return self.prefix or self.mel_from

    @property
    def given(self) -> dict[str, str | list[str]]:
        """What is told, as models take it: a value for all clips, or a list of one for each."""
        return {k: values[0] if len(values) == 1 else values for k, values in self.told.items()}


def parse(argv: list[str] | None = None) -> GenerateConfig:
    """The settings. Ends the process, with one line, for those that cannot be followed."""
    told: dict[str, list[str]] = {}

    def complete(cfg: GenerateConfig) -> None:
        cfg.told = told
        check(cfg)

    return parse_args(
        GenerateConfig,
        argv,
        prog="python -m rawaudio.generate",
        examples=EXAMPLES,
        others=told,
        check=complete,
    )


def check(cfg: GenerateConfig) -> None:
    """Fills in what follows from other settings; UserError for one that no model could follow."""
    if cfg.out_dir is None:
        cfg.out_dir = default_folder(cfg)
    if cfg.n_samples is None:
        lists = [] if cfg.source else [v for v in cfg.given.values() if isinstance(v, list)]
        cfg.n_samples = len(lists[0]) if lists else 4
    for name in ("n_samples", "n_batch", "n_reps", "length", "l_prefix", "top_k"):
        if (value := getattr(cfg, name)) is not None:
            integer(name, value, most=N_CLASSES if name == "top_k" else math.inf)
    check_sampling(*(1.0 if x is None else x for x in (cfg.temperature, cfg.nucleus_p)))
    for name, known in (("precision", PRECISIONS), ("play", (None, "wav", "raw"))):
        if (value := getattr(cfg, name)) not in known:
            raise UserError(f"{name}={value}: must be {' or '.join(filter(None, known))}")
    if cfg.play and world() > 1:
        raise UserError(f"play={cfg.play} makes one clip, in one process: without torchrun")
    for name in ("l_prefix", "n_reps", "data_root"):
        value = getattr(cfg, name)
        if not cfg.source and value != getattr(GenerateConfig, name):
            raise UserError(f"{name}={value} needs prefix= or mel_from=")
    for name in ("prefix", "mel_from"):
        if (path := getattr(cfg, name)) is not None and not Path(path).exists():
            raise UserError(f"{name}={path} is not there")
    if cfg.prefix and cfg.mel_from:
        raise UserError("prefix= is for autoregressive models, mel_from= for vocoders: give one")
    if cfg.sampler is not None:
        check_name("sampler", cfg.sampler, SAMPLERS)
    if Path(cfg.out_dir).exists() and not Path(cfg.out_dir).is_dir():
        raise UserError(f"out_dir={cfg.out_dir} is not a folder")
    if cfg.checkpoint is None and cfg.model is None:
        cfg.model = min(BEST_FIRST, key=lambda name: len(strange(cfg, ENTRIES[name].module)))
    if cfg.checkpoint is None:
        if cfg.model not in ENTRIES and Path(cfg.model).exists():
            raise UserError(f"model={cfg.model} is a file: write checkpoint={cfg.model}")
        check_name("model", cfg.model, ENTRIES)
        if not shipped(cfg.model).exists():
            check_told(cfg, [])  # published weights: a slip of the fingers is no download


def default_folder(cfg: GenerateConfig) -> str:
    """A folder of its own for everything that decides which clips are made."""
    words, exact = ["generated"], ["generated"]
    for key, value in (vars(cfg) | cfg.told).items():
        if key in ELSEWHERE or value == getattr(GenerateConfig, key, None):
            continue
        text = as_written(value).strip("[]")
        words += [key] * (key != "model") + [Path(text).name]
        exact += [key] * (key != "model") + [text]
    name, exact = re.sub(r"[^\w.,-]+", "_", "-".join(words)), "-".join(exact)
    short = name.encode()[:200].decode(errors="ignore")  # of the 255 bytes that a name may have
    if short == exact:
        return name
    return f"{short}-{hashlib.sha256(exact.encode(errors='surrogateescape')).hexdigest()[:6]}"


def check_told(cfg: GenerateConfig, conditions: Iterable[str]) -> None:
    """UserError for what is told by a name that no condition of the model has."""
    for name, value in cfg.given.items():
        if name not in conditions:
            near = difflib.get_close_matches(name, [*conditions, *settings_of(GenerateConfig)], n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
            told = f"this model can be told {', '.join(conditions) or 'nothing'}"
            raise UserError(f"{name}={as_written(value)}: unknown, {hint} ({told})")


def strange(cfg: GenerateConfig, model: Model | type[Model]) -> list[str]:
    """Settings that are given and that this kind of model has not."""
    of_kinds = {name for family in FAMILIES.values() for name in family.module.SETTINGS}
    others = of_kinds - set(model.SETTINGS)
    return [k for k, v in vars(cfg).items() if k in others and v != getattr(GenerateConfig, k)]


def fitted(cfg: GenerateConfig, model: Model) -> GenerateConfig:
    """The settings, with the model's own where none are given.

    UserError for a setting that this kind of model has not, or lacks.
    """
    check_told(cfg, model.conditions)
    check_guidance(1.0 if cfg.guidance is None else cfg.guidance, len(model.conditions))
    for name in strange(cfg, model):
        raise UserError(f"{name}={getattr(cfg, name)}: {model.KIND} model has no {name}")
    model.check_settings(cfg)
    own = {name: getattr(model.config, name, None) for name in OWN}
    own["length"] = model.config.clip_length
    return replace(cfg, **{k: v for k, v in own.items() if getattr(cfg, k) is None})
