"""The zoo: every model can be had, is what the manifest says, and runs; what is not as it should be is refused."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import DataError, GraphoptError, ProviderError, SpecError
from graphopt.models import catalogue, digits, wheels, zoo
from graphopt.runtime import Session

LARGE = {"alexnet", "vgg19", "zfnet512"}  # 240 to 575 MB each


def marked(names: list[str]) -> list[object]:
    """Return the names as parameters, the large and the exported ones marked slow."""
    slow = LARGE | set(zoo.names("torch"))
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def fetched(name: str) -> Path:
    """Fetch a model; offline the test is skipped, but never in CI. Exported models need torch, which CI may lack."""
    try:
        path: Path = zoo.fetch(name)
    except ProviderError as error:
        if os.environ.get("CI") and zoo.get(name).recipe != "torch-export":
            raise
        pytest.skip(str(error))
    return path


@pytest.mark.zoo
@pytest.mark.parametrize("name", marked(zoo.names()))
def test_model_runs_on_its_feeds(name: str) -> None:
    session = Session(fetched(name))
    feeds = list(zoo.feeds(name, count=2))
    assert set(feeds[0]) == set(session.input_names)
    first, second = (session.run(feed) for feed in feeds)
    for output, values in first.items():
        assert np.isfinite(values).all(), output
    # a network that does not react to its input would hide whatever is done to it; 1e-3 of the largest output
    assert any(np.abs(first[key] - second[key]).max() > 1e-3 * np.abs(first[key]).max() for key in first)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception-v1"])
def test_seeded_weights_are_the_same_again(name: str, tmp_path: Path) -> None:
    from graphopt.models import seeded

    made = fetched(name)
    (source,) = (zoo.fetch(source) for source in zoo.get(name).sources)
    seeded.make(name, [source], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == made.read_bytes()


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["magika-config", "minilm-tokenizer", "font-noto-sans-sc"])
def test_assets_have_the_hash_of_the_manifest(name: str) -> None:
    assert wheels.sha256(fetched(name)) == zoo.get(name).sha256


def test_manifest_is_complete() -> None:
    names = zoo.names() + zoo.names("asset")
    assert len(names) == len(set(names))
    for entry in map(zoo.get, names):
        assert entry.version
        assert entry.licence
        assert entry.group == "asset" or entry.inputs
        assert (entry.file and len(entry.sha256) == 64) or (entry.recipe and entry.sources)
        for spec in entry.inputs.values():
            assert spec.means


def test_feeds_have_the_manifests_shapes_and_depend_on_the_seed() -> None:
    for name in zoo.names():
        (feed,), (same,), (other,) = (list(zoo.feeds(name, seed, count=1)) for seed in (0, 0, 1))
        for key, spec in zoo.get(name).inputs.items():
            assert feed[key].shape == spec.shape
            assert feed[key].dtype == np.dtype(spec.dtype)
            np.testing.assert_array_equal(feed[key], same[key])
        assert any((feed[key] != other[key]).any() for key in feed)
    (feed,) = zoo.feeds("ppocr-rec", count=1, shapes={"x": (2, 3, 48, 160)})
    assert feed["x"].shape == (2, 3, 48, 160)


def test_unknown_names_and_groups_are_refused_with_a_hint() -> None:
    with pytest.raises(SpecError, match="did you mean 'magika'"):
        zoo.fetch("magik")
    with pytest.raises(SpecError, match="groups: asset"):
        zoo.names("none")
    with pytest.raises(SpecError, match="asset, not a model"):
        next(zoo.feeds("magika-config"))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel on disk that every download gives."""
    path = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/model.onnx", b"changed")
    monkeypatch.setattr(wheels, "_download", lambda *_: path)
    return path


def test_file_with_another_hash_is_refused_and_not_kept(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model.onnx"
    with pytest.raises(DataError, match="another content"):
        wheels.take("a", "1", {"a/model.onnx": ("0" * 64, target)})
    assert list(target.parent.iterdir()) == []
    digest = wheels.sha256(_written(tmp_path / "same", b"changed"))
    wheels.take("a", "1", {"a/model.onnx": (digest, target)})
    assert target.read_bytes() == b"changed"


def test_file_missing_in_the_wheel_is_named(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file 'a/other\.onnx'"):
        wheels.take("a", "1", {"a/other.onnx": ("0" * 64, tmp_path / "other.onnx")})


def test_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "take", lambda package, *_: taken.append(package))
    entry = zoo.get("magika")
    _written(tmp_path / "zoo" / f"magika-{entry.sha256[:12]}.onnx", b"damaged")
    zoo.fetch("magika")
    assert taken == ["magika"]


def test_offline_says_what_is_missing_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ProviderError, match=r"cannot download silero-vad==6\.2\.3") as caught:
        zoo.fetch("silero-vad-half")
    assert caught.value.hint is not None
    assert "offline" in caught.value.hint
    assert not list(tmp_path.glob("zoo/*"))


def test_export_without_torch_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.models import export

    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(export, "_DISTRIBUTIONS", ("surely-not-installed",))
    with pytest.raises(ProviderError, match="'surely-not-installed' is not installed"):
        zoo.fetch("minilm-dynamo")
    digest = zoo.get("minilm-weights").sha256[:12]
    earlier = _written(tmp_path / "zoo" / f"minilm-dynamo-torch1-onnxscript1-{digest}.onnx", b"made before")
    assert zoo.fetch("minilm-dynamo") == earlier


def test_commands_list_and_fetch(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ppocr-det" in [row["name"] for row in cli("zoo", "--json").json["models"]]
    assert "ppocr-det" in cli("zoo").out
    unknown = cli("zoo", "magik")
    assert unknown.code == 2
    assert "did you mean" in unknown.err
    assert catalogue.expand(["silero"]) == zoo.names("silero")
    assert catalogue.expand([]) == zoo.names()
    assert catalogue.expand(["magika"]) == ["magika"]

    def unavailable(name: str) -> Path:
        raise ProviderError(f"no {name}")

    monkeypatch.setattr(zoo, "fetch", unavailable)
    found = catalogue.fetch(["magika", "ppocr-cls"])
    assert all(isinstance(error, GraphoptError) for error in found.values())
    assert cli("zoo", "magika").code == 2


def test_committed_digits_are_small_and_disjoint() -> None:
    folder = digits.demo_model().parent
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 1_000_000
    with np.load(digits.demo_data()) as test, np.load(digits.demo_calibration()) as calibration:
        assert len(test["label"]) == 600
        seen = {image.tobytes() for image in calibration["image"]}
        assert not seen & {image.tobytes() for image in test["image"]}


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
