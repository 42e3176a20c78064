"""The command `graphopt prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphopt.cli_lossy import Common
from graphopt.console import emit, working
from graphopt.errors import SpecError
from graphopt.options import Globs, Halves, ModelPath
from graphopt.setting_options import offers


@offers(common=Common)
def prune(
    context: typer.Context,
    *,
    model: ModelPath,
    data: Halves = None,
    ratio: Annotated[
        float | None, typer.Option(metavar="X", help="part of each group's channels that goes; needs no samples")
    ] = None,
    target_macs: Annotated[float | None, typer.Option(metavar="X", help="part of the MACs that stays")] = None,
    target_params: Annotated[float | None, typer.Option(metavar="X", help="part of the parameters that stays")] = None,
    target_latency: Annotated[
        float | None, typer.Option(metavar="X", help="part of the lossless model's measured time that stays")
    ] = None,
    drop_blocks: Annotated[int, typer.Option(metavar="N", help="residual blocks that go, the most idle first")] = 0,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="what channels are ranked by: random, l1, l2, bn-scale, activation, wanda, obs, taylor, gradient "
            "[default: obs with samples and a target, else l2]",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        Literal["global", "local"] | None,
        typer.Option(
            help="rank all groups together, or take the same part of each [default: local for --ratio, else global]",
            show_default=False,
        ),
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="how layers of one group come together: sum, mean, max, l2 [default: sum]")
    ] = None,
    reconstruct: Annotated[
        Literal["least-squares", "bias", "none"] | None,
        typer.Option(
            help="how what remains is fitted to what was [default: least-squares with samples]", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="cut and fit in so many steps")] = 1,
    schedule: Annotated[Literal["linear", "cubic"], typer.Option(help="how the cut grows over the steps")] = "cubic",
    round_to: Annotated[
        int, typer.Option(min=0, help="what is left of a group is a multiple of this; 0: what suits the target")
    ] = 0,
    least: Annotated[int, typer.Option(min=1, help="units that stay of each group at least")] = 1,
    only: Globs = None,
    skip: Globs = None,
    normalization: Annotated[
        bool, typer.Option("--normalization", help="cut axes that LayerNorm is over, too: its statistics change")
    ] = False,
    gradients: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gradients of the task's loss, for taylor and gradient")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="list every group, and why what is frozen is frozen; cut nothing")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="time the result beside the lossless model")
    ] = True,
    common: Common,
) -> None:
    """Cut channels, heads and blocks, and fit what remains to what the model computed before.

    Say how much: a ratio or a target.  Without, the most is cut that keeps the bound on the accuracy (--eval, or a
    limit on the outputs; by default what suits them).
    """
    from graphopt import pruner  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.pruning_report import render  # noqa: PLC0415

    source = common.loaded(model, data=data, gradients=gradients)
    if explain:
        _check_explain(context)
        with working(f"looking at {model.name}", common.as_json):
            report = pruner.explain(source, normalization=normalization, seed=common.seed)
        emit(report.to_dict(), common.as_json, render(report, everything=common.everything))
        return
    asked_for: dict[str, Any] = {
        "ratio": ratio, "target_macs": target_macs, "target_params": target_params, "target_latency": target_latency,
        "drop_blocks": drop_blocks, "criterion": criterion, "scope": scope, "aggregate": aggregate,
        "reconstruct": reconstruct, "steps": steps, "schedule": schedule, "round_to": round_to, "least": least,
        "only": tuple(only or ()), "skip": tuple(skip or ()), "normalization": normalization, "gradients": gradients,
        "measure": measure,
    }  # fmt: skip
    with working(f"pruning {model.name}", common.as_json) as progress:
        result = pruner.prune(source, data=data, progress=progress, **asked_for, **common.arguments())
    common.finish(result, render(result.report, everything=common.everything))


EXPLAINS = {"model", "explain", "normalization", "seed", "custom_ops", "everything", "plugin", "as_json"}
"""Parameters that `--explain` heeds."""


def _check_explain(context: typer.Context) -> None:
    """Refuse options that say how to cut, where nothing is cut.

    Raises:
        SpecError: there is one.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in EXPLAINS:
            option = next(o for p in context.command.params if p.name == name for o in p.opts)
            raise SpecError("--explain cuts nothing", at=option, hint=f"leave out {option} or --explain")
