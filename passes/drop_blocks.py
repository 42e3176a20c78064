"""Residual blocks left out: the depth of a network pruned.

    y = x + f(x)   ->   y = x         where x and y differ least on the samples, or the outputs suffer least

Which blocks there are: `graphopt.analysis.blocks`.  What remains is a smaller, ordinary model; reconstruct-weights
behind this pass fits the layers that come after what was left out.

Sources of the idea: X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
2024 (cosine of what goes into a block and what comes out); A. Veit et al., "Residual Networks Behave Like Ensembles of
Relatively Shallow Networks", 2016.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.blocks import Block, find_blocks
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node
from graphopt.errors import did_you_mean
from graphopt.model import Model
from graphopt.names import fits, matches
from graphopt.registry import register

Array = np.ndarray[Any, Any]

MARK = "graphopt.dropped/"
"""Metadata: this with the block's name, on the node that makes what now takes the block's place."""

CRITERIA = ("cosine", "output")
WHAT = "drop its residual branch"
DONE = "its residual branch is dropped"
ADDS_A_CONSTANT = "it adds a constant"


@register
@dataclass(frozen=True)
class DropBlocks(Pass):
    """Leave out residual blocks: y = x + f(x) becomes y = x.

    Lossy, keeps the signature.  Choosing needs samples; `blocks` does not.  Counts are relative to the model as it
    came: what was left out before is remembered.

    Options:
        amount: blocks to leave out; ignored where `blocks` names them.
        blocks: their names (globs): those of the additions that end them.
        criterion: `cosine` takes blocks whose output is most like their input first; `output` those whose loss changes
            the model's outputs least, given those left out before.
        only, skip: globs of names that `amount` chooses from.
        samples: read at most, 0 for all.
    """

    name: ClassVar[str] = "drop-blocks"
    exactness: ClassVar[Any] = "lossy"
    loses: ClassVar[Any] = "structure"
    scope: ClassVar[Any] = "model"
    amount: int = 1
    blocks: tuple[str, ...] = ()
    criterion: str = "cosine"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    samples: int = 32

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `criterion` is something else, or a number is negative.
        """
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is one of {', '.join(CRITERIA)}, not {self.criterion!r}")
        if self.amount < 0:
            raise ValueError(f"amount is a number of blocks, not {self.amount}")
        if self.samples < 0:
            raise ValueError(f"samples is a number of samples, or 0 for all, not {self.samples}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each block to leave out; blocks are measured before the first is."""
        found = find_blocks(ctx.model, ctx.shapes, inputs=_sizes(ctx))
        for node, why in found.refused:
            if why != ADDS_A_CONSTANT:
                yield Change(label(node), WHAT, why)
        done = dropped(ctx.model)
        with Edit(graph) as edit:
            usable = []
            for block in found.found:
                blocked = edit.why_not_bypass(block.add.outputs[0], block.kept)
                if blocked:
                    yield Change(block.label, WHAT, blocked)
                else:
                    usable.append(block)
            chosen = self._named(usable) if self.blocks else self._chosen(usable, ctx, self.amount - len(done))
            for block, why in chosen:
                yield self._change(edit, ctx, block, why)
            yield from self._missing([b.label for b in found.found], done, len(chosen))

    def _named(self, blocks: Sequence[Block]) -> list[tuple[Block, str]]:
        """Return the blocks that were asked for, without those inside of others, which go with them."""
        wanted = [b for b in blocks if fits(b.label, self.blocks)]
        outer = [b for b in wanted if not any(_holds(other, b) for other in wanted)]
        return [(b, "asked for") for b in outer]

    def _chosen(self, blocks: Sequence[Block], ctx: Context, count: int) -> list[tuple[Block, str]]:
        """Return so many blocks, the best to leave out first, each with its score in words."""
        allowed = [b for b in blocks if matches(b.label, self.only, self.skip)]
        if count <= 0 or not allowed:
            return []
        if self.criterion == "output":
            return _by_output(allowed, ctx, count, self.samples)
        return _by_cosine(allowed, ctx, count, self.samples)

    def _missing(self, known: Sequence[str], done: set[str], chosen: int) -> Iterator[Change]:
        """Say what was asked for and is not there."""
        if not self.blocks:
            short = self.amount - len(done) - chosen
            if short > 0:
                yield Change(
                    "the model", WHAT, f"{self.amount} blocks were asked for; {short} more than can be left out"
                )
            return
        for name in self.blocks:
            if not any(fits(n, (name,)) for n in (*known, *done)):
                hint = did_you_mean(name, known) or f"its blocks: {', '.join(known) or 'none'}"
                yield Change(name, WHAT, f"there is no such block; {hint}")

    def _change(self, edit: Edit, ctx: Context, block: Block, why: str) -> Change:
        total, kept = block.add.outputs[0], block.add.inputs[1 - block.port]
        blocked = edit.why_not_bypass(total, kept)  # blocks before this one are gone by now
        if blocked:
            return Change(block.label, WHAT, blocked)
        size = "" if block.macs is None else f", {block.macs:,} MACs"
        return Change(block.label, DONE, f"{why}; {len(block.nodes)} nodes{size}", _writer(edit, ctx.model, block))


def dropped(model: Model) -> set[str]:
    """Return the names of the blocks that were left out of a model before."""
    return {
        key.removeprefix(MARK) for node in model.graph.nodes for key in model.metadata(node) if key.startswith(MARK)
    }


def _writer(edit: Edit, model: Model, block: Block) -> Callable[[], None]:
    def apply() -> None:
        total, kept = block.add.outputs[0], block.add.inputs[1 - block.port]
        gone = [node for node in (*block.nodes, block.add) if not edit.removed(node)]
        marks = {key: value for node in gone for key, value in model.metadata(node).items() if key.startswith(MARK)}
        edit.bypass(total, kept)
        for node in gone:
            edit.remove(node)
        makers = [node for node in (*kept.inputs, *total.inputs) if not edit.removed(node)]  # `total`: a graph's output
        carrier = (makers or edit.consumers(kept))[0]
        model.metadata(carrier).update({**marks, f"{MARK}{block.label}": "1"})

    return apply


def _by_cosine(blocks: Sequence[Block], ctx: Context, count: int, samples: int) -> list[tuple[Block, str]]:
    likeness = likenesses(blocks, ctx, samples)
    ranked = sorted(blocks, key=lambda b: -likeness[b.label])
    chosen: list[Block] = []
    for block in ranked:
        if len(chosen) < count and not any(block.overlaps(c) for c in chosen):
            chosen.append(block)
    return [(b, f"cosine of its input and output {likeness[b.label]:.4f}") for b in chosen]


def likenesses(blocks: Sequence[Block], ctx: Context, samples: int = 0) -> dict[str, float]:
    """Return by name the mean cosine, over samples, between what comes out of a block with f and without.

    Vectors lie along the last axis up to rank 3 (tokens of a sequence), beyond that each item of a batch is one.
    """
    names = [t.name for b in blocks for t in (b.total, b.branch)]
    sums, counts = dict.fromkeys((b.label for b in blocks), 0.0), dict.fromkeys((b.label for b in blocks), 0)
    for values in itertools.islice(ctx.fetches(names), samples or None):
        for block in blocks:
            total = np.asarray(values[block.total.name]).astype(np.float64)
            branch = np.asarray(values[block.branch.name]).astype(np.float64)
            each = _cosines(total, total - branch)
            sums[block.label] += float(each.sum())
            counts[block.label] += each.size
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _cosines(one: Array, other: Array) -> Array:
    width = one.shape[-1] if 1 <= one.ndim <= 3 else int(np.prod(one.shape[1:], dtype=np.int64))
    a, b = one.reshape(-1, max(width, 1)), np.broadcast_to(other, one.shape).reshape(-1, max(width, 1))
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found = np.divide((a * b).sum(axis=1), length, out=np.zeros(len(a)), where=length > 0)
    return np.asarray(np.nan_to_num(found))


def _by_output(blocks: Sequence[Block], ctx: Context, count: int, samples: int) -> list[tuple[Block, str]]:
    """Return blocks, each the one that costs least noise at the outputs beside those before it.

    Noise seldom falls as more is left out: a block measured with fewer gone comes up again only when it is the best.
    """
    noise = _gated_noise(blocks, ctx, samples)
    waiting = [(noise([block]), index, 0) for index, block in enumerate(blocks)]
    heapq.heapify(waiting)
    chosen: list[tuple[Block, float]] = []
    while waiting and len(chosen) < count:
        value, index, age = heapq.heappop(waiting)
        block, before = blocks[index], [b for b, _ in chosen]
        if any(block.overlaps(b) for b in before):
            continue
        if age == len(chosen):
            chosen.append((block, value))
        else:
            heapq.heappush(waiting, (noise([*before, block]), index, len(chosen)))
    return [(b, f"noise of the outputs {value:.3g} of their power then") for b, value in chosen]


def _gated_noise(blocks: Sequence[Block], ctx: Context, samples: int) -> Callable[[Iterable[Block]], float]:
    """Return a function from blocks to the noise at the outputs without them: each f is multiplied by 1 or 0."""
    gated = ctx.model.copy()
    by_place = dict(zip(map(id, ctx.model.graph.nodes), gated.graph.nodes, strict=True))
    gates = {}
    with Edit(gated.graph) as edit:
        for block in blocks:
            branch = by_place[id(block.add)].inputs[block.port]
            gate = ctx.constant(f"{block.branch.name}_gate", np.ones((), ctx.shapes.proved(block.branch).dtype))
            product = gs.Variable(ctx.fresh_name(f"{block.branch.name}_gated"), branch.dtype)
            node = make_node("Mul", [branch, gate], [product], name=product.name)
            edit.insert_after(branch.inputs[0], [node])
            edit.set_input(by_place[id(block.add)], block.port, product)
            gates[block.label] = gate.name
    reference = ctx.reference() if ctx.reference is not None else ctx.model
    measure = ctx.output_noise(reference, list(gates.values()), samples, model=gated)
    return lambda without: measure({gates[b.label]: np.zeros(()) for b in without})


def _holds(outer: Block, block: Block) -> bool:
    return outer is not block and any(node is block.add for node in outer.nodes)


def _sizes(ctx: Context) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the first sample, by input."""
    if ctx.samples is None:
        return None
    first = next(iter(ctx.samples), {})
    return {name: value.shape for name, value in first.items() if isinstance(value, np.ndarray)} or None
