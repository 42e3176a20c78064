"""Scales and shifts left between convolutions, written in the form that ONNX Runtime runs fastest.

ORT keeps tensors between convolutions and pools in a blocked layout (NCHWc).  An Add or Mul by a constant makes it
leave that layout and come back; the same map as one of these does not, or is gone:

    batchnorm    BatchNormalization with mean 0, variance 1, epsilon 0
    depthwise    1x1 convolution with one group per channel
    pad          x + b, Conv padded with 0   ->   Pad with -b, Conv padded by nothing, b in its bias
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine
from graphopt.analysis.constants import is_constant
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node, replace_output
from graphopt.errors import SpecError
from graphopt.ops import BLOCKED, BLOCKED_THROUGH, is_standard
from graphopt.registry import register

from . import affine_weights
from .affine_linear import Conv, linear
from .affine_search import chain_dtype, fits_type
from .affine_site import AffineSite, norm_node

Array = np.ndarray[Any, Any]

STEP = 4
"""ORT's blocked layout takes channels in multiples of this."""

REACH = 8
"""Nodes that are looked at on either side for one that uses the blocked layout."""

FORMS = ("batchnorm", "depthwise", "pad")


@register
@dataclass(frozen=True)
class LowerAffine(Pass):
    """Write scales and shifts between convolutions as BatchNormalization, depthwise Conv or a constant-valued Pad.

    Exact up to roundings, keeps the signature.  Only on the CPU provider, for float32 tensors of rank 4 whose
    channels are a multiple of 4, between operators that ORT runs in its blocked layout.  `pad` is for one shift of
    all channels that nothing but padded Convs read; everything else becomes a BatchNormalization there, too.
    """

    name: ClassVar[str] = "lower-affine"
    stage: ClassVar[Any] = "lowering"
    optional: ClassVar[bool] = True
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"form": "depthwise"}, {"form": "pad"})

    form: str = "batchnorm"

    def __post_init__(self) -> None:
        """Refuse other forms.

        Raises:
            SpecError: the form is none of those above.
        """
        if self.form not in FORMS:
            raise SpecError(f"form is one of {', '.join(FORMS)}, not {self.form!r}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per map, or pair of them, that stands alone."""
        if ctx.target.provider != "cpu" or int(graph.opset) < 7:
            return
        with Edit(graph) as edit:
            site = AffineSite(graph, ctx, edit)
            for node in list(graph.nodes):
                if edit.removed(node) or is_standard(node, "BatchNormalization"):
                    continue
                given = site.affine(node)
                if given is None:
                    continue
                chain, whole = _pair(site, node, given)
                yield _lowered(site, chain, whole, self.form)


def _pair(site: AffineSite, node: gs.Node, given: Affine) -> tuple[list[gs.Node], Affine]:
    """Return a map with the one behind it, where there is one that alone reads it."""
    after = site.edit.sole_consumer(node.outputs[0])
    if after is None or not site.edit.is_local(after) or is_standard(after, "BatchNormalization"):
        return [node], given
    own = site.affine(after)
    return ([node], given) if own is None else ([node, after], given.then(own))


def _lowered(site: AffineSite, chain: list[gs.Node], whole: Affine, form: str) -> Change:
    x, out = site.source(chain[0]), chain[-1].outputs[0]
    if form == "pad" and (padded := _padded(site, chain, whole)) is not None:
        return padded
    form = "depthwise" if form == "depthwise" else "batchnorm"
    what = f"{', '.join(n.op for n in chain)} -> {form}"
    size, dtype = site.size(x, 1), chain_dtype(site, chain)
    both = whole.vectors(1, size) if size is not None and site.rank(x) == 4 else None
    if both is None or size is None or size % STEP or dtype != np.float32 or not fits_type(whole, np.dtype(np.float32)):
        return Change(label(chain[-1]), what, "it is not per channel of a float32 tensor in a multiple of 4 channels")
    if not _blocked_before(x):
        return Change(label(chain[-1]), what, "what makes the input does not use the blocked layout")
    if not _blocked_behind(out):
        return Change(label(chain[-1]), what, "what reads the output does not use the blocked layout")

    def apply() -> None:
        replace_output(chain[-1], out, gs.Variable.empty())
        make = _depthwise if form == "depthwise" else _norm
        site.edit.insert_after(chain[-1], [make(site, chain, both, x, out)])
        for node in chain:
            site.edit.remove(node)

    return Change(label(chain[-1]), what, "it stays in the blocked layout", apply)


def _padded(site: AffineSite, chain: list[gs.Node], whole: Affine) -> Change | None:
    """Return the change that puts a shift into the Convs that read it, and its negative into their padding."""
    x, out = site.source(chain[0]), chain[-1].outputs[0]
    convs = site.edit.consumers(out)
    if whole.scales or not whole.uniform or site.edit.is_output(out) or site.opset < 11 or not convs:
        return None
    if chain_dtype(site, chain) != np.float32 or not all(_takes_shift(site, c, out, whole) for c in convs):
        return None

    def apply() -> None:
        value = site.constant(f"{out.name}/edge", (-whole.shift).astype(np.float32))
        for conv in convs:
            site.edit.insert_after(chain[-1], [_pad_apart(site, conv, x, value)])
            ways = affine_weights.FORE["Conv"](site, conv, 0, whole)
            assert not isinstance(ways, str)
            assert ways[0].do is not None
            ways[0].do()
        for node in chain:
            site.edit.remove(node)

    return Change(label(chain[-1]), f"{', '.join(n.op for n in chain)} -> pad", "only padded Convs read it", apply)


def _takes_shift(site: AffineSite, conv: gs.Node, out: gs.Tensor, whole: Affine) -> bool:
    """Tell whether a reader is a Conv, padded by given numbers of zeros, that could take the shift without them."""
    if not is_standard(conv, "Conv") or not site.edit.is_local(conv) or sum(t is out for t in conv.inputs) != 1:
        return False
    pads = [int(p) for p in conv.attrs.get("pads", ())]
    if conv.inputs[0] is not out or not any(pads) or str(conv.attrs.get("auto_pad", "NOTSET")) != "NOTSET":
        return False
    record = linear(site, conv, Conv)
    if isinstance(record, str):
        return False
    shift = np.full(record.inputs, float(whole.shift))
    return record.why_not(np.ones(record.inputs), record.added(shift)) is None


def _pad_apart(site: AffineSite, conv: gs.Node, x: gs.Tensor, value: gs.Tensor) -> gs.Node:
    """Return a Pad with a value that does the padding of a Conv from now on."""
    pads = [int(p) for p in conv.attrs.pop("pads")]
    half = len(pads) // 2
    amounts = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    wide = gs.Variable(site.ctx.fresh_name(f"{x.name}/padded"), dtype=x.dtype)
    name = site.ctx.fresh_name(f"{label(conv)}/pad")
    pad = make_node("Pad", [x, site.constant(f"{wide.name}/amounts", amounts), value], [wide], name=name, like=[conv])
    site.edit.set_input(conv, 0, wide)
    return pad


def _norm(site: AffineSite, chain: list[gs.Node], both: tuple[Array, Array], x: gs.Tensor, out: gs.Tensor) -> gs.Node:
    return norm_node(site, both, x, out, np.dtype(np.float32), name=chain[-1].name, like=chain)


def _depthwise(
    site: AffineSite, chain: list[gs.Node], both: tuple[Array, Array], x: gs.Tensor, out: gs.Tensor
) -> gs.Node:
    size = len(both[0])
    weight = site.constant(f"{out.name}/weight", both[0].reshape(size, 1, 1, 1).astype(np.float32))
    bias = site.constant(f"{out.name}/bias", both[1].astype(np.float32))
    attrs = {"group": size, "kernel_shape": [1, 1]}
    return make_node("Conv", [x, weight, bias], [out], attrs, name=chain[-1].name, like=chain)


def _blocked(node: gs.Node) -> bool:
    """Tell whether ORT runs a node in the blocked layout, as far as its form says."""
    if not is_standard(node, *BLOCKED):
        return False
    return node.op != "Conv" or (len(node.inputs) > 1 and is_constant(node.inputs[1]))


def _blocked_before(x: gs.Tensor) -> bool:
    """Tell whether a tensor comes from an operator in the blocked layout, through others that keep it."""
    for _ in range(REACH):
        if len(x.inputs) != 1:
            return False
        node = x.inputs[0]
        if _blocked(node):
            return True
        if not is_standard(node, *BLOCKED_THROUGH):
            return False
        x = next((t for t in node.inputs if not is_constant(t)), node.inputs[0])
    return False


def _blocked_behind(out: gs.Tensor) -> bool:
    """Tell whether an operator in the blocked layout reads a tensor, through others that keep it."""
    waiting, seen = [out], 0
    while waiting and seen < REACH:
        for node in waiting.pop(0).outputs[:REACH]:
            seen += 1
            if _blocked(node):
                return True
            if is_standard(node, *BLOCKED_THROUGH):
                waiting.extend(node.outputs[:1])
    return False
