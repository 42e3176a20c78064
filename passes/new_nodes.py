"""Makes the nodes, tensors and constants that passes put into a graph, as its operator set has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.shapes import TensorType
from graphopt.base import Context
from graphopt.edit import Edit, make_node
from graphopt.ops import MOVED_TO_INPUT

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Maker:
    """Makes what goes into one graph.

    Attributes:
        edit: the edits of the graph under way.
        ctx: names, and the types of new tensors.
    """

    edit: Edit
    ctx: Context

    @property
    def opset(self) -> int:
        """The graph's operator set."""
        return int(self.edit.graph.opset)

    def tensor(self, name: str, known: TensorType) -> gs.Variable:
        """Return a new tensor of a known type."""
        shape = None if known.shape is None else list(known.shape)
        made = gs.Variable(self.ctx.fresh_name(name), known.dtype, shape)
        self.ctx.shapes.learn(made, known)
        return made

    def constant(self, name: str, values: Array) -> gs.Tensor:
        """Return a new constant: an initializer where the graph may have some, else a Constant node's output."""
        values = np.asarray(values)
        if self.ctx.holds_initializers(self.edit.graph):
            return self.ctx.constant(name, values)
        tensor = self.tensor(name, TensorType(values.dtype, tuple(values.shape)))
        node = make_node("Constant", [], [tensor], {"value": gs.Constant("", values)}, name=tensor.name)
        self.edit.insert_after(None, [node])
        return tensor

    def node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: Sequence[gs.Tensor],
        attrs: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Sequence[int]] | None = None,
        like: Sequence[gs.Node] = (),
    ) -> gs.Node:
        """Put in a node of the standard domain.

        Args:
            op: operator.
            inputs: its inputs without parameters.
            outputs: what it makes; the tensors' former producers must have let go of them.
            attrs: attributes.
            params: parameters by name: attributes or inputs, as the operator set has them.
            like: nodes that it stands for; it goes where the first one is.
        """
        given, held = list(inputs), dict(attrs or {})
        for name, values in (params or {}).items():
            since, index = MOVED_TO_INPUT.get((op, name), (1 << 30, 0))
            if self.opset < since:
                held[name] = [int(v) for v in values]
                continue
            while len(given) <= index:
                given.append(gs.Variable.empty())
            given[index] = self.constant(f"{outputs[0].name}/{name}", np.asarray(values, np.int64))
        name = self.ctx.fresh_name(f"{outputs[0].name}/{op}")
        node = make_node(op, given, outputs, held, name=name, like=like)
        place = next((n for n in like if self.edit.is_local(n)), None)
        self.edit.insert_after(place, [node])
        return node
