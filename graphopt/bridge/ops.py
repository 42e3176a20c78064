"""The operators that the bridge computes: one table, made of those of the `ops_*` modules.

BatchNormalization, Dropout, If and Constant are the builder's own; `refusals.py` says what is left out on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.bridge import (
    ops_activation,
    ops_attention,
    ops_conv,
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
from graphopt.bridge.table import Op, merged

_STANDARD = (
    ops_activation, ops_attention, ops_conv, ops_index, ops_loss, ops_math, ops_norm, ops_quant, ops_random, ops_reduce,
    ops_resize, ops_rnn, ops_shape, ops_signal, ops_vision,
)  # fmt: skip

OPS: Mapping[tuple[str, str], tuple[Op, ...]] = merged([("", module.TABLE) for module in _STANDARD])
"""(domain, operator) -> its versions, oldest first."""
