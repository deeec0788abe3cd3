"""Exact scores are what the definitions say; published ones what the published scripts printed.

`fixtures/metrics.npz` holds class probabilities (2000, 10) and features (2000, 64; as int8, times
1/16) of two made-up sets of clips, with the centres of a k-means clustering by scikit-learn. The
numbers below were recorded from state-spaces/s4 e757cef5 (models/sashimi/metrics.py) with scipy
1.17.1 and scikit-learn 1.9.1, and from float64 computations of the definitions.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics import am_score, bootstrap, fid, inception_score, modified_inception_score, ndb
from metrics.scores import (
    PROTOCOLS,
    SMALLEST,
    kept,
    kmeans,
    ndb_bins,
    split_halves,
    threshold_scores,
    tune_thresholds,
)


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parent / "fixtures" / "metrics.npz") as file:
        arrays = dict(file)
    for name in ("real_features", "generated_features"):
        arrays[name] = arrays[name].astype(np.float32) / 16
    return arrays


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def some_probs(n: int, seed: int = 0, sure: float = 3.0, classes: int = 10) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, classes))
    x[np.arange(n), rng.integers(classes, size=n)] += sure
    return softmax(x)


# ---- the recorded values ----------------------------------------------------------------------


def test_exact_scores_equal_the_float64_references(recorded):
    r = recorded
    assert fid(r["real_features"], r["generated_features"]) == pytest.approx(
        64.98065503071496, rel=1e-12
    )
    p, q = r["generated_probs"], r["real_probs"]
    assert inception_score(p) == pytest.approx(3.913506272547864, rel=1e-8)
    assert modified_inception_score(p) == pytest.approx(19.233243567458963, rel=1e-8)
    assert am_score(q, p) == pytest.approx(0.9418702412778678, rel=1e-8)
    features = r["real_features"], r["generated_features"]
    assert ndb(*features, centres=r["centres"]) == 0.68


def test_published_scores_are_those_of_the_published_script(recorded):
    r = recorded
    p, q = r["generated_probs"], r["real_probs"]
    assert fid(r["real_features"], r["generated_features"], "published") == pytest.approx(
        64.9806556859272, rel=1e-7
    )
    assert inception_score(p, "published") == pytest.approx(4.003898620605469, rel=1e-6)
    assert inception_score(q, "published") == pytest.approx(7.6528167724609375, rel=1e-6)
    assert modified_inception_score(p, "published") == pytest.approx(19.43035316467285, rel=1e-6)
    assert modified_inception_score(q, "published") == pytest.approx(188.7191925048828, rel=1e-6)
    assert am_score(q, p, "published") == pytest.approx(0.9418701529502869, rel=1e-6)
    features = r["real_features"], r["generated_features"]
    assert ndb(*features, centres=r["centres"], protocol="published") == 0.68


def test_published_threshold_tuning_takes_the_last_pair(recorded):
    p = recorded["generated_probs"]
    tune, score = split_halves(len(p), protocol="published")
    found = threshold_scores(p[tune], "published")
    assert np.allclose(list(found.values()), recorded["threshold_scores"], rtol=1e-6)
    assert tune_thresholds(p[tune], "published") == pytest.approx((0.4, 0.95))
    assert max(found, key=found.get) == pytest.approx((0.3, 0.95)), "what the script meant"
    assert sorted([*tune, *score]) == list(range(2000)) and len(tune) == 1000


def test_published_halves_come_after_the_pairs_of_the_test_clips():
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        rng.choice(np.arange(300), size=2, replace=True)
    tune = np.sort(rng.choice(64, size=32, replace=False))
    assert (split_halves(64, protocol="published", n_test=300)[0] == tune).all()


def test_scores_take_numpy_and_tensors_of_any_precision(recorded):
    r = recorded
    features, p = (r["real_features"], r["generated_features"]), r["generated_probs"]
    tensors = [torch.from_numpy(x) for x in features]
    assert fid(*tensors) == fid(*features) == fid(*(x.astype(np.float64) for x in features))
    assert inception_score(torch.from_numpy(p).requires_grad_()) == inception_score(p)
    half = torch.from_numpy(p).bfloat16()
    with pytest.raises(ValueError, match="sum"):
        inception_score(half * 1.1)
    assert isinstance(ndb(*tensors, centres=torch.from_numpy(r["centres"])), float)


# ---- FID ------------------------------------------------------------------------------------


def dense_fid(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it is written, with a complex matrix square root."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s1 + s2 - 2 * root))


def test_fid_is_its_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12))
    b = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 1
    assert fid(a, b) == pytest.approx(dense_fid(a, b), rel=1e-9)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-12)


@pytest.mark.parametrize("n", [200, 700, 2000])
def test_fid_of_1024_dimensions_is_exact_and_quick(n):
    """Clouds with the same principal axes: sum of (sigma1 - sigma2)^2, plus the means."""
    rng = np.random.default_rng(n)
    rank = min(n - 1, 1024)
    x = rng.normal(size=(n, rank))
    axes = np.linalg.qr(x - x.mean(0))[0] * math.sqrt(n - 1)  # covariance 1, mean 0
    turn = np.linalg.qr(rng.normal(size=(1024, rank)))[0]
    sigma1, sigma2 = rng.uniform(0, 2, rank), rng.uniform(0, 2, rank)
    shift = rng.normal(size=1024)
    a, b = axes * sigma1 @ turn.T, axes * sigma2 @ turn.T + shift
    truth = np.square(sigma1 - sigma2).sum() + np.square(shift).sum()
    begin = time.perf_counter()
    assert fid(a, b) == pytest.approx(truth, rel=1e-9)
    assert time.perf_counter() - begin < 8, "2 s on an idle machine of two cores"
    assert fid(a, a) == pytest.approx(0, abs=1e-9 * np.square(sigma1).sum())


def test_fid_of_singular_clouds_is_finite_and_right():
    rng = np.random.default_rng(0)
    flat = np.zeros((50, 8))
    flat[:, :2] = rng.normal(size=(50, 2))
    other = flat + np.eye(8)[7]  # the same cloud, one unit away in a direction without variance
    assert fid(flat, other) == pytest.approx(1, abs=1e-12)
    point = np.zeros((2, 8))
    assert fid(flat, point) == pytest.approx(
        np.square(flat.mean(0)).sum() + np.trace(np.cov(flat, rowvar=False))
    )
    assert fid(point, point) == 0


# ---- IS, mIS, AM ------------------------------------------------------------------------------


def test_scores_of_probabilities_are_their_definitions():
    p, q = some_probs(40), some_probs(30, seed=1)

    def kl(a, b):
        return (a * np.log(a / b)).sum()

    assert inception_score(p) == pytest.approx(np.exp(np.mean([kl(x, p.mean(0)) for x in p])))
    pairs = [kl(a, b) for a in p for b in p]
    assert modified_inception_score(p) == pytest.approx(np.exp(np.mean(pairs)), rel=1e-12)
    entropies = [-(x * np.log(x)).sum() for x in p]
    assert am_score(q, p) == pytest.approx(kl(q.mean(0), p.mean(0)) + np.mean(entropies))


def test_extremes_of_the_inception_score():
    assert inception_score(np.eye(10)) == pytest.approx(10), "sure of each, every class"
    assert inception_score(np.eye(10)[[3] * 7]) == 1, "one class only"
    assert inception_score(np.full((5, 10), 0.1)) == pytest.approx(1), "sure of nothing"
    assert am_score(np.eye(10), np.eye(10)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_zero_probabilities_are_the_limit_of_small_ones(protocol):
    rng = np.random.default_rng(0)
    p = some_probs(60)
    gone = rng.random(p.shape) < 0.3
    gone[np.arange(60), p.argmax(1)] = False

    def with_floor(floor):
        x = np.where(gone, 0, p)
        return np.where(gone, floor, x / x.sum(1, keepdims=True))

    for score in (inception_score, modified_inception_score, functools.partial(am_score, p)):
        at_zero = score(with_floor(0.0), protocol=protocol)
        assert at_zero == pytest.approx(score(with_floor(SMALLEST), protocol=protocol), rel=1e-6)
        assert math.isfinite(at_zero)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_class_that_is_never_generated_gives_finite_scores(protocol):
    p = some_probs(60)
    p[:, 4] = 0
    p /= p.sum(1, keepdims=True)
    real = some_probs(60, seed=1)
    assert math.isfinite(inception_score(p, protocol))
    assert math.isfinite(modified_inception_score(p, protocol))
    missing = am_score(real, p, protocol)
    assert am_score(real, some_probs(60), protocol) < missing < 87


# ---- NDB --------------------------------------------------------------------------------------


def blobs(shares: list[int], seed: int = 0) -> np.ndarray:
    """Clouds far apart, with so many clips each."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.normal(size=(n, 3)) * 0.01 + 10 * np.eye(10)[k][:3] + k for k, n in enumerate(shares)]
    )


def test_ndb_counts_the_clouds_whose_share_differs():
    real, same = blobs([100, 100, 100, 100]), blobs([50, 50, 50, 50], seed=1)
    assert ndb(real, same, bins=4) == 0
    assert ndb(real, blobs([100, 100, 20, 180], seed=1), bins=4) == 0.5
    real_share, share, differs = ndb_bins(real, blobs([100, 100, 0, 200]), bins=4)
    assert (real_share == 0.25).all() and sorted(share) == [0, 0.25, 0.25, 0.5]
    assert differs.sum() == 2


def test_ndb_of_two_halves_of_a_set_is_about_the_significance(recorded):
    x = recorded["real_features"][np.random.default_rng(0).permutation(2000)]
    assert ndb(x[:1000], x[1000:]) <= 0.15
    assert ndb(x, x) == 0
    assert ndb(x, recorded["generated_features"]) > 0.5


def test_kmeans_is_as_good_as_scikit_learns_and_repeatable(recorded):
    x = recorded["real_features"].astype(np.float64)

    def inertia(centres):
        return ((x[:, None] - np.asarray(centres)[None]) ** 2).sum(-1).min(1).mean()

    ours = kmeans(x, 50)
    assert inertia(ours) < inertia(recorded["centres"]) * 1.005
    assert (ours == kmeans(x, 50)).all() and (ours != kmeans(x, 50, seed=1)).any()


def test_kmeans_with_fewer_different_clips_than_bins():
    x = np.repeat(np.eye(3), 10, axis=0)
    assert ndb(x, x, bins=5) == 0


# ---- bootstrap, rejection -----------------------------------------------------------------------


def test_bootstrap_covers_the_true_value_as_often_as_it_says():
    def mean(x):
        return float(x.mean())

    hits = 0
    for seed in range(100):
        x = np.random.default_rng(seed).normal(size=(40, 1))
        low, high = bootstrap(mean, x, n=200, level=0.9, seed=seed)
        hits += low <= 0 <= high
    assert 80 <= hits <= 97


def test_bootstrap_lies_around_the_score_and_repeats(recorded):
    real, generated = recorded["real_features"], recorded["generated_features"][:400]
    score = functools.partial(fid, real)
    low, high = bootstrap(score, generated, n=20)
    assert low < fid(real, generated) < high
    assert (low, high) == bootstrap(score, generated, n=20)
    assert (low, high) != bootstrap(score, generated, n=20, seed=1)
    wide = bootstrap(score, generated[:100], n=20)
    assert wide[1] - wide[0] > high - low


def test_thresholds_keep_the_clips_that_the_classifier_is_sure_of():
    rng = np.random.default_rng(0)
    p = np.full((1000, 10), 0.1)  # the least and the most likely clips are noise
    p[300:850] = np.eye(10)[rng.integers(10, size=550)]
    assert tune_thresholds(p) == pytest.approx((0.3, 0.85))
    lower, upper = tune_thresholds(p)
    assert inception_score(p[kept(1000, lower, upper)]) > 9.5 > inception_score(p)


def test_halves_are_a_split_and_depend_on_the_seed():
    tune, score = split_halves(101, seed=3)
    assert len(tune) == 50 and sorted([*tune, *score]) == list(range(101))
    assert (np.diff(tune) > 0).all() and (np.diff(score) > 0).all()
    assert (tune != split_halves(101, seed=4)[0]).any()


# ---- the right way ------------------------------------------------------------------------------


def test_scores_fall_with_blur_and_with_a_dropped_class(recorded):
    """Probabilities closer to uniform and features further away: every score gets worse."""
    q, real = recorded["real_probs"], recorded["real_features"]
    rng = np.random.default_rng(0)
    rows = []
    for noise in (0.0, 0.1, 0.3, 0.6, 0.9):
        p = (1 - noise) * q + noise / 10
        x = real + noise * rng.normal(size=real.shape) * real.std()
        scores = (fid(real, x), -inception_score(p), -modified_inception_score(p), am_score(q, p))
        rows.append(scores)
    assert (np.diff(rows, axis=0) > 0).all(), rows
    labels = q.argmax(1)
    p, x = q[labels != 3], real[labels != 3]
    assert inception_score(p) < inception_score(q)
    assert am_score(q, p) > am_score(q, q) and fid(real, x) > fid(real, real)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: fid(x, x[:, :3]), "5 dimensions, generated ones 3"),
        (lambda p, x: fid(x, x[:1]), "generated features has 1 clips: at least 2"),
        (lambda p, x: fid(x, np.where(x == x[3], np.nan, x)), "row 3"),
        (lambda p, x: fid(x, x[0]), r"shape \(5,\)"),
        (lambda p, x: fid(x, "text"), "expected real numbers"),
        (lambda p, x: fid(x, x * 1j), "expected real numbers"),
        (lambda p, x: fid(x, np.zeros((4, 0))), "expected real numbers"),
        (lambda p, x: fid(x, x, protocol="fast"), "protocol=fast: expected exact or published"),
        (lambda p, x: inception_score(p[:1]), "at least 2"),
        (lambda p, x: inception_score(np.log(p)), "softmax"),
        (lambda p, x: inception_score(p * 1.01), "row 0 sums to 1.01"),
        (lambda p, x: modified_inception_score(x), "sum to 1"),
        (lambda p, x: am_score(p, some_probs(9, classes=3)), "10 classes, generated_probs 3"),
        (lambda p, x: ndb(x, x), "50 bins need at least 50 real clips, not 30"),
        (lambda p, x: ndb(x, x, bins=0), "at least 1"),
        (lambda p, x: ndb(x, x, centres=np.zeros((4, 3))), "centres have 3 dimensions"),
        (lambda p, x: tune_thresholds(p[:9]), "at least 10"),
        (lambda p, x: split_halves(3), "at least 4"),
        (lambda p, x: bootstrap(inception_score, p, n=1), "n=1"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    p, x = some_probs(30), np.random.default_rng(0).normal(size=(30, 5))
    with pytest.raises(ValueError, match=message):
        call(p, x)


def test_importing_metrics_loads_no_network():
    code = "import sys, metrics; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
