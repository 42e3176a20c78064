"""Scales and shifts by constants: merged into one, and folded into the operators around them.

    x * a1 + b1, then * a2 + b2      ->  x * (a1 a2) + (b1 a2 + b2)
    conv(x) * a + b                  ->  conv'(x)                        BatchNormalization is such a map, too
    conv(relu(x * a))                ->  conv'(relu(x))                  a >= 0
    conv(x * a + b), padded          ->  conv'(x + b/a)
    x + x * s,  x * s + x            ->  x * (s + 1)                     s smaller than x

A chain of maps is one map.  It goes backward into what makes its input, else forward into all that read its
output, through operators that it commutes with (`affine_flow`, `affine_joins`), into operators with constant weights
(`affine_weights`), else as much of it as goes (its scale alone, its shift alone); what is left is merged.  Every
change leaves fewer affine nodes than before, so it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine
from graphopt.analysis.constants import is_constant
from graphopt.analysis.steps import step_behind
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node, replace_uses
from graphopt.ops import is_standard
from graphopt.registry import register

from . import affine_joins, affine_weights
from .affine_search import Plan, Search, Task, chain_dtype, fits_type, replace_affine
from .affine_site import MANY, AffineSite, why_not_norm

ROUNDS = 32
"""Times that a graph is gone through while changes make room for others; two or three are usual."""


@register
@dataclass(frozen=True)
class FoldAffine(Pass):
    """Merge scales and shifts by constants, BatchNormalization too, and fold them into the operators around them.

    Exact up to roundings: weights are computed in float64 and rounded once.  Keeps the signature.  Refuses what
    would change a zero-padded edge, a value that others read, a graph output, or a number that is not finite;
    large weights that others use, too; and takes apart no activation or normalisation that ORT fuses as it stands.
    """

    name: ClassVar[str] = "fold-affine"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per chain of maps, and per x + x * s."""
        if int(graph.opset) < 7:
            return
        skipped: set[int] = set()
        site: AffineSite | None = None
        for _ in range(ROUNDS):
            misses: list[Change] = []
            applied = 0
            with Edit(graph) as edit:
                if site is None:
                    site = AffineSite(graph, ctx, edit)
                site.edit = edit
                for change, nodes in _proposals(site, skipped):
                    if change.blocked:
                        misses.append(change)
                        continue
                    done = _Applied(change)
                    yield done.change
                    applied += done.count
                    if not done.count:  # the pipeline left it out
                        skipped.update(id(n) for n in nodes)
            if not applied:
                yield from misses
                return


@dataclass
class _Applied:
    """A change that counts whether it was applied."""

    given: Change
    count: int = 0
    change: Change = field(init=False)

    def __post_init__(self) -> None:
        self.change = Change(self.given.where, self.given.what, self.given.why, self._apply)

    def _apply(self) -> None:
        assert self.given.apply is not None
        self.given.apply()
        self.count += 1


def _proposals(site: AffineSite, skipped: set[int]) -> Iterator[tuple[Change, list[gs.Node]]]:
    for node in list(site.graph.nodes):
        if site.edit.removed(node) or id(node) in skipped:
            continue
        if is_standard(node, "Add") and (change := _residual(site, node)) is not None:
            yield change, [node]
            continue
        given = site.affine(node)
        if given is None:
            if is_standard(node, "BatchNormalization"):
                reason = why_not_norm(site, node) or "its numbers are not finite, or the rank of its input not known"
                yield Change(label(node), "BatchNormalization -> scale and shift", reason), [node]
            continue
        if _continues(site, node):
            continue
        chain = _chain(site, node)
        if any(id(n) in skipped for n in chain):
            continue
        yield _fold(site, chain), chain


def _continues(site: AffineSite, node: gs.Node) -> bool:
    """Tell whether an affine node belongs to a chain that begins before it."""
    source = site.source(node)
    if len(source.inputs) != 1 or not site.edit.is_local(source.inputs[0]) or site.affine(source.inputs[0]) is None:
        return False
    return not site.edit.removed(source.inputs[0]) and _sole(site, source) is node


def _sole(site: AffineSite, tensor: gs.Tensor) -> gs.Node | None:
    return site.edit.sole_consumer(tensor) if len(tensor.outputs) <= MANY else None


def _chain(site: AffineSite, node: gs.Node) -> list[gs.Node]:
    """Return the affine nodes from this one on that read nothing but each other."""
    chain = [node]
    while True:
        reader = _sole(site, chain[-1].outputs[0])
        if reader is None or not site.edit.is_local(reader) or site.affine(reader) is None:
            return chain
        chain.append(reader)


def _whole(site: AffineSite, chain: Sequence[gs.Node]) -> Affine:
    whole = Affine.of()
    for node in chain:
        own = site.affine(node)
        assert own is not None
        whole = whole.then(own)
    return whole


def _fold(site: AffineSite, chain: list[gs.Node]) -> Change:
    """Return the best that can be done about a chain."""
    with np.errstate(all="ignore"):
        whole = _whole(site, chain)
    ops = ", ".join(n.op for n in chain) if len(chain) <= 4 else f"{len(chain)} nodes"
    where = label(chain[-1])
    dtype = chain_dtype(site, chain)
    if dtype is None or not whole.finite:
        return Change(where, f"{ops} -> one map", "the merged numbers are not finite")
    reasons: list[str] = []
    guard = "it changes nothing, but joins what must stay apart" if whole.identity else _guard(chain)
    if guard is None:
        for attempt in _ATTEMPTS:
            found = attempt(site, chain, whole, dtype)
            if isinstance(found, Change):
                return found
            reasons.append(found)
    merged = _merge(site, chain, whole, dtype)
    if merged is not None:
        return merged
    reason = guard or f"backward: {reasons[0]}; forward: {reasons[1]}"
    return Change(where, f"{ops} -> folded", reason)


def _guard(chain: Sequence[gs.Node]) -> str | None:
    """Return why a chain must not be taken apart: ORT fuses it with what stands before it, as it is written."""
    for tensor in chain[0].inputs:
        maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if maker is None:
            continue
        if is_standard(maker, "Mul") and (gate := affine_joins.activation_gate(maker)) is not None:
            return f"it belongs to the activation of {gate.op}, which ORT fuses"
        if is_standard(maker, "Div", "Mul") and any(
            len(t.inputs) == 1 and is_standard(t.inputs[0], "Sqrt", "Reciprocal") for t in maker.inputs
        ):
            return "it belongs to a normalisation, which ORT fuses"
    return None


def _change(
    site: AffineSite, chain: list[gs.Node], found: Plan | str, rest: Affine, dtype: np.dtype[Any], *, backward: bool
) -> Change | str:
    """Return the change that carries out a plan and leaves `rest` where the chain stood, or why not."""
    if isinstance(found, str):
        return found
    if len(chain) - site.cost(rest) + found.gain <= 0:
        return "nothing would be gained"
    if not fits_type(rest, dtype):
        return "what is left is not finite"
    weighted = [n for n in found.nodes if n.op in affine_weights.BACK]
    out = chain[-1].outputs[0]
    if not weighted and (step := step_behind(out)) is not None:
        return f"{step.op} '{label(step)}' may make a step of another rounding"
    source = site.source(chain[0])

    def apply() -> None:
        found.apply(site, source if backward else out)
        _leave(site, chain, rest, dtype, backward=backward)

    takers = ", ".join(f"{n.op} '{label(n)}'" for n in weighted[:3]) or "another map"
    what = "into what makes it" if backward else "into what reads it"
    if not rest.identity:
        what = f"{'scale' if rest.shifts else 'shift'} {what}"
    return Change(label(chain[-1]), f"{_spelled(chain)} {what}", f"{takers} takes it", apply)


def _spelled(chain: Sequence[gs.Node]) -> str:
    return ", ".join(n.op for n in chain) if len(chain) <= 4 else f"{len(chain)} affine nodes"


def _leave(site: AffineSite, chain: list[gs.Node], rest: Affine, dtype: np.dtype[Any], *, backward: bool) -> None:
    """Put `rest` in the place of a chain."""
    source, out = site.source(chain[0]), chain[-1].outputs[0]
    if backward and not rest.identity:  # the input has other values now
        new = site.renamed(source)
        site.edit.hand_over(source.inputs[0], source, new)
        replace_uses(source, new)
        replace_affine(site, chain, rest, dtype)
    elif backward:
        site.edit.hand_over(source.inputs[0], source, out)
    elif rest.identity:
        replace_uses(out, source)
    else:
        new = site.renamed(out)
        made = site.nodes_for(rest, source, new, dtype, [n for n in chain if n.op != "BatchNormalization"] or chain)
        site.edit.insert_after(chain[-1], made)
        replace_uses(out, new)
    for node in chain:
        site.edit.remove(node)


def _back(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | str:
    """All of it into what makes the input."""
    source = site.source(chain[0])
    found = Search(site, chain).plan([Task("back", source, whole, chain[0])])
    return _change(site, chain, found, Affine.of(), dtype, backward=True)


def _fore(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | str:
    """All of it into what reads the output."""
    out = chain[-1].outputs[0]
    found = Search(site, chain).plan([Task("fore", out, whole)])
    return _change(site, chain, found, Affine.of(), dtype, backward=False)


def _scale_back(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | str:
    if not (whole.scales and whole.shifts):
        return ""
    source = site.source(chain[0])
    found = Search(site, chain).plan([Task("back", source, whole.scale_part, chain[0])])
    return _change(site, chain, found, whole.shift_part, dtype, backward=True)


def _scale_fore(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | str:
    """X * a + b = (x + b / a) * a."""
    inverse = whole.scale_inverse()
    if not (whole.scales and whole.shifts) or inverse is None:
        return ""
    found = Search(site, chain).plan([Task("fore", chain[-1].outputs[0], whole.scale_part)])
    rest = Affine.of(1.0, whole.shift * inverse.scale)
    return _change(site, chain, found, rest, dtype, backward=False)


def _shift_fore(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | str:
    if not (whole.scales and whole.shifts):
        return ""
    found = Search(site, chain).plan([Task("fore", chain[-1].outputs[0], whole.shift_part)])
    return _change(site, chain, found, whole.scale_part, dtype, backward=False)


def _shift_back(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | str:
    """X * a + b = (x + b / a) * a."""
    inverse = whole.scale_inverse()
    if not (whole.scales and whole.shifts) or inverse is None:
        return ""
    source = site.source(chain[0])
    found = Search(site, chain).plan([Task("back", source, Affine.of(1.0, whole.shift * inverse.scale), chain[0])])
    return _change(site, chain, found, whole.scale_part, dtype, backward=True)


_ATTEMPTS = (_back, _fore, _scale_back, _scale_fore, _shift_fore, _shift_back)
"""Ways to do away with a map, the best first."""


def _merge(site: AffineSite, chain: list[gs.Node], whole: Affine, dtype: np.dtype[Any]) -> Change | None:
    """Return the change that writes a chain with fewer nodes, if it can be."""
    if site.cost(whole, chain) >= len(chain) or not fits_type(whole, dtype):
        return None
    source, out = site.source(chain[0]), chain[-1].outputs[0]
    if whole.identity and site.edit.why_not_bypass(out, source) is not None:
        return None
    if step_behind(out) is not None:
        return None
    return Change(
        label(chain[-1]),
        f"{_spelled(chain)} -> one map",
        "all are affine",
        lambda: replace_affine(site, chain, whole, dtype),
    )


def _residual(site: AffineSite, add: gs.Node) -> Change | None:
    """X + x * s -> x * (s + 1), where s has fewer axes than x to compute on."""
    if len(add.inputs) != 2 or site.affine(add) is not None:
        return None
    for x, product in (tuple(add.inputs), tuple(reversed(add.inputs))):
        mul = product.inputs[0] if len(product.inputs) == 1 else None
        if mul is None or not is_standard(mul, "Mul") or len(mul.inputs) != 2 or not site.edit.is_local(mul):
            continue
        factor = next((t for i, t in enumerate(mul.inputs) if mul.inputs[1 - i] is x), None)
        if factor is None or is_constant(factor) or is_constant(x) or factor is x:
            continue
        if (reason := site.why_not_read(product, add)) is not None or not _smaller(site, factor, x):
            why = reason or f"'{factor.name}' is not known to be smaller than '{x.name}'"
            return Change(label(add), "x + x * s -> x * (s + 1)", why)
        return Change(
            label(add),
            "x + x * s -> x * (s + 1)",
            f"'{factor.name}' is smaller than '{x.name}'",
            partial(_factored, site, add, mul, x, factor),
        )
    return None


def _smaller(site: AffineSite, factor: gs.Tensor, x: gs.Tensor) -> bool:
    """Tell whether `factor` is 1 along at least one axis along which `x` is, or may be, larger, and nowhere larger."""
    small, large = site.shape(factor), site.shape(x)
    dtype = site.dtype(factor)
    if small is None or large is None or len(small) > len(large) or dtype is None:
        return False
    pairs = list(zip(reversed(small), reversed(large), strict=False))
    return any(s == 1 and big != 1 for s, big in pairs) or any(d != 1 for d in large[: len(large) - len(small)])


def _factored(site: AffineSite, add: gs.Node, mul: gs.Node, x: gs.Tensor, factor: gs.Tensor) -> None:
    dtype = site.dtype(factor)
    assert dtype is not None
    more = site.renamed(factor, "plus_one")
    one = site.constant(f"{factor.name}/one", np.ones((), dtype))
    out, name = add.outputs[0], site.ctx.fresh_name(f"{label(mul)}/plus_one")
    site.edit.set_input(add, 0, x)
    plus = make_node("Add", [factor, one], [more], name=name, like=[mul])
    site.edit.insert_after(mul, [plus])
    site.edit.remove(mul)
    add.op = "Mul"
    add.attrs.clear()
    site.edit.set_input(add, 1, more)
    site.forget(add)
    assert out is add.outputs[0]
