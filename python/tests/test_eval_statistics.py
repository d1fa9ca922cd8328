"""The intervals and tests against published values, other formulas and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from servoflow_eval import statistics

pytestmark = pytest.mark.filterwarnings("error")


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
@pytest.mark.parametrize(
    "k, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(k, n, low, high):
    assert statistics.wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing():
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError):
        statistics.wilson(3, 2)


def test_mcnemar_by_hand():
    assert statistics.mcnemar_exact(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.mcnemar_exact(8, 1) == statistics.mcnemar_exact(1, 8)
    assert statistics.mcnemar_exact(0, 0) == 1
    assert statistics.mcnemar_exact(5, 5) == 1


def constrained_score(wins, losses, n, delta):
    """Tango's statistic from its definition: the losses' probability that maximises the likelihood at this difference."""

    def minus_log_likelihood(q):
        p = q + delta
        rest = 1 - p - q
        return -_xlogy(wins, p) - _xlogy(losses, q) - _xlogy(n - wins - losses, rest)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = optimize.minimize_scalar(minus_log_likelihood, bounds=(low + 1e-12, high - 1e-12), method="bounded",
                                 options={"xatol": 1e-12}).x  # fmt: skip
    return (wins - losses - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


def _xlogy(x, y):
    return 0.0 if x == 0 else x * math.log(max(y, 1e-300))


@pytest.mark.parametrize(
    "wins, losses, n", [(1, 0, 44), (20, 40, 160), (0, 7, 30), (12, 12, 200), (30, 90, 2000)]
)
def test_tango_is_the_inverted_score_test(wins, losses, n):
    z = stats.norm.ppf(0.975)
    low, high = statistics.tango(wins, losses, n)
    assert low < (wins - losses) / n < high
    assert constrained_score(wins, losses, n, low) == pytest.approx(z, abs=2e-3)
    assert constrained_score(wins, losses, n, high) == pytest.approx(-z, abs=2e-3)


def test_tango_without_discordant_pairs():
    # Both restricted estimates are known then: the bound solves n d^2 = z^2 d (1 - ...), which is Wilson's for 0 of n.
    low, high = statistics.tango(0, 0, 100)
    assert (low, high) == pytest.approx(
        (-statistics.wilson(0, 100)[1], statistics.wilson(0, 100)[1]), abs=1e-6
    )
    assert statistics.tango(0, 0, 0) == (-1, 1)


def test_tango_mirrors():
    low, high = statistics.tango(3, 9, 50)
    assert statistics.tango(9, 3, 50) == pytest.approx((-high, -low))


def test_tango_covers():
    """4000 simulated experiments of 200 pairs, 5 % discordant: the interval covers in 95 %, give or take four sigma and
    the discreteness."""
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(200, [0.02, 0.04, 0.94], size=4000)
    known: dict = {}
    covered = 0
    for wins, losses, _ in drawn.tolist():
        interval = known.setdefault((wins, losses), statistics.tango(wins, losses, 200))
        covered += interval[0] <= -0.02 <= interval[1]
    assert 0.93 < covered / 4000 < 0.98


def test_bootstrap_agrees_with_scipys():
    rng = np.random.default_rng(3)
    values = rng.choice([-1, 0, 1], size=300, p=[0.1, 0.85, 0.05]).astype(np.int8)
    ours = statistics.paired_bootstrap({"t": values})
    theirs = stats.bootstrap((values.astype(float),), np.mean, n_resamples=20000, method="percentile",
                             rng=np.random.default_rng(5)).confidence_interval  # fmt: skip
    sigma = values.std() / math.sqrt(300)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.1 * sigma)


def test_bootstrap_keeps_the_tasks():
    """A task that always wins and one that always loses: nothing varies if tasks are not drawn again."""
    pairs = {"a": np.ones(20, np.int8), "b": -np.ones(20, np.int8)}
    assert statistics.paired_bootstrap(pairs) == (0.0, 0.0)
    assert statistics.paired_bootstrap({}) == (-1.0, 1.0)


def pairs_of(wins, losses, n):
    return {"t": np.array([1] * wins + [-1] * losses + [0] * (n - wins - losses), np.int8)}


def test_verdicts():
    assert statistics.compare(pairs_of(40, 50, 2000), 0.02).verdict == "not worse"
    assert statistics.compare(pairs_of(5, 8, 100), 0.02).verdict == "open"
    assert statistics.compare(pairs_of(5, 200, 2000), 0.02).verdict == "worse"
    assert (
        statistics.compare(pairs_of(0, 0, 20), 0.02).verdict == "open"
    )  # nothing seen, but too few to say so
    assert statistics.compare({}, 0.02).verdict == "open"
    with pytest.raises(ValueError):
        statistics.compare(pairs_of(0, 0, 5), 0)


def test_a_policy_that_is_worse_by_the_margin_rarely_passes():
    """2000 experiments of 500 pairs at a true difference of exactly the margin: 2.5 % may be called not worse."""
    rng = np.random.default_rng(11)
    drawn = rng.multinomial(500, [0.02, 0.04, 0.94], size=2000)
    known: dict = {}
    passed = 0
    for wins, losses, _ in drawn.tolist():
        verdict = known.setdefault((wins, losses), statistics.tango(wins, losses, 500)[0] > -0.02)
        passed += verdict
    assert passed / 2000 < 0.025 + 4 * math.sqrt(0.025 * 0.975 / 2000)


def test_median_interval():
    # n = 10: order statistics 2 and 9 cover the median with 97.9 % (any table of the sign test).
    assert statistics.median_interval(range(1, 11)) == (2, 9)
    assert statistics.median_interval([5.0]) == (5, 5)
    assert all(math.isnan(v) for v in statistics.median_interval([]))
