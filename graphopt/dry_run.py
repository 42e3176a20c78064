"""What the default pipeline would change in a model, where, and what it nearly changed; nothing is kept or written."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graphopt import registry
from graphopt.base import Change, Target, all_names
from graphopt.errors import GraphoptError
from graphopt.kernels import REORDERS
from graphopt.model import Model, load
from graphopt.optimizer import default_pipeline
from graphopt.pipeline import Settings
from graphopt.profile import optimized_graph
from graphopt.report import PassRecord, Size
from graphopt.samples import Samples
from graphopt.timing import quick_ratio
from graphopt.trace import all_nodes

BUDGET = 1.0
"""Seconds of timing, loading not counted."""

_NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*(?![\w.])")
_SIZES = re.compile(r"\[[\d, -]+\]")
_WORD = re.compile(r"[^\s,;()'`]*[^\s,;()'`:.]")


@dataclass(frozen=True)
class Site:
    """One change, or near miss, of one pass: `why` is the reason for it, or what blocks it."""

    step: str
    where: str
    what: str
    why: str


@dataclass(frozen=True)
class Group:
    """Changes or near misses of one pass that say the same but for names: how many, one reason in full, all places."""

    step: str
    what: str
    why: str
    example: str
    places: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many."""
        return len(self.places)


@dataclass(frozen=True)
class After:
    """The result in ORT.

    `kernels` and `reorders` are counts, None where ORT's graph cannot be read.  `timing` is its latency as a part of
    the model's own, as `Ratio.to_dict` has it; None where it was not measured.  `refused` is what ORT says where it
    does not run the result.
    """

    kernels: int | None
    reorders: int | None
    timing: dict[str, Any] | None
    refused: str | None = None


@dataclass(frozen=True)
class DryRun:
    """What the pipeline would do.

    Attributes:
        pipeline: its text form.
        before, after: sizes of the model and of the result.
        changes: all that it would change, in order.
        near_misses: what passes nearly changed and still would not when they are done.
        failures: pass -> why it was rolled back.
        result: the result in ORT.
        names: of nodes and tensors, left out where sites are compared.
    """

    pipeline: str
    before: Size
    after: Size
    opset: tuple[int, int]
    changes: tuple[Site, ...]
    near_misses: tuple[Site, ...]
    failures: dict[str, str]
    result: After
    names: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, near misses grouped."""
        return {
            "pipeline": self.pipeline, "before": asdict(self.before), "after": asdict(self.after),
            "opset": list(self.opset), "changes": [asdict(site) for site in self.changes],
            "near_misses": [{**asdict(group), "count": group.count} for group in self.missed()],
            "failures": self.failures, "result": asdict(self.result),
        }  # fmt: skip

    def changed(self) -> list[Group]:
        """Return the changes in groups, those first that go beyond tidying up."""
        groups = grouped(self.changes, self.names, reasons=False)
        return sorted(groups, key=lambda group: (not registry.get(group.step).optional, -group.count))

    def missed(self) -> list[Group]:
        """Return the near misses in groups, the largest first."""
        return grouped(self.near_misses, self.names)


def dry_run(
    model: Model, samples: Samples, *, threads: int = 1, provider: str = "cpu", seed: int = 0, measure: bool = True
) -> DryRun:
    """Run the default pipeline over a copy of `model`, and the result in ORT; arguments as of `explain`."""
    seen: dict[int, list[Change]] = defaultdict(list)
    records: dict[int, PassRecord] = {}

    def watch(record: PassRecord, change: Change) -> None:
        records[id(record)] = record
        seen[id(record)].append(Change(change.where, change.what, change.why, _kept if change.apply else None))

    settings = Settings(verify="off", seed=seed, target=Target(provider, threads), watch=watch)
    pipeline = default_pipeline()
    result = pipeline.run(model, settings=settings)
    changes: list[Site] = []
    missed: dict[str, list[Site]] = {}
    for key, record in records.items():
        if record.failure is not None:
            continue
        sites = [Site(record.name, c.where, c.what, c.why) for c in seen[key]]
        changes += [site for site, c in zip(sites, seen[key], strict=True) if not c.blocked]
        missed[record.name] = [site for site, c in zip(sites, seen[key], strict=True) if c.blocked]
    last = {record.name: id(record) for record in result.report.passes}
    near = [s for name, sites in missed.items() if last[name] in records for s in dict.fromkeys(sites)]
    report = result.report
    return DryRun(
        str(pipeline), report.before, report.after, (report.opset_before, report.opset_after), tuple(changes),
        tuple(near), {r.name: r.failure or "" for r in report.failures},
        _after(model, result.model, samples, settings, measure),
        frozenset(all_names(model) | all_names(result.model)) - {str(node.op) for node in model.nodes()},
    )  # fmt: skip


def _kept() -> None:
    """Stand for a change that was applied."""


def _after(before: Model, after: Model, samples: Samples, settings: Settings, measure: bool) -> After:
    try:
        counts = _kernels(after, settings.target.provider)
        return After(*counts, _timing(before, after, samples, settings) if measure else None)
    except GraphoptError as error:  # a fault of a pass: `optimize` would roll back what made it
        return After(None, None, None, error.what)


def _kernels(model: Model, provider: str) -> tuple[int | None, int | None]:
    """Return how many nodes ORT makes of a model, and how many of them are reorders."""
    optimized = optimized_graph(load(model), provider=provider)
    if optimized is None:
        return None, None
    ops = [node.op_type for node in all_nodes(optimized.graph)]
    return len(ops), sum(op in REORDERS for op in ops)


def _timing(before: Model, after: Model, samples: Samples, settings: Settings) -> dict[str, Any]:
    target = settings.target
    feeds = samples.limit(1) if samples.random else samples
    ratio = quick_ratio(
        before, after, feeds, budget_s=BUDGET, threads=target.threads, provider=target.provider, seed=settings.seed
    )
    return ratio.to_dict()


def grouped(sites: Sequence[Site], names: Collection[str] = (), *, reasons: bool = True) -> list[Group]:
    """Return sites that say the same but for names (and numbers in reasons) as groups, the largest first."""
    groups: dict[tuple[str, str, str], list[Site]] = defaultdict(list)
    for site in sites:
        why = _NUMBER.sub("N", _plain(site.why, names)) if reasons else ""
        groups[site.step, _plain(site.what, ()), why].append(site)
    found = [
        Group(step, one[0].what if len(one) == 1 else what, why, one[0].why, tuple(site.where for site in one))
        for (step, what, why), one in groups.items()
    ]
    return sorted(found, key=lambda group: -group.count)


def by_step(sites: Sequence[Site]) -> dict[str, int]:
    """Return pass -> how many, the largest first."""
    return dict(Counter(site.step for site in sites).most_common())


def _plain(text: str, names: Collection[str]) -> str:
    """Return a sentence without the names that tell one place from another."""
    text = re.sub(r"'[^']*'|`[^`]*`", "'…'", text)
    text = _SIZES.sub("[…]", text)
    return _WORD.sub(lambda word: "'…'" if word[0] in names else word[0], text)
