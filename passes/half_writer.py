"""Makes nodes compute in float16: constants converted, Casts where the sides meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphopt.analysis.constants import constant_node, is_constant
from graphopt.analysis.shapes import TensorType
from graphopt.base import Context
from graphopt.edit import declare, drop_declared, is_output, make_node, remove_nodes, replace_output
from graphopt.half import FLOAT, HALF
from graphopt.importer import origin
from graphopt.ops import is_standard

from .half_islands import half_of
from .half_survey import Survey, is_indifferent, values_of
from .new_nodes import Maker


class Constants:
    """Constants of a model in float16: one for each float32 one, in the graph that has it.

    Args:
        ctx: the pass's context.
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.narrow: dict[int, gs.Tensor] = {}
        self._owners: dict[int, gs.Graph] = {}
        self._seen: list[gs.Tensor] = []  # an id is a tensor's own only as long as it lives
        for graph in ctx.model.graphs():
            held = origin(graph)
            self._owners.update((id(c), graph) for c in (held.declared if held else ()))
            self._owners.update((id(t), graph) for n in graph.nodes if n.op == "Constant" for t in n.outputs)

    def add(self, tensor: gs.Tensor, maker: Maker, values: np.ndarray[Any, Any]) -> gs.Tensor:
        """Return a new constant that stands beside another."""
        owner = self._owners.get(id(tensor), maker.edit.graph)
        if self.ctx.holds_initializers(owner):
            made = self.ctx.constant(f"{tensor.name}/float16", values)
            declare(owner, made)
        else:
            made = maker.constant(f"{tensor.name}/float16", values)
        if isinstance(made, gs.Constant) or owner is maker.edit.graph:
            self.narrow[id(tensor)] = made
        self._seen.append(tensor)
        return made

    def drop_unused(self) -> None:
        """Take out float32 constants that nothing reads any more."""
        for tensor in self._seen:
            owner = self._owners.get(id(tensor))
            if owner is None or is_output(owner, tensor) or any(t is tensor for n in tensor.outputs for t in n.inputs):
                continue
            if isinstance(tensor, gs.Constant):
                drop_declared(owner, {id(tensor)})
            elif (node := constant_node(tensor)) is not None:
                remove_nodes(owner, [node])


class Writer:
    """Converts groups of nodes of one graph; a group knows nothing of the others."""

    def __init__(self, found: Survey, constants: Constants) -> None:
        self.found = found
        self.edit = found.edit
        self.maker = Maker(found.edit, found.ctx)
        self.constants = constants
        self._narrow: dict[int, tuple[gs.Tensor, gs.Tensor]] = {}

    def convert(self, nodes: Sequence[gs.Node]) -> None:
        """Let these nodes compute in float16, who hand no float16 tensor to any other."""
        half = {id(n) for n in nodes}
        made = [t for n in nodes for t in self.found.outputs(n)]
        inside = {id(t) for t in made}
        for node in nodes:
            ports = self.found.ports[id(node)]
            for i in ports.inputs:
                if id(node.inputs[i]) not in inside:
                    self.edit.set_input(node, i, self._narrowed(node.inputs[i], half))
            if is_standard(node, "Cast"):
                node.attrs["to"] = int(TensorProto.FLOAT16)
            elif is_standard(node, "ConstantOfShape"):
                self._fill(node)
        for tensor in made:
            self._make(tensor, half)
        casts = [n for n in nodes if is_standard(n, "Cast")]
        casts += [n for t in made if t.dtype == HALF for n in self.edit.consumers(t) if _narrows(n)]
        for cast in casts:
            self._drop_idle(cast)

    def _narrowed(self, tensor: gs.Tensor, half: set[int]) -> gs.Tensor:
        """Return a float32 tensor in float16."""
        if is_constant(tensor):
            return self.constants.narrow.get(id(tensor)) or self._constant(tensor, half)
        if id(tensor) not in self._narrow:
            self._narrow[id(tensor)] = self._cast(tensor), tensor
        return self._narrow[id(tensor)][0]

    def _constant(self, tensor: gs.Tensor, half: set[int]) -> gs.Tensor:
        values = values_of(tensor)
        assert values is not None  # or what reads it were an island
        narrow = half_of(values)
        ours = all(id(n) in half and fits for n, fits in self._all_readers(tensor))
        if isinstance(tensor, gs.Constant) and ours and not self.edit.is_output(tensor):
            tensor.values = narrow
            return tensor
        return self.constants.add(tensor, self.maker, narrow)

    def _all_readers(self, tensor: gs.Tensor) -> list[tuple[gs.Node, bool]]:
        found = list(self.found.readers(tensor))
        others = [n for n in self.edit.consumers(tensor) if is_indifferent(n)]
        return [*found, *((n, False) for n in others)]

    def _cast(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return a new float16 tensor that a Cast makes of another."""
        made = self._like(tensor, f"{tensor.name}/float16", HALF)
        self._insert(tensor, made, int(TensorProto.FLOAT16))
        return made

    def _insert(self, source: gs.Tensor, made: gs.Tensor, to: int) -> None:
        place = source.inputs[0] if source.inputs and self.edit.is_local(source.inputs[0]) else None
        name = self.found.ctx.fresh_name(f"{made.name}/Cast")
        node = make_node("Cast", [source], [made], {"to": to}, name=name)
        self.edit.insert_after(place, [node])

    def _like(self, tensor: gs.Tensor, name: str, dtype: np.dtype[np.generic]) -> gs.Variable:
        return self.maker.tensor(name, TensorType(dtype, self.found.ctx.shapes.proved(tensor).shape))

    def _make(self, tensor: gs.Tensor, half: set[int]) -> None:
        """Let a tensor be made in float16, and its float32 readers have what they read."""
        others = [n for n, _ in self.found.readers(tensor) if id(n) not in half]
        named = self.edit.is_output(tensor) or any(not self.edit.is_local(n) for n in tensor.outputs)
        if named:  # the name stands for float32 outside
            self._rename(tensor, half)
            return
        shape = self.found.ctx.shapes.proved(tensor).shape
        tensor.dtype = HALF
        self.found.ctx.shapes.learn(tensor, TensorType(HALF, shape))
        if others:
            wide = self._like(tensor, f"{tensor.name}/float32", FLOAT)
            self._insert(tensor, wide, int(TensorProto.FLOAT))
            self._redirect(tensor, wide, {id(n) for n in others})

    def _rename(self, tensor: gs.Tensor, half: set[int]) -> None:
        """Make a float16 tensor of another name, and the float32 one of it."""
        producer = tensor.inputs[0]
        narrow = self._like(tensor, f"{tensor.name}/float16", HALF)
        replace_output(producer, tensor, narrow)
        self._redirect(tensor, narrow, half)
        self._insert(narrow, tensor, int(TensorProto.FLOAT))

    def _redirect(self, old: gs.Tensor, new: gs.Tensor, readers: set[int]) -> None:
        for node in self.edit.consumers(old):
            if id(node) in readers:
                for i, tensor in enumerate(list(node.inputs)):
                    if tensor is old:
                        self.edit.set_input(node, i, new)

    def _fill(self, node: gs.Node) -> None:
        value = node.attrs.get("value")
        array = np.zeros(1, np.float32) if value is None else np.asarray(value.values)
        node.attrs["value"] = gs.Constant("", half_of(array))

    def _drop_idle(self, cast: gs.Node) -> None:
        """Take out a Cast that now makes float16 of float16."""
        source = cast.inputs[0]
        is_half = HALF in (source.dtype, self.found.ctx.shapes.of(source).dtype)
        if is_half and self.edit.bypass(cast.outputs[0], source):
            self.edit.remove(cast)


def _narrows(node: gs.Node) -> bool:
    return is_standard(node, "Cast") and node.attrs.get("to") == TensorProto.FLOAT16
