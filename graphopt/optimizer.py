"""`optimize`: the default pipeline, checked against the original and timed against it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphopt import environment
from graphopt.base import Target
from graphopt.data import load_samples
from graphopt.errors import ModelError, SpecError
from graphopt.model import Model, Source, load
from graphopt.pipeline import OnFailure, Pipeline, Result, Settings, Verify
from graphopt.report import Report
from graphopt.samples import Samples
from graphopt.timing import Ratio, quick_ratio

DEFAULT_OPSET = 17

CLEANUP = "canonicalize, fold-constants, fold-if, eliminate-identity, fuse-batchnorm, eliminate-common, eliminate-dead"

SLOWDOWN = 1.03
"""The upper end of the measured interval may reach this; above it the input is kept."""

BUDGETS = (2.0, 6.0)
"""Seconds of measurement; the next is tried while the one before did not decide."""


def default_pipeline(opset: int | None = DEFAULT_OPSET) -> Pipeline:
    """Return the passes of `optimize`: opset upgrade (None: leave it), then the canonical form to a fixpoint."""
    upgrade = f"upgrade-opset{{to={opset}}}, " if opset is not None else ""
    return Pipeline(f"{upgrade}repeat({CLEANUP})")


def optimize(
    model: Source,
    *,
    pipeline: Pipeline | str | None = None,
    data: Any = None,
    measure: bool = True,
    verify: Verify = "end",
    opset: int | None = DEFAULT_OPSET,
    seed: int = 0,
    threads: int = 1,
    provider: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    settings: Settings | None = None,
    on_failure: OnFailure = "continue",
) -> Result:
    """Return a faster model with equal outputs, or the input itself where nothing was gained.

    Args:
        model: a path, `Model` or `ModelProto`; left untouched.
        pipeline: passes to run instead of the default ones.
        data: samples as in `load_samples`; None makes random ones.
        measure: time the result against the input in ORT, and keep the input where the result is slower.
        verify: numeric check after each pass, at the end, or off.
        opset: upgrade to at least this opset first; None leaves it.  Of the default pipeline only.
        seed: for random feeds and the order of timings.
        threads: ORT's intra-op threads for the measurement.
        provider: where the result will run.
        shapes: shapes of inputs by name, for random feeds.
        batch: how many rows of `.npz` samples make a feed.
        settings: further settings; those named above win.
        on_failure: `continue` leaves a failing pass out; `stop` raises.

    Raises:
        GraphoptError: the model or the samples are not usable.
    """
    started = time.perf_counter()
    if pipeline is not None and opset not in (None, DEFAULT_OPSET):
        raise SpecError("opset belongs to the default pipeline", hint=f"put upgrade-opset{{to={opset}}} into yours")
    chosen = default_pipeline(opset) if pipeline is None else pipeline
    chosen = Pipeline(chosen) if isinstance(chosen, str) else chosen
    original = load(model)
    samples = None
    if measure or verify != "off":
        samples = load_samples(data, original, batch=batch, seed=seed, shapes=shapes)
    settings = replace(
        settings or Settings(), verify=verify, seed=seed, target=Target(provider, threads), on_failure=on_failure
    )
    result = chosen.run(original, samples=samples, settings=settings)
    if pipeline is None and opset not in (None, DEFAULT_OPSET) and result.report.opset_after < (opset or 0):
        _refuse_opset(result.report, opset or 0)
    if measure:
        assert samples is not None
        result = keep_if_it_pays(original, result, samples, settings)
    result.report.environment = environment.describe()
    result.report.seconds = time.perf_counter() - started
    return result


def _refuse_opset(report: Report, opset: int) -> None:
    """Raise ModelError: an opset asked for by number was not reached."""
    said = [text for r in report.passes if r.name == "upgrade-opset" for text in (*r.notes, r.failure) if text]
    raise ModelError(
        f"the model stays at opset {report.opset_after}, not {opset}", at=report.model, hint="; ".join(said)
    )


def keep_if_it_pays(original: Model, result: Result, samples: Samples, settings: Settings) -> Result:
    """Time the result against the original; return the original where the result is not at least as fast."""
    report = result.report
    if report.after == report.before and not any(r.status == "changed" for r in report.passes):
        report.decision, report.reason = "input kept", "no pass found anything to change"
        return Result(original.copy(), report)
    ratio = decisive_ratio(original, result.model, samples, settings)
    report.timing = ratio.to_dict()
    if ratio.high <= SLOWDOWN or ratio.median <= 1.0:
        return result
    report.decision = "input kept"
    report.reason = (
        f"the result was not faster: {ratio.median:.3f} of the input's latency ({ratio.low:.3f} to {ratio.high:.3f})"
    )
    if report.opset_after != report.opset_before:
        report.reason += f"; so it stays at opset {report.opset_before} (measure=False, --no-measure, upgrades it)"
    report.after, report.opset_after = report.before, report.opset_before
    return Result(original.copy(), report)


def decisive_ratio(a: Model, b: Model, samples: Samples, settings: Settings) -> Ratio:
    """Return the time of `b` over that of `a`, measured longer while the interval leaves the decision open."""
    target = settings.target
    for budget in BUDGETS:
        ratio = quick_ratio(
            a, b, samples, budget_s=budget, threads=target.threads, provider=target.provider, seed=settings.seed
        )
        if ratio.high <= SLOWDOWN or ratio.low > 1.0:
            break
    return ratio


def read_pipeline(path: str | Path) -> Pipeline:
    """Return the pipeline of a TOML file.

    Raises:
        SpecError: no such file, or not a pipeline.
    """
    from graphopt import spec  # noqa: PLC0415  (`spec` is a parameter's name elsewhere)

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot read the pipeline file: {error.strerror}", at=str(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError("the pipeline file is not text", at=str(path)) from error
    try:
        return Pipeline(spec.from_toml(text))
    except SpecError as error:
        error.at = f"{path}, {error.at}" if error.at else str(path)
        raise
