"""Predicted latency of any number of units kept in each channel group, learned from a few measured models.

What a kernel takes depends on the sizes of the channel axes around it.  Each layer, and each tensor on which something
else runs (elementwise operators, pools, layouts converted), is a cell; its time is fitted with coefficients that are
not negative,

    seconds = c0 + sum of c[i] w[i] + c product of all w            w[i]: size of axis i, relative to the whole model's

on models whose groups were cut to counts drawn independently, so that the channels that a layer makes and those that
it reads vary apart.  ORT computes in blocks of channels where it can: there w is rounded up to whole blocks, so that a
cut within a block saves nothing, as on the machine.  Kernel times come from ORT's profiles, all models run side by side
(`kernel_times.py`); whole runs without profiling scale them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.channel_choice import Counts, MacsModel, allowed_counts, candidates, elements_per_unit
from graphopt.channel_costs import Piece, Polynomial, Width
from graphopt.edit import label
from graphopt.errors import DataError
from graphopt.kernel_times import Subject, run_all
from graphopt.kernels import BLOCKED_DOMAIN
from graphopt.model import Model
from graphopt.runtime import Feeds

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group

Array: TypeAlias = np.ndarray[Any, Any]
Make: TypeAlias = Callable[[Mapping[str, int]], Model]
"""Units kept by group -> the model with so many, in the form that will run."""

MODELS = 9
"""Models that are timed."""

LEAST_PART = 0.4
"""Of a group that is kept in them."""

BUDGET = 20.0
"""Seconds of timing; making the models is not counted."""

MAX_FEEDS = 2

BLOCK = 16
"""Channels that ORT's blocked kernels compute at a time."""

GAINS = (0.3, 4.0)
"""What cuts save, as a multiple of what profiles say, at least and at most."""

_PRIOR = 0.1
"""Weight of what is thought before anything is measured: most of the time goes with the product of the sizes."""


@dataclass(frozen=True)
class Cell:
    """What one layer, or what runs on one tensor, takes.

    Attributes:
        name: label of the layer, or name of the tensor.
        widths: sizes of the axes that groups lie on.
        blocked: whether ORT computes it in blocks of channels.
        seconds: of the whole model, by coefficient: constant, one per width, product of all (where there are several).
    """

    name: str
    widths: tuple[Width, ...]
    blocked: bool
    seconds: tuple[float, ...]

    @property
    def pieces(self) -> list[Piece]:
        """It as terms of a polynomial."""
        sets = _features(self.widths)
        return [Piece(self.name, each, ws) for each, ws in zip(self.seconds, sets, strict=True) if each > 0.0]


@dataclass(frozen=True)
class Timed:
    """One model that was timed: units kept, and seconds per run."""

    counts: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class ChannelTimes:
    """Seconds per run for any number of units kept.

    Attributes:
        sizes: group -> its units.
        blocks: group -> units that blocked kernels compute at a time.
        cells: what takes time.
        scale: of the whole, from times under profiling to those without.
        gain: of what cuts save, from what the cells say to what was measured.
        measured: what it was learned from; the first is whole.
        source: `kernels`, or `totals` where ORT's graph cannot be read and only whole runs were timed.
    """

    sizes: Mapping[str, int]
    blocks: Mapping[str, int]
    cells: tuple[Cell, ...]
    scale: float = 1.0
    gain: float = 1.0
    measured: tuple[Timed, ...] = ()
    source: str = "kernels"

    @cached_property
    def _polynomials(self) -> tuple[Polynomial, Polynomial]:
        pieces = [[p for c in self.cells if c.blocked is blocked for p in c.pieces] for blocked in (False, True)]
        whole = {name: self._up(name, size) for name, size in self.sizes.items()}
        return Polynomial(self.sizes, pieces[0]), Polynomial(whole, pieces[1])

    def _up(self, group: str, count: int) -> int:
        block = self.blocks.get(group, 1)
        return -(-count // block) * block

    def at(self, counts: Counts) -> float:
        """Return the predicted seconds per run with so many units kept."""
        plain, blocked = self._polynomials
        up = {name: self._up(name, count) for name, count in counts.items()}
        whole = plain.at({}) + blocked.at({})
        return self.scale * (whole - self.gain * (whole - plain.at(counts) - blocked.at(up)))

    predict = at

    def ratio(self, counts: Counts) -> float:
        """Return the predicted time as a part of the whole model's."""
        return self.at(counts) / self.at({})

    def tables(self, options: Mapping[str, Sequence[int]]) -> dict[tuple[str, ...], dict[tuple[int, ...], float]]:
        """Return the prediction as a sum of tables: groups -> their counts -> seconds; a constant at no groups."""
        plain, blocked = self._polynomials
        by = self.scale * self.gain
        rest = self.scale * (1.0 - self.gain) * (plain.at({}) + blocked.at({}))
        found = {g: {c: by * s for c, s in table.items()} for g, table in plain.tables(options).items()}
        up = {name: sorted({self._up(name, n) for n in counts}) for name, counts in options.items()}
        for groups, table in blocked.tables(up).items():
            mine = found.setdefault(groups, {})
            for counts in _combinations([options[g] for g in groups]):
                rounded = tuple(self._up(g, n) for g, n in zip(groups, counts, strict=True))
                mine[counts] = mine.get(counts, 0.0) + by * table[rounded]
        found[()] = {(): found.get((), {}).get((), 0.0) + rest}
        return found

    def corrected(self, counts: Counts, ratio: float) -> ChannelTimes:
        """Return the model that predicts what was measured of one more choice.

        Args:
            counts: units kept.
            ratio: its measured time as a part of the whole model's.
        """
        saved = 1.0 - self.ratio(counts)
        if saved <= 1e-6:
            return self
        gain = self.gain * float(np.clip((1.0 - ratio) / saved, 0.1, 5.0))
        return replace(self, gain=gain, measured=(*self.measured, Timed(dict(counts), ratio * self.at({}))))

    def errors(self) -> dict[str, float]:
        """Return how far predictions are from what they were learned from, as parts of the measured time."""
        off = [abs(self.at(m.counts) / m.seconds - 1.0) for m in self.measured]
        return {"mean": float(np.mean(off)), "largest": float(np.max(off))} if off else {}

    def explain(self, counts: Counts) -> list[LayerTime]:
        """Return what each layer takes whole and with so many units kept, the slowest first."""
        rows = []
        up = {name: self._up(name, count) for name, count in counts.items()}
        whole_up = {name: self._up(name, size) for name, size in self.sizes.items()}
        for cell in self.cells:
            sizes, kept = (whole_up, up) if cell.blocked else (self.sizes, counts)
            own = Polynomial(sizes, cell.pieces)
            whole = own.at({})
            cut = max(0.0, whole - self.gain * (whole - own.at(kept)))
            rows.append(LayerTime(cell.name, self.scale * whole * 1e6, self.scale * cut * 1e6))
        return sorted(rows, key=lambda row: -row.whole_us)


@dataclass(frozen=True)
class LayerTime:
    """One layer, or what runs on one tensor: microseconds per run, whole and cut."""

    name: str
    whole_us: float
    cut_us: float


def _combinations(options: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    if not options:
        yield ()
        return
    for first in options[0]:
        for rest in _combinations(options[1:]):
            yield (first, *rest)


def _features(widths: Sequence[Width]) -> list[tuple[Width, ...]]:
    """Return the products that a cell's time is a sum of."""
    singles = [(width,) for width in widths]
    return [(), *singles, *([tuple(widths)] if len(widths) > 1 else [])]


def measure(
    model: Model,
    groups: Sequence[Group],
    make: Make,
    macs: MacsModel,
    feeds: Iterable[Feeds],
    *,
    round_to: int = 0,
    least: int = 1,
    provider: str = "cpu",
    threads: int = 1,
    budget: float = BUDGET,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ChannelTimes:
    """Return what any number of units kept takes, measured on `MODELS` models.

    Args:
        model: the one that `make` cuts; the groups' tensors are its.
        groups: those that may be cut.
        make: builds the model with so many units kept; called once per model to time, first with nothing cut.
        macs: its costs.
        feeds: what to time on; the first `MAX_FEEDS` are taken.
        round_to: multiple that is kept; 0 for the target's.
        least: units that are kept at least.
        provider: short name of the execution provider.
        threads: ORT's intra-op threads.
        budget: seconds that timing takes, about; loading and `make` come on top.
        seed: of the counts that are timed.
        progress: takes short sentences about what is going on.

    Raises:
        DataError: there are no feeds, or they do not fit.
        ModelError: ORT refuses a model.
    """
    ready = list(islice(feeds, MAX_FEEDS))
    if not ready:
        raise DataError("there are no samples to time on")
    say = progress or _silent
    options = {g.name: candidates(allowed_counts(g, round_to, least, provider)) for g in groups}
    chosen = layouts(options, seed)
    subjects = []
    for number, counts in enumerate(chosen):
        say(f"making model {number + 1} of {len(chosen)} to time")
        subjects.append(Subject(make(counts), frozenset()))
    run_all(subjects, ready, provider=provider, threads=threads, budget=budget, progress=say)
    blocks = {g.name: max(1, BLOCK // math.gcd(BLOCK, elements_per_unit(g))) for g in groups}
    return fit(model, groups, macs, chosen, subjects, blocks)


def _silent(text: str) -> None:
    """Say nothing."""


def layouts(options: Mapping[str, Sequence[int]], seed: int = 0) -> list[dict[str, int]]:
    """Return the counts of each model to time: first whole, then two of the same part of all, then drawn ones.

    Args:
        options: group -> counts, the largest first.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    high = {g: [n for n in counts if n >= LEAST_PART * counts[0]] for g, counts in options.items()}
    found = [{g: counts[0] for g, counts in high.items()}]
    found += [{g: _near(counts, part) for g, counts in high.items()} for part in (0.75, 0.5)]
    found += [{g: int(rng.choice(counts)) for g, counts in high.items()} for _ in range(MODELS - len(found))]
    return [dict(counts) for counts in dict.fromkeys(tuple(counts.items()) for counts in found)]


def _near(counts: Sequence[int], part: float) -> int:
    return min(counts, key=lambda count: abs(count - part * counts[0]))


def fit(
    model: Model,
    groups: Sequence[Group],
    macs: MacsModel,
    chosen: Sequence[Mapping[str, int]],
    subjects: Sequence[Subject],
    blocks: Mapping[str, int],
) -> ChannelTimes:
    """Return the times that explain what was measured."""
    measured = tuple(Timed(dict(c), s.seconds) for c, s in zip(chosen, subjects, strict=True))
    if any(s.matches is None for s in subjects):
        return _from_totals(macs, measured)
    places = _Places(model, groups, macs)
    spent = [_by_place(places, subject) for subject in subjects]
    cells = []
    for name in dict.fromkeys(name for by_place in spent for name in by_place):
        seconds = np.array([p.get(name, (0.0, False))[0] for p in spent])
        blocked = any(p[name][1] for p in spent if name in p)
        cells.append(_cell(name, places.widths.get(name, ()), seconds, blocked, chosen, macs.sizes, blocks))
    return _scaled(ChannelTimes(macs.sizes, blocks, tuple(cells), measured=measured))


class _Places:
    """Layers by label, and tensors by name, with the sizes of their axes that groups lie on."""

    def __init__(self, model: Model, groups: Sequence[Group], macs: MacsModel) -> None:
        self.widths: dict[str, tuple[Width, ...]] = {}
        self.made: dict[str, str] = {}
        self.layers: set[str] = set()
        for piece in macs.layers:
            self.layers.add(piece.label)
            self.widths[piece.label] = tuple(w for w in piece.widths if w.shares)
        shares: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        rest: dict[tuple[str, int], float] = {}
        for group in groups:
            for site in group.role("carries"):
                key = site.tensor.name, site.axis
                taken = int((site.units >= 0).sum())
                shares[key][group.name] = taken / group.size
                rest[key] = rest.get(key, float(len(site.units))) - taken
        for key, by_group in shares.items():
            self.widths.setdefault(key[0], (Width(rest[key], tuple(by_group.items())),))
        self.tensors = {name for name, _ in shares}
        self.after = {label(n): n.outputs[0].name for n in model.graph.nodes if n.outputs}


def _by_place(places: _Places, subject: Subject) -> dict[str, tuple[float, bool]]:
    """Return seconds by layer or tensor, and whether any of it is computed in blocks; '' for what is neither."""
    assert subject.matches is not None
    assert subject.optimized is not None
    nodes = list(subject.model.nodes())
    anchors: dict[str, str] = {i.name: i.name for i in subject.optimized.graph.input if i.name in places.tensors}
    names: list[str] = []
    for kernel in subject.matches.kernels:
        own = [label(nodes[i]) for i in kernel.stands]
        layer = next((name for name in own if name in places.layers), "")
        made = [t.name for i in reversed(kernel.stands) for t in nodes[i].outputs]
        tensor = next((t for t in (*kernel.node.output, *made) if t in places.tensors), "")
        before = next((anchors[t] for t in kernel.node.input if anchors.get(t)), "")
        names.append(layer or tensor or before)
        behind = tensor or (places.after.get(layer, "") if layer else "") or before
        anchors.update(dict.fromkeys(kernel.node.output, behind))
    named = subject.matches.of(subject.ops)
    outer = {id(node) for node in subject.optimized.graph.node}
    found: dict[str, tuple[float, bool]] = {}
    for name, seconds in subject.kernels.items():
        k = named.get(name)
        if k is not None and id(subject.matches.kernels[k].node) not in outer:
            continue
        place = names[k] if k is not None else ""
        blocked = k is not None and subject.matches.kernels[k].node.domain == BLOCKED_DOMAIN
        before_, was = found.get(place, (0.0, False))
        found[place] = before_ + seconds, was or blocked
    return found


def _cell(
    name: str, widths: tuple[Width, ...], seconds: Array, blocked: bool, chosen: Sequence[Mapping[str, int]],
    sizes: Mapping[str, int], blocks: Mapping[str, int],
) -> Cell:  # fmt: skip
    """Return the cell whose coefficients explain its times best: none negative, near the prior where they are few."""
    from scipy.optimize import nnls  # noqa: PLC0415  (0.3 s, for those who need it)

    def up(counts: Mapping[str, int]) -> dict[str, int]:
        return {g: -(-n // blocks[g]) * blocks[g] for g, n in counts.items()} if blocked else dict(counts)

    sets = _features(widths)
    whole = np.array([_product(ws, up(sizes)) for ws in sets])
    rows = np.array([[_product(ws, up({**sizes, **counts})) for ws in sets] for counts in chosen]) / whole
    peak = max(float(seconds[0]), float(seconds.mean()), 1e-12)
    prior = np.full(len(sets), 0.2 / len(sets))
    prior[-1] += 0.8
    system = np.vstack([rows, _PRIOR * np.eye(len(sets))])
    found = nnls(system, np.r_[seconds / peak, _PRIOR * prior])[0] * peak
    return Cell(name, widths, blocked, tuple(float(c / w) for c, w in zip(found, whole, strict=True)))


def _product(widths: Sequence[Width], counts: Mapping[str, int]) -> float:
    return math.prod(w.fixed + sum(each * counts[g] for g, each in w.shares) for w in widths)


def _scaled(times: ChannelTimes) -> ChannelTimes:
    """Return the times scaled to whole runs: all of it, and what cuts save.

    Profiling adds a little to every kernel, whatever its size: so cuts save a larger part than profiles say.
    """
    totals = np.array([m.seconds for m in times.measured])
    sums = np.array([times.at(m.counts) for m in times.measured])
    slope, fixed = np.polyfit(sums, totals, 1) if np.ptp(sums) > 0.02 * sums[0] else (totals[0] / sums[0], 0.0)
    whole = float(fixed + slope * sums[0])
    if not whole > 0.0:
        return replace(times, scale=float(np.mean(totals / sums)))
    return replace(times, scale=whole / float(sums[0]), gain=float(np.clip(slope * sums[0] / whole, *GAINS)))


def _from_totals(macs: MacsModel, measured: tuple[Timed, ...]) -> ChannelTimes:
    """Return times that go with MACs and a constant, from whole runs alone."""
    from scipy.optimize import nnls  # noqa: PLC0415  (as above)

    work = macs.polynomial("macs")
    whole = max(work.at({}), 1.0)
    rows = np.array([[1.0, work.at(m.counts) / whole] for m in measured])
    fixed, moving = nnls(rows, np.array([m.seconds for m in measured]))[0]
    cells = [Cell("", (), False, (float(fixed),))]
    for piece in macs.layers:
        widths = tuple(w for w in piece.widths if w.shares)
        inner = math.prod(w.fixed for w in piece.widths if not w.shares)
        seconds = [0.0] * len(_features(widths))
        seconds[-1] = float(moving) * piece.scale * inner / whole
        cells.append(Cell(piece.label, widths, False, tuple(seconds)))
    return ChannelTimes(macs.sizes, {}, tuple(cells), measured=measured, source="totals")
