"""Two models and samples -> do they agree?  Signatures, every output with ORT optimisations off and on, a task metric.

The gate is the error relative to the largest reference output.  Unless the caller names a tolerance, it follows from
the original's own difference between optimisations off and on, measured in the same run: three times that is always
accepted (below, the original does not agree with itself), and what is far above it is not, however small it looks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from graphopt.analysis.outputs import compute_precision, probability_outputs
from graphopt.compare import Comparison, OutputComparison, Tolerance, adapted, floor_tolerance, widened
from graphopt.data import load_function, load_samples
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.locate import Location
from graphopt.locate import locate as run_locate
from graphopt.metric import Evaluation, evaluate_pair
from graphopt.model import Model, Source, ValueSpec, load
from graphopt.runtime import Optimization, Session
from graphopt.samples import Feeds, Samples

Exactness = Literal["exact", "lossy"]

EXACT = 1e-5
"""Relative error of a rewrite that only reorders floating-point arithmetic."""

PLAIN = 1e-4
"""Largest relative error accepted between two models of which nothing else is known; thirty times the original's own
difference, but at least `EXACT`, where that is less: a wrong epsilon shows as 5e-5 in a model that keeps to 3e-7."""

ACROSS_PROVIDERS = 1e-3
"""The same on two providers: other kernels, sums in another order, fused multiply-add."""

PRECISION_FACTOR = 8
"""Roundings of the lowest precision that computes (2^-11 for float16) that an equal model may differ by."""

REFERENCE_SAMPLES = 16
"""How many samples a pipeline checks against."""

CACHE_BYTES = 1 << 28


@dataclass
class Validation:
    """What a comparison found.

    Attributes:
        rows: per output and ORT optimisation, the error reached beside the tolerance asked (`compare`).
        failures: in words, everything that was missed; empty when the models agree.
        notes: in words, what the reader should know and what fails nothing.
        samples: what was fed, in words; `random` tells whether it was made up.
        count: how many samples were compared.
        own: per output, the original's own relative difference between optimisations off and on.
        evaluation: the task metric, if one was asked for.
        location: where the difference begins, if asked for and there is one.
        providers: for each model, provider -> number of nodes that it really ran, when one was named.
        node_providers: the same by node.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: str = ""
    random: bool = False
    count: int = 0
    own: dict[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    location: Location | None = None
    providers: dict[str, dict[str, int]] = field(default_factory=dict)
    node_providers: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the models agree within all tolerances."""
        return not self.failures

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """The rows."""
        return self.rows

    @property
    def worst(self) -> float:
        """The largest relative error of any float output; 0 without one."""
        return max((row["relative"] for row in self.rows if row["relative"] is not None), default=0.0)

    def table(self) -> list[dict[str, Any]]:
        """Return the rows' main columns, for people."""
        return [{name: row.get(name) for name in TABLE_COLUMNS} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-able dict."""
        return {
            "ok": self.ok,
            "failures": self.failures,
            "notes": self.notes,
            "samples": self.samples,
            "random": self.random,
            "count": self.count,
            "outputs": self.rows,
            "own_difference": self.own,
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
            "location": None if self.location is None else self.location.to_dict(),
            "providers": self.providers,
            "node_providers": self.node_providers,
        }


TABLE_COLUMNS = (
    "output", "optimization", "ok", "relative", "tolerance", "max_abs", "max_rel", "cosine", "sqnr_db", "top1",
    "mismatch", "nonfinite", "worst_sample", "worst_index",
)  # fmt: skip


class Reference:
    """A model with its outputs on samples, ready to check any number of candidates against.

    Args:
        model: the original.
        samples: None makes random ones.
        optimization: ORT levels at which the two are compared, each with the same level of the original.
        threads: of ORT.
        provider: the original's.
        limit: at most this many samples; None for all.
        seed: of random samples.

    Outputs are kept in memory up to `CACHE_BYTES` and computed again beyond.
    """

    def __init__(
        self,
        model: Source,
        samples: Samples | None = None,
        *,
        optimization: Sequence[Optimization] = ("off", "all"),
        threads: int = 1,
        provider: str = "cpu",
        limit: int | None = REFERENCE_SAMPLES,
        seed: int = 0,
    ) -> None:
        self.model = model if isinstance(model, Model) else load(model)
        self.samples = samples if samples is not None else load_samples(None, self.model, seed=seed)
        self.modes: tuple[Optimization, ...] = tuple(optimization)
        self.threads = threads
        self.provider = provider
        self.limit = limit
        self.names = [output.name for output in self.model.outputs]
        self.probabilities = probability_outputs(self.model)
        self.precision = compute_precision(self.model)
        self.count = 0
        self._own: Comparison | None = None
        self._cache: dict[tuple[int, str], dict[str, Any]] = {}
        self._cached_bytes = 0
        self._sessions: dict[str, Session] = {}

    @property
    def description(self) -> str:
        """What is fed, in words."""
        return self.samples.description

    def first_feeds(self) -> Feeds:
        """Return the first sample."""
        return self.samples.first()

    def feeds(self, index: int) -> Feeds:
        """Return the sample at `index`."""
        return next(itertools.islice(iter(self.samples), index, None))

    def session(self, mode: Optimization) -> Session:
        """Return the original's session at an optimisation level; kept."""
        if mode not in self._sessions:
            self._sessions[mode] = Session(self.model, optimization=mode, threads=self.threads, provider=self.provider)
        return self._sessions[mode]

    def outputs(self, index: int, mode: Optimization, feeds: Feeds) -> dict[str, Any]:
        """Return the original's outputs on sample `index`."""
        key = (index, mode)
        if key in self._cache:
            return self._cache[key]
        found = self.session(mode).run(feeds, self.names)
        size = sum(v.nbytes for v in found.values() if isinstance(v, np.ndarray))
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cached_bytes += size
            self._cache[key] = found
        return found

    def own_differences(self) -> dict[str, OutputComparison]:
        """Return, by output, how the original differs from itself between the first and the last level."""
        if self._own is None:
            for index, feeds in enumerate(itertools.islice(self.samples, self.limit)):
                self._own_add(index, {mode: self.outputs(index, mode, feeds) for mode in self.modes})
        return {} if self._own is None else self._own.outputs

    def _own_add(self, index: int, found: Mapping[Optimization, dict[str, Any]]) -> None:
        if self._own is None:
            self._own = Comparison(self.names, self.probabilities)
        self._own.add(index, found[self.modes[0]], found[self.modes[-1]])

    def check(
        self, candidate: Source, exactness: Exactness = "exact", *, floor: Tolerance | None = None,
        strict: bool = False, provider: str | None = None, locate: bool = False, ceiling: Tolerance | None = None,
    ) -> Validation:  # fmt: skip
        """Compare a candidate with the original on the samples.

        Args:
            candidate: what was made of the original.
            exactness: `exact` gates errors; `lossy` reports them, and gates signature, shapes, types and NaN only.
            floor: tolerance in place of that for `exactness`.
            strict: accept nothing above `floor`, not even what the original differs by from itself.
            provider: the candidate's, if another.
            locate: find where the difference begins, when there is one.
            ceiling: tolerance that thirty times the original's own difference may reach, from `floor` up.

        A candidate that ORT refuses or that fails on a sample is a failure, not an error.

        Raises:
            DataError: the original fails on the samples.
        """
        model = candidate if isinstance(candidate, Model) else load(candidate)
        result = Validation(samples=self.samples.description, random=self.samples.random)
        result.failures += signature_differences(self.model, model)
        shared = [name for name in self.names if name in {o.name for o in model.outputs}]
        if not shared and self.names:
            return result
        try:
            sessions = {
                mode: Session(model, optimization=mode, threads=self.threads, provider=provider or self.provider)
                for mode in self.modes
            }
        except ModelError as error:
            result.failures.append(f"the candidate does not load: {error.what}")
            if locate:
                self._locate(model, result)
            return result
        comparisons = {mode: Comparison(shared, self.probabilities) for mode in self.modes}
        self._run(sessions, comparisons, shared, result)
        if floor is None:
            floor = self.floor(EXACT) if exactness == "exact" else Tolerance(None, mismatch=1.0)
        self._judge(comparisons, floor, ceiling, strict, result)
        if locate and not result.ok:
            self._locate(model, result)
        return result

    def floor(self, relative: float) -> Tolerance:
        """Return the tolerance for a relative error, no finer than the model computes."""
        return floor_tolerance(max(relative, PRECISION_FACTOR * self.precision / 2))

    def _run(
        self, sessions: Mapping[Optimization, Session], comparisons: Mapping[Optimization, Comparison],
        names: list[str], result: Validation,
    ) -> None:  # fmt: skip
        measure_own = self._own is None and len(self.modes) > 1
        for index, feeds in enumerate(itertools.islice(self.samples, self.limit)):
            found: dict[Optimization, dict[str, Any]] = {}
            for mode, session in sessions.items():
                found[mode] = self.outputs(index, mode, feeds)
                accepted = {name: value for name, value in feeds.items() if name in session.input_names}
                try:
                    outputs = session.run(accepted, names)
                except DataError as error:
                    result.failures.append(f"sample {index}, optimisation {mode}: the candidate fails: {error.what}")
                    continue
                comparisons[mode].add(index, found[mode], outputs)
            if measure_own:
                self._own_add(index, found)
            result.count += 1
        self.count = result.count

    def _judge(
        self, comparisons: Mapping[Optimization, Comparison], floor: Tolerance, ceiling: Tolerance | None,
        strict: bool, result: Validation,
    ) -> None:  # fmt: skip
        own = {} if self._own is None or len(self.modes) < 2 else self._own.outputs
        result.own = {name: item.relative for name, item in own.items() if item.floating}
        for mode, comparison in comparisons.items():
            tolerances = {}
            for path in comparison.outputs:
                base = floor if ceiling is None else adapted(floor, ceiling, own.get(path))
                tolerances[path] = base if strict else widened(base, own.get(path))
            for row in comparison.rows(tolerances):
                result.rows.append({"output": row["output"], "optimization": mode, **row})
                result.failures += [
                    f"output '{row['output']}', optimisation {mode}: {what}" for what in row["failures"]
                ]
        empty = {r["output"] for r in result.rows if r["type"] and not r["compared"]}
        result.notes += [
            f"output '{name}' has no finite value on these samples: nothing was compared" for name in sorted(empty)
        ]
        filled = [r for r in result.rows if r["elements"]]
        if filled and not any(r["compared"] for r in filled):
            result.failures.append("no output has a finite value on these samples: nothing was compared")

    def _locate(self, candidate: Model, result: Validation) -> None:
        failing = [row["worst_sample"] for row in result.rows if not row["ok"] and row["worst_sample"] is not None]
        try:
            result.location = run_locate(self.model, candidate, self.feeds(failing[0] if failing else 0))
        except ModelError as error:
            result.notes.append(f"the difference cannot be located: {error.what}")


def own_difference(model: Source, samples: Samples | None = None, *, threads: int = 1) -> dict[str, float]:
    """Return, by output, the model's own relative difference between ORT optimisations off and on."""
    reference = Reference(model, samples, threads=threads)
    return {name: item.relative for name, item in reference.own_differences().items()}


def signature_differences(a: Model, b: Model) -> list[str]:
    """Return in words how inputs and outputs differ; the second may know more about its outputs' shapes."""
    found = []
    for what, first, second in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        names, others = [s.name for s in first], [s.name for s in second]
        if names != others:
            if sorted(names) == sorted(others):
                found.append(f"the {what}s stand in another order: {', '.join(others)}")
            else:
                found += [f"{what} '{name}' is missing" for name in names if name not in others]
                found += [f"{what} '{name}' is new" for name in others if name not in names]
        by_name = {s.name: s for s in second}
        for spec in first:
            if spec.name in by_name:
                found += _spec_differences(what, spec, by_name[spec.name])
    return found


def _spec_differences(what: str, a: ValueSpec, b: ValueSpec) -> Iterable[str]:
    if a.kind != b.kind or (a.dtype is not None and b.dtype is not None and a.dtype != b.dtype):
        yield f"{what} '{a.name}' is {b.dtype or b.kind} instead of {a.dtype or a.kind}"
    if a.shape is None or b.shape is None:
        return
    pairs = list(zip(a.shape, b.shape, strict=False))
    wrong = any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs)
    narrowed = what == "input" and any(not isinstance(x, int) and isinstance(y, int) for x, y in pairs)
    if len(a.shape) != len(b.shape) or wrong or narrowed:
        yield f"{what} is {b} instead of {a}"


def validate(
    a: Source,
    b: Source,
    samples: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    exactness: Exactness | None = None,
    optimization: Sequence[Optimization] = ("off", "all"),
    provider: str = "cpu",
    other_provider: str | None = None,
    threads: int = 1,
    evaluate: str | Callable[..., Any] | None = None,
    max_drop: str | float | None = None,
    locate: bool = False,
    batch: int = 1,
    seed: int = 0,
) -> Validation:
    """Compare two models: signature, every output on every sample, and a task metric if there is one.

    Args:
        a: the original.
        b: what is compared with it.
        samples: as in `load_samples`; None makes random feeds.
        rtol: largest error relative to the largest reference output.  By default thirty times the original's own
            difference between optimisations off and on, between 1e-5 and 1e-4 (`exact`: 1e-5; two providers: 1e-3;
            more where the model computes in half precision); three times that difference is always accepted.
        atol: errors below this are accepted whatever their relative size.
        exactness: `exact`, or `lossy`: outputs are reported, not gated.
        optimization: ORT levels to compare at.
        provider: where `a` runs, and `b` unless `other_provider` is given.
        other_provider: where `b` runs.
        threads: of ORT.
        evaluate: `file.py:function` or a function: `predict -> number or 1-D scores`, higher is better.
        max_drop: largest drop of that metric, in its units or as `"1%"`; it then judges in place of the outputs,
            unless `rtol` or `atol` is given too.
        locate: when they differ, find the first inner tensor that does.
        batch: rows per feed where arrays are cut.
        seed: of random feeds and the bootstrap.

    Raises:
        GraphoptError: models, samples, provider or metric are not usable.  A difference is no error: see `.ok`.
    """
    first, second = (m if isinstance(m, Model) else load(m) for m in (a, b))
    loaded = samples if isinstance(samples, Samples) else load_samples(samples, first, batch=batch, seed=seed)
    reference = Reference(
        first, loaded, optimization=optimization, threads=threads, provider=provider, limit=None, seed=seed
    )
    if min(rtol or 0.0, atol or 0.0) < 0:
        raise SpecError("a tolerance cannot be negative", hint="0 asks for equal outputs")
    given = rtol is not None or atol is not None
    if exactness is None:
        exactness = "lossy" if evaluate is not None and max_drop is not None and not given else "exact"
        ceiling = reference.floor(ACROSS_PROVIDERS if other_provider not in (None, provider) else PLAIN)
    else:
        ceiling = None
    floor = floor_tolerance(rtol or 0.0, atol or 0.0) if given else None
    result = reference.check(
        second, exactness, floor=floor, strict=given, provider=other_provider, locate=locate,
        ceiling=ceiling if exactness == "exact" and not given else None,
    )  # fmt: skip
    if provider != "cpu" or other_provider is not None:
        _report_providers(reference, second, other_provider or provider, result)
    if evaluate is not None:
        _evaluate(reference, second, other_provider or provider, evaluate, max_drop, seed, result)
    return result


def _evaluate(
    reference: Reference, candidate: Model, provider: str, function: str | Callable[..., Any],
    max_drop: str | float | None, seed: int, result: Validation,
) -> None:  # fmt: skip
    name = function if isinstance(function, str) else getattr(function, "__name__", "function")
    called = load_function(function) if isinstance(function, str) else function
    other = Session(candidate, threads=reference.threads, provider=provider)
    found = evaluate_pair(called, name, reference.session("all").run, other.run, max_drop=max_drop, seed=seed)
    result.evaluation = found
    if not found.ok:
        result.failures.append(found.failure())


def _report_providers(reference: Reference, candidate: Model, other: str, result: Validation) -> None:
    """Run each model once under the profiler and note which provider ran each node."""
    feeds = reference.first_feeds()
    for label, model, provider in (("a", reference.model, reference.provider), ("b", candidate, other)):
        session = Session(model, threads=reference.threads, provider=provider, profile=True)
        session.run(feeds)
        nodes = session.node_providers()
        result.node_providers[label] = nodes
        result.providers[label] = dict(Counter(nodes.values()))
        if provider != "cpu" and set(nodes.values()) == {"CPUExecutionProvider"}:
            result.notes.append(f"model {label}: provider '{provider}' loaded, but every node ran on the CPU provider")
