"""Conditions: what a model can be told, such as which word to say and in whose voice.

A condition is a column of the training CSV with its values, {"label": ["zero", ..., "nine"]}. A
clip's conditions are a row of indices: 0 where the model is not told, value i as i + 1. Each
condition has an embedding; their sum enters every S4 block (classifier-free guidance, which needs
the row 0 too: arXiv:2207.12598).
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rawaudio.config import as_written
from rawaudio.errors import UserError

Values = Mapping[str, Sequence[str]]  # condition -> its values, in the order of their indices
Counts = Mapping[str, Sequence[int]]  # condition -> how often each value stands in the training set
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
    """

    def __init__(self, values: Values, counts: Counts, features: int):
        super().__init__()
        self.values = {name: list(of_name) for name, of_name in values.items()}
        self.counts = {name: list(counts[name]) for name in values}
        self.tables = nn.ModuleList(nn.Embedding(1 + len(v), features) for v in values.values())
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
        device = self.tables[0].weight.device if len(self) else None
        rows = torch.zeros(n, len(self), dtype=torch.int64, device=device)
        for name, value in given.items():
            written = f"{name}={as_written(value)}"
            if not len(self):
                other = f"one trained with conditions=[{name}] can"
                raise UserError(f"{written}: this model cannot be told anything; {other}")
            if name not in self.values:
                near = _near(name, self.values)
                raise UserError(f"{written}: no condition has that name, {near}")
            is_list = hasattr(value, "__iter__") and not isinstance(value, str)
            is_list = is_list and getattr(value, "ndim", 1) > 0  # of arrays
            words = list(value) if is_list else [value] * n
            if len(words) != n:
                wanted = f"{len(words)} values for {n} clips; give one, or one for each clip"
                raise UserError(f"{written}: {wanted}")
            words = [None if word is None else str(word) for word in words]
            index = {None: 0} | {v: i for i, v in enumerate(self.values[name], 1)}
            if unknown := [word for word in words if word not in index]:
                near = _near(unknown[0], self.values[name])
                raise UserError(f"{name}={as_written(unknown[0])}: not a value of it, {near}")
            column = list(self.values).index(name)
            rows[:, column] = torch.tensor([index[word] for word in words], dtype=torch.int64)
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
            rows[:, i] = drawn.where(rows[:, i] == 0, rows[:, i])
        return rows

    @torch.no_grad()
    def start_from(self, other: "Conditions") -> None:
        """Take over another model's tables; values that it does not know begin as "not told"."""
        theirs = dict(zip(other.values, other.tables, strict=True))
        for (name, values), table in zip(self.values.items(), self.tables, strict=True):
            if name in theirs:
                index = {value: i for i, value in enumerate(other.values[name], 1)}
                rows = [0, *(index.get(value, 0) for value in values)]
                table.weight.copy_(theirs[name].weight[rows])

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

    part (first, n): the rows are number `first` and following of n, and lose what they would there.
    """
    (first, n), c = part, rows.shape[1]
    uniforms = torch.rand(n, c + (c > 1), generator=generator, device=generator.device)
    hidden = uniforms[first : first + len(rows)] < probability
    if c > 1:
        hidden = hidden[:, :c] | hidden[:, c:]
    return rows.masked_fill(hidden.to(rows.device), 0)


def guided(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """Logits, or noise, pushed away from those of a model that was told nothing.

    arXiv:2207.12598, eq. 6 with guidance = 1 + w; 1 gives what was told.
    """
    return untold + guidance * (told - untold)


def check_conditions(values: Values, counts: Counts) -> None:
    """Raises ValueError, naming it, for a condition that cannot be one."""
    for name, of_name in values.items():
        if not name.isidentifier() or name in RESERVED:
            why = "a setting or argument has that name" if name in RESERVED else "it is no name"
            raise UserError(f"condition {name!r}: {why}; rename the column")
        if not 1 <= len(of_name) <= MAX_VALUES:
            expected = f"expected 1 to {MAX_VALUES:,}; most likely the wrong column"
            raise UserError(f"condition {name}: {len(of_name):,} values, {expected}")
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


def _near(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"did you mean {near[0]}? ({shown})"
