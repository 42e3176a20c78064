"""Sequences of tensors whose length is known, taken apart again.

    SequenceAt(SplitToSequence(x, [2, 2]), 1)          ->  Split(x, [2, 2])[1]
    SequenceAt(SplitToSequence(x, keepdims=0), i)      ->  Gather(x, i)
    SequenceAt(SequenceConstruct(a, b), 1)             ->  b
    ConcatFromSequence(SequenceConstruct(a, b))        ->  Concat(a, b)

Exporters write chunk, split, unbind and lists of tensors that way; ORT copies every element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, refers, scalar_of
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node
from graphopt.ops import is_standard
from graphopt.registry import register


@register
@dataclass(frozen=True)
class UnpackSequences(Pass):
    """Replace sequences of known length by their elements.

    Exact, keeps the signature.  Refuses sequences that are read in any other way than by constant places, and
    splits whose number of parts is not known.
    """

    name: ClassVar[str] = "unpack-sequences"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per sequence, and per node that reads one element."""
        if int(graph.opset) < 13:
            return
        with Edit(graph) as edit:
            for node in list(graph.nodes):
                if is_standard(node, "SplitToSequence") and not refers(node):
                    yield from _split(edit, ctx, node)
                elif is_standard(node, "SequenceConstruct"):
                    yield from _constructed(edit, node)


def _readers(edit: Edit, sequence: gs.Tensor) -> list[tuple[gs.Node, int]] | str:
    """Return the SequenceAt nodes that read a sequence with their places, or why that is not all."""
    if edit.is_output(sequence):
        return "the graph returns the sequence"
    found = []
    for node in edit.consumers(sequence):
        place = scalar_of(node.inputs[1]) if is_standard(node, "SequenceAt") else None
        if not isinstance(place, int) or not edit.is_local(node):
            return f"{node.op} '{label(node)}' reads the sequence"
        found.append((node, place))
    return found


def _split(edit: Edit, ctx: Context, node: gs.Node) -> Iterator[Change]:
    source, what = node.inputs[0], "SplitToSequence -> Split"
    shape = ctx.shapes.proved(source).shape
    readers = _readers(edit, node.outputs[0])
    if isinstance(readers, str) or shape is None or not shape:
        yield Change(label(node), what, readers if isinstance(readers, str) else "the rank of its input is not known")
        return
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    given = len(node.inputs) > 1 and not node.inputs[1].is_empty()
    if not given and not node.attrs.get("keepdims", 1):
        for reader, place in readers:
            yield _taken(edit, ctx, reader, source, axis, place)
        return
    sizes = _sizes(node.inputs[1] if given else None, shape[axis])
    if sizes is None or not all(-len(sizes) <= place < len(sizes) for _, place in readers):
        yield Change(label(node), what, f"the number of parts of axis {axis} is not known")
        return

    def apply() -> None:
        made = [gs.Variable(ctx.fresh_name(f"{label(node)}/{i}"), source.dtype) for i in range(len(sizes))]
        parts = ctx.constant(f"{label(node)}/parts", np.array(sizes, np.int64))
        name = ctx.fresh_name(f"{label(node)}/split")
        split = make_node("Split", [source, parts], made, {"axis": axis}, name=name, like=[node])
        edit.insert_after(node, [split])
        for reader, place in readers:
            _becomes(edit, reader, made[place])

    yield Change(label(node), what, f"{len(sizes)} parts, {len(readers)} places read", apply)


def _taken(edit: Edit, ctx: Context, reader: gs.Node, source: gs.Tensor, axis: int, place: int) -> Change:
    def apply() -> None:
        index = ctx.constant(f"{label(reader)}/place", np.array(place, np.int64))
        gather = make_node("Gather", [source, index], [gs.Variable.empty()], {"axis": axis}, like=[reader])
        gather.name = reader.name
        edit.hand_over(gather, gather.outputs[0], reader.outputs[0])
        edit.replace(reader, [gather])

    return Change(label(reader), "SequenceAt -> Gather", f"it takes one slice of axis {axis}", apply)


def _becomes(edit: Edit, reader: gs.Node, element: gs.Tensor) -> None:
    """Make an element stand for what a SequenceAt gives."""
    if edit.bypass(reader.outputs[0], element):
        edit.remove(reader)
        return
    reader.op = "Identity"
    edit.set_input(reader, 0, element)
    edit.trim_inputs(reader, 1)


def _sizes(split: gs.Tensor | None, size: int | str | None) -> list[int] | None:
    """Return the sizes of the parts of an axis."""
    values = np.array(1) if split is None else array_of(split)
    if values is None:
        return None
    if values.ndim:
        return [int(v) for v in values]
    each = int(values)
    if not isinstance(size, int) or each < 1 or size < 1:
        return None
    return [min(each, size - start) for start in range(0, size, each)]


def _constructed(edit: Edit, node: gs.Node) -> Iterator[Change]:
    elements = list(node.inputs)
    sequence = node.outputs[0]
    for reader in edit.consumers(sequence) if not edit.is_output(sequence) else ():
        if not edit.is_local(reader):
            continue
        place = scalar_of(reader.inputs[1]) if is_standard(reader, "SequenceAt") else None
        if isinstance(place, int) and -len(elements) <= place < len(elements):

            def apply(reader: gs.Node = reader, element: gs.Tensor = elements[place]) -> None:
                _becomes(edit, reader, element)

            yield Change(label(reader), "SequenceAt -> the element", f"the sequence is '{label(node)}'", apply)
        elif is_standard(reader, "ConcatFromSequence") and not refers(reader) and not reader.attrs.get("new_axis", 0):

            def join(reader: gs.Node = reader) -> None:
                attrs = {"axis": reader.attrs["axis"]}
                concat = make_node("Concat", elements, [gs.Variable.empty()], attrs, name=reader.name, like=[reader])
                edit.hand_over(concat, concat.outputs[0], reader.outputs[0])
                edit.replace(reader, [concat])

            yield Change(label(reader), "ConcatFromSequence -> Concat", f"the sequence is '{label(node)}'", join)
