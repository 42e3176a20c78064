"""Tables that Gather looks rows up in, as small codes that are decoded after the look-up, for the rows found only.

    8 bits   Gather(codes) → Cast → · scale (+ offset)
    4 bits   Gather(packed) → the low and high halves of each byte, side by side → Cast → · scale (+ offset)

Two codes share a byte: those that are half a block apart, so that decoding is a Concat and no shuffle.  Scales and
offsets (float16 where they fit) are tables as well, one row of numbers for each row of codes.  DequantizeLinear on the
table would be shorter; ONNX Runtime then decodes the whole table on every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import constant_node, node_values
from graphopt.analysis.shapes import TensorType
from graphopt.codes import WeightMethod, weight_code
from graphopt.edit import replace_output
from graphopt.ops import DECODES

from .new_nodes import Maker

Array: TypeAlias = np.ndarray[Any, Any]

SINCE = 18
"""First operator set with BitwiseAnd."""

CHUNK = 1 << 22
"""Elements that are coded at a time."""


@dataclass(frozen=True)
class Table:
    """A coded table of rows: ``value = code * scale + offset``.

    Attributes:
        codes: (rows, blocks, block) uint8 or int8; 4-bit ones packed to half the last axis.
        scale: float16 or float32, (rows, blocks, 1).
        offset: as `scale`; None for none.
        bits: 8 or 4.
    """

    codes: Array
    scale: Array
    offset: Array | None
    bits: int

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return int(self.scale.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(int(part.nbytes) for part in (self.codes, self.scale, self.offset) if part is not None)


def held_type(tensor: gs.Tensor) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Return type and shape of a constant, unread; None for anything else."""
    if isinstance(tensor, gs.Constant):
        return np.dtype(tensor.dtype), tuple(tensor.shape)
    node = constant_node(tensor)
    values = None if node is None else node_values(node)
    return None if values is None else (np.dtype(values.dtype), tuple(values.shape))


def half_where_it_fits(scale: Array) -> Array:
    """Return scales as float16 where that holds them to 11 bits, else as they are."""
    sizes = np.abs(scale[scale != 0])
    limits = np.finfo(np.float16)
    fits = not sizes.size or (sizes.min() >= limits.tiny and sizes.max() <= limits.max)
    return scale.astype(np.float16) if fits else scale


def coded_table(
    values: Array, bits: int, block: int, *, symmetric: bool, method: WeightMethod, half: bool = True
) -> Table:
    """Return a table (rows, columns) of float weights as codes.

    Args:
        values: finite.
        bits: 8 or 4; 4 needs an even block.
        block: columns that share a scale, a divisor of their number.
        symmetric: no offset, where there are 8 bits; 4 always have one.
        method: of `weight_code`.
        half: store scales as float16.
    """
    symmetric = symmetric and bits == 8
    rows, columns = values.shape
    step = max(1, CHUNK // max(columns, 1))
    parts: list[tuple[Array, Array, Array]] = []
    for start in range(0, rows, step):
        part = np.asarray(values[start : start + step], np.float32)
        code = weight_code(part, 1, bits, symmetric, block, method)
        parts.append((part, code.scale, code.zero_point.astype(np.int32)))
    scale = np.concatenate([p[1] for p in parts])[:, :, None]
    zero = np.concatenate([p[2] for p in parts])[:, :, None]
    scale = half_where_it_fits(scale) if half else scale
    wide = scale.astype(np.float32)
    offset = None if symmetric else (-zero * wide).astype(scale.dtype)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    codes = np.empty((rows, columns // block, block // (8 // bits)), np.int8 if symmetric else np.uint8)
    for number, (part, _, _) in enumerate(parts):
        at = slice(number * step, number * step + len(part))
        shifted = part.reshape(len(part), -1, block) - (0 if offset is None else offset[at].astype(np.float32))
        found = np.clip(np.rint(shifted / wide[at]), low, high).astype(np.int32)
        codes[at] = _packed(found) if bits == 4 else found
    return Table(codes, scale, offset, bits)


def _packed(codes: Array) -> Array:
    half = codes.shape[-1] // 2
    return np.asarray(codes[..., :half] | (codes[..., half:] << 4), np.uint8)


def look_up(maker: Maker, gather: gs.Node, table: Table, tables: dict[str, gs.Tensor], dtype: np.dtype[Any]) -> None:
    """Put nodes that look rows up in a coded table in the place of a Gather, whose output they make.

    Args:
        maker: of nodes.
        gather: reads rows (axis 0); its output must have a known rank where a row has several blocks.
        table: what is read.
        tables: filled with the table's constants at the first call; several Gathers share them.
        dtype: float type of the rows.
    """
    output, indices = gather.outputs[0], gather.inputs[1]
    shape = maker.ctx.shapes.proved(output).shape
    flat = table.blocks == 1
    if not tables:
        base = gather.inputs[0].name
        for name, part in (("codes", table.codes), ("scale", table.scale), ("offset", table.offset)):
            if part is not None:
                tables[name] = maker.constant(f"{base}/{name}", part[:, 0] if flat else part)
    found = {name: _node(maker, gather, "Gather", [held, indices], held.dtype) for name, held in tables.items()}
    codes = found.pop("codes")
    if table.bits == 4:
        codes = _unpacked(maker, gather, codes)
    rows = _cast(maker, gather, codes, dtype)
    rows = _node(maker, gather, "Mul", [rows, _cast(maker, gather, found["scale"], dtype)], dtype)
    if table.offset is not None:
        rows = _node(maker, gather, "Add", [rows, _cast(maker, gather, found["offset"], dtype)], dtype)
    if flat:
        maker.edit.hand_over(rows.inputs[0], rows, output)
    else:
        assert shape is not None
        replace_output(gather, output, gs.Variable.empty())
        width = table.blocks * table.codes.shape[2] * (8 // table.bits)
        sizes = maker.constant(f"{output.name}/shape", np.array([*[0] * (len(shape) - 1), width], np.int64))
        maker.node("Reshape", [rows, sizes], [output], like=[gather])
    maker.edit.remove(gather)


def _node(
    maker: Maker, gather: gs.Node, op: str, inputs: list[gs.Tensor], dtype: Any, attrs: dict[str, Any] | None = None
) -> gs.Tensor:
    made = maker.tensor(f"{gather.outputs[0].name}/{op}", TensorType(np.dtype(dtype), None))
    node = maker.node(op, inputs, [made], attrs, like=[gather])
    maker.ctx.model.metadata(node)[DECODES] = "quantize-weights"
    return made


def _unpacked(maker: Maker, gather: gs.Node, packed: gs.Tensor) -> gs.Tensor:
    low = _node(maker, gather, "BitwiseAnd", [packed, _byte(maker, gather, 15)], np.uint8)
    high = _node(maker, gather, "BitShift", [packed, _byte(maker, gather, 4)], np.uint8, {"direction": "RIGHT"})
    return _node(maker, gather, "Concat", [low, high], np.uint8, {"axis": -1})


def _byte(maker: Maker, gather: gs.Node, value: int) -> gs.Tensor:
    return maker.constant(f"{gather.outputs[0].name}/{value}", np.array(value, np.uint8))


def _cast(maker: Maker, gather: gs.Node, tensor: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
    if tensor.dtype == dtype:
        return tensor
    to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return _node(maker, gather, "Cast", [tensor], dtype, {"to": to})
