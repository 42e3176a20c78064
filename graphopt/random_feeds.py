"""Random feeds for a model that nobody gave data for: shapes that it accepts, values that it can use.

What the graph tells is used (`analysis.inputs`): index ranges, weights that fix a size, numbers that an input is
compared with.  The rest is tried: candidate sizes, then other values, each on the model in ORT, until it runs and
gives outputs that are finite, not empty, and not all 0 or 1 after a softmax or sigmoid.  Every feed takes another
shape where the model has dynamic dimensions, and another branch where an input chooses one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.analysis.dims import Dims, Sizes, plans, variations
from graphopt.analysis.inputs import InputUses
from graphopt.analysis.outputs import probability_outputs, saturated
from graphopt.errors import DataError, did_you_mean
from graphopt.importer import origin
from graphopt.model import Model, ValueSpec
from graphopt.random_values import SMOOTH, STYLES, Filler, Shape
from graphopt.runtime import Session
from graphopt.samples import Feeds, Samples, fits
from graphopt.tensors import is_float, numpy_dtype

COUNT = 2
"""Feeds that are made: two, so that dynamic dimensions take two sizes, and signals that are rough and smooth."""

MAX_WAYS = 4
"""At most this many ways that a control input can choose are taken, each with a rough and a smooth signal."""

MAX_TRIES = 160
MAX_SECONDS = 60.0
"""How long sizes and values are tried, per feed."""

SEQUENCE_LENGTH = 3

_TURNED = {"normal": SMOOTH, SMOOTH: "normal"}


@dataclass(frozen=True)
class Choice:
    """How one feed is made: sizes of the dynamic dimensions, style of the values, which branch."""

    sizes: Sizes
    style: str
    variant: int


def random_feeds(
    model: Model, *, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None, count: int | None = None
) -> Samples:
    """Return `count` random feeds for a model, the same for the same seed.

    Args:
        model: what they are for; sizes and values are tried on it when the feeds are first iterated.
        seed: of all values.
        shapes: input name -> shape; what it leaves open is chosen.
        count: how many feeds; None for two, or two for each way that a control input can choose.

    Raises:
        DataError: `shapes` does not fit the model; when iterated: no shape and no values were found that it runs on.
    """
    return _RandomSamples(_Maker(model, seed, checked_shapes(model, shapes or {})), count)


class _RandomSamples(Samples):
    """Feeds made anew on every pass."""

    def __init__(self, maker: _Maker, count: int | None) -> None:
        super().__init__(lambda: (maker.feed(i) for i in range(self._count)), "", random=True)
        self._maker, self._given = maker, count

    @property
    def _count(self) -> int:
        return self._maker.count if self._given is None else self._given

    @property
    def description(self) -> str:
        """Number, seed and, once they are chosen, shapes."""
        return described([self])

    @description.setter
    def description(self, text: str) -> None:
        del text


def described(cases: Sequence[Samples]) -> str:
    """Return samples in words, random feeds of one seed as one set."""
    made = [case for case in cases if isinstance(case, _RandomSamples)]
    if len(made) < len(cases) or len({case._maker.seed for case in made}) != 1:
        return "; ".join(case.description for case in cases)
    count = sum(case._count for case in made)
    shapes = dict.fromkeys(text for case in made for text in case._maker.shape_texts())
    shown = f"; {', then '.join(shapes)}" if shapes else ""
    return f"{count} random feed{'s' * (count != 1)} (seed {made[0]._maker.seed}{shown})"


def checked_shapes(model: Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """Return the shapes when they fit the model's inputs.

    Raises:
        DataError: an unknown input, another rank, or another size where the model fixes it.
    """
    specs = {spec.name: spec for spec in model.inputs}
    for name, shape in shapes.items():
        if name not in specs:
            hint = did_you_mean(name, specs) or f"its inputs: {', '.join(specs) or 'none'}"
            raise DataError(f"the model has no input '{name}'", at="--shape", hint=hint)
        wanted = specs[name].shape
        if any(int(size) < 0 for size in shape):
            raise DataError(f"a shape has no negative sizes: {list(shape)}", at=f"input '{name}'")
        if wanted is not None and not fits(list(shape), wanted):
            raise DataError(f"shape {list(shape)} where the model takes {specs[name]}", at=f"input '{name}'")
    return {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}


class _Maker:
    """Chooses once how each feed is made, then makes it as often as asked."""

    def __init__(self, model: Model, seed: int, shapes: dict[str, Shape]) -> None:
        self.model = model
        self.seed = seed
        self.given = shapes
        self.choices: dict[int, Choice] = {}
        self._session: Session | None = None
        self._error = ""

    @cached_property
    def uses(self) -> InputUses:
        """What the inputs are used for."""
        return InputUses(self.model)

    @cached_property
    def dims(self) -> Dims:
        """The dynamic dimensions."""
        return Dims.of(self.model, self.uses, self.given)

    @cached_property
    def makers(self) -> dict[str, str]:
        """Outputs that are probabilities, and what makes them."""
        return probability_outputs(self.model)

    @cached_property
    def ways(self) -> int:
        """How many ways the inputs that choose what the graph does can choose; 1 without such inputs."""
        found = 1
        for use in self.uses.by_name.values():
            if use.constants:
                found = max(found, 2, len(set(use.constants)))
            if any(control.kind == "condition" for control in use.controls):
                found = max(found, 2)
        return min(found, MAX_WAYS)

    @property
    def count(self) -> int:
        """How many feeds are made."""
        return COUNT if self.ways == 1 else 2 * self.ways

    def feed(self, index: int) -> Feeds:
        """Return the feed of that number."""
        if index not in self.choices:
            self.choices[index] = self._choose(index)
            if index == self.count - 1:
                self._session = None
        return self._make(index, self.choices[index])

    def shape_texts(self) -> Iterator[str]:
        """Return the shapes of each feed chosen so far, of inputs that could have others."""
        for choice in self.choices.values():
            shapes = self.dims.shapes(choice.sizes)
            open_ = [n for n, dims in self.dims.inputs.items() if any(isinstance(d, str) for d in dims)]
            named = [n for n in shapes if n in open_ or n in self.given]
            if named:
                yield " ".join(f"{n} {'x'.join(map(str, shapes[n])) or 'scalar'}" for n in named)

    def _make(self, index: int, choice: Choice) -> Feeds:
        shapes = self.dims.shapes(choice.sizes)
        planned = {id(t): shapes[t.name] for t in self.model.graph.inputs if t.name in shapes}
        rng = np.random.default_rng([self.seed, index])
        filler = Filler(self.uses.shapes, planned, rng, choice.style, choice.variant)
        feeds: Feeds = {}
        for spec, tensor in self._inputs():
            use = self.uses.by_name[spec.name]
            if spec.kind == "tensor":
                feeds[spec.name] = filler.fill(spec, use, shapes[spec.name])
            else:
                feeds[spec.name] = self._structured(spec, tensor, filler)
        return feeds

    def _inputs(self) -> Iterator[tuple[ValueSpec, Any]]:
        tensors = {t.name: t for t in self.model.graph.inputs}
        for spec in self.model.inputs:
            yield spec, tensors[spec.name]

    def _structured(self, spec: ValueSpec, tensor: Any, filler: Filler) -> Any:
        """Return a value for a sequence or optional input."""
        info = origin(tensor)
        made = _of_type(info.type, spec.name, filler, self.uses)
        if made is None and spec.kind not in ("optional", "sequence"):
            raise DataError(
                f"input '{spec.name}' is a {spec.kind}: no random value is made for it", hint="give samples with --data"
            )
        return made

    def _choose(self, index: int) -> Choice:
        """Try sizes and styles until the model runs; prefer finite, non-empty outputs."""
        if index > 0:
            return self._choose_later(index)
        found = self._first_good(index, ((sizes, index) for sizes in self._plans()))
        if found is None:
            raise self._no_feeds()
        return found

    def _choose_later(self, index: int) -> Choice:
        """Take other sizes than the first feed, and the next branch; settle for less where that does not run."""
        if 0 not in self.choices:
            self.choices[0] = self._choose(0)
        first = self.choices[0]
        searched = max(COUNT, self.ways)
        if index >= searched:
            other = self.choices.get(index % searched, first)
            return replace(other, style=_TURNED.get(other.style, other.style))
        style = _TURNED.get(first.style, first.style) if index % 2 else first.style
        others = list(variations(self.dims, first.sizes))
        attempts = [(sizes, variant) for variant in (index, 0) for sizes in (*others, first.sizes)]
        if self.ways > 1:
            attempts = [
                *((sizes, index) for sizes in (*others, first.sizes, *itertools.islice(self._plans(), 40))), *attempts
            ]  # fmt: skip
        found = self._first_good(index, attempts, list(dict.fromkeys([style, first.style])))
        return found if found is not None else replace(first, variant=0)

    def _plans(self) -> Iterator[Sizes]:
        return plans(self.dims)

    def _first_good(
        self,
        index: int,
        attempts: Iterator[tuple[Sizes, int]] | list[tuple[Sizes, int]],
        styles: Sequence[str] = STYLES,
    ) -> Choice | None:
        tried: list[Choice] = []
        started = time.monotonic()
        poor: Choice | None = None
        for sizes, variant in attempts:
            if len(tried) >= MAX_TRIES or time.monotonic() - started > MAX_SECONDS:
                break
            choice = Choice(sizes, styles[0], variant)
            if choice in tried:
                continue
            tried.append(choice)
            quality = self._quality(index, choice)
            if quality == 2:
                return choice
            if quality == 1 and poor is None:
                poor = choice
                break
        bases = [poor] if poor is not None else tried[:6]
        for style in styles[1:]:
            for base in bases:
                choice = replace(base, style=style)
                quality = self._quality(index, choice)
                if quality == 2:
                    return choice
                if quality == 1 and poor is None:
                    poor = choice
        return poor

    def _quality(self, index: int, choice: Choice) -> int:
        """Return 0 if ORT refuses the feed, 1 if outputs are empty, not finite or saturated, 2 if all is well."""
        if self._session is None:
            self._session = Session(self.model, optimization="off")
        try:
            outputs = self._session.run(self._make(index, choice))
        except (DataError, ValueError) as error:
            self._error = self._error or (error.what if isinstance(error, DataError) else str(error))
            return 0
        return 2 if all(_is_sound(value, self.makers.get(name, "")) for name, value in outputs.items()) else 1

    def _no_feeds(self) -> DataError:
        open_dims = [n for n, dims in self.dims.inputs.items() if any(isinstance(d, str) for d in dims)]
        inputs = ", ".join(str(spec) for spec in self.model.inputs)
        hint = "give samples with --data"
        if open_dims:
            hint += f", or sizes with --shape {open_dims[0]}={','.join('N' for _ in self.dims.inputs[open_dims[0]])}"
        return DataError(f"no random feed was found that the model runs on: {self._error}", at=inputs, hint=hint)


def _is_sound(value: Any, maker: str) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype.kind == "O":
        return True
    if value.size == 0 or (is_float(value.dtype) and not np.isfinite(value.astype(np.float64)).all()):
        return False
    return not maker or not saturated(maker, value)


def _of_type(proto: Any, name: str, filler: Filler, uses: InputUses) -> Any:
    """Return a value of an ONNX type: tensors, sequences and optionals of them; None for anything else."""
    kind = proto.WhichOneof("value")
    if kind == "tensor_type":
        dims = [d.dim_value if d.HasField("dim_value") else 2 for d in proto.tensor_type.shape.dim]
        dtype = numpy_dtype(proto.tensor_type.elem_type)
        return filler.fill(ValueSpec(name, dtype, tuple(dims)), uses.by_name[name], tuple(dims))
    if kind == "sequence_type":
        return [_of_type(proto.sequence_type.elem_type, name, filler, uses) for _ in range(SEQUENCE_LENGTH)]
    if kind == "optional_type":
        return _of_type(proto.optional_type.elem_type, name, filler, uses)
    return None
