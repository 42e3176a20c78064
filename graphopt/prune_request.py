"""What is asked of `prune`, and the passes that do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from graphopt import spec
from graphopt.errors import SpecError
from graphopt.lossy import LossyRequest

Reconstruct: TypeAlias = Literal["least-squares", "bias", "none"]
Schedule: TypeAlias = Literal["linear", "cubic"]
Goal: TypeAlias = Literal["ratio", "macs", "params", "latency", "bound"]

SCHEDULES: Mapping[str, Any] = {
    "linear": lambda part: part,
    "cubic": lambda part: 1.0 - (1.0 - part) ** 3,
}
"""Part of the steps done -> part of the cut made.  Cubic: Zhu, Gupta, "To prune, or not to prune" (2017), eq. 1."""

MOST = 0.95
"""Part that is removed at most: what is left of a network beyond that is no network."""


@dataclass(frozen=True, kw_only=True)
class PruneRequest(LossyRequest):
    """What is asked of `prune`, checked.

    Attributes are the arguments of `graphopt.prune`; of `ratio` and the targets at most one is given.
    """

    ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    drop_blocks: int = 0
    criterion: str | None = None
    scope: Literal["global", "local"] | None = None
    aggregate: str | None = None
    reconstruct: Reconstruct | None = None
    steps: int = 1
    schedule: Schedule = "cubic"
    round_to: int = 0
    least: int = 1
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    normalization: bool = False
    gradients: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "target_macs", "target_params", "target_latency") if self._of(name)]
        if len(given) > 1:
            raise SpecError(
                f"{_option(given[0])} and {_option(given[1])} say the same thing twice", hint="leave out one of them"
            )
        if self.ratio is not None and not 0.0 < self.ratio <= MOST:
            raise SpecError(
                f"a ratio is the part of the channels that goes, above 0 and up to {MOST:g}, not {self.ratio:g}",
                at="--ratio", hint="--ratio 0.3 removes 30 %",
            )  # fmt: skip
        for name in given:
            value = self._of(name)
            if name != "ratio" and value is not None and not 1.0 - MOST <= value[0] + 1e-9 <= 1.0 + 1e-9:
                raise SpecError(
                    f"a target is the part that stays, from {1.0 - MOST:.2g} to 1, not {value[0]:g}", at=_option(name),
                    hint=f"{_option(name)} 0.7 keeps 70 %",
                )  # fmt: skip
        self._check_choices()

    def _check_choices(self) -> None:
        for name, kinds in (("reconstruct", Reconstruct), ("schedule", Schedule)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kinds):
                raise SpecError(f"{name} is one of {', '.join(get_args(kinds))}, not {value!r}", at=_option(name))
        if self.scope not in (None, "global", "local"):
            raise SpecError(f"scope is global or local, not {self.scope!r}", at="--scope")
        for name, least in (("steps", 1), ("least", 1), ("round_to", 0), ("drop_blocks", 0)):
            if getattr(self, name) < least:
                raise SpecError(f"{_option(name)} is {least} or more, not {getattr(self, name)}", at=_option(name))
        if self.target_latency is not None and (self.steps > 1 or self.drop_blocks):
            raise SpecError(
                "a latency is aimed at in one cut, of channels alone", at="--target-latency",
                hint="leave out --steps and --drop-blocks; or cut what they cut first, then aim at the latency",
            )  # fmt: skip
        if self.gradients is not None and self.criterion not in BY_GRADIENTS:
            raise SpecError(
                "gradients rank channels by taylor or gradient", at="--gradients", hint="--criterion taylor"
            )
        if self.target_latency is not None and not self.measure:
            raise SpecError("a latency is reached by measuring", at="--target-latency", hint="leave out --no-measure")

    def _of(self, name: str) -> tuple[float] | None:
        value = getattr(self, name)
        return None if value is None else (value,)

    @property
    def goal(self) -> Goal:
        """What says how much is cut; `bound`: as much as the accuracy that is asked for allows."""
        for name, goal in GOALS.items():
            if getattr(self, name) is not None:
                return goal
        return "ratio" if self.drop_blocks else "bound"

    @property
    def removed(self) -> float:
        """The part that goes, of what the goal says."""
        if self.goal == "ratio":
            return self.ratio or 0.0
        kept = {"macs": self.target_macs, "params": self.target_params, "latency": self.target_latency}[self.goal]
        assert kept is not None
        return 1.0 - kept


BY_GRADIENTS = ("taylor", "gradient")
"""Criteria that look at gradients, and only they do."""

WITHOUT_AGGREGATE = ("random", "obs")
"""Criteria that score units as a whole."""

GOALS: Mapping[str, Goal] = {
    "ratio": "ratio", "target_macs": "macs", "target_params": "params", "target_latency": "latency",
}  # fmt: skip
"""Argument -> the goal that it sets."""


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Recipe:
    """The passes that cut a canonical model.

    Attributes:
        request: what is asked.
        sampled: whether there are samples.
    """

    request: PruneRequest
    sampled: bool

    @property
    def criterion(self) -> str:
        """What units are ranked by."""
        if self.request.criterion is not None:
            return self.request.criterion
        return "obs" if self.sampled and self.request.goal != "ratio" else "l2"

    @property
    def scope(self) -> str:
        """Whether all groups are ranked together; a plain ratio is of each group."""
        return self.request.scope or ("local" if self.request.goal == "ratio" else "global")

    @property
    def method(self) -> str:
        """How what remains is fitted to what was."""
        return self.request.reconstruct or ("least-squares" if self.sampled else "none")

    def blocks(self) -> tuple[spec.Step, ...]:
        """Return the passes that drop whole blocks."""
        if not self.request.drop_blocks:
            return ()
        options: dict[str, object] = {"amount": self.request.drop_blocks}
        return (spec.PassStep("drop-blocks", options),)

    def cut(self, removed: float, of: str) -> tuple[spec.Step, ...]:
        """Return the passes that remove a part of the channels, parameters or MACs, as the schedule says."""
        request, found = self.request, list(self.blocks())
        for number in range(1, request.steps + 1):
            part = removed * SCHEDULES[request.schedule](number / request.steps)
            found.append(self._prune({"ratio": round(part, 6), "of": of}))
            found += self._reconstruct()
        return tuple(found if removed > 0 else [*self.blocks(), *self._reconstruct()])

    def counts(self, counts: Mapping[str, int]) -> tuple[spec.Step, ...]:
        """Return the passes that leave so many units of each group, and fit what remains."""
        return (*self.blocks(), self._prune({"counts": _named(counts)}), *self._reconstruct())

    def quick(self, counts: Mapping[str, int]) -> tuple[spec.Step, ...]:
        """Return the passes that leave so many units of each group, whichever: for timing."""
        return (*self.blocks(), self._prune({"counts": _named(counts), "criterion": "l2"}))

    def _prune(self, how: Mapping[str, object]) -> spec.PassStep:
        request = self.request
        options: dict[str, object] = {
            "criterion": self.criterion, "spread": self.scope, "round_to": request.round_to, "least": request.least,
            "only": request.only, "skip": request.skip, "normalization": request.normalization, **how,
        }  # fmt: skip
        if request.aggregate is not None:
            options["aggregate"] = request.aggregate
        return spec.PassStep("prune-channels", options)

    def _reconstruct(self) -> tuple[spec.Step, ...]:
        if self.method == "none":
            return ()
        return (spec.PassStep("reconstruct-weights", {"method": self.method}),)


def _named(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"{name}={count}" for name, count in counts.items())
