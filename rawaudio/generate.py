"""Generate clips: wav files sorted by likelihood, a CSV, and a page to listen to them.

A model that was trained with conditions is told them by name, one value for all clips or a list of
one for each; what is not told is drawn by the shares of its training set. request.py has the
settings, clips.py the folder that clips go to.
"""

import logging
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from rawaudio import clips, command, processes
from rawaudio.data import from_wave
from rawaudio.errors import UserError
from rawaudio.hub import load_asked
from rawaudio.model import Model
from rawaudio.request import GenerateConfig, fitted, parse
from rawaudio.seeds import seeded


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what precision=auto has chosen

    def body() -> None:
        model = load_asked(cfg.model, cfg.checkpoint, cfg.device, cfg.vocoder)
        settings = fitted(cfg, model)
        if not cfg.play:
            return clips.run(settings, model)
        try:
            play(settings, model)
        except BrokenPipeError:  # the player was closed: not an error
            command.drop_output()

    def kept() -> str:
        if cfg.play or not any(Path(cfg.out_dir, clips.WORK).glob("batch-*.json")):
            return ""
        return f"; what was made is kept in {cfg.out_dir}, the same command goes on"

    smaller = f"take an n_batch= below {cfg.n_batch}, or a shorter length="
    try:
        return command.run(body, kept=kept, smaller=smaller)
    finally:
        processes.leave()


def play(cfg: GenerateConfig, model: Model) -> None:
    """Writes one clip to standard output in chunks of 20 ms: the clip of n_samples=1.

    wav: a header with the clip's true size, then the samples; raw: the samples alone. They are
    16-bit little-endian, mono, at `model.sample_rate`. Raises BrokenPipeError if nobody listens
    any more, UserError if standard output is a terminal.
    """
    out = sys.stdout.buffer
    if out.isatty():
        raise UserError(f"play={cfg.play} writes audio: send it to a player, ... | aplay")
    sources = clips.read_sources(cfg, model.sample_rate, model.quantizer.stretch)
    prefix = sources[0][1] if sources else torch.zeros(0)
    rest = cfg.length - len(prefix)
    chunks = model.stream(
        1,
        length=max(1, rest),
        prefix=prefix if sources else None,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        nucleus_p=cfg.nucleus_p,
        generator=seeded(cfg.seed, 0),
        precision=cfg.precision,
        guidance=cfg.guidance,
        **cfg.given,
    )
    if cfg.play == "wav":
        out.write(wav_header(cfg.length, model.sample_rate))
    classes = model.quantizer.encode(prefix)
    out.write(_pcm(model.quantizer.decode(classes)))  # `stream` does not repeat it
    out.flush()
    for chunk in chunks if rest else ():
        out.write(_pcm(chunk[0]))
        out.flush()


def wav_header(n: int, sample_rate: int) -> bytes:
    """The 44 bytes before n samples of 16-bit mono PCM in a wav file."""
    size = min(2 * n, 0xFFFFFFFF - 36)  # beyond: "until the end", as streaming writers say it
    form = (16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)  # PCM, mono, 2 bytes a sample
    start = struct.pack("<4sI8sIHHIIHH", b"RIFF", 36 + size, b"WAVEfmt ", *form)
    return start + struct.pack("<4sI", b"data", size)


def _pcm(wav: Tensor) -> bytes:
    """Float (T,) in [-1, 1] as 16-bit little-endian samples, rounded as in wav files."""
    return from_wave(wav.cpu(), torch.int16).numpy().astype("<i2").tobytes()


if __name__ == "__main__":
    sys.exit(main())
