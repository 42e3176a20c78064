"""What became of every node of a model in the graph that ONNX Runtime (ORT) made of it.

`trace.py` says which original nodes a kernel stands for.  This module says in what way: as they were, as part of a
kernel of several, computed at load, merged with an equal node, or left out as doing nothing.  What cannot be decided
is `unknown`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant, scalar_of
from graphopt.analysis.cost import Sizes
from graphopt.kernels import (
    AFFINE,
    BLOCKED_DOMAIN,
    HEAVY,
    NEUTRAL,
    NOTHING,
    PERMUTES,
    REORDERS,
    TRANSPOSING,
    is_integer,
)
from graphopt.ops import DEQUANTIZE, MOVEMENT, NONDETERMINISTIC, is_standard
from graphopt.trace import Kernel, Matches, Trace, all_nodes

Kind = Literal["kept", "fused", "rewritten", "folded", "shared", "removed", "unknown"]

_SMALL = 1 << 10
"""Elements up to which constants are compared by value."""


@dataclass(frozen=True)
class Fate:
    """What became of a node.

    Attributes:
        kind: `kept`: it runs under its own operator.  `fused`: part of a kernel of several nodes.  `rewritten`: runs
            as other operators.  `folded`: computed when the model is loaded.  `shared`: merged with an equal node.
            `removed`: does nothing, or nothing needs it.  `unknown`.
        how: the same in words, the other node named.
        kernel: operators that ORT runs for it, empty where none does.
        blocked: whether they run in ORT's blocked layout.
    """

    kind: Kind
    how: str
    kernel: str = ""
    blocked: bool = False


def fates(
    trace: Trace, matches: Matches, optimized: onnx.ModelProto, nodes: Sequence[gs.Node], sizes: Sizes
) -> list[Fate]:
    """Return the fate of every node, in the order of `trace.nodes`.

    Args:
        trace: the original nodes.
        matches: what ORT's nodes stand for.
        optimized: ORT's graph.
        nodes: the same nodes in the model that `sizes` knows.
        sizes: shapes and types of its tensors.
    """
    return _Judge(trace, matches, optimized, nodes, sizes).judge()


def blocked_kernels(kernels: Sequence[Kernel]) -> set[int]:
    """Return which kernels read or write a tensor in the blocked layout, reorders left out."""
    tensors: set[str] = set()
    found: set[int] = set()
    for k, kernel in enumerate(kernels):
        node = kernel.node
        own = node.domain == BLOCKED_DOMAIN
        if own and node.op_type in REORDERS:
            tensors.update(node.output if node.op_type == "ReorderInput" else ())
        elif own or tensors.intersection(node.input):
            found.add(k)
            tensors.update(node.output)
    return found


class _Judge:
    """Decides the fates of one model's nodes."""

    def __init__(
        self, trace: Trace, matches: Matches, optimized: onnx.ModelProto, nodes: Sequence[gs.Node], sizes: Sizes
    ) -> None:
        self.trace, self.kernels = trace, matches.kernels
        self.originals, self.sizes = nodes, sizes
        self.initializers = {i.name for i in optimized.graph.initializer}
        self.ran = {node.name for node in all_nodes(optimized.graph)}
        self.blocked = blocked_kernels(self.kernels)
        self.led: dict[int, list[int]] = defaultdict(list)
        self.part: dict[int, list[int]] = defaultdict(list)
        for k, kernel in enumerate(self.kernels):
            lead = trace.lead(kernel.stands, kernel.node.op_type)
            for i in kernel.stands:
                (self.led if i == lead else self.part)[i].append(k)
        self.number = _numbers(trace.nodes)
        self.twins: dict[Hashable, int] = {}
        for i in self.led:
            self.twins.setdefault(self.number.get(i, ("node", i)), i)
        self.constant = _constant_nodes(trace.nodes)
        self.index = {id(node): i for i, node in enumerate(trace.nodes)}

    def judge(self) -> list[Fate]:
        found = [self._fate(i) for i in range(len(self.trace.nodes))]
        self._needed_at_load(found)
        self._branches(found)
        self._spread(found)
        return found

    def _fate(self, i: int) -> Fate:
        node = self.trace.nodes[i]
        if is_standard(node, "Constant"):
            return Fate("folded", "a constant")
        if i in self.led:
            return self._leading(i)
        integer = i in self.part and is_integer(self.kernels[self.part[i][0]].node.op_type)
        kept = is_standard(node, *DEQUANTIZE) and integer
        made = {t.name for t in node.outputs}
        if not kept and (i in self.constant or (made and made <= self.initializers)):
            return Fate("folded", "computed when the model is loaded: it depends on constants alone")
        twin = self.twins.get(self.number.get(i, ()))
        if twin is not None:
            return Fate("shared", f"computes the same as '{self.trace.labels[twin]}'")
        if reason := self._does_nothing(i):
            return Fate("removed", reason)
        return self._part(i) if i in self.part else Fate("unknown", "ORT's graph does not tell")

    def _leading(self, i: int) -> Fate:
        """Return the fate of a node that one or more kernels are there for."""
        own = self.trace.nodes[i].op
        kernels = self.led[i]
        ops = list(dict.fromkeys(self.kernels[k].node.op_type for k in kernels))
        others = [j for k in kernels for j in self.kernels[k].stands if j != i and self._absorbed(j)]
        blocked = any(k in self.blocked for k in kernels)
        names = " + ".join(ops)
        if ops == [own]:
            took = f", with {_few([self.trace.labels[j] for j in others])} inside" if others else ""
            return Fate("kept", "runs as it is" + (" in the blocked layout" if blocked else "") + took, names, blocked)
        if others:
            inside = _few([self.trace.labels[j] for j in others])
            return Fate("fused", f"runs as {names}, with {inside} inside", names, blocked)
        return Fate("rewritten", f"runs as {names}", names, blocked)

    def _absorbed(self, i: int) -> bool:
        """Tell whether a node in another's kernel is really part of it."""
        return i not in self.led and i in self.part and self._fate(i).kind == "fused"

    def _part(self, i: int) -> Fate:
        """Return the fate of a node inside a kernel that is there for another."""
        k = self.part[i][0]
        node, kernel = self.trace.nodes[i], self.kernels[k].node
        lead = self.trace.lead(self.kernels[k].stands, kernel.op_type)
        where = f"{kernel.op_type} of '{self.trace.labels[lead if lead is not None else i]}'"
        if node.op in ("If", "Loop", "Scan"):
            return Fate("unknown", "ORT's graph does not tell")
        if node.op == "Transpose" and not any(word in kernel.op_type for word in TRANSPOSING):
            return Fate("removed", f"cancelled or moved by ORT, near {where}")
        activation = next((a.s.decode() for a in kernel.attribute if a.name == "activation"), "")
        if node.op == activation:
            how = f"the activation of {where}"
        elif lead is not None and not is_integer(kernel.op_type) and self._into_weights(node, lead):
            how = f"{'the bias' if node.op == 'Add' else 'folded into the weights'} of {where}"
        else:
            how = f"part of {where}"
        return Fate("fused", how, kernel.op_type, k in self.blocked)

    def _into_weights(self, node: gs.Node, lead: int) -> bool:
        heavy = self.trace.nodes[lead]
        if heavy.op not in HEAVY or not any(is_constant(t) for t in heavy.inputs):
            return False
        moving = [t for t in node.inputs if t.name and not is_constant(t)]
        moving = [t for t in moving if self.trace.made.get(t.name) not in self.constant]
        return len(moving) == 1 and node.op in AFFINE

    def _does_nothing(self, i: int) -> str:
        """Return why a node has no effect, empty where it has one."""
        node, original = self.trace.nodes[i], self.originals[i]
        if not is_standard(node) or not node.inputs or not node.outputs:
            return ""
        if node.op in NOTHING:
            return "does nothing at inference"
        before, after = original.inputs[0], original.outputs[0]
        if node.op == "Cast":
            kinds = [self.sizes.dtype(t) for t in (before, after)]
            return "casts to the type it has" if kinds[0] is not None and kinds[0] == kinds[1] else ""
        if node.op in NEUTRAL and len(node.inputs) == 2:
            return "its operand has no effect" if scalar_of(node.inputs[1]) == NEUTRAL[node.op] else ""
        if node.op == "Transpose":
            perm = list(node.attrs.get("perm") or [])
            return "moves nothing" if perm and perm == sorted(perm) else ""
        shape = self.sizes.of(before)
        same = node.op in MOVEMENT and shape is not None and shape == self.sizes.of(after)
        return "gives the shape it gets" if same and node.op not in PERMUTES else ""

    def _needed_at_load(self, found: list[Fate]) -> None:
        """Mark as folded what only leads to tensors that are constants now."""
        stack = [i for i, fate in enumerate(found) if fate.kind == "folded"]
        while stack:
            for tensor in self.trace.nodes[stack.pop()].inputs:
                i = self.trace.made.get(tensor.name)
                if i is not None and found[i].kind == "unknown" and i not in self.part:
                    found[i] = Fate("folded", "computed when the model is loaded: its result is known from shapes")
                    stack.append(i)

    def _branches(self, found: list[Fate]) -> None:
        """Judge Ifs that are gone, and the nodes of the branch that was not taken."""
        for i, node in enumerate(self.trace.nodes):
            if node.op != "If" or i in self.led:
                continue
            inner = {name: self._inside(g) for name, g in node.attrs.items() if isinstance(g, gs.Graph)}
            taken = [n for n, members in inner.items() if any(m in self.led or m in self.part for m in members)]
            if len(taken) == 1:
                found[i] = Fate("folded", f"its condition is constant: {taken[0]} took its place")
                for name, members in inner.items():
                    for m in members if name != taken[0] else ():
                        found[m] = Fate("removed", f"in a branch of '{self.trace.labels[i]}' that is never taken")

    def _inside(self, graph: gs.Graph) -> list[int]:
        found, stack = [], [graph]
        while stack:
            for node in stack.pop().nodes:
                found.append(self.index[id(node)])
                stack.extend(g for g in node.attrs.values() if isinstance(g, gs.Graph))
        return found

    def _spread(self, found: list[Fate]) -> None:
        """Judge what is left by what reads it: nobody, or only nodes that no longer run."""
        for i in reversed(range(len(found))):
            if found[i].kind != "unknown" or i in self.part:
                continue
            outputs = self.trace.nodes[i].outputs
            readers = [self.index[id(n)] for t in outputs for n in t.outputs if id(n) in self.index]
            if not readers and not any(t.name in self.trace.results for t in outputs):
                found[i] = Fate("removed", "nothing reads it")
            elif readers and all(found[r].kind in ("folded", "removed", "shared") for r in readers):
                kind: Kind = "folded" if any(found[r].kind == "folded" for r in readers) else "removed"
                found[i] = Fate(kind, f"only leads to '{self.trace.labels[readers[0]]}', which does not run either")


def _few(labels: Sequence[str], shown: int = 3) -> str:
    """Return the first labels and how many more."""
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(f"'{label}'" for label in labels[:shown]) + more


def _constant_nodes(nodes: Sequence[gs.Node]) -> set[int]:
    """Return the nodes that depend on constants alone."""
    found: set[int] = set()
    ids: set[int] = set()
    for i, node in enumerate(nodes):
        inputs = [t for t in node.inputs if t.name]
        known = all(isinstance(t, gs.Constant) or (t.inputs and id(t.inputs[0]) in ids) for t in inputs)
        if known and (inputs or node.op == "Constant") and node.op not in NONDETERMINISTIC:
            if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                continue
            found.add(i)
            ids.add(id(node))
    return found


def _numbers(nodes: Sequence[gs.Node]) -> dict[int, Hashable]:
    """Return a key for every node, equal for nodes that compute the same."""
    tensors: dict[int, Hashable] = {}
    found: dict[int, Hashable] = {}
    known: dict[Hashable, int] = {}
    for i, node in enumerate(nodes):
        attributes = _attributes(node.attrs)
        if attributes is None or node.op in NONDETERMINISTIC:
            continue
        inputs = tuple(tensors.get(id(t), _constant_key(t)) for t in node.inputs)
        key = (node.domain or "", node.op, attributes, inputs, len(node.outputs))
        number = known.setdefault(key, i)
        found[i] = ("value", number)
        tensors.update((id(t), ("value", number, slot)) for slot, t in enumerate(node.outputs))
    return found


def _attributes(attrs: Mapping[str, Any]) -> Hashable | None:
    """Return attributes as a key, None where a subgraph is among them."""
    found = []
    for name, value in sorted(attrs.items()):
        if isinstance(value, gs.Graph):
            return None
        found.append((name, _constant_key(value) if isinstance(value, gs.Constant) else repr(value)))
    return tuple(found)


def _constant_key(tensor: gs.Tensor) -> Hashable:
    """Return what small constants of equal value share; others are themselves."""
    values = array_of(tensor, limit=_SMALL) if isinstance(tensor, gs.Constant) else None
    if values is None or values.dtype == object:
        return ("tensor", tensor.name)
    return ("values", str(values.dtype), values.shape, values.tobytes())
