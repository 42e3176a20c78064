"""`optimize`: the default pipeline, what pays of it, checked against the original and timed against it."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from graphopt import environment, spec
from graphopt.base import Target
from graphopt.data import Spec, load_samples
from graphopt.decisions import Decisions, Outcome, Selection, checked, read_decisions
from graphopt.errors import ModelError, SpecError
from graphopt.gate import Gate, kept
from graphopt.importer import paused_gc
from graphopt.judge import Condition, Judge, Progress, judging
from graphopt.model import Model, Snapshot, Source, load
from graphopt.pipeline import OnFailure, Pipeline, Result, Run, Settings, Verify
from graphopt.profit import Family, Search, static_selection
from graphopt.random_feeds import described
from graphopt.report import Report
from graphopt.samples import Samples
from graphopt.timing import prepare

Stage = Literal["canonical", "lowering"]
Shapes: TypeAlias = Mapping[str, Sequence[int]]

DEFAULT_OPSET = 17

CLEANUP = ", ".join(
    (
        "canonicalize",
        "fold-constants",
        "unpack-sequences",
        "simplify-shapes",
        "fold-if",
        "hoist-loop-invariants",
        "eliminate-identity",
        "fuse-activations",
        "fuse-gelu",
        "fuse-softmax",
        "fuse-normalization",
        "fold-affine",
        "expand-einsum",
        "fuse-convs",
        "fuse-linear",
        "merge-parallel",
        "sink-transposes",
        "hoist-slices",
        "fuse-movement",
        "fuse-parts",
        "eliminate-casts",
        "eliminate-common",
        "eliminate-dead",
    )
)
"""The canonical stage, repeated until it changes nothing."""

LOWERING = ", ".join(
    (
        "lower-conv1d",
        "lower-upsampling",
        "widen-channels",
        "lower-pools",
        "lower-affine",
        "lower-normalization",
        "lower-activations",
        "lower-softmax",
        "lower-attention",
        "flush-denormals",
    )
)
"""The lowering stage: once, after the canonical one.  Its passes look at the target."""

BUDGET = 40.0
"""Seconds that measuring may take."""

SEARCH_SHARE = 0.7
"""Part of the budget for what pays; the rest is for the last gate."""


@functools.cache
def default_pipeline(opset: int | None = DEFAULT_OPSET, stage: Stage = "lowering") -> Pipeline:
    """Return the passes of `optimize`.

    Args:
        opset: upgrade to at least this one first; None leaves it.
        stage: the last one that runs: `canonical` keeps to standard operators in one spelling, for later work on the
            graph; `lowering` goes on to forms that are good for the target.
    """
    upgrade = f"upgrade-opset{{to={opset}}}, " if opset is not None else ""
    lowering = f", {LOWERING}, eliminate-dead" if LOWERING and stage == "lowering" else ""
    return Pipeline(f"{upgrade}repeat({CLEANUP}){lowering}")


def optimize(
    model: Source,
    *,
    pipeline: Pipeline | str | None = None,
    data: Spec = None,
    measure: bool | None = None,
    verify: Verify = "end",
    opset: int | None = DEFAULT_OPSET,
    stage: Stage = "lowering",
    contrib: bool = False,
    elsewhere: bool = False,
    seed: int = 0,
    threads: int | Sequence[int] | None = None,
    provider: str = "cpu",
    shapes: Shapes | Sequence[Shapes] | None = None,
    batch: int = 1,
    budget: float = BUDGET,
    decisions: Decisions | str | Path | None = None,
    settings: Settings | None = None,
    on_failure: OnFailure = "continue",
    progress: Progress | None = None,
) -> Result:
    """Return a faster model with equal outputs, or the input itself where nothing was gained.

    Args:
        model: a path, `Model` or `ModelProto`; left untouched.
        pipeline: passes to run instead of the default ones; a text as in `parse_pipeline`.
        data: samples as in `load_samples`; None makes random ones.
        measure: time in ORT what optional passes bring, leave out what does not pay, and keep the input where the
            result is slower.  None: yes, but for `elsewhere` and the canonical stage.
        verify: numeric check after each pass, at the end, or off.
        opset: upgrade to at least this opset first; None leaves it.  Of the default pipeline only.
        stage: the last stage to run.  Of the default pipeline only.
        contrib: whether operators of ORT's own domains may be used.
        elsewhere: the result will run on another machine: nothing is timed, static defaults are used.
        seed: for random feeds and the order of timings.
        threads: ORT's intra-op threads for the measurement; several are all measured.  None: 1, and all cores.
        provider: where the result will run.
        shapes: shapes of inputs by name, for random feeds; several such mappings are all measured.
        batch: how many rows of `.npz` samples make a feed.
        budget: seconds that measuring may take, about.
        decisions: of an earlier run (a file, or `Decisions`): do the same again, without measuring.
        settings: further settings; those named above win.
        on_failure: `continue` leaves a failing pass out; `stop` raises.
        progress: takes short sentences about what is going on.

    Raises:
        GraphoptError: the model, samples or decisions are not usable, or the options contradict each other.
    """
    started = time.perf_counter()
    counts = thread_counts(threads)
    target = Target(provider, counts[0], contrib, here=not elsewhere)
    settings = replace(settings or Settings(), verify=verify, seed=seed, target=target, on_failure=on_failure)
    measure = _whether_to_measure(measure, elsewhere=elsewhere, stage=stage, replay=decisions is not None)
    chosen = _pipeline(pipeline, opset, stage, replay=decisions is not None)
    if decisions is not None:
        _check_replay(opset=opset, stage=stage, threads=threads, budget=budget, contrib=contrib)
    with paused_gc():
        original = load(model)
        original.settled = original.snapshot()  # nobody else has it
    cases = []
    if measure or verify != "off":
        cases = [
            load_samples(data, original, batch=batch, seed=seed, shapes=one)
            for one in (shapes if isinstance(shapes, Sequence) else [shapes])
        ]
    task = _Task(original, chosen, _all(cases), settings, opset if pipeline is None else None)
    if decisions is not None:
        result = task.replayed(decisions)
    elif measure:
        conditions = _conditions(original, counts, cases, seed)
        with judging(conditions, provider=provider, seed=seed, progress=progress or _silent) as judge:
            result = task.measured(judge, budget)
    else:
        result = task.unmeasured()
    result.report.environment = environment.describe()
    result.report.seconds = time.perf_counter() - started
    return result


@dataclass(frozen=True)
class _Task:
    """One model, one pipeline, and how its results are made."""

    original: Model
    pipeline: Pipeline
    samples: Samples | None
    settings: Settings
    opset: int | None

    def run(self, selection: Selection, settings: Settings | None = None, *, own: bool = False) -> Result:
        """Return what a selection makes, checked as the settings say; with `own`, of the original itself."""
        settings = settings or self.settings
        settings = replace(settings, skip=settings.skip | selection.skip)
        chosen = selection.applied(self.pipeline)
        if chosen is None:
            return Result(self.original.copy(), Run(self.pipeline, self.original, None, settings).report)
        result = chosen.run(self.original, samples=self.samples, settings=settings, own=own)
        self._check_opset(result.report)
        return result

    def unmeasured(self) -> Result:
        """Return what runs by default."""
        selection, original = static_selection(self.pipeline), self.original.snapshot()
        own = self.samples is None  # random ones may look at the original again
        return self._finished("optimized", selection, self.run(selection, own=own), original)

    def measured(self, judge: Judge, budget: float) -> Result:
        """Return what pays, if it is no slower than the input."""
        selection = static_selection(self.pipeline)
        judge.progress("running the pipeline")
        result = self.run(selection)
        begun = time.monotonic()
        judge.deadline = begun + SEARCH_SHARE * budget
        search = Search(judge, self.pipeline, self._quick(result.report), selection, result)
        if search.best() != selection:
            judge.progress("running what was chosen")
            result = self.run(search.selection)
        judge.deadline = begun + budget
        gate = Gate(judge, self.original, self.pipeline, self.run)
        outcome, selection, result = gate.passed((search.selection, result), search.families)
        _record(result.report, judge, gate, search.families, budget, time.monotonic() - begun)
        return self._finished(outcome, selection, result, self.original.snapshot())

    def replayed(self, decisions: Decisions | str | Path) -> Result:
        """Return what was decided before."""
        path = None if isinstance(decisions, Decisions) else decisions
        found = decisions if isinstance(decisions, Decisions) else read_decisions(decisions)
        checked(found, self.original, path)
        settings = found.settings(self.settings)
        if found.pipeline:
            result = Pipeline(found.pipeline).run(self.original, samples=self.samples, settings=settings)
        else:
            result = Result(self.original.copy(), Run(self.pipeline, self.original, None, settings).report)
        if found.result == "input kept":
            result = kept(self.original, result.report, "so it was decided before")
        report = result.report
        report.decision = found.result
        report.decided(found.to_dict())
        report.reason = report.reason or f"as decided before{f' in {path}' if path else ''}"
        return result

    def _quick(self, report: Report) -> Any:
        """Return how alternatives are made: their outputs checked only where a pass has failed before."""
        verify: Verify = "each" if report.failures else "off"
        settings = replace(
            self.settings, verify=verify, on_failure="continue", print_after=frozenset(), reproducers=None
        )
        return lambda selection: self.run(selection, settings)

    def _finished(self, outcome: Outcome, selection: Selection, result: Result, original: Snapshot) -> Result:
        report = result.report
        if report.decision != "input kept":
            report.decision = outcome
        pipeline, settings = self.pipeline, self.settings

        def decisions() -> dict[str, Any]:
            made = None if outcome == "input kept" else selection.applied(pipeline)
            used = selection.skipping(settings.skip) if made else Selection()
            return Decisions.of(original, made, used, settings, outcome).to_dict()

        report.decided(decisions)
        return result

    def _check_opset(self, report: Report) -> None:
        """Raise ModelError: an opset asked for by number was not reached."""
        if self.opset in (None, DEFAULT_OPSET) or report.opset_after >= (self.opset or 0):
            return
        said = [text for r in report.passes if r.name == "upgrade-opset" for text in (*r.notes, r.failure) if text]
        raise ModelError(
            f"the model stays at opset {report.opset_after}, not {self.opset}", at=report.model, hint="; ".join(said)
        )


def thread_counts(threads: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the numbers of threads to measure at, each once; by default one, and as many as there are cores.

    Raises:
        SpecError: none, or one below 1.
    """
    if threads is None:
        return tuple(dict.fromkeys((1, environment.usable_cores() or 1)))
    counts = tuple(dict.fromkeys([threads] if isinstance(threads, int) else threads))
    if not counts or min(counts) < 1:
        raise SpecError(f"threads are whole numbers from 1, not {threads}")
    return counts


def _whether_to_measure(measure: bool | None, *, elsewhere: bool, stage: Stage, replay: bool) -> bool:
    if measure and elsewhere:
        raise SpecError(
            "the result is to run elsewhere: timing it here would say nothing",
            hint="leave out --measure, or run graphopt there and bring its --write-decisions back",
        )
    if measure and replay:
        raise SpecError("decisions are replayed without measuring", hint="leave out --measure or --decisions")
    if measure is not None:
        return measure
    return not (elsewhere or replay or stage == "canonical")


def _pipeline(given: Pipeline | str | None, opset: int | None, stage: Stage, *, replay: bool) -> Pipeline:
    if given is None:
        return default_pipeline(opset, stage)
    if replay:
        raise SpecError("decisions have a pipeline of their own", hint="leave out --pipeline or --decisions")
    if opset not in (None, DEFAULT_OPSET):
        raise SpecError("opset belongs to the default pipeline", hint=f"put upgrade-opset{{to={opset}}} into yours")
    if stage != "lowering":
        raise SpecError("a stage belongs to the default pipeline", hint="leave out --stage or --pipeline")
    return parse_pipeline(given) if isinstance(given, str) else given


REPLAYED: Mapping[str, Any] = {
    "opset": DEFAULT_OPSET, "stage": "lowering", "threads": None, "contrib": False, "budget": BUDGET,
}  # fmt: skip
"""What decisions settle themselves, and what it is where nothing is asked for."""


def _check_replay(**options: Any) -> None:
    """Raise SpecError: something is asked for that the decisions settle, or that only measuring needs."""
    for name, value in options.items():
        if value != REPLAYED[name]:
            what = "are replayed without measuring" if name == "budget" else f"have their own {name}"
            raise SpecError(f"decisions {what}", at=f"--{name}", hint=f"leave out --{name} or --decisions")


def _all(cases: Sequence[Samples]) -> Samples | None:
    """Return the samples of all sets of shapes as one."""
    if len(cases) < 2:
        return cases[0] if cases else None
    return _Chained(cases)


class _Chained(Samples):
    """Samples one set after the other; described when asked, since random feeds then know their shapes."""

    def __init__(self, cases: Sequence[Samples]) -> None:
        self._cases = cases
        super().__init__(lambda: itertools.chain.from_iterable(cases), "", random=all(c.random for c in cases))

    @property
    def description(self) -> str:
        """All descriptions."""
        return described(self._cases)

    @description.setter
    def description(self, text: str) -> None:
        del text  # made from the cases


def _conditions(original: Model, counts: Sequence[int], cases: Sequence[Samples], seed: int) -> tuple[Condition, ...]:
    feeds = [prepare(original, case, seed) for case in cases]
    return Condition.all(counts, {prepared.shapes: prepared for prepared in feeds})


def _silent(_: str) -> None:
    """Say nothing."""


def _record(
    report: Report, judge: Judge, gate: Gate, families: Sequence[Family], budget: float, seconds: float
) -> None:
    """Enter into the report what was measured."""
    report.families = [family.to_dict() for family in families]
    report.measured = {
        "budget_seconds": budget, "seconds": seconds, "provider": judge.provider,
        "threads": list(dict.fromkeys(c.threads for c in judge.conditions)),
        "shapes": list(dict.fromkeys(c.feeds.shapes for c in judge.conditions)),
        "tried": [{"candidate": outcome, **comparison.to_dict()} for outcome, comparison in gate.tried],
    }  # fmt: skip
    if gate.tried:
        last = gate.tried[-1][1]
        worst = last.worst[1].to_dict() if last.ratios else {"ratio": 1.0, "interval": [1.0, 1.0]}
        report.timing = {**worst, **{k: v for k, v in last.to_dict().items() if k in ("same_graph", "conditions")}}


STAGES: Mapping[str, Stage] = {"default": "lowering", "canonical": "canonical"}
"""Words that stand for the steps of the default pipeline, up to a stage."""


def parse_pipeline(text: str) -> Pipeline:
    """Return the pipeline of a text form, in which the words of `STAGES` stand for steps of the default pipeline.

    Raises:
        SpecError: the text is not understood, or such a word stands in a `repeat` or has options.
    """
    return Pipeline(_expanded(spec.parse(text)))


def read_pipeline(path: str | Path) -> Pipeline:
    """Return the pipeline of a TOML file, in which the words of `STAGES` may stand too.

    Raises:
        SpecError: no such file, or not a pipeline.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot read the pipeline file: {error.strerror}", at=str(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError("the pipeline file is not text", at=str(path)) from error
    try:
        return Pipeline(_expanded(spec.from_toml(text)))
    except SpecError as error:
        error.at = f"{path}, {error.at}" if error.at else str(path)
        raise


def _expanded(steps: Iterable[spec.Step]) -> list[spec.Step]:
    """Return the steps, each word of `STAGES` replaced by what it stands for."""
    found: list[spec.Step] = []
    for step in steps:
        word = next((inner.name for inner in spec.pass_steps((step,)) if inner.name in STAGES), None)
        if word is None:
            found.append(step)
        elif step == spec.PassStep(word):
            found += default_pipeline(stage=STAGES[word]).steps
        else:
            raise SpecError(
                f"'{word}' stands for steps of the default pipeline: it has no options and stands in no 'repeat'",
                at=spec.to_text((step,)), hint=f"{word}, eliminate-dead",
            )  # fmt: skip
    return found
