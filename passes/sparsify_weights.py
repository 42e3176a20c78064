"""Elements of weights set to zero: unstructured, or N of every M.

The graph stays as it is, and so does the time that ONNX Runtime takes: it computes with the zeros.  What becomes
smaller is the file (see `docs/sparsity.md`); runtimes with sparse kernels gain time, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Exactness, Loss, Pass
from graphopt.edit import Edit
from graphopt.errors import DataError
from graphopt.linear_layer import LinearLayer
from graphopt.moments import Fit
from graphopt.registry import register
from graphopt.sparse_fit import allocate, curves, fitted, grams, pruned, second_moments, usable
from graphopt.sparse_layers import SparseLayer, find
from graphopt.sparse_marks import Mark, marks, write_mark
from graphopt.sparsity import SAMPLED, Criterion, Pattern, Spread, lowest, lowest_in_runs, over_all

from .reconstruct_weights import targets

Array = np.ndarray[Any, Any]

STORAGES = ("sparse", "dense")

EMPTY = 0.999
"""Part of a weight's zeros above which nothing comes through."""


@register
@dataclass(frozen=True)
class SparsifyWeights(Pass):
    """Set a part of the weights of Conv, Gemm, MatMul and recurrent layers to zero.

    Lossy; biases, norms and small weights stay.  The same request again does nothing, a higher amount goes on from
    there.  Sources: see `graphopt.sparsity`.

    Options:
        amount: part of the elements, between 0 and 1; where there is a pattern, it is the pattern's.
        criterion: magnitude, random, gradient (needs those of the model as it is here); wanda and sparsegpt need
            samples: with these, global amounts follow from the noise that each layer makes at the outputs.
        spread: global (over all layers together) or per-layer (the same part of each).
        pattern: N:M leaves at most N of every M inputs that follow each other (Conv: of channels).
        only, skip: globs of layer names.
        storage: sparse lets the file hold weights in sparse form where that is smaller; dense does not.
    """

    name: ClassVar[str] = "sparsify-weights"
    exactness: ClassVar[Exactness] = "lossy"
    loses: ClassVar[Loss] = "structure"
    scope: ClassVar[Any] = "model"
    amount: float = 0.5
    criterion: str = "magnitude"
    spread: str = "global"
    pattern: str = ""
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    storage: str = "sparse"

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name, known in (
            ("criterion", get_args(Criterion)), ("spread", get_args(Spread)), ("storage", STORAGES),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 0 < self.amount < 1:  # NaN too
            raise ValueError(f"amount lies between 0 and 1, not at {self.amount:g}")
        Pattern.parse(self.pattern)

    @property
    def _runs(self) -> Pattern | None:
        return Pattern.parse(self.pattern)

    @property
    def _part(self) -> float:
        """Part of the elements that becomes zero."""
        return self._runs.amount if self._runs else self.amount

    @property
    def request(self) -> str:
        """What is asked for, as metadata has it."""
        return f"{self._part:.6g} {self.criterion} {'pattern' if self.pattern else self.spread}"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each weight."""
        if self.criterion == "gradient" and not ctx.gradients:
            raise DataError("this criterion looks at gradients, and there are none", hint="give --gradients FILE")
        layers: list[SparseLayer] = []
        for each in ctx.model.graphs():
            found, blocked = find(ctx.model, each, self.only, self.skip)
            for where, why in blocked.items():
                yield Change(where, "zeros in its weight", why)
            layers += found
        for layer in list(layers):
            why = self._why_not(layer, ctx)
            if why:
                layers.remove(layer)
                yield Change(layer.label, "zeros in its weight", why)
        if not layers or all(self._done(ctx, layer) for layer in layers):
            return
        if self.criterion not in SAMPLED:
            yield from self._scored(ctx, layers)
            return
        linear, blocked = usable(graph, layers)
        for where, why in blocked.items():
            yield Change(where, "zeros in its weight", why)
        layers = [layer for layer in layers if layer.label in linear]
        amounts = self._amounts(ctx, layers)
        if self.criterion == "wanda":
            yield from self._weighed(ctx, layers, amounts)
        else:
            yield from self._fitted(graph, ctx, {each.label: (each, linear[each.label]) for each in layers}, amounts)

    def _amounts(self, ctx: Context, layers: Sequence[SparseLayer]) -> dict[str, float]:
        """Return the part of each layer that becomes zero."""
        if self._runs or self.spread == "per-layer":
            return {layer.label: self._part for layer in layers}
        found = allocate(curves(ctx, layers, self.amount, self.criterion), self.amount)
        return {layer.label: found.get(layer.label, self.amount) for layer in layers}

    def _weighed(self, ctx: Context, layers: Sequence[SparseLayer], amounts: Mapping[str, float]) -> Iterator[Change]:
        for layer, gram in grams(ctx, layers):
            weight = layer.rows(layer.values())
            found = pruned(layer, weight, second_moments(gram), amounts[layer.label], "wanda", self._runs)
            yield self._change(ctx, layer, layer.from_rows(found.weight), _left(found.error, gram.count))

    def _fitted(
        self, graph: gs.Graph, ctx: Context, layers: Mapping[str, tuple[SparseLayer, LinearLayer]],
        amounts: Mapping[str, float],
    ) -> Iterator[Change]:  # fmt: skip
        """Propose sparse weights layer after layer, each to be applied before the next is made."""
        reference = ctx.reference() if ctx.reference is not None else ctx.model.copy()
        fits: list[Fit] = []
        for fit in targets(graph, reference.graph, [linear for _, linear in layers.values()], None):
            if isinstance(fit, Fit):
                fits.append(fit)
            else:
                yield Change(fit[0], "zeros in its weight", fit[1])
        for found in fitted(ctx, layers, fits, amounts, self._runs):
            change = self._change(ctx, found.layer, found.weight, _left(found.error))
            yield replace(change, apply=_with_bias(graph, ctx, layers[found.layer.label][1], found.bias, change.apply))

    def _why_not(self, layer: SparseLayer, ctx: Context) -> str:
        """Return why a layer cannot have what is asked for, '' where it can."""
        length = layer.pattern_order()[1]
        if self._runs is not None and length % self._runs.run:
            return f"{length} inputs are no multiple of {self._runs.run}"
        if self.criterion == "gradient" and np.shape((ctx.gradients or {}).get(layer.tensor.name, 0)) != layer.shape:
            return f"there is no gradient of '{layer.tensor.name}'"
        return ""

    def _done(self, ctx: Context, layer: SparseLayer) -> bool:
        """Tell whether a layer has what is asked for, or more."""
        mark = marks(ctx.model.metadata(layer.node)).get(layer.port)
        if mark is None:
            return False
        return mark.request == self.request or (mark.pattern == self.pattern and mark.amount >= self._part)

    def _scored(self, ctx: Context, layers: Sequence[SparseLayer]) -> Iterator[Change]:
        """Propose masks by scores of the weights alone."""
        scores = {str(i): self._scores(layer, i, ctx) for i, layer in enumerate(layers)}
        if self._runs:
            masks = {i: self._in_runs(layers[int(i)], s) for i, s in scores.items()}
        elif self.spread == "global":
            masks = over_all(scores, self.amount)
        else:
            masks = {i: lowest(s, round(self.amount * s.size)) for i, s in scores.items()}
        for i, layer in enumerate(layers):
            values = np.where(masks[str(i)], np.zeros((), layer.dtype), layer.values())
            yield self._change(ctx, layer, values, f"by {self.criterion}")

    def _scores(self, layer: SparseLayer, number: int, ctx: Context) -> Array:
        values = layer.values()
        size = np.abs(values.astype(np.float64))
        if self.criterion == "random":
            drawn = np.random.default_rng([ctx.seed, number]).random(values.shape)
            return np.where(values == 0, -1.0, drawn)
        if self.criterion == "gradient":
            return np.asarray(size * np.abs((ctx.gradients or {})[layer.tensor.name]))
        return size

    def _in_runs(self, layer: SparseLayer, scores: Array) -> Array:
        assert self._runs is not None
        return layer.from_rows(lowest_in_runs(layer.rows(scores), self._runs, layer.pattern_order()[0]))

    def _change(self, ctx: Context, layer: SparseLayer, values: Array, why: str) -> Change:
        share = float(np.mean(values == 0))

        def apply() -> None:
            layer.write(values)
            if share > EMPTY:
                way = "rank layers by themselves (spread=per-layer) or by samples"
                ctx.notes.append(f"'{layer.tensor.name}' is all zeros now: {way}")
            mark = Mark(round(share, 6), self.pattern, self.request, self.storage)
            for node in layer.users:
                write_mark(ctx.model.metadata(node), layer.port, mark)

        where = self.pattern or f"{share:.1%}"
        return Change(layer.label, f"{where} zeros in '{layer.tensor.name}'", why, apply)


def _with_bias(
    graph: gs.Graph, ctx: Context, layer: LinearLayer, bias: Array | None, rest: Callable[[], None] | None
) -> Callable[[], None]:
    def apply() -> None:
        assert rest is not None
        rest()
        with Edit(graph) as edit:
            layer.put(edit, ctx, None, bias)

    return apply


def _left(error: float, rows: int = 0) -> str:
    return f"error {error:.2%} of its output's power" + (f", on {rows} rows" if rows else "")
