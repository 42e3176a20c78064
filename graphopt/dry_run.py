"""What the default pipeline would change in a model, where, and what it nearly changed; nothing is kept or written."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.base import Change, Target
from graphopt.kernels import REORDERS
from graphopt.model import Model
from graphopt.optimizer import default_pipeline
from graphopt.pipeline import Settings
from graphopt.profile import profiled
from graphopt.report import PassRecord, Size
from graphopt.samples import Samples


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
    """The result in ORT: its kernels, reorders among them, and the seconds all kernels took in one profiled run."""

    kernels: int
    reorders: int
    kernel_seconds: float


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
    """

    pipeline: str
    before: Size
    after: Size
    opset: tuple[int, int]
    changes: tuple[Site, ...]
    near_misses: tuple[Site, ...]
    failures: dict[str, str]
    result: After

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, near misses grouped."""
        document = asdict(self)
        document["near_misses"] = [{**asdict(group), "count": group.count} for group in grouped(self.near_misses)]
        return document


def dry_run(model: Model, samples: Samples, *, threads: int, provider: str, seed: int) -> DryRun:
    """Run the default pipeline over a copy of `model`, and the result in ORT.

    Raises:
        GraphoptError: ORT refuses the result.
    """
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
        _after(result.model, samples, threads=threads, provider=provider, seed=seed),
    )  # fmt: skip


def _kept() -> None:
    """Stand for a change that was applied."""


def _after(model: Model, samples: Samples, *, threads: int, provider: str, seed: int) -> After:
    found = profiled(model, samples, threads=threads, provider=provider, seed=seed)
    ops = [kernel.node.op_type for kernel in found.matches.kernels] or [time.op for time in found.times]
    return After(len(ops), sum(op in REORDERS for op in ops), sum(time.seconds for time in found.times))


def grouped(sites: tuple[Site, ...]) -> list[Group]:
    """Return sites that say the same but for names and numbers as groups, the largest first."""
    groups: dict[tuple[str, str, str], list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.step, _plain(site.what), _plain(site.why)].append(site)
    found = [
        Group(
            step, members[0].what if len(members) == 1 else what, why, members[0].why, tuple(s.where for s in members)
        )
        for (step, what, why), members in groups.items()
    ]
    return sorted(found, key=lambda group: -group.count)


def by_step(sites: tuple[Site, ...]) -> dict[str, int]:
    """Return pass -> how many, the largest first."""
    return dict(Counter(site.step for site in sites).most_common())


def _plain(text: str) -> str:
    """Return a sentence without the names and numbers that tell one place from another."""
    text = re.sub(r"'[^']*'|`[^`]*`", "'…'", text)
    return re.sub(r"(?<![\w.])\d[\d.,]*(?![\w.])", "N", text)
