"""What a pass is: `Pass` proposes `Change`s, the pipeline applies them; `Context` is all that a pass may ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import DataError, SpecError, did_you_mean

if TYPE_CHECKING:
    from graphopt.analysis.shapes import Shapes
    from graphopt.calibrate import Calibration
    from graphopt.grams import Gram, GramRequest
    from graphopt.model import Model
    from graphopt.moments import Fit, Split
    from graphopt.samples import Samples
    from graphopt.training import TrainSettings

Exactness = Literal["exact", "lossy"]
Loss = Literal["structure", "numbers", "training"]
Measure = Callable[[Mapping[str, np.ndarray[Any, Any]]], float]
Runner = Callable[[Mapping[str, Any]], dict[str, Any]]
Evaluate = Callable[[onnx.ModelProto, Mapping[str, Any], Sequence[str] | None], dict[str, Any]]


@dataclass
class Change:
    """A proposal: where, what, why, and how.  Without `apply` it is a near miss and `why` is what blocks it."""

    where: str
    what: str
    why: str = ""
    apply: Callable[[], None] | None = None

    @property
    def blocked(self) -> bool:
        """Whether this is a near miss."""
        return self.apply is None


@dataclass(frozen=True)
class Target:
    """What the result will run on.

    Attributes:
        provider: short name of the execution provider.
        threads: ORT's intra-op threads.
        contrib: whether operators of ORT's own domains (`com.microsoft` and so on) may be used.
        here: whether that is this machine; facts read off this one hold only there.
    """

    provider: str = "cpu"
    threads: int = 1
    contrib: bool = False
    here: bool = True


class Observes(Protocol):
    """Runs the model as it is on the samples (implemented in `observation.py`)."""

    def calibration(self, tensors: Iterable[str], channels: Mapping[str, int] | None = None) -> Calibration:
        """Return statistics of tensors of the main graph."""

    def grams(self, requests: Mapping[str, GramRequest], rows: int = 0) -> dict[str, Gram]:
        """Return Gram matrices of layer inputs."""

    def fetches(self, tensors: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield the values of tensors of the main graph for each sample."""

    def random_feeds(self) -> Samples:
        """Return random feeds for the model, of two shapes where dimensions are open."""

    def runner(self, model: Model) -> Runner:
        """Return a function that runs a model."""

    def means(
        self, axes: Mapping[str, tuple[int, int]], model: Model | None = None, limit: int = 0
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return means of channels of tensors of the main graph."""

    def output_noise(
        self, reference: Model, names: Sequence[str], limit: int = 0, model: Model | None = None
    ) -> Measure:
        """Return a function from values of constants to the noise at the outputs."""

    @property
    def samples(self) -> Samples | None:
        """What is run."""

    def halves(self) -> tuple[Observes, Observes] | None:
        """Return what observes the two halves of the samples that differ most, None where they are few."""

    def sweep(self, fits: Sequence[Fit], reference: Model, rows: int = 0) -> Iterator[tuple[Fit, Split]]:
        """Yield moments of layers' inputs against tensors of the reference, in order."""


class Trains(Protocol):
    """Trains the model as it is (implemented in `training_steps.py`, by `graphopt.bridge`)."""

    def check(self, data: str, *, labels: bool) -> None:
        """Refuse to train where torch or the data are missing."""

    def refusal(self, settings: TrainSettings) -> str:
        """Return why the model cannot be trained, '' where it can."""

    def train(self, settings: TrainSettings, data: str = "", teacher: str = "") -> tuple[Model, str]:
        """Return a trained copy of the model, and how that went in words."""

    def gradients(
        self, settings: TrainSettings, data: str, *, moment: str = "first"
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return gradients of the loss by initializer name."""

    def stage(self, number: int) -> Model | None:
        """Return the model before the first training (0), or after so many; None where there is none."""


@dataclass
class Context:
    """What a pass may use besides its graph.

    Attributes:
        model: the model being edited.
        evaluate: runs a small model in ORT, its rewriting off: (proto, feeds, outputs) -> arrays by name.
        target: where the result will run.
        seed: for every random choice.
        samples: representative feeds, when the user gave some.
        original_bytes: size of the file that the original model makes.
        gradients: of the task's loss, by initializer name; of the original model, or what a pass has put here since;
            None without.
        notes: sentences for the report that are not about one change.
        observer: measures what flows through the model.
        trainer: trains the model.
        reference: returns the model before the first lossy pass of this pass's kind (`Pass.loses`), its tensors under
            the same names.
    """

    model: Model
    evaluate: Evaluate
    target: Target = field(default_factory=Target)
    seed: int = 0
    samples: Samples | None = None
    original_bytes: int = 0
    gradients: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    observer: Observes | None = None
    trainer: Trains | None = None
    reference: Callable[[], Model] | None = None
    _shapes: Shapes | None = None
    _names: set[str] | None = None

    @property
    def shapes(self) -> Shapes:
        """Types and shapes of all tensors, inferred when first asked for in this pass."""
        if self._shapes is None:
            from graphopt.analysis.shapes import Shapes  # noqa: PLC0415  (analysis stands beside base)

            self._shapes = Shapes(self.model)
        return self._shapes

    def calibration(self, tensors: Iterable[str], channels: Mapping[str, int] | None = None) -> Calibration:
        """Return statistics of tensors of the main graph as it is now, on the samples.

        Args:
            tensors: their names.
            channels: name -> axis, of those that are to have statistics per channel too.

        Raises:
            DataError: there are no samples.
        """
        return self._observing().calibration(tensors, channels)

    def grams(self, requests: Mapping[str, GramRequest], rows: int = 0) -> dict[str, Gram]:
        """Return Gram matrices of layer inputs as the graph is now, on the samples.

        Args:
            requests: by label.
            rows: taken at most of each tensor and sample, drawn at random (0: all).

        Raises:
            DataError: there are no samples.
        """
        return self._observing().grams(requests, rows)

    def means(
        self, axes: Mapping[str, tuple[int, int]], model: Model | None = None, limit: int = 0
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the mean of each channel of tensors, on the samples.

        Args:
            axes: node output of the main graph -> (axis of its channels, its rank).
            model: whose tensors, where not those of the graph as it is now (`reference`, for one).
            limit: samples read at most (0: all).

        Raises:
            DataError: there are no samples.
        """
        return self._observing().means(axes, model, limit)

    def output_noise(
        self, reference: Model, names: Sequence[str], limit: int = 0, model: Model | None = None
    ) -> Measure:
        """Return a function from values of some constants to how far the outputs then are from the reference's.

        Args:
            reference: computes what is wanted.
            names: the constants, of the main graph as it is now.
            limit: samples read at most (0: all).
            model: whose constants, where not those of the graph as it is now: a form of it with switches, for one.

        Raises:
            DataError: there are no samples.
        """
        return self._observing().output_noise(reference, names, limit, model)

    def fetches(self, tensors: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield the values of tensors of the main graph as it is now, by name, for each sample.

        Raises:
            DataError: there are no samples.
        """
        return self._observing().fetches(tensors)

    def sweep(self, fits: Sequence[Fit], rows: int = 0) -> Iterator[tuple[Fit, Split]]:
        """Yield second moments of each layer's input against a tensor of the reference, on the samples.

        Each is measured on the graph as it is when it is asked for: the weights of layers before may have changed.

        Args:
            fits: sorted, no layer before one that it depends on.
            rows: of each layer over all samples, drawn at random (0: as many as its width asks for).

        Raises:
            DataError: there are no samples, or nothing to compare with.
        """
        if self.reference is None:
            raise DataError("there is no model to compare layers with")
        return self._observing().sweep(fits, self.reference(), rows)

    def random_feeds(self) -> Samples:
        """Return seeded random feeds that the model runs on, of two shapes where dimensions are open.

        Raises:
            DataError: none are to be had; when iterated: none was found that the model runs on.
        """
        return self._observing().random_feeds()

    def runner(self, model: Model) -> Runner:
        """Return a function that runs a model, ORT's rewriting off, as often as wanted: feeds -> outputs by name.

        Raises:
            ModelError: ORT refuses the model.
        """
        return self._observing().runner(model)

    def halves(self) -> tuple[Context, Context] | None:
        """Return the same model with the two halves of the samples that differ most; None where they are few.

        Raises:
            DataError: there are no samples.
        """
        found = self._observing().halves()
        if found is None:
            return None
        first, second = (replace(self, samples=observer.samples, observer=observer) for observer in found)
        return first, second

    @property
    def training(self) -> Trains:
        """What trains the model.

        Raises:
            DataError: nothing does here.
        """
        if self.trainer is None:
            raise DataError("nothing trains the model here", hint="run the pass in a pipeline")
        return self.trainer

    def _observing(self) -> Observes:
        if self.observer is None:
            raise DataError("values are measured on samples, and there are none", hint="give --data")
        return self.observer

    def forget(self) -> None:
        """Drop cached analyses: the graph has changed since."""
        self._shapes = None
        self._names = None

    def fresh_name(self, base: str) -> str:
        """Return a tensor or node name that no graph of the model uses: `base`, else `base_1` and so on."""
        if self._names is None:
            self._names = all_names(self.model)
        name, number = base, 0
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def holds_initializers(self, graph: gs.Graph) -> bool:
        """Tell whether constants of a graph may be initializers: IR 3 allows them in the main graph only."""
        if isinstance(graph, gs.Function):
            return False
        return graph is self.model.graph or self.model.ir_version >= 4

    def constant(self, base: str, values: np.ndarray[Any, Any]) -> gs.Constant:
        """Return a new constant with a free name."""
        return gs.Constant(self.fresh_name(base), np.asarray(values))


def all_names(model: Model) -> set[str]:
    """Return every tensor and node name of every graph of the model."""
    names: set[str] = set()
    for graph in model.graphs():
        names.update(t.name for t in graph.inputs)
        for node in graph.nodes:
            names.add(node.name)
            names.update(t.name for t in node.inputs)
            names.update(t.name for t in node.outputs)
    names.update(c.name for c in model.constants())
    return names


@dataclass(frozen=True)
class Pass:
    """A graph transformation.  Subclasses are frozen dataclasses: their fields are the pass's options.

    The first line of the docstring says what it does to the graph.  `run` yields changes; the pipeline applies
    each before it asks for the next, sorts the nodes afterwards, and removes nothing by itself.

    Class attributes:
        name: what users type.
        exactness: `exact` passes are judged by error, `lossy` ones by gates.
        loses: what a lossy pass gives up: `structure` (channels, ranks, blocks), or only `numbers` (codes), or what
            training had found before (`training`).  Each kind has its own `reference`, for codes are judged beside the
            pruned model, not beside the one before.
        scope: `graph` runs on each graph (subgraphs and function bodies too, inner ones last), `model` once.
        stage: `canonical`, or `lowering` for what depends on the target.
        changes_signature: whether it may change input and output names or types (its docstring says how).
        optional: whether the result is as good without it where it does not make the model faster: `optimize` times
            such a pass and leaves it out where it does not pay.
        variants: other settings of its options, as different ways to the same end; `optimize` times each.
        default_on: whether an optional pass runs where nothing is timed.
    """

    name: ClassVar[str] = ""
    exactness: ClassVar[Exactness] = "exact"
    loses: ClassVar[Loss] = "numbers"
    scope: ClassVar[Literal["graph", "model"]] = "graph"
    stage: ClassVar[Literal["canonical", "lowering"]] = "canonical"
    changes_signature: ClassVar[bool] = False
    optional: ClassVar[bool] = False
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    default_on: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose changes to `graph`."""
        raise TypeError(f"{type(self).__name__} does not define run()")

    @classmethod
    def summary(cls) -> str:
        """Return the docstring's first line."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return each option with its default (None where it must be given)."""
        found = {}
        for option in fields(cls):
            if option.default_factory is not MISSING:
                found[option.name] = option.default_factory()
            else:
                found[option.name] = None if option.default is MISSING else option.default
        return found

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Pass:
        """Return the pass with these options.

        Raises:
            SpecError: an option that the pass does not have, one missing, or one of another type.
        """
        known = {option.name: option for option in fields(cls)}
        for name in options:
            if name not in known:
                raise SpecError(
                    f"pass '{cls.name}' has no option '{name}'",
                    hint=did_you_mean(name, known) or f"its options: {', '.join(known) or 'none'}",
                )
        values = {name: _checked(cls, name, value) for name, value in options.items()}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise SpecError(f"pass '{cls.name}': {error}") from error

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        defaults = self.option_defaults()
        return {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}


def _checked(cls: type[Pass], name: str, value: Any) -> Any:
    """Return an option's value, whole numbers as floats where those are meant."""
    default = cls.option_defaults()[name]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list | str):
        return (value,) if isinstance(value, str) else tuple(value)
    if default is not None and type(value) is not type(default):
        raise SpecError(
            f"pass '{cls.name}': option '{name}' must be of type {type(default).__name__}, not {value!r}",
        )
    return value
