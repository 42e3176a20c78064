"""Nodes of the graph that ORT made <-> nodes of the model it was made of.

ORT runs other nodes than the file holds: it fuses, decomposes, inlines, moves into its blocked layout, adds
reorders.  They are matched by tensors.  A node of the optimised graph mostly still makes some tensor of the
original; walking back from that tensor, up to tensors that other optimised nodes make, gives the original nodes
that it stands for.  One that makes none (part of an operator that ORT took apart) stands for what is left over on
the way to the next original tensor.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_graphsurgeon as gs

from graphopt.model import Model

_BLOCKED = "com.microsoft.nchwc"
_MOVES = frozenset({"ReorderInput", "ReorderOutput"})
_HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN", "Einsum"})


@dataclass
class Matches:
    """Optimised nodes -> the original nodes they stand for (by number, in file order).

    `unnamed` holds those without a name, by operator, in the order of the file that ORT wrote; in a profile they
    are called after operator and a number of ORT's own.
    """

    named: dict[str, list[int]] = field(default_factory=dict)
    unnamed: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))

    def of(self, events: Mapping[str, str]) -> dict[str, list[int]]:
        """Return what each profiled node (name -> operator, in the order in which they ran) stands for."""
        found = {name: self.named[name] for name in events if name in self.named}
        numbered: dict[str, list[str]] = defaultdict(list)
        for name, op in events.items():
            if name not in found and re.fullmatch(rf"{re.escape(op)}_\d+", name):
                numbered[op].append(name)
        for op, names in numbered.items():
            candidates = self.unnamed.get(op, [])
            if len(candidates) == len(names):
                found.update(zip(names, candidates, strict=True))
        return found


class Trace:
    """The nodes of a model, each under a name of its own that ORT's names can be traced back to.

    Renames nodes, and inner tensors of subgraphs and functions whose names are used twice, in the copy it is given.
    """

    def __init__(self, model: Model) -> None:
        self.nodes: list[gs.Node] = list(model.nodes())
        self.labels = [_label(node) for node in self.nodes]
        self.functions = sorted((f.name for f in model.functions), key=len, reverse=True)
        taken = Counter(node.name for node in self.nodes if node.name)
        self.named: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            if not node.name or taken[node.name] > 1:
                node.name = f"{node.name or node.op}/node_{i}"
            self.named[node.name] = i
        calls = {(f.domain or "", f.name) for f in model.functions}
        self.calls = {i for i, n in enumerate(self.nodes) if (n.domain or "", n.op) in calls}
        self.made, self.called = self._unique_tensors(model)

    def _unique_tensors(self, model: Model) -> tuple[dict[str, int], dict[str, int]]:
        """Return which node makes each tensor, and apart from those, which call of a function does."""
        made: dict[str, int] = {}
        called: dict[str, int] = {}
        kept = {id(t) for graph in (model.graph, *model.functions) for t in (*graph.inputs, *graph.outputs)}
        for i, node in enumerate(self.nodes):
            for tensor in node.outputs:
                if tensor.name in made and id(tensor) not in kept:
                    tensor.name = f"{tensor.name}/node_{i}"
                if tensor.name:
                    (called if i in self.calls else made).setdefault(tensor.name, i)
        return made, called

    def plain(self, name: str) -> str:
        """Return a name without what ORT puts before it when it inlines functions and branches."""
        name = re.sub(r"^.*_Inline_\d+__", "", name)
        stripped = True
        while stripped:
            stripped = False
            for function in self.functions:
                match = re.match(rf"_inlfunc_{re.escape(function)}(_token_\d+)?_", name)
                if match:
                    name, stripped = name[match.end() :], True
        return name

    def by_name(self, name: str) -> list[int]:
        """Return the node that ORT's name points to: its own name, or a tensor's followed by `_nchwc`."""
        if name in self.named:
            return [self.named[name]]
        plain = self.plain(name)
        tensor = plain.removesuffix("_nchwc")
        if plain in self.named:
            return [self.named[plain]]
        if tensor != plain and tensor in self.made:
            return [self.made[tensor]]
        parts = plain.split("/")
        heads = ("/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next(([self.named[head]] for head in heads if head in self.named), [])

    def match(self, optimized: onnx.ModelProto) -> Matches:
        """Return which original nodes every node of the optimised graph stands for."""
        ran = list(_all_nodes(optimized.graph))
        ends = [self._ends(node) for node in ran]
        stops = {tensor for found in ends for tensor in found} | {i.name for i in optimized.graph.initializer}
        stands = [self._between(found, stops) for found in ends]
        done = {i for found in stands for i in found}
        readers: dict[str, list[int]] = defaultdict(list)
        for k, node in enumerate(ran):
            for name in node.input:
                readers[name].append(k)
        matches = Matches()
        for k, node in enumerate(ran):
            if not stands[k] and not _moves(node):
                reached = self._reached(k, ran, stands, readers)
                stands[k] = [i for i in self._between(reached, stops) if i not in done] or self._calls(node)
            if node.name:
                matches.named[node.name] = stands[k]
            else:
                matches.unnamed[node.op_type].append(stands[k])
        return matches

    def _reached(
        self, start: int, ran: Sequence[onnx.NodeProto], stands: Sequence[list[int]], readers: Mapping[str, list[int]]
    ) -> list[str]:
        """Return the original tensors that a node leads to through others that stand for nothing yet."""
        found: list[str] = []
        stack, seen = [start], {start}
        while stack:
            for output in ran[stack.pop()].output:
                name = self._tensor(output)
                if name is not None:
                    found.append(name)
                    continue
                onward = [k for k in readers.get(output, ()) if k not in seen and not stands[k]]
                seen.update(onward)
                stack.extend(onward)
        return found

    def _calls(self, node: onnx.NodeProto) -> list[int]:
        """Return the function call that a node makes the result of: of a body fused whole, no more is known."""
        return [self.called[t] for t in node.output if t in self.called]

    def _ends(self, node: onnx.NodeProto) -> list[str]:
        """Return the original tensors that an optimised node makes."""
        if _moves(node):
            return []
        if node.domain == _BLOCKED:
            return self._blocked_end(node)
        tensors = [name for name in map(self._tensor, node.output) if name is not None]
        # moved into the blocked layout as it was: its outputs have new names
        kept = next((self.named[n] for n in (node.name, self.plain(node.name)) if n in self.named), None)
        if tensors or kept is None or self.nodes[kept].op != node.op_type:
            return tensors
        return [t.name for t in self.nodes[kept].outputs if t.name]

    def _tensor(self, name: str) -> str | None:
        return next((n for n in (name, self.plain(name)) if n in self.made), None)

    def _blocked_end(self, node: onnx.NodeProto) -> list[str]:
        """Return the original tensor of a node in ORT's blocked layout, whose own outputs have other names.

        It is called after the tensor that it made before a sum and an activation moved into it.
        """
        # r7_nchwc, and r7_bn_nchwc, r7_mul_nchwc for what became a depthwise convolution
        names = (self._tensor(re.sub(pattern, "", node.name)) for pattern in ("_nchwc$", "_[a-z]+_nchwc$"))
        name = next((found for found in names if found is not None), None)
        if name is None:
            return []
        tensor = next(t for t in self.nodes[self.made[name]].outputs if t.name == name)
        activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
        if len(node.input) > 3 and node.input[3]:
            tensor = _only_result(tensor, "Add", "Sum")
        return [_only_result(tensor, activation).name] if activation else [tensor.name]

    def _between(self, ends: Sequence[str], stops: set[str]) -> list[int]:
        """Return the original nodes from `ends` back to `stops`."""
        found: dict[int, None] = {}
        stack = list(ends)
        while stack:
            tensor = stack.pop()
            i = self.made.get(tensor)
            if i is None or i in found or self.nodes[i].op == "Constant" or (tensor in stops and tensor not in ends):
                continue
            found[i] = None
            stack.extend(t.name for t in self.nodes[i].inputs if t.name and not isinstance(t, gs.Constant))
        return sorted(found)

    def lead(self, covered: Sequence[int], kernel: str) -> int | None:
        """Return the node that does the work among those in one kernel: the one that the kernel is named after."""
        same = [i for i in covered if self.nodes[i].op == kernel]
        alike = [i for i in covered if self.nodes[i].op in kernel]
        heavy = [i for i in covered if self.nodes[i].op in _HEAVY]
        return next(iter(same or heavy or alike or list(covered[-1:])), None)

    def named_op(self, covered: Sequence[int], kernel: str) -> str:
        """Return the operator to count a kernel under: the original one, or ORT's where it made one of several."""
        lead = self.lead(covered, kernel)
        if lead is None:
            return kernel
        op = str(self.nodes[lead].op)
        return op if len(covered) == 1 or op in _HEAVY or op in kernel else kernel


def _moves(node: onnx.NodeProto) -> bool:
    """Tell whether a node only moves data in or out of ORT's blocked layout."""
    return node.domain == _BLOCKED and node.op_type in _MOVES


def _only_result(tensor: gs.Tensor, *ops: str) -> gs.Tensor:
    """Return what the only reader of `tensor` makes of it, if that is one of `ops`; else `tensor`."""
    readers = tensor.outputs
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op in ops else tensor


def _label(node: gs.Node) -> str:
    return node.name or f"{node.op} -> {node.outputs[0].name if node.outputs else '?'}"


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            stack.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
            stack.extend(g for a in node.attribute for g in a.graphs)
