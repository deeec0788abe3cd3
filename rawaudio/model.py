"""What all models share: the settings that do not depend on the network, conditions, and the groups
in which their parameters learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio.arguments import number
from rawaudio.conditions import Conditions, check_conditions, check_guidance
from rawaudio.config import as_written, setting
from rawaudio.errors import UserError

# The largest values; a file may claim any, and some take memory as soon as they are used.
LIMITS = {
    "d_model": 2**16, "n_layers": 1000, "pool": 2**16, "expand": 256, "ff": 256, "d_state": 2**14,
    "l_max": 2**24, "tier_lengths": 2**24, "diffusion_steps": 10**6, "data_std": 1000,
    "n_mels": 1024, "n_fft": 2**14, "hop": 2**14, "sample_rate": 768_000, "clip_length": 10**8,
    "d_condition": 2**16, "layers": 1000, "blocks": 1000, "cycle": 24, "residual_channels": 2**16,
    "dilation_channels": 2**16, "skip_channels": 2**16, "end_channels": 2**16, "channels": 2**16,
    "frame_sizes": 2**16, "n_rnn": 100, "d_hidden": 2**16, "d_embedding": 2**16,
    "latent_dim": 2**16, "w_dim": 2**16, "w_layers": 100, "fourier_channels": 2**16,
    "frames": 2**16, "kernel": 1001, "head_kernel": 1001, "critic_channels": 2**16,
    "critic_kernel": 1001, "critic_blocks": 100, "bands": 2**14, "margin": 10**8,
    "slice_len": 2**24, "filter_taps": 2**14,
}  # fmt: skip
MOST_POOLINGS = 16


@dataclass
class ModelConfig:
    """Settings of every model."""

    sample_rate: int = setting(16000, "Hz")
    clip_length: int = setting(16000, "samples that are generated when no length is given")
    guidance: float = setting(
        1.0, "push towards the conditions of generated clips when none is given; 1: off"
    )
    guided: list[str] = setting([], "conditions that guidance pushes towards; none given: all")
    conditions: dict[str, list[str]] = setting({}, "what it can be told: columns, their values")
    condition_counts: dict[str, list[int]] = setting({}, "clips of each value in training")

    def __post_init__(self) -> None:
        check_conditions(self.conditions, self.condition_counts)
        check_guidance(self.guidance, len(self.conditions))
        unknown = [name for name in self.guided if name not in self.conditions]
        if unknown and self.conditions:  # training collects them after its settings are read
            known = ", ".join(self.conditions)
            raise UserError(f"guided={as_written(unknown)}: the model can be told {known}")
        for name, most in LIMITS.items():
            value = getattr(self, name, None)
            numbers = value if isinstance(value, list) else [value]
            if any(number is not None and number > most for number in numbers):
                raise UserError(f"{name}={as_written(value)}: must be at most {most:,}")
        if len(pool := getattr(self, "pool", [])) > MOST_POOLINGS:
            raise UserError(f"pool={as_written(pool)}: at most {MOST_POOLINGS} poolings")
        self.check_positive("sample_rate", "clip_length")

    def check_positive(self, *names: str) -> None:
        """Raises UserError for a setting below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def training_length(self) -> int:
        """Samples of a training clip where nothing else is said."""
        return self.clip_length


class Model(nn.Module):
    """A network with its settings, `config`, and its conditions, `told`.

    A model that was trained with conditions (`model.conditions`) can be told them by name wherever
    clips go in or come out, one value for all or a list of one for each:
    model.generate(4, label="seven"). Arguments that methods share:

        generator   source of randomness; torch's default one on the CPU if None. The same state of
                    the same generator gives the same clips.
        guidance    how far predictions are pushed from those of the model told nothing, or all but
                    `config.guided` (see `conditions.guided`), at least 0; 1 is off, others cost
                    twice; `config.guidance` if None
        told        conditions by name. What is not given is not told, but `generate` draws it by
                    the shares of the training set, see `draw_conditions`.

    For the command `generate`, whose settings are called `cfg`, a kind of model has

        KIND            "an autoregressive", for messages
        SAMPLING        settings that decide which clips it makes
        SETTINGS        all settings that not every other kind has
        make(cfg, n, source, length, told, generator, progress)
                        n clips (n, length), and their log-likelihoods or None; source: audio (n, T)
                        that they are made from, or None; told: a value for each clip
        described(cfg)  how they were made, in words
    """

    KIND: str
    SAMPLING: tuple[str, ...]
    SETTINGS: tuple[str, ...]
    config: ModelConfig
    told: Conditions

    def check_settings(self, cfg: Any) -> None:
        """UserError for settings of the command that do not go together."""

    def unconditional_generate(self, N: int, *arguments: Any, **settings: Any) -> Tensor:
        """`generate`, under the name that all models have: N clips, float (N, T) in [-1, 1]."""
        return self.generate(N, *arguments, **settings)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def conditions(self) -> dict[str, list[str]]:
        """What the model can be told: condition -> its values. Empty for most models."""
        return {name: list(values) for name, values in self.told.values.items()}

    def draw_conditions(
        self, n: int, generator: torch.Generator | None = None, **told: Any
    ) -> dict[str, list[str]]:
        """Conditions of n clips: those given, the others by their shares of the training set.

        What `generate` draws from the same generator: generate(n, **model.draw_conditions(n)).
        """
        return self.told.words(self.told.draw(n, told, generator))

    def checked_guidance(self, guidance: float | None) -> float:
        """The guidance that was asked for, the model's own if None; ValueError for a bad one."""
        guidance = self.config.guidance if guidance is None else number("guidance", guidance)
        check_guidance(guidance, len(self.told))
        return guidance

    def untold(self, rows: Tensor) -> Tensor:
        """Conditions (n, C) without those that guidance pushes towards: what it compares with."""
        away = [not self.config.guided or name in self.config.guided for name in self.told.values]
        return rows.masked_fill(torch.tensor(away, dtype=torch.bool, device=rows.device), 0)

    def rows_of(self, batch: dict[str, Tensor], n: int) -> Tensor:
        """Conditions (n, C) of a batch of n clips, on the model's device; those not told are 0."""
        if "told" in batch:
            return batch["told"].to(self.device, non_blocking=True)
        return self.told.rows(n, {})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """name -> parameters with a rate or a decay of their own.

        "weights": matrices of torch's layers and what a module's MATRICES names, which alone
        decay; "no decay": norms, biases and the like; "conditions": their embeddings; "state
        space": what a module's SSM_PARAMETERS names.
        """

        def named_by(names: str) -> set[int]:
            return {
                id(getattr(module, name))
                for module in self.modules()
                for name in getattr(module, names, ())
            }

        tables = {id(p) for p in self.told.parameters()}
        slow = named_by("SSM_PARAMETERS")
        matrices = named_by("MATRICES") | {
            id(parameter)
            for module in self.modules()
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.ConvTranspose1d)
            for name, parameter in module.named_parameters()
            if not name.endswith("bias")
        }
        groups = {"weights": [], "no decay": [], "conditions": [], "state space": []}
        for parameter in self.parameters():
            if id(parameter) in tables:
                groups["conditions"].append(parameter)
            elif id(parameter) in slow:
                groups["state space"].append(parameter)
            else:
                groups["weights" if id(parameter) in matrices else "no decay"].append(parameter)
        return groups


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, where S4 kernels are computed only once; then as it was."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def bare(model: nn.Module) -> Model:
    """The model itself, where distributed training or torch.compile has wrapped it."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)
