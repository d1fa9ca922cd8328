"""What counts of successes allow one to say: intervals, paired tests, and the verdict "not worse by more than a margin".

Paired means: the same episode (scene and flow noise) under two arms. `wins` are episodes that the candidate solves and the
baseline does not, `losses` the other way round; the difference of success rates is (wins - losses) / n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Interval = tuple[float, float]


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval without continuity correction (Wilson 1927). (0, 1) where nothing was tried."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    ci = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(ci.low), float(ci.high)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test: the discordant pairs as throws of a fair coin. 1 without any."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def _score(wins: int, losses: int, n: int, delta: float) -> float:
    """Tango's score statistic for difference = `delta`, -1 < delta < 1; increasing `delta` lowers it."""
    a = 2 * n
    b = -wins - losses + (2 * n - wins + losses) * delta
    c = -losses * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # restricted estimate of P(loss)
    variance = n * (2 * q + delta * (1 - delta))
    difference = wins - losses - n * delta
    if variance <= 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / math.sqrt(variance)


def tango(wins: int, losses: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a paired difference of proportions (Tango, Statistics in Medicine 17, 1998).

    Holds its level with few discordant pairs, and is not empty with none, where a bootstrap says [0, 0].
    """
    if n <= 0:
        return -1.0, 1.0
    if wins < 0 or losses < 0 or wins + losses > n:
        raise ValueError(f"{wins} wins and {losses} losses of {n} pairs")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    estimate = (wins - losses) / n
    edge = 1 - 1e-12

    def bound(target: float, low: float, high: float) -> float:
        def f(delta: float) -> float:
            return _score(wins, losses, n, delta) - target

        return float(optimize.brentq(f, low, high, xtol=1e-12))

    low = -1.0 if _score(wins, losses, n, -edge) <= z else bound(z, -edge, min(estimate, edge))
    high = 1.0 if _score(wins, losses, n, edge) >= -z else bound(-z, max(estimate, -edge), edge)
    return low, high


def paired_bootstrap(
    pairs: Mapping[str, npt.NDArray[np.int8]], confidence: float = 0.95, resamples: int = 20000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean difference; episodes are drawn again within each task, tasks stay.

    `pairs[task]` int8 [episodes]: candidate minus baseline, -1, 0 or 1. Drawing n of n is drawing from a multinomial
    over the three values, so nothing is looped over.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    n = 0
    for task in sorted(pairs):
        difference = pairs[task]
        if difference.size == 0:
            continue
        share = np.array([(difference == v).mean() for v in (-1, 0, 1)])
        drawn = rng.multinomial(difference.size, share / share.sum(), size=resamples)
        total += drawn[:, 2] - drawn[:, 0]
        n += difference.size
    if n == 0:
        return -1.0, 1.0
    tail = (1 - confidence) / 2
    low, high = np.quantile(total / n, [tail, 1 - tail])
    return float(low), float(high)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Order statistics around the median that cover it with at least this confidence (from the binomial)."""
    ordered = np.sort(np.asarray(values, np.float64))
    n = ordered.size
    if n == 0:
        return math.nan, math.nan
    below = int(stats.binom.ppf((1 - confidence) / 2, n, 0.5))
    # P(at most below - 1 values lie under the median) <= (1 - confidence) / 2
    while below > 0 and stats.binom.cdf(below - 1, n, 0.5) > (1 - confidence) / 2:
        below -= 1
    low = max(below - 1, 0)
    return float(ordered[low]), float(ordered[n - 1 - low])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline on the episodes that both have. Rates and bounds are shares, not per cent."""

    n: int
    wins: int
    losses: int
    difference: float
    tango: Interval
    bootstrap: Interval
    p_mcnemar: float
    margin: float
    verdict: str  # "not worse", "worse" or "open"

    @property
    def discordant(self) -> float:
        """The share of episodes with different outcomes."""
        return (self.wins + self.losses) / self.n if self.n else 0.0


def compare(pairs: Mapping[str, npt.NDArray[np.int8]], margin: float, confidence: float = 0.95) -> Comparison:
    """The verdict uses Tango's interval: "not worse" if its lower bound lies above -margin, "worse" if its upper bound
    lies below -margin, else "open": more episodes would decide. One interval, so both cannot hold."""
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin} is not between 0 and 1")
    values = np.concatenate([np.asarray(pairs[t], np.int8) for t in sorted(pairs)] or [np.zeros(0, np.int8)])
    n, wins, losses = int(values.size), int((values == 1).sum()), int((values == -1).sum())
    interval = tango(wins, losses, n, confidence)
    verdict = "open"
    if interval[0] > -margin:
        verdict = "not worse"
    elif interval[1] < -margin:
        verdict = "worse"
    return Comparison(
        n=n,
        wins=wins,
        losses=losses,
        difference=(wins - losses) / n if n else 0.0,
        tango=interval,
        bootstrap=paired_bootstrap(pairs, confidence),
        p_mcnemar=mcnemar_exact(wins, losses),
        margin=margin,
        verdict=verdict,
    )
