"""The module that users see: feeds by name, or tensors in the order of the inputs -> outputs and taps by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphopt.bridge.host import to_torch, torch_kind
from graphopt.errors import DataError, GraphoptError, ModelError, did_you_mean
from graphopt.model import ValueSpec


class GraphModule(nn.Module):
    """An ONNX graph as a torch module.

    Called with a dict of arrays or tensors by input name, or with tensors in the order of the inputs.  Half precision
    is fed and computed as float32.  Parameters and buffers are those of `net`, under names that Python accepts.

    Args:
        net: the graph: takes tensors by position, gives a tuple.
        inputs: what it is fed with, in order.
        names: of its outputs, in order.
    """

    def __init__(self, net: fx.GraphModule, inputs: Sequence[ValueSpec], names: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.inputs = tuple(spec.name for spec in inputs)
        self.kinds = tuple(map(_kind_of, inputs))
        self.names = tuple(names)

    def forward(self, *feeds: Any, **named: Any) -> dict[str, Tensor]:
        """Return outputs, then taps, by ONNX name.

        Raises:
            DataError: an input is missing, unknown or no tensor.
            ModelError: an operator fails on these feeds; names the node.
        """
        tensors = self._tensors(feeds, named)
        if torch.compiler.is_compiling():
            return dict(zip(self.names, self.net(*tensors), strict=True))
        try:
            made = self.net(*tensors)
        except GraphoptError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            raise _located(self.net, tensors, error) from error
        return dict(zip(self.names, made, strict=True))

    def _tensors(self, feeds: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
        if len(feeds) == 1 and isinstance(feeds[0], Mapping):
            named = {**feeds[0], **named}
        elif feeds:
            named = {**dict(zip(self.inputs, feeds, strict=False)), **named}
            if len(feeds) > len(self.inputs):
                raise DataError(f"the model has {len(self.inputs)} inputs, not {len(feeds)}")
        for name in named:
            if name not in self.inputs:
                raise DataError(
                    f"the model has no input '{name}'",
                    hint=did_you_mean(name, self.inputs) or f"its inputs: {', '.join(self.inputs)}",
                )
        held = next(self.parameters(), None)
        device = None if held is None else held.device
        return [_fed(name, kind, named).to(device) for name, kind in zip(self.inputs, self.kinds, strict=True)]


def _kind_of(spec: ValueSpec) -> Any:
    """Return torch's dtype of an input, None where the model states none."""
    try:
        return None if spec.dtype is None else torch_kind(spec.dtype)
    except ModelError as error:
        error.at = f"input '{spec.name}'"
        raise


def _fed(name: str, kind: Any, named: Mapping[str, Any]) -> Tensor:
    if name not in named:
        raise DataError(
            f"input '{name}' is not fed", hint=f"feeds are by name; there are: {', '.join(named) or 'none'}"
        )
    value = named[name]
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind in "OSU":
            raise DataError(f"input '{name}' is fed with {array.dtype}", hint="training takes numbers")
        value = to_torch(array)
    if kind is None or value.dtype == kind:
        return value
    if value.is_floating_point() != kind.is_floating_point:
        raise DataError(f"input '{name}' is of type {kind}, not {value.dtype}".replace("torch.", ""))
    return value.to(kind)


def _located(net: fx.GraphModule, tensors: Sequence[Tensor], error: Exception) -> Exception:
    """Return an error that names the node that fails on these feeds; the error itself where none does."""
    watch = _Watched(net)
    try:
        with torch.no_grad():
            watch.run(*tensors)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        text = str(error).strip().splitlines()
        said = text[0] if text else type(error).__name__
        return ModelError(f"torch cannot compute the graph on these feeds: {said}", at=watch.place)
    return error


class _Watched(fx.Interpreter):
    """Runs a graph node by node, and knows where it is."""

    place: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.place = n.meta.get("onnx", self.place)
        return super().run_node(n)
