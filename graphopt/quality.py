"""What a lossy result may cost: a bound on outputs or on a task metric, and the check of candidates against it.

How an output is judged follows from what it looks like: see `graphopt.output_quality`.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from graphopt.compare import Array, leaves
from graphopt.data import call_user
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.metric import Drop, Evaluation, Metric, evaluate_pair, metric_of
from graphopt.model import Model
from graphopt.output_quality import LARGEST_SCORE, Kind, Limits, OutputQuality, output_kind
from graphopt.runtime import Session
from graphopt.samples import Feeds, Samples
from graphopt.tensors import is_float

Part: TypeAlias = Literal["calibration", "judging"]

MAX_DROP = "1%"
"""Drop of a metric that is accepted where none is named: MLPerf Inference asks quantized models for 99 % of the float
model's accuracy (its rules, table of quality targets)."""

JUDGED = 256
"""Samples that judge at most, unless asked for more."""

QUICK = 16
"""Samples of a quick look."""

DISJOINT_FROM = 16
"""Samples from which on calibration and judging do not share any."""

MEMORY_BYTES = 1 << 28
DISK_BYTES = 1 << 33
"""Reference outputs kept in memory, then on disk; beyond both they are computed again."""


DEFAULTS: Mapping[Kind, Limits] = {
    "classes": Limits(sqnr=20.0, agreement=0.95, loss=0.003),
    "mask": Limits(sqnr=15.0, agreement=0.97),
    "embedding": Limits(sqnr=20.0, cosine=0.995),
    "values": Limits(sqnr=20.0),
    "exact": Limits(agreement=0.97),
}
"""What is asked of an output when the caller asks for nothing.

The numbers lie between models that other tools quantized and that still do their job and models that do not: a text
recogniser at 15.6 dB, with an expected loss of 0.015 per step, reads 4 lines in 100 less; an image classifier at 14 dB
keeps the class of 80 % of natural pictures, at a loss of 0.008; a direction classifier at 31 dB loses nothing.
"""


_IN_RANGE: Mapping[str, tuple[float, float]] = {
    "min_sqnr": (-100.0, 300.0), "min_cosine": (-1.0, 1.0), "min_agreement": (0.0, 1.0), "max_loss": (0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """What a result may cost.  `Bound()` asks for `DEFAULTS`, by what each output looks like.

    A number that is named is asked of every output that it can be measured on, and the defaults are then left out.
    A metric judges in place of the outputs, unless numbers are named too.

    Attributes:
        min_sqnr: signal to quantization noise at each float output, dB.
        min_cosine: mean cosine of a row of scores or numbers with the reference's.
        min_agreement: part of the rows whose largest score stays the largest (classes), overlap of what lies above
            0.5 (masks), part of the elements that stay equal (integers).
        metric: `file.py:function` or a function: `predict -> number or 1-D scores`, higher is better.
        max_drop: largest drop of the metric, in its units or as `"1%"` of the reference's; None: `MAX_DROP`.
        max_loss: expected fall of the accuracy by rows whose largest score is another (classes), see `output_quality`.
        defaults: whether `DEFAULTS` are asked where nothing is named; without, the result is looked at and not judged.

    Raises:
        SpecError: a number is out of range, or there is a drop and no metric.
    """

    min_sqnr: float | None = None
    min_cosine: float | None = None
    min_agreement: float | None = None
    metric: Metric | None = None
    max_drop: str | float | None = None
    max_loss: float | None = None
    defaults: bool = True

    def __post_init__(self) -> None:
        for name, (low, high) in _IN_RANGE.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN too
                raise SpecError(f"{name} lies between {low:g} and {high:g}, not at {value}", at=name)
        if self.max_drop is not None:
            if self.metric is None:
                raise SpecError(
                    "a largest drop is of a metric, and there is none", at="max_drop", hint="--eval FILE.py:FUNCTION"
                )
            Drop.parse(self.max_drop)

    @property
    def named(self) -> bool:
        """Whether anything was named."""
        return self.names_numbers or self.metric is not None

    @property
    def names_numbers(self) -> bool:
        """Whether a limit on outputs was named."""
        return any(getattr(self, name) is not None for name in _IN_RANGE)

    def limits(self, kind: Kind) -> Limits:
        """Return what is asked of an output of this kind."""
        if self.names_numbers:
            return Limits(self.min_sqnr, self.min_cosine, self.min_agreement, self.max_loss)
        return DEFAULTS[kind] if self.defaults and self.metric is None else Limits()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; a function stands there by its name."""
        metric = self.metric if self.metric is None or isinstance(self.metric, str) else metric_of(self.metric)[1]
        return {
            "min_sqnr": self.min_sqnr, "min_cosine": self.min_cosine, "min_agreement": self.min_agreement,
            "max_loss": self.max_loss, "metric": metric, "max_drop": self.max_drop,
        }  # fmt: skip


@dataclass
class Quality:
    """How good a candidate is beside the reference.

    Attributes:
        outputs: by output.
        evaluation: of the metric, if the bound has one and the look was not a quick one; its interval is paired, and a
            standard error is kept from the bound.
        samples: how many were run.
        broken: why the candidate could not be run, or ''.
    """

    outputs: list[OutputQuality] = field(default_factory=list)
    evaluation: Evaluation | None = None
    samples: int = 0
    broken: str = ""

    @property
    def failures(self) -> list[str]:
        """In words, what is missed of the bound."""
        found = [self.broken] if self.broken else []
        found += [what for output in self.outputs for what in output.failures]
        if self.evaluation is not None and not self.evaluation.sure:
            found.append(self.evaluation.failure())
        return found

    @property
    def ok(self) -> bool:
        """Whether the bound is kept."""
        return not self.failures

    @property
    def score(self) -> float:
        """SQNR of the worst output, dB: for searches; more is better, whatever the bound is on."""
        if self.broken:
            return -LARGEST_SCORE
        return min((output.score for output in self.outputs), default=LARGEST_SCORE)

    @property
    def error(self) -> float:
        """Noise power over signal power of the worst output: what small independent errors add up in."""
        return float(10 ** (-self.score / 10))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "ok": self.ok, "score": self.score, "samples": self.samples, "failures": self.failures,
            "outputs": [output.to_dict() for output in self.outputs],
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
        }  # fmt: skip


class QualityCheck:
    """Judges candidates against a reference model.

    Args:
        reference: the model whose outputs are right.
        samples: what to run both on; see `split`.
        bound: what is asked.
        seed: of the metric's bootstrap.
        threads: of ORT.
        provider: short name of the execution provider.
        limit: samples that are run at most.

    The reference runs once per sample: its outputs stay in memory up to `MEMORY_BYTES`, then in a temporary folder up
    to `DISK_BYTES`; what is beyond is computed again.  Its metric is computed once.

    Raises:
        DataError: the samples are empty, the reference fails on them, or the metric fails.
    """

    def __init__(
        self, reference: Model, samples: Samples, bound: Bound | None = None, seed: int = 0, *,
        threads: int = 1, provider: str = "cpu", limit: int = JUDGED,
    ) -> None:  # fmt: skip
        self.reference, self.samples, self.bound, self.seed = reference, samples, bound or Bound(), seed
        self.threads, self.provider, self.limit = threads, provider, limit
        self.names = [output.name for output in reference.outputs]
        self._session = Session(reference, threads=threads, provider=provider)
        self._kept = _Kept(self._run_reference)
        self._kinds: dict[str, Kind] = {}
        self._metric, self._metric_name = metric_of(self.bound.metric)
        self._scores: Any = None

    def prepare(self) -> None:
        """Run the reference on the first sample, and its metric.

        Raises:
            DataError: the samples are empty or do not fit, give nothing that is finite, or the metric fails.
        """
        outputs = self._run_reference(self.samples.first())
        floats = [values for values in outputs.values() if is_float(values.dtype)]
        if floats and not any(np.isfinite(values).any() for values in floats):
            raise DataError(
                "the model gives no finite value on the first sample", at=self.samples.description,
                hint="look for NaN and infinities in the samples",
            )  # fmt: skip
        self._reference_scores()

    def of(self, candidate: Model, *, quick: bool = False) -> Quality:
        """Return how good a candidate is.

        Args:
            candidate: a model with the reference's inputs and outputs.
            quick: the first `QUICK` samples only, and no metric: for searches.

        A candidate that ORT refuses, or that fails on a sample, is a failure of the result and no error.
        """
        result = Quality()
        try:
            session = Session(candidate, threads=self.threads, provider=self.provider)
        except ModelError as error:
            result.broken = f"the model does not load: {error.what}"
            return result
        missing = [name for name in self.names if name not in session.output_names]
        if missing:
            result.broken = f"output '{missing[0]}' is missing"
            return result
        self._run(session, min(QUICK, self.limit) if quick else self.limit, result)
        if self._metric is not None and not quick and not result.broken:
            result.evaluation = self._evaluate(session)
        return result

    def _run(self, session: Session, limit: int, result: Quality) -> None:
        outputs: dict[str, OutputQuality] = {}
        for index, feeds in enumerate(itertools.islice(self.samples, limit)):
            expected = self._kept.outputs(index, feeds)
            accepted = {name: value for name, value in feeds.items() if name in session.input_names}
            try:
                found = _flat(session.run(accepted, self.names))
            except DataError as error:
                result.broken = f"sample {index}: {error.what}"
                return
            for path in [*expected, *(path for path in found if path not in expected)]:
                self._add(outputs, path, expected.get(path), found.get(path))
            result.samples += 1
        if not result.samples:
            raise DataError("the samples are empty", at=self.samples.description)
        result.outputs = list(outputs.values())

    def _add(
        self, outputs: dict[str, OutputQuality], path: str, reference: Array | None, candidate: Array | None
    ) -> None:
        known = reference if reference is not None else candidate
        if known is None:
            return
        if path not in self._kinds:
            self._kinds[path] = output_kind(self.reference, path, known)
        if path not in outputs:
            kind = self._kinds[path]
            outputs[path] = OutputQuality(path, kind, self.bound.limits(kind))
        if reference is None or candidate is None:
            outputs[path].different = "not there on one side"
        else:
            outputs[path].add(reference, candidate)

    def _run_reference(self, feeds: Feeds) -> dict[str, Array]:
        return _flat(self._session.run(feeds, self.names))

    def _reference_scores(self) -> Any:
        """Return what the metric says of the reference, None where there is no metric."""
        if self._scores is None and self._metric is not None:
            self._scores = call_user(self._metric, self._metric_name, self._session.run)
        return self._scores

    def _evaluate(self, session: Session) -> Evaluation:
        function, name = self._metric, self._metric_name
        assert function is not None
        reference = self._session.run
        scores = self._reference_scores()

        def remembered(predict: Callable[..., Any]) -> Any:
            return scores if predict is reference else function(predict)

        given = self.bound.max_drop
        drop = MAX_DROP if given is None and self.bound.defaults else given
        return evaluate_pair(remembered, name, reference, session.run, max_drop=drop, seed=self.seed)


class _Kept:
    """Outputs of the reference by sample: in memory, on disk, or computed again."""

    def __init__(self, run: Callable[[Feeds], dict[str, Array]]) -> None:
        self._run = run
        self._memory: dict[int, dict[str, Array]] = {}
        self._disk: dict[int, tuple[Path, list[str]]] = {}
        self._folder: Path | None = None
        self._memory_bytes = self._disk_bytes = 0

    def outputs(self, index: int, feeds: Feeds) -> dict[str, Array]:
        """Return the outputs on sample `index`, whose feeds these are."""
        if index in self._memory:
            return self._memory[index]
        if index in self._disk:
            path, names = self._disk[index]
            with np.load(path, allow_pickle=False) as file:
                return {name: file[f"o{i}"] for i, name in enumerate(names)}
        found = self._run(feeds)
        self._keep(index, found)
        return found

    def _keep(self, index: int, found: dict[str, Array]) -> None:
        size = sum(values.nbytes for values in found.values())
        if self._memory_bytes + size <= MEMORY_BYTES:
            self._memory_bytes += size
            self._memory[index] = found
        elif self._disk_bytes + size <= DISK_BYTES and all(v.dtype.kind in "biufc" for v in found.values()):
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="graphopt-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            if shutil.disk_usage(self._folder).free < 4 * size + DISK_BYTES // 8:
                return
            path = self._folder / f"{index}.npz"
            np.savez(path, **{f"o{i}": values for i, values in enumerate(found.values())})  # type: ignore[arg-type]
            self._disk[index] = path, list(found)
            self._disk_bytes += size


def split(samples: Samples, part: Part, *, seed: int = 0) -> Samples:
    """Return the samples that calibrate (and choose), or those that judge.

    Of every two neighbours one calibrates and one judges, which one is drawn from the seed: both parts cover data that
    comes sorted.  With fewer than `DISJOINT_FROM` samples both parts are all of them, and the description says so.
    """
    count = sum(1 for _ in itertools.islice(samples, DISJOINT_FROM))
    if count < DISJOINT_FROM:
        described = f"{samples.description} ({count}: too few to calibrate and judge on different ones)"
        return Samples(lambda: iter(samples), described, random=samples.random)

    def chosen() -> Iterator[Feeds]:
        for index, feeds in enumerate(samples):
            first = zlib.crc32(f"{seed} {index // 2}".encode()) % 2
            if (index % 2 == first) == (part == "calibration"):
                yield feeds

    return Samples(chosen, f"half of {samples.description}, for {part}", random=samples.random)


def _flat(outputs: Mapping[str, Any]) -> dict[str, Array]:
    return {path: v for name, value in outputs.items() for path, v in leaves(name, value) if v is not None}
