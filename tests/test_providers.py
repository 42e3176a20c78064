"""Provider choice, with a real second provider in an environment of its own (distributions of ORT clash)."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from graphopt import runtime
from graphopt.errors import ProviderError
from graphopt.models.digits import demo_model

ROOT = Path(__file__).parent.parent
PACKAGES = [
    "onnxruntime-openvino>=1.23",
    "onnx",
    "onnx-graphsurgeon",
    "networkx",
    "scipy",
    "typer",
    "rich",
    "platformdirs",
    "tomli-w",
    "ml_dtypes",
]


def test_a_missing_provider_says_what_to_install() -> None:
    with pytest.raises(ProviderError, match="'cuda' is not in the installed ONNX Runtime") as caught:
        runtime.resolve_provider("CUDAExecutionProvider")
    assert caught.value.hint == "pip uninstall onnxruntime && pip install onnxruntime-gpu"


def test_two_distributions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "distributions", lambda: ["onnxruntime 1.31", "onnxruntime-gpu 1.31"])
    with pytest.raises(ProviderError) as caught:
        runtime.resolve_provider("cuda")
    assert "two distributions are installed" in str(caught.value.hint)


def test_a_provider_that_falls_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ORT only warns when a provider's libraries do not load, and runs on the CPU."""
    monkeypatch.setattr(runtime, "resolve_provider", lambda _: "AzureExecutionProvider")

    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    ort = runtime._import_ort()
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: Fallen())
    with pytest.raises(ProviderError, match="could not load provider 'cuda'"):
        runtime.Session(demo_model(), provider="cuda")


@pytest.mark.slow
def test_openvino_really_runs_the_nodes(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = subprocess.run(
        [python, "-m", "pip", "install", "-q", *PACKAGES], capture_output=True, text=True, check=False
    )
    if install.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"onnxruntime-openvino could not be installed: {install.stderr[-500:]}")
        pytest.skip("needs the Python package index")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", ROOT], check=True)
    command = [python, "-c", "from graphopt.cli import main; main()", "validate", demo_model(), demo_model()]
    ran = subprocess.run(
        [*command, "--other-provider", "openvino", "--json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    found = json.loads(ran.stdout)
    assert set(found["providers"]["a"]) == {"CPUExecutionProvider"}
    assert set(found["providers"]["b"]) == {"OpenVINOExecutionProvider"}
    wrong = subprocess.run([*command, "--provider", "cuda"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "onnxruntime-gpu" in wrong.stderr


def test_this_environment_runs_on_the_cpu() -> None:
    session = runtime.Session(demo_model(), profile=True)
    from graphopt.models.digits import task

    session.run(next(task.calibration(limit=1)))
    assert set(session.node_providers().values()) == {"CPUExecutionProvider"}


def test_asking_for_no_output_gives_none() -> None:
    """ORT itself returns all outputs for an empty list."""
    from graphopt.models.digits import task

    assert runtime.Session(demo_model()).run(next(task.calibration(limit=1)), outputs=[]) == {}
