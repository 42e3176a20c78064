"""Quantized (QDQ) models that are trained: codes through floats, scales through logarithms, biases tied.

    DequantizeLinear(codes, s, z)    trained as   (q - z) s,  q = clip(round(u p / s)) + z,  u p = (codes - z) s first
    scale s                          trained as   s = s0 exp(t - 1), t = 1 first: always positive, exact where untrained
    int32 bias b of a layer          trained as   round(b / (s_x s_w)) s_x s_w

The scale of a bias is always the product of the scales of the layer's input and weight: integer kernels take it for
that whatever is stored, so it is written back as that, too.  Zero points stay.  Codes that use 7 of their 8 bits in a
channel keep to those (processors without VNNI).  Scales of at most three binary digits, as `graphopt.exact_codes` makes
them, keep those digits.

The unit u of a channel is a power of two near its largest weight: a rate means the same change relative to what a
channel's codes can hold, however small folding BatchNormalization has made its weights.

Sources: Jacob et al. 2018 (training with simulated quantization); Esser et al., LSQ, ICLR 2020 (scales); Jain et al.,
TQT, MLSys 2020 (logarithms of scales).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from graphopt.bridge.builder import Form
from graphopt.bridge.host import to_numpy
from graphopt.bridge.ops_quant import encode, learned_scale, tied_scale
from graphopt.codes import Affine, code_range, normal, spread

Array: TypeAlias = np.ndarray[Any, Any]

BIAS = np.dtype(np.int32)
_SEVEN_BITS = (-64, 63)
_EIGHT_BITS = 1 / 128
_SUMS = 1 << 13
"""Sums of products of codes: a few tens of the 2^15 that one may be."""


@dataclass(frozen=True)
class Coded:
    """A constant that is stored as codes and trained as floats.

    Attributes:
        key: of its slot.
        codes: as stored.
        scale: as stored, float32: one number, one per channel, or one per block.
        zero: zero points, int32, in the shape of `scale`.
        scale_key: slot of the scale.
        axis, block: where the scales lie.
        tied: slots of the scales of a layer's input and weight, whose product is the scale of this bias; None for
            what is no bias of an integer layer.
        mask: False where the float stays zero; None for no such places.
    """

    key: str
    codes: Array
    scale: Array
    zero: Array
    scale_key: str
    axis: int
    block: int
    tied: tuple[str, str] | None = None
    mask: Array | None = None

    @property
    def role(self) -> str:
        """`codes` for weights, `bias` for what has one axis."""
        return "codes" if self.codes.ndim > 1 and self.codes.dtype != BIAS else "bias"

    def master(self) -> Array:
        """Return the floats that the stored codes stand for, float32."""
        shifted = self.codes.astype(np.float64) - self._spread(self.zero)
        return np.asarray(shifted * self._spread(self.scale), np.float32)

    def unit(self) -> Array:
        """Return what parameters are multiplied by, float32, shaped as `scale`: powers of two, which round nothing.

        A weight at the end of its code's range is between 1/2 and 1 units, a bias about as large as its layer's sums.
        """
        high = _SUMS if self.codes.dtype == BIAS else max(abs(limit) for limit in code_range(self.codes.dtype))
        return np.asarray(np.exp2(np.ceil(np.log2(self.scale.astype(np.float64) * high))), np.float32)

    def step(self) -> float:
        """Return about what one code is, in units of the parameter; for biases that of weights of 8 bits."""
        return _EIGHT_BITS if self.role == "bias" else 1.0 / max(abs(limit) for limit in code_range(self.codes.dtype))

    def start(self) -> Array:
        """Return what the parameter begins as."""
        return np.asarray(self.master() / self._spread(self.unit()), np.float32)

    def floats(self, parameter: Array) -> Array:
        """Return the floats that a parameter stands for."""
        return np.asarray(parameter * self._spread(self.unit()), np.float32)

    def limits(self) -> tuple[Array, Array]:
        """Return the smallest and largest code of each scale, float32."""
        low, high = (np.full(self.scale.shape, limit, np.float32) for limit in code_range(self.codes.dtype))
        if self.codes.dtype == np.int8 and not self.block and self.codes.size:
            axes = tuple(i for i in range(self.codes.ndim) if self.scale.ndim == 0 or i != self.axis % self.codes.ndim)
            least, most = (found(self.codes, axis=axes).reshape(low.shape) for found in (np.min, np.max))
            reduced = (least >= _SEVEN_BITS[0]) & (most <= _SEVEN_BITS[1])
            low, high = np.where(reduced, _SEVEN_BITS[0], low), np.where(reduced, _SEVEN_BITS[1], high)
        return low.astype(np.float32), high.astype(np.float32)

    def encode(self, master: Array, scale: Array) -> Array:
        """Return the codes of trained floats in the stored type, as the forward pass makes them.

        Where neither float nor scale changed, the stored code stays: int32 has more digits than float32.
        """
        kept = (master == self.master()) & (self._spread(scale) == self._spread(self.scale))
        if self.mask is not None:
            master = np.where(self.mask, master, np.float32(0.0))
        if self.codes.dtype == BIAS:
            steps = np.rint(master.astype(np.float64) / self._spread(scale))
            codes = np.clip(steps, *code_range(BIAS)).astype(BIAS)
        else:
            low, high = (self._spread(limit) for limit in self.limits())
            zero = self.zero.astype(self.codes.dtype)
            found = Affine(scale, zero, self.axis if scale.ndim else None, self.block).quantize(master)
            codes = np.clip(found.astype(np.int32), low, high).astype(np.int32)
        return np.where(kept, self.codes.astype(np.int64), codes).astype(self.codes.dtype)

    def _spread(self, parameter: Array) -> Array:
        return spread(parameter, self.codes.shape, self.axis if parameter.ndim else None, self.block)


@dataclass
class Quantized:
    """What of a model is quantized and can be trained.

    Attributes:
        coded: constants stored as codes, by slot.
        scales: scales of activations and weights, by slot -> the slot of the scale that is trained for it (itself, or
            an equal one that must stay equal).
        untrained: codes and scales that stay as they are, by slot -> why.
        notes: what to know about the model before it is trained.
        stored: scales as they are stored, by slot.
    """

    coded: dict[str, Coded] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    untrained: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stored: dict[str, Array] = field(default_factory=dict)

    @property
    def leaders(self) -> list[str]:
        """Slots of the scales that may be trained."""
        return list(dict.fromkeys(self.scales.values()))

    def start(self, key: str) -> Array | None:
        """Return what a trained slot's parameter begins as, None for slots that have nothing to do with codes."""
        if key in self.coded:
            return self.coded[key].start()
        return np.ones(self.stored[key].shape, np.float32) if key in self.scales else None

    def steps(self) -> dict[str, float]:
        """Return what one code is, by slot of what may be trained: of scales as much as of what they scale."""
        found = {key: coded.step() for key, coded in self.coded.items()}
        weights = {coded.scale_key: coded.step() for coded in self.coded.values()}
        return {**{key: weights.get(key, _EIGHT_BITS) for key in self.leaders}, **found}

    def forms(self, root: nn.Module, names: Mapping[str, str], trained: Collection[str]) -> dict[str, Form]:
        """Return what nodes read in the place of codes and scales, by name on `root`, which gets constants for that.

        Args:
            root: holds the parameters.
            names: slot -> its name on `root`.
            trained: slots of the parameters.
        """
        made: dict[str, Form] = {}
        for key, leader in self.scales.items():
            if leader in trained:
                stored = _buffer(root, f"{names[key]}_stored", self.stored[key])
                made[names[key]] = Form(learned_scale, (names[leader], stored), self._kept(key))
        for key, coded in self.coded.items():
            if key not in trained and not self._moves(coded, trained):
                continue
            master = names[key] if key in trained else _buffer(root, f"{names[key]}_float", coded.start())
            if coded.tied is not None:
                like = _buffer(root, f"{names[coded.scale_key]}_stored", coded.scale)
                made[names[coded.scale_key]] = Form(tied_scale, (*(names[s] for s in coded.tied), like))
            held = {"zero": coded.zero, **dict(zip(("low", "high"), coded.limits(), strict=True)), "mask": coded.mask}
            rest = [_buffer(root, f"{names[key]}_{p}", array) for p, array in held.items() if array is not None]
            unit = _buffer(root, f"{names[key]}_unit", coded.unit())
            options = {"axis": coded.axis, "block_size": coded.block}
            made[names[key]] = Form(encode, (master, unit, names[coded.scale_key], *rest), options)
        return made

    def _kept(self, key: str) -> dict[str, bool]:
        """Return which form a scale keeps while it is trained."""
        stored = self.stored[key]
        return {"half": stored.dtype == np.float16, "whole": bool((np.frexp(stored)[0] * 8 % 1 == 0).all())}

    def _moves(self, bias: Coded, trained: Collection[str]) -> bool:
        """Tell whether the scale of a bias changes with those of its layer."""
        return bias.tied is not None and any(self.scales.get(key) in trained for key in bias.tied)

    def scale_of(self, key: str, trained: Mapping[str, torch.Tensor]) -> Array:
        """Return a scale as it is stored after training, in float32 rounded to the stored type."""
        stored = self.stored[key]
        step = trained.get(self.scales.get(key, ""))
        if step is None:
            return np.asarray(stored, np.float32)
        held = torch.tensor(stored.astype(np.float32))
        found = to_numpy(learned_scale(step.detach().cpu(), held, **self._kept(key)))
        return np.asarray(normal(found).astype(stored.dtype), np.float32).reshape(stored.shape)

    def values(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """Return what is to be stored, by slot, in the stored types.

        Args:
            trained: parameters by slot: floats of codes, logarithms of scales plus 1.  Biases of layers are encoded
                anew where a scale of their layer is trained, even if they are not.
        """
        out: dict[str, Array] = {}
        for key, leader in self.scales.items():
            if leader in trained:
                out[key] = self.scale_of(key, trained).astype(self.stored[key].dtype)
        for key, coded in self.coded.items():
            master = coded.floats(to_numpy(trained[key], np.dtype(np.float32))) if key in trained else None
            if coded.tied is not None:
                if master is not None or self._moves(coded, trained):
                    scale = self._product(coded, trained)
                    out[key] = coded.encode(coded.master() if master is None else master, scale)
                    out[coded.scale_key] = scale.astype(self.stored[coded.scale_key].dtype)
            elif master is not None:
                out[key] = coded.encode(master, self.scale_of(coded.scale_key, trained))
        return out

    def _product(self, bias: Coded, trained: Mapping[str, torch.Tensor]) -> Array:
        """Return the scale of a tied bias."""
        assert bias.tied is not None
        of_input, of_weight = (self.scale_of(key, trained).reshape(-1) for key in bias.tied)
        return np.broadcast_to(of_input * of_weight, bias.scale.size).reshape(bias.scale.shape).astype(np.float32)


def _buffer(root: nn.Module, name: str, array: Array) -> str:
    """Put a constant on the root, and return under which name."""
    while hasattr(root, name):
        name += "_"
    root.register_buffer(name, torch.tensor(array.astype(np.float32)), persistent=False)
    return name
