"""The commands `graphopt distill` and `graphopt finetune`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from graphopt.arguments import thread_counts
from graphopt.cli_lossy import Limits
from graphopt.console import emit, training
from graphopt.errors import SpecError
from graphopt.options import AsJson, CustomOps, ModelPath, Output, Seed, TimedThreads
from graphopt.setting_options import offers
from graphopt.training import HALF, DistillSettings, TrainSettings

if TYPE_CHECKING:
    from graphopt.trainer import Trained

PLOTS = (".png", ".svg", ".pdf")

_SAMPLES = ".npz, folder of .npz, test_data_set folder, or file.py:function"


@dataclass(frozen=True, kw_only=True)
class Common(Limits):
    """Options of both commands, beside those of the training itself."""

    output: Output = None
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="X|X%", help="largest drop of the metric from the reference's [default: it is only shown]"
        ),
    ] = None
    select: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="metric that chooses the best weights, of other items than --eval has [default: the loss on held-out "
            "samples]",
            show_default=False,
        ),
    ] = None
    held_out: Annotated[
        float,
        typer.Option(metavar="X", help="part of the samples that does not train: half of it chooses, half judges"),
    ] = 0.2
    standardize: Annotated[
        bool,
        typer.Option("--standardize", help="write mean and variance of the samples into the graph first, by channel"),
    ] = False
    start_from_teacher: Annotated[
        bool, typer.Option("--start-from-teacher", help="take the teacher's weights first, where names fit")
    ] = False
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="where the state is saved, for --resume to go on from")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint")] = False
    history: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write losses and rates")] = None
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw them: .png, .svg or .pdf")] = None
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="time the result beside the reference, or do not")
    ] = True
    threads: TimedThreads = None
    budget: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="time for timing, about")] = 20.0
    seed: Seed = 0
    custom_ops: CustomOps = None
    as_json: AsJson = False

    def arguments(self) -> dict[str, Any]:
        """Return what both functions of `graphopt.trainer` take."""
        return {
            "bound": self.bound(defaults=False), "select": self.select, "held_out": self.held_out,
            "standardize": self.standardize, "start_from_teacher": self.start_from_teacher,
            "checkpoint": self.checkpoint, "resume": self.resume, "measure": self.measure,
            "threads": thread_counts(list(self.threads or ())) or 1, "budget": self.budget, "seed": self.seed,
        }  # fmt: skip


@offers(common=Common, settings=DistillSettings)
def distill(
    *,
    model: ModelPath,
    teacher: Annotated[
        Path, typer.Option(metavar="MODEL", help="what it learns from: an .onnx file with the same inputs and outputs")
    ],
    data: Annotated[str, typer.Option(metavar="SAMPLES", help=f"what is trained on: {_SAMPLES}; labels if alpha < 1")],
    common: Common,
    settings: DistillSettings,
) -> None:
    """Train a model to give what another gives: its pruned, sparse, factorized or other form.  Needs no labels."""
    _train("distilling", model, data, common, settings, teacher=teacher)


@offers(common=Common, settings=DistillSettings)
def finetune(
    context: typer.Context,
    *,
    model: ModelPath,
    train: Annotated[
        str | None, typer.Option(metavar="SAMPLES", help=f"what is trained on, with labels: {_SAMPLES}")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SAMPLES", help="in its place, with a teacher: samples without labels")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="what it learns from, too: an .onnx file; see graphopt distill")
    ] = None,
    qat: Annotated[
        bool, typer.Option("--qat", help="train a quantized model as it is: its codes, and with them its scales")
    ] = False,
    common: Common,
    settings: DistillSettings,
) -> None:
    """Train a model on labels, or quantized ones (--qat) on what a teacher gives; the graph stays as it is."""
    if (train is None) == (data is None):
        raise SpecError("say what to train on, once", at="--train", hint="--train with labels, or --data and --teacher")
    if data is not None and teacher is None:
        raise SpecError("samples without labels need a teacher", at="--data", hint="--teacher MODEL, or --train")
    plain = settings if teacher is not None else _without_teacher(context, settings)
    if teacher is not None and train is not None and not _named(context, "alpha"):
        plain = replace(settings, alpha=HALF)
    _train("fine-tuning", model, train or data or "", common, plain, teacher=teacher, qat=qat)


def _without_teacher(context: typer.Context, settings: DistillSettings) -> TrainSettings:
    """Return the settings of a training on labels alone; those of distillation are refused."""
    own = {one.name for one in fields(TrainSettings)}
    for one in fields(DistillSettings):
        if one.name not in own and _named(context, one.name):
            raise SpecError(
                "this is about learning from a teacher", at="--" + one.name.replace("_", "-"), hint="--teacher"
            )
    return TrainSettings(**{name: getattr(settings, name) for name in own})


def _named(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _train(
    what: str, model: Path, data: str, common: Common, settings: TrainSettings, *, teacher: Path | None,
    qat: bool | None = None,
) -> None:  # fmt: skip
    from graphopt import destinations, trainer  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.model import load  # noqa: PLC0415

    files = {
        "MODEL": model, "--teacher": teacher, "--data": data, "--output": common.output, "--history": common.history,
        "--plot": common.plot,
    }  # fmt: skip
    destinations.check(files, common.output, common.history, common.plot)
    if common.plot is not None and common.plot.suffix not in PLOTS:
        raise SpecError("no such kind of plot", at=str(common.plot), hint=f"one of {', '.join(PLOTS)}")
    libraries = common.custom_ops or ()
    with training(f"{what} {model.name}", common.as_json) as progress:
        student, other = (None if p is None else load(p, custom_ops=libraries) for p in (model, teacher))
        assert student is not None
        if qat is not None:
            trainer.check_quantized(student, qat)
        request = trainer.Request(**common.arguments(), progress=progress)
        result = trainer.train(student, other, data, settings, request)
    _finish(result, common)


def _finish(result: Trained, common: Common) -> None:
    from graphopt.training_report import render  # noqa: PLC0415  (heavy imports only when needed)

    if not result.leads:
        return
    written = []
    if common.output is not None:
        result.save(common.output)
        written.append(common.output)
    if common.history is not None:
        result.history.save_json(common.history)
        written.append(common.history)
    if common.plot is not None:
        result.history.save_plot(common.plot)
        written.append(common.plot)
    document = {**result.report.to_dict(), "output": str(common.output) if common.output else None}
    lines = [f"wrote {path}" for path in written]
    lines += [] if common.output else ["no model written: give -o OUT"]
    emit(document, common.as_json, render(result.report), *map(Text, lines))
