"""What a family of models is: the one thing that a file adds to this library.

A family's file, such as sashimi/autoregressive.py, has a dataclass of settings, a module, and
`FAMILY = Family(...)`; families.py lists the file. Training, resume, generation, checkpoints and
scores find everything here, and ask no model for its class.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio.batches import Batch
from rawaudio.data import ClipDataset
from rawaudio.model import Model, ModelConfig


class Task:
    """What the training loop and the publisher see of a kind of model.

    Most tasks train one network, the model, with every batch. Others have networks that only
    training needs, and say whose turn it is.
    """

    pcm: bool  # whether data sets hold waveforms, else mu-law classes
    unit: str  # of the loss, in the log's names
    axis: str  # the unit in words
    scale: float  # gradients are those of the loss times it

    def __init__(self, config: ModelConfig, length: int):
        """length: samples of a training clip."""
        self.config, self.length = config, length

    def batches(
        self, ds: ClipDataset, batch_size: int, rng: torch.Generator, **options: Any
    ) -> Iterator[Batch]:
        """Training batches of one epoch. options: `augment`, `start`, `shard`, `pad_multiple`."""

    def networks(self, model: Model) -> dict[str, nn.Module]:
        """What is trained, by the name of its loss in the log; other networks are made here.

        Each has `parameter_groups`, as `Model` has.
        """
        return {self.unit: model}

    def turns(self, step: int) -> tuple[str, ...]:
        """Names of the networks that the batch of this step trains, one after the other."""
        return (self.unit,)

    def loss(
        self,
        network: nn.Module,
        batch: Batch,
        place: tuple[int, int],
        rng: Callable[[], torch.Generator],
    ) -> Tensor:
        """Sum of a network's loss over the batch's samples; differentiable. With
        `tbptt` there is one more argument: the state that the batch follows.

        place (first, n): the batch is a part of one of n clips, which meets the same randomness of
        rng() as it would there.
        """

    def numbers(self) -> dict[str, float]:
        """What else the log keeps of a step, by name."""
        return {}

    def updated(self, name: str, device: torch.device) -> None:
        """The network of that name has made its step; called in all processes."""

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, beside the model and the optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    def validate(
        self, model: Model, ds: ClipDataset, batch_size: int, shard: tuple[int, int]
    ) -> tuple[float, float]:
        """Sum and count of the loss over this process's share of a data set."""

    def listen(self, model: Model, ds: ClipDataset, n: int) -> tuple[Tensor, list[str]]:
        """n clips, always of the same conditions and randomness, and their names; for the log."""
        rng = torch.Generator().manual_seed(0)
        told = model.draw_conditions(n, rng)
        names = [" ".join(words) for words in zip(map(str, range(n)), *told.values(), strict=True)]
        return model.generate(n, generator=rng, **told), names

    def comparison(self, ds: ClipDataset) -> str:
        """A line on what can be had without learning; may be empty."""
        return ""

    @staticmethod
    def scores(model: Model, ds: ClipDataset) -> dict[str, float]:
        """unit -> mean loss of a finished model, the one that it was trained for first."""

    @staticmethod
    def golden(model: Model) -> dict[str, Any]:
        """Outputs that these weights must go on giving, as JSON can hold them."""


@dataclass(frozen=True)
class Family:
    """A network, what it is trained for, and the settings that are known to work."""

    kind: str  # its name in checkpoints
    config: type[ModelConfig]
    module: type[Model]  # module(config)
    task: type[Task]
    # what model= may be -> settings of the network that differ from their defaults
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    # what recipe= may be -> settings of train.py; the key "model" names one of `models`
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    # a setting as it is written -> settings of the network whose defaults then differ
    follows: dict[str, dict[str, Any]] = field(default_factory=dict)
    # settings of train.py whose defaults differ
    training: dict[str, Any] = field(default_factory=dict)
    # torch.hub's entry points -> where their weights are downloaded; None: they are in the
    # repository, or nobody has published any
    entries: dict[str, str | None] = field(default_factory=dict)
