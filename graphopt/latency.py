"""Predicted latency of any choice of int8 layers, learned from a few measured ones.

What a kernel costs depends on the precision of the layers around it: a layer's own kernel on that of the layer, what
stands between two layers (elementwise operators, number types and layouts converted) on that of both.  So latency
is a sum of small tables,

    latency(S) = constant + sum over places of table[precisions of the layers there]

one place per layer and one per group of up to three layers that meet (`kernel_places.py`).  All tables are filled
from 16 models at once (8, where four colours do): layers that meet get different colours, each colour is a column of an
orthogonal array of strength three, and each row of it says which layers are int8 in one model.  Every three layers
that meet are then seen in all their combinations, twice: so every table is filled from measurements, and that of
a single layer from half of all models each.  Source: Hedayat, Sloane, Stufken, Orthogonal Arrays (1999), chapter 7.

Kernel times are read off ORT's profiles, all models run side by side (`kernel_times.py`).  Whole runs without
profiling then correct the tables.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError
from graphopt.kernel_places import Places, assign_kernels
from graphopt.kernel_times import Subject, run_all
from graphopt.model import Model
from graphopt.runtime import Feeds
from graphopt.search import Option, Problem, Term

Array: TypeAlias = npt.NDArray[np.float64]
Make: TypeAlias = Callable[[frozenset[str]], Model]
"""Labels of layers -> the model with exactly these in int8, in the form that will run."""

PRECISIONS = ("float", "int8")

BUDGET = 30.0
"""Seconds of timing; making the models is not counted."""

MAX_FEEDS = 4

LEAST_GAIN = 1e-4
"""What a layer in int8 must save, as a part of the whole: less is not known so exactly, and its noise is real."""

_DISTRUST = 0.2
"""Standard deviation of a table's entries around what the profiles say, as a part of them."""

_NOISE = 0.01
"""Standard deviation of the time of a whole run, as a part of it."""


@dataclass(frozen=True)
class Cell:
    """What stands at one place: seconds for each combination of the precisions of its layers, in their order."""

    layers: tuple[str, ...]
    seconds: Mapping[tuple[str, ...], float]

    def cost(self, int8: frozenset[str]) -> float:
        """Return the seconds spent there when these layers are int8."""
        return self.seconds[tuple(PRECISIONS[layer in int8] for layer in self.layers)]


@dataclass(frozen=True)
class Measured:
    """One model that was timed: its int8 layers, seconds per run, and how many kernels ORT ran."""

    int8: frozenset[str]
    seconds: float
    kernels: int


@dataclass(frozen=True)
class LatencyModel:
    """Seconds per run for any choice of int8 layers.

    Attributes:
        layers: labels of the layers, in the order of the graph.
        cells: the tables, those of single layers first.
        constant: seconds that no layer has a part in.
        measured: what it was learned from; the first is all float, the last all int8.
        source: `kernels`, or `totals` where ORT's graph cannot be read and only whole runs were timed.
    """

    layers: tuple[str, ...]
    cells: tuple[Cell, ...]
    constant: float = 0.0
    measured: tuple[Measured, ...] = ()
    source: str = "kernels"

    def predict(self, int8: Iterable[str]) -> float:
        """Return the predicted seconds per run with these layers in int8, all others float.

        Raises:
            DataError: a layer that the model does not know.
        """
        chosen = frozenset(int8)
        if unknown := chosen - set(self.layers):
            raise DataError(f"no latency is known of layer '{min(unknown)}'")
        return self.constant + sum(cell.cost(chosen) for cell in self.cells)

    def problem(self, noise: Mapping[str, float]) -> Problem:
        """Return the choice between `float` and `int8` for each layer; those without noise stay float.

        Cost is in seconds, `LEAST_GAIN` on top for each int8 layer; the loss of int8 is the layer's noise.
        """
        price = LEAST_GAIN * self.predict(())
        items = {
            layer: {"float": Option(0.0), **({"int8": Option(price, noise[layer])} if layer in noise else {})}
            for layer in self.layers
        }
        terms = [
            Term(cell.layers, {c: s for c, s in cell.seconds.items() if _open(cell.layers, c, noise)})
            for cell in self.cells
        ]
        return Problem(items, terms, self.constant)

    def errors(self) -> dict[str, float]:
        """Return how far predictions are from what they were learned from, as parts of the measured time."""
        off = [abs(self.predict(m.int8) / m.seconds - 1.0) for m in self.measured]
        return {"mean": float(np.mean(off)), "largest": float(np.max(off))} if off else {}

    def explain(self, int8: Iterable[str], noise: Mapping[str, float] | None = None) -> list[LayerCost]:
        """Return one row per layer: what it costs in each precision, its borders, its noise, and why it is what it is.

        Raises:
            DataError: a layer that the model does not know.
        """
        chosen = frozenset(int8)
        total = self.predict(chosen)
        own: dict[str, Cell] = {cell.layers[0]: cell for cell in self.cells if len(cell.layers) == 1}
        borders = self._borders(chosen)
        rows = []
        for layer in self.layers:
            cell = own.get(layer)
            costs = {p: cell.seconds[p,] if cell else 0.0 for p in PRECISIONS}
            rows.append(
                LayerCost(
                    layer, PRECISIONS[layer in chosen], costs["float"] * 1e6, costs["int8"] * 1e6,
                    borders.get(layer, 0.0) * 1e6, (noise or {}).get(layer),
                    _why(layer, chosen, self.predict(chosen ^ {layer}) - total, noise),
                )
            )  # fmt: skip
        return rows

    def _sums(self) -> Array:
        return np.array([self.predict(m.int8) for m in self.measured])

    def refined(self, int8: Iterable[str], ratio: float) -> LatencyModel:
        """Return the model that also knows of one more measured choice: `ratio` is its time over that of all float."""
        chosen = frozenset(int8)
        extra = Measured(chosen, ratio * self.predict(()), 0)
        return corrected(replace(self, measured=(*self.measured, extra)))

    def _borders(self, chosen: frozenset[str]) -> dict[str, float]:
        """Return what each layer's borders cost above the cheaper of all float and all int8, in equal shares."""
        found: dict[str, float] = defaultdict(float)
        for cell in self.cells:
            if len({layer in chosen for layer in cell.layers}) > 1:
                alike = min(cell.seconds[(p,) * len(cell.layers)] for p in PRECISIONS)
                for layer in cell.layers:
                    found[layer] += (cell.cost(chosen) - alike) / len(cell.layers)
        return found


@dataclass(frozen=True)
class LayerCost:
    """One layer in a report: times in microseconds per run, noise as power relative to the output's."""

    layer: str
    precision: str
    float_us: float
    int8_us: float
    border_us: float
    noise: float | None
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


def _why(layer: str, chosen: frozenset[str], change: float, noise: Mapping[str, float] | None) -> str:
    other = "float" if layer in chosen else "int8"
    if layer not in chosen and noise is not None and layer not in noise:
        return "not to be quantized"
    if change >= 0.0:
        return f"{other} would cost {change * 1e6:.0f} µs more"
    if layer in chosen:
        return f"{other} would save {-change * 1e6:.0f} µs; what it is part of pays"
    if noise is None:
        return f"int8 would save {-change * 1e6:.0f} µs, which is too little to tell"
    if not chosen:
        return f"int8 would save {-change * 1e6:.0f} µs, but nothing that was tried with it keeps the bound"
    return f"int8 would save {-change * 1e6:.0f} µs; its noise is spent better elsewhere"


def _open(layers: Sequence[str], combination: Sequence[str], noise: Mapping[str, float]) -> bool:
    return all(p == "float" or layer in noise for layer, p in zip(layers, combination, strict=True))


def measure(
    float_model: Model,
    make: Make,
    layers: Sequence[str],
    feeds: Iterable[Feeds],
    *,
    provider: str = "cpu",
    threads: int = 1,
    budget: float = BUDGET,
    progress: Callable[[str], None] | None = None,
) -> LatencyModel:
    """Return what each layer and each border costs in float and in int8, measured on 8 or 16 models.

    Args:
        float_model: the model in the form that `make` starts from; its node labels name the layers.
        make: builds the model with some layers in int8; called once per model to time.
        layers: labels of the layers that may be int8.
        feeds: what to time on; the first `MAX_FEEDS` are taken.
        provider: short name of the execution provider.
        threads: ORT's intra-op threads.
        budget: seconds that timing takes, about; loading and `make` come on top.
        progress: takes short sentences about what is going on.

    Raises:
        DataError: there are no feeds, or they do not fit.
        ModelError: ORT refuses a model.
    """
    ready = list(itertools.islice(feeds, MAX_FEEDS))
    if not ready:
        raise DataError("there are no samples to time on")
    say = progress or _silent
    places = Places(float_model, layers)
    chosen = designs(list(layers), places.all())
    subjects = []
    for number, int8 in enumerate(chosen):
        say(f"making model {number + 1} of {len(chosen)} to time")
        subjects.append(Subject(make(int8), int8))
    run_all(subjects, ready, provider=provider, threads=threads, budget=budget, progress=say)
    return fit(places, tuple(layers), subjects)


def _silent(text: str) -> None:
    """Say nothing."""


def designs(layers: Sequence[str], groups: Iterable[Sequence[str]]) -> list[frozenset[str]]:
    """Return which layers are int8 in each model to time: first none, last all, those between by an orthogonal array.

    Args:
        layers: labels, in the order of the graph.
        groups: layers that meet; they get different columns of the array, eight at most.
    """
    if not layers:
        return [frozenset()]
    near: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for a, b in itertools.permutations(group, 2):
            near[a].add(b)
    array = _array(3)
    columns, shared = _columns(layers, near, array.shape[1])
    if shared:
        array = _array(4)
        columns, _ = _columns(layers, near, array.shape[1])
    rows = [frozenset(layer for layer in layers if row[columns[layer]]) for row in array]
    return list(dict.fromkeys(rows))


def _array(factors: int) -> npt.NDArray[np.bool_]:
    """Return an orthogonal array of strength three: each column is a product of an odd number of factors.

    2 ** factors rows; four columns for three factors, eight for four; the first row is all False, the last all True.
    """
    signs = np.array(list(itertools.product((1, -1), repeat=factors)))
    words = [w for k in range(1, factors + 1, 2) for w in itertools.combinations(range(factors), k)]
    return np.stack([signs[:, word].prod(axis=1) < 0 for word in words], axis=1)


def _columns(layers: Sequence[str], near: Mapping[str, set[str]], width: int) -> tuple[dict[str, int], int]:
    """Return a column for each layer, one that no neighbour has where there is one, and how many had to share."""
    columns: dict[str, int] = {}
    load: Counter[int] = Counter()
    shared = 0
    for layer in layers:
        taken = Counter(columns[other] for other in near.get(layer, ()) if other in columns)
        columns[layer] = min(range(width), key=lambda c: (taken[c], load[c], c))
        load[columns[layer]] += 1
        shared += taken[columns[layer]] > 0
    return columns, shared


def fit(places: Places, layers: tuple[str, ...], subjects: Sequence[Subject]) -> LatencyModel:
    """Return the latency model that explains what was measured."""
    measured = tuple(Measured(s.int8, s.seconds, len(s.kernels)) for s in subjects)
    if any(s.matches is None for s in subjects):
        return _from_totals(layers, measured)
    spent = [_by_place(places, layers, subject) for subject in subjects]
    scale, each = _calibrated(spent, measured)
    table: dict[tuple[str, ...], list[float]] = {}
    for group in dict.fromkeys(g for by_place in spent for g in by_place):
        table[group] = [scale * s + each * n for s, n in (p.get(group, (0.0, 0)) for p in spent)]
    constant = float(np.mean(table.pop((), [0.0])))
    cells = [_cell(group, row, [m.int8 for m in measured]) for group, row in table.items()]
    cells.sort(key=lambda cell: len(cell.layers))
    return corrected(LatencyModel(layers, tuple(cells), constant, measured))


def _by_place(places: Places, layers: Iterable[str], subject: Subject) -> dict[tuple[str, ...], tuple[float, int]]:
    """Return seconds and number of kernels by the layers they are put down to."""
    assert subject.matches is not None
    assert subject.optimized is not None
    groups = assign_kernels(places, layers, subject.model, subject.matches, subject.optimized)
    named = subject.matches.of(subject.ops)
    outer = {id(node) for node in subject.optimized.graph.node}
    found: dict[tuple[str, ...], tuple[float, int]] = {}
    for name, seconds in subject.kernels.items():
        k = named.get(name)
        if k is not None and id(subject.matches.kernels[k].node) not in outer:
            continue
        group = tuple(sorted(groups[k])) if k is not None else ()
        before = found.get(group, (0.0, 0))
        found[group] = (before[0] + seconds, before[1] + 1)
    return found


def _calibrated(
    spent: Sequence[Mapping[tuple[str, ...], tuple[float, int]]], measured: Sequence[Measured]
) -> tuple[float, float]:
    """Return what turns kernel times under profiling into those without: a factor, and seconds to add per kernel."""
    sums = np.array([sum(s for s, _ in by_place.values()) for by_place in spent])
    counts = np.array([sum(n for _, n in by_place.values()) for by_place in spent], float)
    totals = np.array([m.seconds for m in measured])
    rows = np.stack([sums, counts * 1e-6], axis=1) / totals[:, None]
    # as many made-up models as there are say: no overhead; it and the factor are hard to tell apart
    prior = np.diag([1.0, float(np.mean(rows[:, 1]))])
    found = np.linalg.lstsq(np.vstack([rows, prior]), np.r_[np.ones_like(totals), 1.0, 0.0], rcond=None)[0]
    return float(found[0]), float(found[1]) * 1e-6


def _cell(group: tuple[str, ...], seconds: Sequence[float], chosen: Sequence[frozenset[str]]) -> Cell:
    """Return the table of one place: the mean of each combination seen, an additive fit for those that were not."""
    seen: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for value, int8 in zip(seconds, chosen, strict=True):
        seen[tuple(PRECISIONS[layer in int8] for layer in group)].append(value)
    rows = np.array([[1.0, *(float(p == "int8") for p in c)] for c in seen])
    means = np.array([np.mean(values) for values in seen.values()])
    effects = np.linalg.lstsq(rows, means, rcond=None)[0]
    table = {}
    for combination in itertools.product(PRECISIONS, repeat=len(group)):
        if combination in seen:
            table[combination] = float(np.mean(seen[combination]))
        else:
            row = np.array([1.0, *(float(p == "int8") for p in combination)])
            table[combination] = float(np.clip(row @ effects, 0.0, means.max()))
    return Cell(group, table)


def corrected(model: LatencyModel) -> LatencyModel:
    """Return the model with its tables moved, as little as it takes, towards the times of whole runs.

    The posterior mean where each entry is normal around its value, and each measured total around its sum.
    """
    keys = [(i, combination) for i, cell in enumerate(model.cells) for combination in cell.seconds]
    column = {key: n for n, key in enumerate(keys)}
    values = np.array([model.cells[i].seconds[combination] for i, combination in keys])
    rows = np.zeros((len(model.measured), len(keys)))
    for row, measured in zip(rows, model.measured, strict=True):
        for i, cell in enumerate(model.cells):
            row[column[i, tuple(PRECISIONS[layer in measured.int8] for layer in cell.layers)]] = 1.0
    totals = np.array([m.seconds for m in model.measured])
    spread = _DISTRUST * np.abs(values)
    rows *= spread
    weights = np.linalg.solve(rows @ rows.T + np.diag((_NOISE * totals) ** 2), totals - model._sums())
    values = values + spread * (rows.T @ weights)
    cells = [
        Cell(cell.layers, {c: float(values[column[i, c]]) for c in cell.seconds}) for i, cell in enumerate(model.cells)
    ]
    return replace(model, cells=tuple(cells))


def _from_totals(layers: tuple[str, ...], measured: tuple[Measured, ...]) -> LatencyModel:
    """Return the model of least change per layer that explains whole runs."""
    totals = np.array([m.seconds for m in measured])
    base = totals[0]
    rows = np.array([[float(layer in m.int8) for layer in layers] for m in measured])
    gains = np.linalg.lstsq(rows, totals - base, rcond=None)[0] if layers else np.zeros(0)
    cells = [Cell((layer,), {("float",): 0.0, ("int8",): float(g)}) for layer, g in zip(layers, gains, strict=True)]
    return LatencyModel(layers, tuple(cells), float(base), measured, "totals")
