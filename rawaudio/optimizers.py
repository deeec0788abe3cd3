"""The optimizers of a run: AdamW for all parameters, or Muon for the inner matrices beside it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from rawaudio.errors import UserError


class Together:
    """Optimizers of different parameters that step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)


def make_optimizer(
    networks: dict[str, nn.Module], cfg: Any, fused: bool
) -> torch.optim.Optimizer | Together:
    """One for all networks: those without gradients, whose turn it is not, stay as they are.

    networks: name -> a module with `parameter_groups`. cfg: the run's settings. Muon
    (https://kellerjordan.github.io/posts/muon/) makes the steps of a matrix orthogonal; they are
    scaled to AdamW's usual size (arXiv:2502.16982, eq. 4), so that both have one learning rate.
    """
    groups, inner = [], []
    rates = {"state space": cfg.ssm_lr, "conditions": cfg.condition_lr}
    for network, module in networks.items():
        factor = getattr(module, "rate", 1.0)
        for name, parameters in module.parameter_groups().items():
            rate = rates.get(name, cfg.start_lr) * factor
            settings = {
                "name": f"{network} {name}" if len(networks) > 1 else name,
                "lr": rate,
                "base_lr": rate,
                "weight_decay": cfg.weight_decay if name == "weights" else 0.0,
            }
            if name == "weights" and cfg.optimizer == "muon":
                matrices = inner_matrices(module)
                chosen = {id(p) for p in matrices}
                parameters = [p for p in parameters if id(p) not in chosen]
                if matrices:
                    its_name = settings["name"].replace("weights", "inner matrices")
                    inner.append({**settings, "params": matrices, "name": its_name})
            if parameters:
                groups.append({**settings, "params": parameters})
    adamw = AdamW(groups, betas=tuple(cfg.betas), fused=fused)
    if cfg.optimizer == "adamw":
        return adamw
    if not inner:
        raise UserError("optimizer=muon: this model has no inner matrices; leave it out")
    return Together(adamw, Muon(inner, adjust_lr_fn="match_rms_adamw"))


def inner_matrices(network: nn.Module) -> list[Tensor]:
    """Weights of linear layers from features to features: what a model's ENDS names, where audio
    comes in or leaves, is not among them."""
    ends = {
        id(parameter)
        for module in network.modules()
        for name in getattr(module, "ENDS", ())
        for parameter in getattr(module, name).parameters()
    }
    linear = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    return [p for p in linear if p.requires_grad and id(p) not in ends and min(p.shape) > 1]


def go_on(
    optimizer: torch.optim.Optimizer | Together, state: dict[str, Any], name: str, source: Path
) -> None:
    """Take over the state of a last.pt, but the settings of this command, should they differ.

    name: the setting `optimizer`; source: that last.pt. Raises UserError for the state of another
    optimizer.
    """
    if ("optimizers" in state) != isinstance(optimizer, Together):
        other = "adamw" if name == "muon" else "muon"
        raise UserError(
            f"optimizer={name}: {source} has optimizer={other}; give that, or start anew in "
            "another checkpoint_path, with init_from="
        )
    names = ("base_lr", "weight_decay", "betas", "fused")
    chosen = [{k: g[k] for k in names if k in g} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, chosen, strict=True):
        group.update(settings)
