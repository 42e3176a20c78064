"""Layers as two thinner ones of low rank, so that the outputs on the samples stay near.

    MatMul(x, W) + b       ->  MatMul(MatMul(x, A), B) + b'
    Gemm(x, W, b)          ->  Gemm(MatMul(x, A), B, b')
    Conv(x, W, b), k x k   ->  Conv 1x1 of Conv k x k, Conv k x k of Conv 1x1, Conv 1 x k of Conv k x 1
    Gather(table, i)       ->  MatMul(Gather(A, i), B)                          only for size, and if asked for

See `graphopt.low_rank` for the algebra and its sources.  The second factor keeps the layer's name, output and bias; the
first has neither bias nor anything behind it.  Values between the two have variance one in each channel on the samples,
which suits codes.  Ranks are below those from which on the layer as it is takes less work, so that fuse-linear and
fuse-convs leave the two apart; of a stranger's pair that takes more work than one layer these make one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.factorable import MARK, Factorable, find
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, drop_declared, replace_output
from graphopt.factors import ROWS, Asked, Solved, Solver, first_form, in_parts, second_form
from graphopt.low_rank import Split, rounded
from graphopt.names import matches
from graphopt.ops import is_standard
from graphopt.registry import register

from .new_nodes import Maker

Array = np.ndarray[Any, Any]

WAYS = ("auto", "wide", "narrow", "spatial")
METHODS = ("auto", "samples", "weights")

ERROR = 0.1
"""Relative error of a layer's output where nothing is asked for."""

TRANSPOSED_OPSET = 11
"""First operator set whose Gemm needs no C."""


@register
@dataclass(frozen=True)
class FactorizeLayers(Pass):
    """Make two thin layers of MatMul, Gemm and Conv where their outputs have low rank.

    Lossy, keeps the signature.  Refuses grouped convolutions, weights that are not constant or are quantized, and ranks
    that save no work.  Source: Zhang and others, "Accelerating Very Deep Convolutional Networks", TPAMI 2016.

    Options:
        rank: of every layer.
        energy: part of the outputs' power that each layer keeps: 0.99.
        error: relative error of each layer's output; 0.1 where none of the three is given.
        ranks: LABEL=RANK or LABEL=WAY:RANK, for these layers alone.
        way: of convolutions: `wide`, `narrow`, `spatial`, or `auto` for the one with least work.
        method: `samples` (activation-aware), `weights` (singular values), or `auto`: samples where there are some.
        rows: taken at most of each tensor and sample, drawn at random, 0 for all.
        round_to: what ranks are multiples of; 0 for 16, 4 or 1, by the layer's size.
        embeddings: whether tables that Gather reads get factors, too: smaller, not faster.
        only, skip: globs of layer names.
    """

    name: ClassVar[str] = "factorize-layers"
    exactness: ClassVar[Any] = "lossy"
    loses: ClassVar[Any] = "structure"
    rank: int = 0
    energy: float = 0.0
    error: float = 0.0
    ranks: tuple[str, ...] = ()
    way: str = "auto"
    method: str = "auto"
    rows: int = ROWS
    round_to: int = 0
    embeddings: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range, and several at once.

        Raises:
            ValueError: they are.
        """
        for name, known in (("way", WAYS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("energy", "error"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} lies between 0 and 1, not at {getattr(self, name)}")
        for name in ("rank", "rows", "round_to"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is not negative, as {getattr(self, name)} is")
        if sum(map(bool, (self.rank, self.energy, self.error, self.ranks))) > 1:
            raise ValueError("give one of rank, energy, error and ranks")
        parsed(self.ranks)

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per layer."""
        if any(self._request in ctx.model.metadata(node).get(MARK, "") for node in graph.nodes):
            return  # the same request again
        asked: list[Asked] = []
        gone: set[int] = set()
        named = parsed(self.ranks)
        known = {id(node): ctx.model.metadata(node) for node in graph.nodes}
        for layer in find(graph, known, tables=self.embeddings):
            if not matches(layer.label, self.only, self.skip) or (named and layer.label not in named):
                continue
            splits = self._splits(layer, named)
            why = layer.why or self._why_not(graph, layer, splits)
            if why:
                yield Change(layer.label, "two layers of low rank", why)
            else:
                asked.append((layer, splits))
        samples = self._samples(graph, ctx)
        for part, requests in in_parts(asked):
            grams = ctx.grams({str(i): r for i, r in enumerate(requests)}, self.rows) if samples else {}
            solver = Solver({requests[int(i)]: gram for i, gram in grams.items()})
            with Edit(graph) as edit:
                for layer, splits in part:
                    yield self._change(Maker(edit, ctx), layer, [solver.solve(layer, split) for split in splits], gone)
        for holder in ctx.model.graphs():  # so that weights that nothing reads any more are not kept
            drop_declared(holder, gone)

    @property
    def _request(self) -> str:
        """A short name of what is asked for, the same whenever it is asked again."""
        return hashlib.sha256(str(sorted(self.options().items())).encode()).hexdigest()[:12]

    def _samples(self, graph: gs.Graph, ctx: Context) -> bool:
        """Tell whether samples decide: those of the main graph, where there are any."""
        if self.method == "weights" or (graph is not ctx.model.graph and self.method == "auto"):
            return False
        return self.method == "samples" or (ctx.samples is not None and not ctx.samples.random)

    def _splits(self, layer: Factorable, named: Mapping[str, tuple[str, int]]) -> tuple[Split, ...]:
        way = named[layer.label][0] if layer.label in named else self.way
        if way == "auto" and self.rank:
            return layer.splits[:1]
        return tuple(split for split in layer.splits if way in ("auto", split.way) or split.flat)

    def _why_not(self, graph: gs.Graph, layer: Factorable, splits: tuple[Split, ...]) -> str:
        if not splits:
            return "this way saves no work at any rank"
        if is_standard(layer.node, "Gemm") and layer.node.attrs.get("transA", 0) and graph.opset < TRANSPOSED_OPSET:
            return f"its input is transposed, and Gemm without C needs opset {TRANSPOSED_OPSET}"
        return ""

    def _change(self, maker: Maker, layer: Factorable, found: list[Solved], gone: set[int]) -> Change:
        named = parsed(self.ranks)
        wanted_ranks = [(solved, self._rank(solved, named.get(layer.label))) for solved in found]
        fitting = [(s, rank) for s, rank in wanted_ranks if rank <= s.split.limit]
        if not fitting:
            solved, rank = min(wanted_ranks, key=lambda pair: pair[1] * pair[0].split.macs)
            why = f"rank {rank} would be needed, and only up to {solved.split.limit} saves work"
            return Change(layer.label, "two layers of low rank", why)
        solved, rank = min(fitting, key=lambda pair: pair[1] * pair[0].split.macs)
        split = solved.split
        basis = f"on {solved.rows} rows" if solved.rows else "of the weight"
        unit = "numbers" if split.way == "table" else "MACs for each place"
        why = (
            f"{rank * split.macs} {unit} instead of {split.whole}; "
            f"relative error {solved.spectrum.error(rank):.3g} {basis}"
        )
        what = f"rank {rank}" + (f", {split.way}" if split.way != "product" else "")

        def apply() -> None:
            gone.add(id(layer.node.inputs[layer.port]))
            (self._look_up if split.way == "table" else self._apply)(maker, solved, rank)

        return Change(layer.label, what, why, apply)

    def _rank(self, solved: Solved, named: tuple[str, int] | None) -> int:
        """Return the rank that is asked for."""
        if named is not None:
            return named[1]
        if self.rank:
            return self.rank
        error = (1.0 - self.energy) ** 0.5 if self.energy else self.error or ERROR
        least = solved.spectrum.rank_within(error)
        limit = solved.split.limit
        return max(least, rounded(least, limit, self.round_to)) if least <= limit else least

    def _apply(self, maker: Maker, solved: Solved, rank: int) -> None:
        layer, split = solved.layer, solved.split
        node, dtype = layer.node, layer.weight().dtype
        first, second = (weight.astype(dtype) for weight in split.weights(solved.factors(rank)))
        bias = solved.bias(rank)
        if bias is not None:
            _set_bias(maker, layer, bias.astype(dtype))
        elif layer.bias is not None and layer.bias.node is node and layer.bias.tensor is not None:
            _set_bias(maker, layer, layer.bias_values().astype(dtype))
        name, shape = node.inputs[1].name, maker.ctx.shapes.proved(node.outputs[0]).shape
        between = maker.tensor(f"{layer.label}/between", TensorType(dtype, _between(split, shape, rank)))
        inputs = [node.inputs[0], maker.constant(f"{name}/first", first)]
        op, attrs = first_form(node, split)
        made = maker.node(op, inputs, [between], attrs, like=[node])
        maker.edit.set_input(node, 0, between)
        maker.edit.set_input(node, 1, maker.constant(f"{name}/second", second))
        attrs = second_form(layer, split)
        node.attrs.clear()
        node.attrs.update(attrs)
        for part, told in ((made, "first"), (node, "second")):
            maker.ctx.model.metadata(part)[MARK] = f"{told} {split.way} {rank} {self._request}"

    def _look_up(self, maker: Maker, solved: Solved, rank: int) -> None:
        """Look rows of the first factor up, and multiply them with the second."""
        layer, node = solved.layer, solved.layer.node
        dtype, name, made = layer.weight().dtype, node.inputs[0].name, node.outputs[0]
        first, second = (weight.astype(dtype) for weight in solved.split.weights(solved.factors(rank)))
        shape = maker.ctx.shapes.proved(made).shape
        between = maker.tensor(f"{layer.label}/between", TensorType(dtype, shape and (*shape[:-1], rank)))
        maker.edit.set_input(node, 0, maker.constant(f"{name}/first", first))
        replace_output(node, made, between)
        product = maker.node("MatMul", [between, maker.constant(f"{name}/second", second)], [made], like=[node])
        for part, told in ((node, "first"), (product, "second")):
            maker.ctx.model.metadata(part)[MARK] = f"{told} table {rank} {self._request}"


def parsed(ranks: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """Return LABEL=RANK and LABEL=WAY:RANK as label -> (way, rank).

    Raises:
        ValueError: one is of another form.
    """
    found = {}
    for item in ranks:
        name, _, value = item.rpartition("=")
        way, _, rank = value.rpartition(":")
        way = way or "auto"
        if not name or not rank.isdigit() or int(rank) < 1 or way not in (*WAYS, "product", "table"):
            raise ValueError(f"ranks are LABEL=RANK or LABEL=WAY:RANK, not {item!r}")
        found[name] = (way, int(rank))
    return found


def _between(split: Split, shape: Any, rank: int) -> tuple[Any, ...] | None:
    """Return the shape of what flows between the factors, as far as the output's tells it."""
    if shape is None:
        return None
    if split.way == "product":
        return (*shape[:-1], rank)
    return (shape[0], rank, *(shape[2:] if split.way == "wide" else [None] * (len(shape) - 2)))


def _set_bias(maker: Maker, layer: Factorable, values: Array) -> None:
    """Give a layer another bias, of the same number of dimensions."""
    place = layer.bias
    assert place is not None
    rank = 1 if place.tensor is None or place.node is layer.node else max(len(place.tensor.shape or ()), 1)
    base = place.tensor.name if place.tensor is not None else f"{layer.label}/bias"
    made = maker.constant(
        f"{base}/moved" if place.tensor is not None else base, values.reshape([1] * (rank - 1) + [-1])
    )
    maker.edit.set_input(place.node, place.port, made)
