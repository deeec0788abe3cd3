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

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cauchy_kernel import nplr_kernel
from rawaudio.errors import UserError


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


def _fast_length(n: int) -> int:
    """Smallest even number >= n without prime factors above 5, for which FFTs are quick."""
    best = 1 << max(1, (n - 1).bit_length())
    five = 1
    while five < best:
        odd = five
        while odd < best:
            best = min(best, odd << max(1, (-(-n // odd) - 1).bit_length()))
            odd *= 3
        five *= 5
    return best


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
                'model.generate(..., precision="bfloat16")'
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

    Raises:
        ValueError: for sizes that make no state space.
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
        shell = torch.empty(0).is_meta  # no memory: all parameters come from a checkpoint
        if shell:
            lam, p, b = torch.empty(3, d_state // 2, dtype=torch.complex128)
        else:
            lam, p, b = hippo_legs(d_state)

        def per_set(x: Tensor) -> nn.Parameter:  # contiguous: optimizers and loaders write to it
            return nn.Parameter(x.float().expand(sets, *x.shape).contiguous())

        spread = math.log(dt_max) - math.log(dt_min)
        self.log_dt = nn.Parameter(torch.rand(d_model) * spread + math.log(dt_min))  # (H,)
        self.log_A_real = per_set((-lam.real).log())  # (S, M)
        self.A_imag = per_set(lam.imag)  # (S, M)
        self.P = per_set(torch.view_as_real(p))  # (S, M, 2)
        self.B = per_set(torch.view_as_real(b))  # (S, M, 2)
        self.C = nn.Parameter(torch.randn(channels, d_model, d_state // 2, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(d_model))
        if not shell:
            with torch.no_grad():  # C was drawn; what is stored is Ct
                transition = self._transition(*self._recurrence())
                c = self._rows(self.C.double())
                self.C.copy_(self._unrows(c - c @ torch.linalg.matrix_power(transition, l_max)))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(d_model, 2 * d_model if glu else d_model)
        self._cache: dict[str, tuple[int, Tensor]]  # results that depend on parameters alone
        self._rnn: tuple[Tensor, ...] | None  # constants of the recurrence
        self._seen: list[Tensor] | None  # copies of the parameters that both were computed from
        self._looked = False  # `look_once` has compared them, for all layers of a model
        self.forget()

    # ---------------------------------------------------------------- convolution

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        y = self.convolve(u.transpose(1, 2)).transpose(1, 2)
        return self.project(y)

    def project(self, y: Tensor) -> Tensor:
        """Output of the state space (..., H) -> activation, dropout, (gated) projection."""
        y = self.output(self.dropout(F.gelu(y)))
        return F.glu(y, dim=-1) if self.output.out_features != self.d_model else y

    def convolve(self, u: Tensor) -> Tensor:
        """(B, H, L) -> (B, H, L): K * u + D u, in float32 even under autocast."""
        if u.numel() == 0:  # no clips, or a coarse tier that is not due
            return u
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D.dtype).contiguous()
            length = u.shape[-1]
            n = _fast_length(2 * length)
            k_f = self._once("spectrum", length, lambda: self._transform(length, n))
            return torch.addcmul(_FFTConv.apply(u, k_f, n), u, self.D[:, None])

    def kernel(self, length: int) -> Tensor:
        """Convolution kernel K[l] = C Ab^l Bb, (channels, H, length); gradients flow."""
        ct, n = torch.view_as_complex(self.C), self.l_max
        if length > n:  # Ct of twice the length is Ct (I + Ab^n), exactly
            rows = self._rows(self.C.double())
            power = torch.linalg.matrix_power(self._transition(*self._recurrence()), n)
            while n < length:
                rows, power, n = rows + rows @ power, power @ power, 2 * n
            ct = torch.view_as_complex(self._unrows(rows).to(self.C.dtype))
        lam, p, b = self._continuous(self.C.dtype)
        k_f = nplr_kernel(lam, p, b, ct, self.log_dt.exp(), n)
        return torch.fft.irfft(k_f, n=n)[..., :length]

    def _once(self, name: str, size: int, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or without gradients its last result while size and parameters stay."""
        if torch.is_grad_enabled():
            return compute()
        if not self._looked:
            forget_stale([self])
        cache = self._cache  # another thread may start a new one meanwhile, for new parameters
        kept = cache.get(name)
        if kept is None or kept[0] != size:
            kept = cache[name] = (size, compute())
        return kept[1]

    def train(self, mode: bool = True) -> "S4":
        self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "S4":  # .to(), .double(), ...
        self.forget()
        return super()._apply(*args, **kwargs)

    def forget(self) -> None:
        """Drop what was computed from the parameters."""
        self._cache, self._rnn, self._seen = {}, None, None

    def _state_space(self) -> list[Tensor]:
        """The parameters on which kernel and recurrence depend."""
        return [getattr(self, name) for name in (*self.SSM_PARAMETERS, "C")]

    def _transform(self, length: int, n: int) -> Tensor:
        """rfft of length n of the kernel, the one that looks ahead at negative times."""
        whole = max(length, self.l_max)  # shorter input takes its part of the same kernel
        k = self._once("kernel", whole, lambda: self.kernel(whole))[..., :length]
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

    @staticmethod
    def _rows(c: Tensor) -> Tensor:
        """Weights (channels, H, M, 2) as rows (channels, H, 1, N): y = rows @ [Re x; Im x]."""
        return torch.cat([2 * c[..., 0], -2 * c[..., 1]], -1).unsqueeze(-2)

    @staticmethod
    def _unrows(rows: Tensor) -> Tensor:
        re, im = rows.squeeze(-2).chunk(2, -1)
        return torch.stack([re / 2, -im / 2], -1)

    @staticmethod
    def _transition(a: Tensor, p: Tensor, q: Tensor, b: Tensor) -> Tensor:
        """Ab as a real (H, N, N) matrix acting on [Re x; Im x]: a quarter of the complex work."""
        diagonal = torch.cat(
            [
                torch.cat([torch.diag_embed(a.real), torch.diag_embed(-a.imag)], -1),
                torch.cat([torch.diag_embed(a.imag), torch.diag_embed(a.real)], -1),
            ],
            -2,
        )
        left, right = torch.cat([p.real, p.imag], -1), torch.cat([2 * q.real, -2 * q.imag], -1)
        return diagonal - left[..., :, None] * right[..., None, :]

    @torch.no_grad()
    def setup_rnn(self) -> tuple[Tensor, ...]:
        """The recurrence's constants a, p, q, b, c: computed in double, kept in C's precision.

        Nothing is computed again while the parameters stay. ValueError when bidirectional.
        """
        self._check_causal()
        forget_stale([self])
        constants, seen = self._rnn, self._seen
        if constants is None:
            a, p, q, b = self._recurrence()
            power = torch.linalg.matrix_power(self._transition(a, p, q, b), self.l_max)
            eye = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
            c = torch.linalg.solve(eye - power, self._rows(self.C[0].double()), left=False)
            c = torch.view_as_complex(self._unrows(c))
            dtype = torch.view_as_complex(self.C).dtype
            constants = tuple(x.to(dtype) for x in (a, p, q, b, c))
            if self._seen is seen:  # no other thread has seen newer parameters
                self._rnn = constants
        return constants

    def _check_causal(self) -> None:
        if self.bidirectional:
            raise UserError("a bidirectional S4 layer has no recurrence: it needs the future")

    def default_state(self, batch: int) -> Tensor:
        """Zero state, complex (batch, H, M)."""
        c = torch.view_as_complex(self.C)
        return torch.zeros(batch, *c.shape[1:], dtype=c.dtype, device=c.device)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One sample: u (B, H), state (B, H, M) -> output (B, H) and the next state.

        Uses the constants of the last `setup_rnn`, which is called if there was none.
        """
        a, p, q, b, c = self._rnn or self.setup_rnn()
        s = 2 * (q * state).real.sum(-1, keepdim=True)
        state = a * state - p * s + b * u.unsqueeze(-1)
        y = 2 * (c * state).real.sum(-1) + self.D * u
        return self.project(y), state

    def advance(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`step` for L samples at once: u (B, L, H), state (B, H, M) -> (B, L, H), the next state.

        The convolution, which starts from zero, plus what the state adds to it. None: zero.
        """
        if u.numel() == 0:
            return u, self.default_state(len(u)) if state is None else state
        y, (state, free) = self.convolve(u.transpose(1, 2)), self._absorb(u, state)
        y = y if free is None else y + free
        return self.project(y.transpose(1, 2)), state

    def absorb(self, u: Tensor, state: Tensor | None = None) -> Tensor:
        """State (B, H, M) after stepping through u (B, L, H) from a state, without stepping."""
        return self._absorb(u, state)[0]

    @torch.no_grad()
    def _absorb(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The state after u (B, L, H), and what the one before adds to the outputs, (B, H, L).

        In double. Blocks of T samples give [Ab^(T-1) Bb, ..., Ab Bb, Bb] u_block, neighbours are
        merged until one is left; T outputs of a state x alone are [C Ab; C Ab^2; ...; C Ab^T] x.
        """
        self._check_causal()
        length = u.shape[1]
        if length == 0:
            return self.default_state(len(u)) if state is None else state, None
        a, p, q, b = self._recurrence()
        powers = [self._transition(a, p, q, b)]  # Ab, Ab^2, Ab^4, ...
        for _ in range(length.bit_length() - 1):
            powers.append(powers[-1] @ powers[-1])
        block = min(6, length.bit_length() - 1)  # T = 2^block: as many samples as states, at most
        krylov = torch.cat([b.real, b.imag], -1).unsqueeze(-1)  # (H, N, 1), grows to (H, N, T)
        for power in powers[:block]:
            krylov = torch.cat([power @ krylov, krylov], -1)
        u = F.pad(u.double(), (0, 0, -length % 2**block, 0))  # zeros before leave a zero state
        parts = u.permute(2, 1, 0).unflatten(1, (-1, 2**block)).transpose(1, 2)  # (H, T, blocks, B)
        x = _columns(krylov, parts)  # (H, N, blocks, B)
        for power in powers[block:]:
            if x.shape[2] == 1:
                break
            x = F.pad(x, (0, 0, x.shape[2] % 2, 0))
            x = _columns(power, x[:, :, ::2]) + x[:, :, 1::2]
        x, free = x[:, :, 0], None  # (H, N, B)
        if state is not None:
            start = torch.cat([state.real, state.imag], -1).permute(1, 2, 0).to(x)
            free = self._free(start, powers, block, length)
            for i, power in enumerate(powers):
                start = power @ start if length >> i & 1 else start
            x = x + start
        re, im = x.permute(2, 0, 1).chunk(2, -1)
        return torch.complex(re, im).to(torch.view_as_complex(self.C).dtype), free

    def _free(self, x: Tensor, powers: list[Tensor], block: int, length: int) -> Tensor:
        """Outputs (B, H, L) without input from the state x (H, N, B)."""
        rows = self._rows(torch.view_as_real(self.setup_rnn()[-1].to(torch.complex128)))
        rows = rows @ powers[0]  # (H, 1, N), grows to (H, T, N)
        for power in powers[:block]:
            rows = torch.cat([rows, rows @ power], 1)
        starts, needed = x.unsqueeze(2), -(-length // 2**block)  # of every block, (H, N, blocks, B)
        for power in powers[block:]:
            missing = needed - starts.shape[2]
            starts = torch.cat([starts, _columns(power, starts[:, :, : max(0, missing)])], 2)
        y = _columns(rows, starts).permute(3, 0, 2, 1).flatten(2)  # (B, H, blocks T)
        return y[..., :length].to(self.D.dtype)


def _columns(matrix: Tensor, x: Tensor) -> Tensor:
    """(H, R, N) @ (H, N, blocks, B) -> (H, R, blocks, B)."""
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


# ---- kept kernels -----------------------------------------------------------------------------
# Without gradients a layer keeps its kernel, which costs more than the convolution. Version
# counters do not tell when it is out of date: writes through `.data`, or of NumPy, change none,
# and new tensors may get the address and the count of old ones. So the values themselves are
# compared with copies: on a CPU 5 to 130 microseconds a layer, below 1 % of a short pass. On a GPU
# the host has to wait for the answer, for all that is queued before; `look_once` makes that one
# wait per pass of a model. `S4.step` compares nothing: `setup_rnn` has done it.


def forget_stale(layers: Sequence[S4]) -> None:
    """Drop what layers keep if it was computed from other parameters than they have now."""
    if layers[0].C.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a graph has its parameters' values of now, for ever; and it cannot wait
    now = [layer._state_space() for layer in layers]
    seen = [layer._seen for layer in layers]
    if all(seen) and equal(sum(now, []), sum(seen, [])):
        return
    for layer, parameters in zip(layers, now, strict=True):
        if layer._seen is None or not equal(parameters, layer._seen):
            layer.forget()
            layer._seen = [p.detach().clone() for p in parameters]


def equal(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Whether all pairs are equal, values, types and devices; waits for a GPU once."""
    pairs = list(zip(xs, ys, strict=True))
    if any((x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device) for x, y in pairs):
        return False
    if xs[0].is_cuda and len({(x.dtype, x.device) for x in xs}) == 1:
        xs, ys = ([torch.cat([x.flatten() for x in part])] for part in (xs, ys))
    return all(map(torch.equal, xs, ys))


def look_once(forward: Callable) -> Callable:
    """Decorates the forward of a module with `_s4_blocks()`: parameters are compared once, before.

    Within it they must stay what they are, as they do while a model computes.
    """

    @functools.wraps(forward)
    def looking(self, *args, **kwargs):
        layers = [] if torch.is_grad_enabled() else [b.layer for b in self._s4_blocks()]
        if layers:
            forget_stale(layers)
        try:
            for layer in layers:
                layer._looked = True
            return forward(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer._looked = False

    return looking
