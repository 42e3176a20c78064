"""Runs passes over a model: applies their changes, checks the model after each, rolls back what fails.

    load → passes → structural check after each → numeric check (each / end) → profit gate → result

The caller's model is never touched.  Snapshots keep the structure and share the weights, so rolling back costs
no memory to speak of.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import onnx

from graphopt import registry, spec, text
from graphopt.analysis.shapes import Shapes
from graphopt.base import Change, Context, Exactness, Loss, Pass, Target
from graphopt.data import load_samples
from graphopt.errors import DataError, GateMissedError, GraphoptError, ModelError, ProviderError, SpecError, last_frame
from graphopt.importer import paused_gc
from graphopt.model import Model, Snapshot, Source, from_snapshot, load
from graphopt.observation import Observer
from graphopt.order import sort_nodes
from graphopt.report import PassRecord, Report, Size
from graphopt.reproducer import save_reproducer
from graphopt.runtime import evaluate
from graphopt.samples import Samples
from graphopt.structure import Structure
from graphopt.tensors import mappings, release
from graphopt.training_steps import StepTrainer
from graphopt.validate import Reference, Validation

if TYPE_CHECKING:
    from graphopt.calibrate import Calibration

Verify = Literal["each", "end", "off"]
OnFailure = Literal["continue", "stop"]
Printer = Callable[[str], None]
Watch = Callable[[PassRecord, Change], None]
Site: TypeAlias = tuple[str, str, str]
"""One place of one pass: the pass's name, and the change's `where` and `what`."""

COLLECT_BYTES = 1 << 28
"""Bytes of replaced weights from which garbage is collected."""

RELEASE_ABOVE = 1 << 28
"""Bytes of weights from which pages of the file are given back after each change that may have read them."""

MAX_BLOCKED = 200
"""Near misses kept per pass in the report."""


@dataclass(frozen=True)
class Settings:
    """How a pipeline runs.

    Attributes:
        verify: numeric checks against the original, ORT optimisations off and on: after each pass, at the end, or
            never.  Structural checks are always made.
        on_failure: `continue` rolls a failing pass back and goes on; `stop` raises.
        seed: for everything random.
        target: where the result will run.
        print_after: pass names whose text diff is printed, or `all`.
        stop_after: name of a pass after whose first run the pipeline ends.
        limit: apply only the first `limit` changes (what bisection varies).
        skip: changes that are not applied: measured, and found not to pay.
        known: statistics of tensors, taken before, so that passes need not measure them again.
        gradients: of the task's loss, by initializer name of the original model.
        reproducers: folder for reproducers of failing passes, None to write none.
        printer: takes what `print_after` prints.
        watch: told of every change and near miss as passes propose them, with the record of the pass.
    """

    verify: Verify = "end"
    on_failure: OnFailure = "continue"
    seed: int = 0
    target: Target = field(default_factory=Target)
    print_after: frozenset[str] = frozenset()
    stop_after: str | None = None
    limit: int | None = None
    skip: frozenset[Site] = frozenset()
    known: Calibration | None = None
    gradients: Mapping[str, Any] | None = None
    reproducers: Path | None = None
    printer: Printer = print
    watch: Watch | None = None

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            SpecError: `verify` or `on_failure` is something else.
        """
        for name, kind in (("verify", Verify), ("on_failure", OnFailure)):
            if getattr(self, name) not in get_args(kind):
                raise SpecError(f"{name} is one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")


@dataclass
class Result:
    """A finished run: the model, what was done to it, and at which places optional passes changed it."""

    model: Model
    report: Report
    sites: list[Site] = field(default_factory=list)

    @property
    def proto(self) -> onnx.ModelProto:
        """The model as a new `ModelProto`; above 2 GB, external data stays a reference."""
        return self.model.proto

    def save(self, path: str | Path) -> None:
        """Write the model atomically.

        Raises:
            ModelError: it cannot be written; what was there is unchanged.
        """
        self.model.save(path)


class StopPipelineError(GateMissedError):
    """A pass failed and `on_failure` is `stop`."""


class Pipeline:
    """A sequence of passes.

    Args:
        steps: a text form (`"fold-constants,eliminate-dead"`), or a list of texts, registered passes and steps of
            `graphopt.spec`.

    Raises:
        SpecError: a pass or option that does not exist.
    """

    def __init__(self, steps: str | Iterable[str | spec.Step | Pass]) -> None:
        given = [steps] if isinstance(steps, str) else steps
        self.steps: tuple[spec.Step, ...] = tuple(step for thing in given for step in _as_steps(thing))
        if not self.steps:
            raise SpecError("the pipeline has no steps", hint="name passes: fold-constants,eliminate-dead")
        for step in spec.pass_steps(self.steps):
            make_pass(step)

    def __str__(self) -> str:
        return spec.to_text(self.steps)

    @property
    def names(self) -> frozenset[str]:
        """The passes that it names."""
        return frozenset(step.name for step in spec.pass_steps(self.steps))

    def run(
        self, model: Source, *, samples: Samples | None = None, settings: Settings | None = None, own: bool = False
    ) -> Result:
        """Run the passes over a copy of `model`.

        Args:
            model: a path, `Model` or `ModelProto`; left untouched.
            samples: feeds for numeric checks; None makes random ones when checks are on.
            settings: see `Settings`.
            own: whether a `Model` is given away: it is edited itself, which spares the copy.

        Raises:
            GraphoptError: the model or samples are not usable, or a pass failed and `on_failure` is `stop`.
        """
        with paused_gc():  # graphs are cyclic and large: collecting them again and again takes quadratic time
            original = model if isinstance(model, Model) else load(model)
            run = Run(self, original, samples, settings or Settings(), own=own or original is not model)
            run.transform()
        return run.finish()


def _as_steps(thing: str | spec.Step | Pass) -> tuple[spec.Step, ...]:
    if isinstance(thing, str):
        return spec.parse(thing)
    if isinstance(thing, spec.PassStep | spec.RepeatStep | spec.GradualStep):
        return (thing,)
    if not isinstance(thing, Pass):
        raise SpecError(f"a step is a text, a pass or a step of graphopt.spec, not {thing!r}")
    if registry.all_passes().get(thing.name) is not type(thing):
        raise SpecError(
            f"pass '{thing.name}' is not registered",
            at=type(thing).__qualname__,
            hint="put @graphopt.register above it",
        )
    return (spec.PassStep(thing.name, thing.options()),)


def make_pass(step: spec.PassStep) -> Pass:
    """Return the pass of a step.

    Raises:
        SpecError: no such pass or option.
    """
    return registry.get(step.name).from_options(step.options)


def context_of(model: Model, samples: Samples | None, settings: Settings, original_bytes: int = 0) -> Context:
    """Return what a pass may ask about a model; without a reference."""
    context = Context(model, evaluate, settings.target, settings.seed, samples, original_bytes, settings.gradients)
    context.observer = Observer(model, samples, settings.known, settings.seed)
    return context


def size_of(model: Model) -> Size:
    """Return node, initializer and byte counts of a model."""
    nodes = sum(1 for node in model.nodes() if node.op != "Constant")
    return Size(nodes, len(model.constants()), model.weight_bytes())


def in_order(model: Model, snapshot: Snapshot) -> tuple[Model, Snapshot]:
    """Return a model with its nodes in an order that they can run in, and the snapshot that it is then."""
    model.settled = None
    moved = [sort_nodes(graph) for graph in model.graphs()]  # all of them, so no generator
    if any(moved):
        snapshot = model.snapshot()
    model.settled = snapshot
    return model, snapshot


class Run:
    """One run of a pipeline over one model."""

    def __init__(
        self, pipeline: Pipeline, model: Model, samples: Samples | None, settings: Settings, *, own: bool = False
    ) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self._gradients = settings.gradients
        self._original = None if own else model
        self._first = model.snapshot()
        self.model, self.snapshot = in_order(model if own else from_snapshot(self._first), self._first)
        self.samples = samples
        self.structure = Structure.of(self.model)
        self.applied = 0
        self.last_change = ""
        self.stopped = False
        self._mapped = mappings(model.weights()) if model.weight_bytes() > RELEASE_ABOVE else []
        self._pending = self.snapshot
        self._before_loss: dict[Loss, Snapshot] = {}
        self._stages: list[Snapshot] = []
        self._shapes: Shapes | None = None
        self._done: dict[str, Snapshot] = {}
        self.exactness: Exactness = "exact"
        self.sites: dict[Site, None] = {}
        self._new_sites: list[Site] = []
        self.size = size_of(model)
        self.report = Report(
            model=str(model.path or "<memory>"), pipeline=str(pipeline), seed=settings.seed,
            before=self.size, after=self.size,
            opset_before=model.opset, opset_after=model.opset,
        )  # fmt: skip
        self._reference: Reference | None = None
        self._bytes = self.snapshot.nbytes

    @property
    def original(self) -> Model:
        """The model as it was given."""
        if self._original is None:
            self._original = from_snapshot(self._first)
        return self._original

    @property
    def reference(self) -> Reference:
        """The original's outputs on the samples, computed once."""
        if self._reference is None:
            self._reference = make_reference(self.original, self.samples, self.settings)
        return self._reference

    def transform(self) -> None:
        """Run all passes."""
        started = time.perf_counter()
        with paused_gc():
            self._steps(self.pipeline.steps)
        self.model.settled = None  # from here on, anybody may edit it
        self.report.seconds = time.perf_counter() - started

    def finish(self) -> Result:
        """Check the result as the settings ask, and return it."""
        started = time.perf_counter()
        if self.settings.verify != "off":
            self._verify_end()
        self.report.after = self.size
        self.report.opset_after = self.model.opset
        self.report.seconds += time.perf_counter() - started
        return Result(self.model, self.report, list(self.sites))

    def _steps(self, steps: Sequence[spec.Step]) -> bool:
        """Run steps in order; return whether any changed the model."""
        changed = False
        for step in steps:
            if self.stopped:
                break
            if isinstance(step, spec.PassStep):
                changed |= self._once(step)
                continue
            if isinstance(step, spec.GradualStep):
                for each in step.unrolled():
                    changed |= self._steps(each)
                continue
            for _ in range(step.times):
                if not self._steps(step.steps):
                    break
                changed = True
        return changed

    def _once(self, step: spec.PassStep) -> bool:
        """Run a pass, unless it ran on this very state before and changed nothing; return whether it did."""
        key = spec.to_text((step,))
        if self._done.get(key) is self.snapshot:
            return False
        changed = self._pass(make_pass(step))
        if not changed:
            self._done[key] = self.snapshot
        return changed

    def _pass(self, step: Pass) -> bool:
        record = PassRecord(step.name, step.options(), self.size, self.size)
        self.report.passes.append(record)
        started = time.perf_counter()
        shown = self._shown(step.name)
        text_before = text.to_text(self.model) if shown else ""
        try:
            changed = self._apply(step, record) and self._accept(step, record)
        except KeyboardInterrupt:
            raise
        except (DataError, SpecError, ProviderError) as error:  # what the user gave is wrong: no pass mends that
            raise type(error)(error.what, at=error.at or f"pass '{step.name}'", hint=error.hint) from error
        except Exception as error:  # noqa: BLE001  (a pass may be anybody's code: roll back, report, go on)
            self._roll_back(step, record, error)
            changed = False
        record.seconds = time.perf_counter() - started
        if changed:
            self.size = size_of(self.model)
        record.after = self.size
        if shown:
            diff = text.diff(text_before, text.to_text(self.model)).rstrip("\n")
            self.settings.printer(f"== {step.name}: {record.status}\n" + (f"{diff}\n" if diff else ""))
        if step.name == self.settings.stop_after:
            self.stopped = True
        return changed

    def _shown(self, name: str) -> bool:
        return name in self.settings.print_after or "all" in self.settings.print_after

    def _apply(self, step: Pass, record: PassRecord) -> bool:
        """Apply a pass's changes; return whether the model is another one now."""
        context = context_of(self.model, self.samples, self.settings, self._bytes)
        before = self._before_loss.get(step.loses, self.snapshot)
        context.reference = lambda: from_snapshot(before)
        context.trainer = StepTrainer(self.model, lambda: self.original, self.samples, self.settings.seed, self._stages)
        context._shapes, self._shapes = self._shapes, None
        graphs = list(self.model.graphs()) if step.scope == "graph" else [self.model.graph]
        self._new_sites.clear()
        for graph in graphs:
            for change in step.run(graph, context):
                self._change(change, record, step)
        record.notes += context.notes
        if context.gradients is not self.settings.gradients:
            self.settings = replace(self.settings, gradients=context.gradients)
            self._done.clear()
        if record.changes == 0:
            self._shapes = context._shapes
            return False
        for graph in self.model.graphs():
            sort_nodes(graph)
        after = self.model.snapshot()
        same = after.same_as(self.snapshot)
        self.model.settled = self.snapshot if same else after
        self._pending = after
        return not same

    def _change(self, change: Change, record: PassRecord, step: Pass) -> None:
        if self.settings.watch is not None:
            self.settings.watch(record, change)
        site = (step.name, change.where, change.what)
        left_out = site in self.settings.skip
        if change.apply is None or left_out:
            if len(record.blocked) < MAX_BLOCKED:
                why = "left out: it does not pay here" if left_out else change.why
                record.blocked.append({"where": change.where, "what": change.what, "why": why})
            return
        if self.settings.limit is not None and self.applied >= self.settings.limit:
            return
        self.model.settled = None
        change.apply()
        release(self._mapped)
        if step.optional:
            self._new_sites.append(site)
        self.applied += 1
        self.last_change = f"{record.name}: {change.where}: {change.what}"
        record.changes += 1

    def _accept(self, step: Pass, record: PassRecord) -> bool:
        """Check the changed model; keep it."""
        if not step.changes_signature:
            self.structure.check(self.model)
        exactness: Exactness = "lossy" if "lossy" in (self.exactness, step.exactness) else "exact"
        if self.settings.verify == "each":
            checked = self.reference.check(self.model, exactness=exactness, locate=True)
            if not checked.ok:
                raise ModelError("the outputs differ: " + "; ".join(checked.failures), at=where_it_begins(checked))
        self.exactness = exactness
        if step.exactness == "lossy":
            self._before_loss.setdefault(step.loses, self.snapshot)
        if step.loses == "training":
            self._stages += [self._pending] if self._stages else [self.snapshot, self._pending]
        self.sites.update(dict.fromkeys(self._new_sites))
        _free_weights(self.snapshot, self._pending)
        if self.snapshot.only_lost_constants(self._pending):
            self._done = {key: self._pending for key, seen in self._done.items() if seen is self.snapshot}
        self.snapshot = self._pending
        record.status = "changed"
        return True

    def _roll_back(self, step: Pass, record: PassRecord, error: Exception) -> None:
        failed = self.model
        self.model = from_snapshot(self.snapshot)
        self.model.settled = self.snapshot
        record.status = "rolled back"
        expected = isinstance(error, GraphoptError)
        record.failure = str(error) if expected else f"it raised {type(error).__name__}: {error} ({last_frame(error)})"
        detail = record.failure if expected else "".join(traceback.format_exception(error))
        if self.settings.reproducers is not None:
            reference = self.reference if self.settings.verify == "each" else None
            folder = save_reproducer(
                self.settings.reproducers, step, self.model, failed, reference, detail, self.settings.seed
            )
            record.reproducer = str(folder)
        if self.settings.on_failure == "stop":
            raise StopPipelineError(
                f"pass '{step.name}' failed: {record.failure}",
                at=record.reproducer,
                hint="--on-failure continue rolls it back and goes on"
                + ("; --bisect finds the change" if expected else ""),
            ) from error

    def _verify_end(self) -> None:
        """Check the result; when it fails, run again with a check after each pass, which leaves out the culprit."""
        checked = self.reference.check(self.model, exactness=self.exactness)
        self.report.samples = self.reference.description
        if checked.ok or self.settings.verify == "each" or self.settings.limit is not None:
            self._conclude(checked)
            return
        self.model, self.snapshot = in_order(from_snapshot(self._first), self._first)
        self._done.clear()
        self._before_loss.clear()
        self._stages.clear()
        self._shapes = None
        self.size = size_of(self.model)
        self.exactness, self.stopped = "exact", False
        self.report.passes.clear()
        self.sites.clear()
        self.settings = replace(self.settings, verify="each", gradients=self._gradients)
        self._steps(self.pipeline.steps)
        self.model.settled = None
        self._conclude(self.reference.check(self.model, exactness=self.exactness))

    def _conclude(self, checked: Validation) -> None:
        self.report.verification = checked.to_dict()
        if not checked.ok:
            raise GateMissedError(
                "the result does not give the original's outputs: " + "; ".join(checked.failures),
                at=where_it_begins(checked),
                hint="--bisect finds the change; if the original differs from itself, give other samples (--data)",
            )


def _free_weights(old: Snapshot, new: Snapshot) -> None:
    """Collect garbage where a pass replaced much: dead constants hang in cycles and would keep their arrays."""
    kept = {id(values) for values in new.weights}
    if sum(int(values.nbytes) for values in old.weights if id(values) not in kept) > COLLECT_BYTES:
        gc.collect()


def where_it_begins(checked: Validation) -> str | None:
    """Return the first differing tensor in words, None where it was not found."""
    found = checked.location
    return f"tensor '{found.tensor}' of node '{found.node}' ({found.op}) is the first to differ" if found else None


def make_reference(model: Model, samples: Samples | None, settings: Settings) -> Reference:
    """Return the original's outputs on `samples`, random feeds when there are none."""
    feeds = samples if samples is not None else load_samples(None, model, seed=settings.seed)
    reference = Reference(model, feeds, threads=settings.target.threads, provider=settings.target.provider)
    for mode in reference.modes:  # an original that does not load is the user's to know, not a pass's fault
        reference.session(mode)
    return reference
