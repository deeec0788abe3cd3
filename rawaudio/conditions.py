"""Conditions: what a model can be told, such as which word to say and in whose voice.

A condition is a column of the training CSV with its values, {"label": ["zero", ..., "nine"]}. A
clip's conditions are a row of indices: 0 where the model is not told, value i as i + 1. Each
condition has an embedding; their sum enters every S4 block (classifier-free guidance, which needs
the row 0 too: arXiv:2207.12598).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio.config import as_written
from rawaudio.errors import UserError

MAX_VALUES = 65_536  # of a condition; more of them are file names, or numbers

# Columns that cannot be conditions: they are arguments of the models, or settings of the commands.
RESERVED = frozenset(
    "N by checkpoint chunk clip data_root device diffusion_steps file generator guidance "
    "iterations l_prefix length lengths log_likelihood mel mel_from model n n_batch n_reps "
    "n_samples nucleus_p out_dir page path play precision prefix progress return_log_likelihood "
    "rows sampler seconds seed self start state steps stop temperature told top_k wav wavs x "
    "z".split()
)


class Conditions(nn.Module):
    """Rows of indices (B, C) -> sum of their embeddings (B, features); None where C = 0.

    The tables begin at zero: a model that starts from weights of one without conditions computes
    what that one did.

    Args:
        values: condition -> its values, in the order of their indices.
        counts: condition -> how often each value stands in the training set.
        features: of the embeddings.
    """

    def __init__(
        self,
        values: Mapping[str, Sequence[str]],
        counts: Mapping[str, Sequence[int]],
        features: int,
    ):
        super().__init__()
        self.values = {name: list(of_name) for name, of_name in values.items()}
        self.counts = {name: list(counts[name]) for name in values}
        self.tables = nn.ModuleList(
            nn.Embedding(1 + len(of_name), features) for of_name in self.values.values()
        )
        for table in self.tables:
            nn.init.zeros_(table.weight)

    def __len__(self) -> int:
        return len(self.tables)

    def forward(self, rows: Tensor) -> Tensor | None:
        parts = [table(column) for table, column in zip(self.tables, rows.T, strict=True)]
        return sum(parts[1:], parts[0]) if parts else None

    def rows(self, n: int, given: Mapping[str, Any]) -> Tensor:
        """Indices int64 (n, C) of what is given, 0 where nothing is.

        given: condition -> a value for all n clips, or a list of n values, None among them or in
        place of it for "not told". Raises ValueError for other names, values or lengths.
        """
        if given and not len(self):
            name, value = next(iter(given.items()))
            raise UserError(
                f"{name}={as_written(value)}: this model cannot be told anything; one trained with "
                f"conditions=[{name}] can"
            )
        device = self.tables[0].weight.device if len(self) else None
        rows = torch.zeros(n, len(self), dtype=torch.int64, device=device)
        for name, value in given.items():
            if name not in self.values:
                raise UserError(
                    f"{name}={as_written(value)}: no condition has that name, "
                    f"{_nearest(name, self)}"
                )
            one = value is None or isinstance(value, str) or not hasattr(value, "__iter__")
            each = [value] * n if one else list(value)
            if len(each) != n:
                raise UserError(
                    f"{name}={as_written(value)}: {len(each)} values for {n} clips; give one, "
                    "or one for each clip"
                )
            known = {v: i for i, v in enumerate(self.values[name], 1)}
            for word in each:
                if word is not None and str(word) not in known:
                    near = _nearest(str(word), self.values[name])
                    raise UserError(f"{name}={as_written(word)}: not a value of it, {near}")
            indices = [0 if word is None else known[str(word)] for word in each]
            rows[:, list(self.values).index(name)] = torch.tensor(indices, dtype=torch.int64)
        return rows

    def draw(self, n: int, given: Mapping[str, Any], generator: torch.Generator | None) -> Tensor:
        """As `rows`, but what is not given is drawn from the shares of the training set.

        n x C uniforms are taken from the generator whatever is given, so that a clip whose label
        was drawn is the same clip when that label is asked for.
        """
        rows = self.rows(n, given)
        if not len(self):
            return rows
        device = generator.device if generator is not None else "cpu"
        uniforms = torch.rand(n, len(self), generator=generator, device=device).double().cpu()
        for i, counts in enumerate(self.counts.values()):
            edges = torch.tensor(counts, dtype=torch.float64).cumsum(0)
            drawn = torch.searchsorted(edges, uniforms[:, i] * edges[-1], right=True) + 1
            drawn = drawn.clamp(max=len(counts)).to(rows.device)
            rows[:, i] = torch.where(rows[:, i] == 0, drawn, rows[:, i])
        return rows

    @torch.no_grad()
    def start_from(self, other: "Conditions") -> None:
        """Take over the tables of another model, value by value; a value that it does not know
        begins as its "not told", and a condition that it does not know at zero."""
        for name, values, table in zip(self.values, self.values.values(), self.tables, strict=True):
            if name not in other.values:
                continue
            known = {value: i for i, value in enumerate(other.values[name], 1)}
            theirs = other.tables[list(other.values).index(name)].weight
            table.weight.copy_(theirs[[0, *(known.get(value, 0) for value in values)]])

    def words(self, rows: Tensor) -> dict[str, list[str | None]]:
        """The inverse of `rows`: condition -> the value of each clip, None where not told."""
        return {
            name: [of_name[i - 1] if i else None for i in column]
            for (name, of_name), column in zip(self.values.items(), rows.T.tolist(), strict=True)
        }


def withhold(
    rows: Tensor, probability: float, generator: torch.Generator, part: tuple[int, int]
) -> Tensor:
    """Rows (B, C) with some indices set to "not told": each with that probability, and all of a
    clip together with it once more, which is what guidance compares with.

    part (first, n): the rows are number `first` and following of n; from the same generator they
    lose what they would lose among all of them.
    """
    (first, n), c = part, rows.shape[1]
    uniforms = torch.rand(n, c + (c > 1), generator=generator, device=generator.device)
    uniforms = uniforms[first : first + len(rows)]
    hidden = uniforms[:, :c] < probability
    if c > 1:
        hidden |= uniforms[:, c:] < probability
    return rows.masked_fill(hidden.to(rows.device), 0)


def in_pairs(rows: Tensor) -> Tensor:
    """(n, C) -> (2n, C): every clip's row, followed by one that is told nothing."""
    return torch.stack([rows, torch.zeros_like(rows)], 1).flatten(0, 1)


def guided(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """untold + guidance (told - untold): logits, or noise, pushed away from those of a model that
    was told nothing (arXiv:2207.12598, eq. 6 with guidance = 1 + w). 1 gives what was told."""
    return untold + guidance * (told - untold)


def check_conditions(
    values: Mapping[str, Sequence[str]], counts: Mapping[str, Sequence[int]]
) -> None:
    """Raises ValueError, naming it, for a condition that cannot be one."""
    for name, of_name in values.items():
        if not name.isidentifier() or name in RESERVED:
            why = "a setting or argument has that name" if name in RESERVED else "it is no name"
            raise UserError(f"condition {name!r}: {why}; rename the column")
        if not 1 <= len(of_name) <= MAX_VALUES:
            raise UserError(
                f"condition {name}: {len(of_name):,} values, expected 1 to {MAX_VALUES:,}; most "
                "likely the wrong column"
            )
        if len(set(of_name)) < len(of_name):
            raise UserError(f"condition {name}: a value stands there twice")
        for value in of_name:
            odd = not isinstance(value, str) or set(value) & set(",[]") or "${" in value
            if odd or not 0 < len(value.strip()) <= 1000:
                raise UserError(
                    f"condition {name}: the value {value!r:.50} is empty, very long, or has a "
                    "comma, a bracket or ${, which have a meaning on the command line"
                )
        if name not in counts or len(counts[name]) != len(of_name) or min(counts[name]) < 1:
            raise UserError(f"condition_counts: expected {len(of_name)} numbers for {name}")
    if extra := counts.keys() - values.keys():
        raise UserError(f"condition_counts: {min(extra)} is no condition")


def check_guidance(guidance: float, conditions: int) -> None:
    """ValueError for a guidance below 0, or for a model that cannot be told anything."""
    if not 0 <= guidance < float("inf"):
        raise UserError(f"guidance={guidance}: must be a number, at least 0; 1 is off")
    if guidance != 1 and not conditions:
        raise UserError(f"guidance={guidance}: this model cannot be told anything; leave it at 1")


def _nearest(word: str, known: "Conditions | Sequence[str]") -> str:
    names = list(known.values) if isinstance(known, Conditions) else list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.0)
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"did you mean {near[0]}? ({shown})"
