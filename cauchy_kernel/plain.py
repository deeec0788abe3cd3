"""The Cauchy kernel in plain PyTorch: the reference, and what runs where nothing is compiled.

Glossary: L length, J = ceil(L / 2) finite nodes, H features, M = N / 2 stored states (the other
half are their conjugates), S = H or 1 sets of states, C channels,
R = 2 C + 2 Cauchy sums: (Ct B') of each channel, (Ct P) of each channel, (Q B'), (Q P).

On the unit circle, w_j = exp(-2 pi i j / L), the node z_j = 2 (1 - w_j) / (1 + w_j) = i y_j is
imaginary, y_j = 2 tan(pi j / L), so a conjugate pair of poles a +- i b has real coefficients:

    v / (z - lam) + conj(v) / (z - conj(lam)) = (alpha + i beta y) G
    alpha = -2 Re(v conj(lam))    beta = 2 Re(v)    1 / G = a^2 + (b - y)(b + y) - 2 i a y

One G serves all R sums, and 2 / (1 + w) = 1 + i y / 2, so with B = B' + rho P, rho real,

    Khat = 2 / (1 + w) [CB - CP QB / (1 + QP)] = (1 + i y / 2) [CB' - CP (QB' - rho) / (1 + QP)]

for any rho. Where Lambda resonates the difference cancels (A itself does not resonate), and
float32 is left with three digits; with rho the least-squares B / P it keeps six (HiPPO: B' = 0).
`coefficients` makes alpha, beta, a, b, rho, in double; a backend (`forward` and `backward` here,
or the same two compiled) does the O(H M L) work between those and the spectrum.

Conjugates are made at once, `conj_physical`: inside an operation that torch.compile calls, the
lazy `conj` is silently wrong (PyTorch 2.13).

Source: S4, arXiv:2111.00396, section 3.3 and appendix C.3.
"""

import math

import torch


def block_size(device: torch.device) -> int:
    """Largest number of (feature, state, node) triples alive.

    On a CPU they fit the cache; a GPU gets few launches for a few hundred MiB.
    """
    return 1 << 17 if device.type == "cpu" else 1 << 22


def nodes(length: int, device=None) -> torch.Tensor:
    """The finite y_j = 2 tan(pi j / L), j < L/2, float64 (J,), each exact to rounding."""
    j = torch.arange((length + 1) // 2, dtype=torch.float64, device=device)
    low = 2 * torch.tan(math.pi / length * j)
    high = 2 / torch.tan(math.pi / (2 * length) * (length - 2 * j))  # close to pi/2: cotangent
    return torch.where(4 * j < length, low, high)


def _products(Lambda, P, B, Ct, dt):
    """In double: v (R, H, M), dt Lambda = a + i b (H, M), dt (H, 1), and P, B', Ct, rho (S, 1)."""
    Lambda, P, B, Ct = (x.to(torch.complex128) for x in (Lambda, P, B, Ct))
    dt = dt.double()[:, None]
    Q = P.conj_physical()
    norm = (Q * P).real
    rho = (Q * B).real.sum(1, keepdim=True) / norm.sum(1, keepdim=True).clamp(min=1e-300)
    B = B - rho * P
    shared = torch.stack([Q * B, norm.to(B.dtype)]).expand(2, len(dt), -1)
    v = torch.cat([Ct * B, Ct * P, shared])
    return v, dt * Lambda.real, dt * Lambda.imag, dt, (P, B, Ct, rho)


def coefficients(Lambda, P, B, Ct, dt):
    """Parameters -> weight (H, 2R, M): alpha, then beta; a, b (H, M), b >= 0; rho (H,). float64.

    Double because alpha may cancel, and because b is compared with y at a distance of |a|.
    """
    v, a, b, dt, (*_, rho) = _products(Lambda, P, B, Ct, dt)
    beta = 2 * dt * v.real
    alpha = -(beta * a + 2 * dt * v.imag * b)
    weight = torch.cat([alpha, beta]).transpose(0, 1).contiguous()
    # Of a conjugate pair either half may have been stored: b.abs().
    return weight, a, b.abs(), rho[:, 0].expand(len(dt)).contiguous()


def last_node(weight, a, b, rho) -> torch.Tensor:
    """Spectrum (C, H) at w = -1, the node j = L/2 of an even length; real.

    There z is infinite: Khat = dt / 2 sum Ct B, B = B' + rho P.
    """
    beta = weight.chunk(2, 1)[1].sum(2)  # (H, R)
    cb, cp = beta[:, :-2].T.chunk(2)
    return cb / 2 + rho * cp / 2


def coefficients_backward(d, d_last, weight, a, b, rho, Lambda, P, B, Ct, dt):
    """Gradients of Lambda, P, B, Ct, dt from those that `backward` returns.

    d_last (C, H): gradient of `last_node`, or None where the length is odd.
    """
    beta = weight.chunk(2, 1)[1]
    d_alpha, d_beta, rest = d.split([beta.shape[1], beta.shape[1], 3], 1)
    d_norm, d_a, d_log_y = rest.unbind(1)
    # dt and z come as z / dt only; through the poles d_dt would cancel where z is small.
    d_log_dt = (d_log_y - a * d_a).sum(1) - (beta * d_beta).sum((1, 2))
    if d_last is not None:
        unused = torch.zeros_like(d_last[:1]).expand(2, -1)
        last = torch.cat([d_last, rho * d_last, unused]).T.contiguous()[:, :, None] / 2  # (H, R, 1)
        d_log_dt += (last * beta).sum((1, 2))
        d_beta = d_beta + last
    v, a, b, step, (P_in, B_in, Ct_in, rho) = _products(Lambda, P, B, Ct, dt)
    d_alpha, d_beta = d_alpha.transpose(0, 1), d_beta.transpose(0, 1) - a * d_alpha.transpose(0, 1)
    d_a = d_a + 2 * a * d_norm - 2 * step * (v.real * d_alpha).sum(0)
    d_b = 2 * b * d_norm - 2 * step * (v.imag * d_alpha).sum(0)
    d_v = 2 * step * torch.complex(d_beta, -b * d_alpha)
    d_cb, d_cp, (d_qb, d_qp) = d_v[: len(Ct)], d_v[len(Ct) : -2], d_v[-2:]
    Ct_conj = Ct_in.conj_physical()
    d_B = (d_cb * Ct_conj).sum(0) + d_qb * P_in
    d_P = (d_cp * Ct_conj).sum(0) + d_qb.conj_physical() * B_in
    d_P += 2 * d_qp.real * P_in - rho * d_B
    per_state = step * torch.complex(d_a, d_b), d_P, d_B
    if len(P) == 1:  # one set of states for all features
        per_state = (x.sum(0, keepdim=True) for x in per_state)
    d_Ct = d_cb * B_in.conj_physical() + d_cp * P_in.conj_physical()
    grads = *per_state, d_Ct, d_log_dt / step[:, 0]
    return tuple(g.to(x.dtype) for g, x in zip(grads, (Lambda, P, B, Ct, dt), strict=True))


def _green(a, b, y, dtype):
    """G (H, M, 2, J), real and imaginary part, from float64 a, b (H, M) and y (J,)."""
    a, b, y_hi = a[:, :, None], b[:, :, None], y.to(dtype)
    b_hi = b.to(dtype)
    difference = b_hi - y_hi
    if dtype != torch.float64:  # hi + lo: exact where b is close to y
        difference += (b - b_hi).to(dtype) - (y - y_hi).to(dtype)
    re = difference.mul_(b_hi + y_hi).add_((a * a).to(dtype))
    im = (2 * a).to(dtype) * y_hi
    scale = (re * re).addcmul_(im, im).reciprocal_()  # 1/(re - i im) = (re + i im) scale
    out = re.new_empty(*re.shape[:2], 2, re.shape[2])
    torch.mul(re, scale, out=out[:, :, 0])
    torch.mul(im, scale, out=out[:, :, 1])
    return out


def _product(x, y):
    """x @ y in double, whatever `torch.set_float32_matmul_precision` has made of float32.

    With TF32 or bfloat16 its products have three digits. Switching that off for a moment would
    do so for all threads, and autograd runs the backward pass in threads of its own.
    """
    return x.double() @ y.double()


def _blocks(weight, a, b, y, dtype):
    """Features h and nodes j of each block, its y and G, and its R sums (h, R, j)."""
    n_features, n_states = a.shape
    width = max(1, block_size(y.device) // n_states)
    step_j = min(len(y), width, max(256, width // n_features))
    step_h = max(1, width // step_j)
    n_sums = weight.shape[1] // 2
    for h in (slice(i, min(i + step_h, n_features)) for i in range(0, n_features, step_h)):
        for j in (slice(i, min(i + step_j, len(y))) for i in range(0, len(y), step_j)):
            green = _green(a[h], b[h], y[j], dtype)
            part = _product(weight[h], green.flatten(2)).to(dtype)
            alpha, beta = part.unflatten(1, (2, n_sums)).unflatten(3, (2, -1)).unbind(1)
            y_j = y[j].to(dtype)
            re = alpha[:, :, 0] - y_j * beta[:, :, 1]
            yield h, j, y_j, green, torch.complex(re, alpha[:, :, 1] + y_j * beta[:, :, 0])


def forward(weight, a, b, rho, y, out) -> None:
    """Coefficients -> spectrum at the finite nodes, written to out[:, :, :J] (C, H, L//2+1)."""
    channels = len(out)
    for h, j, y_j, _, r in _blocks(weight, a, b, y, out.dtype.to_real()):
        cb, cp, (qb, qp) = r[:, :channels], r[:, channels:-2], r[:, -2:].unbind(1)
        k = cb - cp * ((qb - rho[h, None].to(y_j)) / (1 + qp))[:, None]
        out[:, h, j] = (k * torch.complex(torch.ones_like(y_j), y_j / 2)).transpose(0, 1)


def backward(grad, weight, a, b, rho, y) -> torch.Tensor:
    """Gradient of the spectrum -> float64 (H, 2R + 3, M), gradients of what G is made of.

    Of alpha, of beta, of |lam|^2 = a^2 + b^2, of a where it multiplies y, of log y (in 1 / G).
    G and the sums are computed again, block by block: nothing of size (H, M, L) is kept.
    """
    channels, n_sums = len(grad), weight.shape[1] // 2
    total = weight.new_zeros(len(weight), 2 * n_sums + 3, weight.shape[2])
    for h, j, y_j, green, r in _blocks(weight, a, b, y, grad.dtype.to_real()):
        cp, (qb, qp) = r[:, channels:-2], r[:, -2:].unbind(1)
        t = (1 / (1 + qp))[:, None]
        u = (qb - rho[h, None].to(y_j))[:, None] * t
        g = grad[:, h, j].transpose(0, 1) * torch.complex(torch.ones_like(y_j), -y_j / 2)
        g_qb = -(g * (cp * t).conj_physical()).sum(1, keepdim=True)
        u = u.conj_physical()
        g = torch.cat([g, -g * u, g_qb, -g_qb * u], 1)  # (h, R, j), of each sum
        re, im, y_re, y_im = g.real, g.imag, y_j * g.real, y_j * g.imag
        rows = torch.stack([torch.cat([re, y_im], 1), torch.cat([im, -y_re], 1)], 2)
        total[h, :-3] += _product(rows.flatten(2), green.flatten(2).transpose(1, 2))
        # d G = -G^2 d(1/G), so what is left is q G^2 with q = sum conj(g) (alpha + i beta y)
        rows = torch.stack([torch.cat([re, y_im], 1), torch.cat([-im, y_re], 1)], 2)
        q = _product(weight[h].transpose(1, 2), rows.flatten(2)).to(y_j)  # (h, M, 2j)
        (q_re, q_im), (g_re, g_im) = q.unflatten(2, (2, -1)).unbind(2), green.unbind(2)
        s_re, s_im = torch.addcmul(g_re * g_re, g_im, g_im, value=-1), 2 * g_re * g_im
        w_re = torch.addcmul(q_re * s_re, q_im, s_im, value=-1)
        w_im = torch.addcmul(q_re * s_im, q_im, s_re)
        powers = torch.stack([-torch.ones_like(y_j), -2 * y_j * y_j], 1)
        total[h, -3::2] += _product(w_re, powers).transpose(1, 2)
        total[h, -2] -= 2 * _product(w_im, y_j)
    return total
