"""Residual blocks: where a graph adds to a tensor what it computes from that very tensor.

    y = x + f(x)          f: what serves this Add alone and is made from x.  Without f, y is x.

f may be scaled (layer scale), be normalised before (pre-norm) or have the sum normalised behind it (post-norm), hold
other blocks (a whole stage), and read more than x (masks, positions, the memory of an encoder).  x may be a sum of
several terms (attention and a feed-forward layer side by side).  Shapes must be equal for every input that the model's
signature allows, so that leaving f out leaves a model that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.analysis.cost import costs
from graphopt.analysis.dominators import Dominators
from graphopt.analysis.shapes import Shapes
from graphopt.edit import label
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.tensors import is_float

SUMS = ("Add", "Sum")
SCALES = frozenset({"Mul", "Div", "Identity", "Dropout", "Neg"})
"""Between x and the sum: with a constant beside it, or none, what comes out is x times numbers."""

STAND_INS = ((32, 64), (64, 224))
"""Step and first of the sizes that stand for a signature's open dimensions where symbols alone prove nothing."""


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        label: of the Add.
        add: the node that adds.
        port: which of its inputs f makes.
        source: x, as f reads it.
        kept: the other input of the Add: what its output is without f.
        branch: f(x).
        total: the sum with all further terms that are added to it, or the Add's output.
        nodes: f: the nodes that nothing needs without it, in graph order.
        macs: of `nodes`, None where sizes are open.
        inside: label of the smallest block that holds this one, "" where there is none.
    """

    label: str
    add: gs.Node
    port: int
    source: gs.Tensor
    kept: gs.Tensor
    branch: gs.Tensor
    total: gs.Tensor
    nodes: tuple[gs.Node, ...]
    macs: int | None = None
    inside: str = ""

    def overlaps(self, other: Block) -> bool:
        """Tell whether the two have nodes in common, or one holds the other's Add."""
        mine = {id(n) for n in (*self.nodes, self.add)}
        return any(id(n) in mine for n in (*other.nodes, other.add))


@dataclass
class Blocks:
    """What was found: blocks in graph order, and for every other addition (its label) why it is none."""

    found: list[Block] = field(default_factory=list)
    refused: list[tuple[gs.Node, str]] = field(default_factory=list)

    def named(self, name: str) -> Block | None:
        """Return the block of a label, None where there is none."""
        return next((block for block in self.found if block.label == name), None)


def find_blocks(model: Model, shapes: Shapes, *, inputs: Mapping[str, Sequence[int]] | None = None) -> Blocks:
    """Return the residual blocks of the main graph.

    Args:
        model: its nodes in an order that they can run in.
        shapes: of the model as it is.
        inputs: input name -> shape, for the MACs of models that leave dimensions open.
    """
    result = Blocks()
    additions: list[gs.Node] = []
    for node in model.graph.nodes:
        if is_standard(node, *SUMS):
            why = _no_candidate(node, shapes)
            if why:
                result.refused.append((node, why))
            else:
                additions.append(node)
    if not additions:
        return result
    finder = _Finder(model, shapes, additions)
    for node in additions:
        block = finder.block(node)
        if isinstance(block, str):
            result.refused.append((node, block))
        else:
            result.found.append(block)
    order = {id(n): k for k, n in enumerate(model.graph.nodes)}
    result.refused.sort(key=lambda item: order[id(item[0])])
    _count(model, shapes, inputs, result.found)
    _nest(result.found)
    return result


def _no_candidate(node: gs.Node, shapes: Shapes) -> str:
    """Return why an addition cannot be the end of a block, '' where it may be."""
    if len(node.inputs) != 2:
        return f"it adds {len(node.inputs)} tensors"
    if any(is_constant(t) for t in node.inputs):
        return "it adds a constant"
    if node.inputs[0] is node.inputs[1]:
        return "it adds a tensor to itself"
    dtype = shapes.proved(node.outputs[0]).dtype
    if dtype is not None and not is_float(dtype):
        return f"it adds {dtype} numbers"
    return ""


class _Finder:
    """Looks at additions, with what is known of the whole graph."""

    def __init__(self, model: Model, shapes: Shapes, additions: Sequence[gs.Node]) -> None:
        self._shapes = shapes
        self._sizes = _Sizes(model, shapes)
        self._ways = Dominators(model.graph, [(node, port) for node in additions for port in (0, 1)])
        self._sums = {id(node) for node in additions}
        self._outputs = {id(t) for t in model.graph.outputs}
        self._terms: dict[int, list[gs.Tensor]] = {}

    def block(self, node: gs.Node) -> Block | str:
        """Return the block that ends in an addition, or why there is none."""
        total = self._total(node)
        leaves = self._leaves(total)
        reasons = []
        for port in (1, 0):
            found = self._branch(node, port, total, leaves)
            if isinstance(found, Block):
                return found
            reasons.append(found)
        return next((why for why in reasons if why), "neither term is made from the other alone")

    def _branch(self, node: gs.Node, port: int, total: gs.Tensor, leaves: Sequence[gs.Tensor]) -> Block | str:
        """Return the block whose f makes an input of the addition, or why not; '' where nothing is near one."""
        branch, kept = node.inputs[port], node.inputs[1 - port]
        nodes = self._ways.serving(node, port)
        inner = {id(n) for n in nodes}
        made = {id(t) for n in nodes for t in n.outputs}
        entries = {
            id(t): t for n in nodes for t in self._ways.reads[id(n)] if not (t.inputs and id(t.inputs[0]) in inner)
        }
        sources = [t for leaf in leaves if id(leaf) not in made for t in _carried(leaf)]
        source = next((s for s in sources if any(self._ways.dominates(s, entry) for entry in entries.values())), None)
        if source is None:
            return ""
        if not self._sizes.equal(kept, node.outputs[0]):
            shown = self._sizes.shown(kept), self._sizes.shown(node.outputs[0])
            return f"without '{branch.name}' its shape is not proved to stay: {shown[0]} and {shown[1]}"
        return Block(label(node), node, port, source, kept, branch, total, tuple(nodes))

    def _total(self, node: gs.Node) -> gs.Tensor:
        """Return the sum that an addition is a part of: of the last one in a row that nothing else reads."""
        tensor = node.outputs[0]
        while self._adds_up(tensor) and id(tensor.outputs[0]) in self._sums:
            tensor = tensor.outputs[0].outputs[0]
        return tensor

    def _adds_up(self, tensor: gs.Tensor) -> bool:
        """Tell whether a tensor is a sum that one node alone reads."""
        made = bool(tensor.inputs) and id(tensor.inputs[0]) in self._sums
        return made and id(tensor) not in self._outputs and len(tensor.outputs) == 1

    def _leaves(self, total: gs.Tensor) -> list[gs.Tensor]:
        """Return the terms of a sum, through additions that nothing else reads."""
        if id(total) not in self._terms:
            found: list[gs.Tensor] = []
            stack = list(total.inputs[0].inputs)
            while stack:
                tensor = stack.pop()
                if self._adds_up(tensor):
                    stack.extend(tensor.inputs[0].inputs)
                else:
                    found.append(tensor)
            self._terms[id(total)] = found
        return self._terms[id(total)]


def _carried(tensor: gs.Tensor) -> list[gs.Tensor]:
    """Return a tensor and those that it is a multiple of."""
    found = [tensor]
    while tensor.inputs and is_standard(tensor.inputs[0], *SCALES):
        computed = [t for t in tensor.inputs[0].inputs if t.name and not is_constant(t)]
        if len(computed) != 1 or computed[0] is not tensor.inputs[0].inputs[0]:
            break
        tensor = computed[0]
        found.append(tensor)
    return found


class _Sizes:
    """Whether two tensors have one shape: by symbols, else with numbers for what the signature leaves open.

    Symbols alone tell apart the batch of `input_ids` and that of `attention_mask`, which the signature calls by one
    name; so the same is asked with numbers, two times over, equal for equal names and unequal for others.
    """

    def __init__(self, model: Model, shapes: Shapes) -> None:
        self._model, self._shapes = model, shapes
        self._tried: list[Shapes] | None = None

    def equal(self, one: gs.Tensor, other: gs.Tensor) -> bool:
        first, second = self._shapes.proved(one).shape, self._shapes.proved(other).shape
        if first is not None and first == second and None not in first:
            return True
        found = [(s.proved(one).static, s.proved(other).static) for s in self._trials()]
        return bool(found) and all(a is not None and a == b for a, b in found)

    def shown(self, tensor: gs.Tensor) -> str:
        shape = self._shapes.proved(tensor).shape
        return "unknown" if shape is None else f"[{','.join('?' if d is None else str(d) for d in shape)}]"

    def _trials(self) -> list[Shapes]:
        if self._tried is None:
            self._tried = []
            if any(spec.shape is not None and not _is_static(spec.shape) for spec in self._model.inputs):
                self._tried = [Shapes(self._model, self._stand_ins(*numbers)) for numbers in STAND_INS]
        return self._tried

    def _stand_ins(self, step: int, first: int) -> dict[str, list[int]]:
        sizes: dict[str, int] = {}
        found = {}
        for spec in self._model.inputs:
            if spec.shape is None:
                continue
            names = [d if d is not None else f"{spec.name}[{axis}]" for axis, d in enumerate(spec.shape)]
            found[spec.name] = [
                d if isinstance(d, int) else sizes.setdefault(d, first + step * len(sizes)) for d in names
            ]
        return found


def _is_static(shape: Iterable[int | str | None]) -> bool:
    return all(isinstance(d, int) for d in shape)


def _count(model: Model, shapes: Shapes, inputs: Mapping[str, Sequence[int]] | None, blocks: list[Block]) -> None:
    """Fill in MACs."""
    counted = costs(model, inputs=inputs) if inputs else costs(model, shapes)
    for index, block in enumerate(blocks):
        each = [counted.of(node).macs for node in block.nodes]
        known = [m for m in each if m is not None]
        blocks[index] = replace(block, macs=sum(known) if len(known) == len(each) else None)


def _nest(blocks: list[Block]) -> None:
    """Fill in the smallest block around each."""
    smallest: dict[int, Block] = {}
    for block in sorted(blocks, key=lambda b: -len(b.nodes)):
        smallest.update((id(node), block) for node in block.nodes)
    holds: Callable[[Block], str] = lambda b: smallest[id(b.add)].label if id(b.add) in smallest else ""  # noqa: E731
    blocks[:] = [replace(block, inside=holds(block)) for block in blocks]
