"""The only import of ONNX Runtime (ORT): sessions, providers, profiles, and what ORT made of a graph."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx

from graphopt.errors import DataError, ModelError, ProviderError, did_you_mean
from graphopt.model import INLINE_LIMIT, Model, load

Optimization: TypeAlias = Literal["off", "basic", "extended", "all"]
Feeds: TypeAlias = Mapping[str, Any]
Runnable: TypeAlias = "Model | onnx.ModelProto | str | Path"

PROVIDERS: Mapping[str, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "directml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime"),
    "rocm": ("ROCMExecutionProvider", "onnxruntime-rocm"),
    "qnn": ("QNNExecutionProvider", "onnxruntime-qnn"),
    "xnnpack": ("XnnpackExecutionProvider", "onnxruntime"),
}
"""Short name -> (ORT's name, the distribution that has it)."""


_CUSTOM_HINT = "name the library of its custom operators (--custom-ops), or leave it unrun (--verify off --no-measure)"


def _import_ort() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise ProviderError("ONNX Runtime is not installed", hint="pip install onnxruntime") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ProviderError(
            "ONNX Runtime is installed, but broken",
            hint="two of its distributions overwrote each other: " + _reinstall(),
        )
    return onnxruntime


def distributions() -> list[str]:
    """Return the installed distributions that provide the package `onnxruntime`."""
    names = sorted({distribution for _, distribution in PROVIDERS.values()})
    return [f"{name} {version}" for name in names if (version := _installed(name)) is not None]


@functools.cache  # looked up in the files of the installation, which takes a millisecond each
def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reinstall() -> str:
    names = [d.split()[0] for d in distributions()] or ["onnxruntime"]
    return f"pip uninstall {' '.join(names)}, then pip install the one you need"


def available_providers() -> list[str]:
    """Return the short names of the providers that this installation of ORT has."""
    present = _import_ort().get_available_providers()
    return [short for short, (name, _) in PROVIDERS.items() if name in present]


def resolve_provider(name: str) -> str:
    """Return ORT's name of a provider given by its short or full name.

    Raises:
        ProviderError: unknown, or not in the installed ORT; the hint says what to install.
    """
    full = {long: short for short, (long, _) in PROVIDERS.items()}
    short = full.get(name, name.lower())
    if short not in PROVIDERS:
        raise ProviderError(
            f"unknown provider '{name}'", hint=did_you_mean(short, PROVIDERS) or f"known: {', '.join(PROVIDERS)}"
        )
    long, distribution = PROVIDERS[short]
    if long not in _import_ort().get_available_providers():
        installed = distributions()
        clash = f"; two distributions are installed ({', '.join(installed)}): keep one" if len(installed) > 1 else ""
        raise ProviderError(
            f"provider '{short}' is not in the installed ONNX Runtime ({', '.join(installed) or 'none'})",
            hint=f"pip uninstall onnxruntime && pip install {distribution}{clash}",
        )
    return long


def version() -> str:
    """Return ORT's version."""
    return str(_import_ort().__version__)


class Session:
    """An ORT session of a model.

    Args:
        model: a `Model`, proto or path.
        optimization: how far ORT may rewrite the graph.
        threads: intra-op threads; inter-op is always one.
        provider: short name; the session fails if ORT does not load it.
        extra_outputs: inner tensors of the main graph to return too.
        profile: record a profile, read by `profile_events`.
        custom_ops: libraries of custom operators, loaded because the user named them.
        optimized_path: where ORT writes the graph it really runs.
        config: further session options by ORT's key, such as `session.intra_op.allow_spinning`.

    Raises:
        ModelError: ORT refuses the model.
        ProviderError: the provider is missing or fell back to another.
    """

    def __init__(
        self,
        model: Runnable,
        *,
        optimization: Optimization = "all",
        threads: int = 1,
        provider: str = "cpu",
        extra_outputs: Sequence[str] = (),
        profile: bool = False,
        custom_ops: Sequence[Path] = (),
        optimized_path: Path | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        ort = _import_ort()
        name = resolve_provider(provider)
        self._folder: str | None = None
        libraries = (*custom_ops, *model.custom_ops) if isinstance(model, Model) else custom_ops
        options = self._options(ort, optimization, threads, libraries)
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._temporary()) / "profile")
        path = model.path if isinstance(model, Model) else model
        where = str(path) if isinstance(path, str | Path) else None
        try:
            self._session = ort.InferenceSession(
                self._source(model, extra_outputs), sess_options=options, providers=[name]
            )
        except ort_errors() as error:
            text = _first_line(error)
            hint = _CUSTOM_HINT if "not a registered function" in text else None
            raise ModelError(f"ONNX Runtime refuses the model: {text}", at=where, hint=hint) from error
        if name not in self._session.get_providers():
            raise ProviderError(
                f"ONNX Runtime could not load provider '{provider}'; it runs {self._session.get_providers()[0]}",
                hint="its driver or libraries are missing or of another version",
            )
        self.input_names = [i.name for i in self._session.get_inputs()]
        self.output_names = [o.name for o in self._session.get_outputs()]
        self.output_types = {o.name: str(o.type) for o in self._session.get_outputs()}

    @staticmethod
    def _options(ort: Any, optimization: Optimization, threads: int, custom_ops: Sequence[Path]) -> Any:
        levels = ort.GraphOptimizationLevel
        options = ort.SessionOptions()
        options.graph_optimization_level = {
            "off": levels.ORT_DISABLE_ALL,
            "basic": levels.ORT_ENABLE_BASIC,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "all": levels.ORT_ENABLE_ALL,
        }[optimization]
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        for library in dict.fromkeys(custom_ops):
            try:
                options.register_custom_ops_library(str(library))
            except ort_errors() as error:
                raise ModelError(f"not a library of custom operators: {_first_line(error)}", at=str(library)) from error
        return options

    def _temporary(self) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="graphopt-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _source(self, model: Runnable, extra_outputs: Sequence[str]) -> str | bytes:
        if isinstance(model, str | Path):
            if not extra_outputs:
                return str(model)
            model = load(model)
        if isinstance(model, Model):
            if model.weight_bytes() > INLINE_LIMIT:
                return self._write_large(model, extra_outputs)
            model = model.emit()
        elif extra_outputs:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            model = copy
        _add_outputs(model, extra_outputs)
        return model.SerializeToString()  # type: ignore[no-any-return]

    def _write_large(self, model: Model, extra_outputs: Sequence[str]) -> str:
        path = Path(self._temporary()) / "model.onnx"
        model.save(path)
        if extra_outputs:
            proto = onnx.load(path, load_external_data=False)
            _add_outputs(proto, extra_outputs)
            path.write_bytes(proto.SerializeToString())
        return str(path)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once; return the outputs by name (tensors as arrays, sequences and maps as Python objects).

        Raises:
            DataError: ORT rejects the feeds, or an operator fails on their values.
        """
        ort = _import_ort()
        wanted = list(outputs) if outputs is not None else self.output_names
        self._check_names(feeds)
        if not wanted:  # ORT would return all of them
            return {}
        try:
            values = self._session.run(wanted, {k: _to_ort(ort, v) for k, v in feeds.items()})
        except ort_errors() as error:
            raise DataError(f"ONNX Runtime fails on these feeds: {_first_line(error)}") from error
        return dict(zip(wanted, values, strict=True))

    def prepared(self, feeds: Feeds) -> Callable[[], object]:
        """Return a call that runs these feeds with no checks of ours in between, for timing.

        Raises:
            DataError: ORT rejects the feeds, or an operator fails on their values (they are run once).
        """
        self.run(feeds)
        ort = _import_ort()
        run, names = self._session.run, self.output_names
        ready = {name: _to_ort(ort, value) for name, value in feeds.items()}
        return lambda: run(names, ready)

    def _check_names(self, feeds: Feeds) -> None:
        known = set(self.input_names) | {i.name for i in self._session.get_overridable_initializers()}
        for name in feeds:
            if name not in known:
                raise DataError(
                    f"the model has no input '{name}'",
                    hint=did_you_mean(name, known) or f"its inputs: {', '.join(self.input_names)}",
                )
        for name in self.input_names:
            if name not in feeds:
                raise DataError(f"input '{name}' is not fed", hint=f"the model needs: {', '.join(self.input_names)}")

    def profile_events(self) -> list[dict[str, Any]]:
        """Return the events recorded so far and stop recording (sessions made with `profile=True`)."""
        path = Path(self._session.end_profiling())
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def node_providers(self) -> dict[str, str]:
        """Return which provider ran each node (by the name ORT gives it); ends the profile."""
        found: dict[str, str] = {}
        for event in self.profile_events():
            provider = event.get("args", {}).get("provider")
            if provider:
                found[event["name"].removesuffix("_kernel_time")] = provider
        return found


def _add_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    present = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)


def evaluate(
    model: Runnable, feeds: Feeds, outputs: Sequence[str] | None = None, *, optimization: Optimization = "off"
) -> dict[str, Any]:
    """Run a model once with ORT's rewriting off and return outputs by name; inner tensors may be asked for."""
    session = Session(model, optimization=optimization, extra_outputs=outputs or ())
    return session.run(feeds, outputs)


def ort_errors() -> tuple[type[Exception], ...]:
    """Return the exception classes that ORT raises; they share no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    own: Iterable[Any] = vars(state).values()
    kinds = [kind for kind in own if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*kinds, RuntimeError, ValueError, TypeError)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) < 600 else line[:600] + " …"


def _to_ort(ort: Any, value: Any) -> Any:
    """Return a feed as ORT takes it: dtypes that NumPy lacks go in as their ONNX type."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "V":
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(value), kind)
    return value
