"""Mixed precision: float16 where it is safe and pays, float32 elsewhere, Casts in between.

    Conv(x, W)  ->  Cast(Conv(Cast(x, float16), float16(W)), float32)       the Casts only at the borders

Inputs and outputs of the model stay float32.  What stays float32 inside is said with its reason: ONNX or the
provider has no float16 for it, a value lies beyond what float16 holds (a constant; a tensor, on the samples), the
operator is one of those that overflow or round badly (`graphopt.half`; samples settle most of them), or the Casts
around it would cost more than it saves.  Which nodes convert is a minimum cut (`half_assignment`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label
from graphopt.half import CASTS_ON_CPU
from graphopt.registry import register
from graphopt.tensors import is_float

from .half_assignment import chosen, components
from .half_islands import MARK, Islands, Request, islands
from .half_survey import Survey, survey
from .half_writer import Constants, Writer

_CAST_OPSET = 6
"""Operator set from which Cast names its type by number."""


@register
@dataclass(frozen=True)
class ConvertFp16(Pass):
    """Compute in float16 where it is safe; inputs and outputs stay float32.

    Lossy, keeps the signature.  With samples, tensors that may pass 65504 / `headroom` stay float32, and so do those
    of which float16 keeps too few digits; without, operators that are known for it do.  `only` and `skip` are globs
    of node names.  Written for GPUs; ORT's CPU provider computes float16 in float32 between Casts, so that there the
    file gets smaller, not faster.  Source: IEEE 754 binary16; Micikevicius et al., "Mixed Precision Training" (2018).
    """

    name: ClassVar[str] = "convert-fp16"
    exactness: ClassVar[Any] = "lossy"
    scope: ClassVar[Any] = "model"
    stage: ClassVar[Any] = "lowering"

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    headroom: float = 2.0

    def __post_init__(self) -> None:
        if not self.headroom >= 1:
            raise ValueError(f"headroom must be at least 1, not {self.headroom}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per group of nodes that hand float16 to each other, and a near miss per island."""
        constants = Constants(ctx)
        changes = 0
        for inner in list(ctx.model.graphs()):
            for change in self._graph(inner, ctx, constants):
                changes += not change.blocked
                yield change
        if not changes and (reason := _already(ctx)):
            yield Change(str(graph.name), "float16", reason)
        constants.drop_unused()
        if changes and ctx.target.provider == "cpu":
            ctx.notes.append(CASTS_ON_CPU)

    def _graph(self, graph: gs.Graph, ctx: Context, constants: Constants) -> Iterator[Change]:
        refused = _refused(graph, ctx)
        if refused is not None:
            yield Change(str(graph.name), "float16", refused)
            return
        with Edit(graph) as edit:
            found = survey(edit, ctx)
            kept = islands(found, Request(self.only, self.skip, self.headroom))
            half = chosen(found, kept.kept)
            yield from _near_misses(found, kept, half)
            writer = Writer(found, constants)
            for group in components(found, half):
                yield _change(found, writer, group, kept)


def _refused(graph: gs.Graph, ctx: Context) -> str | None:
    """Return why a graph is not looked into."""
    if isinstance(graph, gs.Function):
        return "a function body has no types of its own: inline functions first"
    if int(graph.opset or ctx.model.opset) < _CAST_OPSET:
        return f"opset {graph.opset}: upgrade first"
    return None


def _already(ctx: Context) -> str | None:
    """Return why there is nothing to do in a model that has no float32 weights."""
    kinds = Counter(str(c.dtype) for c in ctx.model.constants() if is_float(c.dtype))
    narrow = {kind: count for kind, count in kinds.items() if kind in ("float16", "bfloat16")}
    if not narrow or kinds["float32"] > sum(narrow.values()):
        return None
    return f"its weights are {' and '.join(narrow)} already: what is float32 stays so"


def _near_misses(found: Survey, kept: Islands, half: set[int]) -> Iterator[Change]:
    for key, node in found.nodes.items():
        if key in kept.kept:
            yield Change(label(node), "float16", kept.kept[key])
        elif key not in half and node.op != "Cast":
            yield Change(label(node), "float16", "the Casts around it would cost more than it saves")


def _change(found: Survey, writer: Writer, group: list[gs.Node], kept: Islands) -> Change:
    def apply() -> None:
        writer.convert(group)
        for key in kept.measured:
            found.ctx.model.metadata(found.nodes[key])[MARK] = kept.kept[key]

    what = f"{len(group)} nodes to float16" if len(group) > 1 else "to float16"
    return Change(label(group[0]), what, "float16 holds their values, in half the bytes", apply)
