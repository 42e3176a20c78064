"""Channels that matter least, cut out of the graph together with all that is coupled to them, and the cut proved.

groups of coupled channels (`analysis/channels.py`)
→ how much each unit matters (`importance.py`)
→ how many and which ones stay (`channel_choice.py`)
→ the graph without the others (`channel_surgery.py`)
→ equal to the uncut graph with zeros where those would be read (`masking.py`), or the group stays as it is
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import kept as notes
from graphopt.analysis.channels import Group, find_groups
from graphopt.analysis.constants import is_constant
from graphopt.base import Change, Context, Exactness, Loss, Pass
from graphopt.channel_choice import choose, choose_by_loss, elements_per_unit, keep_first
from graphopt.channel_costs import MacsModel
from graphopt.channel_losses import Curve
from graphopt.channel_noise import losses
from graphopt.edit import label, nested_graphs
from graphopt.errors import DataError, ModelError, SpecError, did_you_mean
from graphopt.importance import COMBINES, CRITERIA, scores
from graphopt.masking import proved, runs
from graphopt.model import Model, from_snapshot
from graphopt.names import matches
from graphopt.registry import register

from .channel_patches import RefusedError
from .channel_surgery import Surgery, first_site, plan, width_of

Array: TypeAlias = np.ndarray[Any, Any]

OF = ("channels", "params", "macs")
SPREADS = ("global", "local")

MOST_PROOFS = 100
"""Cuts that are tried to find which groups are at fault; what is not tried by then stays as it is."""

SLACK = 1e-9
"""Part of a cost that rounding may add to it."""


@register
@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels, heads and hidden units that matter least, with all that is coupled to them.

    Lossy, keeps the signature.  The result is a smaller, ordinary model: equal, but for rounding, to the model with the
    removed channels zeroed where they are read, which is checked on random feeds for every cut.  A group that cannot be
    cut, or whose cut fails that check, stays as it is.  What is removed counts from the widths that the model had
    before it was first pruned: the same request again does nothing.

    Options:
        ratio: part that is removed, of what `of` says.
        of: channels (units of groups), params or macs.
        criterion: what makes a unit matter, see `graphopt.importance`.
        spread: global ranks the units of all groups together (obs: takes the counts that least disturb the outputs),
            local takes about the same part of each.
        aggregate: how the sites of a unit come together: sum, mean, max or l2.
        round_to: channels that stay are a multiple of it; 0 for what suits the target.
        least: units that stay in each group at least.
        only: names of the groups that may be cut, * and ? allowed; all of them where it is empty.
        skip: names of groups that stay.
        counts: GROUP=UNITS says how many stay, for some groups, in place of `ratio`.
        normalization: also cut axes whose own mean and variance are taken (LayerNormalization); what stays is then
            normalised by others than before.
    """

    name: ClassVar[str] = "prune-channels"
    exactness: ClassVar[Exactness] = "lossy"
    loses: ClassVar[Loss] = "structure"
    scope: ClassVar[Any] = "model"
    ratio: float = 0.0
    of: str = "channels"
    criterion: str = "l2"
    spread: str = "global"
    aggregate: str = "sum"
    round_to: int = 0
    least: int = 1
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    normalization: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: an option is out of range or unknown.
        """
        if not 0.0 <= self.ratio < 1.0:  # NaN too
            raise ValueError(f"ratio is from 0 to below 1, not {self.ratio:g}")
        for name, known in (("of", OF), ("spread", SPREADS), ("criterion", CRITERIA), ("aggregate", COMBINES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.round_to < 0 or self.least < 1:
            raise ValueError("round_to is 0 or more, least 1 or more")
        if self.counts and self.ratio:
            raise ValueError("counts and ratio both say how much is removed: give one of them")
        _parsed(self.counts)

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per group that is cut; the cut of all of them is made, as one, at the end."""
        found = find_groups(ctx.model, ctx.shapes, ctx.evaluate, normalization=self.normalization).groups
        yield from (Change(g.name, f"{g.size} {g.kind}", g.frozen) for g in found if g.frozen)
        yield from _inside(graph)
        before = [name for node in graph.nodes for name in notes.groups(node)]
        self._check_names([*(g.name for g in found), *before])
        if before:
            ctx.notes.append(f"pruned before: a ratio is of the widths that {len(before)} groups had at first")
        request = json.dumps(self.options(), sort_keys=True)
        if any(request in notes.requests(node) for node in graph.nodes):
            return
        cutter = _Cutter(ctx, [g for g in found if not g.frozen and self._may_cut(g)])
        wanted = cutter.settle(self)
        yield from (Change(name, "its channels are not cut", why) for name, why in cutter.refused.items())
        accepted: dict[str, Array] = {}
        for group in cutter.groups:
            if group.name in wanted:
                stay = wanted[group.name]
                yield Change(
                    group.name, f"{group.size} {group.kind} -> {len(stay)}", f"least by {self.criterion}",
                    lambda name=group.name, stay=stay: accepted.update({name: stay}),  # type: ignore[misc]
                )  # fmt: skip
        if accepted:
            cutter.cut(accepted, request if len(accepted) == len(wanted) else "")

    def _check_names(self, names: Sequence[str]) -> None:
        for name in _parsed(self.counts):
            if name not in names:
                hint = did_you_mean(name, names) or "graphopt prune MODEL --explain lists them"
                raise SpecError(f"the model has no channel group '{name}'", at="counts", hint=hint)

    def _may_cut(self, group: Group) -> bool:
        return matches(group.name, self.only, self.skip)


def _inside(graph: gs.Graph) -> Iterator[Change]:
    """Name the nodes whose graphs hold layers."""
    for node in graph.nodes:
        inside = (n for inner in nested_graphs([node]) for n in inner.nodes)
        layers = sum(any(is_constant(t) and len(t.shape or ()) > 1 for t in n.inputs) for n in inside)
        if layers:
            yield Change(label(node), f"{layers} layers inside it", "graphs inside nodes are not cut")


def _parsed(counts: Sequence[str]) -> dict[str, int]:
    """Return group -> units that stay."""
    found = {}
    for text in counts:
        name, equals, count = text.rpartition("=")
        if not equals or not count.strip().isdecimal() or int(count) < 1:
            raise ValueError(f"counts are GROUP=UNITS with 1 unit or more, not {text!r}")
        found[name.strip()] = int(count)
    return found


class _Cutter:
    """Chooses what is cut of some groups, proves it, and does it.

    Attributes:
        groups: those that may be cut.
        refused: why groups stay as they are.
    """

    def __init__(self, ctx: Context, groups: Sequence[Group]) -> None:
        self.ctx = ctx
        self.groups = list(groups)
        self.refused: dict[str, str] = {}
        self._by_name = {group.name: group for group in groups}
        self._feeds: list[Mapping[str, Any]] | None = None
        self._proofs = 0

    def settle(self, asked: PruneChannels) -> dict[str, Array]:
        """Return the units that stay of each group that is cut: chosen, planned and proved."""
        choice = _Choice(asked, self.ctx)
        while self.groups:
            wanted = choice.of(self.groups)
            refused = self._refusals(wanted)
            if not refused:
                return wanted
            self.refused.update(refused)
            self.groups = [group for group in self.groups if group.name not in refused]
        return {}

    def cut(self, kept: Mapping[str, Array], request: str) -> None:
        """Cut groups out of the model.

        Args:
            kept: the units that stay.
            request: what this answers, all of it; "" where it is only a part of what was proved.

        Raises:
            ModelError: a part of what was proved does not hold on its own.
        """
        if not request and (why := self._wrong(kept)):
            raise ModelError(f"the cut of a part of the groups does not hold: {why}")
        surgery, _ = self._plan(kept)
        surgery.operate(self.ctx.model, self.ctx.fresh_name)
        for name in kept if request else ():
            site = first_site(self._by_name[name])
            if site is not None and site.node is not None:
                notes.record_request(site.node, request)

    def _refusals(self, wanted: Mapping[str, Array]) -> dict[str, str]:
        """Return the groups whose cut is impossible or wrong, and why."""
        if not wanted:
            return {}
        _, refused = self._plan(wanted)
        return refused or self._culprits(wanted)

    def _plan(self, kept: Mapping[str, Array]) -> tuple[Surgery, dict[str, str]]:
        return plan(self.ctx.model.graph, self.groups, kept, self.ctx.shapes, self.ctx.model.opset)

    def _culprits(self, wanted: Mapping[str, Array]) -> dict[str, str]:
        """Return the groups without which the cut is right: halves are tried until single groups are left."""
        why = self._wrong(wanted)
        if not why:
            return {}
        if len(wanted) == 1 or self._proofs >= MOST_PROOFS:
            return dict.fromkeys(wanted, why)
        names = list(wanted)
        found: dict[str, str] = {}
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            found.update(self._culprits({name: wanted[name] for name in half}))
        return found or dict.fromkeys(wanted, f"together with others: {why}")

    def _wrong(self, kept: Mapping[str, Array]) -> str:
        """Return what is wrong with a cut; "" where it equals the masked model, or runs where it cannot be equal."""
        self._proofs += 1
        exact = {name: stay for name, stay in kept.items() if not self._by_name[name].inexact}
        groups = [(self._by_name[name], stay) for name, stay in exact.items()]
        ctx = self.ctx
        try:
            why = ""
            if exact:
                why = proved(self._trial(exact), ctx.model, groups, self.feeds, ctx.runner, seed=ctx.seed).why
            return why if why or len(exact) == len(kept) else runs(self._trial(kept), self.feeds, ctx.runner)
        except RefusedError as refusal:
            return str(refusal)

    def _trial(self, kept: Mapping[str, Array]) -> Model:
        """Return a copy of the model with a cut made."""
        surgery, refused = self._plan(kept)
        if refused:
            raise RefusedError(next(iter(refused.values())))
        trial = from_snapshot(self.ctx.model.snapshot())
        surgery.operate(trial, Context(trial, self.ctx.evaluate).fresh_name)
        return trial

    @property
    def feeds(self) -> list[Mapping[str, Any]]:
        """Inputs to prove cuts on: random ones of two shapes, the user's where there are none."""
        if self._feeds is None:
            try:
                self._feeds = list(self.ctx.random_feeds())
            except DataError:
                if self.ctx.samples is None:
                    raise
                self._feeds = list(itertools.islice(self.ctx.samples, 2))
        return self._feeds


class _Choice:
    """How many and which units stay of each group, in proportion to what the model had before it was first pruned."""

    def __init__(self, asked: PruneChannels, ctx: Context) -> None:
        self.asked, self.ctx = asked, ctx
        self._scores: dict[str, Array] = {}
        self._curves: dict[str, Curve] = {}

    def of(self, groups: Sequence[Group]) -> dict[str, Array]:
        """Return the units that stay of each group that loses some."""
        counts = _parsed(self.asked.counts) if self.asked.counts else self._counts(groups)
        losing = [group for group in groups if counts.get(group.name, group.size) < group.size]
        values = self._scored(losing)
        return {group.name: keep_first(values[group.name], counts[group.name]) for group in losing}

    def _scored(self, groups: Sequence[Group]) -> dict[str, Array]:
        missing = [group for group in groups if group.name not in self._scores]
        if missing:
            found = scores(
                missing, self.asked.criterion, self.ctx, aggregate=self.asked.aggregate, seed=self.ctx.seed,
                gradients=self.ctx.gradients,
            )  # fmt: skip
            self._scores.update(found)
        return self._scores

    def _counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Return how many units stay: units that earlier cuts removed count as those that matter least."""
        asked = self.asked
        if not groups or not asked.ratio:
            return {}
        costs = MacsModel.of(self.ctx.model, groups, self.ctx.samples)
        whole = [_as_it_was(group) for group in groups]
        costs = replace(costs, sizes={group.name: group.size for group in whole})
        now = {group.name: group.size for group in groups}
        polynomial = costs.polynomial(asked.of)
        if polynomial.at(now) <= (1.0 - asked.ratio) * polynomial.at({}) * (1.0 + SLACK):
            return {}
        if asked.criterion == "obs" and asked.spread == "global":
            return self._by_loss(groups, costs)
        values = self._scored(groups)
        ranked = {
            group.name: np.append(values[group.name], np.full(first.size - group.size, -np.inf))
            for group, first in zip(groups, whole, strict=True)
        }
        kept = choose(
            whole, ranked, ratio=asked.ratio, of=asked.of, scope=asked.spread, round_to=asked.round_to,
            least=asked.least, macs=costs, provider=self.ctx.target.provider,
        )  # fmt: skip
        return {name: len(stay) for name, stay in kept.items()}

    def _by_loss(self, groups: Sequence[Group], costs: MacsModel) -> dict[str, int]:
        """Return the counts that least disturb the model's outputs, as measured on samples."""
        missing = [group for group in groups if group.name not in self._curves]
        self._curves.update(losses(missing, self.ctx) if missing else {})
        self._scores.update({group.name: self._curves[group.name].scores for group in groups})
        asked = self.asked
        return choose_by_loss(
            groups, self._curves, ratio=asked.ratio, of=asked.of, round_to=asked.round_to, least=asked.least,
            macs=costs, provider=self.ctx.target.provider,
        ).counts  # fmt: skip


def _as_it_was(group: Group) -> Group:
    """Return a group with as many units as it had at first, those that are gone behind the others."""
    site = first_site(group)
    if site is None or site.node is None:
        return group
    width = width_of(site)
    size = notes.width_before(site.node, group.name, width) * group.size // width
    if size <= group.size:
        return group
    whole = replace(site, units=np.repeat(np.arange(size), elements_per_unit(group)))
    return replace(group, size=size, sites=(whole,))
