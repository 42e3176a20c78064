"""Rewrite rules: algebra, written as Python, and the driver that applies them to a fixpoint.

    class HardSwish(Rule):
        "x * clip(x + 3, 0, 6) / 6  ->  HardSwish(x)"
        min_opset = 14

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return x * op.Clip(x + 3.0, 0.0, 6.0) / 6.0

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.HardSwish(x)

    @register
    @dataclass(frozen=True)
    class FuseActivations(RulePass):
        "Recognise activations that exporters take apart."
        name: ClassVar[str] = "fuse-activations"
        rules: ClassVar = (HardSwish,)

What `pattern` may say stands in `graphopt.pattern`.  What everybody forgets is checked here for every rule: inner
values that others read or the graph returns, types, opsets, shapes that would change, weights that would be kept
twice, constants that overflow, scopes.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label
from graphopt.errors import InternalError, SpecError, did_you_mean
from graphopt.matcher import Bindings, Matcher, NodeView, results_of
from graphopt.pattern import Constant, Literal, Many, Number, Op, Pattern, Result, Scalar, Value, as_value, trace
from graphopt.replacement import Emitter, Replacement, differs, not_finite, plan

__all__ = [
    "FLOATS",
    "Constant",
    "Many",
    "Match",
    "Op",
    "RefusedError",
    "Rewriter",
    "Rule",
    "RulePass",
    "Scalar",
    "Value",
]

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})

_TYPES = FLOATS | {"bool"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}

LARGE = 1024
"""Bytes from which a constant is not kept twice."""

_REPEATS = 16
"""Times that one tensor is rewritten without the graph getting smaller, until that is taken for oscillation."""


_MOST_FIRINGS = 32
"""Times that rules may fire for each node there was, until they are taken for endless."""


class RefusedError(Exception):
    """Raised by a `rewrite` that finds a reason against itself."""


class Match:
    """What a rule matched, for `check`, `worth` and `rewrite` (as their parameter `m`).

    Attributes:
        values: captures by name: `Value`, tuple of them (`Many`), or None.
        out: the values that the pattern's outputs are.
        opset: of the graph.
        shapes: types of all tensors, of inner values too.
    """

    def __init__(self, bound: Bindings, rule: type[Rule], ctx: Context, opset: int) -> None:
        self._bound = bound
        self._shapes = ctx.shapes
        self.opset = opset
        self.shapes = ctx.shapes
        self.values: dict[str, Any] = {
            name: _bind(capture, bound.tensors.get(name), ctx) for name, capture in rule.traced.captures.items()
        }
        self.nodes = [node for _, node in bound.nodes.values()]
        first = _found_outputs(rule.traced, bound)
        self.tensors = first
        self.out = tuple(Value("out", t, ctx.shapes) for t in first)

    def __getitem__(self, name: str) -> NodeView:
        """Return the node of the call that the pattern names so."""
        for called, node in self._bound.nodes.values():
            if called.name == name:
                return NodeView(node, self.opset, self.shapes)
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(called.name == name for called, _ in self._bound.nodes.values())


def _bind(capture: Value, found: Any, ctx: Context) -> Any:
    if found is None:
        return None
    if isinstance(found, tuple):
        return tuple(Value(capture.name, t, ctx.shapes) for t in found)
    return type(capture)(capture.name, found, ctx.shapes)


def _found_outputs(pattern: Pattern, bound: Bindings) -> list[gs.Tensor]:
    found = []
    for output in pattern.outputs:
        for option in results_of(output):
            if id(option.call) in bound.nodes:
                found.append(bound.nodes[id(option.call)][1].outputs[option.index])
                break
    return found


class Rule:
    """A rewrite: where `pattern` is found, and `check` and `worth` have nothing against it, `rewrite` goes there.

    The docstring's first line is the algebra.  `check(...)` returns why the rewriting would be wrong, `worth(...)`
    why it would not pay; both None where it is fine.  `where(...)` keeps near misses out of the report that nobody
    would take for one; what is wrong to rewrite is `check`'s to say, without it.  They and `rewrite(op, ...)` name as
    parameters the captures they need, and `m` for the whole `Match`.

    Class attributes:
        min_opset, max_opset: operator sets in which both sides exist.
        types: element types of the first output for which it holds; None for any.
        shapes: capture -> "n c h w": sizes; letters that come twice are proved equal, "..." is any others before.
        shared: whether inner values may have other readers (the nodes that make them stay, then).
        copies: whether large constants that others read too may be kept twice.
        widens: whether the result may be a number where the original is NaN.
    """

    pattern: ClassVar[Callable[..., Any]]
    rewrite: ClassVar[Callable[..., Any]]
    where: ClassVar[Callable[..., bool] | None] = None
    check: ClassVar[Callable[..., str | None] | None] = None
    worth: ClassVar[Callable[..., str | None] | None] = None
    min_opset: ClassVar[int] = 1
    max_opset: ClassVar[int | None] = None
    types: ClassVar[frozenset[str] | None] = FLOATS
    shapes: ClassVar[Mapping[str, str]] = {}
    shared: ClassVar[bool] = False
    copies: ClassVar[bool] = False
    widens: ClassVar[bool] = False
    traced: ClassVar[Pattern]

    def __init_subclass__(cls, **options: Any) -> None:
        """Trace the pattern.

        Raises:
            SpecError: it has no docstring, pattern or rewriting, or they do not fit.
        """
        super().__init_subclass__(**options)
        where = f"class {cls.__module__}.{cls.__qualname__}"
        if not (cls.__doc__ or "").strip():
            raise SpecError("a rule needs a docstring", at=where, hint="its first line is the algebra")
        for name in ("pattern", "rewrite"):
            if not callable(getattr(cls, name, None)):
                raise SpecError(f"the rule has no {name}", at=where, hint="two static methods: pattern and rewrite")
        cls.traced = trace(cls.pattern)
        for kind in cls.types or ():
            if kind not in _TYPES:
                raise SpecError(
                    f"'{kind}' is no element type", at=f"{where}, types", hint=did_you_mean(kind, _TYPES) or "float32 …"
                )
        for name in ("rewrite", "where", "check", "worth"):
            function = getattr(cls, name)
            unknown = set(_parameters(function)) - set(cls.traced.captures) - {"op", "m"} if function else set()
            if unknown:
                raise SpecError(
                    f"{name} asks for '{min(unknown)}'", at=where, hint="the pattern's captures, op and m are there"
                )

    @classmethod
    def summary(cls) -> str:
        """Return the docstring's first line: the algebra."""
        return (cls.__doc__ or "").strip().splitlines()[0]


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def ask(function: Callable[..., Any] | None, match: Match) -> Any:
    """Call a rule's function with the captures that it names."""
    if function is None:
        return None
    known = {**match.values, "op": Op(), "m": match}
    return function(**{name: known[name] for name in _parameters(function)})


@dataclass
class _Found:
    """A proposed change; once applied, the nodes at which rules may match now."""

    change: Change
    applied: bool = False
    changed: list[gs.Node] = field(default_factory=list)


@dataclass(frozen=True)
class RulePass(Pass):
    """A family of rules, applied until none fires."""

    rules: ClassVar[Sequence[type[Rule]]] = ()

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per match; near misses last."""
        with Edit(graph) as edit:
            yield from Rewriter(edit, ctx, self.rules).changes()


@functools.cache
def _indexed(rules: tuple[type[Rule], ...]) -> tuple[dict[str, list[tuple[type[Rule], frozenset[str]]]], int]:
    """Return rules, with all operators that they need, by those that they start at; and the depth of the deepest."""
    index: dict[str, list[tuple[type[Rule], frozenset[str]]]] = {}
    for rule in rules:
        needs = rule.traced.needs()
        for op in dict.fromkeys(r.call.op for r in _roots(rule)):
            index.setdefault(op, []).append((rule, needs))
    return index, max((rule.traced.depth() for rule in rules), default=0)


class Rewriter:
    """Applies rules to one graph, from a work list indexed by operator.

    Args:
        edit: the edits of the graph.
        ctx: what the pass may use.
        rules: in the order in which they are tried at a node.
    """

    def __init__(self, edit: Edit, ctx: Context, rules: Sequence[type[Rule]]) -> None:
        self.edit = edit
        self.ctx = ctx
        self.opset = int(edit.graph.opset)
        self.matcher = Matcher(edit)
        self.emitter = Emitter(edit, ctx, initializers=ctx.holds_initializers(edit.graph))
        self.index, self.depth = _indexed(tuple(rules))
        self.near: dict[tuple[str, int], tuple[gs.Node, Change]] = {}
        self.left = _MOST_FIRINGS * (len(edit.graph.nodes) + 1)
        self.repeats: Counter[str] = Counter()
        self.fired: dict[str, list[str]] = {}

    def changes(self) -> Iterator[Change]:
        """Yield a change for every match, then the near misses that are left."""
        present = {n.op for n in self.edit.graph.nodes}
        waiting = deque(n for n in self.edit.graph.nodes if n.op in self.index)
        queued = {id(n) for n in waiting}
        while waiting:
            node = waiting.popleft()
            queued.discard(id(node))
            if self.edit.removed(node):
                continue
            for rule, needs in self.index.get(node.op, ()):
                found = self._try(rule, node) if needs <= present else None
                if found is None:
                    continue
                yield found.change
                if found.applied:  # the pipeline may have reached its limit
                    present.update(n.op for n in found.changed)
                    for other in self._affected(found.changed):
                        if id(other) not in queued:
                            queued.add(id(other))
                            waiting.append(other)
                    break
        yield from (change for node, change in self.near.values() if not self.edit.removed(node))

    def _affected(self, new: Sequence[gs.Node]) -> Iterator[gs.Node]:
        """Yield the nodes at which a rule may match now: the new ones, and what reads them within its depth."""
        level, seen = list(new), set[int]()
        for _ in range(self.depth + 1):
            following: list[gs.Node] = []
            for node in level:
                if id(node) in seen or self.edit.removed(node) or not self.edit.is_local(node):
                    continue
                seen.add(id(node))
                if node.op in self.index:
                    yield node
                following += [c for t in node.outputs for c in t.outputs]
            level = following

    def _try(self, rule: type[Rule], node: gs.Node) -> _Found | None:
        """Return what a rule would change at a node, noting why not where only a guard is against it."""
        key = (rule.__name__, id(node))
        self.near.pop(key, None)
        for bound in self.matcher.matches(rule.traced, node):
            match = Match(bound, rule, self.ctx, self.opset)
            found = self._examine(rule, match)
            if isinstance(found, str):
                if found:
                    self.near.setdefault(key, (node, Change(label(node), f"{rule.__name__}: {rule.summary()}", found)))
                continue
            self.near.pop(key, None)
            return self._proposal(rule, node, match, found)
        return None

    def _proposal(self, rule: type[Rule], node: gs.Node, match: Match, planned: Replacement) -> _Found:
        def apply() -> None:
            found.changed = self._apply(rule, match, planned)
            found.applied = True

        found = _Found(Change(label(node), f"{rule.__name__}: {rule.summary()}", "", apply))
        return found

    def _examine(self, rule: type[Rule], match: Match) -> Replacement | str:
        """Return what would replace a match, or why nothing may (empty where it is none)."""
        if rule.where is not None and not ask(rule.where, match):
            return ""
        reason = self._guard(rule, match) or ask(rule.check, match) or ask(rule.worth, match)
        if reason:
            return str(reason)
        try:
            made = ask(rule.rewrite, match)
        except RefusedError as refused:
            return str(refused)
        several = isinstance(made, tuple) or (isinstance(made, Result) and made.call.outputs == len(match.tensors) > 1)
        values = [as_value(v) for v in (made if several else (made,))]
        if len(values) != len(match.tensors) or any(v is None or isinstance(v, Number | Literal) for v in values):
            raise SpecError(
                f"rewrite returned {made!r} for {len(match.tensors)} outputs",
                at=f"rule {rule.__name__}",
                hint="it returns a value for each output of the pattern",
            )
        planned = plan([v for v in values if v is not None], self.opset)
        return self._refusal(rule, match, planned) or planned

    def _guard(self, rule: type[Rule], match: Match) -> str | None:
        """Return what every rule must mind before it rewrites."""
        if self.opset < rule.min_opset or (rule.max_opset is not None and self.opset > rule.max_opset):
            last = f" to {rule.max_opset}" if rule.max_opset is not None else ""
            return f"the graph is of opset {self.opset}, the rule is for {rule.min_opset}{last}"
        dtype = match.out[0].dtype
        if rule.types is not None and (dtype is None or dtype.name not in rule.types):
            return f"the type is {dtype or 'unknown'}"
        return self._inner(rule, match) or _unify(rule, match) or _broadens(match)

    def _inner(self, rule: type[Rule], match: Match) -> str | None:
        """Return which inner value is read elsewhere."""
        outputs = {id(t) for t in match.tensors}
        inside = {id(n) for n in match.nodes}
        for node in match.nodes:
            roots = [t for t in node.outputs if id(t) in outputs]
            for tensor in node.outputs:
                if id(tensor) in outputs or not tensor.name:
                    continue
                if roots and self.edit.is_used(tensor):
                    return f"output '{tensor.name}' of node '{label(node)}' is used, too"
                if rule.shared:
                    continue
                if self.edit.is_output(tensor):
                    return f"inner value '{tensor.name}' is a graph output"
                other = next((c for c in tensor.outputs if id(c) not in inside and self._reads(c, tensor)), None)
                if other is not None:
                    return f"inner value '{tensor.name}' is read by node '{label(other)}', too"
        return None

    def _reads(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        return not self.edit.removed(node) and any(t is tensor for t in node.inputs)

    def _refusal(self, rule: type[Rule], match: Match, planned: Replacement) -> str | None:
        """Return what speaks against a replacement once it is known."""
        for value, old in zip(planned.values, match.out, strict=True):
            reason = differs(planned.type_of(value), old.type)
            if reason is None and not isinstance(value, Result):
                reason = self.edit.why_not_bypass(old.tensor, value.tensor)
            if reason:
                return reason
        if not rule.copies and planned.new_bytes() > LARGE:
            shared = self._shared_constant(match)
            if shared is not None:
                return f"constant '{shared.name}' is used elsewhere, too"
        return not_finite(planned)

    def _shared_constant(self, match: Match) -> gs.Tensor | None:
        inside = {id(n) for n in match.nodes}
        for node in match.nodes:
            for tensor in node.inputs:
                if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) * tensor.dtype.itemsize <= LARGE:
                    continue
                if any(id(c) not in inside and self._reads(c, tensor) for c in tensor.outputs):
                    return tensor
        return None

    def _apply(self, rule: type[Rule], match: Match, planned: Replacement) -> list[gs.Node]:
        """Put the replacement in, take out what nobody reads any more; return the nodes with new surroundings."""
        readers = [c for t in match.tensors for c in self.edit.consumers(t)]
        replaced = sorted(match.nodes, key=lambda n: not any(t is match.tensors[0] for t in n.outputs))
        name = match.tensors[0].name
        new = self.emitter.put(planned, match.tensors, replaced, rule.__name__)
        gone = self._drop(replaced)
        self.fired.setdefault(name, []).append(rule.__name__)
        self.left -= 1
        if self.left < 0:
            raise InternalError(f"rules find no end: {rule.__name__} fires on '{name}' after all others")
        if len(new) >= gone:
            self.repeats[name] += 1
            if self.repeats[name] > _REPEATS:
                among = ", ".join(sorted(set(self.fired[name])))
                raise InternalError(f"rules rewrite '{name}' again and again: {among}")
        return new or readers

    def _drop(self, nodes: Sequence[gs.Node]) -> int:
        """Remove the nodes whose outputs nobody uses, in whatever order that takes; return how many."""
        left, gone = list(nodes), 0
        while True:
            dead = [n for n in left if not any(t.name and self.edit.is_used(t) for t in n.outputs)]
            if not dead:
                return gone
            for node in dead:
                self.edit.remove(node)
            gone += len(dead)
            left = [n for n in left if not any(n is d for d in dead)]


def _roots(rule: type[Rule]) -> list[Any]:
    return results_of(rule.traced.outputs[0])


def _unify(rule: type[Rule], match: Match) -> str | None:
    """Return which capture does not have the sizes that the rule wants."""
    letters: dict[str, tuple[int | str | None, str]] = {}
    for name, wanted in rule.shapes.items():
        value = match.values.get(name)
        if value is None:
            continue
        sizes, shape = wanted.split(), value.shape
        if shape is None:
            return f"the rank of {name} is unknown"
        if sizes and sizes[0] == "...":
            sizes = sizes[1:]
            shape = shape[len(shape) - len(sizes) :] if len(shape) >= len(sizes) else shape
        if len(sizes) != len(shape):
            return f"{name} has rank {len(value.shape)}, not {len(sizes)}"
        for letter, size in zip(sizes, shape, strict=True):
            reason = _unify_size(letter, size, name, letters, wanted)
            if reason:
                return reason
    return None


def _unify_size(
    letter: str, size: int | str | None, name: str, letters: dict[str, tuple[int | str | None, str]], wanted: str
) -> str | None:
    if letter.isdigit():
        return None if size == int(letter) else f"{name} is not of shape [{wanted}]: {size} for {letter}"
    if letter not in letters:
        letters[letter] = size, name
        return None
    known, other = letters[letter]
    if size is not None and size == known:  # equal symbols are equal sizes
        return None
    return f"{name} and {other} differ in size {letter}: {size or 'unknown'} and {known or 'unknown'}"


def _broadens(match: Match) -> str | None:
    """Return which constant may give the result another rank, where that rank is unknown."""
    if match.out[0].rank is not None:
        return None
    for node in match.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and len(tensor.shape) > 0 and len(node.inputs) == 2:
                return f"the rank of '{match.out[0].tensor.name}' is unknown and '{tensor.name}' may raise it"
    return None
