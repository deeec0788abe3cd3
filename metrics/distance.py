"""How far a model's clips are from a data set while it is in training: one number, always alike."""

import math
from typing import Any

import torch
from torch import Tensor

from metrics.classifier import load_classifier
from metrics.scores import fid
from rawaudio.audio import resample
from rawaudio.batches import wave_batches
from rawaudio.data import ClipDataset
from rawaudio.mel import log_mel

CLIPS = 1000  # at most, of the data set as of the model
PER_PASS = 64  # clips


class Compared:
    """The clips of a data set, to compare generated ones with.

    By the features of the shipped classifier where it knows the labels, and the audio has its rate
    or a higher one; else by frames of log-mel spectrograms; by frames of a model's own features if
    it cannot make them audible. `features` says which in words.

    Args:
        rate: Hz, of the data set and the models.
        length: samples of a clip; longer ones are cut, shorter ones followed by silence.
    """

    def __init__(self, ds: ClipDataset, rate: int, length: int, model: Any = None):
        self.rate, self.length, self.n = rate, length, min(CLIPS, len(ds))
        classifier = load_classifier()
        labels = {clip.label for clip in ds.clips}
        self.classifier = None
        if rate >= classifier.sample_rate and labels <= set(classifier.labels):
            self.classifier = classifier
        known = "features of the shipped classifier"
        self.features = known if self.classifier else "frames of log-mel spectrograms"
        batches = wave_batches(ds, PER_PASS, length, torch.Generator().manual_seed(0))
        self.silent = model is not None and not model.speaks
        if self.silent:
            self.features = "frames of what the model makes, which it has no vocoder for"
            parts = (model.features_of(batch, ds).cpu() for batch in batches)
            self.real = [x.T for part in parts for x in part][: self.n]
            return
        wavs = torch.cat([batch["wav"].cpu() for batch in batches])[: self.n]
        self.real = self._features(wavs)

    @torch.no_grad()
    def _features(self, wavs: Tensor) -> list[Tensor]:
        """Of each clip of (B, length): (rows, D)."""
        if self.classifier is not None:
            wavs = resample(wavs.cpu(), self.rate, self.classifier.sample_rate)
            return [x[None] for part in wavs.split(PER_PASS) for x in self.classifier(part)[1]]
        hop = max(8, 2 ** round(math.log2(self.rate / 64)))  # about 16 ms
        return list(log_mel(wavs.cpu(), self.rate, 20, 2 * hop, hop).transpose(1, 2))

    def fid(self, model: Any) -> float:
        """Of as many clips of the model, from the same randomness every time."""
        rng = torch.Generator().manual_seed(0)
        if self.silent:
            made = model.draw_features(self.n, rng).cpu().mT.flatten(0, 1)
            return fid(torch.cat(self.real), made)
        wavs = model.generate(self.n, self.length, generator=rng)
        return fid(torch.cat(self.real), torch.cat(self._features(wavs)))

    def floor(self) -> float:
        """Of one half of the data set from the other; NaN of too few clips."""
        halves = self.real[::2], self.real[1::2]
        if min(map(len, halves)) < 2:
            return math.nan
        return fid(*map(torch.cat, halves))
