"""What operator set upgrades ask of single nodes: one adapter for each operator whose meaning or form changed.

An adapter brings a node from the version before to its own, in place.  `NEUTRAL` lists attributes that came or
changed their default without changing what older nodes mean.  A change that is in neither table blocks the
upgrade (see opset.py).  Source: the ONNX operator changelog, and ONNX Runtime where that leaves a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.exporter import untouched

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip


class Refused(Exception):  # noqa: N818  (an answer, not an error of its own)
    """A node cannot be upgraded; the text says why."""


class Editor(Protocol):
    """What an adapter may use (implemented in opset.py)."""

    target: int

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Return the element type, None if unknown."""

    def shape(self, tensor: gs.Tensor) -> Sequence[int | str | None] | None:
        """Return the shape as far as it follows from the model's inputs, None if it does not."""

    def rank(self, tensor: gs.Tensor) -> int | None:
        """Return the number of dimensions, None if unknown."""

    def used(self, tensor: gs.Tensor) -> bool:
        """Tell whether anything reads the tensor."""

    def constant(self, base: str, values: np.ndarray[Any, Any]) -> gs.Constant:
        """Return a new constant."""

    def insert(self, node: gs.Node, op: str, inputs: Sequence[gs.Tensor], **attrs: object) -> gs.Variable:
        """Put a new node before `node` and return its output."""

    def follow(self, node: gs.Node, op: str, inputs: Sequence[gs.Tensor], **attrs: object) -> None:
        """Put a new node after `node`: it takes over output 0 and reads what `node` makes, then `inputs`."""


Adapter = Callable[[gs.Node, Editor], None]


def values_of(tensor: gs.Tensor) -> np.ndarray[Any, Any] | None:
    """Return the values of an initializer or of a Constant node's output, None for anything else."""
    if not isinstance(tensor, gs.Constant) and len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant":
        tensor = tensor.inputs[0].attrs.get("value")
    if not isinstance(tensor, gs.Constant):
        return None
    values = untouched(tensor)
    return values if isinstance(values, np.ndarray) else values.load()


def take(node: gs.Node, name: str, default: Any = None) -> Any:
    """Remove an attribute and return it; `default` if the node has none."""
    value = node.attrs.pop(name, default)
    if isinstance(value, gs.Node.AttributeRef):
        raise Refused(f"its attribute '{name}' is a parameter of the function around it")
    return value


def add_input(node: gs.Node, tensor: gs.Tensor) -> None:
    """Append an input."""
    list.append(node.inputs, tensor)
    list.append(tensor.outputs, node)


def replace_input(node: gs.Node, at: int, new: gs.Tensor) -> None:
    """Make input `at` of a node read `new`."""
    old = node.inputs[at]
    list.__setitem__(node.inputs, at, new)
    list.append(new.outputs, node)
    if all(t is not old for t in node.inputs):
        list.__setitem__(old.outputs, slice(None), [n for n in old.outputs if n is not node])


def attribute_to_input(node: gs.Node, name: str, editor: Editor, at: int = 1) -> None:
    """Make an attribute holding integers the int64 vector at input `at`; nothing where it is absent or empty."""
    value = take(node, name)
    if value is None or (isinstance(value, list) and not value):
        return
    while len(node.inputs) < at:
        add_input(node, gs.Variable.empty())
    add_input(node, editor.constant(f"{_label(node)}/{name}", np.atleast_1d(np.array(value, np.int64))))


def _label(node: gs.Node) -> str:
    return node.name or (node.outputs[0].name if node.outputs else "") or node.op


def _scalar_like(node: gs.Node, name: str, value: float, like: gs.Tensor, editor: Editor) -> gs.Tensor:
    """Return a scalar of `like`'s element type."""
    dtype, base = editor.dtype(like), f"{_label(node)}/{name}"
    if dtype is not None:
        return editor.constant(base, np.array(value, dtype))
    if editor.target < 15:
        raise Refused("the element type of its input is not known")
    return editor.insert(node, "CastLike", [editor.constant(base, np.array(value, np.float32)), like])


def _rank(tensor: gs.Tensor, editor: Editor) -> int:
    rank = editor.rank(tensor)
    if rank is None:
        raise Refused(f"the rank of '{tensor.name}' is not known")
    return rank


def _drop_outputs(node: gs.Node, editor: Editor, what: str) -> None:
    """Drop all outputs but the first, if nothing reads them."""
    if any(editor.used(t) for t in node.outputs[1:]):
        raise Refused(f"its {what} are used")
    for tensor in node.outputs[1:]:
        list.__setitem__(tensor.inputs, slice(None), [n for n in tensor.inputs if n is not node])
    list.__setitem__(node.outputs, slice(1, None), [])


# --- opsets 2 to 8 -----------------------------------------------------------------------------------------


def _concat(node: gs.Node, _: Editor) -> None:
    node.attrs.setdefault("axis", 1)


def _rename_pads(node: gs.Node, _: Editor) -> None:
    node.attrs["pads"] = take(node, "paddings")


def _reshape(node: gs.Node, editor: Editor) -> None:
    attribute_to_input(node, "shape", editor)
    node.attrs.pop("consumed_inputs", None)


def _cast(node: gs.Node, _: Editor) -> None:
    name = take(node, "to")
    node.attrs["to"] = onnx.TensorProto.DataType.Value(str(name).upper())


def _selu(node: gs.Node, _: Editor) -> None:
    node.attrs.pop("consumed_inputs", None)
    node.attrs.setdefault("alpha", 1.6732)
    node.attrs.setdefault("gamma", 1.0507)


def _align(node: gs.Node, editor: Editor) -> None:
    """`axis` said where the second operand's dimensions stand; since opset 7 they stand last."""
    wanted, axis = take(node, "broadcast", 0), take(node, "axis")
    if not wanted or axis is None:
        return
    rank = _rank(node.inputs[0], editor)
    _append_ones(node, rank - axis % rank - _rank(node.inputs[1], editor), editor)


def _append_ones(node: gs.Node, count: int, editor: Editor) -> None:
    """Give the second operand `count` more dimensions, of size one, at its end."""
    if count <= 0:
        return
    operand = node.inputs[1]
    values = values_of(operand)
    if values is not None:
        shaped = editor.constant(f"{operand.name}/aligned", values.reshape(values.shape + (1,) * count))
    else:
        rank = _rank(operand, editor)
        shaped = editor.insert(node, "Unsqueeze", [operand], axes=list(range(rank, rank + count)))
    replace_input(node, 1, shaped)


def _prelu(node: gs.Node, editor: Editor) -> None:
    slope = editor.shape(node.inputs[1])
    if _rank(node.inputs[1], editor) == 1 and (slope is None or slope[0] != 1):
        _append_ones(node, _rank(node.inputs[0], editor) - 2, editor)


def _dropped(*names: str) -> Adapter:
    def adapter(node: gs.Node, _: Editor) -> None:
        for name in names:
            node.attrs.pop(name, None)

    return adapter


def _upsample_7(node: gs.Node, _: Editor) -> None:
    node.attrs["scales"] = [1.0, 1.0, take(node, "height_scale"), take(node, "width_scale")]


# --- opsets 9 to 12 ----------------------------------------------------------------------------------------


def _batchnorm_9(node: gs.Node, _: Editor) -> None:
    if take(node, "spatial", 1) != 1:
        raise Refused("spatial=0 has no counterpart from opset 9 on")


def _upsample_9(node: gs.Node, editor: Editor) -> None:
    scales = np.array(take(node, "scales"), np.float32)
    add_input(node, editor.constant(f"{_label(node)}/scales", scales))


def _slice_10(node: gs.Node, editor: Editor) -> None:
    for at, name in enumerate(("starts", "ends", "axes"), 1):
        value = take(node, name)
        if value is not None:
            add_input(node, editor.constant(f"{_label(node)}/{name}", np.array(value, np.int64)))
        elif at < 3:
            raise Refused(f"it has no '{name}'")


def _topk_10(node: gs.Node, editor: Editor) -> None:
    attribute_to_input(node, "k", editor)


def _rename(node: gs.Node, op: str) -> None:
    """Change the operator; the doc string stays with the node."""
    held = node.__dict__.get("origin")
    if held is not None and held.proto.op_type == node.op:
        proto = onnx.NodeProto()
        proto.CopyFrom(held.proto)
        proto.op_type = op
        node.origin = type(held)(proto, held.metadata)
    node.op = op


def _upsample_10(node: gs.Node, editor: Editor) -> None:
    _rename(node, "Resize")
    if editor.target >= 11 and node.attrs.get("mode", "nearest") == "nearest":
        node.attrs["nearest_mode"] = "floor"


def _dropout_10(node: gs.Node, editor: Editor) -> None:
    _drop_outputs(node, editor, "masks")


def _clip_11(node: gs.Node, editor: Editor) -> None:
    bounds = {name: take(node, name) for name in ("min", "max")}
    for at, (name, value) in enumerate(bounds.items(), 1):
        if value is None:
            continue
        while len(node.inputs) < at:
            add_input(node, gs.Variable.empty())
        add_input(node, _scalar_like(node, name, value, node.inputs[0], editor))


def _pad_11(node: gs.Node, editor: Editor) -> None:
    value = take(node, "value", 0.0)
    add_input(node, editor.constant(f"{_label(node)}/pads", np.array(take(node, "pads"), np.int64)))
    if value != 0 and node.attrs.get("mode", "constant") == "constant":
        add_input(node, _scalar_like(node, "value", value, node.inputs[0], editor))


def _resize_11(node: gs.Node, editor: Editor) -> None:
    """Resize-10 was ONNX Runtime's: asymmetric; nearest takes the floor, going down the ceiling."""
    scales = node.inputs[1]
    if node.attrs.get("mode", "nearest") == "nearest" and "nearest_mode" not in node.attrs:
        factors = values_of(scales)
        if factors is None:
            raise Refused("its scales are computed: the rounding of opset 10 depends on them")
        if (factors < 1).any() and (factors > 1).any():
            raise Refused("it enlarges one axis and shrinks another")
        node.attrs["nearest_mode"] = "ceil" if (factors < 1).any() else "floor"
    node.attrs["coordinate_transformation_mode"] = "asymmetric"
    replace_input(node, 1, editor.constant(f"{_label(node)}/roi", np.zeros(0, np.float32)))
    add_input(node, scales)


def _scatter_11(node: gs.Node, _: Editor) -> None:
    _rename(node, "ScatterElements")


def _dropout_12(node: gs.Node, editor: Editor) -> None:
    _drop_outputs(node, editor, "masks")
    ratio = take(node, "ratio")
    if ratio is not None:
        add_input(node, editor.constant(f"{_label(node)}/ratio", np.array(ratio, np.float32)))


# --- opset 13 and later ------------------------------------------------------------------------------------


def _softmax_13(node: gs.Node, editor: Editor) -> None:
    """Softmax used to flatten its input to a matrix at `axis`; now it works along `axis` alone."""
    axis = take(node, "axis", 1)
    data = node.inputs[0]
    shape = editor.shape(data)
    if shape and all(d == 1 for d in shape[axis % len(shape) + 1 :]):
        node.attrs["axis"] = axis
        return
    sizes = editor.insert(node, "Shape", [data])
    replace_input(node, 0, editor.insert(node, "Flatten", [data], axis=axis))
    node.attrs["axis"] = -1
    editor.follow(node, "Reshape", [sizes], **({"allowzero": 1} if editor.target >= 14 else {}))


def _axes_to_input(node: gs.Node, editor: Editor) -> None:
    attribute_to_input(node, "axes", editor)


def _split_13(node: gs.Node, editor: Editor) -> None:
    attribute_to_input(node, "split", editor)


def _resize_13(node: gs.Node, _: Editor) -> None:
    """`roi` and `scales` became optional: empty ones are left out (with `sizes` there must be no scales)."""
    if node.attrs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise Refused("tf_half_pixel_for_nn does not exist from opset 13 on")
    by_sizes = len(node.inputs) > 3 and bool(node.inputs[3].name)
    for at in (1, 2):
        values = values_of(node.inputs[at]) if at < len(node.inputs) else None
        if (by_sizes and at == 2) or (values is not None and values.size == 0):
            replace_input(node, at, gs.Variable.empty())
    while node.inputs and not node.inputs[-1].name:
        list.pop(node.inputs)


def _batchnorm_14(node: gs.Node, editor: Editor) -> None:
    _drop_outputs(node, editor, "outputs for training")


def _roialign_16(node: gs.Node, _: Editor) -> None:
    node.attrs.setdefault("coordinate_transformation_mode", "output_half_pixel")


def _split_18(node: gs.Node, _: Editor) -> None:
    if len(node.inputs) < 2 or not node.inputs[1].name:
        node.attrs["num_outputs"] = len(node.outputs)


def _dft_20(node: gs.Node, editor: Editor) -> None:
    axis = np.array(take(node, "axis", 1), np.int64)
    while len(node.inputs) < 2:
        add_input(node, gs.Variable.empty())
    add_input(node, editor.constant(f"{_label(node)}/axis", axis))


def _gridsample_20(node: gs.Node, _: Editor) -> None:
    names = {"bilinear": "linear", "bicubic": "cubic"}
    if "mode" in node.attrs:
        mode = take(node, "mode")
        node.attrs["mode"] = names.get(mode, mode)


def _groupnorm_21(node: gs.Node, editor: Editor) -> None:
    """Scale and bias were per group; now they are per channel."""
    shape = editor.shape(node.inputs[0])
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    groups = node.attrs.get("num_groups")
    if not isinstance(channels, int) or not isinstance(groups, int):
        raise Refused("its number of channels is not known")
    for at in (1, 2):
        narrow, repeats = node.inputs[at], channels // groups
        base = f"{narrow.name}/per_channel"
        values = values_of(narrow)
        if values is not None:
            wide: gs.Tensor = editor.constant(base, np.repeat(values, repeats))
        else:
            column = editor.insert(node, "Unsqueeze", [narrow, editor.constant(base, np.array([1]))])
            table = editor.insert(node, "Tile", [column, editor.constant(base, np.array([1, repeats]))])
            wide = editor.insert(node, "Reshape", [table, editor.constant(base, np.array([-1]))])
        replace_input(node, at, wide)


_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")

ADAPTERS: Mapping[tuple[str, int], Adapter] = {
    ("Pad", 2): _rename_pads,
    ("Concat", 4): _concat,
    ("Reshape", 5): _reshape,
    ("Cast", 6): _cast,
    ("Selu", 6): _selu,
    **{(op, 7): _align for op in _BROADCASTING},
    ("PRelu", 7): _prelu,
    ("Gemm", 7): _dropped("broadcast"),
    ("BatchNormalization", 7): _dropped("is_test"),
    ("Dropout", 7): _dropped("is_test"),
    **{(op, 7): _dropped("output_sequence") for op in ("RNN", "GRU", "LSTM")},
    ("Upsample", 7): _upsample_7,
    ("BatchNormalization", 9): _batchnorm_9,
    ("Upsample", 9): _upsample_9,
    ("Slice", 10): _slice_10,
    ("TopK", 10): _topk_10,
    ("Upsample", 10): _upsample_10,
    ("Dropout", 10): _dropout_10,
    ("Clip", 11): _clip_11,
    ("Pad", 11): _pad_11,
    ("Resize", 11): _resize_11,
    ("Scatter", 11): _scatter_11,
    ("Dropout", 12): _dropout_12,
    **{(op, 13): _softmax_13 for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{(op, 13): _axes_to_input for op in ("Squeeze", "Unsqueeze", "ReduceSum")},
    ("Split", 13): _split_13,
    ("Resize", 13): _resize_13,
    ("BatchNormalization", 14): _batchnorm_14,
    ("RoiAlign", 16): _roialign_16,
    **{(op, 18): _axes_to_input for op in REDUCTIONS},
    ("Split", 18): _split_18,
    ("DFT", 20): _dft_20,
    ("GridSample", 20): _gridsample_20,
    ("GroupNormalization", 21): _groupnorm_21,
}
"""(operator, the version it came with) -> what brings an older node there."""

REFUSED: Mapping[tuple[str, int], str] = {
    ("Scan", 9): "opset 8's Scan works on batches, which no later one does",
    ("Split", 2): "opset 1's Split has no default axis",
    ("Tile", 6): "opset 1's Tile repeats one axis",
    ("LpPool", 2): "its norm was not an integer in opset 1",
    ("GlobalLpPool", 2): "its norm was not an integer in opset 1",
    ("Attention", 24): "its masks changed",
}
"""(operator, version) -> why no older node of that kind is upgraded."""

UNCHANGED_EXPERIMENTS = frozenset({"ThresholdedRelu"})
"""Experimental operators of the first opsets that became regular ones as they were."""

NEUTRAL: Mapping[str, frozenset[str]] = {
    op: frozenset(names.split())
    for op, names in {
        "ArgMax": "select_last_index", "ArgMin": "select_last_index", "Attention": "left_window_size right_window_size",
        "AveragePool": "count_include_pad ceil_mode dilations", "BatchNormalization": "training_mode",
        "Cast": "saturate round_mode", "CastLike": "saturate round_mode", "Clip": "min max",
        "Constant": "sparse_value value_strings value_string value_floats value_float value_ints value_int",
        "DepthToSpace": "mode", "DequantizeLinear": "axis block_size output_dtype", "Dropout": "seed",
        "GRU": "direction linear_before_reset layout", "GatherND": "batch_dims", "GridSample": "mode",
        "GroupNormalization": "stash_type", "LSTM": "layout", "LpPool": "ceil_mode dilations",
        "MaxPool": "storage_order dilations ceil_mode",
        "QuantizeLinear": "axis saturate output_dtype block_size precision", "RNN": "layout", "Reshape": "allowzero",
        "Resize": "keep_aspect_ratio_policy axes antialias", "ScatterElements": "reduction", "ScatterND": "reduction",
        "Shape": "start end", "TopK": "largest sorted",
    }.items()
}  # fmt: skip
"""Operator -> attributes that came, or changed their default, without changing what a node lacking them means."""
