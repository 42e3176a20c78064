"""Raise the model's operator set; the work is done by `graphopt.opset`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Pass
from graphopt.opset import upgrade
from graphopt.registry import register


@register
@dataclass(frozen=True)
class UpgradeOpset(Pass):
    """Raise the operator set to at least `to`; never lower it.

    A model with a node that cannot be upgraded stays as it is, and the report says why; with `required` that is
    an error.  Source: ONNX IR specification, "Operator Sets".
    """

    name: ClassVar[str] = "upgrade-opset"
    scope: ClassVar[Literal["graph", "model"]] = "model"

    to: int = 17
    required: bool = False

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose the upgrade as one change."""
        if ctx.model.opset >= self.to:
            return
        shapes, snapshot = ctx.shapes, ctx.model.snapshot()
        for read in (shapes.of, shapes.proved):  # while the model is as it came
            read(gs.Variable(""))

        def apply() -> None:
            result = upgrade(ctx.model, self.to, required=self.required, shapes=shapes, snapshot=snapshot)
            if result.reason is not None:
                ctx.notes.append(f"stays at opset {result.before}: {result.reason}")

        yield Change(where=graph.name, what=f"opset {ctx.model.opset} to {self.to}", apply=apply)
