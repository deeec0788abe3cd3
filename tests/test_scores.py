"""Exact scores are what the definitions say; published ones what the published scripts printed.

`fixtures/metrics.npz` holds class probabilities (2000, 10) and features (2000, 64; as int8, times
1/16) of two made-up sets of clips, with the centres of a k-means clustering by scikit-learn. The
numbers below were recorded from state-spaces/s4 e757cef5 (models/sashimi/metrics.py) with scipy
1.17.1 and scikit-learn 1.9.1, and from float64 computations of the definitions.
"""

from __future__ import annotations

import functools
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics import am_score, bootstrap, fid, inception_score, modified_inception_score, ndb, scores
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

with np.load(Path(__file__).parent / "fixtures" / "metrics.npz") as file:
    RECORDED = dict(file)
REAL, GENERATED = (RECORDED[f"{x}_features"].astype(np.float32) / 16 for x in ("real", "generated"))
Q, P, CENTRES = RECORDED["real_probs"], RECORDED["generated_probs"], RECORDED["centres"]


def some_probs(n: int, seed: int = 0, classes: int = 10) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, classes))
    x[np.arange(n), rng.integers(classes, size=n)] += 3
    return scipy.special.softmax(x, axis=1)


@pytest.mark.parametrize(
    ("score", "arrays", "protocol", "value", "tolerance"),
    [(fid, (REAL, GENERATED), "exact", 64.98065503071496, 1e-12),
     (inception_score, (P,), "exact", 3.913506272547864, 1e-8),
     (modified_inception_score, (P,), "exact", 19.233243567458963, 1e-8),
     (am_score, (Q, P), "exact", 0.9418702412778678, 1e-8),
     (fid, (REAL, GENERATED), "published", 64.9806556859272, 1e-7),
     (inception_score, (P,), "published", 4.003898620605469, 1e-6),
     (inception_score, (Q,), "published", 7.6528167724609375, 1e-6),
     (modified_inception_score, (P,), "published", 19.43035316467285, 1e-6),
     (modified_inception_score, (Q,), "published", 188.7191925048828, 1e-6),
     (am_score, (Q, P), "published", 0.9418701529502869, 1e-6),
     (functools.partial(ndb, centres=CENTRES), (REAL, GENERATED), "exact", 0.68, 0),
     (functools.partial(ndb, centres=CENTRES), (REAL, GENERATED), "published", 0.68, 0)],
)  # fmt: skip
def test_scores_equal_the_recorded_ones(score, arrays, protocol, value, tolerance):
    assert score(*arrays, protocol=protocol) == pytest.approx(value, rel=tolerance)
    tensors = [torch.from_numpy(x).double() for x in arrays]
    assert score(*tensors, protocol=protocol) == pytest.approx(value, rel=max(tolerance, 1e-6))


def test_published_threshold_tuning_takes_the_last_pair():
    tune, score = split_halves(len(P), protocol="published")
    made = threshold_scores(P[tune], "published")
    assert np.allclose(list(made.values()), RECORDED["threshold_scores"], rtol=1e-6)
    assert tune_thresholds(P[tune], "published") == pytest.approx((0.4, 0.95))
    assert max(made, key=made.get) == pytest.approx((0.3, 0.95)), "what the script meant"
    assert sorted([*tune, *score]) == list(range(2000)) and len(tune) == 1000


def test_published_halves_come_after_the_pairs_of_the_test_clips():
    rng = np.random.RandomState(0)
    for _ in range(10_000):
        rng.choice(np.arange(300), size=2, replace=True)
    tune = np.sort(rng.choice(64, size=32, replace=False))
    assert (split_halves(64, protocol="published", n_test=300)[0] == tune).all()


@pytest.mark.parametrize("n", [200, 1200])
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
    begin = time.process_time()
    assert fid(a, b) == pytest.approx(truth, rel=1e-9)
    assert time.process_time() - begin < 8, "1 s on an idle machine of two cores"
    assert fid(a, a) == pytest.approx(0, abs=1e-9 * np.square(sigma1).sum())


def test_fid_of_singular_clouds_is_finite_and_right():
    flat = np.zeros((50, 8))
    flat[:, :2] = np.random.default_rng(0).normal(size=(50, 2))
    other = flat + np.eye(8)[7]  # the same cloud, one unit away in a direction without variance
    assert fid(flat, other) == pytest.approx(1, abs=1e-12)
    point = np.zeros((2, 8))
    spread = np.square(flat.mean(0)).sum() + np.trace(np.cov(flat, rowvar=False))
    assert fid(flat, point) == pytest.approx(spread)
    assert fid(point, point) == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_zero_probabilities_are_the_limit_of_small_ones(protocol):
    p = some_probs(60)
    gone = np.random.default_rng(0).random(p.shape) < 0.3
    gone[np.arange(60), p.argmax(1)] = False
    zeros = np.where(gone, 0, p)
    zeros = zeros / zeros.sum(1, keepdims=True)
    small = np.where(gone, SMALLEST, zeros)
    for score in (inception_score, modified_inception_score, functools.partial(am_score, p)):
        value = score(zeros, protocol=protocol)
        assert math.isfinite(value)
        assert value == pytest.approx(score(small, protocol=protocol), rel=1e-6)


def test_scores_fall_with_blur_and_with_a_dropped_class():
    """Probabilities closer to uniform and features further away: every score gets worse."""
    rng = np.random.default_rng(0)
    rows = []
    for noise in (0.0, 0.1, 0.3, 0.6, 0.9):
        p = (1 - noise) * Q + noise / 10
        x = REAL + noise * rng.normal(size=REAL.shape) * REAL.std()
        better = -inception_score(p), -modified_inception_score(p)
        rows.append((fid(REAL, x), am_score(Q, p), *better))
    assert (np.diff(rows, axis=0) > 0).all(), rows
    rest = Q.argmax(1) != 3
    assert inception_score(Q[rest]) < inception_score(Q)
    assert am_score(Q, Q[rest]) > am_score(Q, Q)
    assert fid(REAL, REAL[rest]) > fid(REAL, REAL)


def blobs(shares: list[int], seed: int = 0) -> np.ndarray:
    """Clouds far apart, with so many clips each."""
    place = np.repeat(np.arange(len(shares)), shares)
    noise = np.random.default_rng(seed).normal(size=(len(place), 3)) * 0.01
    return noise + 10 * np.eye(10)[place, :3] + place[:, None]


def test_ndb_counts_the_clouds_whose_share_differs():
    real = blobs([100, 100, 100, 100])
    assert ndb(real, blobs([50, 50, 50, 50], seed=1), bins=4) == 0
    assert ndb(real, blobs([100, 100, 20, 180], seed=1), bins=4) == 0.5
    real_share, share, differs = ndb_bins(real, blobs([100, 100, 0, 200]), kmeans(real, 4))
    assert (real_share == 0.25).all() and sorted(share) == [0, 0.25, 0.25, 0.5]
    assert differs.sum() == 2


def test_ndb_of_two_halves_of_a_set_is_about_the_significance():
    x = REAL[np.random.default_rng(0).permutation(2000)]
    assert ndb(x[:1000], x[1000:]) <= 0.15 and ndb(x, x) == 0 and ndb(x, GENERATED) > 0.5
    few = np.repeat(np.eye(3), 10, axis=0)  # fewer different clips than bins
    assert ndb(few, few, bins=5) == 0


def test_kmeans_is_as_good_as_scikit_learns_and_repeatable():
    def inertia(centres):
        return ((REAL[:, None].astype(float) - centres) ** 2).sum(-1).min(1).mean()

    ours = kmeans(REAL, 50)
    assert inertia(ours) < inertia(CENTRES) * 1.005
    assert (ours == kmeans(REAL, 50)).all() and (ours != kmeans(REAL, 50, seed=1)).any()


def test_bootstrap_covers_the_true_value_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        x = np.random.default_rng(seed).normal(size=(40, 1))
        low, high = bootstrap(np.mean, x, n=200, level=0.9, seed=seed)
        hits += low <= 0 <= high
    assert 80 <= hits <= 97
    assert bootstrap(np.mean, x, n=20) == bootstrap(np.mean, x, n=20)
    assert bootstrap(np.mean, x, n=20) != bootstrap(np.mean, x, n=20, seed=1)


def test_thresholds_keep_the_clips_that_the_classifier_is_sure_of():
    p = np.full((1000, 10), 0.1)  # the least and the most likely clips are noise
    p[300:850] = np.eye(10)[np.random.default_rng(0).integers(10, size=550)]
    thresholds = tune_thresholds(p)
    assert thresholds == pytest.approx((0.3, 0.85))
    assert inception_score(p[kept(1000, *thresholds)]) > 9.5 > inception_score(p)


def test_halves_are_a_split_and_depend_on_the_seed():
    tune, score = split_halves(101, seed=3)
    assert len(tune) == 50 and sorted([*tune, *score]) == list(range(101))
    assert (np.diff(tune) > 0).all() and (np.diff(score) > 0).all()
    assert (tune != split_halves(101, seed=4)[0]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda p, x: fid(x, x[:, :3]), "5 dimensions, generated ones 3"),
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
     (lambda p, x: inception_score(torch.from_numpy(p).bfloat16() * 1.1), "sum"),
     (lambda p, x: modified_inception_score(x), "sum to 1"),
     (lambda p, x: am_score(p, some_probs(9, classes=3)), "10 classes, generated_probs 3"),
     (lambda p, x: ndb(x, x), "50 bins need at least 50 real clips, not 30"),
     (lambda p, x: ndb(x, x, bins=0), "at least 1"),
     (lambda p, x: ndb(x, x, centres=np.zeros((4, 3))), "centres have 3 dimensions"),
     (lambda p, x: tune_thresholds(p[:9]), "at least 10"),
     (lambda p, x: split_halves(3), "at least 4"),
     (lambda p, x: bootstrap(inception_score, p, n=1), "n=1")],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call, message):
    p, x = some_probs(30), np.random.default_rng(0).normal(size=(30, 5))
    with pytest.raises(ValueError, match=message):
        call(p, x)


def test_scores_know_nothing_of_the_models():
    imports = re.findall(r"^(?:import|from) (\w+)", Path(scores.__file__).read_text(), re.M)
    assert set(imports) == {"__future__", "collections", "math", "numpy", "scipy"}
