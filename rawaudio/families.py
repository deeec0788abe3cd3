"""The list of what there is: a line for each family of models, the file that it lives in."""

import difflib
import importlib
from typing import Any

from rawaudio.errors import UserError
from rawaudio.family import Family
from rawaudio.model import Model

FILES = (
    "sashimi.autoregressive",
    "sashimi.diffwave",
    "baselines.wavenet",
    "baselines.samplernn",
    "baselines.diffwave",
    "baselines.wavegan",
    "baselines.asgan",
)

FAMILIES: dict[str, Family] = {
    family.kind: family for family in (importlib.import_module(name).FAMILY for name in FILES)
}
MODELS: dict[str, tuple[Family, dict[str, Any]]] = {  # what model= may be
    name: (family, settings)
    for family in FAMILIES.values()
    for name, settings in family.models.items()
}
RECIPES: dict[str, tuple[Family, dict[str, Any]]] = {  # what recipe= may be
    name: (family, settings)
    for family in FAMILIES.values()
    for name, settings in family.recipes.items()
}
ENTRIES: dict[str, Family] = {  # torch.hub's entry points
    name: family for family in FAMILIES.values() for name in family.entries
}


def family_of(model: Model) -> Family:
    """The family of a model."""
    return next(family for family in FAMILIES.values() if type(model) is family.module)


def named(what: str, name: str, known: dict[str, Any]) -> Any:
    """known[name]; UserError names the nearest for a name that is not there."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"{what}={name}: did you mean {near}? ({', '.join(known)})")
    return known[name]
