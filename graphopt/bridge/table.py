"""What an entry of the operator tables is: from which opset on which function computes an operator in torch.

    TABLE: Table = {
        "Relu": relu,                                       since opset 1
        "Softmax": (Op(1, softmax_1), Op(13, softmax)),     by opset: the newest with since <= opset is taken
        "Reshape": Op(1, reshape, host=True),               takes and gives host values (host.py)
    }

A function is module-level (`torch.fx` writes its name into the code that it makes) and is called with the inputs by
position, in ONNX order, None where one is left out, and the attributes by their ONNX names, with the schema's
defaults.  An attribute without default that a node lacks is not passed.  One that the function has no parameter for is
refused unless it has its default value.  A tensor attribute of one element comes as (number, torch dtype).  A
parameter `outputs` gets the number of outputs that the node names, `opset` the version of the operator set.  Returned
is one tensor, or a tuple of them (always, where the operator may have several outputs and is not asked by `outputs`).
A host value is returned only where all inputs are host values (Shape and Size apart).
Types are codes of `TensorProto.DataType`: `host.torch_kind` gives torch's.  Half precision does not occur: masters are
float32, and attributes that name a half type arrive as FLOAT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Op:
    """One version of an operator.

    Attributes:
        since: the first opset that it is for.
        function: what computes it.
        host: whether the function takes host values as inputs; for others the builder makes them tensors first.
        numbers: inputs that are settings, not data (the scales of Resize): constants come as Python numbers, even
            floats, which are host values nowhere else.
    """

    since: int
    function: Callable[..., Any]
    host: bool = False
    numbers: tuple[int, ...] = ()


Entry: TypeAlias = "Op | Callable[..., Any] | tuple[Op, ...]"
Table: TypeAlias = Mapping[str, Entry]


def merged(tables: Iterable[tuple[str, Table]]) -> dict[tuple[str, str], tuple[Op, ...]]:
    """Return tables, each with its domain, as one: (domain, operator) -> its versions, oldest first."""
    found: dict[tuple[str, str], tuple[Op, ...]] = {}
    for domain, table in tables:
        for name, entry in table.items():
            versions = (entry,) if isinstance(entry, Op) else entry if isinstance(entry, tuple) else (Op(1, entry),)
            found[domain, name] = tuple(sorted(versions, key=lambda op: op.since))
    return found
