"""Options made from data classes: every field is one, with its default, its help and its kind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from graphopt.errors import SpecError
from graphopt.setting_options import described, offers
from graphopt.training import DistillSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Things.

    Attributes:
        rate: how fast,
            in words over two lines.
        names, others: what it is about.
        loud: whether it is.
    """

    rate: float = 0.5
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    loud: bool = False
    count: Annotated[int, typer.Option("--count", min=1)] = 3


def app() -> tuple[typer.Typer, list[tuple[str, Plain]]]:
    made, seen = typer.Typer(), []

    @made.command()
    @offers(plain=Plain)
    def command(word: Annotated[str, typer.Argument()], plain: Plain) -> None:
        """Do it."""
        seen.append((word, plain))

    return made, seen


def test_options_become_the_data_class() -> None:
    made, seen = app()
    given = ["hello", "--rate", "2", "--names", "a", "--names", "b", "--loud", "--count", "4"]
    assert CliRunner().invoke(made, given).exit_code == 0
    assert CliRunner().invoke(made, ["bye"]).exit_code == 0
    assert seen == [("hello", Plain(rate=2.0, names=("a", "b"), loud=True, count=4)), ("bye", Plain())]


def test_what_is_out_of_range_is_refused() -> None:
    made, seen = app()
    assert CliRunner().invoke(made, ["x", "--count", "0"]).exit_code == 2
    assert CliRunner().invoke(made, ["x", "--rate", "fast"]).exit_code == 2
    assert not seen


def test_help_is_what_the_docstring_says() -> None:
    assert described(Plain) == {
        "rate": "how fast, in words over two lines", "names": "what it is about", "others": "what it is about",
        "loud": "whether it is",
    }  # fmt: skip
    shown = CliRunner().invoke(app()[0], ["--help"], env={"COLUMNS": "200"}).output
    assert "how fast, in words over two lines" in shown


@pytest.mark.parametrize("kind", [TrainSettings, DistillSettings])
def test_every_setting_of_training_is_described(kind: type[TrainSettings]) -> None:
    helps = described(kind)
    assert [one.name for one in fields(kind) if not helps.get(one.name)] == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rate": float("nan")}, "rate is at least 0"),
        ({"optimizer": "adma"}, "unknown optimizer"),
        ({"epochs": 0.0}, "nothing to train"),
        ({"batch": 0}, "batch is at least 1"),
        ({"ema": 1.0}, "ema is between 0 and 1"),
        ({"label_smoothing": -0.1}, "label smoothing is between"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"alpha": 1.5}, "alpha is between"),
        ({"warmup": 1.5}, "warm-up is a part"),
        ({"nesterov": True}, "momentum of sgd"),
        ({"loss": "hinge"}, "unknown loss"),
        ({"loss": "mes"}, "unknown loss 'mes'"),
        ({"tap_loss": "l3"}, "unknown tap loss"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        DistillSettings(**wrong)  # type: ignore[arg-type]


def test_bounds_themselves_are_fine() -> None:
    DistillSettings(alpha=1.0, warmup=1.0, decay=0.0, epochs=0.0, steps=1, loss="my.py:loss")
    DistillSettings(optimizer="sgd", nesterov=True, momentum=0.5)
