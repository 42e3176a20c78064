"""Weights as 8 or 4 bit codes, activations left float: a quarter or an eighth of the size.

    MatMul(x, W)           ->  MatMul(x, DequantizeLinear(codes, scale, zero point))
    Gemm(x, W, transB=1)   ->  Gemm(x, DequantizeLinear(codes of Wᵀ, …))
    Gather(W, ids)         ->  the rows' codes looked up, then decoded (see `embedding_codes`)

ONNX Runtime 1.31 makes one MatMulNBits of the first two forms, 8 and 4 bits, per channel and in blocks of 16, 32, 64
or 128, whatever the sizes; it is about as fast as the float product.  Blocks of other sizes, transB=1 and weights that
several layers share it decodes on every run.  Scales are stored as float16, with a Cast that ONNX Runtime folds when it
loads the model.  Its kernel rounds activations to 8 bits (0.6 % of their size; none with the session option
`session.qdq_matmulnbits_accuracy_level=1`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, constant_node, is_constant, refers
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Exactness, Pass
from graphopt.codes import weight_code
from graphopt.edit import Edit, drop_declared, is_output, label
from graphopt.gptq import round_to_codes
from graphopt.layer_inputs import WIDEST, Gram, GramRequest
from graphopt.names import fits
from graphopt.ops import DECODES, is_standard
from graphopt.registry import register

from .embedding_codes import SINCE, coded_table, half_where_it_fits, held_type, look_up
from .new_nodes import Maker

Array: TypeAlias = np.ndarray[Any, Any]

BITS = (8, 4)
BLOCKS = (0, 16, 32, 64, 128)
METHODS: dict[str, Literal["absmax", "mse"]] = {"rtn": "absmax", "mse": "mse", "gptq": "mse"}
"""Method -> how ranges are chosen, for gptq where there is no Gram matrix."""

CHANNEL_OPSET, BLOCK_OPSET = 13, 21
"""First operator sets of DequantizeLinear per channel; in blocks, and of 4 bits."""

BLOCK_IR = 10
"""First IR version with 4-bit types."""

OVERHEAD = 512
"""Bytes that the new nodes take: weights that save less stay."""

FLOATS = (np.dtype(np.float32), np.dtype(np.float16))

BUDGET = 1 << 29
"""Bytes of Gram matrices asked for at a time."""


@dataclass
class Use:
    """A constant that layers read as their weight.

    Attributes:
        tensor: the constant.
        dtype: its type.
        shape: its shape.
        linear: MatMul and Gemm nodes that read it as input 1, straight or through a Transpose.
        lookups: Gather nodes that read rows of it.
        why: what stands against coding it.
    """

    tensor: gs.Tensor
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    linear: list[gs.Node]
    lookups: list[gs.Node]
    why: str = ""

    @property
    def first(self) -> gs.Node:
        """The node that reports name."""
        return (*self.linear, *self.lookups, *self.tensor.outputs)[0]


@register
@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of MatMul, Gemm and embedding look-ups as 8 or 4 bit codes.

    Lossy; made for size on disk: ONNX Runtime's speed is about that of float.  Refuses weights that something else
    reads, too.  Sources: ONNX DequantizeLinear-21; Frantar et al., GPTQ, ICLR 2023.

    Attributes:
        bits: 8 or 4 (opset 21).
        block: inputs that share a scale: 0 (per output channel), 16, 32, 64 or 128 (opset 21).
        symmetric: zero point 0.
        method: rtn (largest value), mse (least squared error), gptq (least error of the output; needs samples).
        embeddings: whether tables that Gather reads are coded, too.
        sequential: gptq on inputs as the weights quantized before make them.
        only: globs of layer names; empty for all.
        skip: globs of layer names that stay.
    """

    name: ClassVar[str] = "quantize-weights"
    exactness: ClassVar[Exactness] = "lossy"
    bits: int = 8
    block: int = 0
    symmetric: bool = False
    method: str = "mse"
    embeddings: bool = True
    sequential: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that no kernel has."""
        for name, known in (("bits", BITS), ("block", BLOCKS), ("method", tuple(METHODS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(str, known))}, not {getattr(self, name)!r}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per weight."""
        gone: set[int] = set()
        waiting: list[Use] = []
        for use in _uses(graph, ctx):
            if not self._chosen(use) or (not use.linear and not self.embeddings):
                continue
            why = use.why or self._why_not(graph, use)
            if why:
                yield Change(label(use.first), self._what(use), why)
            elif _saving(use, self._bits(use), self.block) > OVERHEAD:
                waiting.append(use)
        for part, grams in self._in_parts(graph, ctx, waiting):
            for use in part:
                yield from self._coded(graph, ctx, use, grams.get(use.tensor.name), gone)
        for holder in ctx.model.graphs() if gone else ():
            drop_declared(holder, gone)

    def _chosen(self, use: Use) -> bool:
        names = [label(node) for node in (*use.linear, *use.lookups)]
        wanted = not self.only or any(fits(n, self.only) for n in names)
        return wanted and not any(fits(n, self.skip) for n in names)

    def _what(self, use: Use) -> str:
        tied = bool(use.linear and use.lookups)
        spread = f"in blocks of {self.block}" if self.block and not tied else "per channel" if use.linear else "per row"
        return f"{self._bits(use)}-bit codes {spread} for '{use.tensor.name}'"

    def _bits(self, use: Use) -> int:
        """Return the bits of a weight's codes: two forms share only whole bytes, an odd row has no halves."""
        if use.lookups and (use.linear or use.shape[1] % 2 == 1):
            return 8
        return self.bits

    def _why_not(self, graph: gs.Graph, use: Use) -> str:
        """Return what stands against the form in this graph, nothing where it is fine."""
        if use.linear:
            blocked = not use.lookups and (self.bits < 8 or self.block)
            needed = BLOCK_OPSET if blocked else CHANNEL_OPSET
        else:
            needed = SINCE if self._bits(use) < 8 else 1
        if int(graph.opset) < needed:
            return f"it needs opset {needed}, and the model has {graph.opset}: upgrade-opset{{to={needed}}} first"
        return ""

    def _in_parts(self, graph: gs.Graph, ctx: Context, uses: list[Use]) -> Iterator[tuple[list[Use], dict[str, Gram]]]:
        """Yield weights to be coded together, with the Gram matrices of those that have one, by the weight's name."""
        if self.method != "gptq" or graph is not ctx.model.graph:
            yield uses, {}
            return
        found = {use.tensor.name: _request(use) for use in uses}
        requests = {name: r for name, r in found.items() if r is not None and r.width <= WIDEST}
        yield [use for use in uses if use.tensor.name not in requests], {}
        part: list[Use] = []
        asked: dict[GramRequest, int] = {}
        for use in uses:
            request = requests.get(use.tensor.name)
            if request is None:
                continue
            size = 8 * request.width**2
            full = sum(asked.values()) + size > BUDGET or self.sequential
            if part and full and request not in asked:
                yield part, ctx.grams({u.tensor.name: requests[u.tensor.name] for u in part})
                part, asked = [], {}
            part.append(use)
            asked[request] = size
        if part:
            yield part, ctx.grams({u.tensor.name: requests[u.tensor.name] for u in part})

    def _coded(self, graph: gs.Graph, ctx: Context, use: Use, gram: Gram | None, gone: set[int]) -> Iterator[Change]:
        """Propose the change of one weight, whose values are read now."""
        values = array_of(use.tensor)
        if values is None or not np.isfinite(values).all():
            yield Change(label(use.first), self._what(use), "the weight has NaN or infinite elements")
            return
        usable = gram if gram is not None and gram.count and np.isfinite(gram.matrix).all() else None
        with Edit(graph) as edit:

            def apply() -> None:
                if use.linear and use.lookups:
                    self._tied(Maker(edit, ctx), use, values)
                elif use.linear:
                    self._linear(Maker(edit, ctx), use, values, usable)
                else:
                    self._lookups(Maker(edit, ctx), use, values)
                holder = constant_node(use.tensor)
                if holder is None:
                    gone.add(id(use.tensor))
                elif edit.is_local(holder) and not edit.is_used(use.tensor):
                    edit.remove(holder)

            yield Change(label(use.first), self._what(use), self._why(use, usable), apply)

    def _why(self, use: Use, gram: Gram | None) -> str:
        why = f"{self._bits(use)} bits instead of {8 * use.dtype.itemsize}"
        if use.linear and not use.lookups and self.method == "gptq":
            why += (
                f", rounded for the output on {gram.count} rows" if gram else ", rounded alone: no samples, or too wide"
            )
        if len(use.linear) > 1:
            why += f"; {len(use.linear)} layers share it, and ONNX Runtime decodes it for each on every run"
        return why

    def _linear(self, maker: Maker, use: Use, values: Array, gram: Gram | None) -> None:
        weight = values.T if _is_transposed(use.linear[0]) else values
        codes, scale, zero = self._codes(np.asarray(weight, np.float32), gram)
        if self.bits == 4:
            shell = maker.ctx.model.shell
            shell.ir_version = max(shell.ir_version, BLOCK_IR)
        inputs = [maker.constant(f"{use.tensor.name}/codes", codes), _scale(maker, use, scale, values.dtype)]
        if zero is not None:
            inputs.append(maker.constant(f"{use.tensor.name}/zero", zero))
        _decode(maker, use, inputs, {"axis": 0, "block_size": self.block} if self.block else {"axis": 1})

    def _tied(self, maker: Maker, use: Use, values: Array) -> None:
        """Code a table that is a factor, too, once: 8 bits per row, which the product reads transposed.

        ONNX Runtime turns the codes round when it loads the model.
        """
        table = coded_table(values, 8, values.shape[1], symmetric=True, method=METHODS[self.method])
        tables: dict[str, gs.Tensor] = {}
        like, name = use.linear[0], use.tensor.name
        for node in use.lookups:
            look_up(maker, node, table, tables, values.dtype)
        turned = maker.tensor(f"{name}/turned", TensorType(table.codes.dtype, values.shape[::-1]))
        node = maker.node("Transpose", [tables["codes"]], [turned], {"perm": [1, 0]}, like=[like])
        maker.ctx.model.metadata(node)[DECODES] = "quantize-weights"
        scale = table.scale.reshape(-1).astype(np.float32)
        _decode(maker, use, [turned, _scale(maker, use, scale, values.dtype)], {"axis": 1})

    def _codes(self, weight: Array, gram: Gram | None) -> tuple[Array, Array, Array | None]:
        """Return codes (inputs, outputs), scales and zero points of a weight, as DequantizeLinear takes them."""
        method = METHODS[self.method]
        code = weight_code(weight, 0 if self.block else 1, self.bits, self.symmetric, self.block, method)
        code = dataclasses.replace(code, scale=half_where_it_fits(code.scale).astype(np.float32))
        if gram is None:
            codes = code.quantize(weight)
            return codes, code.scale, None if self.symmetric else code.zero_point
        found, grid = round_to_codes(
            weight, gram.matrix, bits=self.bits, block=self.block, symmetric=self.symmetric, rounded=half_where_it_fits
        )
        scale, zero = (grid.scale, grid.zero) if self.block else (grid.scale[0], grid.zero[0])
        return found.astype(code.dtype), scale, None if self.symmetric else zero.astype(code.dtype)

    def _lookups(self, maker: Maker, use: Use, values: Array) -> None:
        known = all(maker.ctx.shapes.proved(node.outputs[0]).rank is not None for node in use.lookups)
        columns = values.shape[1]
        block = self.block if self.block and columns % self.block == 0 and known else columns
        method = METHODS[self.method]
        table = coded_table(values, self._bits(use), block, symmetric=self.symmetric, method=method)
        tables: dict[str, gs.Tensor] = {}
        for node in use.lookups:
            look_up(maker, node, table, tables, values.dtype)


def _uses(graph: gs.Graph, ctx: Context) -> Iterator[Use]:
    """Yield the constants that layers of a graph read as weights, with all that reads them."""
    local = {id(node) for node in graph.nodes}
    seen: set[int] = set()
    for node in graph.nodes:
        index = _weight_index(node)
        if index is None or refers(node) or DECODES in ctx.model.metadata(node):
            continue
        tensor = node.inputs[index]
        if index == 1 and _is_transposed(node) and is_standard(node, "MatMul"):
            tensor = tensor.inputs[0].inputs[0]
        held = held_type(tensor)
        if id(tensor) in seen or held is None or held[0] not in FLOATS or len(held[1]) < 2:
            continue
        seen.add(id(tensor))
        yield _use(graph, tensor, local, *held)


def _use(graph: gs.Graph, tensor: gs.Tensor, local: set[int], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Use:
    readers = list({id(n): n for n in tensor.outputs}.values())
    use = Use(tensor, dtype, shape, [], [])
    for node in readers:
        turned = _turned(graph, node)
        if turned:
            use.linear += turned
        elif _weight_index(node) == 1 and node.inputs[0] is not tensor:
            use.linear.append(node)
        elif _weight_index(node) == 0:
            use.lookups.append(node)
        else:
            use.why = use.why or f"{node.op} '{label(node)}' reads it, too"
    if use.why:
        return use
    if is_output(graph, tensor):
        use.why = "it is an output of the graph"
    elif any(id(n) not in local for n in (*readers, *use.linear)):
        use.why = "several graphs read it"
    elif len(shape) != 2:
        use.why = f"it has {len(shape)} dimensions, not 2"
    elif len({_is_transposed(n) for n in use.linear}) > 1:
        use.why = "it is read transposed and as it is"
    elif use.linear and use.lookups and not _is_transposed(use.linear[0]):
        use.why = "it is a factor whose columns are looked up"
    return use


def _turned(graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """Return the MatMuls that alone read what a Transpose makes of a matrix, nothing for other nodes."""
    if not is_standard(node, "Transpose") or node.attrs.get("perm", [1, 0]) != [1, 0] or refers(node):
        return []
    made, readers = node.outputs[0], list({id(n): n for n in node.outputs[0].outputs}.values())
    fine = all(is_standard(n, "MatMul") and n.inputs[1] is made and n.inputs[0] is not made for n in readers)
    return readers if fine and not is_output(graph, made) else []


def _weight_index(node: gs.Node) -> int | None:
    """Return which input of a node may be a weight to be coded, None where there is none."""
    if is_standard(node, "MatMul", "Gemm") and len(node.inputs) > 1:
        return 1
    if is_standard(node, "Gather") and node.attrs.get("axis", 0) == 0 and not is_constant(node.inputs[1]):
        return 0
    return None


def _is_transposed(node: gs.Node) -> bool:
    """Tell whether a layer multiplies by its weight's transpose."""
    if is_standard(node, "Gemm"):
        return bool(node.attrs.get("transB", 0))
    made_by = node.inputs[1].inputs
    return len(made_by) == 1 and is_standard(made_by[0], "Transpose")


def _decode(maker: Maker, use: Use, inputs: list[gs.Tensor], attrs: dict[str, Any]) -> None:
    """Let the layers multiply by what DequantizeLinear makes of codes (inputs, outputs)."""
    scale = inputs[1]
    decoded = maker.tensor(
        f"{use.tensor.name}/decoded", TensorType(scale.dtype, maker.ctx.shapes.proved(inputs[0]).shape)
    )
    maker.node("DequantizeLinear", inputs, [decoded], attrs, like=[use.linear[0]])
    for node in use.linear:
        former = node.inputs[1].inputs
        maker.edit.set_input(node, 1, decoded)
        node.attrs.pop("transB", None)
        if former and is_standard(former[0], "Transpose") and not maker.edit.is_used(former[0].outputs[0]):
            maker.edit.remove(former[0])


def _saving(use: Use, bits: int, block: int) -> float:
    """Return the bytes that coding a weight saves, roughly."""
    rows, columns = use.shape
    scales = rows * columns / block if block else max(rows, columns)
    return rows * columns * (use.dtype.itemsize - bits / 8) - 3 * scales


def _request(use: Use) -> GramRequest | None:
    """Return the request for the input of a weight that one tensor meets, None for others."""
    if not use.linear or len({id(n.inputs[0]) for n in use.linear}) != 1:
        return None
    node = use.linear[0]
    width = use.shape[1 if _is_transposed(node) else 0]
    axis = 0 if is_standard(node, "Gemm") and node.attrs.get("transA", 0) else -1
    return GramRequest(node.inputs[0].name, width, axis)


def _scale(maker: Maker, use: Use, scale: Array, dtype: np.dtype[Any]) -> gs.Tensor:
    """Return scales of the weight's type: stored as float16 where that holds them, and cast."""
    name = f"{use.tensor.name}/scale"
    stored = half_where_it_fits(scale)
    if stored.dtype == dtype:
        return maker.constant(name, stored)
    if stored.dtype != np.float16 or scale.size < OVERHEAD // 2:
        return maker.constant(name, scale.astype(dtype))
    made = maker.tensor(f"{name}/cast", TensorType(dtype, scale.shape))
    node = maker.node("Cast", [maker.constant(name, stored)], [made], {"to": 1}, like=[use.linear[0]])
    maker.ctx.model.metadata(node)[DECODES] = "quantize-weights"
    return made
