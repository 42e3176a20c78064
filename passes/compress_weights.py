"""Weights as numbers of a few levels (a codebook), looked up again when the model is loaded.

    8 bits   W  ->  Reshape(Gather(levels, codes) · scale)
    4 bits   W  ->  Reshape(Gather(pairs, bytes) · scale)          pairs[b] = the levels of both halves of byte b

Everything on the right is constant, so ONNX Runtime folds it when it loads the model: what runs is the float model, as
fast as before, and only the file is smaller (loading takes longer, memory is the same).  Standard operators of any
operator set will do: a table of 256 pairs unpacks 4-bit codes with no operator on bits.

Levels: `kmeans` fits them to the tensor (Lloyd 1982), `nf4` takes the quantiles of a normal distribution (Dettmers et
al. 2023, QLoRA), `power-of-two` signed powers of two.  Each channel, or each block of neighbours in memory, is divided
by its largest magnitude first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, constant_node, refers
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Exactness, Pass
from graphopt.codes import Codebook, codebook_code, normal_float_code, power_of_two_code
from graphopt.edit import Edit, drop_declared, is_output, label
from graphopt.names import matches
from graphopt.ops import DECODES, WEIGHTED, is_standard
from graphopt.registry import register

from .embedding_codes import half_where_it_fits, held_type
from .flush_denormals import LINEAR
from .new_nodes import Maker

Array: TypeAlias = np.ndarray[Any, Any]

CODES: Mapping[str, Callable[[Array, int], Codebook]] = {
    "kmeans": lambda values, bits: codebook_code(values, 0, bits),
    "nf4": lambda values, bits: normal_float_code(values, 0, bits, 0),
    "power-of-two": lambda values, bits: power_of_two_code(values, 0, bits),
}
"""Levels -> the code of values (channels or blocks, elements)."""

BITS = (8, 4)

OVERHEAD = 4096
"""Bytes that the table and the new nodes take at most: tensors that save less stay."""

FLOATS = frozenset({np.dtype(np.float32), np.dtype(np.float16)})

SINCE = 7
"""First operator set whose Mul broadcasts."""

READS: Mapping[str, frozenset[int]] = {**LINEAR, "Gather": frozenset({0})}
"""Operator -> inputs that may be a weight to be compressed."""


@register
@dataclass(frozen=True)
class CompressWeights(Pass):
    """Store weights as numbers of levels that ONNX Runtime looks up when it loads the model.

    Lossy; made for size on disk: the speed is that of float.  Takes the weights of convolutions, products, recurrences
    and look-ups; refuses those that something else reads, too.

    Attributes:
        levels: kmeans, nf4 or power-of-two.
        bits: 8 or 4.
        block: neighbours in memory that share a scale; 0 for one scale per output channel.
        light: share of all elements whose codes keep 8 bits, smallest weights first: those of depthwise convolutions
            and first layers count most for their size.
        only: globs of layer names; empty for all.
        skip: globs of layer names that stay.
    """

    name: ClassVar[str] = "compress-weights"
    exactness: ClassVar[Exactness] = "lossy"
    levels: str = "kmeans"
    bits: int = 8
    block: int = 0
    light: float = 0.1
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.levels not in CODES:
            raise ValueError(f"levels is one of {', '.join(CODES)}, not '{self.levels}'")
        if self.bits not in BITS:
            raise ValueError(f"bits is one of 8, 4, not {self.bits}")
        if self.block < 0 or self.block % 2:
            raise ValueError(f"block is an even number, not {self.block}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per weight."""
        gone: set[int] = set()
        local = {id(node) for node in graph.nodes}
        weights = list(_weights(graph, ctx))
        small = _smallest([size for _, _, size in weights], self.light)
        for node, index, size in weights:
            if self._chosen(node):
                bits = 8 if size <= small else self.bits
                yield from dataclasses.replace(self, bits=bits)._weight(graph, ctx, node, index, local, gone)
        for holder in ctx.model.graphs() if gone else ():
            drop_declared(holder, gone)

    def _chosen(self, node: gs.Node) -> bool:
        return matches(label(node), self.only, self.skip)

    def _weight(
        self, graph: gs.Graph, ctx: Context, node: gs.Node, index: int, local: set[int], gone: set[int]
    ) -> Iterator[Change]:
        """Propose the change of one weight, whose values are read now."""
        tensor = node.inputs[index]
        values = array_of(tensor)
        if values is None or self._saving(values) < OVERHEAD:
            return
        what = f"{self.bits}-bit {self.levels} levels for '{tensor.name}'"
        why = _why_not(graph, tensor, values, local)
        if why:
            yield Change(label(node), what, why)
            return
        with Edit(graph) as edit:

            def apply() -> None:
                axis = _channel_axis(node, index, values.ndim)
                self._replace(Maker(edit, ctx), node, tensor, values, axis)
                holder = constant_node(tensor)
                if holder is None:
                    gone.add(id(tensor))
                elif edit.is_local(holder) and not edit.is_used(tensor):
                    edit.remove(holder)

            reason = f"{self.bits} bits instead of {8 * values.dtype.itemsize}; decoded once, when the model is loaded"
            yield Change(label(node), what, reason, apply)

    def _saving(self, values: Array) -> float:
        scales = values.size / self.block if self.block else max(values.shape)
        return float(values.size * (values.dtype.itemsize - self.bits / 8) - 4 * scales)

    def _replace(self, maker: Maker, node: gs.Node, tensor: gs.Tensor, values: Array, axis: int) -> None:
        """Let all that read a weight read what its codes stand for."""
        blocked = bool(self.block) and values.size % self.block == 0
        channels = np.moveaxis(np.asarray(values, np.float32), axis, 0)
        rows = values.astype(np.float32).reshape(-1, self.block) if blocked else channels.reshape(len(channels), -1)
        code = CODES[self.levels](rows, self.bits)
        stored = half_where_it_fits(code.scale)
        code = dataclasses.replace(code, scale=stored.astype(np.float32))
        codes = code.quantize(rows).astype(np.uint8)
        if not blocked:
            codes = np.moveaxis(codes.reshape(channels.shape), 0, axis)
        spread = (-1, 1) if blocked else [-1 if i == axis else 1 for i in range(values.ndim)]
        decoder = Decoder(maker, tensor.name, node)
        found = decoder.look_up(code.levels, codes, packed=self.bits == 4 and codes.size % 2 == 0)
        scale = decoder.constant("scale", stored.reshape(spread))
        made = decoder.node("Mul", [found, decoder.cast(scale, np.float32)], np.float32, codes.shape)
        made = decoder.cast(decoder.reshape(made, values.shape), values.dtype)
        for reader in list({id(n): n for n in tensor.outputs}.values()):
            for i, read in enumerate(reader.inputs):
                if read is tensor:
                    maker.edit.set_input(reader, i, made)


@dataclass(frozen=True)
class Decoder:
    """Makes the nodes that decode one weight.

    Attributes:
        maker: of nodes and constants.
        base: name of the weight.
        reader: a node that reads it.
    """

    maker: Maker
    base: str
    reader: gs.Node

    def look_up(self, levels: Array, codes: Array, *, packed: bool) -> gs.Tensor:
        """Return the levels that codes number, in the shape of the codes."""
        shape, table = codes.shape, levels
        if packed:
            full = np.zeros(16, np.float32)
            full[: len(levels)] = levels
            table = np.stack([np.tile(full, 16), np.repeat(full, 16)], axis=1)
            flat = codes.reshape(-1)
            codes = flat[0::2] | (flat[1::2] << 4)
        numbers = self.cast(self.constant("codes", codes), np.int32)
        found = (*codes.shape, 2) if packed else shape
        return self.reshape(self.node("Gather", [self.constant("levels", table), numbers], np.float32, found), shape)

    def constant(self, part: str, values: Array) -> gs.Tensor:
        """Return a constant that belongs to the weight."""
        return self.maker.constant(f"{self.base}/{part}", values)

    def cast(self, tensor: gs.Tensor, dtype: Any) -> gs.Tensor:
        """Return a tensor in a type."""
        known = self.maker.ctx.shapes.proved(tensor)
        if known.dtype == np.dtype(dtype):
            return tensor
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [tensor], dtype, known.shape, {"to": to})

    def reshape(self, tensor: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        """Return a float32 tensor in another shape."""
        if self.maker.ctx.shapes.proved(tensor).static == shape:
            return tensor
        sizes = self.constant("shape", np.array(shape, np.int64))
        return self.node("Reshape", [tensor, sizes], np.float32, shape)

    def node(
        self, op: str, inputs: list[gs.Tensor], dtype: Any, shape: Any, attrs: dict[str, Any] | None = None
    ) -> gs.Tensor:
        """Return what a new node makes of inputs."""
        made = self.maker.tensor(f"{self.base}/{op}", TensorType(np.dtype(dtype), shape))
        node = self.maker.node(op, inputs, [made], attrs, like=[self.reader])
        self.maker.ctx.model.metadata(node)[DECODES] = "compress-weights"
        return made


def _weights(graph: gs.Graph, ctx: Context) -> Iterator[tuple[gs.Node, int, int]]:
    """Yield the first reader of each weight, the input that it reads it by, and the number of elements."""
    seen: set[int] = set()
    for node in graph.nodes:
        if not is_standard(node) or refers(node) or DECODES in ctx.model.metadata(node):
            continue
        for index in sorted(READS.get(node.op, ())):
            held = held_type(node.inputs[index]) if index < len(node.inputs) else None
            if held is None or held[0] not in FLOATS or len(held[1]) < 2 or id(node.inputs[index]) in seen:
                continue
            seen.add(id(node.inputs[index]))
            yield node, index, int(np.prod(held[1], dtype=np.int64))


def _smallest(sizes: Sequence[int], share: float) -> int:
    """Return the largest size up to which all sizes add up to no more than a share of their sum."""
    distinct, counts = np.unique(np.asarray(sizes, np.int64), return_counts=True)
    fitting = distinct[np.cumsum(distinct * counts) <= share * sum(sizes)]
    return int(fitting[-1]) if len(fitting) else 0


def _why_not(graph: gs.Graph, tensor: gs.Tensor, values: Array, local: set[int]) -> str:
    """Return what stands against compressing a weight, nothing where it is fine."""
    if int(graph.opset) < SINCE:
        return f"it needs opset {SINCE}, and the model has {graph.opset}: upgrade-opset{{to={SINCE}}} first"
    if not np.isfinite(values).all():
        return "the weight has NaN or infinite elements"
    if is_output(graph, tensor):
        return "it is an output of the graph"
    for node in tensor.outputs:
        if id(node) not in local:
            return "several graphs read it"
        allowed = READS.get(node.op, ()) if is_standard(node) else ()
        if any(t is tensor and i not in allowed for i, t in enumerate(node.inputs)):
            return f"{node.op} '{label(node)}' reads it, too"
    return ""


def _channel_axis(node: gs.Node, index: int, rank: int) -> int:
    """Return the axis of a weight that scales go along: its output channels, where the operator has such."""
    if node.op in WEIGHTED:
        return WEIGHTED[node.op]
    if is_standard(node, "MatMul"):
        return rank - 1 if index == 1 else rank - 2
    if is_standard(node, "Gemm"):
        return 1 - int(node.attrs.get("transB", 0)) if index == 1 else int(node.attrs.get("transA", 0))
    return rank - 2
