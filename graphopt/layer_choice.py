"""Which layers run on integers: measured costs, measured harm, and the fastest choice that keeps the bound.

The choice is found by integer programming over a latency model, with a bound on the summed noise; then it is built,
compiled, and judged.  Noise adds up only about, so the bound on it is found by trying: looser where accuracy is left,
tighter where it is missed.
"""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphopt import latency, spec
from graphopt.analysis.placement import Layer, inner_layers, place
from graphopt.analysis.placement import layers as find_layers
from graphopt.analysis.shapes import Shapes
from graphopt.calibrate import Calibration, calibrate
from graphopt.compiled import inspect_layers
from graphopt.edit import label
from graphopt.errors import ModelError
from graphopt.judge import Progress
from graphopt.latency import LatencyModel, LayerCost
from graphopt.lossy_report import Tried
from graphopt.model import Model
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.quality import Quality
from graphopt.quantization_report import LayerRow
from graphopt.samples import Samples
from graphopt.search import Assignment, assign
from graphopt.sensitivity import measure as measure_noise

ATTEMPTS = 10
"""Choices that are built and judged at most."""

COARSE = 3.0
"""The bound on the noise is divided by this until a choice keeps the bound on accuracy."""

TIMED = 1
"""Samples that layers are timed on: what takes most of the time is the number of models."""

CLOSER = 1.15
"""Bounds on the noise nearer to each other than this are taken as one."""

REASONS = 3
"""Reasons that one sentence names at most."""

Judge = Callable[[Model], Quality]


@dataclass(frozen=True)
class Recipe:
    """How a choice of layers becomes a model.

    Attributes:
        form: what reports call it.
        quantize: the pass that takes the layers as its option `only`.
        ops: operators of the layers that it may choose among.
        options: of that pass, but for `only`.
        prepare: passes before it, run once: they do not depend on the choice.
        refine: passes behind it that raise accuracy, of what is judged and returned only.
        reduce: passes right behind `quantize`, of what is judged and returned only.
        fuse: passes behind all these.
        ranges: whether it needs ranges of activations.
    """

    form: str
    quantize: str
    ops: frozenset[str]
    options: Mapping[str, object] = field(default_factory=dict)
    prepare: tuple[spec.Step, ...] = ()
    refine: tuple[spec.Step, ...] = ()
    reduce: tuple[spec.Step, ...] = ()
    fuse: tuple[spec.Step, ...] = ()
    ranges: bool = True

    def safe(self, isa: str) -> Recipe:
        """Return the recipe for processors whose sums of two 8-bit products saturate."""
        if self.ranges:
            return replace(self, reduce=(spec.PassStep("reduce-range", {"isa": isa}),))
        return replace(self, options={**self.options, "bits": 7})  # no samples tell what a run's range will be


@dataclass
class Found:
    """The best choice found: its layers in order, and the passes that make it from the canonical model."""

    model: Model
    chosen: tuple[str, ...]
    steps: tuple[spec.Step, ...]
    quality: Quality
    predicted: float


class LayerChoice:
    """Chooses among the layers of a canonical model.

    Args:
        canonical: the model before codes.
        samples: for ranges, noise and times.
        recipe: how a choice becomes a model.
        lowering: passes behind all others.
        settings: how pipelines run; with the target and the seed.
        judge: returns how good a model is.
        budget: seconds of timing.
        progress: takes short sentences.

    Attributes:
        rows: one per layer, once `best` has returned.
        tried: what was built and judged.
        notes: passes that were left out.
        outcome: why `best` found nothing.
    """

    def __init__(
        self, canonical: Model, samples: Samples, recipe: Recipe, lowering: tuple[spec.Step, ...], settings: Settings,
        judge: Judge, *, budget: float, progress: Progress,
    ) -> None:  # fmt: skip
        self.samples, self.recipe, self.lowering, self.settings = samples, recipe, lowering, settings
        self.judge, self.budget, self.progress = judge, budget, progress
        self.rows: list[LayerRow] = []
        self.tried: list[Tried] = []
        self.notes: dict[str, None] = {}
        self.outcome = ""
        self.canonical = canonical
        if recipe.prepare:
            self.canonical = Pipeline(recipe.prepare).run(canonical, samples=samples, settings=settings).model
        self._shapes = Shapes(self.canonical)
        found = find_layers(self.canonical.graph, self._shapes, settings.target.provider)
        self.order = [layer.label for layer in found]
        self._nodes = {layer.label: layer.node for layer in found}
        self.refused = {layer.label: self._why_not(layer) for layer in found if self._why_not(layer)}
        self._known: Calibration | None = None

    def _why_not(self, layer: Layer) -> str:
        if layer.why_not:
            return layer.why_not
        return "" if layer.node.op in self.recipe.ops else f"no {self.recipe.form} for {layer.node.op}"

    @property
    def able(self) -> list[str]:
        """Layers that may run on integers, in the graph's order."""
        return [name for name in self.order if name not in self.refused]

    @property
    def known(self) -> Calibration | None:
        """Statistics of all tensors that any choice gives a code."""
        if self._known is None and self.recipe.ranges:
            self.progress("measuring ranges")
            nodes = [self._nodes[name] for name in self.able]
            target = self.settings.target
            placement = place(self.canonical.graph, nodes, self._shapes, target.provider, self.canonical.opset)
            names = {c.tensor.name for c in placement.coded.values()}
            names |= {t.name for node in nodes for t in (node.inputs[0], node.outputs[0])}
            self._known = calibrate(self.canonical, self.samples, sorted(names), seed=self.settings.seed)
        return self._known

    def make(self, chosen: frozenset[str]) -> Model:
        """Return the model with these layers in int8, in the form that will run, without what only raises accuracy."""
        return self._built(self.steps(chosen, refined=False))

    def steps(self, chosen: frozenset[str], *, refined: bool) -> tuple[spec.Step, ...]:
        """Return the passes that make it from the prepared model."""
        named = tuple(glob.escape(name) for name in self.order if name in chosen)
        dead = spec.PassStep("eliminate-dead")
        cleanup = (dead, *self.lowering, spec.PassStep("eliminate-common"), dead)
        if not named:
            return cleanup
        quantize = spec.PassStep(self.recipe.quantize, {**self.recipe.options, "only": named})
        accurate = (*self.recipe.reduce, *self.recipe.refine) if refined else ()
        return (quantize, *accurate, *self.recipe.fuse, *cleanup)

    def _built(self, steps: tuple[spec.Step, ...]) -> Model:
        return self._run(steps).model

    def _run(self, steps: tuple[spec.Step, ...]) -> Result:
        """Return what passes make of the prepared model; those that only refine may fail, and are left out.

        Raises:
            ModelError: the pass that quantizes failed.
        """
        settings = replace(self.settings, known=self.known, on_failure="continue")
        result = Pipeline(steps).run(self.canonical, samples=self.samples, settings=settings)
        for record in result.report.failures:
            if record.name == self.recipe.quantize:
                raise ModelError(f"{record.name} failed: {record.failure}")
            self.notes.setdefault(f"{record.name} was left out: {record.failure}")
        return result

    def compiled(self, chosen: frozenset[str], *, refined: bool = False) -> tuple[Model, frozenset[str]]:
        """Return a model, and the layers that ORT really runs on integers; others are refused from here on."""
        for _ in range(len(chosen) + 1):
            result = self._run(self.steps(chosen, refined=refined))
            found = inspect_layers(result.model, chosen, self.settings.target.provider)
            left = {name: f"ORT runs it in float: {why}" for name, why in found.left_float.items()}
            left.update((name, why) for name, why in self._blocked(result).items() if name in chosen)
            if not left:
                break
            self.refused.update(left)
            chosen -= set(left)
        return result.model, chosen

    def _blocked(self, result: Result) -> dict[str, str]:
        """Return what the quantizing pass left in float, and why."""
        records = [record for record in result.report.passes if record.name == self.recipe.quantize]
        return {miss["where"]: miss["why"] for record in records for miss in record.blocked}

    def best(self, beat: float = math.inf) -> Found | None:
        """Return the fastest choice that keeps the bound, None where there is none.

        Args:
            beat: part of the float model's time that another form was predicted to take: nothing else is looked for
                where no choice, however lossy, would take less.
        """
        _, everything = self.compiled(frozenset(self.able))
        if not everything:
            self.rows = [self._row(name, None) for name in self.order] + self._inner()
            self.outcome = unable_reason(self.rows)
            return None
        names = [name for name in self.order if name in everything]
        self.progress("timing layers")
        costs = latency.measure(
            self.canonical, self.make, names, self.samples.limit(TIMED), provider=self.settings.target.provider,
            threads=self.settings.target.threads, budget=self.budget, progress=self.progress,
        )  # fmt: skip
        fastest = assign(costs, dict.fromkeys(names, 0.0))
        if not fastest.int8:
            self.outcome = "no choice of layers would be faster"
            self.rows = self._explained(costs, None, ())
            return None
        if (predicted := fastest.seconds / costs.predict(())) >= beat:
            self.outcome = f"at best {predicted:.3f} of the float model's time, no faster than the form before"
            self.rows = self._explained(costs, None, ())
            return None
        quality, found = self._tried(fastest, costs)
        if quality.ok and found.chosen:
            self.rows = self._explained(costs, None, found.chosen)
            return found
        self.progress("measuring what each layer harms")
        noise = measure_noise(
            self.canonical, self.make, names, self.samples, provider=self.settings.target.provider,
            progress=self.progress,
        )  # fmt: skip
        self.refused.update(dict.fromkeys(noise.broken, "in int8 it gives values that are not finite"))
        within = self._search(costs, noise, fastest.int8, beat)
        self.rows = self._explained(costs, noise, within.chosen if within else ())
        if within is None:
            closest = max(self.tried, key=lambda t: -math.inf if t.quality is None else t.quality.score)
            self.outcome = "no choice of layers keeps the bound: " + closest.verdict
        return within

    def _search(
        self, costs: LatencyModel, noise: Mapping[str, float], missed: frozenset[str], beat: float
    ) -> Found | None:
        """Return the fastest choice that was judged good, looked for between no noise and that of one that missed."""
        low, high = 0.0, max(sum(noise.get(name, 0.0) for name in missed), 1e-30)
        best: Found | None = None
        seen = {missed}
        limit = high / COARSE
        for _ in range(ATTEMPTS):
            choice = assign(costs, noise, limit)
            if choice.seconds / costs.predict(()) >= beat:
                break  # a tighter bound is slower still
            if choice.int8 in seen or not choice.int8:  # a bound between two choices, or below all
                good = choice.int8 and best is not None and choice.noise <= low
                low, high = (limit, high) if good else (low, limit)
            else:
                seen.add(choice.int8)
                quality, candidate = self._tried(choice, costs)
                if quality.ok and candidate.chosen:
                    low = max(limit, choice.noise)
                    best = candidate if best is None or candidate.predicted < best.predicted else best
                elif len(choice.int8) == 1:  # its noise does not tell what it does: all others, anew
                    noise = self._without(choice.int8, noise)
                    high = high if best is not None else COARSE * max(sum(noise.values()), 1e-30)
                else:
                    high = min(limit, choice.noise)
            if low > 0.0 and high / low < CLOSER:
                break
            limit = math.sqrt(low * high) if low > 0.0 else high / COARSE
        return best

    def _without(self, layers: frozenset[str], noise: Mapping[str, float]) -> dict[str, float]:
        """Return the noise of all others; these miss the bound by themselves."""
        verdict = self.tried[-1].verdict
        self.refused.update((name, f"it misses the bound by itself: {verdict}") for name in layers)
        return {name: value for name, value in noise.items() if name not in layers}

    def _tried(self, choice: Assignment, costs: LatencyModel) -> tuple[Quality, Found]:
        self.progress(f"trying {len(choice.int8)} layers in int8 ({len(self.tried) + 1})")
        model, int8 = self.compiled(choice.int8, refined=True)
        quality = self.judge(model)
        relative = costs.predict(int8) / costs.predict(())
        verdict = "keeps the bound" if quality.ok else "; ".join(quality.failures)
        self.tried.append(Tried(self.recipe.form, len(int8), relative, quality, verdict=verdict))
        chosen = tuple(name for name in self.order if name in int8)
        steps = (*self.recipe.prepare, *self.steps(int8, refined=True))
        return quality, Found(model, chosen, steps, quality, relative)

    def _explained(
        self, costs: LatencyModel, noise: Mapping[str, float] | None, chosen: Collection[str]
    ) -> list[LayerRow]:
        known = {row.layer: row for row in costs.explain(chosen, noise) if row.layer not in self.refused}
        return [self._row(name, known.get(name)) for name in self.order] + self._inner()

    def _inner(self) -> list[LayerRow]:
        return _inside(self.canonical, self.settings.target.provider)

    def _row(self, name: str, row: LayerCost | None) -> LayerRow:
        op = self._nodes[name].op
        if row is None:
            return LayerRow(name, op, "float", self.refused.get(name, ""))
        return LayerRow(name, op, row.precision, row.why, row.float_us, row.int8_us, row.border_us, row.noise)


def unable(model: Model, provider: str) -> list[LayerRow]:
    """Return one row per layer with the reason why it cannot run on integers."""
    found = find_layers(model.graph, Shapes(model), provider)
    rows = [LayerRow(layer.label, layer.node.op, "float", layer.why_not) for layer in found]
    return rows + _inside(model, provider)


def _inside(model: Model, provider: str) -> list[LayerRow]:
    inside = inner_layers(model.graph, provider)
    return [LayerRow(label(node), node.op, "float", "it stands in a subgraph") for node in inside]


def unable_reason(rows: Sequence[LayerRow]) -> str:
    """Return in one line why no layer can run on integers."""
    whys = Counter(row.why for row in rows).most_common()
    if not whys:
        return "it has no layers that could run on integers"
    said = "; ".join(f"{why} ({number} layers)" if number > 1 else why for why, number in whys[:REASONS])
    return f"no layer can run on integers: {said}{' …' if whys[REASONS:] else ''}"
