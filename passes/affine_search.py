"""Looks for a way to do away with an affine map: a plan, in which every node it reaches takes it or hands it on.

A backward task stands at a tensor whose maker shall do the map; a forward task at a tensor whose readers shall
all do it.  Each is answered by the rules of `affine_weights` (which take maps) and `affine_flow` (which pass
them on), or by another affine map, with which it merges.  Nothing is edited before a whole plan stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import MAX_ELEMENTS, Affine
from graphopt.analysis.constants import array_of, is_constant
from graphopt.edit import label, replace_output, replace_uses
from graphopt.ops import is_standard
from graphopt.tensors import is_float

from . import affine_flow, affine_joins, affine_weights
from .affine_rule import Carried, Found, Rule
from .affine_site import MANY, SHARED_BYTES, AffineSite

REACH = 64
"""Tasks on the way of one plan."""

EFFORT = 4 * REACH
"""Tasks that are looked at for one plan, blind alleys among them."""

BACK: dict[str, Rule] = {**affine_flow.BACK, **affine_joins.BACK, **affine_weights.BACK}
FORE: dict[str, Rule] = {**affine_flow.FORE, **affine_joins.FORE, **affine_weights.FORE}

HALF = 16.0
"""Factor by which values of 16-bit types may grow or shrink on the way."""


@dataclass(frozen=True)
class Task:
    """A map to be done by what makes a tensor, by what reads it, or by one of its readers."""

    kind: Literal["back", "fore", "edge"]
    tensor: gs.Tensor
    given: Affine
    reader: gs.Node | None = None


@dataclass(frozen=True)
class Step:
    """What one node does in a plan; `changed` are the tensors that get other values."""

    node: gs.Node | None
    do: Callable[[], None] | None
    changed: tuple[gs.Tensor, ...]
    gain: int = 0


@dataclass(frozen=True)
class Plan:
    """The steps of a plan that stands."""

    steps: tuple[Step, ...]

    @property
    def gain(self) -> int:
        """Affine nodes that vanish (negative: that come)."""
        return sum(step.gain for step in self.steps)

    @property
    def nodes(self) -> list[gs.Node]:
        """The nodes that take part."""
        return [step.node for step in self.steps if step.node is not None]

    def apply(self, site: AffineSite, root: gs.Tensor) -> None:
        """Edit the nodes; tensors but `root` that hold other values get other names."""
        for step in self.steps:
            if step.do is not None:
                step.do()
            if step.node is not None:
                site.forget(step.node)
        done = {id(root)}
        for tensor in (t for step in self.steps for t in step.changed):
            if id(tensor) not in done:
                done.add(id(tensor))
                new = site.renamed(tensor)
                replace_output(tensor.inputs[0], tensor, new)
                replace_uses(tensor, new)


class Search:
    """One search for a plan."""

    def __init__(self, site: AffineSite, avoid: Iterable[gs.Node]) -> None:
        self.site = site
        self.left = REACH
        self.effort = EFFORT
        self.avoid = {id(n) for n in avoid}
        self.seen: set[tuple[int, str]] = set()

    def plan(self, tasks: Sequence[Task]) -> Plan | str:
        """Return a plan for these tasks, or why there is none."""
        found = self._solve(tuple(tasks))
        return found if isinstance(found, str) else Plan(found)

    def _solve(self, tasks: tuple[Task, ...]) -> tuple[Step, ...] | str:
        if not tasks:
            return ()
        task, rest = tasks[0], tasks[1:]
        if task.given.identity:
            return self._solve(rest)
        self.left -= 1
        self.effort -= 1
        if self.left < 0 or self.effort < 0:
            return "it would reach too far"
        if (reason := self._unfit(task)) is not None:
            return reason
        if task.kind == "fore":
            return self._fan_out(task, rest)
        return self._back(task, rest) if task.kind == "back" else self._edge(task, rest)

    def _unfit(self, task: Task) -> str | None:
        given = task.given
        if not given.finite or np.abs(given.scale).max(initial=0.0) > 1e18:
            return "the numbers of the map are too large"
        if given.elements > MAX_ELEMENTS:
            return f"the map takes more than {MAX_ELEMENTS} numbers"
        dtype = self.site.dtype(task.tensor)
        if dtype is not None and dtype.itemsize < 4:
            size = np.abs(given.scale)
            if (size > HALF).any() or (size < 1 / HALF).any():
                return f"the scale may leave the range of {dtype}"
        return None

    def _fan_out(self, task: Task, rest: tuple[Task, ...]) -> tuple[Step, ...] | str:
        tensor, edit = task.tensor, self.site.edit
        if edit.is_output(tensor):
            return f"'{tensor.name}' is a graph output"
        if len(tensor.outputs) > MANY:
            return f"more than {MANY} nodes read '{tensor.name}'"
        readers = edit.consumers(tensor)
        for reader in readers:
            if not edit.is_local(reader):
                return f"'{label(reader)}' reads '{tensor.name}' inside a subgraph"
            if sum(t is tensor for t in reader.inputs) != 1:
                return f"'{label(reader)}' reads '{tensor.name}' twice"
        return self._solve((*(Task("edge", tensor, task.given, r) for r in readers), *rest))

    def _edge(self, task: Task, rest: tuple[Task, ...]) -> tuple[Step, ...] | str:
        node = task.reader
        assert node is not None
        index = next(i for i, t in enumerate(node.inputs) if t is task.tensor)
        merged = self._merge_fore(node, task.given)
        found = self._ask(FORE, node, index, task.given) if merged is None else merged
        return self._try(node, "fore", found, (), rest)

    def _back(self, task: Task, rest: tuple[Task, ...]) -> tuple[Step, ...] | str:
        tensor, reader = task.tensor, task.reader
        if is_constant(tensor):
            return self._constant(task, rest)
        if len(tensor.inputs) != 1 or not self.site.edit.is_local(tensor.inputs[0]):
            return f"'{tensor.name}' comes from outside"
        if reader is not None and (reason := self.site.why_not_read(tensor, reader)) is not None:
            return reason
        node = tensor.inputs[0]
        if self.site.edit.removed(node):
            return f"'{label(node)}' goes"
        index = next(i for i, t in enumerate(node.outputs) if t is tensor)
        merged = self._merge_back(node, task.given)
        found = self._ask(BACK, node, index, task.given) if merged is None else merged
        return self._try(node, "back", found, (tensor,), rest)

    def _ask(self, table: dict[str, Rule], node: gs.Node, index: int, given: Affine) -> Found:
        rule = table.get(node.op) if is_standard(node) else None
        if rule is None:
            return f"'{node.op}' does not take it"
        return rule(self.site, node, index, given)

    def _try(
        self, node: gs.Node, kind: str, found: Found, changed: tuple[gs.Tensor, ...], rest: tuple[Task, ...]
    ) -> tuple[Step, ...] | str:
        """Go on with each way that a node offers until one leads to the end."""
        if isinstance(found, str):
            return f"{label(node)}: {found}"
        linear = node.op in affine_weights.FORE
        if id(node) in self.avoid or (id(node), kind) in self.seen:
            return f"'{label(node)}' is reached twice"
        if not linear and ((id(node), "fore") in self.seen or (id(node), "back") in self.seen):
            return f"'{label(node)}' is reached twice"
        self.seen.add((id(node), kind))
        reason, left = "no way", self.left
        for way in found:
            self.left = left
            tasks = [
                *(Task("fore", node.outputs[i], m) for i, m in way.forward),
                *(Task("back", node.inputs[i], m, node) for i, m in way.backward),
            ]
            outputs = tuple(node.outputs[i] for i, m in way.forward if not m.identity)
            step = Step(node, way.do, (*changed, *outputs), way.gain)
            further = self._solve((*tasks, *rest))
            if not isinstance(further, str):
                return (step, *further)
            reason = further
        self.seen.discard((id(node), kind))
        return reason

    def _constant(self, task: Task, rest: tuple[Task, ...]) -> tuple[Step, ...] | str:
        """Do the map to a constant operand."""
        site, reader = self.site, task.reader
        assert reader is not None
        index = next(i for i, t in enumerate(reader.inputs) if t is task.tensor)
        held = array_of(task.tensor)
        if held is None or not is_float(held.dtype) or sum(t is task.tensor for t in reader.inputs) != 1:
            return f"the values of '{task.tensor.name}' are not known"
        if held.nbytes > SHARED_BYTES and (reason := site.why_not_copy(task.tensor)) is not None:
            return reason
        new = (held.astype(np.float64) * task.given.scale + task.given.shift).astype(held.dtype)
        if new.ndim > held.ndim or new.size > max(held.size, MAX_ELEMENTS):
            return f"'{task.tensor.name}' would grow"
        if not np.isfinite(new.astype(np.float64)).all():
            return f"a folded constant is not a finite {held.dtype}"
        further = self._solve(rest)
        if isinstance(further, str):
            return further
        alone = len(task.tensor.outputs) == 1
        name = f"{task.tensor.name}/affine" if alone else f"{reader.outputs[0].name}/constant"
        return (Step(None, lambda: site.put(reader, index, name, new), ()), *further)

    def _merge_fore(self, node: gs.Node, given: Affine) -> Found | None:
        """Return the ways to do a map in front of another: as one, or the other's constant changed and more behind."""
        own = self.site.affine(node)
        if own is None:
            return None
        both = given.then(own)
        ways = [self._past(node, both, forward=((0, both),)), self._as_one(node, both)]
        if node.op == "Add" and given.scales and (inverse := given.scale_inverse()) is not None:
            after = Affine.of(1.0, (given.shift + own.shift) * inverse.scale)
            ways.append(self._kept(node, after, forward=((0, given.scale_part),)))
        if node.op == "Mul" and given.shifts:
            after = Affine.of(given.scale * own.scale)
            ways.append(self._kept(node, after, forward=((0, Affine.of(1.0, given.shift * own.scale)),)))
        return self._best(ways)

    def _merge_back(self, node: gs.Node, given: Affine) -> Found | None:
        own = self.site.affine(node)
        if own is None:
            return None
        index = next(i for i, t in enumerate(node.inputs) if not is_constant(t))
        whole = own.then(given)
        ways = [self._past(node, whole, backward=((index, whole),)), self._as_one(node, whole)]
        if node.op == "Add" and given.scales:
            before = Affine.of(1.0, own.shift * given.scale + given.shift)
            ways.append(self._kept(node, before, backward=((index, given.scale_part),)))
        if node.op == "Mul" and given.shifts:
            both = Affine.of(own.scale * given.scale)
            if (inverse := both.scale_inverse()) is not None:
                shift = Affine.of(1.0, given.shift * inverse.scale)
                ways.append(self._kept(node, both, backward=((index, shift),)))
        return self._best(ways)

    @staticmethod
    def _best(ways: Sequence[Carried | None]) -> Found:
        return sorted((w for w in ways if w is not None), key=lambda w: -w.gain)

    def _past(self, node: gs.Node, whole: Affine, **tasks: Any) -> Carried | None:
        """Return the way to take an affine node along: it goes, and the next one has to do both maps."""
        source, out = self.site.source(node), node.outputs[0]
        if whole.identity and (self.site.edit.is_output(out) or self.site.edit.why_not_bypass(out, source)):
            return None

        def do() -> None:  # its source may have gone the same way by now
            replace_uses(out, self.site.source(node))
            self.site.edit.remove(node)

        return Carried(do=do, gain=1, **tasks)

    def _as_one(self, node: gs.Node, whole: Affine) -> Carried | None:
        """Return the way to let nodes for another map stand for an affine node."""
        dtype = self._dtype(node)
        if dtype is None or not fits_type(whole, dtype) or whole.elements > MAX_ELEMENTS:
            return None
        source, out = self.site.source(node), node.outputs[0]
        if whole.identity and (self.site.edit.is_output(out) or self.site.edit.why_not_bypass(out, source)):
            return None
        gain = 1 - self.site.cost(whole, [node])
        return Carried(do=lambda: replace_affine(self.site, [node], whole, dtype), gain=gain)

    def _kept(self, node: gs.Node, whole: Affine, **tasks: Any) -> Carried | None:
        """Return the way to change only the constant of a Mul or Add."""
        dtype = self._dtype(node)
        if dtype is None or not fits_type(whole, dtype) or whole.elements > MAX_ELEMENTS or whole.identity:
            return None
        return Carried(do=lambda: replace_affine(self.site, [node], whole, dtype), **tasks)

    def _dtype(self, node: gs.Node) -> np.dtype[Any] | None:
        return chain_dtype(self.site, [node])


def chain_dtype(site: AffineSite, nodes: Sequence[gs.Node]) -> np.dtype[Any] | None:
    """Return the type that affine nodes compute in."""
    for node in nodes:
        for tensor in node.inputs:
            if is_constant(tensor):
                return site.dtype(tensor) or _held_type(tensor)
    return site.dtype(nodes[0].inputs[0])


def _held_type(constant: gs.Tensor) -> np.dtype[Any] | None:
    held = array_of(constant)
    return None if held is None else np.dtype(held.dtype)


def fits_type(given: Affine, dtype: np.dtype[Any]) -> bool:
    """Tell whether a map's numbers are finite in a type, and none but zero vanishes."""
    for values in (given.scale, given.shift):
        with np.errstate(all="ignore"):
            rounded = values.astype(dtype).astype(np.float64)
        if not np.isfinite(rounded).all() or ((rounded == 0) & (np.abs(values) > 0)).any():
            return False
    return True


def replace_affine(site: AffineSite, chain: Sequence[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> None:
    """Let nodes for a map stand for a chain of affine nodes; the last one's output keeps its name."""
    source, out = site.source(chain[0]), chain[-1].outputs[0]
    if whole.identity:
        site.edit.bypass(out, source)
        for node in chain:
            site.edit.remove(node)
        return
    replace_output(chain[-1], out, gs.Variable.empty())
    made = site.nodes_for(whole, source, out, dtype, chain)
    site.edit.insert_after(chain[-1], made)
    for node in chain:
        site.edit.remove(node)
