"""The S4 layer: a linear state-space model per feature; a convolution or a recurrence.

    x'(t) = A x(t) + B u(t),   y(t) = C x(t) + D u(t),   A = diag(Lambda) - P P*

Glossary (S4 paper, arXiv:2111.00396; SaShiMi, arXiv:2202.09729):

    L   sequence length           H   features            N   real states per feature
    M   N/2 stored states; the other half are their complex conjugates
    S   sets of (Lambda, P, B): 1 when all features of a layer share them, else H
    dt  discretisation step       Ab, Bb  bilinear discretisation of A, B
    Ct  C (I - Ab^l_max), the stored form of C: what the generating function needs

Both forms are the same function: `kernel` and `step` agree to float32 rounding.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cauchy_kernel import nplr_kernel
from cauchy_kernel.functions import nplr_gradients
from rawaudio.errors import UserError
from sashimi import blocks


@functools.cache
def hippo_legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in normal-plus-low-rank form: Lambda, P, B, each complex128 (d_state/2,).

    A[n, k] = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; with P[n] = sqrt(n + 1/2) the
    sum A + P P^T is -1/2 I plus a skew-symmetric matrix, whose eigenvectors are unitary
    (S4 paper, appendix C). The half with positive frequency is kept, in ascending order.
    """
    n = np.arange(d_state)
    root = np.sqrt(2 * n + 1)
    p = np.sqrt(n + 0.5)
    skew = np.tril(-np.outer(root, root), -1) + np.outer(p, p) - np.diag(n + 0.5)
    frequency, v = np.linalg.eigh(-1j * skew)  # Hermitian: real, ordered, stable
    keep = v[:, d_state // 2 :]
    lam = -0.5 + 1j * frequency[d_state // 2 :]
    return tuple(torch.from_numpy(x) for x in (lam, keep.conj().T @ p, keep.conj().T @ root))


class _FFTConv(torch.autograd.Function):
    """y = irfft(rfft(u) * k_f) along the last axis; keeps u and recomputes its spectrum.

    Autograd's own version would hold two complex (B, H, L) tensors per layer until the backward.
    """

    @staticmethod
    def forward(ctx, u, k_f, n):  # (B, H, L), (H, n/2+1)
        ctx.save_for_backward(u, k_f)
        ctx.n = n
        return torch.fft.irfft(torch.fft.rfft(u, n=n).mul_(k_f), n=n)[..., : u.shape[-1]]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (u, k_f), n = ctx.saved_tensors, ctx.n
        dy_f = torch.fft.rfft(dy, n=n)
        du = dk_f = None
        if ctx.needs_input_grad[1]:
            # irfft weighs inner bins twice and divides by n: so does its gradient.
            weight = torch.full((n // 2 + 1,), 2.0 / n, dtype=u.dtype, device=u.device)
            weight[0] = weight[-1] = 1.0 / n
            dk_f = torch.fft.rfft(u, n=n).conj_physical_().mul_(dy_f).sum(0).mul_(weight)
        if ctx.needs_input_grad[0]:
            du = torch.fft.irfft(dy_f.mul_(k_f.conj()), n=n)[..., : u.shape[-1]]
        return du, dk_f, None


class FullPrecision(nn.Module):
    """A module with S4 layers in it, which cannot be cast to 16 bits; TypeError says what can."""

    def _apply(self, fn, *args, **kwargs):  # .half(), .bfloat16(), .to(...), .cuda(), ...
        if (dtype := fn(torch.zeros(1)).dtype) in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"S4 layers compute in float32 or float64, not {dtype}. In 16 bits one trains "
                "under torch.autocast (train.py: precision=bfloat16), and generates on a CPU by "
                'model.generate(..., precision="float16")'
            )
        return super()._apply(fn, *args, **kwargs)


class S4(FullPrecision):
    """S4 layer with gated output: (B, L, H) -> (B, L, H) for any L.

    y = GLU(W gelu(conv(u, K) + D u)), K the kernel of a state-space model per feature.

    Args:
        d_model: features H.
        d_state: real states per feature N, even and positive.
        l_max: length for which the parameter C is stored as Ct. Longer input is exact too, at the
            price of N x N matrix powers in each forward.
        bidirectional: a second kernel looks ahead: y[t] += sum_l K1[l] u[t + 1 + l].
        dropout: probability, on the activations before the output projection.
        tied: one (Lambda, P, B) for all features of the layer instead of one per feature.
        glu: gated output projection (H -> 2H -> H) instead of a plain one.
        dt_min, dt_max: range of the initial steps, log-uniform.

    Raises ValueError for sizes that make no state space.
    """

    # Parameters of the state space itself: trained with their own rate, without weight decay.
    SSM_PARAMETERS = ("log_dt", "log_A_real", "A_imag", "P", "B")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        l_max: int = 16000,
        bidirectional: bool = False,
        dropout: float = 0.0,
        tied: bool = True,
        glu: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        super().__init__()
        if d_state <= 0 or d_state % 2:
            raise UserError(f"d_state={d_state}: must be even and positive (conjugate pairs)")
        if d_model < 1 or l_max < 1:
            raise UserError(f"d_model={d_model}, l_max={l_max}: both must be at least 1")
        self.d_model, self.l_max, self.bidirectional = d_model, l_max, bidirectional
        sets, channels = (1 if tied else d_model), (2 if bidirectional else 1)
        per_set = sets, d_state // 2
        self.log_dt = nn.Parameter(torch.rand(d_model))  # (H,)
        self.log_A_real = nn.Parameter(torch.empty(per_set))  # (S, M)
        self.A_imag = nn.Parameter(torch.empty(per_set))  # (S, M)
        self.P = nn.Parameter(torch.empty(*per_set, 2))  # (S, M, 2)
        self.B = nn.Parameter(torch.empty(*per_set, 2))  # (S, M, 2)
        self.C = nn.Parameter(torch.randn(channels, d_model, d_state // 2, 2))
        self.D = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(d_model, 2 * d_model if glu else d_model)
        self.forget()
        if not self.C.is_meta:  # without memory all of them come from a checkpoint
            self._start(math.log(dt_min), math.log(dt_max))

    @torch.no_grad()
    def _start(self, least: float, most: float) -> None:
        """Initial values, of log dt and C out of what was drawn."""
        lam, p, b = hippo_legs(2 * self.C.shape[-2])
        self.log_dt.mul_(most - least).add_(least)
        self.log_A_real.copy_((-lam.real).log())
        self.A_imag.copy_(lam.imag)
        self.P.copy_(torch.view_as_real(p))
        self.B.copy_(torch.view_as_real(b))
        c = _rows(torch.view_as_complex(self.C.mul_(0.5**0.5).double()))
        ct = c - c @ torch.linalg.matrix_power(self._transition(), self.l_max)  # what is stored
        self.C.copy_(torch.view_as_real(_weights(ct)))

    # ---------------------------------------------------------------- convolution

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        return self.project(self.convolve(u.transpose(1, 2)).transpose(1, 2))

    def project(self, y: Tensor) -> Tensor:
        """Output of the state space (..., H) -> activation, dropout, (gated) projection."""
        y = self.output(self.dropout(F.gelu(y)))
        return F.glu(y, dim=-1) if self.output.out_features != self.d_model else y

    def convolve(self, u: Tensor) -> Tensor:
        """(B, H, L) -> (B, H, L): K * u + D u, in float32 even under autocast."""
        if u.numel() == 0:  # no clips: FFTs refuse them
            return u
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D.dtype).contiguous()
            n = _fft_length(u.shape[-1])
            k_f = self._once("spectrum", u.shape[-1], lambda: self._spectrum(u.shape[-1], n))
            return torch.addcmul(_FFTConv.apply(u, k_f, n), u, self.D[:, None])

    def kernel(self, length: int) -> Tensor:
        """Convolution kernel K[l] = C Ab^l Bb, (channels, H, length); gradients flow."""
        ct, n = torch.view_as_complex(self.C), self.l_max
        if length > n:  # Ct of twice the length is Ct (I + Ab^n), exactly
            rows = _rows(ct.to(torch.complex128))
            power = torch.linalg.matrix_power(self._transition(), n)
            while n < length:
                rows, power, n = rows + rows @ power, power @ power, 2 * n
            ct = _weights(rows).to(ct.dtype)
        k_f = nplr_kernel(*self._continuous(self.C.dtype), ct, self.log_dt.exp(), n)
        return torch.fft.irfft(k_f, n=n)[..., :length]

    def kernel_of(self, length: int) -> Tensor:
        """The kernel of input of this length, (channels, length, H)."""
        return self._known_kernel(length).transpose(1, 2)

    def known_spectrum(self, length: int) -> Tensor:
        """Its spectrum, for `blocks.s4_known`."""
        return self._once("lanes", length, lambda: blocks.spectrum(self.kernel_of(length)))

    def _known_kernel(self, length: int) -> Tensor:
        whole = max(length, self.l_max)  # shorter input takes its part of the same kernel
        with torch.autocast(self.D.device.type, enabled=False):
            return self._once("kernel", whole, lambda: self.kernel(whole))[..., :length]

    def _spectrum(self, length: int, n: int) -> Tensor:
        """rfft of length n of the kernel, the one that looks ahead at negative times."""
        k = self._known_kernel(length)
        if not self.bidirectional:
            return torch.fft.rfft(k[0], n=n)
        past, future = F.pad(k[0], (0, n - length)), F.pad(k[1].flip(-1), (n - length, 0))
        return torch.fft.rfft(past + future)

    def _continuous(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda, P, B as complex (S, M); Re Lambda < 0 by construction (Hurwitz)."""
        lam = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return lam, *(torch.view_as_complex(x.to(dtype)) for x in (self.P, self.B))

    # ---------------------------------------------------------------- recurrence

    def woodbury(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """P, B (S, M); dt (H, 1); D = (2/dt - Lambda)^-1 and q = Q D (H, M); g, sum Q D B (H, 1).

        In double. (2/dt - A)^-1 is then D - g (D P)(Q D), with g = 1 / (1 + sum Q D P).
        """
        lam, p, b = self._continuous(torch.float64)
        dt = self.log_dt.double().exp()[:, None]
        d = dt / (2 - dt * lam)
        q = p.conj() * d
        g = 1 / (1 + 2 * (q * p).real.sum(-1, keepdim=True))
        return p, b, dt, d, q, g, 2 * (q * b).real.sum(-1, keepdim=True)

    def _recurrence(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, p, q, b of  s = q.x,  x' = a x - p s + b u  in double, complex (H, M).

        Bilinear discretisation, by the Woodbury identity diagonal plus rank one in the basis of
        Lambda. Diagonalising Ab instead would lose float32: its eigenvectors are ill-conditioned.
        """
        p, b, dt, d, q, g, qdb = self.woodbury()
        return 4 / dt * d - 1, 4 / dt * g * d * p, q, 2 * (d * b - g * qdb * d * p)

    def _transition(self) -> Tensor:
        """Ab as a real (H, N, N) matrix on [Re x; Im x], in double: a quarter of complex work."""
        a, p, q, _ = self._recurrence()
        re, im = torch.diag_embed(a.real), torch.diag_embed(a.imag)
        diagonal = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
        return diagonal - _real(p)[..., :, None] * _real(2 * q.conj())[..., None, :]

    @torch.no_grad()
    def setup_rnn(self) -> tuple[Tensor, ...]:
        """The recurrence's constants a, p, q, b, c: computed in double, kept in C's precision.

        Nothing is computed again while the parameters stay. ValueError when bidirectional.
        """
        self._check_causal()
        return self._once("recurrence", 0, self._constants)

    def _constants(self) -> tuple[Tensor, ...]:
        """C = Ct (I - Ab^L)^-1 without powers, L = l_max: it is what K[0] = C Bb says of B.

        The derivative of K[0] by B is c (I - dt/2 A)^-1 dt, and 1 / (1 - x^L) the mean of
        1 / (1 - w x) over the L-th roots of unity w: the backward of the kernel computes it.
        """
        lam, p, b = (x.expand(self.d_model, -1) for x in self._continuous(torch.float64))
        ct, dt = torch.view_as_complex(self.C[:1].double()), self.log_dt.double().exp()
        first = dt.new_full((1, self.d_model, self.l_max // 2 + 1), 2 / self.l_max)
        first[..., 0] = 1 / self.l_max  # the gradient of K[0]: first and Nyquist bins count once
        if self.l_max % 2 == 0:
            first[..., -1] = 1 / self.l_max
        grads = nplr_gradients(first.to(ct.dtype), lam, p, b, ct, dt, self.l_max)
        c, dt = grads[2].conj() / 2, dt[:, None]
        c = c / dt - (c * lam - 2 * (c * p).real.sum(-1, keepdim=True) * p.conj()) / 2
        return tuple(x.to(self.C.dtype.to_complex()) for x in (*self._recurrence(), c))

    def _check_causal(self) -> None:
        if self.bidirectional:
            raise UserError("a bidirectional S4 layer has no recurrence: it needs the future")

    def default_state(self, batch: int) -> Tensor:
        """Zero state, complex (batch, H, M)."""
        return torch.view_as_complex(self.C).new_zeros(batch, *self.C.shape[1:3])

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One sample: u (B, H), state (B, H, M) -> output (B, H) and the next state.

        Uses the constants of the last `setup_rnn`, which is called if there was none.
        """
        _, constants = self._cache.get("recurrence") or (0, self.setup_rnn())
        a, p, q, b, c = constants
        s = 2 * (q * state).real.sum(-1, keepdim=True)
        state = a * state - p * s + b * u.unsqueeze(-1)
        y = 2 * (c * state).real.sum(-1) + self.D * u
        return self.project(y), state

    def advance(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`step` for L samples at once: u (B, L, H), state (B, H, M) -> (B, L, H), the next state.

        The convolution, which starts from the zero state (None), plus what `state` adds to it.
        The next state carries no gradients.
        """
        self._check_causal()
        y, length = self.convolve(u.transpose(1, 2)), u.shape[1]  # (B, H, L)
        within, across = self._powers(length)
        x = self._driven(u, within, across)  # (H, N, B)
        if state is not None:
            start = _real(state).permute(1, 2, 0).to(x)
            y = y + self._free(start, within, across, length)
            for i, power in enumerate(within + across):  # the binary digits of L
                start = power @ start if length >> i & 1 else start
            x = x + start
        state = torch.complex(*x.permute(2, 0, 1).chunk(2, -1)).to(self.C.dtype.to_complex())
        return self.project(y.transpose(1, 2)), state

    @torch.no_grad()
    def _powers(self, length: int) -> tuple[list[Tensor], list[Tensor]]:
        """Ab, Ab^2, ..., Ab^(T/2) and Ab^T, Ab^2T, ... to Ab^L, for blocks of T <= 64 samples."""
        powers = [self._transition()]
        for _ in range(length.bit_length() - 1):
            powers.append(powers[-1] @ powers[-1])
        digits = min(6, len(powers) - 1)
        return powers[:digits], powers[digits:]

    @torch.no_grad()
    def _driven(self, u: Tensor, within: list[Tensor], across: list[Tensor]) -> Tensor:
        """The state (H, N, B) after u (B, L, H) from the zero state, in double.

        [Ab^(T-1) Bb, ..., Ab Bb, Bb] u of every block; neighbours are merged until one is left.
        """
        krylov = _real(self._recurrence()[-1]).unsqueeze(-1)  # (H, N, 1), grows to (H, N, T)
        for power in within:
            krylov = torch.cat([power @ krylov, krylov], -1)
        size = krylov.shape[-1]
        u = F.pad(u.double(), (0, 0, -u.shape[1] % size, 0))  # zeros before leave a zero state
        blocks = u.permute(2, 1, 0).unflatten(1, (-1, size)).transpose(1, 2)  # (H, T, blocks, B)
        x = _columns(krylov, blocks)  # (H, N, blocks, B)
        for power in across:
            if x.shape[2] > 1:
                x = F.pad(x, (0, 0, x.shape[2] % 2, 0))
                x = _columns(power, x[:, :, ::2]) + x[:, :, 1::2]
        return x[:, :, 0]

    def _free(self, x: Tensor, within: list[Tensor], across: list[Tensor], length: int) -> Tensor:
        """Outputs (B, H, L) without input from the state x (H, N, B): [C Ab; ...; C Ab^T] x."""
        c = self.setup_rnn()[-1].to(torch.complex128)
        rows = _rows(c) @ (within + across)[0]  # (H, 1, N), grows to (H, T, N)
        for power in within:
            rows = torch.cat([rows, rows @ power], 1)
        x, blocks = x.unsqueeze(2), -(-length // rows.shape[1])
        for power in across:  # the states before all blocks, (H, N, blocks, B)
            missing = max(0, blocks - x.shape[2])
            x = torch.cat([x, _columns(power, x[:, :, :missing])], 2)
        y = _columns(rows, x).permute(3, 0, 2, 1).flatten(2)  # (B, H, blocks T)
        return y[..., :length].to(self.D.dtype)

    # ---------------------------------------------------------------- what is kept

    def _once(self, name: str, size: int, compute: Callable[[], Any]) -> Any:
        """compute(), or without gradients its last result while size and parameters stay."""
        if torch.is_grad_enabled():
            return compute()
        if not _compared.get():
            forget_stale([self])
        cache = self._cache  # another thread may start a new one meanwhile, for new parameters
        result = cache.get(name)
        if result is None or result[0] != size:
            result = cache[name] = (size, compute())
        return result[1]

    def forget(self) -> None:
        """Drop what was computed from the parameters."""
        self._cache: dict[str, tuple[int, Any]] = {}
        self._seen: list[Tensor] = []  # copies of the parameters that it was computed from

    def train(self, mode: bool = True) -> "S4":
        self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "S4":  # .to(), .double(), ...
        self.forget()
        return super()._apply(*args, **kwargs)

    def _state_space(self) -> list[Tensor]:
        """The parameters on which kernel and recurrence depend."""
        return [getattr(self, name) for name in (*self.SSM_PARAMETERS, "C")]


def _fft_length(length: int) -> int:
    """Even, at least twice the length, and quick."""
    return 2 * blocks.points(length)


blocks.constant(_fft_length)


def _real(x: Tensor) -> Tensor:
    """Complex (..., M) -> real (..., N): [Re x; Im x]."""
    return torch.cat([x.real, x.imag], -1)


def _rows(c: Tensor) -> Tensor:
    """Weights c (..., M) as rows (..., 1, N): 2 Re(c x) = rows @ [Re x; Im x]."""
    return _real(2 * c.conj()).unsqueeze(-2)


def _weights(rows: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    return torch.complex(*rows.squeeze(-2).chunk(2, -1)).conj() / 2


def _columns(matrix: Tensor, x: Tensor) -> Tensor:
    """(H, R, N) @ (H, N, blocks, B) -> (H, R, blocks, B)."""
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


# Without gradients a layer keeps its kernel, which costs more than the convolution. Version
# counters do not tell when it is out of date: writes through `.data`, or of NumPy, change none,
# and new tensors may get the address and the count of old ones. So the values themselves are
# compared. On a GPU the host has to wait for the answer, and for all that is queued before:
# `compare_once` makes that one wait per pass of a model. `S4.step` compares nothing.
_compared = contextvars.ContextVar("_compared", default=False)


@contextlib.contextmanager
def compare_once(layers: Sequence[S4]) -> Iterator[None]:
    """Compare the parameters of all layers now, not each within, where they must stay."""
    if torch.is_grad_enabled():  # nothing is kept
        yield
        return
    forget_stale(layers)
    token = _compared.set(True)
    try:
        yield
    finally:
        _compared.reset(token)


def forget_stale(layers: Sequence[S4]) -> None:
    """Drop what layers keep if it was computed from other parameters than they have now."""
    if layers[0].C.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a graph has its parameters' values of now, for ever; and it cannot wait
    now = [p for layer in layers for p in layer._state_space()]
    if not equal(now, [p for layer in layers for p in layer._seen]):
        for layer in layers:
            layer.forget()
            layer._seen = [p.detach().clone() for p in layer._state_space()]


def equal(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Whether all pairs are equal, values, types and devices; waits for a GPU once."""
    kinds = [[(x.shape, x.dtype, x.device) for x in part] for part in (xs, ys)]
    if kinds[0] != kinds[1]:
        return False
    if xs[0].is_cuda:
        xs, ys = ([torch.cat([x.flatten() for x in part])] for part in (xs, ys))
    return all(map(torch.equal, xs, ys))
