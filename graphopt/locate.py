"""Where the difference between two models begins: the first inner tensor that differs, and the node that made it.

The models need not have the same structure.  Ifs are replaced by the branch taken; then tensors that both models
have, by name or by an equal node that makes them, are compared in the second model's order.  A node whose
definition and inputs are those of the first model cannot bring in a difference: the culprit is the first one that
is not, and whose result is further off than what it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.compare import leaves
from graphopt.edit import label
from graphopt.errors import DataError, ModelError
from graphopt.flatten import Flat, flatten
from graphopt.model import Model, Source, load
from graphopt.ops import NONDETERMINISTIC
from graphopt.runtime import Session
from graphopt.sameness import Sameness
from graphopt.tensors import is_float

NOISE = 1e-7
"""Relative errors up to this are one rounding of a float32."""

CHUNK = 200
"""Tensors fetched in one run."""

_NOT_COMPARED = NONDETERMINISTIC | {"Constant"}

GROWTH = 3.0
"""A node brings a difference in when its result is this much further off than its inputs."""

HEALED = 1e-2
"""A difference of which less than this part is left in all that reads the tensor was none."""

MENDED = 24
"""How many nodes are put back, one at a time, to see which mends the outputs."""

SHARE = 1e-3
"""Differences below this part of the largest one found are taken for rounding in rewritten nodes."""


@dataclass(frozen=True)
class Location:
    """The first inner tensor that differs.

    Attributes:
        node: name of the node of the second model that made it (its first output's where it has none).
        op: its operator.
        tensor: the first tensor found to differ; made by the node, or downstream of it where no tensor nearer is
            in both models.
        error: largest error, relative to the reference tensor's largest value; infinite for other shapes or types.
        what: how the node differs from its counterpart in the first model, in words.
        path: names of the If, Loop, Scan nodes or functions around it, outermost first.
    """

    node: str
    op: str
    tensor: str
    error: float
    what: str = ""
    path: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; an infinite error is None."""
        return {**asdict(self), "error": self.error if np.isfinite(self.error) else None, "path": list(self.path)}

    def __str__(self) -> str:
        inside = f" in {' / '.join(self.path)}" if self.path else ""
        reason = f": {self.what}" if self.what else ""
        return f"node '{self.node}' ({self.op}){inside}, tensor '{self.tensor}', error {self.error:.2e}{reason}"


def locate(a: Source, b: Source, feeds: Mapping[str, Any]) -> Location | None:
    """Return where `b` first differs from `a` on these feeds; None where it does not.

    Raises:
        GraphoptError: ORT does not run `a` on the feeds.
    """
    first, second = (m if isinstance(m, Model) else load(m) for m in (a, b))
    reference = flatten(first, feeds)
    try:
        candidate = flatten(second, feeds)
        return _Walk(reference, candidate).run(feeds)
    except (DataError, ModelError) as error:
        return _by_structure(first, second, error)


def _by_structure(a: Model, b: Model, error: DataError | ModelError) -> Location | None:
    """Return the first node that is another one, for a model that does not run at all."""
    walk = _Walk(Flat(a.copy()), Flat(b.copy()))
    for node in walk.graph.nodes:
        if id(node) in walk.suspects:
            return walk.location(node, label(node), float("inf"), f"; {error.what}")
    return None


@dataclass
class _Found:
    """A place where a difference comes in: the tensor, its error, the nodes that may have made it."""

    tensor: str
    error: float
    suspects: list[gs.Node] = field(default_factory=list)


class _Walk:
    """Compares two flat models, node by node of the second."""

    def __init__(self, reference: Flat, candidate: Flat) -> None:
        self.reference, self.candidate = reference, candidate
        self.graph = candidate.model.graph
        self.same = Sameness(reference.model, candidate.model)
        self.pairs: dict[str, str] = {}
        self.suspects: set[int] = set()
        self._pair_up()

    def _pair_up(self) -> None:
        """Find for each tensor of the second model its counterpart in the first, and the nodes that are others."""
        producers = {t.name: n for n in self.reference.model.graph.nodes for t in n.outputs if t.name}
        by_name = {n.name: n for n in self.reference.model.graph.nodes if n.name}
        self.pairs = {t.name: t.name for t in self.graph.inputs}
        for node in self.graph.nodes:
            outputs = [t.name for t in node.outputs if t.name]
            shared = next((producers[name] for name in outputs if name in producers), None)
            twin = shared or by_name.get(node.name)
            equal = twin is not None and self.same.nodes(twin, node, self.pairs)
            if not equal and node.op != "Constant":  # its reader is the one to name
                self.suspects.add(id(node))
            if shared is not None:
                self.pairs.update((name, name) for name in outputs if name in producers)
            elif equal and twin is not None:
                self.pairs.update((b.name, a.name) for a, b in zip(twin.outputs, node.outputs, strict=True) if b.name)

    def run(self, feeds: Mapping[str, Any]) -> Location | None:
        """Run both models and return the culprit."""
        errors = self._lasting(dict(self._errors(feeds)))
        found = list(self._introduced(errors))
        if not found:
            return self._unexplained(errors)
        largest = max((f.error for f in found if np.isfinite(f.error)), default=0.0)
        notable = [f for f in found if f.error >= SHARE * largest]
        blamed = [(f, s) for f in notable for s in f.suspects if self.same.is_changed(s)]
        blamed = blamed or [(notable[0], notable[0].suspects[0])]
        others = self._also_changed(errors, SHARE * largest, {id(node) for _, node in blamed})
        chosen, culprit = self._mending(blamed, others, errors, feeds) if len(blamed) + len(others) > 1 else blamed[0]
        return self.location(culprit, chosen.tensor, chosen.error)

    def _lasting(self, errors: dict[str, float]) -> dict[str, float]:
        """Return the errors without those that vanish downstream.

        Where a rewrite gives a tensor's name to another value (a convolution that took in the normalisation after
        it), what reads it is right again: such a tensor has no counterpart.
        """
        ends = {t.name for t in self.graph.outputs}
        reach: dict[str, float] = {}  # the largest error that a tensor's readers show
        for node in reversed(self.graph.nodes):
            shown = 0.0
            for tensor in node.outputs:
                below = reach.get(tensor.name, 0.0)
                own = errors.get(tensor.name)
                if own is not None and own > NOISE and tensor.name not in ends and below < HEALED * min(own, 1.0):
                    del errors[tensor.name]
                    own = None
                shown = max(shown, below if own is None else own)
            for name in _reads(node):
                reach[name] = max(reach.get(name, 0.0), shown)
        return errors

    def _also_changed(self, errors: Mapping[str, float], least: float, known: set[int]) -> list[tuple[_Found, gs.Node]]:
        """Return further nodes that are others than the original's and whose results differ, as their inputs do."""
        found = []
        for node in self.graph.nodes:
            worst = max((errors.get(t.name, 0.0) for t in node.outputs), default=0.0)
            changed = id(node) in self.suspects and id(node) not in known and self.same.is_changed(node)
            if changed and worst >= max(least, NOISE):
                name = next(t.name for t in node.outputs if errors.get(t.name) == worst)
                found.append((_Found(name, worst, [node]), node))
        return found

    def _mending(
        self, blamed: Sequence[tuple[_Found, gs.Node]], others: Sequence[tuple[_Found, gs.Node]],
        errors: Mapping[str, float], feeds: Mapping[str, Any],
    ) -> tuple[_Found, gs.Node]:  # fmt: skip
        """Return the first of the nodes blamed that mends the outputs when it is put back to what the original has.

        In a rewritten model many nodes differ from the original's and are right all the same; putting one of those
        back makes the outputs worse.
        """
        names = [t.name for t in self.graph.outputs if self.pairs.get(t.name) == t.name]
        expected = Session(self.reference.model, optimization="off").run(feeds, names) if names else {}
        before = max((errors.get(name, 0.0) for name in names), default=0.0)
        tried: set[int] = set()
        for found, suspect in (*blamed, *others):
            if id(suspect) in tried or len(tried) >= MENDED:
                continue
            tried.add(id(suspect))
            with self.same.mended(suspect) as mended:
                if mended and self._error_now(expected, feeds) < before / GROWTH:
                    return found, suspect
        largest = max(found.error for found, _ in blamed)
        return next(b for b in blamed if b[0].error >= largest / 10)

    def _error_now(self, expected: Mapping[str, Any], feeds: Mapping[str, Any]) -> float:
        try:
            session = Session(self.candidate.model, optimization="off")
            accepted = {name: value for name, value in feeds.items() if name in session.input_names}
            outputs = session.run(accepted, list(expected))
        except (DataError, ModelError):
            return float("inf")
        return max((difference(expected[name], outputs[name]) for name in expected), default=0.0)

    def _unexplained(self, errors: Mapping[str, float]) -> Location | None:
        """Return the first tensor that differs though every node is the same (random operators, races)."""
        for node in self.graph.nodes:
            for tensor in node.outputs:
                if errors.get(tensor.name, 0.0) > NOISE:
                    return self.location(node, tensor.name, errors[tensor.name])
        return None

    def _introduced(self, errors: Mapping[str, float]) -> Iterator[_Found]:
        """Yield in order the tensors whose difference is not explained by what they are made from."""
        upstream: dict[str, tuple[float, list[gs.Node]]] = {}  # for tensors that cannot be compared
        for node in self.graph.nodes:
            known = 0.0
            suspects: list[gs.Node] = []
            for name in _reads(node):
                if name in errors:
                    known = max(known, errors[name])
                elif name in upstream:
                    known = max(known, upstream[name][0])
                    suspects += [s for s in upstream[name][1] if all(s is not x for x in suspects)]
            if id(node) in self.suspects:
                suspects.append(node)
            compared = [t.name for t in node.outputs if t.name in errors]
            worst = max(compared, key=lambda name: errors[name], default=None)
            if worst is not None and suspects and errors[worst] > max(NOISE, GROWTH * known):
                yield _Found(worst, errors[worst], suspects)
            for tensor in node.outputs:
                if tensor.name and tensor.name not in errors:
                    upstream[tensor.name] = known, suspects

    def _errors(self, feeds: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """Yield (tensor of the second model, error) for all that can be compared."""
        made = [t.name for n in self.graph.nodes if n.op not in _NOT_COMPARED for t in n.outputs if t.name]
        wanted = [(name, self.pairs[name]) for name in made if name in self.pairs]
        if not wanted:
            return
        first = _session(self.reference.model, [a for _, a in wanted])
        second = _session(self.candidate.model, [b for b, _ in wanted])
        wanted = [(b, a) for b, a in wanted if a in first.output_names and b in second.output_names]
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            left = first.run(feeds, list(dict.fromkeys(a for _, a in chunk)))
            right = second.run({k: v for k, v in feeds.items() if k in second.input_names}, [b for b, _ in chunk])
            for b, a in chunk:
                yield b, difference(left[a], right[b])

    def location(self, node: gs.Node, tensor: str, error: float, more: str = "") -> Location:
        """Return the place, named by the node of the models as they were given."""
        around = self.candidate.paths.get(id(node), ())
        for depth, choice in enumerate(around):
            what = self._branch_difference(choice)
            if what:
                path = tuple(label(n) for n in around[:depth])
                return Location(label(choice), choice.op, tensor, error, what + more, path)
        path = tuple(label(n) for n in around)
        if around and node.op == "Identity" and not any(node is n for n in _branch_nodes(around[-1])):
            node, path = around[-1], path[:-1]
        inner = self.same.inner_difference(node)
        if inner is not None:
            culprit, way = inner
            return Location(
                label(culprit), culprit.op, tensor, error, self.same.describe(culprit) + more, (*path, *way)
            )
        return Location(label(node), node.op, tensor, error, self.same.describe(node) + more, path)

    def _branch_difference(self, choice: gs.Node) -> str:
        """Return in words how an If goes another way than its counterpart, '' if it does not."""
        name = choice.outputs[0].name
        if name not in self.reference.taken:
            return ""
        other, way = self.reference.taken[name]
        here = self.candidate.taken[name][1]
        if way != here:
            return f"takes its {'then' if here else 'else'} branch, the original the other one"
        taken, missed = ("then_branch", "else_branch") if here else ("else_branch", "then_branch")
        mine = {t.name for n in choice.attrs[taken].nodes for t in n.outputs}
        its = {t.name for n in other.attrs[taken].nodes for t in n.outputs}
        swapped = {t.name for n in other.attrs[missed].nodes for t in n.outputs}
        if mine and not mine & its and mine & swapped:
            return "its branches are swapped"
        return ""


def _branch_nodes(choice: gs.Node) -> Iterator[gs.Node]:
    for branch in choice.attrs.values():
        if isinstance(branch, gs.Graph):
            yield from branch.nodes


def _reads(node: gs.Node) -> Iterator[str]:
    """Yield names of the tensors that a node and its subgraphs read."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield from (t.name for t in current.inputs if t.name)
        for attribute in current.attrs.values():
            if isinstance(attribute, gs.Graph):
                stack.extend(attribute.nodes)
                yield from (t.name for t in attribute.outputs)


def _session(model: Model, names: Sequence[str]) -> Session:
    """Return a session with inner tensors as outputs; those that ORT cannot return are left out."""
    try:
        return Session(model, optimization="off", extra_outputs=names)
    except ModelError:
        plain = [n for n in names if _is_plain(model, n)]
        return Session(model, optimization="off", extra_outputs=plain)


def _is_plain(model: Model, name: str) -> bool:
    """Tell whether a tensor comes out of an operator that surely makes tensors."""
    node = next((n for n in model.graph.nodes for t in n.outputs if t.name == name), None)
    return node is not None and not node.op.startswith(("Sequence", "Optional", "SplitToSequence", "Loop", "If"))


def difference(a: Any, b: Any) -> float:
    """Return how far two values are apart: relative to the largest of `a`, infinite for other shapes or types.

    For integers, booleans and strings it is the fraction of elements that differ.
    """
    first, second = dict(leaves("", a)), dict(leaves("", b))
    if first.keys() != second.keys():
        return float("inf")
    return max((_array_difference(first[key], second[key]) for key in first), default=0.0)


def _array_difference(a: Any, b: Any) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.size == 0:
        return 0.0
    if not is_float(a.dtype):
        return float(np.mean(a != b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    if not np.all(finite | (x == y) | (np.isnan(x) & np.isnan(y))):
        return float("inf")
    if not finite.any():
        return 0.0
    gap, scale = np.abs(x - y)[finite].max(), np.abs(x)[finite].max()
    return float(gap / scale) if scale > 0 else float(gap)
