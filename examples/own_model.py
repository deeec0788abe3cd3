"""S4 and SaShiMi in a model of one's own: a tuner, which hears how high a tone is."""

import torch
from torch import nn

from sashimi.backbone import Sashimi
from sashimi.s4 import S4


class Tuner(nn.Module):
    """Samples (B, L, 1) at 8 kHz -> octaves above 100 Hz, as heard so far, (B, L, 1)."""

    def __init__(self):
        super().__init__()
        self.input, self.output = nn.Linear(1, 32), nn.Linear(32, 1)
        self.s4 = S4(32, d_state=32, l_max=800)  # a layer by itself
        self.backbone = Sashimi(32, n_layers=1, pool=[4, 4], l_max=800)  # and three tiers

    def forward(self, x):
        return self.output(self.backbone(self.s4(self.input(x))))

    def step(self, x, state):
        """The same numbers, one sample (B, 1) at a time."""
        y, s4 = self.s4.step(self.input(x), state[0])
        y, backbone = self.backbone.step(y, state[1])
        return self.output(y), (s4, backbone)


torch.manual_seed(0)
model, steps = Tuner(), 200
optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
for step in range(steps):
    octaves, phase = 3 * torch.rand(16, 1, 1), 6.3 * torch.rand(16, 1, 1)
    x = (phase + 2 * torch.pi * 100 * 2**octaves * torch.arange(800)[:, None] / 8000).sin()
    error = (model(x) - octaves)[:, 400:].abs().mean()
    error.backward()
    optimizer.step(), rate.step(), optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: {12 * error.item():.2f} semitones off")

with torch.no_grad():
    y, state = model.eval()(x), (model.s4.default_state(16), model.backbone.default_state(16))
    for t in range(800):
        y_t, state = model.step(x[:, t], state)
print(f"sample by sample, the last answers differ by {(y_t - y[:, -1]).abs().max():.1e} octaves")
print(f"{12 * (y_t - octaves[:, 0]).abs().mean():.2f} semitones off")
