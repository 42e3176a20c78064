"""A user's task metric on two models: `file.py:function`, called with `predict(feeds) -> outputs`, higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from graphopt.data import call_user, load_function
from graphopt.errors import DataError, SpecError

Predict = Callable[[Mapping[str, Any]], dict[str, Any]]

Metric: TypeAlias = "str | Callable[..., Any]"
"""`file.py:function`, or a function: gets predict, returns a number or scores; higher is better."""

RESAMPLES = 2000

NORMAL_95 = 1.96
"""Standard errors on either side of a mean that a 95 % interval takes."""


def metric_of(given: Metric | None) -> tuple[Callable[..., Any] | None, str]:
    """Return a metric as a function, and its name.

    Raises:
        DataError: there is no such file or function.
    """
    if given is None:
        return None, ""
    return (load_function(given), given) if isinstance(given, str) else (given, getattr(given, "__name__", "function"))


@dataclass(frozen=True)
class Drop:
    """The largest drop that is accepted: in the metric's units, or a fraction of the original's metric."""

    amount: float
    is_fraction: bool = False

    @classmethod
    def parse(cls, text: str | float | int) -> Drop:
        """Read `0.01` (units) or `1%` (relative).

        Raises:
            SpecError: neither.
        """
        shown = str(text).strip()
        number = shown.removesuffix("%")
        try:
            amount = float(number)
        except ValueError as error:
            raise SpecError(f"a drop is a number or a percentage, not '{text}'", hint="0.01, or 1%") from error
        if not math.isfinite(amount) or amount < 0:
            raise SpecError(f"a drop is zero or more, not '{text}'")
        return cls(amount / 100, True) if number != shown else cls(amount)

    def allowed(self, reference: float) -> float:
        """Return the drop in units, for an original of this metric."""
        return self.amount * abs(reference) if self.is_fraction else self.amount


@dataclass(frozen=True)
class Evaluation:
    """Metric of both models; `drop` = reference - candidate.

    `interval` is the 95 % interval of the drop from a paired bootstrap over items, None when the function
    returns one number; `items` is then None too.
    """

    reference: float
    candidate: float
    drop: float
    allowed: float | None
    items: int | None
    interval: tuple[float, float] | None
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)

    @property
    def sure(self) -> bool:
        """Whether the drop keeps its bound with a standard error to spare: what chose among candidates by few items.

        On other items the drop is another one; of a candidate that just keeps the bound on these, half miss it there.
        No more is asked than no drop at all.
        """
        if self.allowed is None or self.interval is None:
            return self.ok
        error = (self.interval[1] - self.interval[0]) / (2 * NORMAL_95)
        return self.ok and self.drop <= max(self.allowed - error, min(self.allowed, 0.0))

    def failure(self) -> str:
        """Return in words what was missed."""
        fall = f"the metric falls from {self.reference:.6g} to {self.candidate:.6g}"
        if self.ok and self.interval is not None:
            spread = f"{self.interval[0]:.3g} to {self.interval[1]:.3g}"
            return f"{fall}: {self.drop:.3g} ({spread}), too near to the {self.allowed:.3g} allowed"
        return f"{fall}: {self.drop:.3g}, {self.allowed:.3g} allowed"


def evaluate_pair(
    function: Callable[[Predict], Any],
    name: str,
    reference: Predict,
    candidate: Predict,
    *,
    max_drop: str | float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Run the metric on both models.

    Args:
        function: gets `predict`, returns a number or a 1-D array with a score per item (the mean is the metric).
        name: of the function, for messages.
        reference: the original's predict.
        candidate: the other's.
        max_drop: see `Drop.parse`; None accepts any.
        seed: of the bootstrap.

    Raises:
        DataError: the function fails, or returns something else.
        SpecError: `max_drop` is not understood.
    """
    limit = None if max_drop is None else Drop.parse(max_drop)
    first, second = (_scores(call_user(function, name, p), name) for p in (reference, candidate))
    if first.shape != second.shape:
        raise DataError(
            f"the function scored {first.size} items for one model and {second.size} for the other", at=name,
            hint="it must score the same items in the same order",
        )  # fmt: skip
    a, b = float(first.mean()), float(second.mean())
    allowed = None if limit is None else limit.allowed(a)
    per_item = first.ndim == 1
    interval = _interval(first - second, seed) if per_item else None
    ok = allowed is None or a - b <= allowed + 1e-12 * max(1.0, abs(a))  # 0.9 - 0.8 is more than 0.1
    return Evaluation(a, b, a - b, allowed, first.size if per_item else None, interval, ok)


def _scores(value: Any, name: str) -> np.ndarray[Any, Any]:
    try:
        scores = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            "the function returns no number", at=name, hint="return a float, or a 1-D array of scores"
        ) from error
    if scores.ndim > 1 or scores.size == 0:
        raise DataError(
            f"the function returns an array of shape {list(scores.shape)}",
            at=name,
            hint="return a float, or a 1-D array of scores",
        )
    if not np.isfinite(scores).all():
        raise DataError("the function returns NaN or infinity", at=name)
    return scores


def _interval(drops: np.ndarray[Any, Any], seed: int) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of the mean drop."""
    from scipy import stats  # noqa: PLC0415  (half a second, for those who need it)

    if drops.size < 2:
        return None
    if np.ptp(drops) == 0:
        return float(drops[0]), float(drops[0])
    result = stats.bootstrap(
        (drops,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=np.random.default_rng(seed),
        batch=max(1, 10_000_000 // drops.size),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
