"""Fourier transforms and windows, as functions of torch.  Complex numbers are a last axis of two, as in ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphopt.bridge.host import torch_kind
from graphopt.bridge.operands import number, numbers, positive
from graphopt.bridge.table import Op, Table


def _complex(x: Tensor) -> Tensor:
    return x[..., 0] if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())


def dft(x: Tensor, dft_length: Any = None, axis: Any = -2, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    axis = positive(number(axis), x.ndim)
    values = _complex(x)
    length = number(dft_length) if dft_length is not None else None
    if inverse and onesided:
        return torch.fft.irfft(values, length, axis).unsqueeze(-1)
    out = torch.fft.ifft(values, length, axis) if inverse else torch.fft.fft(values, length, axis)
    if onesided:
        out = out.narrow(axis, 0, out.shape[axis] // 2 + 1)
    return torch.view_as_real(out)


def dft_17(x: Tensor, dft_length: Any = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    return dft(x, dft_length, axis, inverse=inverse, onesided=onesided)


def stft(
    x: Tensor, frame_step: Any, window: Tensor | None = None, frame_length: Any = None, onesided: int = 1
) -> Tensor:
    """Return the transforms (batch, frames, frequencies, 2) of windowed frames of a signal (batch, length, 1 or 2)."""
    values = _complex(x) if x.ndim == 3 else x
    length = window.shape[0] if window is not None else number(frame_length)
    frames = values.unfold(-1, length, number(frame_step))
    frames = frames if window is None else frames * window
    out = torch.fft.fft(frames, dim=-1)
    return torch.view_as_real(out[..., : length // 2 + 1] if onesided else out)


def _window(size: Any, kind: int, periodic: int, *weights: float) -> Tensor:
    """Return the sum of cosines of one window, alternating in sign."""
    (count,) = numbers(size)
    turns = torch.arange(count, dtype=torch.float64) * (2 * math.pi / (count if periodic else count - 1))
    found = sum(w * (-1) ** i * torch.cos(i * turns) for i, w in enumerate(weights))
    return found.to(torch_kind(kind))


def hann_window(size: Any, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, output_datatype, periodic, 0.5, 0.5)


def hamming_window(size: Any, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, output_datatype, periodic, 25 / 46, 21 / 46)


def blackman_window(size: Any, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, output_datatype, periodic, 0.42, 0.5, 0.08)


TABLE: Table = {
    "DFT": (Op(1, dft_17, host=True), Op(20, dft, host=True)), "STFT": Op(1, stft, host=True),
    "HannWindow": Op(1, hann_window, host=True), "HammingWindow": Op(1, hamming_window, host=True),
    "BlackmanWindow": Op(1, blackman_window, host=True),
}  # fmt: skip
