"""What of a model is quantized: which constants are codes, which scales they have, to which layers biases belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant, scalar_of
from graphopt.analysis.integer_layers import FORMS
from graphopt.bridge.coded import BIAS, Array, Coded, Quantized
from graphopt.codes import spread
from graphopt.edit import label
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.slots import Slot
from graphopt.sparse_marks import marks
from graphopt.targets import CPU_FORMS

QUANTIZER = "QuantizeLinear"
DEQUANTIZER = "DequantizeLinear"
_DOMAINS = frozenset({None, "", "ai.onnx", "com.microsoft"})


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
        biases = [n for n in weights if self.slots[self._code_key(n)].dtype == BIAS]
        tied = {id(n) for n in biases}
        for node in (*quantizers, *(n for n in dequantizers if id(n) not in tied)):
            self._scale(node)
        for node in quantizers:
            self._join(node)
        for node in weights:
            self._codes(node)
        for node in nodes:
            self._unfolded(node)
        return self.found

    def _unfolded(self, node: gs.Node) -> None:
        """Note a BatchNormalization that could be a part of the quantized layer before it."""
        if not is_standard(node, "BatchNormalization"):
            return
        layer = _maker(node.inputs[0])
        while layer is not None and (is_coder(layer, QUANTIZER) or is_coder(layer, DEQUANTIZER)):
            layer = _maker(layer.inputs[0])
        form = FORMS.get(layer.op) if layer is not None and is_standard(layer) else None
        if layer is None or form is None or form.weight is None:
            return
        maker = _maker(layer.inputs[form.weight])
        if maker is not None and is_coder(maker, DEQUANTIZER):
            self.found.notes.append(
                f"'{label(node)}' computes on floats behind the quantized layer '{label(layer)}': quantize the model"
                " that `graphopt optimize --stage canonical` makes, where it is folded"
            )

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
        self.found.stored[key] = values

    def _join(self, quantizer: gs.Node) -> None:
        """Let scales that are equal on both sides of what only moves values, or of Q and DQ, stay equal."""
        key = self._key_of_scale(quantizer)
        readers = quantizer.outputs[0].outputs
        for other in (*_coders_before(quantizer.inputs[0]), *(n for n in readers if is_coder(n, DEQUANTIZER))):
            same = self._key_of_scale(other)
            scales = self.found.scales
            if key not in scales or same not in scales or scales[key] == scales[same]:
                continue
            if np.array_equal(self.found.stored[key], self.found.stored[same]) and _equal_zeros(quantizer, other):
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
        self.found.stored.setdefault(self.keys[id(source)], scale)
        scale = np.asarray(scale.reshape(()) if scale.size == 1 and not node.attrs.get("block_size") else scale)
        zero = array_of(node.inputs[2]) if _has(node, 2) else None
        zeros = np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.int32).reshape(scale.shape)
        tied = self._tie(node, key) if slot.dtype == BIAS else None
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
            self.found.stored.setdefault(key, self.slots[key].read())
            found.append(key)
        return (found[0], found[1])


def is_coder(node: gs.Node, op: str) -> bool:
    """Tell whether a node is QuantizeLinear or DequantizeLinear, as `op` says, of ONNX or of ONNX Runtime."""
    return node.op == op and node.domain in _DOMAINS


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that makes a tensor, None where none does."""
    return tensor.inputs[0] if tensor.inputs else None


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
