"""What a user's typed code writes; CI checks it with mypy --strict against the built wheel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import graphopt
from graphopt.passes.upgrade_opset import UpgradeOpset


@graphopt.register
@dataclass(frozen=True)
class Nothing(graphopt.Pass):
    """Does nothing."""

    name: ClassVar[str] = "typed-nothing"
    strength: float = 0.5

    def run(self, graph: Any, ctx: graphopt.Context) -> Iterator[graphopt.Change]:
        yield graphopt.Change(where="", what="nothing", why=f"{ctx.seed}")


def use(path: str) -> bool:
    result: graphopt.Result = graphopt.optimize(path, measure=False)
    graphopt.Pipeline([UpgradeOpset(to=17), Nothing(strength=0.1)]).run(result.model)
    ratio: float = graphopt.bench(path, result.model).ratio
    return graphopt.validate(path, result.proto).ok and ratio < 1.0


def learn(student: str, teacher: str) -> float | None:
    settings = graphopt.DistillSettings(epochs=1.0)
    found = graphopt.distill(student, teacher=teacher, data="x.npz", settings=settings, measure=False)
    return found.report.stages[-1].loss
