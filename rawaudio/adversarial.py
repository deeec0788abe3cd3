"""The adversarial task: a generator makes clips that a critic cannot tell from recorded ones.

    G: latent z -> x,   D: x -> answer, high for what is real,   x: audio, or features of it

Two losses (`WASSERSTEIN`, `LOGISTIC`), each with its penalty on the critic's slope; the critic
learns with every batch, the generator with every `critic_steps`-th. Only training needs the critic:
checkpoints to use hold the generator alone. (GAN: arXiv:1406.2661.)
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio import golden
from rawaudio.arguments import check_generator, floats, integer
from rawaudio.batches import Batch, wave_batches
from rawaudio.config import as_written, setting
from rawaudio.critics import Adaptive, Critic, Loss
from rawaudio.data import ClipDataset
from rawaudio.errors import UserError
from rawaudio.family import Task
from rawaudio.model import Model, ModelConfig, in_eval
from rawaudio.progress import watched
from rawaudio.samplers import randn, sphere
from rawaudio.seeds import seeded

PER_PASS = 2**20  # samples of all clips that are made at once, for the memory


@dataclass
class AdversarialSettings(ModelConfig):
    """Settings of every adversarial model. `training_length` is that of the clips it makes."""

    latent_dim: int = setting(100, "numbers that decide a clip")
    critic_steps: int = setting(1, "training: updates of the critic for one of the generator")
    critic_rate: float = setting(1.0, "training: the critic's learning rates, over the generator's")
    penalty: float = setting(10.0, "training: weight of the penalty on the critic's slope")
    penalty_interval: int = setting(
        1, "training: updates of the critic for one with the penalty, then as many times as strong"
    )
    augment: float = setting(
        0.0, "training: probability of augmentation, which then follows the critic (ADA); 0: never"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("latent_dim", "critic_steps", "penalty_interval")
        if self.guidance != 1 or self.guided:
            raise UserError(
                f"guidance={self.guidance}, guided={as_written(self.guided)}: adversarial models "
                "have no guidance, leave them at 1 and []"
            )
        if self.critic_rate <= 0 or self.penalty < 0 or not 0 <= self.augment < 1:
            raise UserError(
                f"critic_rate={self.critic_rate}, penalty={self.penalty}, augment={self.augment}: "
                "must be above 0, at least 0, and at least 0 and below 1"
            )
        if self.clip_length > self.training_length:
            raise UserError(
                f"clip_length={self.clip_length}: must be at most {self.training_length}, "
                "what this model makes"
            )


# ---- models -------------------------------------------------------------------------------------


class Adversarial(Model):
    """A generator. `model(z)`: latents (B, latent_dim) -> what its critic hears, x (B, ...).

    What a family adds:

        critic, loss             its critic's class, which takes the config too; a `Loss`
        make_features(z, rows)   latents, conditions (B, C) -> x
        to_audio(x)              x -> audio (B, training_length), if x is something else
        heard(wav)               the inverse for recorded audio (B, training_length)
        latents(n, generator)    latents, and between(a, b, t), if they are not standard normal
        features_of(batch, ds)   the same of a batch of a data set, if it knows more than audio
        speaks                   whether x can be made audio
        augment(real, made, p, rng)   both x changed alike, each change with probability p
    """

    KIND = "an adversarial"
    SAMPLING = SETTINGS = ()
    config: AdversarialSettings
    critic: type[Critic]
    loss: Loss

    def to_audio(self, x: Tensor) -> Tensor:
        return x

    def heard(self, wav: Tensor) -> Tensor:
        return wav

    def features_of(self, batch: Batch, ds: ClipDataset) -> Tensor:
        return self.heard(batch["wav"])

    @property
    def speaks(self) -> bool:
        return True

    def latents(self, n: int, generator: torch.Generator | None) -> Tensor:
        return randn((n, self.config.latent_dim), generator)

    def between(self, a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
        """Latents on the way from a to b, as likely as these, with t from 0 to 1."""
        return sphere(a, b, t)

    def augment(
        self, real: Tensor, made: Tensor, p: float, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        raise UserError(f"augment={self.config.augment}: this model has no augmentation")

    def forward(self, z: Tensor, rows: Tensor | None = None, **told: Any) -> Tensor:
        """Latents (B, latent_dim) -> x.

        told: conditions by name; what is not given is not told. rows: the same as indices (B, C).
        Raises ValueError for other shapes.
        """
        z = self.checked(z)
        rows = self.told.rows(len(z), told) if rows is None else rows
        return self.make_features(z, rows)

    def checked(self, z: Tensor, check_finite: bool = False) -> Tensor:
        """Latents (B, latent_dim) on the model's device; ValueError for what are none."""
        z = floats("z", z, check_finite).to(self.device, self.dtype)
        if z.dim() != 2 or z.shape[1] != self.config.latent_dim:
            shape = tuple(z.shape)
            raise UserError(f"z of shape {shape}: expected (clips, {self.config.latent_dim})")
        return z

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        n: int,
        length: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        **told: Any,
    ) -> Tensor:
        """n clips, float (n, length) in [-1, 1] on the model's device.

        length: samples per clip, at most `config.training_length`, which is what the network makes;
        `config.clip_length` if None. progress: show a progress bar. ValueError for an argument
        outside its range.
        """
        n, length = integer("n", n), self._length(length)
        check_generator(generator)
        rows = self.told.draw(n, told, generator)
        return self._audio(self, (self.latents(n, generator), rows), length, progress)

    def generate_from_latent(
        self, z: Tensor, length: int | None = None, progress: bool = False, **told: Any
    ) -> Tensor:
        """The clips (N, length) in [-1, 1] that belong to latents z (N, latent_dim).

        Same z, same audio. Arguments as in `generate`, but what is not told is not drawn.
        ValueError for other shapes and values that are not finite.
        """
        z, length = self.checked(z, check_finite=True), self._length(length)
        return self._audio(self, (z, self.told.rows(len(z), told)), length, progress)

    @torch.no_grad()
    def draw_features(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """x (n, ...) of the clips that `generate` draws."""
        given = self.told.draw(n, {}, generator), self.latents(n, generator)
        with in_eval(self):
            parts = zip(*(x.split(64) for x in given), strict=True)
            return torch.cat([self(z, rows) for rows, z in parts])

    def _length(self, length: int | None) -> int:
        made = self.config.training_length
        length = self.config.clip_length if length is None else integer("length", length)
        if length > made:
            raise UserError(f"length={length}: clips of this model have {made} samples at most")
        return length

    @torch.no_grad()
    def _audio(
        self, make: Callable[..., Tensor], given: tuple[Tensor, ...], length: int, progress: bool
    ) -> Tensor:
        """Clips of make(*given), tensors of as many rows."""
        if not len(given[0]):
            return given[0].new_zeros(0, length)
        size = max(1, PER_PASS // self.config.training_length)
        parts = zip(*(x.split(size) for x in given), strict=True)
        with in_eval(self):
            wavs = (self.to_audio(make(*part))[:, :length] for part in parts)
            wavs = list(watched(wavs, "generating", len(given[0]), each=size, show=progress))
        return torch.cat(wavs).clamp(-1, 1)

    # ---------------------------------------------------------------- for the command `generate`

    def check_settings(self, cfg: Any) -> None:
        if cfg.guidance not in (None, 1):
            raise UserError(f"guidance={cfg.guidance}: {self.KIND} model has none")
        self._length(cfg.length)

    def make(
        self,
        cfg: Any,
        n: int,
        source: None,
        length: int,
        told: dict[str, list[str]],
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Tensor, None]:
        return self.generate(n, length, generator, progress, **told), None

    def described(self, cfg: Any) -> list[str]:
        return [f"seed {cfg.seed}"]


# ---- the task -----------------------------------------------------------------------------------


def compared_with(ds: ClipDataset, model: Adversarial) -> Any:
    """`metrics.distance.Compared` of a data set."""
    # here, because users of torch.hub, who need none, may have a module `metrics` of their own
    from metrics.distance import Compared

    return Compared(ds, model.sample_rate, model.config.training_length, model)


class Turn(nn.Module):
    """A network's loss as a module, whose gradients processes can share.

    Within `loss` the other network does as it likes: it is no part of this module.
    """

    def __init__(self, network: Model, loss: Callable[..., Tensor], rate: float):
        super().__init__()
        self.network, self.loss, self.rate = network, loss, rate

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return self.network.parameter_groups()

    def forward(self, *arguments: Any) -> Tensor:
        return self.loss(*arguments)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within, nothing that is computed asks for gradients of the network's parameters."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


class AdversarialTask(Task):
    """Generator and critic learn in turn."""

    pcm, unit, axis, scale = True, "fid", "Fréchet distance of generated clips", 1.0
    golden = staticmethod(golden.adversarial)

    def __init__(self, config: AdversarialSettings, length: int):
        if length != config.training_length:
            raise UserError(
                f"seq_len={length}: this model makes {config.training_length} samples; leave it out"
            )
        super().__init__(config, length)
        self.updates = 0  # of the critic
        self.compared = None  # the validation clips, once they are needed
        self.adaptive = Adaptive(config.augment) if config.augment else None

    def batches(
        self, ds: ClipDataset, batch_size: int, rng: Any, *, pad_multiple: int = 1, **options: Any
    ) -> Iterator[Batch]:
        batches = wave_batches(ds, batch_size, self.length, rng, **options)
        # what the critic hears, made once for both networks
        return (batch | {"wav": self.model.features_of(batch, ds)} for batch in batches)

    def networks(self, model: Adversarial) -> dict[str, nn.Module]:
        self.model = model
        self.critic = model.critic(model.config).to(model.device).train()
        return {
            "generator": Turn(model, self._generator_loss, 1.0),
            "critic": Turn(self.critic, self._critic_loss, self.config.critic_rate),
        }

    def turns(self, step: int) -> tuple[str, ...]:
        both = (step + 1) % self.config.critic_steps == 0
        return ("critic", "generator") if both else ("critic",)

    def loss(
        self, network: nn.Module, batch: Batch, place: tuple[int, int], rng: Callable
    ) -> Tensor:
        n = len(batch["index"])
        first, planned = place if n else (0, 1)
        each = network(batch, slice(first, first + len(batch["wav"])), planned, rng())  # (B,)
        return each.float().mean() * (n * self.length)

    def _critic_loss(
        self, batch: Batch, place: slice, planned: int, rng: torch.Generator
    ) -> Tensor:
        c, rows = self.config, self.model.rows_of(batch, len(batch["wav"]))
        with torch.no_grad():
            real, made = self._both(batch, rows, place, planned, rng)
        u = torch.rand(planned, generator=rng, device=rng.device)[place].to(real)
        answers = self.critic(real, rows, rng)
        if self.adaptive and len(batch["index"]):
            self.adaptive.hears(answers)
        each = self.model.loss.critic(answers, self.critic(made, rows, rng))
        if self.updates % c.penalty_interval == 0:
            penalty = self.model.loss.penalty(lambda x: self.critic(x, rows, rng), real, made, u)
            each = each + c.penalty * c.penalty_interval * penalty
        return each

    def _generator_loss(
        self, batch: Batch, place: slice, planned: int, rng: torch.Generator
    ) -> Tensor:
        rng = seeded("generator", rng.initial_seed(), device=rng.device)  # other latents
        rows = self.model.rows_of(batch, len(batch["wav"]))
        _, made = self._both(batch, rows, place, planned, rng)
        with frozen(self.critic):
            return self.model.loss.generator(self.critic(made, rows, rng))

    def _both(
        self, batch: Batch, rows: Tensor, place: slice, planned: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the critic hears of recorded and of made clips."""
        z = self.model.latents(planned, rng)[place].to(self.model.device)
        made = self.model(z, rows).float()
        real = batch["wav"].to(self.model.device, non_blocking=True)
        if self.adaptive:
            real, made = self.model.augment(real, made, self.adaptive.p, rng)
        return real, made

    def numbers(self) -> dict[str, float]:
        return {"augment": self.adaptive.p} if self.adaptive else {}

    def updated(self, name: str, device: torch.device) -> None:
        if name == "critic":
            self.updates += 1
            if self.adaptive:
                self.adaptive.updated(device)

    def state_dict(self) -> dict[str, Any]:
        adaptive = dict(vars(self.adaptive)) if self.adaptive else {}
        return {"critic": self.critic.state_dict(), "updates": self.updates, "adaptive": adaptive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state.get("critic"), dict):
            raise UserError("last.pt holds no critic: start anew in another checkpoint_path")
        self.critic.load_state_dict(state["critic"])
        self.updates = state["updates"]
        if self.adaptive:
            vars(self.adaptive).update(state["adaptive"])

    def validate(
        self, model: Adversarial, ds: ClipDataset, batch_size: int, shard: tuple[int, int]
    ) -> tuple[float, float]:
        return (0.0, 0) if shard[0] else (self._compared(ds).fid(model), 1)

    def listen(self, model: Adversarial, ds: ClipDataset, n: int) -> tuple[Tensor, list[str]]:
        return super().listen(model, ds, n) if model.speaks else (torch.zeros(0, 1), [])

    def comparison(self, ds: ClipDataset) -> str:
        compared = self._compared(ds)
        floor = f"{compared.floor():.4f} between halves of the validation clips"
        return f"for comparison: fid {floor}, by {compared.features}"

    def _compared(self, ds: ClipDataset) -> Any:
        self.compared = self.compared or compared_with(ds, self.model)
        return self.compared

    @staticmethod
    def scores(model: Adversarial, ds: ClipDataset) -> dict[str, float]:
        return {"fid": compared_with(ds, model).fid(model)}
