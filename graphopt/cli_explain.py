"""The command `graphopt explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.arguments import load_plugins, shapes
from graphopt.console import emit, working
from graphopt.options import AsJson, Batch, CustomOps, Data, ModelPath, Plugins, Provider, Seed, Shape, Threads


def explain(
    model: ModelPath,
    data: Data = None,
    everything: Annotated[bool, typer.Option("--all", help="every row of every table, names in full")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="time graphopt's result against the model")
    ] = True,
    threads: Threads = 1,
    provider: Provider = "cpu",
    shape: Shape = None,
    batch: Batch = 1,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show what ONNX Runtime makes of the model, where the time goes, and what graphopt would and would not change."""
    from graphopt.explain import explain as run_explain  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.explained import explanation  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415

    load_plugins(plugin)
    with working(f"explaining {model.name}", as_json):
        found = run_explain(
            load(model, custom_ops=custom_ops or ()),
            data=data, shapes=shapes(shape), batch=batch, threads=threads, provider=provider, seed=seed,
            measure=measure,
        )  # fmt: skip
    emit(found.to_dict(), as_json, explanation(found, everything=everything))
