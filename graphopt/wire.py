"""The protobuf wire format, as far as weights need it: a model's bytes -> the same model without large weights.

A 2 GB file so costs no memory until its weights are read: only what is left is given to protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from onnx import AttributeProto, TensorProto

MAPPED = "graphopt.mapped"
"""Key of the `external_data` entry that numbers one of the regions taken out."""

MIN_SPLIT = 1024
"""Data below this many bytes stays where it is."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 100  # of messages in each other: protobuf's own limit

_TENSOR = "tensor"
_INNER: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: _TENSOR},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph"},
}
"""Message -> field number -> the message in it; only these lead to tensors that `importer.py` resolves."""
_ATTRIBUTE_TYPE, _ATTRIBUTE_REF = 20, 21
_TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 9, 13, 14

_Field: TypeAlias = tuple[int, int, int, int, int]
_Pieces: TypeAlias = "list[bytes | memoryview]"


def split_weights(data: memoryview) -> tuple[bytes, list[memoryview]]:
    """Return a serialized `ModelProto` without the large `raw_data` of its tensors, and those regions.

    Each region is replaced by an `external_data` entry `MAPPED` with its index: in initializers and tensor
    attributes of graphs, subgraphs and functions.

    Raises:
        ValueError: malformed data.
    """
    splitter = _Splitter(data)
    return b"".join(splitter.message("model", 0, len(data), 0)), splitter.regions


class _Splitter:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.regions: list[memoryview] = []

    def message(self, kind: str, start: int, end: int, depth: int) -> _Pieces:
        """Return the bytes of a message, with the tensors inside it split."""
        if kind == _TENSOR:
            return self._tensor(start, end)
        fields = list(_fields(self.data, start, end))
        inner = _INNER[kind]
        if kind == "attribute":
            inner = self._inner_of_attribute(fields)
        pieces: _Pieces = []
        copied = start
        for number, wire, begin, content, stop in fields:
            if number not in inner or wire != _BYTES or stop - content < MIN_SPLIT or depth > _MAX_DEPTH:
                continue
            rewritten = self.message(inner[number], content, stop, depth + 1)
            length = sum(len(piece) for piece in rewritten)
            pieces += [self.data[copied:begin], _varint(number << 3 | _BYTES), _varint(length), *rewritten]
            copied = stop
        pieces.append(self.data[copied:end])
        return pieces

    def _inner_of_attribute(self, fields: list[_Field]) -> Mapping[int, str]:
        """Return the fields to go into: those that the attribute's type says hold its value."""
        numbers = {number for number, *_ in fields}
        types = [_read_varint(self.data, f[3], f[4])[0] for f in fields if f[0] == _ATTRIBUTE_TYPE and f[1] == _VARINT]
        if not types or _ATTRIBUTE_REF in numbers:
            return {}
        wanted = {int(AttributeProto.TENSOR): 5, int(AttributeProto.GRAPH): 6}.get(types[-1])
        return {} if wanted is None else {wanted: _INNER["attribute"][wanted]}

    def _tensor(self, start: int, end: int) -> _Pieces:
        fields = list(_fields(self.data, start, end))
        raw = [f for f in fields if f[0] == _TENSOR_RAW and f[1] == _BYTES]
        external = any(f[0] in (_TENSOR_EXTERNAL, _TENSOR_LOCATION) for f in fields)
        if external or len(raw) != 1 or raw[0][4] - raw[0][3] < MIN_SPLIT:
            return [self.data[start:end]]
        _, _, begin, content, stop = raw[0]
        entry = _message(1, MAPPED.encode()) + _message(2, str(len(self.regions)).encode())
        self.regions.append(self.data[content:stop])
        location = _varint(_TENSOR_LOCATION << 3 | _VARINT) + _varint(TensorProto.EXTERNAL)
        return [self.data[start:begin], self.data[stop:end], _message(_TENSOR_EXTERNAL, entry), location]


def _fields(data: memoryview, start: int, end: int) -> Iterator[_Field]:
    """Yield (number, wire type, start of key, start of content, end) of each field of a message."""
    position = start
    while position < end:
        begin = position
        key, position = _read_varint(data, position, end)
        wire = key & 7
        if wire == _BYTES:
            length, position = _read_varint(data, position, end)
            stop = position + length
        elif wire == _VARINT:
            _, stop = _read_varint(data, position, end)
        elif wire in (_FIXED64, _FIXED32):
            stop = position + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if stop > end:
            raise ValueError("truncated field")
        yield key >> 3, wire, begin, position, stop
        position = stop


def _read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise ValueError("truncated number")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content
