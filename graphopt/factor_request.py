"""What is asked of `factorize`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from graphopt.errors import SpecError
from graphopt.lossy import LossyRequest
from graphopt.quality import Bound

Goal: TypeAlias = Literal["bound", "latency", "rank", "energy", "weights"]


@dataclass(frozen=True, kw_only=True)
class FactorizeRequest(LossyRequest):
    """What is asked of `factorize`.

    Attributes:
        max_error: relative error: of the outputs with samples, of each weight without.
        rank: the rank of every layer.
        energy: part of its outputs' power that each layer keeps.
        target_latency: part of the lossless model's measured time.
        embeddings: whether tables that are looked up in get factors, too, for size.
        sampled: whether there are samples.
        only, skip: globs of layer names.

    Raises:
        SpecError: a number is out of range, two say the same thing, or nothing says how much.
    """

    max_error: float | None = None
    rank: int | None = None
    energy: float | None = None
    target_latency: float | None = None
    embeddings: bool = False
    sampled: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("max-error", self.max_error), ("energy", self.energy)):
            if value is not None and not 0.0 < value < 1.0:
                raise SpecError(f"{_TOLD[name]} lies between 0 and 1, not at {value:g}", at=f"--{name}")
        if self.target_latency is not None and not 0.05 <= self.target_latency < 1.0:
            raise SpecError(
                f"a target is the part of the time that stays, from 0.05 to 1, not {self.target_latency:g}",
                at="--target-latency", hint="--target-latency 0.8 takes 80 % of the time",
            )  # fmt: skip
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"a rank is 1 or more, not {self.rank}", at="--rank")
        self._check_together()

    def _check_together(self) -> None:
        fixed = [name for name, value in (("--rank", self.rank), ("--energy", self.energy)) if value is not None]
        if self.target_latency is not None:
            fixed.append("--target-latency")
        if self.max_error is not None and not self.sampled:
            fixed.append("--max-error")
        if len(fixed) > 1:
            raise SpecError(f"{fixed[0]} and {fixed[1]} both say how much", hint="leave out one of them")
        if not fixed and not self.sampled and self.bound.metric is None:
            raise SpecError(
                "nothing says how much may be lost, and there are no samples to find out on", at="--data",
                hint="give --data; without, --max-error 0.05 (of each weight), --energy 0.99 or --rank 64",
            )  # fmt: skip
        if self.target_latency is not None and not self.measure:
            raise SpecError("a latency is reached by measuring", at="--target-latency", hint="leave out --no-measure")

    @property
    def goal(self) -> Goal:
        """What says which ranks: the bound on the outputs or the metric, measured time, or the layers themselves."""
        if self.rank is not None:
            return "rank"
        if self.energy is not None:
            return "energy"
        if self.target_latency is not None:
            return "latency"
        return "weights" if self.max_error is not None and not self.sampled else "bound"

    @property
    def judged(self) -> Bound:
        """The bound on the outputs, the relative error among its limits."""
        if self.max_error is None or not self.sampled:
            return self.bound
        asked = -20.0 * math.log10(self.max_error)
        return replace(self.bound, min_sqnr=max(asked, self.bound.min_sqnr or asked))

    @property
    def noise(self) -> float:
        """Noise over signal power that the outputs may have, as far as the request says so; else infinite."""
        least = self.judged.min_sqnr
        return math.inf if least is None else float(10.0 ** (-least / 10.0))

    @property
    def named(self) -> bool:
        """Whether a bound was asked for by name, so that a choice of ranks by name is refused where it misses it."""
        return self.judged.names_numbers or self.judged.metric is not None


_TOLD = {"max-error": "a relative error", "energy": "the part of the power that is kept"}
