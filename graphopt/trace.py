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

from graphopt.kernels import BLOCKED_DOMAIN, HEAVY, MOVERS, REORDERS
from graphopt.model import Model


@dataclass(frozen=True)
class Kernel:
    """A node of the graph that ORT made, and the original nodes that it stands for (by number, in file order)."""

    node: onnx.NodeProto
    stands: tuple[int, ...]


@dataclass
class Matches:
    """What the nodes of the optimised graph stand for, in the order of the file that ORT wrote.

    In a profile, those without a name are called after operator and a number of ORT's own.
    """

    kernels: list[Kernel] = field(default_factory=list)

    def of(self, events: Mapping[str, str]) -> dict[str, int]:
        """Return which kernel each profiled node is (name -> operator, in the order in which they ran)."""
        named: dict[str, int] = {}
        unnamed: dict[str, list[int]] = defaultdict(list)
        for k, kernel in enumerate(self.kernels):
            if kernel.node.name:
                named[kernel.node.name] = k
            else:
                unnamed[kernel.node.op_type].append(k)
        found = {name: named[name] for name in events if name in named}
        numbered: dict[str, list[str]] = defaultdict(list)
        for name, op in events.items():
            if name not in found and re.fullmatch(rf"{re.escape(op)}_\d+", name):
                numbered[op].append(name)
        for op, names in numbered.items():
            candidates = unnamed.get(op, [])
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
        self.given = {t.name for t in (*model.graph.inputs, *model.constants())}
        self.results = {t.name for graph in model.graphs() for t in graph.outputs}
        self._aliases: dict[str, str] = {}

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
            shorter = re.sub(r"^_if_(then|else)_branch_(token_\d+_)?", "", name)
            for function in self.functions:
                shorter = re.sub(rf"^_inlfunc_{re.escape(function)}(_token_\d+)?_", "", shorter)
            stripped, name = shorter != name, shorter
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
        ran = list(all_nodes(optimized.graph))
        self._aliases = self._moved(ran)
        ends = [self._ends(node) for node in ran]
        stops = {tensor for found in ends for tensor in found} | {i.name for i in optimized.graph.initializer}
        stops |= {name for node in ran for name in map(self._tensor, node.output) if name is not None}
        stands = [self._between(found, stops) for found in ends]
        done = {i for found in stands for i in found}
        readers: dict[str, list[int]] = defaultdict(list)
        for k, node in enumerate(ran):
            for name in node.input:
                readers[name].append(k)
        for k, node in enumerate(ran):
            if not stands[k] and not self._added(node):
                reached = self._reached(k, ran, stands, readers)
                left = [i for i in self._between(reached, stops) if i not in done]
                stands[k] = left or self._calls(node) or self.by_name(node.name)
        for k in reversed(range(len(ran))):  # part of what all its readers are part of
            whole = {tuple(stands[r]) for output in ran[k].output for r in readers[output]}
            if not stands[k] and len(whole) == 1 and not self._added(ran[k]):
                stands[k] = list(whole.pop())
        return Matches([Kernel(node, tuple(found)) for node, found in zip(ran, stands, strict=True)])

    def _added(self, node: onnx.NodeProto) -> bool:
        """Tell whether ORT put in a node that only moves data between kernels."""
        if node.domain == BLOCKED_DOMAIN:
            return node.op_type in REORDERS
        names = (*node.input, *node.output)
        if node.op_type not in MOVERS or self._kept(node) is not None or any("_inlfunc_" in name for name in names):
            return False
        made = [self.nodes[self.made[name]].op for name in map(self._tensor, node.output) if name is not None]
        known = node.input[0] in self.given or self._tensor(node.input[0]) is not None
        return not made or not (known or node.op_type in made)

    def _moved(self, ran: Sequence[onnx.NodeProto]) -> dict[str, str]:
        """Return tensor of the optimised graph -> the original tensor that an added node makes of it."""
        found: dict[str, str] = {}
        for node in reversed(ran):
            if node.input and self._added(node) and self._tensor(node.input[0]) is None:
                name = next((found.get(o) or self._tensor(o) for o in node.output), None)
                if name is not None:
                    found.setdefault(node.input[0], name)
        return found

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
        if self._added(node):
            return []
        tensors = [name for name in map(self._tensor, node.output) if name is not None]
        tensors += [self._aliases[name] for name in node.output if name in self._aliases]
        tensors = [self._inside(name, node) for name in dict.fromkeys(tensors)]
        if not tensors and node.domain == BLOCKED_DOMAIN:
            return self._blocked_end(node)
        # moved into another layout or type as it was: its outputs have new names
        fused = self.named.get(re.sub(r"/\w+Fusion/?$", "", node.name))
        kept = self._kept(node)
        if tensors or (kept is not None and self.nodes[kept].op not in node.op_type):
            return tensors
        kept = fused if kept is None else kept
        if kept is None:
            return tensors
        return [t.name for t in self.nodes[kept].outputs if t.name]

    def _kept(self, node: onnx.NodeProto) -> int | None:
        """Return the original node whose name a node of the optimised graph still has."""
        for name in (node.name, self.plain(node.name), re.sub(r"_token_\d+$", "", node.name)):
            if name in self.named:
                return self.named[name]
        return None

    def _inside(self, name: str, node: onnx.NodeProto) -> str:
        """Return what made `name` in a branch, where `node` is left of an If whose branch took its place."""
        while True:
            maker = self.nodes[self.made[name]]
            if maker.op != "If" or node.op_type == "If":
                return name
            number = next(k for k, t in enumerate(maker.outputs) if t.name == name)
            ends = [g.outputs[number] for g in maker.attrs.values() if isinstance(g, gs.Graph)]
            alike = [t for t in ends if t.inputs and t.inputs[0].op in (node.op_type, "If") and t.name in self.made]
            reads = {self.plain(read) for read in node.input}
            sure = [t for t in alike if reads & {i.name for i in t.inputs[0].inputs}]
            found = sure if len(sure) == 1 else alike
            if len(found) != 1:
                return name
            name = found[0].name

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
        heavy = [i for i in covered if self.nodes[i].op in HEAVY]
        return next(iter(same or heavy or alike or list(covered[-1:])), None)

    def named_op(self, covered: Sequence[int], kernel: str) -> str:
        """Return the operator to count a kernel under: the original one, or ORT's where it made one of several."""
        lead = self.lead(covered, kernel)
        if lead is None:
            return kernel
        op = str(self.nodes[lead].op)
        return op if len(covered) == 1 or op in HEAVY or op in kernel else kernel


def _only_result(tensor: gs.Tensor, *ops: str) -> gs.Tensor:
    """Return what the only reader of `tensor` makes of it, if that is one of `ops`; else `tensor`."""
    readers = tensor.outputs
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op in ops else tensor


def _label(node: gs.Node) -> str:
    return node.name or f"{node.op} -> {node.outputs[0].name if node.outputs else '?'}"


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            stack.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
            stack.extend(g for a in node.attribute for g in a.graphs)
