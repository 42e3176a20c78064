"""An ONNX graph that can be trained: a torch module of it, what its constants are for, and the way back.

    bridge = TrainableGraph("model.onnx", taps=["features"])
    outputs = bridge.module({"x": images})          # a dict of tensors, by ONNX name
    bridge.write_back().save("trained.onnx")        # the same graph with the trained weights

Any loop, optimizer, `torch.compile` or data parallel wrapper may train the module: it is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import nn

from graphopt.bridge.builder import Builder, Form, free_name, identifier
from graphopt.bridge.host import known_to_torch, to_numpy, to_torch
from graphopt.bridge.module import GraphModule
from graphopt.bridge.quantized import find_quantized
from graphopt.bridge.roles import FIXED, LEARNED, SCALAR, STATISTICS, Role, channel_axis, reached, role_of, uses
from graphopt.errors import DataError, ModelError, SpecError, did_you_mean
from graphopt.importer import origin
from graphopt.model import Model, Source, load
from graphopt.names import fits, matches
from graphopt.slots import Array, Slot, slots_of
from graphopt.sparse_marks import marks
from graphopt.tensors import is_float
from graphopt.training import BATCH_NORMS


class TrainableGraph:
    """A model as a torch module, with the names of its initializers kept.

    Attributes:
        model: the model; it is never changed.
        module: called with feeds by name (arrays or tensors) or tensors in the order of the inputs; returns a dict of
            outputs, then taps, by ONNX name.
        parameters: what is trained, by name of the initializer or of a Constant node's output; float32 masters of
            half precision.
        roles: what each float tensor is for (`roles.py`), by name.
        batch: the batch size that the graph prescribes, None where it is free.

    Args:
        model: a path, proto or Model.
        taps: inner tensors of the main graph that come out too.
        masks: name of an initializer -> array of its shape: where it is zero, the weight stays zero.  None: those of
            weights that were made sparse (their metadata say so) or are stored in sparse form.
        only: globs of initializers that are trained; empty: all.  A full name also makes a single number trained.
        freeze: globs of initializers that are not.
        learn_scales: whether scales of quantized tensors are trained.
        batch_norm: `frozen`, or `train`: running statistics follow the batches (those that several layers share stay).

    Raises:
        ModelError: an operator that cannot be trained (names node and what helps), an unknown tap.
        DataError: a mask that fits no initializer.
        SpecError: a glob that fits nothing.
    """

    def __init__(
        self, model: Source, *, taps: Sequence[str] = (), masks: Mapping[str, Array] | None = None,
        only: Sequence[str] = (), freeze: Sequence[str] = (), learn_scales: bool = False, batch_norm: str = "frozen",
    ) -> None:  # fmt: skip
        self.model = model if isinstance(model, Model) else load(model)
        self.learn_scales = learn_scales
        if batch_norm not in BATCH_NORMS:
            raise SpecError(
                f"unknown batch norm '{batch_norm}'", at="batch_norm", hint=f"one of: {', '.join(BATCH_NORMS)}"
            )
        self.learn_statistics = batch_norm == "train"
        self._slots = slots_of(self.model)
        live = reached(self.model)
        held = {key: role_of(slot, live) for key, slot in self._slots.items()}
        self.roles: dict[str, Role] = {key: role for key, role in held.items() if is_float(self._slots[key].dtype)}
        self.quantized = find_quantized(self.model, self._slots, masks)
        self.roles.update((key, coded.role) for key, coded in self.quantized.coded.items())
        _check_globs([*only, *freeze], self.roles)
        self._trained = {
            key for key, role in self.roles.items()
            if (role in LEARNED or (key in only and role in (SCALAR, FIXED))) and matches(key, only, freeze)
        }  # fmt: skip
        of_codes = [*self.quantized.coded, *(self.quantized.leaders if learn_scales else ())]
        self._trained |= {key for key in of_codes if matches(key, only, freeze)}
        self.masks = _masks(self.model, self._slots) if masks is None else _checked(masks, self._slots)
        self._names: dict[str, str] = {}
        self.module = self._build(taps)
        held_by = dict(self.module.net.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {
            key: held_by[self._names[key]] for key in self._slots if self._names.get(key) in held_by
        }
        self.batch = _batch(self.model)

    def _build(self, taps: Sequence[str]) -> GraphModule:
        root = nn.Module()
        forms: dict[str, Form] = {}
        for key, slot in self._slots.items():
            self._register(root, key, slot, forms)
        forms.update(self.quantized.forms(root, self._names, self._trained))
        leaves = {id(slot.tensor): self._names[key] for key, slot in self._slots.items() if key in self._names}
        statistics = [id(self._slots[key].tensor) for key in self._running()]
        builder = Builder(self.model, leaves, root, forms=forms, learn=self.learn_statistics, statistics=statistics)
        tapped = [_tensor(self.model, name) for name in taps]
        net = builder.run(tapped)
        names = [spec.name for spec in self.model.outputs] + list(taps)
        return GraphModule(net, self.model.inputs, names)

    def _register(self, root: nn.Module, key: str, slot: Slot, forms: dict[str, Form]) -> None:
        """Put a constant on the root: as a parameter, or as a buffer."""
        start = self.quantized.start(key) if key in self._trained else None
        if not known_to_torch(slot.dtype):
            return  # the builder refuses a node that reads it
        name = self._names[key] = free_name(root, identifier(key))
        tensor = to_torch(slot.read() if start is None else start)
        if key not in self._trained:
            root.register_buffer(name, tensor)
            return
        mask = self.masks.get(key)
        if mask is not None:
            tensor = tensor * to_torch(mask != 0)
            held = free_name(root, f"{name}__mask")
            root.register_buffer(held, to_torch((mask != 0).astype(np.float32)), persistent=False)
            forms[name] = Form(torch.mul, (name, held))
        root.register_parameter(name, nn.Parameter(tensor))

    def channel_axis(self, name: str) -> int:
        """Return the axis of a weight that its output channels lie along (0 where nothing tells)."""
        return channel_axis(self._slots[name])

    def values(self) -> dict[str, Array]:
        """Return what `write_back` writes: name -> array of the initializer's dtype and shape."""
        by_codes = self.coded
        found = {key: self._value(key, held) for key, held in self.parameters.items() if key not in by_codes}
        found.update(self.quantized.values(self.parameters))
        found.update((key, self._value(key, held)) for key, held in self.statistics.items())
        return found

    @property
    def coded(self) -> dict[str, float]:
        """Parameters that stand for codes or their scales, by name -> what one code is, in their units."""
        return self.quantized.steps()

    @property
    def statistics(self) -> dict[str, Any]:
        """Buffers that follow the batches, by name: running means and variances, where those are trained."""
        buffers = dict(self.module.net.named_buffers()) if self.learn_statistics else {}
        return {key: buffers[self._names[key]] for key in self._running() if self._names.get(key) in buffers}

    def _running(self) -> list[str]:
        """Return the statistics that one node alone reads: exporters store equal tensors once, and tie layers by it."""
        held = (key for key, role in self.roles.items() if role == STATISTICS)
        return [key for key in held if len(list(uses(self._slots[key].tensor))) == 1]

    def _value(self, key: str, tensor: Any) -> Array:
        slot = self._slots[key]
        array = _rounded(to_numpy(tensor), slot.dtype)
        mask = self.masks.get(key)
        return array if mask is None else np.where(mask != 0, array, array.dtype.type(0))

    def write_back(self, into: Model | None = None) -> Model:
        """Return a copy of the model with the trained values; nothing else in it changes.

        Args:
            into: another model that holds initializers of these names, types and shapes.

        Raises:
            ModelError: `into` lacks one.
        """
        out = (into or self.model).copy()
        slots = slots_of(out)
        for key, array in self.values().items():
            slot = slots.get(key)
            if slot is None or slot.shape != array.shape or slot.dtype != array.dtype:
                raise ModelError(
                    f"the model has no initializer '{key}' of type {array.dtype} and shape {list(array.shape)}",
                    hint="write back into the model that was trained",
                )
            slot.write(array)
        return out


def _rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array in another type, without values that become infinite on the way."""
    if dtype.itemsize >= array.dtype.itemsize or not is_float(dtype):
        return array.astype(dtype)
    import ml_dtypes  # noqa: PLC0415

    limit = float(ml_dtypes.finfo(dtype).max)
    return np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(dtype)


def _check_globs(globs: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for glob in globs:
        if not any(fits(name, [glob]) for name in names):
            raise SpecError(f"no initializer is called '{glob}'", hint=did_you_mean(glob, names))


def _masks(model: Model, slots: Mapping[str, Slot]) -> dict[str, Array]:
    """Return the masks of weights that are sparse on purpose."""
    marked: set[int] = set()
    for node in model.nodes():
        held = origin(node)
        for port in marks(held.metadata) if held is not None else ():
            if port < len(node.inputs):
                marked.add(id(node.inputs[port]))
    chosen = [key for key, slot in slots.items() if id(slot.tensor) in marked or slot.sparse]
    return {key: slots[key].read() != 0 for key in chosen if is_float(slots[key].dtype)}


def _checked(masks: Mapping[str, Array], slots: Mapping[str, Slot]) -> dict[str, Array]:
    for name, mask in masks.items():
        if name not in slots:
            hint = did_you_mean(name, slots)
            raise DataError(f"a mask is for '{name}', which is no initializer of the model", hint=hint)
        if tuple(np.shape(mask)) != slots[name].shape:
            shapes = f"{list(np.shape(mask))}, not {list(slots[name].shape)}"
            raise DataError(f"the mask of '{name}' has shape {shapes}", hint="a mask has the shape of its weight")
    return {name: np.asarray(mask) for name, mask in masks.items()}


def _tensor(model: Model, name: str) -> gs.Tensor:
    """Return a tensor of the main graph by its name."""
    graph = model.graph
    named = {t.name: t for n in graph.nodes for t in (*n.inputs, *n.outputs) if t.name}
    named.update((t.name, t) for t in (*graph.inputs, *graph.outputs))
    if name not in named:
        raise ModelError(
            f"the main graph has no tensor '{name}' to tap", hint=did_you_mean(name, named) or "graphopt inspect"
        )
    return named[name]


def _batch(model: Model) -> int | None:
    """Return the size of the first axis that all inputs with axes state."""
    sizes = {spec.shape[0] for spec in model.inputs if spec.shape}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None
