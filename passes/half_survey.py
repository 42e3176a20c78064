"""What of a graph can be float16 by its types, and which of its floats are computed from integers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant
from graphopt.analysis.quantized import dequantized
from graphopt.base import Context
from graphopt.edit import Edit
from graphopt.half import FLOAT, INDIFFERENT, PRECISE
from graphopt.ops import DEQUANTIZE, QUANTIZE, is_standard

from .half_ports import Ports, ports

Array = np.ndarray[Any, Any]

_DYNAMIC = 32
"""Size that a dynamic axis is taken to have."""


@dataclass
class Survey:
    """A graph as the conversion sees it.

    Attributes:
        ctx, edit: the pass's context, and the edits of the graph.
        nodes: nodes with float32 inputs or outputs that are not indifferent to their type, by id, in order.
        ports: what of them can be float16, by id; a node that is not here cannot.
        closed: why the others cannot, by id.
        whole: tensors computed from integers and constants alone, by id.
    """

    ctx: Context
    edit: Edit
    nodes: dict[int, gs.Node] = field(default_factory=dict)
    ports: dict[int, Ports] = field(default_factory=dict)
    closed: dict[int, str] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    _floats: dict[int, tuple[bool | None, gs.Tensor]] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """The graph's operator set."""
        return int(self.edit.graph.opset or self.ctx.model.opset)

    def is_float(self, tensor: gs.Tensor) -> bool | None:
        """Tell whether a tensor is float32, None where its type is not known."""
        held = self._floats.get(id(tensor))
        if held is None:
            dtype = self.ctx.shapes.proved(tensor).dtype
            dtype = self.ctx.shapes.of(tensor).dtype if dtype is None else dtype
            held = self._floats[id(tensor)] = (None if dtype is None else dtype == FLOAT), tensor
        return held[0]

    def settle(self, node: gs.Node, ports: Ports) -> None:
        """Take down that what the schema ties to a float32 tensor is one."""
        tied = [*(node.inputs[i] for i in ports.inputs), *(node.outputs[i] for i in ports.outputs)]
        self._floats.update((id(t), (True, t)) for t in tied)

    def elements(self, tensor: gs.Tensor) -> int:
        """Return how many elements a tensor has; a dynamic axis counts as 32."""
        held = self._sizes.get(id(tensor))
        if held is None:
            shape = self.ctx.shapes.proved(tensor).shape or ()
            held = 1
            for size in shape:
                held *= size if isinstance(size, int) else _DYNAMIC
            self._sizes[id(tensor)] = held
        return held

    def inputs(self, node: gs.Node) -> Iterator[gs.Tensor]:
        """Yield the inputs that can be float16, constants among them."""
        found = self.ports.get(id(node))
        yield from (node.inputs[i] for i in found.inputs) if found else ()

    def outputs(self, node: gs.Node) -> Iterator[gs.Tensor]:
        """Yield the outputs that can be float16."""
        found = self.ports.get(id(node))
        yield from (node.outputs[i] for i in found.outputs) if found else ()

    def maker(self, tensor: gs.Tensor) -> gs.Node | None:
        """Return the node of this graph that makes a tensor, and could make it in float16."""
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or not self.edit.is_local(node):
            return None
        return node if any(t is tensor for t in self.outputs(node)) else None

    def readers(self, tensor: gs.Tensor) -> Iterator[tuple[gs.Node, bool]]:
        """Yield what reads a tensor and is not indifferent to its type: the node, and whether it could in float16."""
        for node in self.edit.consumers(tensor):
            if is_indifferent(node) and self.edit.is_local(node):
                continue
            open_here = set(self.ports[id(node)].inputs) if id(node) in self.ports else set()
            places = {i for i, t in enumerate(node.inputs) if t is tensor}
            yield node, bool(places) and places <= open_here


def is_indifferent(node: gs.Node) -> bool:
    """Tell whether a node reads a float of either width at the same cost."""
    return is_standard(node) and node.op in INDIFFERENT


def survey(edit: Edit, ctx: Context) -> Survey:
    """Look at all nodes of a graph."""
    found = Survey(ctx, edit)
    for node in edit.graph.nodes:
        answer = ports(node, found.opset, found.is_float)
        if isinstance(answer, Ports) and _on_codes(edit, node):
            answer = "it computes on quantized values, perhaps in an integer kernel"
        if answer is not None:
            found.nodes[id(node)] = node
        if isinstance(answer, Ports):
            found.ports[id(node)] = answer
            found.settle(node, answer)
        elif answer is not None:
            found.closed[id(node)] = answer
        _note_whole(found, node)
    return found


def _on_codes(edit: Edit, node: gs.Node) -> bool:
    """Tell whether a node stands right behind DequantizeLinear or right before QuantizeLinear."""
    if any(dequantized(tensor) for tensor in node.inputs):
        return True
    return any(is_standard(reader, *QUANTIZE) for tensor in node.outputs for reader in edit.consumers(tensor))


def _note_whole(found: Survey, node: gs.Node) -> None:
    """Take down which outputs come of integers (or sizes) and constants alone."""
    if is_standard(node, *DEQUANTIZE):
        return  # codes stand for any number
    read = [t for t in node.inputs if t.name]
    from_integers = all(is_constant(t) or id(t) in found.whole or found.is_float(t) is False for t in read)
    if is_standard(node, "Shape", "Size") or (read and from_integers):
        found.whole.update(id(t) for t in node.outputs)


def precise(found: Survey) -> set[int]:
    """Return the ids of nodes that compute whole numbers, angles or places from integers, for who needs them so."""
    kept: set[int] = set()
    waiting: list[gs.Tensor] = []
    for node in found.edit.graph.nodes:
        places = PRECISE.get(node.op, ()) if is_standard(node) else ()
        waiting += [node.inputs[i] for i in places if i < len(node.inputs)]
        if is_standard(node, "Cast") and _makes_integers(node):
            waiting.append(node.inputs[0])
    while waiting:
        tensor = waiting.pop()
        node = tensor.inputs[0] if len(tensor.inputs) == 1 and id(tensor) in found.whole else None
        if node is None or id(node) in kept or not found.edit.is_local(node) or not found.is_float(tensor):
            continue
        kept.add(id(node))
        waiting += node.inputs
    return kept


def _makes_integers(cast: gs.Node) -> bool:
    try:
        return bool(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(cast.attrs.get("to", 0))).kind in "iu")
    except (KeyError, TypeError, ValueError):
        return False


def values_of(tensor: gs.Tensor) -> Array | None:
    """Return a float32 constant's values, None for anything else."""
    return array_of(tensor) if is_constant(tensor) else None
