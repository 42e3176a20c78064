"""`factorize`: layers as two thinner ones where that is faster and within the bound, else the lossless model and why.

    canonical form → factors of every layer, from samples → what each rank loses at the outputs → how long it takes
    → the fastest ranks within the bound, tried on samples that chose nothing → factors, lowering
    → time against the lossless model

Everything that is kept was run: ranks that miss the bound together are raised, and a result that is not faster than the
lossless model is not returned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graphopt import spec
from graphopt.analysis.factorable import find
from graphopt.data import Spec
from graphopt.decisions import Decisions
from graphopt.edit import order_constants
from graphopt.errors import GateMissedError, SpecError
from graphopt.factor_choice import FactorChoice, Picks
from graphopt.factor_request import FactorizeRequest
from graphopt.factorization_report import FactorizationReport, FactorRow
from graphopt.judge import Comparison, Progress
from graphopt.lossy import BUDGET, LOSSLESS_SHARE, Finished, Given, LossyTask, check_floats, faster, in_words
from graphopt.lossy_report import Tried
from graphopt.model import Model, Source
from graphopt.names import matches
from graphopt.optimizer import Shapes, thread_counts
from graphopt.pipeline import Pipeline
from graphopt.quality import Bound, Quality

NEARER = 4
"""Times that a latency is aimed at anew, by what was measured."""


class Factorized(Finished[FactorizationReport]):
    """A finished run: the model, and what was done to it."""


def factorize(
    model: Source,
    *,
    data: Spec = None,
    max_error: float | None = None,
    bound: Bound | None = None,
    rank: int | None = None,
    energy: float | None = None,
    target_latency: float | None = None,
    embeddings: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    measure: bool = True,
    provider: str = "cpu",
    threads: int | Sequence[int] | None = 1,
    contrib: bool = False,
    shapes: Shapes | None = None,
    batch: int = 1,
    budget: float = BUDGET,
    seed: int = 0,
    decisions: Decisions | str | Path | None = None,
    progress: Progress | None = None,
) -> Factorized:
    """Return a faster model whose layers have low rank; the lossless one where none is.

    Args:
        model: a path, `Model` or `ModelProto`; left untouched.
        data: representative samples as in `load_samples`; half of them choose, the others judge.
        max_error: relative error of every output (without samples: of each weight).
        bound: other bounds on the outputs, or a metric; without any, what suits the outputs.
        rank: the same for every layer, in place of a choice.
        energy: part of its outputs' power that each layer keeps, in place of a choice.
        target_latency: part of the lossless model's measured time to come down to, losing as little as possible.
        embeddings: whether embedding tables get factors, too: the file gets smaller, the model no faster.
        only: globs of the layers to look at; empty for all.
        skip: globs of layers that stay.
        measure: whether layers and the result are timed; without, MACs stand for time.
        provider: where the result will run.
        threads: ORT's intra-op threads to time with; several are all timed, layers alone with the first.
        contrib: whether operators of ORT's own domains may be used.
        shapes: shapes of inputs by name, for random feeds where there are no samples.
        batch: how many rows of `.npz` samples make a feed.
        budget: seconds that timing may take, about.
        seed: for everything random.
        decisions: of an earlier run (a file, or `Decisions`): do the same again, without measuring.
        progress: takes short sentences about what is going on.

    Raises:
        GraphoptError: the model, samples or options are not usable, or options contradict each other.
        GateMissedError: a target cannot be reached, or ranks asked for by name miss the bound.
    """
    started = time.perf_counter()
    request = FactorizeRequest(
        bound=bound or Bound(), max_error=max_error, rank=rank, energy=energy, target_latency=target_latency,
        embeddings=embeddings, sampled=data is not None, only=tuple(only), skip=tuple(skip), measure=measure,
        provider=provider, threads=thread_counts(threads), contrib=contrib, budget=budget, seed=seed,
    )  # fmt: skip
    given = Given.load(model, data, batch=batch, seed=seed, shapes=shapes)
    task = _Task(given, request, progress)
    result = task.replayed(decisions) if decisions is not None else task.run()
    return result.since(started)


class _Task(LossyTask):
    """One model, and how its ranks are chosen, judged and timed."""

    def __init__(self, given: Given, request: FactorizeRequest, progress: Progress | None) -> None:
        super().__init__(given, replace(request, bound=request.judged), progress)
        self.request = request
        self.tried: list[Tried] = []
        self.notes: list[str] = []
        self.choice: FactorChoice | None = None
        self.base_macs: int | None = None

    def run(self) -> Factorized:
        """Return what was asked for."""
        check_floats(self.original, "factorize")
        if self.judging is not None:
            self.progress("running the float model")
            self.check.prepare()  # what is wrong with samples or metric shows before minutes of work
        base = self.canonical()
        self.base_macs = self.macs(base)
        request = self.request
        known = {id(node): base.metadata(node) for node in base.graph.nodes}
        found = find(base.graph, known, tables=request.embeddings)
        layers = [layer for layer in found if matches(layer.label, request.only, request.skip)]
        if (request.only or request.skip) and not layers:
            raise SpecError("no layer has a name like that", at="--only" if request.only else "--skip")
        budget = (1 - LOSSLESS_SHARE) * 2 / 3 * request.budget
        self.choice = FactorChoice(
            base, layers, self.calibrating, self.given.feeds.first(), request, budget=budget,
            progress=self.progress,
        )  # fmt: skip
        self.choice.prepare()
        if request.goal == "latency":
            return self._to_latency(base)
        if request.goal == "bound":
            return self._within(base)
        return self._as_asked(base)

    def _within(self, base: Model) -> Factorized:
        """Return the fastest model that keeps the bound."""
        choice = self._chosen()
        if not choice.open:
            return self._nothing(self._why_none())
        found = choice.within(self._judge)
        if found is None:
            return self._nothing(
                "no choice of ranks keeps the bound: " + (self.tried[-1].verdict if self.tried else "")
            )
        return self._timed(base, found[0])

    def _as_asked(self, base: Model) -> Factorized:
        """Return the model with the ranks asked for, in the layers that are faster by them.

        Raises:
            GateMissedError: it misses a bound that was named.
        """
        choice = self._chosen()
        picks = choice.fastest()
        if not picks:
            return self._nothing(self._why_none())
        return self._timed(base, picks)

    def _timed(self, base: Model, picks: Picks) -> Factorized:
        """Return the model that a choice makes, if it is faster than the lossless one, and keeps what was asked."""
        model, steps = self._built(base, picks)
        quality = self.quality(model)
        if quality is not None and not quality.ok and (self.request.named or self.request.goal == "bound"):
            raise GateMissedError(
                "these ranks miss the bound: " + "; ".join(quality.failures),
                hint="leave out --rank and --energy: then ranks are chosen within the bound",
            )
        timing = self.compare([("factors", model)])[0] if self.request.measure else None
        if timing is not None and not faster(timing):
            why = f"not faster than the lossless model: {in_words(timing)}"
            if not any(one.solved.split.way == "table" for one in picks.values()):
                return self._nothing(why, timing)
            self.notes.append(f"{why}; tables were asked for, which make it smaller")
        return self._finished(model, steps, picks, quality, timing)

    def _to_latency(self, base: Model) -> Factorized:
        """Return the model of least loss that takes the part of the time that was asked for.

        Raises:
            GateMissedError: that cannot be reached, or what reaches it misses a bound that was named.
        """
        choice, target = self._chosen(), self.request.target_latency or 1.0
        whole = self._seconds()
        aim, best = (1.0 - target) * whole, math.inf
        for _ in range(NEARER):
            most = choice.saved_at_most if choice.open else 0.0
            last = aim >= most
            picks = choice.fastest() if last else choice.gentlest(aim)
            if not picks:
                break
            model, steps = self._built(base, picks)
            timing = self.compare([("factors", model)])[0]
            ratio = timing.overall.median
            best = min(best, ratio)
            quality = self.quality(model)
            self._note(picks, quality, timing, ratio)
            if ratio <= target:
                if quality is not None and not quality.ok and self.request.named:
                    raise GateMissedError(
                        f"{target:g} of the time is reached, not within the bound: " + "; ".join(quality.failures)
                    )
                return self._finished(model, steps, picks, quality, timing)
            if last:
                break
            aim *= max(1.05, (1.0 - target) / max(1.0 - ratio, 0.2 * (1.0 - target)))
        said = f"the best reached is {best:.3f}" if best < math.inf else self._why_none()
        raise GateMissedError(
            f"{target:g} of the lossless model's time cannot be reached: {said}", at="--target-latency"
        )

    def _seconds(self) -> float:
        """Return the lossless model's time in seconds, as layers are timed."""
        from graphopt.kernel_times import Subject, run_all  # noqa: PLC0415  (of this goal only)

        subject = Subject(self.lossless().model, frozenset())
        run_all(
            [subject], [self.given.feeds.first()], provider=self.request.provider, threads=self.request.threads[0],
            budget=2.0, profile=False,
        )  # fmt: skip
        return subject.seconds

    def _chosen(self) -> FactorChoice:
        assert self.choice is not None
        return self.choice

    def _judge(self, picks: Picks) -> Quality:
        """Return how good a choice is, on the samples that judge."""
        self.progress(f"trying {len(picks)} layers with factors ({len(self.tried) + 1})")
        quality = self.quality(self._chosen().trials.model({k: (c.solved, c.rank) for k, c in picks.items()}))
        assert quality is not None
        self._note(picks, quality)
        return quality

    def _note(
        self, picks: Picks, quality: Quality | None, timing: Comparison | None = None, predicted: float | None = None
    ) -> None:
        verdict = "not judged"
        if quality is not None:
            verdict = "keeps the bound" if quality.ok else "; ".join(quality.failures)
        self.tried.append(Tried("low rank", len(picks), predicted, quality, timing, verdict))

    def _built(self, base: Model, picks: Picks) -> tuple[Model, tuple[spec.Step, ...]]:
        """Return what factors and the lowering passes make of the canonical model, and the passes."""
        self.progress("making factors")
        ranks = tuple(f"{label}={one.name}" for label, one in picks.items())
        dead = spec.PassStep("eliminate-dead")
        options = {"ranks": ranks} | ({"embeddings": True} if self.request.embeddings else {})
        factors = spec.PassStep("factorize-layers", options)
        steps = (factors, dead, *self.lowering(), spec.PassStep("eliminate-common"), dead)
        return Pipeline(steps).run(base, samples=self.calibrating, settings=self.settings).model, steps

    def _finished(
        self, model: Model, steps: tuple[spec.Step, ...], picks: Picks, quality: Quality | None,
        timing: Comparison | None,
    ) -> Factorized:  # fmt: skip
        order_constants(model.graph)  # so that a replay writes the same bytes
        pipeline = Pipeline((*self.prefix(), *steps))
        report = self._report(model, self._rows(picks))
        report.pipeline, report.quality, report.timing = str(pipeline), quality, timing
        report.decisions = self.decisions(pipeline).to_dict()
        report.error, report.notes = _error(quality), list(self.notes)
        if quality is None:
            report.notes.append("what it costs in accuracy was not judged: there are no samples (--data)")
        return Factorized(model, report)

    def _nothing(self, reason: str, timing: Comparison | None = None) -> Factorized:
        """Return the lossless model, and why nothing was factorised."""
        lossless = self.lossless()
        report = self._report(lossless.model, self._rows({}))
        report.decision, report.reason, report.timing = "lossless", reason, timing
        report.pipeline, report.decisions = lossless.report.pipeline, lossless.report.decisions
        report.quality = self.quality(lossless.model)
        return Factorized(lossless.model, report)

    def _why_none(self) -> str:
        """Return in a line why no layer gets factors."""
        whys = dict.fromkeys(choice.why for choice in self._chosen().choices.values() if choice.why)
        if not whys:
            return "no layer has a weight" if not self._chosen().choices else "no choice of ranks is faster"
        listed = list(whys)
        return "no layer gets factors: " + "; ".join(listed[:3]) + (" …" if len(listed) > 3 else "")

    def _rows(self, picks: Picks) -> list[FactorRow]:
        rows = []
        for label, choice in self._chosen().choices.items():
            timed = self.request.measure and math.isfinite(choice.seconds) and choice.layer.port == 1
            micros = choice.seconds * 1e6 if timed else None
            one = picks.get(label)
            if one is None:
                why = choice.why or "its ranks would lose too much beside the others"
                rows.append(FactorRow(label, choice.layer.node.op, "whole", why, micros))
                continue
            split = one.solved.split
            what = "numbers" if split.way == "table" else "MACs"
            why = f"{one.rank * split.macs / split.whole:.2f} of its {what}"
            taken = one.seconds * 1e6 if micros is not None else None
            rows.append(FactorRow(label, choice.layer.node.op, one.name, why, micros, taken, one.error))
        return rows

    def _report(self, model: Model, rows: Sequence[FactorRow]) -> FactorizationReport:
        request = self.request
        return self.report_of(
            FactorizationReport, model, bound={**request.judged.to_dict(), "max_error": request.max_error},
            tried=self.tried, goal=request.goal, layers=list(rows), macs_before=self.base_macs,
            macs_after=self.macs(model),
        )  # fmt: skip

    def replayed(self, decisions: Decisions | str | Path) -> Factorized:
        """Return what was decided before."""
        model, found, reason = self.replay(decisions)
        report = self._report(model, [])
        report.reason, report.pipeline, report.quality = reason, found.pipeline, self.quality(model)
        report.decisions, report.error = found.to_dict(), _error(report.quality)
        return Factorized(model, report)


def _error(quality: Quality | None) -> float | None:
    """Return the relative error at the worst output."""
    return None if quality is None or not quality.outputs else math.sqrt(quality.error)
