"""The command line: reads options, calls the library, prints.  Nothing is decided here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from graphopt import registry, report, tables
from graphopt.arguments import load_plugins as _load_plugins
from graphopt.arguments import shapes as _shapes
from graphopt.arguments import thread_counts, unnamed_line, unnamed_passes
from graphopt.base import Pass
from graphopt.cli_explain import explain
from graphopt.cli_factorize import factorize
from graphopt.cli_gradients import gradients
from graphopt.cli_prune import prune
from graphopt.cli_quantize import quantize
from graphopt.cli_sparsify import sparsify
from graphopt.cli_train import distill, finetune
from graphopt.console import emit, out, print_diff, working
from graphopt.console import run as run_app
from graphopt.errors import GraphoptError, SpecError
from graphopt.options import (
    AsJson,
    Batch,
    Budget,
    Contrib,
    CustomOps,
    Data,
    DecisionsFile,
    Elsewhere,
    FailureOption,
    Measure,
    ModelPath,
    Output,
    Plugins,
    PrintAfter,
    Provider,
    Reproducers,
    Seed,
    Shape,
    Shapes,
    StageOption,
    StopAfter,
    ThreadCounts,
    Threads,
    VerifyOption,
    WriteDecisions,
)

app = typer.Typer(
    name="graphopt", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 a gate or validation was missed, 2 the input is wrong, 3 a bug in graphopt.",
)  # fmt: skip


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=lambda asked: _version(asked=asked), is_eager=True, help="show versions"),
    ] = False,
) -> None:
    """Make exported ONNX models faster and smaller, and prove it on ONNX Runtime."""
    del version  # its callback has printed and left


def _version(*, asked: bool) -> None:
    if asked:
        from graphopt import __version__, runtime  # noqa: PLC0415

        out.print(f"graphopt {__version__}, ONNX Runtime {runtime.version()}")
        raise typer.Exit


@app.command()
def optimize(
    model: ModelPath,
    output: Output = None,
    data: Data = None,
    opset: Annotated[int, typer.Option(help="upgrade to at least this opset; 0 leaves it")] = 17,
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", "-p", metavar="SPEC|FILE.toml", help="passes to run instead of the default ones"),
    ] = None,
    stage: StageOption = "lowering",
    contrib: Contrib = False,
    measure: Measure = None,
    budget: Budget = 40.0,
    decisions: DecisionsFile = None,
    write_decisions: WriteDecisions = None,
    elsewhere: Elsewhere = False,
    verify: VerifyOption = "end",
    on_failure: FailureOption = "continue",
    threads: ThreadCounts = None,
    provider: Provider = "cpu",
    shape: Shapes = None,
    batch: Batch = 1,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
    print_after: PrintAfter = None,
    stop_after: StopAfter = None,
    reproducers: Reproducers = None,
) -> None:
    """Load, transform, time what pays, verify, report; write OUT when it is valid and not slower."""
    from graphopt.decisions import save_decisions  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.optimizer import optimize as run_optimize  # noqa: PLC0415
    from graphopt.pipeline import Settings  # noqa: PLC0415

    _check_files(
        {"MODEL": model, "--data": data, "--decisions": decisions, "--pipeline": pipeline,
         "--output": output, "--write-decisions": write_decisions}, output, write_decisions,
    )  # fmt: skip
    plugins = _load_plugins(plugin)
    chosen = _pipeline(pipeline) if pipeline else None
    unnamed = [] if decisions else unnamed_passes(plugins, chosen.names if chosen else ())
    settings = Settings(
        print_after=_known_passes(print_after), stop_after=_known_pass(stop_after),
        reproducers=_reproducers(reproducers, output), printer=print_diff,
    )  # fmt: skip
    with working(f"optimizing {model.name}", as_json) as progress:
        result = run_optimize(
            load(model, custom_ops=custom_ops or ()), pipeline=chosen, data=data,
            measure=measure, verify=verify, stage=stage, contrib=contrib, elsewhere=elsewhere, budget=budget,
            opset=opset or None, seed=seed, threads=thread_counts(threads), provider=provider, shapes=_settings(shape),
            batch=batch, decisions=decisions, settings=settings, on_failure=on_failure, progress=progress,
        )  # fmt: skip
    if write_decisions is not None:
        save_decisions(write_decisions, result.report.decisions or {})
    _finish(result, output, as_json, write_decisions, unnamed, pipeline)


@app.command()
def run(
    model: ModelPath,
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline",
            "-p",
            metavar="SPEC|FILE.toml",
            help='"fold-constants,eliminate-dead{…}", or a TOML file of steps',
        ),
    ],
    output: Output = None,
    data: Data = None,
    verify: VerifyOption = "end",
    on_failure: FailureOption = "stop",
    bisect: Annotated[
        bool, typer.Option("--bisect", help="find the first change that breaks the outputs; writes nothing")
    ] = False,
    threads: Threads = 1,
    provider: Provider = "cpu",
    shape: Shape = None,
    batch: Batch = 1,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
    print_after: PrintAfter = None,
    stop_after: StopAfter = None,
    reproducers: Reproducers = None,
) -> None:
    """Run exactly the passes you name."""
    from graphopt.base import Target  # noqa: PLC0415
    from graphopt.bisection import bisect as run_bisect  # noqa: PLC0415
    from graphopt.data import load_samples  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.pipeline import Settings  # noqa: PLC0415

    _check_files({"MODEL": model, "--data": data, "--pipeline": pipeline, "--output": output}, output)
    plugins = _load_plugins(plugin)
    chosen = _pipeline(pipeline)
    settings = Settings(
        verify=verify, on_failure=on_failure, seed=seed, target=Target(provider, threads),
        print_after=_known_passes(print_after), stop_after=_known_pass(stop_after),
        reproducers=_reproducers(reproducers, output), printer=print_diff,
    )  # fmt: skip
    loaded = load(model, custom_ops=custom_ops or ())
    samples = None
    if verify != "off" or bisect or data is not None:
        samples = load_samples(data, loaded, batch=batch, seed=seed, shapes=_shapes(shape))
    if bisect:
        with working("bisecting", as_json):
            found = run_bisect(chosen, loaded, samples=samples, settings=settings)
        emit({"bisect": found}, as_json, found)
        return
    with working(f"running {len(chosen.steps)} steps", as_json):
        result = chosen.run(loaded, samples=samples, settings=settings)
    _finish(result, output, as_json, None, unnamed_passes(plugins, chosen.names), pipeline)


@app.command()
def validate(
    reference: Annotated[Path, typer.Argument(metavar="A", help="the original model")],
    candidate: Annotated[Path, typer.Argument(metavar="B", help="the model to check against it")],
    data: Data = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="largest error, relative to the largest output [default: 30 times the model's own "
            "difference between ORT optimisations off and on, within 1e-5 and 1e-4]"
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE.py:FUNCTION",
            help="task metric: gets predict(feeds) -> outputs, returns a number or one per item; higher is better",
        ),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="X|X%", help="largest drop of the metric, in its units or relative with %")
    ] = None,
    locate: Annotated[bool, typer.Option("--locate", help="find the first inner tensor that differs")] = False,
    provider: Provider = "cpu",
    other_provider: Annotated[str | None, typer.Option(help="run B on this provider instead")] = None,
    threads: Threads = 1,
    shape: Shape = None,
    batch: Batch = 1,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Do the two models agree?  Exit 0 if so, 1 if not."""
    from graphopt.data import load_samples  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.validate import validate as run_validate  # noqa: PLC0415

    if max_drop is not None and evaluate is None:
        raise SpecError("--max-drop needs a metric", hint="--eval FILE.py:FUNCTION")
    first = load(reference, custom_ops=custom_ops or ())
    samples = load_samples(data, first, batch=batch, seed=seed, shapes=_shapes(shape))
    with working("comparing", as_json):
        result = run_validate(
            first, load(candidate, custom_ops=custom_ops or ()), samples,
            rtol=tolerance, evaluate=evaluate, max_drop=max_drop, locate=locate,
            provider=provider, other_provider=other_provider, threads=threads, seed=seed,
        )  # fmt: skip
    emit(result.to_dict(), as_json, tables.validation(result))
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    first: Annotated[Path, typer.Argument(metavar="A", help="the model to compare with")],
    second: Annotated[Path | None, typer.Argument(metavar="[B]", help="the model to time against it")] = None,
    data: Data = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=3, help="rounds of fresh sessions [default: ten, more while the interval is wide]"),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="measure peak memory too, each in a process of its own")
    ] = False,
    per_node: Annotated[
        bool, typer.Option("--per-node", help="where the time goes, by original node and by operator")
    ] = False,
    threads: Threads = 1,
    provider: Provider = "cpu",
    shape: Shape = None,
    batch: Batch = 1,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Time two models against each other, interleaved: ratio with its 95 % interval."""
    from graphopt.data import load_samples  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.profile import per_node as run_per_node  # noqa: PLC0415
    from graphopt.timing import bench as run_bench  # noqa: PLC0415

    model = load(first, custom_ops=custom_ops or ())
    samples = load_samples(data, model, batch=batch, seed=seed, shapes=_shapes(shape))
    if second is None and not per_node:
        raise SpecError("bench compares two models", hint="graphopt bench A B; for one model: bench A --per-node")
    document: dict[str, Any] = {}
    shown: list[Any] = []
    if second is not None:
        other = load(second, custom_ops=custom_ops or ())
        with working("timing", as_json):
            timed = run_bench(
                model, other, samples, rounds=rounds, memory=memory, threads=threads, provider=provider, seed=seed
            )
        document.update(timed.to_dict())
        shown.append(tables.bench(timed))
    if per_node:
        for path, loaded in [(first, model)] + ([(second, other)] if second is not None else []):
            profile = run_per_node(loaded, samples, threads=threads, provider=provider)
            document.setdefault("per_node", {})[str(path)] = profile.to_dict()
            shown.append(tables.per_node(profile, path.name))
    emit(document, as_json, *shown)


@app.command()
def inspect(
    model: ModelPath,
    shape: Shape = None,
    nodes: Annotated[bool, typer.Option("--nodes/--no-nodes", help="the per-node table")] = True,
    as_json: AsJson = False,
) -> None:
    """Show nodes, operators, parameters, bytes, MACs and dynamic dimensions."""
    from graphopt.inspect import inspect as run_inspect  # noqa: PLC0415

    found = run_inspect(model, shapes=_shapes(shape))
    emit(found.to_dict(), as_json, tables.inspection(found, nodes=nodes))


app.command()(explain)
app.command()(quantize)
app.command()(prune)
app.command()(factorize)
app.command()(sparsify)
app.command()(distill)
app.command()(finetune)
app.command()(gradients)


@app.command()
def passes(
    names: Annotated[list[str] | None, typer.Argument(metavar="[PASS]...", help="only these [default: all]")] = None,
    plugin: Plugins = None,
    rules: Annotated[bool, typer.Option("--rules", help="list the rewrite rules instead, with their algebra")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="with --rules: try each rule on cases drawn from its own pattern")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """List every pass with its options."""
    _load_plugins(plugin)
    if check and not rules:
        raise SpecError("--check tries rules", hint="graphopt passes --rules --check")
    chosen = {name: registry.get(name) for name in names or registry.all_passes()}
    if rules:
        _list_rules(chosen, check, seed, as_json)
        return
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "options": cls.option_defaults(),
            "exactness": cls.exactness,
            "stage": cls.stage,
            "summary": cls.summary(),
        }
        for name, cls in chosen.items()
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("pass", "options", "", "what it does"):
        table.add_column(title, overflow="fold", max_width=_OPTIONS if title == "options" else None)
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(row["name"], options, row["exactness"], row["summary"])
    emit({"passes": rows}, as_json, table)


_OPTIONS = 100
"""Columns that the options of a pass take; more of them go over several lines."""


def _list_rules(chosen: dict[str, type[Pass]], check: bool, seed: int, as_json: bool) -> None:
    from graphopt import rule_listing  # noqa: PLC0415

    with working("trying rules", as_json):
        found = rule_listing.rows(chosen, check=check, seed=seed)
    emit({"rules": found}, as_json, rule_listing.table(found))
    if any(row.get("problems") for row in found):
        raise typer.Exit(1)


@app.command()
def demo(output: Output = None, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Do the main job on a small trained model that comes with graphopt."""
    from graphopt.demo import run_demo  # noqa: PLC0415

    _check_files({"--output": output}, output)
    with working("optimizing the digits model", as_json):
        result = run_demo(seed)
    if output is not None:
        result.optimized.save(output)
    emit(result.to_dict(), as_json, tables.demonstration(result, output))


@app.command()
def zoo(
    names: Annotated[
        list[str] | None, typer.Argument(help="models or groups of models to fetch, or 'all'; none: list them")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the model zoo, or fetch models into the cache and print where they are."""
    from graphopt.models import catalogue  # noqa: PLC0415

    if not names:
        rows = catalogue.rows()
        emit({"models": rows}, as_json, tables.grid(("name", "group", "from", "licence", "inputs"), rows))
        return
    with working("fetching", as_json):
        found = catalogue.fetch([] if names == ["all"] else names)
    missing = {name: error for name, error in found.items() if isinstance(error, GraphoptError)}
    paths = {name: str(path) for name, path in found.items() if name not in missing}
    emit({**paths, **{name: {"error": str(e)} for name, e in missing.items()}}, as_json, "\n".join(paths.values()))
    if missing:
        name, error = next(iter(missing.items()))
        raise type(error)(error.what, at=f"{name}: {error.at}" if error.at else name, hint=error.hint)


def _finish(
    result: Any, output: Path | None, as_json: bool, decisions: Path | None, unnamed: list[str], pipeline: str | None
) -> None:
    """Write the result and print its report."""
    if output is not None:
        result.save(output)
    document = {**result.report.to_dict(), "output": str(output) if output else None, "unnamed_passes": unnamed}
    written = [f"wrote {output}" if output else f"{'no model' if decisions else 'nothing'} written: give -o OUT"]
    written += [f"wrote {decisions}"] if decisions else []
    said = [unnamed_line(unnamed, pipeline)] if unnamed else []
    emit(document, as_json, report.render(result.report), *map(Text, (*said, *written)))


def _check_files(files: dict[str, Path | str | None], *written: Path | None) -> None:
    """Fail at once, not after minutes of work, where a file cannot be written, or would overwrite another."""
    from graphopt import destinations  # noqa: PLC0415

    destinations.check(files, *written)


def _known_pass(name: str | None) -> str | None:
    if name is not None:
        registry.get(name)
    return name


def _known_passes(names: list[str] | None) -> frozenset[str]:
    for name in names or []:
        if name != "all":
            registry.get(name)
    return frozenset(names or [])


def _pipeline(given: str) -> Any:
    from graphopt.optimizer import parse_pipeline, read_pipeline  # noqa: PLC0415

    return read_pipeline(given) if given.endswith(".toml") else parse_pipeline(given)


def _reproducers(folder: Path | None, output: Path | None) -> Path | None:
    if folder is not None or output is None:
        return folder
    return output.with_name(output.name + ".reproducers")


def _settings(given: list[str] | None) -> list[dict[str, tuple[int, ...]]] | None:
    """Return `--shape` options as sets: a name that comes again begins another, which keeps the other names' shapes.

    Raises:
        SpecError: not of the form `NAME=1,3,224,224`.
    """
    if not given:
        return None
    found: list[dict[str, tuple[int, ...]]] = [{}]
    fresh: set[str] = set()
    for item in given:
        one = _shapes([item]) or {}
        if fresh & set(one):
            found.append(dict(found[-1]))
            fresh = set()
        found[-1].update(one)
        fresh |= set(one)
    return found


def main() -> None:
    """Run the command line; exit codes as in the help."""
    run_app(app)
