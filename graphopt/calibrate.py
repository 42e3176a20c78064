"""Samples -> a `Calibration`: the model is run on each, and its tensors are counted as they come.

Memory is bounded by the model, the statistics and a budget, whatever the number of samples.  Tensors are read in groups
of which one sample makes no more bytes than the budget; each group is one sweep over the samples.  Sizes are those of
the first sample; where a larger one exceeds the budget, its group is halved and the second half waits for a sweep of
its own, from that sample on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from graphopt.calibration import Calibration
from graphopt.errors import DataError, ModelError, SpecError, did_you_mean
from graphopt.exporter import inline
from graphopt.external import digest
from graphopt.model import INLINE_LIMIT, Model, Source, load
from graphopt.runtime import Optimization, Session
from graphopt.samples import Feeds
from graphopt.tensors import LazyTensor, is_float

Array: TypeAlias = npt.NDArray[Any]

__all__ = ["BUDGET", "Calibration", "calibrate"]

LIMIT = 1 << 15
"""Values of a tensor that are counted of each sample, unless the caller says otherwise: with a hundred samples some 160
values on either side tell where the 99.99th percentile is."""

BUDGET = 1 << 28
"""Bytes of fetched tensors, unless the caller says otherwise."""

OPTIMIZATION: Optimization = "off"
"""What ORT fuses depends on the tensors that are asked for, and last digits on what it fuses: so it fuses nothing, and
a tensor has one range whatever others are measured with it.  It takes hardly longer: most tensors are asked for."""

LARGEST_GROUP = 512
"""Tensors in a group: sessions with more outputs take long to make."""

CHUNK_SAMPLES, CHUNK_BYTES = 32, 1 << 25
"""Samples that go to a process at a time: so many, or so many bytes."""

SAVE_SECONDS = 30.0
"""Between two writings of the state."""

_SIZE = "graphopt.size."
_PHASE = 2_654_435_769  # 2^32 by the golden ratio: its multiples are spread evenly, whatever they are taken modulo


@dataclass
class Group:
    """Tensors that are read together.

    Attributes:
        names: the tensors.
        start: how many samples they have behind them.
    """

    names: list[str]
    start: int = 0


def calibrate(
    model: Source, samples: Iterable[Feeds], tensors: Sequence[str] | None = None, *, budget: int = BUDGET,
    jobs: int = 1, channels: Mapping[str, int] | None = None, seed: int = 0, resume: str | Path | None = None,
    threads: int = 1, limit: int | None = LIMIT,
) -> Calibration:  # fmt: skip
    """Run samples through a model and return what they tell of its tensors.

    Args:
        model: what to run.
        samples: feeds, iterated once or more often.
        tensors: of the main graph, inputs among them; None for all that are floats and no constants.
        budget: bytes that the fetched tensors of one sample may take.
        jobs: processes, through joblib, -1 for one on each core; its backends may be other machines.  The result is the
            same for any number.
        channels: name -> channel axis, for tensors that are to have statistics of each channel too.
        seed: of which values are looked at where `limit` leaves some out.
        resume: a file that keeps the state: written as samples are done, and read when it is there.  Samples that it
            knows are skipped, so they must come in the same order.
        threads: of ORT, in each process.
        limit: values of a tensor that its histogram takes of each sample, about; None for all.  Extremes, means and
            second moments are always of all.

    Raises:
        DataError: no samples, or they do not fit the model; the state in `resume` is of another model.
        ModelError: the main graph has no such tensor.
        SpecError: no processes, or no values to count.
    """
    if jobs == 0 or (limit is not None and limit < 1):
        raise SpecError(f"calibration needs processes and values to count, not jobs={jobs} and limit={limit}")
    model = load(model)
    axes = dict(channels or {})
    names = list(dict.fromkeys([*(activations(model) if tensors is None else tensors), *axes]))
    settings = Settings(axes, limit, seed, threads)
    run = _Run(model, samples, settings, budget, jobs, None if resume is None else Path(resume))
    run.check(names)
    return run.all(names)


def activations(model: Model) -> list[str]:
    """Return the tensors of the main graph that may be floats: inputs and what its nodes make but constants."""
    made = [t for node in model.graph.nodes if node.op != "Constant" for t in node.outputs if t.name]
    return [t.name for t in [*model.graph.inputs, *made] if t.dtype is None or is_float(np.dtype(t.dtype))]


@dataclass(frozen=True)
class Settings:
    """How samples are run and counted: see `calibrate`."""

    axes: Mapping[str, int]
    limit: int | None
    seed: int
    threads: int


@dataclass
class _Run:
    """One call of `calibrate`."""

    model: Model
    samples: Iterable[Feeds]
    settings: Settings
    budget: int
    jobs: int
    state: Path | None
    found: Calibration = field(default_factory=Calibration)
    saved_at: float = 0.0
    adding: bool = False

    def check(self, names: Iterable[str]) -> None:
        """Raise ModelError for a tensor that the main graph does not compute, DataError for samples that run out."""
        known = {t.name for node in self.model.graph.nodes for t in node.outputs} | self.inputs
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known) or "only what the main graph computes can be calibrated"
                raise ModelError("the model computes no such tensor", at=name, hint=hint)
        if isinstance(self.samples, Iterator):
            raise DataError(
                "samples are read more than once, and an iterator gives them once only", hint="pass a list or Samples"
            )

    @functools.cached_property
    def inputs(self) -> set[str]:
        """Names of the model's inputs, which are read from the feeds."""
        return {t.name for t in self.model.graph.inputs}

    def all(self, names: Sequence[str]) -> Calibration:
        """Return the statistics of all tensors, sweep by sweep."""
        self._resume()
        waiting = deque(self._groups(names))
        while waiting:
            waiting.extendleft(reversed(self._sweep(waiting.popleft())))
        return self.found

    def _resume(self) -> None:
        if self.state is None:
            return
        source = model_digest(self.model)
        self.found = Calibration.load(self.state) if self.state.exists() else Calibration(source)
        if self.found.source != source:
            raise DataError("the saved calibration is of another model", at=str(self.state), hint="delete it")
        self.saved_at = time.monotonic()

    def _save(self, *, now: bool = True) -> None:
        if self.state is not None and (now or time.monotonic() > self.saved_at + SAVE_SECONDS):
            self.found.save(self.state)
            self.saved_at = time.monotonic()

    def _groups(self, names: Sequence[str]) -> Iterator[Group]:
        """Yield groups of tensors that have as many samples behind them and fit the budget on the first sample."""
        sizes = self._sizes([n for n in names if n not in self.found.skipped])
        behind = {n: self.found.tensors[n].samples if n in self.found.tensors else 0 for n in sizes}
        for start in sorted(set(behind.values())):
            group, total = Group([], start), 0
            for name in [n for n in sizes if behind[n] == start]:
                if group.names and (total + sizes[name] > self.budget or len(group.names) >= LARGEST_GROUP):
                    yield group
                    group, total = Group([], start), 0
                group.names.append(name)
                total += sizes[name]
            yield group

    def _sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the bytes of each tensor on the first sample (as float32); they are counted by ORT, not fetched."""
        feeds = next(iter(self.samples), None)
        if feeds is None:
            raise DataError("there are no samples to calibrate on", hint="give --data")
        inner = [name for name in names if name not in self.inputs]
        counts: dict[str, int] = {}
        for start in range(0, len(inner), LARGEST_GROUP):
            counts.update(self._counts(inner[start : start + LARGEST_GROUP], feeds))
        outer = {name: int(np.size(feeds.get(name, ()))) for name in names if name in self.inputs}
        return {name: 4 * (outer | counts)[name] for name in names if name in outer or name in counts}

    def _counts(self, names: Sequence[str], feeds: Feeds) -> dict[str, int]:
        try:
            session = Session(with_sizes(self.model, names), optimization="off", threads=self.settings.threads)
        except ModelError:  # some are no tensors
            kinds = Session(self.model, optimization="off", extra_outputs=names).output_types
            odd = {n: kinds[n] for n in names if not kinds[n].startswith("tensor(")}
            if not odd:
                raise
            self.found.skipped.update((n, f"not a tensor but a {kind}") for n, kind in odd.items())
            return self._counts([n for n in names if n not in odd], feeds)
        values = session.run(feeds, [_SIZE + name for name in names])
        return {name: int(values[_SIZE + name]) for name in names}

    def _sweep(self, group: Group) -> list[Group]:
        """Add the samples that a group has not had; return what is left to do where one exceeded the budget."""
        try:
            for fetched in self._here(group) if self.jobs == 1 else self._spread(group):
                self._save(now=False)
                names = group.names = [n for n in group.names if n not in self.found.skipped]
                if not names:
                    return []
                if fetched > self.budget and len(names) > 1:
                    half = len(names) // 2
                    return [Group(names[:half], group.start), Group(names[half:], group.start)]
        finally:
            if not self.adding:  # else the state is torn; what was saved before stands
                self._save()
        return []

    def _here(self, group: Group) -> Iterator[int]:
        """Add sample after sample in this process; yield the bytes that each made."""
        names = self._inner(group.names)
        session = Session(self.model, optimization=OPTIMIZATION, extra_outputs=names, threads=self.settings.threads)
        for feeds in itertools.islice(self.samples, group.start, None):
            values = fetch(session, feeds, group.names)
            self.adding = True
            add(self.found, values, self.settings, group.start)
            self.adding = False
            group.start += 1
            yield total_bytes(values)

    def _spread(self, group: Group) -> Iterator[int]:
        """Add chunk after chunk that other processes count; yield the most bytes that a sample of each made."""
        import joblib  # noqa: PLC0415  (needed by few)

        count, names = joblib.delayed(count_chunk), list(group.names)
        with portable(self.model, self._inner(names)) as source:
            feeds = itertools.islice(self.samples, group.start, None)
            work = (count(source, chunk, names, self.settings) for chunk in chunks(feeds, group.start))
            for part, done, most in joblib.Parallel(n_jobs=self.jobs, return_as="generator")(work):
                part.source = self.found.source
                self.adding = True
                self.found.absorb(part)
                self.adding = False
                group.start += done
                yield most

    def _inner(self, names: Iterable[str]) -> list[str]:
        return [n for n in names if n not in self.inputs]


def with_sizes(model: Model, names: Iterable[str]) -> Model:
    """Return a copy of a model that has, for each tensor, an output with its number of elements."""
    copy = model.copy()
    made = {t.name: t for node in copy.graph.nodes for t in node.outputs}
    for name in names:
        size = gs.Variable(_SIZE + name, np.dtype(np.int64), [])
        copy.graph.nodes.append(gs.Node("Size", inputs=[made[name]], outputs=[size]))
        copy.graph.outputs.append(size)
    return copy


def fetch(session: Session, feeds: Feeds, names: Sequence[str]) -> dict[str, Any]:
    """Return tensors by name: those that are fed as they are, the others as a run makes them."""
    inner = [n for n in names if n in session.output_names]
    made = session.run(feeds, inner)
    return {name: made[name] if name in made else feeds.get(name) for name in names}


def add(found: Calibration, values: Mapping[str, Any], settings: Settings, index: int) -> None:
    """Add the tensors of the sample at `index`; those that are no floats are skipped with the reason."""
    phase = (index + settings.seed) * _PHASE
    for name, value in values.items():
        if isinstance(value, np.ndarray) and is_float(value.dtype):
            found.add(name, value, settings.axes.get(name), limit=settings.limit, phase=phase)
        elif isinstance(value, np.ndarray):
            found.skipped[name] = f"not floats but {value.dtype.name}"
        else:
            found.skipped[name] = "not fed" if value is None else "not a tensor"


def total_bytes(values: Mapping[str, Any]) -> int:
    """Return the bytes of all arrays."""
    return sum(v.nbytes for v in values.values() if isinstance(v, np.ndarray))


def model_digest(model: Model) -> str:
    """Return a text that differs between models that differ."""
    snapshot = model.snapshot()
    weights = (v.raw() if isinstance(v, LazyTensor) else inline("", v).raw_data for v in snapshot.weights)
    return digest(itertools.chain([snapshot.proto.SerializeToString(deterministic=True)], weights))


# --- other processes


@dataclass(frozen=True)
class Portable:
    """A model for other processes, in a form that joblib sends once.

    Attributes:
        data: the bytes of the proto, or None where they are too many for one message.
        path: then the file, which the other processes must see too.
        key: tells models apart.
        custom_ops: libraries that ORT loads.
    """

    data: npt.NDArray[np.uint8] | None
    path: Path | None
    key: str
    custom_ops: tuple[Path, ...]

    def session(self, threads: int) -> Session:
        """Return a session of the model."""
        if self.data is not None:
            proto = onnx.ModelProto.FromString(self.data.tobytes())
            return Session(proto, optimization=OPTIMIZATION, threads=threads, custom_ops=self.custom_ops)
        assert self.path is not None
        return Session(self.path, optimization=OPTIMIZATION, threads=threads, custom_ops=self.custom_ops)


@contextlib.contextmanager
def portable(model: Model, names: Sequence[str]) -> Iterator[Portable]:
    """Give the model with these tensors as outputs to other processes for a while."""
    copy = model.copy()
    made = {t.name: t for node in copy.graph.nodes for t in node.outputs}
    present = {t.name for t in copy.graph.outputs}
    copy.graph.outputs.extend(made[n] for n in names if n not in present)
    key = uuid.uuid4().hex
    if copy.weight_bytes() <= INLINE_LIMIT:
        yield Portable(np.frombuffer(copy.emit().SerializeToString(), np.uint8), None, key, model.custom_ops)
        return
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        copy.save(path)
        yield Portable(None, path, key, model.custom_ops)


def chunks(samples: Iterable[Feeds], start: int) -> Iterator[tuple[int, list[Feeds]]]:
    """Yield lists of consecutive samples, bounded in number and bytes, with the index of their first."""
    chunk: list[Feeds] = []
    for index, feeds in enumerate(samples, start + 1):
        chunk.append(feeds)
        if len(chunk) >= CHUNK_SAMPLES or sum(map(total_bytes, chunk)) > CHUNK_BYTES:
            yield index - len(chunk), chunk
            chunk = []
    if chunk:
        yield index - len(chunk), chunk


def count_chunk(
    source: Portable, chunk: tuple[int, list[Feeds]], names: Sequence[str], settings: Settings
) -> tuple[Calibration, int, int]:
    """Return statistics of a chunk, its number of samples, and the most bytes that one of them made."""
    session = _session(source.key, lambda: source.session(settings.threads))
    found, most = Calibration(), 0
    for index, feeds in enumerate(chunk[1], chunk[0]):
        values = fetch(session, feeds, names)
        add(found, values, settings, index)
        most = max(most, total_bytes(values))
    for held in found.tensors.values():
        held.histogram.flush()  # what is sent back is smaller so
    return found, len(chunk[1]), most


_sessions: dict[str, Session] = {}


def _session(key: str, make: Callable[[], Session]) -> Session:
    """Return this process's session of a model; one is kept, so that the next chunk finds it."""
    if key not in _sessions:
        _sessions.clear()
        _sessions[key] = make()
    return _sessions[key]
