"""SashimiAR: the autoregressive SaShiMi (arXiv:2202.09729): an embedding, the backbone, a head.

rawaudio/autoregressive.py has what it shares with other autoregressive models: its likelihood, and
how clips are drawn.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from rawaudio.autoregressive import Autoregressive, AutoregressiveSettings, BitsTask
from rawaudio.conditions import Conditions
from rawaudio.config import setting
from rawaudio.family import Family
from sashimi.backbone import State
from sashimi.mulaw import N_CLASSES
from sashimi.realtime import CompiledSashimi
from sashimi.s4 import FullPrecision
from sashimi.settings import BackboneSettings


@dataclass
class AutoregressiveConfig(BackboneSettings, AutoregressiveSettings):
    """The autoregressive model. Defaults: the published 4.8M-parameter SC09 model (SaShiMi)."""

    d_condition: int = setting(64, "features of the conditions' embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("d_condition")

    @property
    def training_length(self) -> int:
        return self.l_max


class SashimiAR(Autoregressive, FullPrecision):
    """Autoregressive SaShiMi, see `Autoregressive`."""

    config: AutoregressiveConfig
    ENDS = ("embedding", "head")
    COMPILED = CompiledSashimi

    def __init__(self, config: AutoregressiveConfig | None = None):
        super().__init__()
        self.config = c = config or AutoregressiveConfig()
        self.embedding = nn.Embedding(N_CLASSES, c.d_model)
        self.backbone = c.backbone(d_global=c.d_condition if c.conditions else 0)
        self.told = Conditions(c.conditions, c.condition_counts, c.d_condition)
        for name, parameter in self.backbone.named_parameters():
            if name.endswith("from_global.bias"):  # told nothing, the same as without conditions
                nn.init.zeros_(parameter)
        self.head = nn.Linear(c.d_model, N_CLASSES)

    def features(self, x: Tensor, rows: Tensor) -> Tensor:
        """Classes (B, L), conditions (B, C) -> what the head sees, (B, L, D), in parallel."""
        return self.backbone(self.embedding(x), global_=self.told(rows))

    def default_state(self, rows: Tensor) -> State:
        """State before the first sample of clips with these conditions, (B, C); C may be 0."""
        return self.backbone.default_state(len(rows), self.told(rows))

    def absorb(self, x: Tensor, state: State) -> Tensor:
        """`features` of the classes x (B, L) that follow a state, which becomes the one after."""
        return self.backbone.absorb(self.embedding(x), state)

    def setup_rnn(self) -> None:
        """Prepares `step`, again after parameters change."""
        self.backbone.setup_rnn()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One sample: classes int64 (B,) -> logits (B, 256) and the next state."""
        y, state = self.backbone.step(self.embedding(x), state)
        return self.head(y), state

    @property
    def period(self) -> int:
        """The coarsest tier runs once per so many samples."""
        return self.backbone.period

    @property
    def longest_pass(self) -> int:
        """Kernels, which are kept, are doubled for a pass only once."""
        longest = 2 * self.backbone.l_max
        while longest < 2**13:
            longest *= 2
        return longest


# Sources: [S] the published SC09 model of simple-sashimi; [U] sashimi-sc09-unet, [M]
# sashimi-youtubemix, [B] sashimi-beethoven of state-spaces (configs/experiment/audio, with their
# data sets); [C] the card of sashimi_ar_digits.
DIGITS = {"sample_rate": 8000, "l_max": 8000, "clip_length": 8000, "d_model": 48, "n_layers": [4]}
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
    "digits": {f"model.{name}": value for name, value in DIGITS.items()}
    | {"batch_size": 8, "start_lr": 4e-3, "schedule": "cosine", "warmup_steps": 100,
       "max_steps": 3115, "grad_clip": 1.0, "ema": 0.999, "append_silence": 2400,
       "validation_interval": 500, "checkpoint_interval": 250},
}  # fmt: skip

SC09_URL = "https://github.com/RF5/simple-sashimi/releases/download/v1.0/ckpt_01100000.pt"

FAMILY = Family(
    kind="autoregressive",
    config=AutoregressiveConfig,
    module=SashimiAR,
    task=BitsTask,
    models={"autoregressive": {}, "autoregressive_digits": DIGITS},
    recipes=RECIPES,
    entries={"sashimi_ar_digits": None, "sashimi_ar_sc09": SC09_URL},
)
