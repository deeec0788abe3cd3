"""Splits of noise, for the tests of data sets and batches."""

import numpy as np
import soundfile
import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, seed=0, peak=0.5):
    """float32 (n,) that 16-bit PCM holds exactly."""
    pcm = np.random.default_rng(seed).integers(-32768 * peak, 32768 * peak, n)
    return (pcm / 32768).astype(np.float32)


def split_of(folder, waves, rate=8000, name="split.csv"):
    """Writes {name: (T,) or (T, channels)} and the CSV that lists them."""
    for file, wave in waves.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / file, wave, rate)
    path = folder / name
    path.write_text("path,label\n" + "".join(f"{f},{f[:1]}\n" for f in waves))
    return path


def recordings(folder):
    """Two recordings of 2.5 and 1.2 s, and the middle of the first one once more."""
    csv = split_of(folder, {"a.wav": noise(20_000, 1), "b.wav": noise(9_600, 2)})
    csv.write_text("path,label,start,stop\na.wav,x,,\nb.wav,y,,\na.wav,z,0.5,1.25\n")
    return csv
