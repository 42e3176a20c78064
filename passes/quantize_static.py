"""Static quantization in QDQ form: ranges from samples, codes where the target has integer kernels.

    y = op(x, W, b)   ->   y = DQ(Q(op(DQ(Q(x)), DQ(W_q), DQ(b_q))))

x, y: one affine code each (uint8), shared along what only moves values.  W_q: int8, zero point 0, a scale per output
channel.  b_q: int32 with scale = scale of x times scale of W, which is what integer kernels take it for.  Relu and Clip
right behind an integer kernel go: the code of what they return begins and ends where they cut.

Sources: ONNX operators QuantizeLinear and DequantizeLinear; Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", 2018; where ONNX Runtime wants codes: `graphopt/targets.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant, scalar_of
from graphopt.analysis.placement import Coded, Layer, Placement, inner_layers, layers, output_axis, place
from graphopt.base import Change, Context, Pass
from graphopt.codes import Affine, WeightMethod, activation_code, weight_code
from graphopt.edit import Edit, is_output, label, make_node, replace_output
from graphopt.errors import DataError
from graphopt.exact_codes import exact_activation, exact_weight, phase_of, weight_phase
from graphopt.names import left_out
from graphopt.ops import is_standard
from graphopt.registry import register
from graphopt.targets import ACTIVATION, CPU_FORMS, INTEGER_FORMS, QUANTIZED_UNASKED

if TYPE_CHECKING:
    from graphopt.calibrate import Calibration
    from graphopt.ranges import Range

Array = np.ndarray[Any, Any]

LEAST_OPSET = 13
"""DequantizeLinear has a scale per channel from here on."""

HARD_SWISH_HALF = 3.0
"""Where HardSwish begins and ends to be linear, on either side of 0."""

OUTLIERS = 1000.0
"""How many times as wide as what nearly all values take a range may be: masks are added as -1e9 and the like."""

LEAST_STEPS = 8
"""A scale is made larger by at most one part in so many, to make a length a whole number of steps."""

LARGEST_BIAS = float(2**30)
"""An int32 bias beyond this leaves no room for the products that are added to it."""


@register
@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Let Conv, MatMul and Gemm compute on 8-bit integers, with ranges from the samples.

    Lossy, keeps the signature; inputs and outputs stay float.  Works on the main graph of a canonical model.  Layers
    that are quantized already, compute on other types than float32, or have computed weights stay as they are.

    Options:
        only, skip: globs of layer names; what `only` does not name, or `skip` does, stays float.
        ranges: method of `graphopt.ranges` for activations.
        weights: `absmax`, or `mse` for the scale with the least squared error of the weight.
        exact: scales with which integer and float arithmetic give the same codes (`graphopt.exact_codes`); ranges get
            up to twice as wide, so train afterwards.
    """

    name: ClassVar[str] = "quantize-static"
    exactness: ClassVar[Any] = "lossy"
    scope: ClassVar[Any] = "model"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    ranges: str = "min-max"
    weights: WeightMethod = "absmax"
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `weights` is something else.
        """
        if self.weights not in get_args(WeightMethod):
            raise ValueError(f"weights is one of {', '.join(get_args(WeightMethod))}, not {self.weights!r}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change for all layers together: their codes depend on each other."""
        provider = ctx.target.provider
        found = layers(graph, ctx.shapes, provider)
        if provider not in INTEGER_FORMS:
            yield Change("the model", "int8", f"the {provider} provider has no integer kernels for convolutions")
            return
        if ctx.model.opset < LEAST_OPSET:
            why = f"opset {ctx.model.opset} has no scales per channel: upgrade-opset{{to={LEAST_OPSET}}} before"
            yield Change("the model", "int8", why)
            return
        chosen = []
        for layer in found:
            why = layer.why_not or self._left_out(layer)
            if why:
                yield Change(layer.label, f"{layer.node.op} in int8", why)
            else:
                chosen.append(layer.node)
        for node in inner_layers(graph, provider):
            yield Change(label(node), f"{node.op} in int8", "it stands in a subgraph")
        yield from self._changes(graph, ctx, chosen)

    def _left_out(self, layer: Layer) -> str:
        return left_out(layer.label, self.only, self.skip)

    def _changes(self, graph: gs.Graph, ctx: Context, chosen: list[gs.Node]) -> Iterator[Change]:
        """Propose the change; layers at tensors that no code suits stay float."""
        unfit: dict[str, str] = {}
        while chosen:
            placement = place(graph, chosen, ctx.shapes, ctx.target.provider, ctx.model.opset, frozenset(unfit))
            names = [coded.tensor.name for coded in placement.coded.values()]
            calibration = ctx.calibration(names)
            more = {name: why for name in names if (why := _unfit(calibration, name, self.ranges))}
            if not more:
                yield self._change(graph, ctx, chosen, placement, calibration)
                return
            unfit.update(more)
            kept = []
            for node in chosen:
                ends = [t.name for t in (*node.inputs[:2], *node.outputs, *_folded(placement, node)) if t.name in unfit]
                if ends:
                    yield Change(label(node), f"{node.op} in int8", f"'{ends[0]}' {unfit[ends[0]]}")
                else:
                    kept.append(node)
            chosen = kept

    def _change(
        self, graph: gs.Graph, ctx: Context, chosen: list[gs.Node], placement: Placement, calibration: Calibration
    ) -> Change:
        codes = {number: self._code(calibration, members, ctx) for number, members in placement.groups.items()}
        phases: dict[int, float] = {}
        if self.exact:
            bounded = {n: any(_is_cut(placement, m) for m in members) for n, members in placement.groups.items()}
            for part in _together(placement):
                phases |= dict.fromkeys(part, phase_of((codes[n], bounded[n]) for n in part))
            codes = {n: exact_activation(code, phases[n], bounded=bounded[n]) for n, code in codes.items()}
        writer = _Writer(graph, ctx, placement, self.weights, phases)
        writer.codes.update(codes)
        what = f"{len(chosen)} layers and {len(placement.integer) - len(chosen)} operators between them in int8"
        return Change("the model", what, f"{ctx.target.provider} has integer kernels for them", writer.write)

    def _code(self, calibration: Calibration, members: list[Coded], ctx: Context) -> Affine:
        """Return the code of tensors that share one."""
        found: list[Range] = []
        for coded in members:
            problem = calibration.problems(coded.tensor.name)
            if problem:
                ctx.notes.append(f"tensor '{coded.tensor.name}': {problem}")
            found.append(calibration.range(coded.tensor.name, self.ranges))
        code = activation_code(min(r.low for r in found), max(r.high for r in found), ACTIVATION)
        return _whole(code, members[0].tensor) if len(members) == 1 and not self.exact else code


class _Writer:
    """Writes codes into a graph."""

    def __init__(
        self, graph: gs.Graph, ctx: Context, placement: Placement, weights: WeightMethod, phases: Mapping[int, float]
    ) -> None:
        self.graph, self.ctx, self.placement, self.weights = graph, ctx, placement, weights
        self.exact = bool(phases)
        made = {id(node): placement.coded.get(id(placement.output(node))) for node in placement.integer}
        self.phase_of = {node: phases.get(coded.group, 1.0) for node, coded in made.items() if coded is not None}
        self.codes: dict[int, Affine] = {}
        self._scales: dict[int, tuple[gs.Constant, gs.Constant]] = {}
        self._scale_of: dict[int, gs.Constant] = {}
        self._by_channel: dict[int, gs.Tensor] = {}
        self._integer = {id(n) for n in placement.integer}
        self._constants: dict[tuple[int, int], gs.Tensor] = {}

    def write(self) -> None:
        with Edit(self.graph) as edit:
            for coded in self.placement.coded.values():
                self._activation(edit, coded)
            for node in self.placement.integer:
                self._operands(edit, node)

    def _activation(self, edit: Edit, coded: Coded) -> None:
        """Put Q and DQ behind a tensor."""
        tensor = coded.tensor
        producer: Any = tensor.inputs[0] if tensor.inputs else None
        source = tensor
        if coded.replaced and self.placement.is_folded(producer):
            source = producer.inputs[0]
            edit.remove(producer)
        name = tensor.name
        made = gs.Variable(self.ctx.fresh_name(f"{name}_dequantized"), np.float32, tensor.shape)
        if coded.replaced and is_output(self.graph, tensor):
            source = self._renamed(edit, tensor, source)
            made = tensor
        scale, zero = self._code_of(coded.group)
        code = gs.Variable(self.ctx.fresh_name(f"{name}_quantized"), ACTIVATION.type, tensor.shape)
        readers = edit.consumers(tensor) if coded.replaced else coded.readers
        quantize = make_node("QuantizeLinear", [source, scale, zero], [code], name=self.ctx.fresh_name(f"{name}_Q"))
        dequantize = make_node("DequantizeLinear", [code, scale, zero], [made], name=self.ctx.fresh_name(f"{name}_DQ"))
        edit.insert_after(producer, [quantize, dequantize])
        for reader in readers:
            if edit.removed(reader):
                continue
            if coded.replaced and (channels := self._guarded(reader, tensor)):
                _read(edit, reader, tensor, self._per_channel(edit, quantize, coded.group, channels))
            elif made is not tensor:
                _read(edit, reader, tensor, made)
        self._scale_of[id(made)] = scale

    def _guarded(self, reader: gs.Node, tensor: gs.Tensor) -> int:
        """Return the channels of a float layer's input where ORT would quantize the layer by itself, else 0."""
        axis = QUANTIZED_UNASKED.get(reader.op) if is_standard(reader) else None
        if axis is None or id(reader) in self._integer or reader.inputs[0] is not tensor:
            return 0
        weight = reader.inputs[1]
        if not isinstance(weight, gs.Constant):
            return 0
        if reader.op == "Gemm":
            return int(weight.shape[1 if reader.attrs.get("transB", 0) else 0])
        return int(weight.shape[axis]) * (int(reader.attrs.get("group", 1)) if reader.op == "Conv" else 1)

    def _per_channel(self, edit: Edit, quantize: gs.Node, group: int, channels: int) -> gs.Tensor:
        """Return a code's value by a DequantizeLinear per channel, all of one scale: ORT leaves what reads it alone."""
        code, key = quantize.outputs[0], id(quantize)
        if key not in self._by_channel:
            scale, zero = self.codes[group].scale, self.codes[group].zero_point
            name = code.name
            inputs = [
                code,
                self.ctx.constant(f"{name}_scales", np.full(channels, scale, np.float32)),
                self.ctx.constant(f"{name}_zero_points", np.full(channels, zero, ACTIVATION)),
            ]
            made = gs.Variable(self.ctx.fresh_name(f"{name}_per_channel"), np.float32, code.shape)
            node = make_node("DequantizeLinear", inputs, [made], {"axis": 1}, name=self.ctx.fresh_name(f"{name}_DQ"))
            edit.insert_after(quantize, [node])
            self._by_channel[key] = made
        return self._by_channel[key]

    def _renamed(self, edit: Edit, tensor: gs.Tensor, source: gs.Tensor) -> gs.Tensor:
        """Free the name of a graph output for the dequantized value; return what holds the raw one."""
        if source is not tensor:
            for old in list(tensor.inputs):
                replace_output(old, tensor, gs.Variable.empty())
            return source
        raw = gs.Variable(self.ctx.fresh_name(f"{tensor.name}_raw"), np.float32, tensor.shape)
        tensor.inputs[0].name = label(tensor.inputs[0])  # an unnamed node is known by its output
        replace_output(tensor.inputs[0], tensor, raw)
        return raw

    def _code_of(self, group: int) -> tuple[gs.Constant, gs.Constant]:
        if group not in self._scales:
            code = self.codes[group]
            self._scales[group] = (
                self.ctx.constant(f"code{group}_scale", np.asarray(code.scale, np.float32)),
                self.ctx.constant(f"code{group}_zero_point", np.asarray(code.zero_point, ACTIVATION)),
            )
        return self._scales[group]

    def _operands(self, edit: Edit, node: gs.Node) -> None:
        """Quantize the constant operands of an integer kernel."""
        form = CPU_FORMS[node.op]
        count = form.inputs or len(node.inputs)
        for index, tensor in enumerate(node.inputs[:count]):
            if not tensor.name or not is_constant(tensor):
                continue
            if index == form.weight:
                self._weight(edit, node, index)
            else:
                edit.set_input(node, index, self._constant(edit, tensor, self.phase_of.get(id(node), 1.0)))

    def _constant(self, edit: Edit, tensor: gs.Tensor, phase: float) -> gs.Tensor:
        """Return a constant operand that is no weight, dequantized from one code."""
        key = (id(tensor), -1)
        if key not in self._constants:
            values = _floats(tensor)
            code = activation_code(float(values.min(initial=0)), float(values.max(initial=0)), ACTIVATION)
            if self.exact:
                code = exact_activation(code, phase, bounded=False)
            self._constants[key] = self._stored(edit, tensor.name, code, values)
        return self._constants[key]

    def _weight(self, edit: Edit, node: gs.Node, index: int) -> None:
        form = CPU_FORMS[node.op]
        bias = node.inputs[form.bias] if form.bias is not None and len(node.inputs) > form.bias else None
        bias = bias if bias is not None and bias.name else None
        weight = node.inputs[index]
        input_scale = float(np.asarray(self._scale_of[id(node.inputs[0])].values))
        key = (id(weight), output_axis(node) if bias is None else id(node))
        if key not in self._constants:
            values = _floats(weight)
            axis = output_axis(node)
            code = weight_code(values, axis, method=self.weights)
            roomy = code if bias is None else _roomy(code, _floats(bias).reshape(-1), input_scale)
            if self.exact:
                phase = weight_phase(input_scale, self.phase_of.get(id(node), 1.0))
                roomy = exact_weight(roomy, values, None if roomy is code else roomy.scale, phase=phase)
            code = roomy
            self._constants[key] = self._stored(edit, weight.name, code, values)
        made = self._constants[key]
        edit.set_input(node, index, made)
        if bias is not None and form.bias is not None:
            scale = np.asarray(made.inputs[0].inputs[1].values, np.float64) * input_scale
            edit.set_input(node, form.bias, self._bias(edit, bias, scale))

    def _bias(self, edit: Edit, bias: gs.Tensor, scale: Array) -> gs.Tensor:
        wanted = np.asarray(scale, np.float32)
        values = np.rint(_floats(bias).reshape(-1).astype(np.float64) / wanted.astype(np.float64))
        code = Affine(wanted, np.zeros(wanted.shape, np.int32), axis=0)
        return self._dequantize(edit, bias.name, values.astype(np.int32), code)

    def _stored(self, edit: Edit, name: str, code: Affine, values: Array) -> gs.Tensor:
        return self._dequantize(edit, name, code.quantize(values), code)

    def _dequantize(self, edit: Edit, name: str, codes: Array, code: Affine) -> gs.Tensor:
        """Return a constant as codes with a DequantizeLinear behind."""
        ctx = self.ctx
        made = gs.Variable(ctx.fresh_name(f"{name}_dequantized"), np.float32, list(codes.shape))
        inputs = [
            ctx.constant(f"{name}_quantized", codes),
            ctx.constant(f"{name}_scale", np.asarray(code.scale, np.float32)),
            ctx.constant(f"{name}_zero_point", np.asarray(code.zero_point, codes.dtype)),
        ]
        attrs: Mapping[str, Any] = {} if code.axis is None else {"axis": code.axis}
        node = make_node("DequantizeLinear", inputs, [made], attrs, name=ctx.fresh_name(f"{name}_DQ"))
        edit.insert_after(None, [node])
        return made


def _unfit(calibration: Calibration, name: str, method: str) -> str:
    """Return why no code suits a tensor, empty where one does."""
    try:
        found, usual = calibration.range(name, method), calibration.range(name, "percentile")
    except DataError as error:
        return error.what
    if calibration.infinite(name):
        return "has values that are infinite or no number"
    width, most = found.high - found.low, usual.high - usual.low
    if width > OUTLIERS * most > 0.0:
        return f"has values so large ({max(-found.low, found.high):.3g}) that one code would stand for all others"
    return ""


def _together(placement: Placement) -> list[list[int]]:
    """Return groups of tensors in parts: those that meet in an operator other than a layer with a constant weight."""
    part = {number: number for number in placement.groups}
    for node in placement.integer:
        weight = CPU_FORMS[node.op].weight
        if weight is not None and is_constant(node.inputs[weight]):
            continue
        ends = (placement.coded.get(id(t)) for t in (*node.inputs, placement.output(node)))
        met = {part[coded.group] for coded in ends if coded is not None}
        part = {number: min(met) if held in met else held for number, held in part.items()}
    return [[n for n, held in part.items() if held == one] for one in sorted(set(part.values()))]


def _is_cut(placement: Placement, coded: Coded) -> bool:
    """Tell whether the end of a tensor's code stands for a Clip that goes."""
    producer = coded.tensor.inputs[0] if coded.tensor.inputs else None
    return coded.replaced and producer is not None and placement.is_folded(producer) and is_standard(producer, "Clip")


def _folded(placement: Placement, node: gs.Node) -> list[gs.Tensor]:
    """Return what a layer's folded activation makes."""
    made = placement.output(node)
    return [] if made is node.outputs[0] else [made]


def _whole(code: Affine, tensor: gs.Tensor) -> Affine:
    """Return a code with a slightly larger scale, so that fuse-into-codes finds whole numbers of steps."""
    producer = tensor.inputs[0] if tensor.inputs else None
    scale = float(code.scale)
    for length in (
        HARD_SWISH_HALF if any(is_standard(n, "HardSwish") for n in tensor.outputs) else 0.0,
        _shift(producer),
    ):
        steps = int(length / scale)
        if steps >= LEAST_STEPS:
            return Affine(np.asarray(length / steps, np.float32), code.zero_point)
    return code


def _shift(node: gs.Node | None) -> float:
    """Return the size of the constant that an Add adds, 0 for anything else."""
    if node is None or not is_standard(node, "Add"):
        return 0.0
    return next((abs(float(value)) for t in node.inputs if (value := scalar_of(t)) is not None), 0.0)


def _roomy(code: Affine, bias: Array, input_scale: float) -> Affine:
    """Return a weight's code with scales so large that the bias fits beside the products in 32 bits."""
    least = np.abs(bias.astype(np.float64)) / (LARGEST_BIAS * input_scale)
    return Affine(np.maximum(code.scale, least).astype(np.float32), code.zero_point, code.axis, code.block)


def _floats(tensor: gs.Tensor) -> Array:
    values = array_of(tensor)
    assert values is not None
    return values


def _read(edit: Edit, reader: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make a node, or what its subgraphs hold, read `new` for `old`."""
    for index, tensor in enumerate(list(reader.inputs)):
        if tensor is old:
            edit.set_input(reader, index, new)
