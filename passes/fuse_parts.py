"""What is taken apart and put together again: Split, Slice and Concat along one axis.

    Concat(Split(x))                        ->  x                     all parts, in order
    Concat(Slice(x, a, b), Slice(x, b, c))  ->  Slice(x, a, c)
    Concat(Concat(x, y), z)                 ->  Concat(x, y, z)
    Split(Concat(x, y, z))                  ->  x, y, z               at the same borders; or Concats of some
    Split(Split(x))                         ->  Split(x)
    Split(x), one part used                 ->  Slice(x)
    Squeeze(Split(x)), each part one thick  ->  Gather(x, 0), Gather(x, 1) …
    Slice(x, 0, a), Slice(x, a, n)          ->  Split(x)              all of x, nothing twice

Each is about intervals: a part is its source, an axis, a start and an end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import Unknown, parameter, refers
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, replace_output
from graphopt.ops import is_standard
from graphopt.registry import register

from .new_nodes import Maker

_ROUNDS = 8
"""Times that the whole graph is looked at, while it changes."""


@register
@dataclass(frozen=True)
class FuseParts(Pass):
    """Undo Split against Concat, merge adjacent Slices, nested Concats and Splits; Slices that tile become a Split.

    Exact: elements are moved, never computed.  Refuses where a size along the axis is not known.
    """

    name: ClassVar[str] = "fuse-parts"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per Concat, Split, or tensor that is sliced up."""
        with Edit(graph) as edit:
            for _ in range(_ROUNDS):
                round_ = _Round(edit, ctx)
                yield from round_.changes()
                edit.sweep()
                if not round_.applied:
                    break
            yield from round_.near


@dataclass(frozen=True)
class _Part:
    """An interval of a tensor along an axis; `maker` cuts it out, None where it is all of it."""

    source: gs.Tensor
    axis: int
    start: int
    end: int
    maker: gs.Node | None = None

    def touches(self, other: _Part) -> bool:
        """Tell whether another interval begins where this one ends."""
        return self.source is other.source and self.axis == other.axis and self.end == other.start


class _Round:
    """One look at all nodes of a graph."""

    def __init__(self, edit: Edit, ctx: Context) -> None:
        self.edit = edit
        self.ctx = ctx
        self.make = Maker(edit, ctx)
        self.opset = int(edit.graph.opset)
        self.applied = False
        self.near: list[Change] = []
        self._parts: dict[int, dict[int, _Part]] = {}

    def changes(self) -> Iterator[Change]:
        """Propose changes; Splits first, which may take all of a Concat."""
        yield from self._by_rules({"Split": (self._of_concat, self._of_split, self._one_used, self._unstacked)})
        yield from self._by_rules({"Concat": (self._nested, self._adjacent)})
        for node in list(self.edit.graph.nodes):
            for tensor in node.outputs if not self.edit.removed(node) else ():
                yield from self._tiles(tensor)
        for tensor in self.edit.graph.inputs:
            yield from self._tiles(tensor)

    def _by_rules(self, rules: Mapping[str, Sequence[Callable[[gs.Node], Iterator[Change]]]]) -> Iterator[Change]:
        for node in list(self.edit.graph.nodes):
            if not is_standard(node) or refers(node):
                continue
            for rule in rules.get(node.op, ()):
                if not self.edit.removed(node):
                    yield from rule(node)

    # --- what is known

    def size(self, tensor: gs.Tensor, axis: int) -> int | None:
        """Return a tensor's proved size along an axis."""
        shape = self.ctx.shapes.proved(tensor).shape
        found = None if shape is None or axis >= len(shape) else shape[axis]
        return found if isinstance(found, int) else None

    def _is_used(self, tensor: gs.Tensor) -> bool:
        """Tell whether anybody reads a part, in time that does not grow with what else they read."""
        return bool(tensor.name) and (self.edit.is_output(tensor) or bool(self.edit.consumers(tensor)))

    def axis(self, node: gs.Node, default: int | None) -> int | None:
        """Return a node's axis from the left, None where it is not known."""
        found = node.attrs.get("axis", default)
        if not isinstance(found, int):
            return None
        rank = self.ctx.shapes.proved(node.inputs[0]).rank
        return found if found >= 0 else None if rank is None else found + rank

    def borders(self, node: gs.Node) -> list[int] | None:
        """Return where the parts of a Split begin, and where the last one ends."""
        axis = self.axis(node, 0)
        if axis is None:
            return None
        sizes = parameter(node, "split", self.opset)
        if isinstance(sizes, np.ndarray):
            return [0, *accumulate(int(s) for s in sizes.reshape(-1))]
        size, count = self.size(node.inputs[0], axis), len(node.outputs)
        if isinstance(sizes, Unknown) or size is None:
            return None
        step = -(-size // count)
        return [min(i * step, size) for i in range(count)] + [size]

    def part(self, tensor: gs.Tensor, axis: int) -> _Part | None:
        """Return which interval of what a tensor is, None where that is not known."""
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        found = None
        if node is not None and is_standard(node) and self.edit.is_local(node) and not refers(node):
            found = self._cut(node, tensor) if node.op in ("Split", "Slice") else None
        if found is not None and found.axis == axis:
            return found
        size = self.size(tensor, axis)
        return None if size is None else _Part(tensor, axis, 0, size)

    def _cut(self, node: gs.Node, tensor: gs.Tensor) -> _Part | None:
        if node.op == "Slice":
            return self._slice(node)
        if id(node) not in self._parts:
            self._parts[id(node)] = self._split_parts(node)
        return self._parts[id(node)].get(id(tensor))

    def _split_parts(self, node: gs.Node) -> dict[int, _Part]:
        """Return the interval of each output of a Split, by id; none where they are not known."""
        axis, borders = self.axis(node, 0), self.borders(node)
        if axis is None or borders is None or len(borders) != len(node.outputs) + 1:
            return {}
        ends = zip(node.outputs, pairwise(borders), strict=True)
        return {id(t): _Part(node.inputs[0], axis, start, end, node) for t, (start, end) in ends}

    def _slice(self, node: gs.Node) -> _Part | None:
        """Return the interval that a Slice of one axis takes, None where it takes anything else."""
        starts, ends, axes, steps = (parameter(node, n, self.opset) for n in ("starts", "ends", "axes", "steps"))
        shape = self.ctx.shapes.proved(node.inputs[0]).shape
        if not isinstance(starts, np.ndarray) or not isinstance(ends, np.ndarray) or shape is None:
            return None
        if starts.size != 1 or isinstance(axes, Unknown) or isinstance(steps, Unknown):
            return None
        if steps is not None and (steps != 1).any():
            return None
        axis = 0 if axes is None else int(axes.reshape(-1)[0]) % len(shape)
        size = shape[axis]
        if not isinstance(size, int):
            return None
        start, end, _ = slice(int(starts.reshape(-1)[0]), int(ends.reshape(-1)[0])).indices(size)
        return _Part(node.inputs[0], axis, start, end, node) if start < end else None

    # --- Concat

    def _nested(self, node: gs.Node) -> Iterator[Change]:
        axis = self.axis(node, None)
        inner = [n for t in node.inputs if (n := self._inner_concat(t, axis)) is not None]
        if axis is None or not inner:
            return

        def apply() -> None:
            self.applied = True
            gone = {id(n) for n in inner}
            flat: list[gs.Tensor] = []
            for tensor in node.inputs:
                nested = bool(tensor.inputs) and id(tensor.inputs[0]) in gone
                flat += list(tensor.inputs[0].inputs) if nested else [tensor]
            self._set_inputs(node, flat)
            for other in inner:
                self.edit.remove(other)

        yield Change(label(node), "Concat(Concat) -> Concat", "one axis", apply)

    def _inner_concat(self, tensor: gs.Tensor, axis: int | None) -> gs.Node | None:
        """Return a Concat of the same axis that only this one reads, once."""
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or not is_standard(node, "Concat") or not self.edit.is_local(node) or refers(node):
            return None
        reader = self.edit.sole_consumer(tensor)
        once = reader is not None and sum(t is tensor for t in reader.inputs) == 1
        return node if once and self.axis(node, None) == axis else None

    def _adjacent(self, node: gs.Node) -> Iterator[Change]:
        axis = self.axis(node, None)
        if axis is None or len(node.inputs) < 2:
            return
        runs = self._runs(node.inputs, axis)
        if len(runs) == len(node.inputs):
            return
        what = f"Concat of {len(node.inputs)} -> {len(runs)}"
        blocked = next((r for r in runs if len(runs) > 1 and not self._dies(r)), None)
        if blocked is not None:
            self.near.append(Change(label(node), what, "the parts are used elsewhere, too"))
            return

        def apply() -> None:
            self.applied = True
            tensors = [self._joined(run, node) for run in runs]
            if len(tensors) > 1:
                self._set_inputs(node, tensors)
            elif self.edit.bypass(node.outputs[0], tensors[0]):
                self.edit.remove(node)
            else:  # an input is an output of the graph: eliminate-identity knows what to do
                self._set_inputs(node, tensors)

        yield Change(label(node), what, "parts that stand side by side in their source", apply)

    def _runs(self, tensors: Sequence[gs.Tensor], axis: int) -> list[list[gs.Tensor]]:
        """Return the tensors in runs that are one interval each."""
        runs: list[list[gs.Tensor]] = []
        last: _Part | None = None
        for tensor in tensors:
            part = self.part(tensor, axis)
            cut = part is not None and part.maker is not None
            if last is not None and part is not None and cut and last.maker is not None and last.touches(part):
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
            last = part
        return runs

    def _dies(self, run: Sequence[gs.Tensor]) -> bool:
        """Tell whether nobody else reads the parts, so that joining them saves a copy; true for whole tensors."""
        if len(run) == 1:
            return True
        makers = {id(t.inputs[0]): t.inputs[0] for t in run}
        inside = {id(t) for t in run}
        made = [t for n in makers.values() for t in n.outputs]
        return all(self.edit.sole_consumer(t) is not None if id(t) in inside else not self._is_used(t) for t in made)

    def _joined(self, run: Sequence[gs.Tensor], node: gs.Node) -> gs.Tensor:
        """Return one tensor for a run."""
        if len(run) == 1:
            return run[0]
        axis = self.axis(node, None)
        assert axis is not None
        parts = [p for t in run if (p := self.part(t, axis)) is not None]
        whole = replace(parts[0], end=parts[-1].end)
        if whole.start == 0 and whole.end == self.size(whole.source, axis):
            return whole.source
        return self._sliced(whole, f"{run[0].name}/joined", [node])

    def _sliced(self, part: _Part, name: str, like: Sequence[gs.Node], out: gs.Tensor | None = None) -> gs.Tensor:
        """Return a new Slice of an interval."""
        known = self.ctx.shapes.proved(part.source)
        shape = None if known.shape is None else list(known.shape)
        if shape is not None:
            shape[part.axis] = part.end - part.start
        made = out or self.make.tensor(name, TensorType(known.dtype, None if shape is None else tuple(shape)))
        params = {"starts": [part.start], "ends": [part.end], "axes": [part.axis]}
        self.make.node("Slice", [part.source], [made], params=params, like=like)
        return made

    def _set_inputs(self, node: gs.Node, tensors: Sequence[gs.Tensor]) -> None:
        for i, tensor in enumerate(tensors):
            self.edit.set_input(node, i, tensor)
        self.edit.trim_inputs(node, len(tensors))

    # --- Split

    def _of_concat(self, node: gs.Node) -> Iterator[Change]:
        axis, borders = self.axis(node, 0), self.borders(node)
        inner = node.inputs[0].inputs[0] if len(node.inputs[0].inputs) == 1 else None
        if inner is None or not is_standard(inner, "Concat") or not self.edit.is_local(inner) or refers(inner):
            return
        if axis is None or borders is None or self.axis(inner, None) != axis:
            return
        groups = self._groups(inner.inputs, axis, borders)
        if groups is None or len(groups) != len(node.outputs):
            self.near.append(
                Change(label(node), "Split(Concat) -> parts", "the borders are not the same, or not known")
            )
            return
        if any(len(g) > 1 for g in groups) and self.edit.sole_consumer(node.inputs[0]) is None:
            self.near.append(Change(label(node), "Split(Concat) -> parts", "the whole is used elsewhere, too"))
            return
        reason = self._blocked(node, groups)
        if reason is not None:
            self.near.append(Change(label(node), "Split(Concat) -> parts", reason))
            return

        def apply() -> None:
            self.applied = True
            for old, group in zip(list(node.outputs), groups, strict=True):
                if not old.name:
                    continue
                if len(group) == 1:
                    self.edit.bypass(old, group[0])
                else:
                    replace_output(node, old, gs.Variable.empty())
                    self.make.node("Concat", group, [old], {"axis": axis}, like=[node])
            self.edit.remove(node)

        yield Change(label(node), "Split(Concat) -> parts", "it parts what was put together", apply)

    def _groups(self, parts: Sequence[gs.Tensor], axis: int, borders: Sequence[int]) -> list[list[gs.Tensor]] | None:
        """Return which inputs of a Concat lie between the borders, None where one crosses them."""
        groups: list[list[gs.Tensor]] = [[]]
        place = 0
        for tensor in parts:
            size = self.size(tensor, axis)
            if size is None:
                return None
            if groups[-1] and place == borders[len(groups)]:
                groups.append([])
            place += size
            groups[-1].append(tensor)
            if len(groups) >= len(borders) or place > borders[len(groups)]:
                return None
        return groups if place == borders[-1] else None

    def _blocked(self, node: gs.Node, groups: Sequence[Sequence[gs.Tensor]]) -> str | None:
        for old, group in zip(node.outputs, groups, strict=True):
            if old.name and len(group) == 1 and (reason := self.edit.why_not_bypass(old, group[0])):
                return reason
        outputs = [
            id(g[0]) for t, g in zip(node.outputs, groups, strict=True) if len(g) == 1 and self.edit.is_output(t)
        ]
        return "a part would be two outputs of the graph" if len(set(outputs)) < len(outputs) else None

    def _of_split(self, node: gs.Node) -> Iterator[Change]:
        """Merge the Splits of this one's parts into it."""
        axis, borders = self.axis(node, 0), self.borders(node)
        if axis is None or borders is None or len(borders) != len(node.outputs) + 1:
            return
        for i, tensor in enumerate(node.outputs):
            inner = self.edit.sole_consumer(tensor) if tensor.name else None
            if inner is None or not is_standard(inner, "Split") or not self.edit.is_local(inner) or refers(inner):
                continue
            finer = self.borders(inner)
            if finer is None or self.axis(inner, 0) != axis or len(finer) != len(inner.outputs) + 1:
                continue
            yield self._merged(node, i, inner, axis)
            return

    def _merged(self, node: gs.Node, i: int, inner: gs.Node, axis: int) -> Change:
        def apply() -> None:
            self.applied = True
            outer, finer = self.borders(node), self.borders(inner)
            assert outer is not None
            assert finer is not None
            sizes = [*np.diff(outer[: i + 1]), *np.diff(finer), *np.diff(outer[i + 1 :])]
            made = [*node.outputs[:i], *inner.outputs, *node.outputs[i + 1 :]]
            for old in made:
                for maker in list(old.inputs):
                    replace_output(maker, old, gs.Variable.empty())
            params = {"split": [int(s) for s in sizes]}
            self.make.node("Split", [node.inputs[0]], made, {"axis": axis}, params=params, like=[node, inner])
            self.edit.remove(node)
            self.edit.remove(inner)

        return Change(label(node), "Split(Split) -> Split", f"'{label(inner)}' parts one of its parts", apply)

    def _one_used(self, node: gs.Node) -> Iterator[Change]:
        axis, borders = self.axis(node, 0), self.borders(node)
        used = [i for i, t in enumerate(node.outputs) if self._is_used(t)]
        if axis is None or borders is None or len(used) != 1 or len(node.outputs) < 2 or self.opset < 10:
            return
        (i,) = used

        def apply() -> None:
            self.applied = True
            old = node.outputs[i]
            replace_output(node, old, gs.Variable.empty())
            part = _Part(node.inputs[0], axis, borders[i], borders[i + 1])
            self._sliced(part, old.name, [node], old)
            self.edit.remove(node)

        yield Change(label(node), "Split -> Slice", "one part is used", apply)

    def _unstacked(self, node: gs.Node) -> Iterator[Change]:
        """Take parts of one element each out of x directly, where that axis goes anyway."""
        axis, borders = self.axis(node, 0), self.borders(node)
        used = [(i, t) for i, t in enumerate(node.outputs) if self._is_used(t)]
        if axis is None or borders is None or not used or any(borders[i + 1] - borders[i] != 1 for i, _ in used):
            return
        readers = [self.edit.sole_consumer(t) for _, t in used]
        squeezes = [n for n in readers if n is not None and self._squeezes(n, axis)]
        if len(squeezes) < len(used):
            return

        def apply() -> None:
            self.applied = True
            for (i, _), squeeze in zip(used, squeezes, strict=True):
                old = squeeze.outputs[0]
                replace_output(squeeze, old, gs.Variable.empty())
                index = self.make.constant(f"{old.name}/index", np.asarray(borders[i], np.int64))
                self.make.node("Gather", [node.inputs[0], index], [old], {"axis": axis}, like=[squeeze, node])
                self.edit.remove(squeeze)
            self.edit.remove(node)

        yield Change(label(node), f"Split, {len(used)} Squeeze -> {len(used)} Gather", "one element each", apply)

    def _squeezes(self, node: gs.Node, axis: int) -> bool:
        """Tell whether a node of this graph is a Squeeze of one axis."""
        if not is_standard(node, "Squeeze") or not self.edit.is_local(node) or refers(node):
            return False
        axes = parameter(node, "axes", self.opset)
        rank = self.ctx.shapes.proved(node.inputs[0]).rank
        return isinstance(axes, np.ndarray) and rank is not None and [int(a) % rank for a in axes.reshape(-1)] == [axis]

    def _tiles(self, tensor: gs.Tensor) -> Iterator[Change]:
        """Propose a Split for Slices that take all of a tensor, each element once."""
        slices = [n for n in self.edit.consumers(tensor) if is_standard(n, "Slice") and n.inputs[0] is tensor]
        if len(slices) < 2:
            return
        parts = [p for n in slices if self.edit.is_local(n) and not refers(n) and (p := self._slice(n)) is not None]
        axes = {p.axis for p in parts}
        for axis in sorted(axes):
            chosen = sorted((p for p in parts if p.axis == axis), key=lambda p: p.start)
            tiling = chosen and chosen[0].start == 0 and chosen[-1].end == self.size(tensor, axis)
            if len(chosen) < 2 or not tiling or not all(a.touches(b) for a, b in pairwise(chosen)):
                continue
            yield self._split(tensor, axis, chosen)
            return

    def _split(self, tensor: gs.Tensor, axis: int, parts: Sequence[_Part]) -> Change:
        nodes = [p.maker for p in parts if p.maker is not None]

        def apply() -> None:
            self.applied = True
            outputs = [n.outputs[0] for n in nodes]
            for node, old in zip(nodes, outputs, strict=True):
                replace_output(node, old, gs.Variable.empty())
                self.edit.remove(node)
            params = {"split": [p.end - p.start for p in parts]}
            self.make.node("Split", [tensor], outputs, {"axis": axis}, params=params, like=nodes)

        return Change(label(nodes[0]), f"{len(nodes)} Slice -> Split", f"they tile '{tensor.name}'", apply)
