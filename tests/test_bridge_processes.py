"""Training in other processes: killed and resumed, and in two that see half of every batch each."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402  (after the check for torch)
import os  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from tests.training_script import main  # noqa: E402

SCRIPT = Path(__file__).parent / "training_script.py"
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start(folder: Path, options: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **THREADS, **environment}
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> list[str]:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return said.splitlines()


def weights(folder: Path, rank: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(folder / f"weights-{rank}.npz") as held:
        return {name: held[name] for name in held.files}


def history(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "history.json").read_text())
    return document


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """Momentum, averages, statistics, dropout, the order of the data: the very same bytes."""
    options = {"epochs": 3, "batch": 8, "ema": 0.9, "batch_norm": "train", "clip": 1.0, "evaluations": 2.0}
    killed = start(tmp_path / "killed", options)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line == "step 8\n":
            killed.kill()
    assert killed.wait() == -9
    state = json.loads((tmp_path / "killed" / "checkpoint" / "state.json").read_text())
    assert 7 <= state["step"] < 12
    assert not state["finished"]
    main(tmp_path / "killed", {**options, "resume": True})
    main(tmp_path / "whole", options)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert {"mean", "variance", "conv1"} <= first.keys()
    for name, values in first.items():
        assert values.tobytes() == second[name].tobytes(), name
    judged = [[row["judged"] for row in history(tmp_path / run)["rows"]] for run in ("whole", "killed")]
    assert judged[0] == judged[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def pair(folder: Path, options: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """Start two processes, told of each other as torchrun does."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(folder, options, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in (0, 1)]


def two(folder: Path, options: dict[str, Any]) -> list[list[str]]:
    """Train in two processes."""
    return [finish(process) for process in pair(folder, options)]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """44 rows in batches of 16 end with one of 12; the graph's own dropout is off, since each process draws its own."""
    options = {"epochs": 3, "optimizer": "sgd", "rate": 0.1, "clip": 1.0, "l1": 1e-3, "dropout": 0.0}
    main(tmp_path / "one", {**options, "batch": 16})
    said = two(tmp_path / "two", {**options, "batch": 8})
    assert said[0][-1] == "step 9"
    assert said[1] == []
    one, first, second = weights(tmp_path / "one"), weights(tmp_path / "two"), weights(tmp_path / "two", 1)
    for name, values in one.items():
        assert first[name].tobytes() == second[name].tobytes(), name
        np.testing.assert_allclose(first[name], values, rtol=0, atol=2e-6, err_msg=name)  # sums in another order
    losses = [[row["terms"].get("loss") for row in history(tmp_path / run)["rows"]] for run in ("one", "two")]
    assert losses[0][1:] == pytest.approx(losses[1][1:], abs=1e-5)
    assert (tmp_path / "two" / "checkpoint" / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "stopped", "steps"),
    [
        ({"poisoned": 1}, "the loss of update 5 is nan: an input of another process holds values", 4),
        ({"patience": 2, "weight_decay": 0.5, "optimizer": "adamw"}, "no better quality in 2 evaluations", 6),
    ],
)
def test_two_processes_stop_together(tmp_path: Path, options: dict[str, Any], stopped: str, steps: int) -> None:
    two(tmp_path, {"epochs": 9, "batch": 8, "rate": 0.1, **options})
    found = history(tmp_path)
    assert found["stopped"].startswith(stopped)
    assert found["steps"] == steps
    first, second = weights(tmp_path), weights(tmp_path, 1)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert all(np.isfinite(values).all() for values in first.values())


@pytest.mark.slow
def test_two_killed_processes_go_on(tmp_path: Path) -> None:
    options = {"epochs": 3, "batch": 8, "ema": 0.9}
    two(tmp_path / "whole", options)
    processes = pair(tmp_path / "killed", options)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line == "step 4\n":
            for process in processes:
                process.kill()
    assert [process.wait() for process in processes] == [-9, -9]
    said = two(tmp_path / "killed", {**options, "resume": True})
    assert said[0][0] in {"step 4", "step 5", "step 6"}
    for rank in (0, 1):
        first, second = weights(tmp_path / "whole", rank), weights(tmp_path / "killed", rank)
        assert all(first[name].tobytes() == second[name].tobytes() for name in first)
