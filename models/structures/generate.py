"""Write the structure-only models beside this file: every network of the catalogue, by both of torch's exporters.

    python -m graphopt.models.structures.generate [NAME ...]

Needs torch and onnxscript.  A structure is an exported model whose float initializers above `KEPT` elements hold no
values: only name, type, shape, and in `doc_string` the interval they were spread over (`__init__.py` fills them).  What
exporters write for people (stack traces, stated shapes, names of all but layers) is left out.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from .catalogue import NETWORKS, Network, initialised
from .spec import Input

FOLDER = Path(__file__).parent
KEPT = 16
"""Elements of a float initializer that keeps its values."""

FEW = 2
"""Different values of an initializer that keeps them whatever its size (masks)."""

OPSET = 17  # of the TorchScript exporter; dynamo's takes its own default


def exported(network: Network, exporter: str) -> onnx.ModelProto:
    """Return the network's model as torch's exporter of that name writes it."""
    torch.manual_seed(0)
    module = network.build().eval() if network.merged else initialised(network.build())
    names = list(network.inputs)
    arguments = tuple(_example(spec) for spec in network.inputs.values())
    target = io.BytesIO()
    options: dict[str, Any] = {"input_names": names}
    if exporter == "torchscript":
        axes = {name: {axis: _size_name(spec, axis) for axis in spec.dynamic} for name, spec in network.inputs.items()}
        options |= {"dynamic_axes": axes, "opset_version": OPSET, "do_constant_folding": True, "dynamo": False}
        if not network.merged:
            options["training"] = torch.onnx.TrainingMode.PRESERVE  # BatchNorm stays a node
        torch.onnx.export(module, arguments, target, **options)
    else:
        dynamic = torch.export.Dim.DYNAMIC
        shapes = tuple(dict.fromkeys(spec.dynamic, dynamic) for spec in network.inputs.values())
        program = torch.onnx.export(module, arguments, dynamic_shapes=shapes, dynamo=True, verbose=False, **options)
        assert program is not None
        program.save(target)
    return onnx.load_from_string(target.getvalue())


def _size_name(spec: Input, axis: int) -> str:
    """Return a name that axes of the same sizes share."""
    return f"size{spec.shape[axis]}_{spec.second[axis]}"


def _example(spec: Input) -> torch.Tensor:
    return torch.randint(1, spec.high, spec.shape) if spec.high else torch.randn(spec.shape)


def stripped(model: onnx.ModelProto, inputs: Mapping[str, Input], norm: str) -> onnx.ModelProto:
    """Return the model without weights, and with what it takes written into its metadata."""
    graph = model.graph
    for tensor in [*graph.initializer, *_constants(graph)]:
        _strip(tensor)
    _silence(graph)
    _shorten(graph)
    for function in model.functions:
        _silence(function)
    del model.metadata_props[:]
    feeds = {name: {"shapes": [spec.shape, spec.second], "high": spec.high} for name, spec in inputs.items()}
    model.metadata_props.add(key="feeds", value=json.dumps(feeds))
    model.metadata_props.add(key="norm", value=norm)
    return model


def _constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    values = [a for node in graph.node if node.op_type == "Constant" for a in node.attribute]
    return [a.t for a in values if a.name == "value"]


def _strip(tensor: onnx.TensorProto) -> None:
    values = numpy_helper.to_array(tensor)
    if values.dtype not in (np.float32, np.int8) or values.size <= KEPT or np.unique(values).size <= FEW:
        return
    low, high = float(values.min()), float(values.max())
    if low <= 0:
        middle, spread = float(values.mean()), 3.0**0.5 * float(values.std())
        low, high = middle - spread, middle + spread
    kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.doc_string = f"{low:.3g} {high:.3g}"
    tensor.CopyFrom(kept)


def _silence(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    del graph.value_info[:]
    del graph.metadata_props[:]
    graph.doc_string = ""
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _silence(attribute.g)
    if isinstance(graph, onnx.GraphProto):
        for value in [*graph.input, *graph.output, *graph.initializer]:
            del value.metadata_props[:]


def _shorten(graph: onnx.GraphProto) -> None:
    """Number the tensors that nodes of the main graph make, but for outputs; only layers keep their names."""
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if not weights.intersection(node.input):
            node.name = ""
    outputs = {value.name for value in graph.output}
    made = (name for node in graph.node for name in node.output if name and name not in outputs)
    _rename(graph, {name: f"t{index}" for index, name in enumerate(made)})


def _rename(graph: onnx.GraphProto, short: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, short)


def write(name: str, model: onnx.ModelProto) -> None:
    """Write a stripped model, and say how large it is."""
    path = FOLDER / f"{name}.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{name:28} {len(model.graph.node):5} nodes {path.stat().st_size:7} bytes", flush=True)


def main(wanted: list[str]) -> None:
    """Write the models of these names, or all."""
    warnings.simplefilter("ignore")  # the exporters warn about themselves
    torch.backends.mha.set_fastpath_enabled(False)  # its operators cannot be exported
    for name, network in NETWORKS.items():
        for exporter in network.exporters:
            if not wanted or name in wanted:
                write(f"{name}-{exporter}", stripped(exported(network, exporter), network.inputs, network.norm))


if __name__ == "__main__":
    main(sys.argv[1:])
