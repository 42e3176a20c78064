"""Points of pruning curves -> Markdown, and a plot of each case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.models.benchmarks.pruning_cases import BEST, REPAIRS, Point
from graphopt.models.tasks import require

INTRODUCTION = """\
# Pruning without training: figures

Made by

    python -m graphopt.models.benchmarks.pruning --cache FOLDER --output docs/pruning-figures.md

Channels are cut until a part of the MACs is gone (`prune-channels{{ratio=…,of=macs,criterion=…}}`), or residual blocks
are left out (`drop-blocks`); behind the cut follows nothing, `reconstruct-weights{{method=bias}}`, or
`reconstruct-weights` (least squares).  No labels, no training: a few hundred calibration items are all that pruning
sees.  Quality: on test items that no step saw, {items} of them for curves, all (2,000; 600 digits) for the points with
an aim, beside the unpruned model on the same items; *points* are hundredths, with the paired 95 % interval.  MACs and
time: over those of the model that `optimize` makes without loss; time by processor time of one thread, paired, ONNX
Runtime's own optimisations on.

"""

STYLES: Mapping[str, Any] = {"nothing": ":", "bias": "--", BEST: "-"}
MARKERS = "osv^DPX"


@dataclass(frozen=True)
class Made:
    """One point as it came out; `why` says why it did not.

    Attributes:
        point: what was asked for.
        metrics: name -> `Evaluation.to_dict`.
        macs: over those of the unpruned model.
        size: of the weights, the same.
        seconds: that it took to make.
        latency: ratio to the lossless model as in `Ratio.to_dict`.
        why: it failed.
    """

    point: Point
    metrics: Mapping[str, Mapping[str, Any]]
    macs: float = float("nan")
    size: float = float("nan")
    seconds: float = float("nan")
    latency: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Curves:
    """All points of one case."""

    title: str
    metrics: Sequence[str]
    made: Sequence[Made]

    def of(self, *, blocks: bool) -> list[Made]:
        """Return the points of channels, or those of blocks."""
        return [m for m in self.made if m.point.of_blocks == blocks]


def document(curves: Mapping[str, Curves], where: str, items: int) -> str:
    """Return the whole page."""
    text = INTRODUCTION.format(items=items) + f"{where}.\n\n" + _aims(curves.values())
    for name, case in curves.items():
        text += f"## {case.title}\n\n![{case.title}](pruning-{name}.svg)\n\n"
        for metric in case.metrics:
            text += _channels(case, metric)
        text += _times(case) + _blocks(case) + _failures(case)
    return text.rstrip() + "\n"


def _aims(cases: Any) -> str:
    """Return the table of the points that are to be reached."""
    head = ["model", "MACs removed", "criterion", "quality", "change, points", "aim", "reached", "time"]
    rows = []
    for case in cases:
        for made in case.made:
            aim = made.point.aim
            for metric, found in made.metrics.items() if aim is not None and made.point.repair == BEST else ():
                rows.append([
                    case.title, f"{1 - made.macs:.0%}", made.point.criterion,
                    f"{metric} {100 * found['reference']:.2f} → {100 * found['candidate']:.2f} %", _change(found),
                    str(aim), "yes" if aim.met(found) else "no", _ratio(made.latency),
                ])  # fmt: skip
    return "## Points with an aim\n\n" + _table(head, rows) if rows else ""


def _channels(case: Curves, metric: str) -> str:
    """Return the table of one metric over MACs removed."""
    made = case.of(blocks=False)
    ratios = sorted({m.point.amount for m in made})
    found = {(m.point.criterion, m.point.repair, m.point.amount): m for m in made if metric in m.metrics}
    criteria = list(dict.fromkeys(c for c, _, _ in found))
    lines = [(c, r) for c in criteria for r in REPAIRS if any((c, r, x) in found for x in ratios)]
    rows = [
        [criterion, repair, *(_cell(found.get((criterion, repair, x)), metric) for x in ratios)]
        for criterion, repair in lines
    ]
    if not rows:
        return ""
    head = ["criterion", "behind the cut", *(f"−{x:.0%} MACs" for x in ratios)]
    first = next(iter(found.values())).metrics[metric]["reference"]
    return f"{metric.capitalize()}, unpruned {_value(first, metric)}:\n\n" + _table(head, rows)


def _times(case: Curves) -> str:
    """Return the table of MACs and times."""
    made = [m for m in case.of(blocks=False) if m.latency]
    ratios = sorted({m.point.amount for m in made})
    criteria = list(dict.fromkeys(m.point.criterion for m in made))
    found = {(m.point.criterion, m.point.amount): m for m in made}
    rows = [
        [c, *(f"{m.macs:.2f} → {m.latency['ratio']:.2f}" if (m := found.get((c, x))) else "–" for x in ratios)]
        for c in criteria
    ]
    head = ["criterion", *(f"−{x:.0%} MACs" for x in ratios)]
    return "MACs left → time, over the lossless model's:\n\n" + _table(head, rows) if rows else ""


def _blocks(case: Curves) -> str:
    """Return the table of blocks left out."""
    made = case.of(blocks=True)
    if not made:
        return ""
    found = {(m.point.criterion, m.point.repair, m.point.amount): m for m in made}
    repairs = [r for r in REPAIRS if any(key[1] == r for key in found)]
    rows = []
    for criterion, amount in dict.fromkeys((m.point.criterion, m.point.amount) for m in made):
        shown = next(m for m in made if (m.point.criterion, m.point.amount) == (criterion, amount))
        timed = found.get((criterion, BEST, amount), shown)
        cells = [
            " / ".join(_cell(found.get((criterion, r, amount)), metric) for r in repairs) for metric in case.metrics
        ]
        rows.append([criterion, f"{amount:.0f}", f"{shown.macs:.2f}", _ratio(timed.latency), *cells])
    rows.sort(key=lambda row: (row[0], int(row[1])))
    first = next((m.metrics for m in made if m.metrics), {})
    heads = [f"{n}, {_value(first[n]['reference'], n)} before" if n in first else n for n in case.metrics]
    return (
        f"Blocks left out; behind them {' / '.join(repairs)}:\n\n"
        + _table(["criterion", "blocks", "MACs left", "time", *heads], rows)
    )  # fmt: skip


def _failures(case: Curves) -> str:
    return "".join(f"- {m.point.steps}: {m.why}\n" for m in case.made if m.why) + "\n"


def _cell(made: Made | None, metric: str) -> str:
    if made is None:
        return "–"
    return _value(made.metrics[metric]["candidate"], metric) if metric in made.metrics else "failed"


def _value(value: float, metric: str) -> str:
    return f"{value:.4f}" if metric == "cosine" else f"{100 * value:.1f} %"


def _change(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return f"{-100 * found['drop']:+.2f}"
    drop, low, high = (round(-100 * x, 2) + 0.0 for x in (found["drop"], *reversed(found["interval"])))  # no -0
    return f"{drop:+.2f} ({low:+.2f} to {high:+.2f})"


def _ratio(found: Mapping[str, Any]) -> str:
    if not found:
        return "–"
    low, high = found["interval"]
    return f"{found['ratio']:.3f} ({low:.3f}–{high:.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |\n"  # noqa: E731
    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(map(line, rows)) + "\n"


def write_plots(curves: Mapping[str, Curves], page: Path) -> None:
    """Write a plot of each case beside the page: quality, and time, over MACs removed."""
    matplotlib = require("matplotlib", "matplotlib")
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot", "matplotlib")
    for name, case in curves.items():
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure, (quality, times) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
            _plot(case, quality, times)
            figure.savefig(page.with_name(f"pruning-{name}.svg"), metadata={"Date": None})
            pyplot.close(figure)


def _plot(case: Curves, quality: Any, times: Any) -> None:
    metric = case.metrics[0]
    lines: dict[tuple[bool, str, str], list[Made]] = {}
    for made in case.made:
        if metric in made.metrics:
            lines.setdefault((made.point.of_blocks, made.point.criterion, made.point.repair), []).append(made)
    criteria = list(dict.fromkeys((blocks, criterion) for blocks, criterion, _ in lines))
    for (blocks, criterion, repair), line in lines.items():
        line.sort(key=lambda m: -m.macs)
        index = criteria.index((blocks, criterion))
        look = {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        name = f"blocks by {criterion}" if blocks else criterion
        x = [0.0, *(1 - m.macs for m in line)]
        values = [line[0].metrics[metric]["reference"], *(m.metrics[metric]["candidate"] for m in line)]
        quality.plot(x, values, STYLES[repair], label=f"{name}, {repair}", **look)
        timed = [m for m in line if m.latency]
        if timed:
            seen = [1.0, *(m.latency["ratio"] for m in timed)]
            times.plot([0.0, *(1 - m.macs for m in timed)], seen, "-", label=name, **look)
    times.axline((0, 1), slope=-1, color="grey", linewidth=0.8, linestyle="--")
    for axes, title in ((quality, metric), (times, "time over lossless")):
        axes.set_xlabel("MACs removed")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=6, ncols=2)
