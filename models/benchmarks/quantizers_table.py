"""Rows of the comparison of quantizers -> Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INTRODUCTION = """\
# Quantization: figures

Made by

    python -m venv quantizers
    quantizers/bin/pip install onnxruntime==1.31.1 onnx==1.23.2 onnx_ir==1.1.0 nncf==3.4.0
    python -m graphopt.models.benchmarks.quantizers --python quantizers/bin/python --cache FOLDER \\
        --output docs/quantization-figures.md

All quantizers get the same calibration samples. Time: of one thread, over that of the unmodified model and over that
of `graphopt optimize` on it, ONNX Runtime's own optimisations on, median and 95 % interval; all models of a table ran
in the same rounds, in turn. Quality: on items that neither calibrated nor chose anything, with the change against the
float model on the same items and its paired 95 % interval; *points* are hundredths. Size: of the file, over the
unmodified model's. ORT's tools: after its own preprocessing; u8 activations and s8 weights per channel.
"""


@dataclass
class Row:
    """One quantizer on one model.

    Attributes:
        status: `ok`, `invalid` (refused by ONNX's checker), `broken` (refused by ONNX Runtime), `failed` (no result).
        why: the reason, or ''.
        version: of the quantizer.
        done: what had to be done for it.
        seconds: that it took.
        memory: bytes that it took at most.
        size: of the file, over the float model's.
        latency: `unmodified` and `lossless` -> ratio as in `Ratio.to_dict`.
        metrics: name -> `Evaluation.to_dict`.
    """

    status: str = "ok"
    why: str = ""
    version: str = ""
    done: str = ""
    seconds: float | None = None
    memory: float | None = None
    size: float | None = None
    latency: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def update(self, found: Mapping[str, Any]) -> None:
        """Take over the values that are found."""
        for name, value in found.items():
            setattr(self, name, value)


Results = Mapping[str, Mapping[str, Row]]
"""Model -> method -> row."""


def document(results: Results, where: str) -> str:
    """Return the whole page: a table per model, versions and machine."""
    versions = sorted({row.version for rows in results.values() for row in rows.values() if row.version})
    body = "".join(f"\n## {model}\n\n{_table(rows)}{_notes(rows)}" for model, rows in results.items())
    return f"{INTRODUCTION}\n{', '.join(versions)}; {where}.\n{body}"


def _table(rows: Mapping[str, Row]) -> str:
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row.metrics))
    head = ["quantizer", "time / unmodified", "time / lossless", *metrics, "size", "made in, s", "memory, GB"]
    text = _line(head) + "|" + "---|" * len(head) + "\n"
    first = next((row for row in rows.values() if row.metrics), Row())
    values = [_number(first.metrics[m]["reference"], m) if m in first.metrics else "–" for m in metrics]
    text += _line(["unmodified", "1", "", *values, "1", "", ""])
    for name, row in rows.items():
        times = [_ratio(row.latency.get(base)) for base in ("unmodified", "lossless")]
        scores = [_score(row.metrics[m], m) if m in row.metrics else "–" for m in metrics]
        size = "–" if row.size is None else f"{row.size:.3f}"
        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
        memory = "–" if row.memory is None else f"{row.memory / 1e9:.1f}"
        shown = name if row.status == "ok" else f"{name} (*{row.status}*)"
        text += _line([shown, *times, *scores, size, seconds, memory])
    return text


def _notes(rows: Mapping[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        said = [row.done] if row.done else []
        said += [f"{row.status}: {row.why}"] if row.status != "ok" else []
        if said:
            lines.append(f"- {name}: {'; '.join(said)}\n")
    return "\n" + "".join(lines) if lines else ""


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{found['ratio']:.3f} ({low:.3f}–{high:.3f})"


def _in_parts(metric: str) -> bool:
    """Tell whether a metric is a part of items, shown in per cent."""
    return "dB" not in metric and metric != "cosine"


def _number(value: float, metric: str) -> str:
    if _in_parts(metric):
        return f"{100 * value:.2f} %"
    return f"{value:.1f}" if "dB" in metric else f"{value:.4f}"


def _score(found: Mapping[str, Any], metric: str) -> str:
    text = _number(found["candidate"], metric)
    if found["interval"] is None:
        return text
    scale, digits = (100, 2) if _in_parts(metric) else (1, 4)
    drop, low, high = (round(-scale * x, digits) + 0.0 for x in (found["drop"], *reversed(found["interval"])))  # no -0
    unit = " points" if _in_parts(metric) else ""
    return f"{text}; {drop:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){unit}"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"
