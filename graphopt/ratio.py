"""Paired timings -> their ratio with an interval that still holds when the noise comes in bursts.

Two things spoil the textbook interval of a benchmark.  Noise is correlated in time, so neighbouring pairs are
not independent.  And two sessions of the *same* model differ by up to 1 % for as long as they live (where their
weights came to lie in memory), which no number of repetitions averages out.  So pairs are taken in rounds of
fresh sessions, and the bootstrap draws twice: rounds, then blocks of consecutive pairs inside each round drawn.
The percentiles read off are those of Hesterberg's expanded interval (The American Statistician 69(4), 2015,
section 4.3), with the number of rounds as the sample size: few rounds give a wide interval, not a lucky one.  Where
they are too few for the confidence asked, Student's interval of the rounds' medians is a lower limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import SpecError

Times: TypeAlias = npt.NDArray[np.float64]

RESAMPLES = 2000
_CHUNK = 4_000_000  # elements of one bootstrap matrix: 32 MB


@dataclass(frozen=True)
class Ratio:
    """Time of B over time of A: below 1, B is faster.

    Attributes:
        median: over all pairs.
        low, high: ends of the interval.
        confidence: its level, 0.95 for 95 %.
        pairs: how many pairs were timed.
        rounds: in how many rounds of fresh sessions.
        conditions: what it was measured under (threads, provider), for the report.
    """

    median: float
    low: float
    high: float
    confidence: float = 0.95
    pairs: int = 0
    rounds: int = 1
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> float:
        """Width of the interval, as a part of the median."""
        return (self.high - self.low) / self.median

    @property
    def faster(self) -> bool:
        """Whether B is faster beyond doubt: the whole interval lies below 1."""
        return self.high < 1.0

    @property
    def slower(self) -> bool:
        """Whether B is slower beyond doubt: the whole interval lies above 1."""
        return self.low > 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "ratio": self.median,
            "interval": [self.low, self.high],
            "confidence": self.confidence,
            "pairs": self.pairs,
            "rounds": self.rounds,
            **self.conditions,
        }

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired(
    times_a: npt.ArrayLike | Sequence[Times],
    times_b: npt.ArrayLike | Sequence[Times],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ratio:
    """Return the median of b/a over pairs, with its interval.

    Args:
        times_a: seconds, one row per round of fresh sessions, or one flat row; rows may differ in length.
        times_b: the same for B; entry i was taken right beside entry i of A.
        confidence: level of the interval.
        seed: of the bootstrap.
        resamples: how many resamples the bootstrap draws.

    Raises:
        SpecError: the two do not pair up, are empty, or hold times that are not above zero.
    """
    logs = [_log_ratio(a, b) for a, b in zip(*_rows(times_a, times_b), strict=True)]
    if not 0.0 < confidence < 1.0:
        raise SpecError(f"a confidence lies between 0 and 1, not {confidence}")
    medians = _bootstrap(logs, np.random.default_rng(seed), resamples)
    tail = _tail(confidence, len(logs), sum(row.size for row in logs))
    centre = float(np.median(np.concatenate(logs)))
    low, high = (float(q) for q in np.quantile(medians, [tail, 1.0 - tail]))
    reach = _reach(logs, confidence)
    low, high = min(low, centre - reach), max(high, centre + reach)
    return Ratio(
        median=math.exp(centre), low=math.exp(min(low, centre)), high=math.exp(max(high, centre)),
        confidence=confidence, pairs=sum(row.size for row in logs), rounds=len(logs),
    )  # fmt: skip


def _reach(logs: list[Times], confidence: float) -> float:
    """Return how far the interval reaches, at least, where the rounds are too few for the bootstrap; else 0.

    A bootstrap never leaves the range of the rounds, which misses the true value with probability 2^(1 - rounds).
    For a confidence beyond that the interval is Student's, of the rounds' medians.
    """
    count = len(logs)
    if count < 2 or 2.0 ** (1 - count) <= 1.0 - confidence:
        return 0.0
    from scipy import stats  # noqa: PLC0415  (half a second, for those who need it)

    spread = float(np.std([np.median(row) for row in logs], ddof=1))
    return float(stats.t.isf((1.0 - confidence) / 2.0, count - 1)) * spread / math.sqrt(count)


def _rows(times_a: Any, times_b: Any) -> tuple[list[Times], list[Times]]:
    def rows(times: Any) -> list[Times]:
        given = list(times)
        nested = bool(given) and np.ndim(given[0]) > 0
        return [np.asarray(row, dtype=np.float64) for row in (given if nested else [given])]

    a, b = rows(times_a), rows(times_b)
    if [r.shape for r in a] != [r.shape for r in b]:
        raise SpecError("timings of A and B do not pair up", hint="one time of A beside each time of B")
    if not all(r.size for r in a):
        raise SpecError("there are no timings to compare")
    return a, b


def _log_ratio(a: Times, b: Times) -> Times:
    if not (np.all(a > 0) and np.all(b > 0)):
        raise SpecError("a time is not above zero", hint="time more runs per measurement")
    return np.asarray(np.log(b / a), dtype=np.float64)


def _tail(confidence: float, rounds: int, pairs: int) -> float:
    """Return the quantile at which the expanded percentile interval ends."""
    from scipy import stats  # noqa: PLC0415  (half a second, for those who need it)

    count = rounds if rounds > 1 else max(2, pairs // _block(pairs))
    t = stats.t.isf((1.0 - confidence) / 2.0, count - 1)
    return float(stats.norm.sf(t * math.sqrt(count / (count - 1))))


def _block(pairs: int) -> int:
    """Return how many consecutive pairs make a block: about the cube root, and even (AB BA belong together).

    Rows of two or three are cut into single pairs: with blocks of two they would be drawn as they are each time.
    """
    return 1 if pairs < 4 else max(2, 2 * round(math.cbrt(pairs) / 2))


def _bootstrap(logs: list[Times], rng: np.random.Generator, resamples: int) -> Times:
    total = sum(row.size for row in logs)
    step = max(1, min(resamples, _CHUNK // max(1, total)))
    found = [_resampled(logs, rng, min(step, resamples - done)) for done in range(0, resamples, step)]
    return np.concatenate(found)


def _resampled(logs: list[Times], rng: np.random.Generator, count: int) -> Times:
    """Return the medians of `count` resamples; each round drawn gives as many pairs as the longest has."""
    length = max(row.size for row in logs)
    chosen = rng.integers(len(logs), size=(count, len(logs)))
    sizes = np.array([row.size for row in logs])
    flat = np.concatenate(logs)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    block = np.minimum(_block(length), sizes)[chosen]
    size, start = sizes[chosen], starts[chosen]
    blocks = -(-length // int(block.min()))
    # circular blocks that begin at multiples of `unit`
    unit = min(2, _block(length))
    begins = unit * rng.integers(0, -(-size // unit)[..., None], size=(*chosen.shape, blocks))
    position = np.arange(length)
    which = np.minimum(position // block[..., None], blocks - 1)
    offset = position - which * block[..., None]
    inside = (np.take_along_axis(begins, which, axis=2) + offset) % size[..., None]
    return np.asarray(np.median(flat[start[..., None] + inside].reshape(count, -1), axis=1))
