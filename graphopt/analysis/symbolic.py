"""Types, shapes and small values of all tensors, as far as they follow from the types of the model's inputs.

One walk over the graph in order.  Each open axis of an input is a symbol of its own, also where two axes share a
name in the file: ORT does not hold them equal.  What no rule of ours knows is asked of ONNX's inference, node by
node, with our symbols as names of dimensions; what that does not know, either, becomes a new symbol.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis import onnx_inference, symbolic_shapes, symbolic_values
from graphopt.analysis.constants import refers
from graphopt.analysis.facts import UNKNOWN, Fact, Site, of_constant
from graphopt.analysis.impossible import impossible
from graphopt.analysis.symbolic_expr import Expr, Size, TooComplexError, symbol
from graphopt.analysis.symbolic_layers import needed_sizes
from graphopt.model import Model
from graphopt.ops import is_standard

_MOST_CALLS = 20_000
"""Nodes of function bodies that are followed, over all calls."""

_MOST_ROUNDS = 3
"""Times that a loop's body is looked at before its variables count as unknown."""


class Symbolic:
    """Facts about the tensors of a model, as it is when this is made.

    Args:
        model: what to look at; not changed.
        inputs: input name -> shape, where the model leaves dimensions open.
        assumed: id of an If -> the attribute that holds the branch taken to run.
        watched: the graph in which what is impossible counts, the main graph if None; no body of a loop.

    Attributes:
        impossible: why that graph cannot run, where one of its nodes gets what it never takes.
    """

    def __init__(
        self,
        model: Model,
        inputs: Mapping[str, Sequence[int]] | None = None,
        assumed: Mapping[int, str] | None = None,
        watched: gs.Graph | None = None,
    ) -> None:
        self.impossible: str | None = None
        self._watched = model.graph if watched is None else watched
        self._assumed = dict(assumed or {})
        self._facts: dict[int, tuple[Fact, gs.Tensor]] = {}
        self._functions = {(f.domain or "", f.name): f for f in model.functions}
        self._calls = _MOST_CALLS
        self._made: Counter[str] = Counter()
        self._base = ""
        self._opset = int(model.opset)
        self._low: dict[str, int] = {}
        self._always = self._counts = False
        self._in_doubt = False
        self._walk(model, inputs or {})
        if self._low and self._in_doubt:
            self._walk(model, inputs or {})

    def _walk(self, model: Model, inputs: Mapping[str, Sequence[int]]) -> None:
        """Find all facts; a second time where the layers asked for sizes that decide what was left open."""
        self._facts.clear()
        self._made.clear()
        self._main = model.graph
        self._inputs(model, inputs)
        self._graph(model.graph)

    def of(self, tensor: gs.Tensor) -> Fact:
        """Return what is known of a tensor."""
        held = self._facts.get(id(tensor))
        if held is not None:
            return held[0]
        if isinstance(tensor, gs.Constant):
            return self._keep(tensor, of_constant(tensor))
        return UNKNOWN

    def _keep(self, tensor: gs.Tensor, fact: Fact) -> Fact:
        self._facts[id(tensor)] = fact, tensor  # with the tensor: an id is its own only as long as it lives
        return fact

    def fresh(self) -> Expr:
        """Return a new symbol, called after the node that is looked at: the same whenever the model is."""
        self._made[self._base] += 1
        return symbol(f"{self._base}?{self._made[self._base]}")

    def _axis(self, name: str) -> Expr:
        """Return an axis of an input, with what the layers ask of it."""
        return symbol(name, self._low.get(name, 0))

    def _inputs(self, model: Model, given: Mapping[str, Sequence[int]]) -> None:
        names = Counter(d for t in model.graph.inputs for d in (t.shape or ()) if isinstance(d, str))
        for place, tensor in enumerate(model.graph.inputs):
            shape: tuple[Size, ...] | None = None
            if tensor.name in given:
                shape = tuple(int(d) for d in given[tensor.name])
            elif tensor.shape is not None:
                dims = enumerate(tensor.shape)
                shape = tuple(
                    d if isinstance(d, int) and d >= 0 else self._axis(_axis_name(d, tensor.name, place, axis, names))
                    for axis, d in dims
                )
            self._keep(tensor, Fact(None if tensor.dtype is None else np.dtype(tensor.dtype), shape))

    def _graph(self, graph: gs.Graph) -> None:
        opset = int(graph.opset or self._opset)
        for node in graph.nodes:
            self._always = graph is self._main
            self._counts = graph is self._watched
            self.follow(node, opset)

    def follow(self, node: gs.Node, opset: int) -> None:
        """Take down what is known of the outputs of a node, one that was made since, too."""
        self._base = _plain(next((t.name for t in node.outputs if t.name), ""))
        try:
            found = self._node(node, opset)
        except TooComplexError:
            found = onnx_inference.infer(node, opset, [self.of(t) for t in node.inputs], self.fresh)
        for index, tensor in enumerate(node.outputs):
            if tensor.name:
                self._keep(tensor, found[index] if index < len(found) else UNKNOWN)

    def _node(self, node: gs.Node, opset: int) -> Sequence[Fact]:
        function = self._functions.get((node.domain or "", node.op)) if self._functions else None
        if function is not None:
            return self._call(function, node)
        if not is_standard(node):
            return onnx_inference.infer(node, opset, [self.of(t) for t in node.inputs], self.fresh)
        special = _CONTROL.get(node.op)
        if special is not None:
            return special(self, node)
        if refers(node):
            return []
        if node.op == "Constant":
            return [of_constant(node.outputs[0])]
        site = Site(node, opset, [self.of(t) for t in node.inputs], self.fresh)
        if self._counts and self.impossible is None:
            self.impossible = impossible(site)
        return self._by_rule(site)

    def _by_rule(self, site: Site) -> Sequence[Fact]:
        rule = symbolic_shapes.RULES.get(site.node.op)
        found = rule(site) if rule is not None else None
        for name, least in needed_sizes(site) if self._always else ():
            self._low[name] = max(least, self._low.get(name, 0))
        if found is None:
            return onnx_inference.infer(site.node, site.opset, site.inputs, self.fresh)
        values = symbolic_values.RULES.get(site.node.op)
        first = found[0]
        if values is None or not first.follows_values:
            return found
        if site.node.op not in symbolic_values.SOURCES and all(f.values is None for f in site.inputs):
            return found
        known = values(site, first)
        assert first.dtype is not None
        if known is not None and known.shape == first.static:
            self._in_doubt |= None in known.flat and all(f.values is not None for f in site.inputs)
            found[0] = Fact(first.dtype, first.shape, symbolic_values.within(known, first.dtype))
        return found

    def _call(self, function: gs.Function, node: gs.Node) -> Sequence[Fact]:
        """Follow a call of a local function; what is found inside holds for this call only."""
        self._calls -= len(function.nodes)
        if self._calls < 0:
            return []
        inner = [t for n in function.nodes for t in n.outputs]
        before = {id(t): self._facts.get(id(t)) for t in (*inner, *function.inputs)}
        for tensor, given in itertools.zip_longest(function.inputs, node.inputs[: len(function.inputs)]):
            self._keep(tensor, UNKNOWN if given is None else self.of(given))
        self._graph(function)
        results = [self.of(t) for t in function.outputs]
        for key, held in before.items():
            if held is None:
                self._facts.pop(key, None)
            else:
                self._facts[key] = held
        return results

    def branches(self, node: gs.Node) -> Sequence[Fact]:
        """Return the facts of an If: of the branch that runs, else what both agree on."""
        graphs = [a for a in node.attrs.values() if isinstance(a, gs.Graph)]
        condition = self.of(node.inputs[0]).known_values
        chosen = self._assumed.get(id(node))
        if chosen is None and condition is not None and condition.size == 1:
            chosen = "then_branch" if condition.reshape(-1)[0] else "else_branch"
        if chosen in node.attrs:
            graphs = [node.attrs[chosen]]
        for graph in graphs:
            self._graph(graph)
        rows = zip(*([self.of(t) for t in g.outputs] for g in graphs), strict=False)
        return [self.joined(row) for row in rows]

    def joined(self, facts: Sequence[Fact]) -> Fact:
        """Return what holds of a tensor that is one of several."""
        first = facts[0]
        dtype = first.dtype if all(f.dtype == first.dtype for f in facts) else None
        if any(f.shape is None or first.shape is None or len(f.shape) != len(first.shape) for f in facts):
            return Fact(dtype)
        assert first.shape is not None
        shapes = [f.shape for f in facts if f.shape is not None]
        sizes = [d if all(s[i] == d for s in shapes) else self.fresh() for i, d in enumerate(first.shape)]
        values = None
        if first.values is not None and all(_equal_values(f, first) for f in facts):
            values = first.values
        return Fact(dtype, tuple(sizes), values)

    def loop(self, node: gs.Node) -> Sequence[Fact]:
        """Return the facts of a Loop; its variables keep a shape if the body keeps it."""
        body, carried = node.attrs["body"], len(node.inputs) - 2
        int64, boolean = Fact(np.dtype(np.int64), ()), Fact(np.dtype(bool), ())
        states = self._settled(body, [int64, boolean], [self.of(t) for t in node.inputs[2:]], skipped=1)
        scans = [self._stacked(self.of(t), 0, self.fresh(), certain=False) for t in body.outputs[1 + carried :]]
        return [*states, *scans]

    def scan(self, node: gs.Node) -> Sequence[Fact]:
        """Return the facts of a Scan (opset 9 and later)."""
        count = node.attrs.get("num_scan_inputs")
        body = node.attrs["body"]
        if not isinstance(count, int) or len(node.inputs) != len(body.inputs):
            self._graph(body)  # opset 8 has a batch axis
            return []
        held = len(node.inputs) - count
        axes = list(node.attrs.get("scan_input_axes") or [0] * count)
        slices = [self.of(t) for t in node.inputs[held:]]
        length: Size = self.fresh()
        rows = []
        for fact, axis in zip(slices, axes, strict=True):
            rows.append(Fact(fact.dtype, None if fact.shape is None else _without(fact.shape, axis)))
            if fact.shape is not None:
                length = fact.shape[axis]
        states = self._settled(body, [], [self.of(t) for t in node.inputs[:held]], skipped=0, rows=rows)
        outs = body.outputs[held:]
        places = list(node.attrs.get("scan_output_axes") or [0] * len(outs))
        scans = [self._stacked(self.of(t), a, length, certain=True) for t, a in zip(outs, places, strict=True)]
        return [*states, *scans]

    def _settled(
        self, body: gs.Graph, first: Sequence[Fact], initial: Sequence[Fact], *, skipped: int, rows: Sequence[Fact] = ()
    ) -> Sequence[Fact]:
        """Look at a body until what it returns has the shapes that it was given; return its variables.

        An axis that a step changes becomes a symbol: its size in the step that is looked at.
        """
        states = [Fact(f.dtype, f.shape) for f in initial]
        opened: set[Size] = set()
        for last in (*[False] * _MOST_ROUNDS, True):
            if last:
                states = [Fact(f.dtype) for f in initial]
            for tensor, fact in zip(body.inputs, (*first, *states, *rows), strict=False):
                self._keep(tensor, fact)
            self._graph(body)
            after = [self.of(t) for t in body.outputs[skipped : skipped + len(states)]]
            wider = [self._widened(a, b, opened) for a, b in zip(states, after, strict=True)]
            if wider == states:
                break
            states = wider
        return [self._left(fact, opened) for fact in states]

    def _widened(self, given: Fact, returned: Fact, opened: set[Size]) -> Fact:
        """Return what holds of a loop's variable before and after a step."""
        dtype = given.dtype if given.dtype == returned.dtype else None
        if given.shape is None or returned.shape is None or len(given.shape) != len(returned.shape):
            return Fact(dtype)
        sizes = list(given.shape)
        for axis, (a, b) in enumerate(zip(given.shape, returned.shape, strict=True)):
            if a != b and a not in opened:
                sizes[axis] = self.fresh()
                opened.add(sizes[axis])
        return Fact(dtype, tuple(sizes))

    def _left(self, fact: Fact, opened: set[Size]) -> Fact:
        """Return a variable as the last step leaves it."""
        if fact.shape is None:
            return fact
        return Fact(fact.dtype, tuple(self.fresh() if size in opened else size for size in fact.shape))

    def _stacked(self, fact: Fact, axis: int, length: Size, *, certain: bool) -> Fact:
        """Return the fact of rows put together along a new axis; `certain`: there is a row for each step."""
        if fact.shape is None:
            return Fact(fact.dtype)
        sizes = list(fact.shape if certain else [self.fresh() for _ in fact.shape])
        sizes.insert(axis if axis >= 0 else len(sizes) + 1 + axis, length)
        return Fact(fact.dtype, tuple(sizes))


def _axis_name(dim: object, name: str, place: int, axis: int, names: Counter[str]) -> str:
    """Return what an open axis of an input is called: as in the file where that is unmistakable."""
    if isinstance(dim, str) and names[dim] == 1 and _plain(dim):
        return dim
    return f"{_plain(name) or place}[{axis}]"


def _plain(name: str) -> str:
    """Return a name that cannot be taken for an expression, nothing for others."""
    return name if re.fullmatch(r"[A-Za-z_/][\w./:]*", name, re.ASCII) else ""


def _without(shape: tuple[Size, ...], axis: int) -> tuple[Size, ...]:
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def _equal_values(a: Fact, b: Fact) -> bool:
    if a.values is None or b.values is None or a.values.shape != b.values.shape:
        return False
    pairs: Iterable[tuple[object, object]] = zip(a.values.flat, b.values.flat, strict=True)
    return all(x is not None and type(x) is type(y) and x == y for x, y in pairs)


_CONTROL = {"If": Symbolic.branches, "Loop": Symbolic.loop, "Scan": Symbolic.scan}
