"""Scores of generated audio: FID, IS, mIS, AM, NDB. `python -m metrics` scores a folder."""

from metrics.scores import (
    am_score,
    bootstrap,
    fid,
    inception_score,
    modified_inception_score,
    ndb,
)

__all__ = ["am_score", "bootstrap", "fid", "inception_score", "modified_inception_score", "ndb"]
