"""`sparsify`: weights set to zero, unstructured or N of every M, and the file that becomes smaller by it.

    canonical stage → sparsify-weights → lowering that pays → accuracy on samples that chose nothing → sizes

ONNX Runtime computes with the zeros: the result takes the lossless model's time.  Without an amount, the largest one
that keeps the bound is looked for, by halving.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import registry, spec
from graphopt.base import Change
from graphopt.data import Spec
from graphopt.edit import label, order_constants
from graphopt.errors import DataError, GateMissedError, GraphoptError, ModelError, SpecError
from graphopt.gradients import read_gradients
from graphopt.judge import Progress
from graphopt.lossy import BUDGET, Finished, Given, GivenDecisions, LossyRequest, LossyTask
from graphopt.lossy_report import Tried
from graphopt.model import INLINE_LIMIT, Model, Source
from graphopt.optimizer import Shapes, thread_counts
from graphopt.pipeline import Pipeline
from graphopt.quality import Bound, Quality
from graphopt.report import PassRecord
from graphopt.sparse_layers import SparseLayer, find
from graphopt.sparsity import SAMPLED, Pattern
from graphopt.sparsity_report import ZIPPED, FileSizes, SparseRow, SparsityReport

STEP = "sparsify-weights"

LEAST, MOST = 0.05, 0.98
"""Amounts that are tried at least and at most where none is given."""

FINE = 0.01
"""How near to the largest amount the search comes."""


@dataclass(frozen=True, kw_only=True)
class Request(LossyRequest):
    """What is asked of `sparsify`, checked: its arguments."""

    amount: float | None = None
    criterion: str = "magnitude"
    spread: str = "global"
    pattern: str = ""
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    storage: str = "sparse"
    optimize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amount is not None and not 0 < self.amount < 1:
            raise SpecError(f"an amount lies between 0 and 1, not at {self.amount:g}", at="--amount", hint="0.8: 80 %")
        if self.amount is not None and self.pattern:
            raise SpecError("a pattern says how much becomes zero", at="--amount", hint="leave out one of them")
        try:
            self.step(self.amount or 0.5)
        except GraphoptError as error:
            raise SpecError(error.what.removeprefix(f"pass '{STEP}': "), at=error.at, hint=error.hint) from error

    def step(self, amount: float) -> spec.PassStep:
        """Return the pass that does it; a wrong option raises."""
        options: dict[str, Any] = {"criterion": self.criterion, "spread": self.spread, "storage": self.storage}
        options |= {"pattern": self.pattern} if self.pattern else {"amount": round(float(amount), 6)}
        options |= {name: list(globs) for name in ("only", "skip") if (globs := getattr(self, name))}
        defaults = registry.get(STEP).from_options(options).options()
        return spec.PassStep(STEP, {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()})

    @property
    def searches(self) -> bool:
        """Whether the largest amount within the bound is looked for."""
        return self.amount is None and not self.pattern

    @property
    def named(self) -> bool:
        """Whether a bound was named, which must be kept."""
        return self.bound.names_numbers or self.bound.metric is not None


class Sparsified(Finished[SparsityReport]):
    """A finished run: the model, and what was done to it."""


def sparsify(
    model: Source,
    *,
    data: Spec = None,
    bound: Bound | None = None,
    amount: float | None = None,
    criterion: str | None = None,
    scope: str = "global",
    pattern: str = "",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    gradients: str | Path | None = None,
    storage: str = "sparse",
    optimize: bool = True,
    measure: bool = True,
    provider: str = "cpu",
    threads: int | Sequence[int] | None = 1,
    contrib: bool = False,
    shapes: Shapes | None = None,
    batch: int = 1,
    budget: float = BUDGET,
    seed: int = 0,
    decisions: GivenDecisions | None = None,
    progress: Progress | None = None,
) -> Sparsified:
    """Return the model with a part of its weights zero.

    Args:
        model: a path, `Model` or `ModelProto`; left untouched.
        data: representative samples as in `load_samples`; half of them choose and fit, the others judge.
        bound: what it may cost; without an amount, `Bound()` asks for what suits the outputs.
        amount: part of the weights that becomes zero; None looks for the largest that keeps the bound.
        criterion: magnitude, random, gradient, wanda, sparsegpt; None: sparsegpt with samples, else magnitude.
        scope: `global` ranks all layers together, `per-layer` takes the same part of each.
        pattern: `N:M` leaves N of every M inputs; in place of an amount.
        only: globs of layers that may become sparse.
        skip: globs of layers that may not.
        gradients: file of gradients (see `graphopt.gradients`), for that criterion.
        storage: `sparse` saves weights in sparse form where that is smaller, `dense` does not.
        optimize: whether the lossless engine runs, too; without, the graph stays as it is.
        measure: whether it times what pays; without, static defaults decide.
        provider: where the result will run.
        threads: ORT's intra-op threads to time with.
        contrib: whether operators of ORT's own domains may be used.
        shapes: shapes of inputs by name, for random feeds where there are no samples.
        batch: how many rows of `.npz` samples make a feed.
        budget: seconds that timing may take, about.
        seed: for everything random.
        decisions: of an earlier run: do the same again, without measuring.
        progress: takes short sentences about what is going on.

    Raises:
        GraphoptError: the model, samples, gradients or bound are not usable, or options contradict each other.
        GateMissedError: the amount that was asked for misses the bound that was named; nothing is returned.
    """
    started = time.perf_counter()
    chosen = criterion or ("magnitude" if data is None else "sparsegpt")
    request = Request(
        bound=bound or Bound(), provider=provider, contrib=contrib, budget=budget, seed=seed,
        threads=thread_counts(threads), measure=measure, amount=amount, criterion=chosen, spread=scope,
        pattern=pattern, only=tuple(only), skip=tuple(skip), storage=storage, optimize=optimize,
    )  # fmt: skip
    given = Given.load(model, data, batch=batch, seed=seed, shapes=shapes)
    if chosen in SAMPLED and data is None:
        raise DataError(f"{chosen} looks at what flows into the layers", at="--data", hint="give --data")
    if (chosen == "gradient") != (gradients is not None):
        raise SpecError("the criterion gradient and a file of gradients go together", at="--gradients")
    read = None if gradients is None else read_gradients(gradients, given.original)
    task = _Task(given, request, progress, read)
    result = task.replayed(decisions) if decisions is not None else task.run()
    return result.since(started)


@dataclass(frozen=True)
class _Made:
    """What the pass made: the model, the pass, the amount, what it said, of which layer, and how good it is."""

    model: Model
    step: spec.PassStep
    amount: float
    notes: list[str]
    whys: Mapping[str, str]
    quality: Quality | None


class _Task(LossyTask):
    """One model, and how amounts are tried and judged."""

    def __init__(
        self, given: Given, request: Request, progress: Progress | None, gradients: Mapping[str, Any] | None
    ) -> None:
        super().__init__(given, request, progress)
        self.request = request
        self.settings = replace(self.settings, gradients=gradients)
        self.tried: list[Tried] = []

    def run(self) -> Sparsified:
        """Return the result.

        Raises:
            GateMissedError: it misses the bound that was named.
        """
        request = self.request
        if request.searches and self.judging is None:
            raise SpecError(
                "how much becomes zero is not said, and there is nothing to find it by", at="--amount",
                hint="--amount 0.8, --pattern 2:4, or --data for the most that keeps the accuracy",
            )  # fmt: skip
        if self.judging is not None:
            self.progress("running the dense model")
            self.check.prepare()  # what is wrong with samples or metric shows before the work
        base = self._base()
        layers = self._layers(base)
        if not layers:
            return self._nothing("no weight has as many elements that zeros would be worth it")
        if request.searches:
            return self._searched(base)
        made, quality = self._tried_at(base, request.amount or 0.0)
        if quality is not None and not quality.ok and request.named:
            raise GateMissedError(
                f"{self.tried[-1].form} misses the bound: {'; '.join(quality.failures)}",
                hint="loosen it, or leave out --amount: then the most within the bound is looked for",
            )
        return self._finished(base, made)

    def _base(self) -> Model:
        """Return what is made sparse: gradients know the weights of the original only."""
        if not self.request.optimize or self.request.criterion == "gradient":
            return self.original.copy()
        self.progress("simplifying the graph")
        return self.canonical()

    def _layers(self, base: Model) -> list[SparseLayer]:
        """Return the weights that may become sparse.

        Raises:
            SpecError: the globs leave none.
            ModelError: all weights are quantized.
        """
        request = self.request
        found: list[SparseLayer] = []
        blocked: dict[str, str] = {}
        for graph in base.graphs():
            layers, why = find(base, graph, request.only, request.skip)
            found += layers
            blocked |= why
        if not found and not blocked and (request.only or request.skip):
            known = [layer for graph in base.graphs() for layer in find(base, graph)[0]]
            if known:
                raise SpecError(
                    "no layer is left by these globs", at="--only" if request.only else "--skip",
                    hint=f"layers are called like '{label(known[0].node)}'",
                )  # fmt: skip
        if not found and any("quantized" in why for why in blocked.values()):
            raise ModelError(
                "the model is quantized", at=str(self.original.path or "<memory>"), hint="make it sparse before that"
            )
        return found

    def _searched(self, base: Model) -> Sparsified:
        """Return the result with the most zeros that keeps the bound."""
        low, high = 0.0, MOST
        best: _Made | None = None
        at = MOST
        while high - low > FINE or at == MOST:
            made, quality = self._tried_at(base, at)
            assert quality is not None
            if quality.ok:
                low, best = at, made
            else:
                high = at
            if low >= MOST or high <= LEAST:
                break
            at = round(max((low + high) / 2, LEAST), 3)
        if best is None:
            return self._nothing(f"{LEAST:.0%} of zeros miss the bound: {self.tried[-1].verdict}")
        return self._finished(base, best)

    def _tried_at(self, base: Model, amount: float) -> tuple[_Made, Quality | None]:
        """Return what the pass makes of the base, and how good it is."""
        request, step = self.request, self.request.step(amount)
        form = f"{request.pattern or f'{amount:.1%} zeros'} by {request.criterion}"
        self.progress(f"trying {form}")
        whys: dict[str, str] = {}

        def watch(_: PassRecord, change: Change) -> None:
            whys[change.where] = change.why

        settings = replace(self.settings, watch=watch)
        result = self.run_passes((step,), base, self.calibrating, settings)
        quality = self.quality(result.model)
        verdict = "not judged" if quality is None else "keeps the bound" if quality.ok else "; ".join(quality.failures)
        record = result.report.passes[0]
        self.tried.append(Tried(form, record.changes, None, quality, None, verdict))
        pattern = Pattern.parse(request.pattern)
        zeros = pattern.amount if pattern else amount
        return _Made(result.model, step, zeros, record.notes, whys, quality), quality

    def _around(self) -> tuple[tuple[spec.Step, ...], tuple[spec.Step, ...]]:
        """Return the passes before and after: gradients know the weights of the original only."""
        if not self.request.optimize:
            return (), ()
        if self.request.criterion == "gradient":
            return (), (*self.prefix(), *self.lowering())
        return self.prefix(), self.lowering()

    def _finished(self, base: Model, made: _Made) -> Sparsified:
        """Return a model that was tried, lowered, with its report."""
        before, after = self._around()
        model = made.model
        if after:
            self.progress("lowering")
            model = Pipeline(after).run(model, samples=self.given.feeds, settings=self.settings).model
        order_constants(model.graph)  # so that a replay writes the same bytes
        pipeline = Pipeline((*before, made.step, *after))
        report = self._report(model, "sparse", self._rows(base, made))
        report.amount, report.pipeline = made.amount, str(pipeline)
        report.decisions = self.decisions(pipeline).to_dict()
        report.quality = self.quality(model) if after else made.quality
        report.notes += [*made.notes, "ONNX Runtime computes with the zeros: it takes as long as without"]
        if self.judging is None:
            report.notes.append("what it costs in accuracy was not judged: there are no samples (--data)")
        return Sparsified(model, report)

    def _rows(self, base: Model, made: _Made) -> list[SparseRow]:
        """Return a row for each weight that could be made sparse."""
        request = self.request
        now = {
            layer.label: layer
            for graph in made.model.graphs()
            for layer in find(made.model, graph, request.only, request.skip)[0]
        }
        rows = []
        for graph in base.graphs():
            layers, blocked = find(base, graph, request.only, request.skip)
            for layer in layers:
                zeros = float(np.mean(now[layer.label].values() == 0)) if layer.label in now else 0.0
                rows.append(SparseRow(layer.label, layer.node.op, layer.size, zeros, made.whys.get(layer.label, "")))
            rows += [SparseRow(name, "", 0, 0.0, why) for name, why in blocked.items()]
        return rows

    def _nothing(self, reason: str) -> Sparsified:
        """Return the lossless model, or the very input, and why nothing became zero."""
        lossless = self.lossless() if self.request.optimize else None
        model = self.original.copy() if lossless is None else lossless.model
        report = self._report(model, "lossless", [])
        report.reason, report.quality = reason, self.quality(model)
        if lossless is not None:
            report.pipeline, report.decisions = lossless.report.pipeline, lossless.report.decisions
        return Sparsified(model, report)

    def replayed(self, decisions: GivenDecisions) -> Sparsified:
        """Return what was decided before."""
        model, found, reason = self.replay(decisions)
        report = self._report(model, "sparse", [])
        report.reason, report.pipeline, report.decisions = reason, found.pipeline, found.to_dict()
        report.quality = self.quality(model)
        return Sparsified(model, report)

    def _report(self, model: Model, decision: str, rows: list[SparseRow]) -> SparsityReport:
        request = self.request
        files = FileSizes.of(model)
        before = self.original
        small = before.weight_bytes() <= min(ZIPPED, INLINE_LIMIT)
        zipped = len(gzip.compress(before.emit().SerializeToString(deterministic=True), 6)) if small else None
        return self.report_of(
            SparsityReport, model, decision=decision, tried=self.tried, bytes_after=files.file,
            criterion=request.criterion, spread=request.spread, pattern=request.pattern,
            layers=rows, files=files, before_gzip=zipped,
        )  # fmt: skip
