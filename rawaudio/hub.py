"""The models of torch.hub by name, with their weights: shipped, downloaded or given."""

import hashlib
import http.client
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rawaudio import processes
from rawaudio.checkpoint import load_model
from rawaudio.command import cache_folder
from rawaudio.config import check_name, from_dict, usable_device
from rawaudio.errors import CheckpointError, UserError
from rawaudio.families import ENTRIES
from rawaudio.files import read_metadata, sha256
from rawaudio.hifigan import HUBERT, HiFiGAN, read_vocoder
from rawaudio.model import Model, ModelConfig

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parents[1] / "sashimi" / "weights"  # those that travel with the code
# Those that travel with the code; first what listeners understand best.
BEST_FIRST = ("asgan_digits", "sashimi_diffwave_digits", "sashimi_ar_digits")
# url -> SHA-256 of the file behind it. Of most published ones none was published with them: the
# notice gives what was downloaded, and `checkpoint=URL#sha256=...` has it checked.
DIGESTS: dict[str, str] = {
    ENTRIES["diffwave_sc09"].entries["diffwave_sc09"]:
        "f34b9bcca4970572775fff15dbccda09f7ec8d56befe113620e1ad25eee416e1",
}  # fmt: skip
VOCODERS = {  # entries whose features another network makes audible -> its weights, and size
    "asgan_hubert_sc09_6": (
        "https://github.com/RF5/simple-asgan/releases/download/v0/g_02365000_package.pth", HUBERT
    ),
}  # fmt: skip

FRESH = {"asgan_hubert_sc09_6": "asgan_hubert"}  # entries that are not their family's first model


def shipped(name: str) -> Path:
    """Where the entry's weights are, if they travel with the code."""
    return WEIGHTS / f"{name}.safetensors"


def load_named(
    name: str,
    pretrained: bool = True,
    progress: bool = True,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike | None = None,
    config: ModelConfig | None = None,
    vocoder: str | os.PathLike | None = None,
) -> Model:
    """The model of one of `ENTRIES`, in eval mode.

    pretrained: False gives fresh random weights and downloads nothing. checkpoint: a file or URL
    to load instead; a URL may end in #sha256=DIGITS, and another file is then refused. device:
    None is the GPU if there is one. config: of fresh weights; None is the entry's own. vocoder:
    what makes features audible, see `_vocoder`; None is the entry's own. Raises ValueError,
    CheckpointError, and ConnectionError when weights have to be downloaded and cannot.
    """
    check_name("model", name, ENTRIES)
    device = usable_device(device)  # first: downloads and random weights take their time
    family = ENTRIES[name]
    cls, settings, url = family.module, family.config, family.entries[name]
    if not isinstance(config, settings | None):
        raise UserError(f"config={type(config).__name__}: {name} takes a {settings.__name__}")
    own = shipped(name)
    fresh = FRESH.get(name, next(iter(family.models)))
    if checkpoint is None and not pretrained:
        if config is None:
            known = read_metadata(own)["config"] if own.exists() else family.models[fresh]
            config = from_dict(settings, known)
        return _speaking(name, cls(config).to(device).eval(), vocoder, progress, pretrained)
    if checkpoint is None and url is None and not own.exists():
        near = next((other for other in family.entries if shipped(other).exists()), None)
        instead = f", or load {near}, whose weights travel with the code" if near else ""
        raise CheckpointError(
            f"{name}: nobody has published weights yet. Give yours with checkpoint=PATH_OR_URL "
            f"(python train.py model={fresh} makes them), take random ones "
            f"with pretrained=False{instead}"
        )
    source = checkpoint or url or own
    model = _load(source, device, progress)
    check_entry(name, model, source)
    return _speaking(name, model, vocoder, progress, pretrained)


def check_entry(name: str, model: Model, source: str | os.PathLike) -> None:
    """CheckpointError for a model, from that file, of another family than the entry's."""
    if not isinstance(model, cls := ENTRIES[name].module):
        raise CheckpointError(f"{source}: a {type(model).__name__}, {name} is a {cls.__name__}")


def _speaking(
    name: str | None,
    model: Model,
    vocoder: str | os.PathLike | None,
    progress: bool,
    pretrained: bool = True,
) -> Model:
    """The model with the vocoder that is given, else with the entry's, a random one if not
    pretrained."""
    url, size = VOCODERS.get(name, (None, None))
    if url and model.speaks:  # weights of one's own, of mel spectrograms
        url = size = None
    if vocoder is None and size and not pretrained:
        model.speak_with(HiFiGAN(size).eval())
    elif vocoder or url:
        if not hasattr(model, "speak_with"):
            raise UserError(f"vocoder={vocoder}: {model.KIND} model has no vocoder")
        found = _vocoder(vocoder or url, progress)
        try:
            model.speak_with(found)
        except UserError as error:
            raise UserError(f"vocoder={vocoder or url}: {error}") from None
    return model


def _vocoder(source: str | os.PathLike, progress: bool) -> Any:
    """A vocoder by the file or URL of its weights: ours, of diffusion (.safetensors), or those of a
    HiFi-GAN. None for griffin_lim, which has none."""
    if str(source) == "griffin_lim":
        return None
    path = Path(_local(source, progress, "vocoder"))
    return load_model(path, key="vocoder") if path.suffix == ".safetensors" else read_vocoder(path)


def load_asked(
    name: str, checkpoint: str | None, device: str | None, vocoder: str | None = None
) -> Model:
    """The model that a command's settings checkpoint=, or else model=, name, and its vocoder=.

    device: None is the GPU, each process's own under torchrun, if there is one.
    """
    if device is None and torch.cuda.is_available():
        device = f"cuda:{processes.local_rank()}"
    progress = sys.stderr.isatty()
    if checkpoint is None:
        return load_named(name, device=device, progress=progress, vocoder=vocoder)
    model = _load(checkpoint, usable_device(device), progress, "checkpoint")
    return _speaking(None, model, vocoder, progress)


def _load(source: str | os.PathLike, device: torch.device, progress: bool, key: str = "") -> Model:
    """`load_model` of a file or URL."""
    path = _local(source, progress)
    try:
        return load_model(path, device, key)
    except CheckpointError as error:
        if path is source:
            raise
        raise CheckpointError(f"{error}; delete it to download it again") from None


PUBLISHED = {url for family in ENTRIES.values() for url in family.entries.values()}
PUBLISHED |= {url for url, _ in VOCODERS.values()}


def _local(source: str | os.PathLike, progress: bool, key: str = "checkpoint") -> str | os.PathLike:
    """The source itself if it is a path, else what was downloaded from it."""
    if str(source).startswith(("https://", "http://")):
        return _download(str(source), progress, key)
    return source


def _download(url: str, progress: bool, key: str) -> Path:
    """The file behind the url in torch.hub's cache, downloaded if it is not there yet.

    url: may end in #sha256=DIGITS. CheckpointError for a file with another digest than it or
    `DIGESTS` says, ConnectionError without a network.
    """
    url, _, digest = url.partition("#sha256=")
    digest = (digest or DIGESTS.get(url, "")).lower()
    name = url.partition("?")[0].rsplit("/", 1)[1]
    if url not in PUBLISHED:  # files of the same name from other places
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = cache_folder(torch.hub.get_dir()) / "checkpoints" / name
    new = not path.exists()
    if new:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=progress)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise ConnectionError(
                f"{url} could not be downloaded ({error}). If you have the file: {key}=PATH; "
                "sashimi_ar_digits needs no network"
            ) from None
    if digest or new:
        actual = sha256(path)
        if digest and actual != digest:
            path.unlink()  # or the next call, without a digest, would take it
            raise CheckpointError(
                f"{url}: what came from there has SHA-256 {actual}, not {digest}; it was deleted, "
                "so that the next call downloads it again"
            )
        if not digest:
            log.warning("%s has SHA-256 %s; none is known to compare it with", path, actual)
    return path
