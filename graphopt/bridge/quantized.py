"""Quantized (QDQ) models that are trained: codes through floats, scales through logarithms, biases tied.

    DequantizeLinear(codes, s, z)    trained as   (q - z) s,  q = clip(round(u p / s)) + z,  u p = (codes - z) s first
    scale s                          trained as   s = s0 exp(t), t = 0 at first: always positive, exact where untrained
    int32 bias b of a layer          trained as   round(b / (s_x s_w)) s_x s_w

The scale of a bias is always the product of the scales of the layer's input and weight: integer kernels take it for
that whatever is stored, so it is written back as that, too.  Zero points stay.  Codes that use 7 of their 8 bits in a
channel keep to those (processors without VNNI), scales of at most three binary digits keep those (sums are exact then, and codes
the same whatever computes them).

The unit u of a channel is a power of two near its largest weight: a rate means the same change relative to what a
channel's codes can hold, however small folding BatchNormalization has made its weights.

Sources: Jacob et al. 2018 (training with simulated quantization); Esser et al., LSQ, ICLR 2020 (scales); Jain et al.,
TQT, MLSys 2020 (logarithms of scales).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import nn

from graphopt.analysis.constants import array_of, is_constant, scalar_of
from graphopt.analysis.integer_layers import FORMS
from graphopt.bridge.builder import Form
from graphopt.bridge.host import to_numpy
from graphopt.bridge.ops_quant import encode, learned_scale, tied_scale
from graphopt.codes import Affine, code_range, normal, spread
from graphopt.edit import label
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.slots import Slot
from graphopt.sparse_marks import marks
from graphopt.targets import CPU_FORMS

Array: TypeAlias = np.ndarray[Any, Any]

QUANTIZER = "QuantizeLinear"
DEQUANTIZER = "DequantizeLinear"
_DOMAINS = frozenset({None, "", "ai.onnx", "com.microsoft"})
_BIAS = np.dtype(np.int32)
_SEVEN_BITS = (-64, 63)
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
        return "codes" if self.codes.ndim > 1 and self.codes.dtype != _BIAS else "bias"

    def master(self) -> Array:
        """Return the floats that the stored codes stand for, float32."""
        shifted = self.codes.astype(np.float64) - self._spread(self.zero)
        return np.asarray(shifted * self._spread(self.scale), np.float32)

    def unit(self) -> Array:
        """Return what parameters are multiplied by, float32, shaped as `scale`: powers of two, which round nothing.

        A weight at the end of its code's range is between 1/2 and 1 units, a bias about as large as its layer's sums.
        """
        high = _SUMS if self.codes.dtype == _BIAS else max(abs(limit) for limit in code_range(self.codes.dtype))
        return np.asarray(np.exp2(np.ceil(np.log2(self.scale.astype(np.float64) * high))), np.float32)

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
        if self.codes.dtype == _BIAS:
            steps = np.rint(master.astype(np.float64) / self._spread(scale))
            codes = np.clip(steps, *code_range(_BIAS)).astype(_BIAS)
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
    """

    coded: dict[str, Coded] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    untrained: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _stored: dict[str, Array] = field(default_factory=dict)

    @property
    def leaders(self) -> list[str]:
        """Slots of the scales that may be trained."""
        return list(dict.fromkeys(self.scales.values()))

    def start(self, key: str) -> Array | None:
        """Return what a trained slot's parameter begins as, None for slots that have nothing to do with codes."""
        if key in self.coded:
            return self.coded[key].start()
        return np.zeros(self._stored[key].shape, np.float32) if key in self.scales else None

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
                stored = _buffer(root, f"{names[key]}_stored", self._stored[key])
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
        stored = self._stored[key]
        return {"half": stored.dtype == np.float16, "whole": bool((np.frexp(stored)[0] * 8 % 1 == 0).all())}

    def _moves(self, bias: Coded, trained: Collection[str]) -> bool:
        """Tell whether the scale of a bias changes with those of its layer."""
        return bias.tied is not None and any(self.scales.get(key) in trained for key in bias.tied)

    def scale_of(self, key: str, trained: Mapping[str, torch.Tensor]) -> Array:
        """Return a scale as it is stored after training, in float32 rounded to the stored type."""
        stored = self._stored[key]
        step = trained.get(self.scales.get(key, ""))
        if step is None:
            return np.asarray(stored, np.float32)
        held = torch.tensor(stored.astype(np.float32))
        found = to_numpy(learned_scale(step.detach().cpu(), held, **self._kept(key)))
        return np.asarray(normal(found).astype(stored.dtype), np.float32).reshape(stored.shape)

    def values(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """Return what is to be stored, by slot, in the stored types.

        Args:
            trained: parameters by slot: floats of codes, logarithms of scales.  Biases of layers are encoded anew
                where a scale of their layer is trained, even if they are not.
        """
        out: dict[str, Array] = {}
        for key, leader in self.scales.items():
            if leader in trained:
                out[key] = self.scale_of(key, trained).astype(self._stored[key].dtype)
        for key, coded in self.coded.items():
            master = coded.floats(to_numpy(trained[key], np.dtype(np.float32))) if key in trained else None
            if coded.tied is not None:
                if master is not None or self._moves(coded, trained):
                    scale = self._product(coded, trained)
                    out[key] = coded.encode(coded.master() if master is None else master, scale)
                    out[coded.scale_key] = scale.astype(self._stored[coded.scale_key].dtype)
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


def find_quantized(model: Model, slots: Mapping[str, Slot], masks: Mapping[str, Array] | None = None) -> Quantized:
    """Return what of a model is quantized.

    Args:
        model: the model.
        slots: its constants, by key.
        masks: slot of codes -> array of its shape, zero where the float stays zero; None: where weights that the
            metadata marks as sparse are zero.
    """
    return _Finder(model, slots, masks).run(list(model.nodes()))


class _Finder:
    def __init__(self, model: Model, slots: Mapping[str, Slot], masks: Mapping[str, Array] | None) -> None:
        self.model = model
        self.slots = slots
        self.masks = masks
        self.keys = {id(slot.tensor): key for key, slot in slots.items()}
        self.found = Quantized()

    def run(self, nodes: list[gs.Node]) -> Quantized:
        quantizers = [n for n in nodes if is_coder(n, QUANTIZER)]
        dequantizers = [n for n in nodes if is_coder(n, DEQUANTIZER)]
        weights = [n for n in dequantizers if self._code_key(n)]
        biases = [n for n in weights if self.slots[self._code_key(n)].dtype == _BIAS]
        tied = {id(n) for n in biases}
        for node in (*quantizers, *(n for n in dequantizers if id(n) not in tied)):
            self._scale(node)
        for node in quantizers:
            self._join(node)
        for node in weights:
            self._codes(node)
        return self.found

    def _code_key(self, node: gs.Node) -> str:
        return self.keys.get(id(node.inputs[0]), "") if is_constant(node.inputs[0]) else ""

    def _scale(self, node: gs.Node) -> None:
        """Note the scale of a node as one that may be trained."""
        tensor = _behind_cast(node.inputs[1])
        key = self.keys.get(id(tensor))
        if key is None or key in self.found.scales or key in self.found.untrained:
            return
        values = self.slots[key].read()
        why = "" if all(_takes_scale(reader, tensor) for reader in tensor.outputs) else "other nodes read it, too"
        if not why and not (np.isfinite(values).all() and (values > 0).all()):
            why = "it is not positive"
        if why:
            self.found.untrained[key] = why
            return
        self.found.scales[key] = key
        self.found._stored[key] = values

    def _join(self, quantizer: gs.Node) -> None:
        """Let scales that are equal on both sides of what only moves values, or of Q and DQ, stay equal."""
        key = self._key_of_scale(quantizer)
        readers = quantizer.outputs[0].outputs
        for other in (*_coders_before(quantizer.inputs[0]), *(n for n in readers if is_coder(n, DEQUANTIZER))):
            same = self._key_of_scale(other)
            scales = self.found.scales
            if key not in scales or same not in scales or scales[key] == scales[same]:
                continue
            if np.array_equal(self.found._stored[key], self.found._stored[same]) and _equal_zeros(quantizer, other):
                gone = scales[same]
                scales.update({k: scales[key] for k, leader in scales.items() if leader == gone})

    def _key_of_scale(self, node: gs.Node) -> str:
        return self.keys.get(id(_behind_cast(node.inputs[1])), "")

    def _codes(self, node: gs.Node) -> None:
        """Note the codes of a DequantizeLinear as trained ones."""
        key, tensor = self._code_key(node), node.inputs[0]
        slot = self.slots[key]
        if key in self.found.coded or int(np.prod(slot.shape)) < 2 or slot.dtype.kind not in "iuV":
            return
        why = self._why_not(node, tensor)
        if why:
            self.found.untrained[key] = why
            return
        source = _behind_cast(node.inputs[1])
        scale = self.slots[self.keys[id(source)]].read()
        self.found._stored.setdefault(self.keys[id(source)], scale)
        scale = np.asarray(scale.reshape(()) if scale.size == 1 and not node.attrs.get("block_size") else scale)
        zero = array_of(node.inputs[2]) if _has(node, 2) else None
        zeros = np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.int32).reshape(scale.shape)
        tied = self._tie(node, key) if slot.dtype == _BIAS else None
        self.found.coded[key] = Coded(
            key, slot.read(), scale.astype(np.float32), zeros, self.keys[id(source)], int(node.attrs.get("axis", 1)),
            int(node.attrs.get("block_size", 0)), tied, self._mask(node, slot.read(), zeros),
        )  # fmt: skip

    def _why_not(self, node: gs.Node, codes: gs.Tensor) -> str:
        """Return what stands against training codes."""
        others = [reader for reader in codes.outputs if not (is_coder(reader, DEQUANTIZER) and _alike(reader, node))]
        if others:
            return f"{others[0].op} '{label(others[0])}' reads its codes, too"
        if id(_behind_cast(node.inputs[1])) not in self.keys:
            return "its scale is computed"
        if _has(node, 2) and not is_constant(node.inputs[2]):
            return "its zero point is computed"
        return ""

    def _tie(self, node: gs.Node, key: str) -> tuple[str, str] | None:
        """Return the scales whose product is that of a bias; None where it is of no layer, or of different ones."""
        pairs = {self._layer_scales(reader, node.outputs[0]) for n in _readers(node) for reader in n.outputs[0].outputs}
        pairs |= {self._layer_scales(reader, node.outputs[0]) for reader in node.outputs[0].outputs}
        scale = _behind_cast(node.inputs[1])
        alone = all(is_coder(reader, DEQUANTIZER) for reader in scale.outputs)
        only = next(iter(pairs)) if len(pairs) == 1 else None
        if only is not None and alone and self._fits(only, scale):
            return only
        if only is not None or len(pairs) > 1:
            why = "several layers read it" if len(pairs) > 1 else "it is shared, or not one per channel"
            self.found.notes.append(f"the scale of bias '{key}' is not tied to its layer's: {why}")
        return None

    def _fits(self, pair: tuple[str, str], scale: gs.Tensor) -> bool:
        """Tell whether the product of two scales can be stored as the scale of a bias."""
        sizes = [self.slots[key].read().size for key in (*pair, self.keys[id(scale)])]
        return sizes[0] == 1 and sizes[1] in (1, sizes[2])

    def _mask(self, node: gs.Node, codes: Array, zero: Array) -> Array | None:
        """Return where a weight that is marked as sparse is not zero, None where it is not marked."""
        if self.masks is not None:
            given = self.masks.get(self._code_key(node))
            return None if given is None else np.asarray(given) != 0
        made = node.outputs[0]
        for reader in made.outputs:
            ports = marks(self.model.metadata(reader))
            if any(reader.inputs[port] is made for port in ports if port < len(reader.inputs)):
                block, axis = int(node.attrs.get("block_size", 0)), int(node.attrs.get("axis", 1))
                zeros = spread(zero, codes.shape, axis if zero.ndim else None, block)
                return np.asarray(codes.astype(np.int32) != zeros)
        return None

    def _layer_scales(self, layer: gs.Node, bias: gs.Tensor) -> tuple[str, str] | None:
        form = FORMS.get(layer.op) if is_standard(layer) else None
        if form is None or form.bias is None or form.weight is None or len(layer.inputs) <= form.bias:
            return None
        if layer.inputs[form.bias] is not bias or any(layer.attrs.get(a, 1.0) != 1.0 for a in ("alpha", "beta")):
            return None
        found = []
        for index in (0, form.weight):
            maker = layer.inputs[index].inputs[0] if layer.inputs[index].inputs else None
            key = self._key_of_scale(maker) if maker is not None and is_coder(maker, DEQUANTIZER) else ""
            if not key:
                return None
            self.found._stored.setdefault(key, self.slots[key].read())
            found.append(key)
        return (found[0], found[1])


def is_coder(node: gs.Node, op: str) -> bool:
    """Tell whether a node is QuantizeLinear or DequantizeLinear, as `op` says, of ONNX or of ONNX Runtime."""
    return node.op == op and node.domain in _DOMAINS


def _behind_cast(tensor: gs.Tensor) -> gs.Tensor:
    """Return what a Cast makes a tensor of: scales are stored in 16 bits; the tensor itself where none does."""
    if len(tensor.inputs) == 1 and is_standard(tensor.inputs[0], "Cast"):
        return tensor.inputs[0].inputs[0]
    return tensor


def _takes_scale(reader: gs.Node, scale: gs.Tensor) -> bool:
    """Tell whether a node reads a tensor as a scale and as nothing else."""
    if is_standard(reader, "Cast"):
        return all(_takes_scale(n, reader.outputs[0]) for n in reader.outputs[0].outputs)
    coder = is_coder(reader, QUANTIZER) or is_coder(reader, DEQUANTIZER)
    return coder and [i for i, t in enumerate(reader.inputs) if t is scale] == [1]


def _coders_before(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """Yield the DequantizeLinear nodes whose values reach a tensor through nodes that only move them."""
    waiting, seen = [tensor], set()
    while waiting:
        node = next(iter(waiting.pop().inputs), None)
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if is_coder(node, DEQUANTIZER):
            yield node
        elif is_standard(node) and (form := CPU_FORMS.get(node.op)) is not None and form.keeps:
            waiting.append(node.inputs[0])


def _equal_zeros(one: gs.Node, other: gs.Node) -> bool:
    zeros = [scalar_of(n.inputs[2]) if _has(n, 2) else 0 for n in (one, other)]
    return zeros[0] is not None and zeros[0] == zeros[1]


def _alike(one: gs.Node, other: gs.Node) -> bool:
    """Tell whether two nodes decode in the same way."""
    return one.attrs == other.attrs and [id(t) for t in one.inputs] == [id(t) for t in other.inputs]


def _has(node: gs.Node, index: int) -> bool:
    return len(node.inputs) > index and bool(node.inputs[index].name)


def _readers(node: gs.Node) -> list[gs.Node]:
    """Return the other nodes that decode the same codes."""
    return [n for n in node.inputs[0].outputs if n is not node]
