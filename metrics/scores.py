"""Scores of generated clips, as pure functions of a classifier's outputs.

    fid(real_features, generated_features)            distance of two clouds of features, 0: none
    inception_score(probs)                            sure of each clip, and all classes: 1 .. C
    modified_inception_score(probs)                   the same, and variety within classes
    am_score(real_probs, generated_probs)             sure of each clip, and classes as in real data
    ndb(real_features, generated_features, bins=50)   share of bins that hold too many or too few

Features are (clips, dimensions), probabilities (clips, classes) with rows that sum to one; numpy
arrays or tensors of any precision. Two protocols:

    exact       (default) the definition in double precision, without random halves or pairs
    published   what the scripts behind published SC09 tables compute (state-spaces/s4,
                models/sashimi/metrics.py), digit for digit: their seeds, halves and random pairs,
                float32, and in the inception score a KL divergence along the axis of the clips

x log x is 0 for a probability of 0. Where a logarithm stands alone (KL divergence from q, with
q = 0 and p > 0), zero counts as 2^-126, the smallest normal float32 number: a clip costs 87 nats
at most, not infinity.

Every function raises ValueError for shapes that do not fit, NaN or infinity, rows that are no
probabilities, or too few clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.stats import entropy

SMALLEST = 2.0**-126  # stands for a probability of 0 inside a lone logarithm
PROTOCOLS = ("exact", "published")
STARTS = {"exact": 5, "published": 1}  # k-means runs of which the best makes the bins of NDB
PAIRS = 10_000  # of the published modified inception score

# Published grid of the likelihood rejection, as shares of the clips in order of likelihood.
LOWER = np.arange(0.0, 0.5, 0.1)
UPPER = np.arange(0.6, 1.0, 0.05)


# ---- Frechet inception distance -------------------------------------------------------------


def fid(real: ArrayLike, generated: ArrayLike, protocol: str = "exact") -> float:
    """Frechet distance of two clouds of features, each taken as a normal distribution.

    real (n, D), generated (m, D), n, m >= 2. Heusel et al. 2017, equation 6:
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), covariances over n - 1 and m - 1. Few clips bias
    it upwards: compare equal numbers of clips only. Both protocols give this value; the published
    script's agrees to 1e-7 where the covariances are regular and is noise where they are not.
    """
    _check_protocol(protocol)
    real, generated = _features(real, generated)
    # With S = L L', the last trace is the sum of the singular values of L1' L2.
    (mean1, L1), (mean2, L2) = _factor(real), _factor(generated)
    cross = np.linalg.svd(L1.T @ L2, compute_uv=False).sum()
    distance = np.square(mean1 - mean2).sum() + np.square(L1).sum() + np.square(L2).sum()
    return max(0.0, float(distance - 2 * cross))  # rounding makes equal clouds negative


def _factor(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and L (D, rank) of a cloud (n, D), where L L' is its covariance."""
    mean = x.mean(0)
    x = (x - mean) / math.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return mean, x.T
    values, vectors = np.linalg.eigh(x.T @ x)
    keep = values > values[-1] * len(values) * np.finfo(float).eps  # the others are rounding
    return mean, vectors[:, keep] * np.sqrt(values[keep])


# ---- scores of class probabilities ----------------------------------------------------------


def inception_score(probs: ArrayLike, protocol: str = "exact") -> float:
    """exp of the mean KL divergence of a clip's classes from those of all clips: 1 to C.

    probs (n, C), n >= 2. Salimans et al. 2016: exp(mean_i KL(p_i || mean_j p_j)).

    published: a random half (seed 0) against the mean of the other half; and the script's KL
    divergence runs, and normalises, along the clips instead of the classes.
    """
    _check_protocol(protocol)
    p = _probabilities(probs, "probs")
    if protocol == "published":
        p = _float32(p)[np.random.RandomState(0).permutation(len(p))]
        first, second = p[: len(p) // 2], p[len(p) // 2 :]
        mean = np.repeat(second.mean(0)[None], len(first), axis=0)  # sums in the script's order
        return float(np.exp(entropy(first, mean, axis=0).mean()))
    return math.exp(_neg_entropy(p).mean() - _neg_entropy(p.mean(0)))


def modified_inception_score(probs: ArrayLike, protocol: str = "exact") -> float:
    """exp of the mean KL divergence over all pairs of clips, which sees variety within classes.

    probs (n, C), n >= 2. Gurumurthy et al. 2017: exp(mean_ij KL(p_i || p_j)). The mean over all
    n^2 pairs is mean_i sum_c p_ic log p_ic - sum_c (mean_i p_ic) (mean_j log p_jc): O(n C).

    published: the mean over 10,000 random pairs (seed 0, with replacement).
    """
    _check_protocol(protocol)
    p = _probabilities(probs, "probs")
    if protocol == "published":
        p = _float32(p)
        i, j = np.random.RandomState(0).randint(0, len(p), (PAIRS, 2)).T
        return float(np.exp(entropy(p[i], p[j], axis=1).mean()))
    return math.exp(_neg_entropy(p).mean() - p.mean(0) @ log(p).mean(0))


def am_score(real_probs: ArrayLike, generated_probs: ArrayLike, protocol: str = "exact") -> float:
    """KL divergence of the real classes from the generated ones, plus a clip's mean entropy.

    real_probs (n, C), generated_probs (m, C), n, m >= 2; in nats, 0 is best. Zhou et al. 2018:
    KL(mean p_real || mean p_generated) + mean_i H(p_i). published: the same in float32.
    """
    _check_protocol(protocol)
    real = _probabilities(real_probs, "real_probs")
    p = _probabilities(generated_probs, "generated_probs")
    if real.shape[1] != p.shape[1]:
        raise ValueError(f"real_probs has {real.shape[1]} classes, generated_probs {p.shape[1]}")
    if protocol == "published":
        real, p = _float32(real), _float32(p)
        return float(entropy(real.mean(0), p.mean(0)) + entropy(p, axis=1).mean())
    mean = real.mean(0)
    return float(_neg_entropy(mean) - mean @ log(p.mean(0)) - _neg_entropy(p).mean())


def log(p: np.ndarray) -> np.ndarray:
    """Logarithm of probabilities, finite at 0."""
    return np.log(np.maximum(p, SMALLEST))


def _neg_entropy(p: np.ndarray) -> np.ndarray:
    """sum_c p log p, in nats: (..., C) -> (...)."""
    return (p * log(p)).sum(-1)


def _float32(p: np.ndarray) -> np.ndarray:
    """The published scripts' precision, but without zeros: there they give NaN or infinity."""
    return np.maximum(p, SMALLEST).astype(np.float32)


# ---- number of statistically different bins -------------------------------------------------


def ndb(
    real: ArrayLike,
    generated: ArrayLike,
    bins: int = 50,
    *,
    protocol: str = "exact",
    centres: ArrayLike | None = None,
    seed: int = 0,
    significance: float = 0.05,
) -> float:
    """Share of the bins of the real clips that hold another share of the generated ones: 0 to 1.

    real (n, D) with n >= bins, generated (m, D). Richardson and Weiss 2018: the real features
    are clustered by k-means, every clip goes to its nearest centre, and a bin counts if a
    two-proportion z-test of its real and generated shares gives p < significance. About
    `significance` of the bins do so by chance.

    centres (bins, D) replaces the clustering, to reproduce a value of another program, whose
    k-means draws other random numbers. protocol: exact takes the best of five clusterings,
    published the first (the current default of scikit-learn, which the script uses).
    """
    _check_protocol(protocol)
    if centres is None:
        centres = kmeans(real, bins, seed, STARTS[protocol])
    return float(ndb_bins(real, generated, centres, significance)[2].mean())


def ndb_bins(
    real: ArrayLike, generated: ArrayLike, centres: ArrayLike, significance: float = 0.05
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of the real and of the generated clips in each bin, float64 (bins,), and whether they
    differ, bool (bins,). Arguments as in `ndb`.
    """
    real, generated = _features(real, generated)
    centres = _array(centres, "centres")
    if centres.shape[1] != real.shape[1]:
        raise ValueError(
            f"centres have {centres.shape[1]} dimensions, the features {real.shape[1]}"
        )
    k, n1, n2 = len(centres), len(real), len(generated)
    p1 = np.bincount(_nearest(real, centres)[0], minlength=k) / n1
    p2 = np.bincount(_nearest(generated, centres)[0], minlength=k) / n2
    pooled = (p1 * n1 + p2 * n2) / (n1 + n2)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))
    z = np.divide(abs(p1 - p2), error, out=np.zeros(k), where=error > 0)
    p_value = np.array([math.erfc(x / math.sqrt(2)) for x in z])  # two tails of the normal
    return p1, p2, p_value < significance


def kmeans(x: ArrayLike, k: int, seed: int = 0, n_init: int = 5) -> np.ndarray:
    """Centres (k, D) of a k-means clustering of x (n, D), n >= k >= 1, float64.

    Lloyd's iteration from k-means++ starts (Arthur and Vassilvitskii 2007); of `n_init` runs the
    one with the least squared distance. The same seed gives the same centres. (SciPy's starts take
    minutes for 18,000 clips of 1,024 features, these seconds.)
    """
    x = _array(x, "features")
    if k < 1 or n_init < 1:
        raise ValueError(f"k={k}, n_init={n_init}: both must be at least 1")
    if len(x) < k:
        raise ValueError(f"{k} bins need at least {k} real clips, not {len(x)}: give fewer bins")
    rng = np.random.default_rng(seed)
    x = x - (mean := x.mean(0))  # distances are differences of squares: keep these small
    runs = [_lloyd(x, _plus_plus(x, k, rng)) for _ in range(n_init)]
    return min(runs, key=lambda run: run[1])[0] + mean


def _plus_plus(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k rows of x, each drawn with probability ~ squared distance to those before it."""
    chosen = [int(rng.integers(len(x)))]
    distance = np.full(len(x), np.inf)
    for _ in range(k - 1):
        distance = np.minimum(distance, _nearest(x, x[chosen[-1:]])[1])
        total = distance.sum()
        chosen.append(int(rng.choice(len(x), p=distance / total if total > 0 else None)))
    return x[chosen]


def _lloyd(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """Centres after convergence, and the mean squared distance to them."""
    rows, before = np.arange(len(x)), np.inf
    for _ in range(300):
        label, distance = _nearest(x, centres)
        if distance.mean() >= before * (1 - 1e-5):
            break
        before = distance.mean()
        count = np.bincount(label, minlength=len(centres))
        sums = csr_array((np.ones(len(x)), (label, rows)), shape=(len(centres), len(x))) @ x
        centres = sums / np.maximum(count, 1)[:, None]
        # An empty bin moves to a clip far from its centre, a different one for each.
        centres[count == 0] = x[np.argsort(-distance)[: np.count_nonzero(count == 0)]]
    return centres, float(distance.mean())


def _nearest(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of x (n, D): index of the nearest centre and squared distance to it, (n,)."""
    half = x @ centres.T - np.square(centres).sum(1) / 2  # (n, k)
    label = half.argmax(1)
    squares = np.einsum("nd,nd->n", x, x)
    return label, np.maximum(squares - 2 * half[np.arange(len(x)), label], 0)


# ---- likelihood rejection -------------------------------------------------------------------


def split_halves(
    n: int, *, protocol: str = "exact", seed: int = 0, n_test: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of n clips, to tune thresholds on and to score: increasing indices.

    n >= 4; the first half has n // 2 clips. published: the halves of the published script, whose
    generator has drawn 10,000 pairs of its n_test test clips by then (0: none yet).
    """
    _check_protocol(protocol)
    if n < 4:
        raise ValueError(f"{n} clips cannot be split for tuning and scoring: give at least 4")
    if protocol == "published":
        rng = np.random.RandomState(0)
        if n_test:
            rng.randint(0, n_test, (PAIRS, 2))
        tune = rng.choice(n, size=n // 2, replace=False)
    else:
        tune = np.random.default_rng(seed).permutation(n)[: n // 2]
    return np.sort(tune), np.setdiff1d(np.arange(n), tune)


def tune_thresholds(probs: ArrayLike, protocol: str = "exact") -> tuple[float, float]:
    """Which clips to keep, as shares (lower, upper) in order of likelihood, by inception score.

    probs (n, C), n >= 10, lowest likelihood first; `kept(n, *thresholds)` is a slice of such rows.
    SaShiMi, appendix C.3: lower of 0, 0.1 .. 0.4 and upper of 0.6, 0.65 .. 0.95.

    exact: the pair with the highest exact inception score. published: the last pair, (0.4, 0.95),
    whatever the clips are: the script compares its scores, but never updates the best one.
    """
    _check_protocol(protocol)
    scores = threshold_scores(probs, protocol)
    return list(scores)[-1] if protocol == "published" else max(scores, key=scores.get)


def threshold_scores(probs: ArrayLike, protocol: str = "exact") -> dict[tuple[float, float], float]:
    """Inception score of the clips between each pair of thresholds; see `tune_thresholds`."""
    p = _probabilities(probs, "probs", at_least=10)  # two clips in the narrowest slice
    return {
        (float(lower), float(upper)): inception_score(p[kept(len(p), lower, upper)], protocol)
        for lower in LOWER
        for upper in UPPER
    }


def kept(n: int, lower: float, upper: float) -> slice:
    """The rows of n clips, in order of likelihood, between two shares."""
    return slice(int(lower * n), int(upper * n))


# ---- confidence -----------------------------------------------------------------------------


def bootstrap(
    score: Callable[..., float],
    *arrays: ArrayLike,
    n: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval (low, high) of score(*arrays), from n resamplings of their rows.

    Each array is resampled on its own. To keep one fixed, bind it:
    bootstrap(functools.partial(fid, real), generated). Repeated clips shift some scores (FID
    upwards): the interval is the spread around the mean of the resampled scores, laid around the
    score itself.
    """
    if n < 2 or not 0 < level < 1:
        raise ValueError(f"n={n}, level={level}: n must be at least 2, level between 0 and 1")
    rng = np.random.default_rng(seed)
    arrays = [_array(x, "arrays") for x in arrays]
    value = score(*arrays)
    resampled = [score(*(x[rng.integers(len(x), size=len(x))] for x in arrays)) for _ in range(n)]
    spread = np.array(resampled) - np.mean(resampled)
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return float(value + low), float(value + high)


# ---- checks of the arguments ----------------------------------------------------------------


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol}: expected {' or '.join(PROTOCOLS)}")


def _array(x: ArrayLike, name: str, at_least: int = 1) -> np.ndarray:
    """Rows as float64 (n, D), n >= at_least, D >= 1, finite."""
    if hasattr(x, "detach"):  # a tensor, on any device and of any precision
        x = x.detach().cpu().double().numpy()
    x = np.asarray(x)
    if x.dtype == object or np.iscomplexobj(x) or x.ndim != 2 or 0 in x.shape[1:]:
        raise ValueError(
            f"{name} of shape {x.shape} and type {x.dtype}: expected real numbers (clips, D)"
        )
    if len(x) < at_least:
        raise ValueError(f"{name} has {len(x)} clips: at least {at_least} are needed")
    x = x.astype(np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(x).all(1))):
        raise ValueError(
            f"{name} hold NaN or infinity in {len(bad)} of {len(x)} clips, the first is row "
            f"{bad[0]}: leave these clips out"
        )
    return x


def _features(real: ArrayLike, generated: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    real = _array(real, "real features", at_least=2)
    generated = _array(generated, "generated features", at_least=2)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real features have {real.shape[1]} dimensions, generated ones {generated.shape[1]}: "
            "both must come from the same classifier"
        )
    return real, generated


def _probabilities(x: ArrayLike, name: str, at_least: int = 2) -> np.ndarray:
    """Rows (n, C) that sum to one, exactly."""
    x = _array(x, name, at_least)
    total = x.sum(1)
    off = np.flatnonzero((abs(total - 1) > 1e-3) | (x < 0).any(1))
    if len(off):
        raise ValueError(
            f"{name}: row {off[0]} sums to {total[off[0]]:.4g} with a least entry of "
            f"{x[off[0]].min():.4g}; probabilities are >= 0 and sum to 1. Logits become such by "
            "a softmax, log-probabilities by exp"
        )
    return x / total[:, None]
