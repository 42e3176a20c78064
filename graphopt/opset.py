"""A model -> the same model in a newer standard operator set, node by node and in place.

ONNX's own converter passes models through an older form that has no metadata, annotations, functions or
sparse tensors, and its adapters lack or break operators (Resize, Hardmax, Pad and RNN among them).  Here every
node takes the steps between its version and the target: a step either has an adapter (adapters.py), or is seen
in the schemas to leave older nodes as they are, or blocks the upgrade with the reason.  Nodes that need no
adapter, weights, names, subgraphs and functions are not touched.
"""

from __future__ import annotations

import bisect
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.adapters import ADAPTERS, NEUTRAL, REFUSED, UNCHANGED_EXPERIMENTS, Refused, add_input
from graphopt.analysis.shapes import Shapes, infer
from graphopt.errors import ModelError
from graphopt.importer import Node, origin
from graphopt.model import Model, Snapshot
from graphopt.ops import STANDARD_DOMAINS

HIGHEST = min(26, onnx.defs.onnx_opset_version())
"""The newest operator set that the tables of adapters.py cover."""

_Option = onnx.defs.OpSchema.FormalParameterOption


@dataclass(frozen=True)
class UpgradeResult:
    """What an upgrade did.

    Attributes:
        before: operator set of the model as it came.
        after: operator set it has now.
        notes: what was rewritten, one line for each kind of node.
        reason: why it was not upgraded; None if it was, or if there was nothing to do.
    """

    before: int
    after: int
    notes: tuple[str, ...] = ()
    reason: str | None = None


def upgrade(
    model: Model,
    opset: int = 17,
    *,
    required: bool = False,
    shapes: Shapes | None = None,
    snapshot: Snapshot | None = None,
) -> UpgradeResult:
    """Bring a model to operator set `opset`, in place; one that is newer already stays as it is.

    Local functions and subgraphs are upgraded with it, other domains are kept.  The IR version rises to what
    the operator set asks for; where it was below 4, constants are no longer listed as inputs.  Where a node
    cannot be upgraded, nothing changes and the result carries the reason.

    Args:
        model: edited in place; after a refusal its graph and node objects are new ones.
        opset: the operator set asked for.
        required: raise instead of returning a reason.
        shapes: of the model as it is, when the caller has them, both readings made.
        snapshot: of the model as it is, when the caller has one.

    Raises:
        ModelError: `opset` is unknown, or `required` and a node cannot be upgraded.
    """
    before = model.opset
    if not 1 <= opset <= HIGHEST:
        raise ModelError(f"cannot upgrade to opset {opset}", hint=f"known: up to {HIGHEST}")
    if opset <= before:
        return UpgradeResult(before, before)
    snapshot = snapshot or model.snapshot()
    work = _Upgrade(model, opset, shapes or infer(model))
    try:
        work.run()
    except Refused as refusal:
        model.restore(snapshot)
        reason = str(refusal)
        if required:
            raise ModelError(f"cannot upgrade to opset {opset}: {reason}", at=str(model.path or "model")) from refusal
        return UpgradeResult(before, before, reason=reason)
    return UpgradeResult(before, opset, work.notes())


class _Upgrade:
    """One upgrade; what adapters use (see `adapters.Editor`)."""

    def __init__(self, model: Model, target: int, shapes: Shapes) -> None:
        self.model = model
        self.target = target
        self.types = shapes
        self.types.proved(gs.Variable(""))  # both readings must be made now, while the model is of one opset
        graphs = list(model.graphs())
        self.outputs = {id(t) for graph in graphs for t in graph.outputs}
        self.names = {t.name for g in graphs for n in g.nodes for t in (*n.inputs, *n.outputs)}
        self.names.update(t.name for g in graphs for t in (*g.inputs, *(c for c in _declared(g))))
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.adapted: Counter[str] = Counter()
        self.before: dict[int, list[gs.Node]] = defaultdict(list)
        self.behind: dict[int, list[gs.Node]] = defaultdict(list)
        self.queue: list[tuple[gs.Node, int]] = []
        self.version = 0

    def run(self) -> None:
        for root in (self.model.graph, *self.model.functions):
            start = root.opset
            for graph in _nested(root):
                for node in graph.nodes:
                    self._node(node, start)
                if self.before or self.behind:
                    self._place(graph)
                graph.opset = max(start, self.target)
            if isinstance(root, gs.Function):
                held = origin(root)
                _raise_import(held.shell.opset_import if held else (), self.target)
        shell = self.model.shell
        _raise_import(shell.opset_import, self.target)
        needed = onnx.helper.find_min_ir_version_for(list(shell.opset_import), ignore_unknown=True)
        shell.ir_version = max(shell.ir_version, needed)
        for graph in self.model.graphs():
            graph.import_domains = list(shell.opset_import)

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{count} {op} rewritten" for op, count in sorted(self.adapted.items()))

    def _node(self, node: gs.Node, start: int) -> None:
        self.queue = [(node, start)]
        while self.queue:
            current, version = self.queue.pop()
            if current.domain not in STANDARD_DOMAINS or ("", current.op) in self.functions:
                continue
            try:
                self._steps(current, version)
            except Refused as refusal:
                label = f"'{node.name}' " if node.name else ""
                raise Refused(f"node {label}({node.op}), opset {self.version}: {refusal}") from refusal

    def _steps(self, node: gs.Node, version: int) -> None:
        while version < self.target:
            known = _versions(node.op)
            at = bisect.bisect_right(known, version)
            self.version = version
            if at == 0 and node.op not in UNCHANGED_EXPERIMENTS:
                raise Refused("the operator was an experiment, which later operator sets do not have")
            if at == len(known) or known[at] > self.target:
                return
            self.version = known[at]
            adapter = ADAPTERS.get((node.op, self.version))
            if adapter is not None:
                op, form = node.op, _form(node)
                adapter(node, self)
                if _form(node) != form:
                    self.adapted[op] += 1
            elif at > 0:
                _check_step(node, version, self.version)
            version = self.version

    def _place(self, graph: gs.Graph) -> None:
        placed: list[gs.Node] = []
        for node in graph.nodes:
            placed += [*self.before.pop(id(node), ()), node, *self.behind.pop(id(node), ())]
        graph.nodes[:] = placed

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        return self.types.of(tensor).dtype

    def shape(self, tensor: gs.Tensor) -> Sequence[int | str | None] | None:
        return self.types.proved(tensor).shape

    def rank(self, tensor: gs.Tensor) -> int | None:
        return self.types.of(tensor).rank

    def used(self, tensor: gs.Tensor) -> bool:
        return bool(tensor.outputs) or id(tensor) in self.outputs

    def constant(self, base: str, values: np.ndarray[Any, Any]) -> gs.Constant:
        return gs.Constant(self._fresh(base), values)

    def insert(self, node: gs.Node, op: str, inputs: Sequence[gs.Tensor], **attrs: object) -> gs.Variable:
        made = gs.Variable(self._fresh(f"{node.outputs[0].name}/{op.lower()}"))
        self.before[id(node)].append(self._new(node, op, inputs, made, attrs))
        return made

    def follow(self, node: gs.Node, op: str, inputs: Sequence[gs.Tensor], **attrs: object) -> None:
        last = node.outputs[0]
        inner = gs.Variable(self._fresh(f"{last.name}/{node.op.lower()}"))
        list.__setitem__(node.outputs, 0, inner)
        list.append(inner.inputs, node)
        list.clear(last.inputs)
        self.behind[id(node)].append(self._new(node, op, [inner, *inputs], last, attrs))

    def _new(
        self, node: gs.Node, op: str, inputs: Sequence[gs.Tensor], made: gs.Variable, attrs: dict[str, object]
    ) -> gs.Node:
        name = f"{node.name}/{op.lower()}" if node.name else ""
        new = Node(op=op, name=name, attrs=attrs)
        for tensor in inputs:
            add_input(new, tensor)
        list.append(new.outputs, made)
        list.append(made.inputs, new)
        self.queue.append((new, self.version))
        return new

    def _fresh(self, base: str) -> str:
        name, number = base, 1
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name


def _declared(graph: gs.Graph) -> list[gs.Constant]:
    held = origin(graph)
    return held.declared if held else []


def _nested(root: gs.Graph) -> Iterator[gs.Graph]:
    stack = [root]
    while stack:
        graph = stack.pop()
        inner = [a for n in graph.nodes for a in n.attrs.values() if isinstance(a, gs.Graph)]
        yield graph
        stack.extend(inner)


def _raise_import(imports: Any, target: int) -> None:
    for entry in imports:
        if entry.domain in STANDARD_DOMAINS:
            entry.version = max(entry.version, target)


def _form(node: gs.Node) -> tuple[object, ...]:
    return node.op, len(node.inputs), len(node.outputs), tuple(map(id, node.inputs)), sorted(map(str, node.attrs))


@functools.cache
def _history() -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            found[schema.name][schema.since_version] = schema
    return found


@functools.cache
def _versions(op: str) -> list[int]:
    return sorted(_history().get(op, ()))


def _check_step(node: gs.Node, before: int, after: int) -> None:
    """Raise Refused unless version `after` of the operator takes the node as it stands, with the same meaning."""
    reason = REFUSED.get((node.op, after))
    if reason is not None:
        raise Refused(reason)
    known = _versions(node.op)
    old = _history()[node.op][known[bisect.bisect_right(known, before) - 1]]
    new = _history()[node.op][after]
    node.attrs.pop("consumed_inputs", None)  # a hint to the runtimes of opset 1
    for problem in changes(old, new, set(node.attrs), len(node.inputs), len(node.outputs)):
        raise Refused(problem)


def changes(old: Any, new: Any, attrs: set[str], inputs: int, outputs: int) -> Iterator[str]:
    """Yield what keeps a node of schema `old` with these attributes, inputs and outputs from being one of `new`."""
    if new.deprecated:
        yield f"the operator is gone from opset {new.since_version} on"
        return
    for name in sorted(attrs - set(new.attributes)):
        yield f"there is no attribute '{name}' any more"
    for name, attribute in sorted(new.attributes.items()):
        former = old.attributes.get(name)
        if former is not None and former.type != attribute.type and name in attrs:
            yield f"attribute '{name}' changed its type"
        elif name not in attrs and attribute.required and not (former and former.required):
            yield f"attribute '{name}' is needed"
        elif name not in attrs and name not in NEUTRAL.get(new.name, ()) and _default(former) != _default(attribute):
            yield f"attribute '{name}' may change the meaning"
    yield from _parameter_changes("input", old.inputs, new.inputs, inputs)
    yield from _parameter_changes("output", old.outputs, new.outputs, outputs)


def _parameter_changes(kind: str, old: Sequence[Any], new: Sequence[Any], count: int) -> Iterator[str]:
    variadic = bool(new) and new[-1].option == _Option.Variadic
    if count > len(new) and not variadic:
        yield f"it takes {len(new)} {kind}s, not {count}"
    for i, (was, now) in enumerate(zip(old, new, strict=False)):
        loosened = was.option == _Option.Single and now.option == _Option.Optional
        if i < count and was.option != now.option and not loosened:
            yield f"{kind} {i} changed its kind"
    if any(p.option == _Option.Single for p in new[max(count, len(old)) :]):
        yield f"it needs one more {kind}"


def _default(attribute: Any) -> bytes | None:
    if attribute is None or not attribute.default_value.name:
        return None
    return bytes(attribute.default_value.SerializeToString())
