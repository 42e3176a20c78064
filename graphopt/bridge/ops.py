"""The operators that the bridge computes: one table, made of those of the `ops_*` modules.

BatchNormalization, Dropout, If and Constant are the builder's own; `refusals.py` says what is left out on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.bridge import (
    ops_activation,
    ops_attention,
    ops_boxes,
    ops_contrib,
    ops_conv,
    ops_fused_attention,
    ops_index,
    ops_loss,
    ops_math,
    ops_norm,
    ops_quant,
    ops_random,
    ops_reduce,
    ops_resize,
    ops_rnn,
    ops_shape,
    ops_signal,
    ops_vision,
)  # fmt: skip
from graphopt.bridge.table import Op, Table, merged

ORT_DOMAIN = "com.microsoft"

_STANDARD = (
    ops_activation, ops_attention, ops_boxes, ops_conv, ops_index, ops_loss, ops_math, ops_norm, ops_quant, ops_random,
    ops_reduce, ops_resize, ops_rnn, ops_shape, ops_signal, ops_vision,
)  # fmt: skip

TABLES: Sequence[tuple[str, str, Table]] = (
    *(("", module.__name__, module.TABLE) for module in _STANDARD),
    ("", ops_contrib.__name__, ops_contrib.STANDARD),
    (ORT_DOMAIN, ops_contrib.__name__, ops_contrib.TABLE),
    (ORT_DOMAIN, ops_fused_attention.__name__, ops_fused_attention.TABLE),
    (ORT_DOMAIN, ops_quant.__name__, ops_quant.TABLE),
)
"""Domain, module and table of each part."""

OPS: Mapping[tuple[str, str], tuple[Op, ...]] = merged((domain, table) for domain, _, table in TABLES)
"""(domain, operator) -> its versions, oldest first."""
