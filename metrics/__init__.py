"""Scores of generated audio: FID, IS, mIS, AM, NDB. `python -m metrics` scores a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scores import am_score, bootstrap, fid, inception_score, modified_inception_score, ndb

__all__ = [
    "am_score",
    "bootstrap",
    "fid",
    "inception_score",
    "modified_inception_score",
    "ndb",
]


def __getattr__(name: str) -> Any:
    """The scores, when one is asked for: the commands answer --help without NumPy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import scores

    return getattr(scores, name)
