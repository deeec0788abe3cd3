"""The settings of a SaShiMi backbone, which both of its models have, and the backbone of them."""

from dataclasses import dataclass
from typing import Any

from rawaudio.config import check_name, setting
from sashimi.backbone import SCALAR, Sashimi


@dataclass
class BackboneSettings:
    """To derive from before a task's settings; a model chooses other defaults."""

    d_model: int = setting(64, "features of the finest tier")
    n_layers: list[int] = setting(
        [8], "(S4, feed-forward) pairs per tier: one number, or a list, finest first"
    )
    pool: list[int] = setting([4, 4], "pooling between tiers, finest first")
    expand: int = setting(2, "growth of the features per tier")
    ff: int = setting(2, "expansion of the feed-forward layers, 0: none")
    d_state: int = setting(64, "real states per feature, even")
    unet: bool = setting(False, "blocks before each down-pool too, a skip around every block")
    glu: bool = setting(True, "gated output of the S4 layers")
    dropout: float = setting(0.0, "probability, in every layer and block")
    scalar_norm: str = setting(
        "none",
        "norms of one shift and scale for all features: none; blocks, as in state-spaces; all",
    )
    tied: bool = setting(True, "one (Lambda, P, B) per S4 layer instead of one per feature")
    l_max: int = setting(16000, "samples for which the finest tier's kernels are stored")
    tier_lengths: list[int] | None = setting(
        None, "stored length of every tier, finest first; none: l_max over the pooling so far"
    )

    def __post_init__(self) -> None:
        if isinstance(self.n_layers, int):
            self.n_layers = [self.n_layers]
        check_name("scalar_norm", self.scalar_norm, SCALAR)
        super().__post_init__()  # of the task's settings

    def backbone(self, **more: Any) -> Sashimi:
        """The backbone of these settings. more: its arguments that are none of them."""
        names = ("d_model", "n_layers", "pool", "expand", "ff", "d_state", "unet", "glu", "dropout",
                 "tied", "scalar_norm")  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return Sashimi(**own, l_max=self.tier_lengths or self.l_max, **more)
