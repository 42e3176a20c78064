"""LSTM, GRU and RNN, as functions of torch.

    LSTM   i, o, f, c = gates(x W' + h R' + b);  c = f c + i g;  h = o tanh(c)          order of the gates: i o f c
    GRU    z, r = gates;  n = tanh(x W' + r (h R' + b));  h = (1 - z) n + z h           order: z r h
    RNN    h = tanh(x W' + h R' + b)

Plain ones run in torch's own kernels.  Those with other activations, a clip, peepholes, sequence lengths, coupled gates
or a GRU whose reset comes before the product run step by step.  Source: ONNX operators RNN, GRU and LSTM, opset 22.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.bridge import ops_activation as activation
from graphopt.bridge.ops_index import reversed_steps
from graphopt.bridge.table import Table
from graphopt.errors import ModelError

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": torch.nn.functional.softsign,
    "softplus": torch.nn.functional.softplus, "affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "leakyrelu": activation.leaky_relu, "elu": activation.elu, "hardsigmoid": activation.hard_sigmoid,
    "thresholdedrelu": activation.thresholded_relu,
    "scaledtanh": lambda x, alpha=1.0, beta=1.0: alpha * torch.tanh(beta * x),
}  # fmt: skip
"""By lower-case name; parameters as in the specification."""

_TAKES = {
    "affine": 2, "leakyrelu": 1, "elu": 1, "hardsigmoid": 2, "thresholdedrelu": 1, "scaledtanh": 2,
}  # fmt: skip
"""How many of alpha and beta an activation takes."""


@dataclass(frozen=True)
class _Cell:
    """One direction: weights with the gates along their first axis, what is between the steps."""

    w: Tensor
    r: Tensor
    b: Tensor
    rb: Tensor
    functions: tuple[Callable[[Tensor], Tensor], ...]
    clip: float
    peephole: Tensor | None = None
    flag: bool = False
    """LSTM: input and forget gates are coupled; GRU: the reset comes after the product."""

    def cut(self, x: Tensor) -> Tensor:
        return x.clamp(-self.clip, self.clip) if self.clip else x


_Step = Callable[[_Cell, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _rnn_step(cell: _Cell, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (cell.functions[0](cell.cut(x + state[0] @ cell.r.t() + cell.rb)),)


def _gru_step(cell: _Cell, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (h,) = state
    gate, new = cell.functions
    n = h.shape[-1]
    zr = gate(cell.cut(x[..., : 2 * n] + h @ cell.r[: 2 * n].t() + cell.rb[: 2 * n]))
    z, r = zr[..., :n], zr[..., n:]
    if cell.flag:
        inner = r * (h @ cell.r[2 * n :].t() + cell.rb[2 * n :])
    else:
        inner = (r * h) @ cell.r[2 * n :].t() + cell.rb[2 * n :]
    candidate = new(cell.cut(x[..., 2 * n :] + inner))
    return ((1 - z) * candidate + z * h,)


def _lstm_step(cell: _Cell, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h, c = state
    gate, new, last = cell.functions
    i, o, f, g = (x + h @ cell.r.t() + cell.rb).chunk(4, -1)
    pi, po, pf = (0.0, 0.0, 0.0) if cell.peephole is None else cell.peephole.chunk(3)
    i = gate(cell.cut(i + pi * c))
    f = 1 - i if cell.flag else gate(cell.cut(f + pf * c))
    c = f * c + i * new(cell.cut(g))
    return gate(cell.cut(o + po * c)) * last(c), c


def _scan(
    step: _Step, cell: _Cell, x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None, *, back: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the hidden states of all steps of x (steps, batch, inputs), and the last state of each row."""
    if back:
        x = x.flip(0) if lengths is None else reversed_steps(x, lengths)
    inputs = x @ cell.w.t() + cell.b
    made = []
    for i in range(x.shape[0]):
        new = step(cell, inputs[i], state)
        if lengths is None:
            state = new
            made.append(new[0])
            continue
        runs = (i < lengths)[:, None]
        state = tuple(torch.where(runs, a, b) for a, b in zip(new, state, strict=True))
        made.append(torch.where(runs, new[0], torch.zeros_like(new[0])))
    out = torch.stack(made)
    if back:
        out = out.flip(0) if lengths is None else reversed_steps(out, lengths)
    return out, state


@dataclass(frozen=True)
class _Kind:
    """What distinguishes the three operators."""

    step: _Step
    gates: int
    activations: tuple[str, ...]
    order: tuple[int, ...]
    """Gates of ONNX in the order of torch's kernel."""


_RNN = _Kind(_rnn_step, 1, ("tanh",), (0,))
_GRU = _Kind(_gru_step, 3, ("sigmoid", "tanh"), (1, 0, 2))
_LSTM = _Kind(_lstm_step, 4, ("sigmoid", "tanh", "tanh"), (0, 2, 3, 1))


@dataclass(frozen=True)
class _Call:
    """A call of one of the operators, with what is left out filled in."""

    kind: _Kind
    x: Tensor
    w: Tensor
    r: Tensor
    b: Tensor | None
    lengths: Tensor | None
    state: tuple[Tensor | None, ...]
    names: tuple[str, ...]
    functions: tuple[Callable[[Tensor], Tensor], ...]
    direction: str
    clip: float
    peephole: Tensor | None = None
    flag: bool = False

    @property
    def states(self) -> tuple[Tensor, ...]:
        """The first state of each direction, (directions, batch, hidden)."""
        zero = self.x.new_zeros(self.w.shape[0], self.x.shape[1], self.r.shape[-1])
        return tuple(zero if state is None else state for state in self.state)

    def native(self, *, plain: bool) -> bool:
        """Tell whether torch's own kernel computes this."""
        usual = self.names == self.kind.activations * self.w.shape[0] or (
            set(self.names) == {"relu"} and self.kind is _RNN
        )
        special = self.clip or self.lengths is not None or self.peephole is not None or self.direction == "reverse"
        return plain and usual and not special

    def run_native(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (steps, batch, directions · hidden) and the last states."""
        weights: list[Tensor] = []
        for d in range(self.w.shape[0]):
            rows = [self._ordered(self.w[d]), self._ordered(self.r[d])]
            if self.b is not None:
                rows += [self._ordered(part) for part in self.b[d].chunk(2)]
            weights += rows
        both = self.w.shape[0] == 2
        how = (weights, self.b is not None, 1, 0.0, False, both, False)
        if self.kind is _LSTM:
            out, *state = torch.lstm(self.x, self.states, *how)
            return out, tuple(state)
        kernel = torch.gru if self.kind is _GRU else torch.rnn_relu if self.names[0] == "relu" else torch.rnn_tanh
        out, last = kernel(self.x, self.states[0], *how)
        return out, (last,)

    def _ordered(self, rows: Tensor) -> Tensor:
        parts = rows.chunk(self.kind.gates)
        return rows if len(parts) == 1 else torch.cat([parts[i] for i in self.kind.order])

    def run_steps(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what `run_native` returns, step by step."""
        each = len(self.kind.activations)
        outs, lasts = [], []
        for d in range(self.w.shape[0]):
            zero = self.x.new_zeros(2 * self.w.shape[1])
            b, rb = (zero if self.b is None else self.b[d]).chunk(2)
            peephole = None if self.peephole is None else self.peephole[d]
            functions = self.functions[d * each : (d + 1) * each]
            cell = _Cell(self.w[d], self.r[d], b, rb, functions, self.clip, peephole, self.flag)
            state = tuple(s[d] for s in self.states)
            back = self.direction == "reverse" or d == 1
            out, last = _scan(self.kind.step, cell, self.x, state, self.lengths, back=back)
            outs.append(out)
            lasts.append(last)
        return torch.cat(outs, -1), tuple(torch.stack(states) for states in zip(*lasts, strict=True))


def _functions(
    names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Return activations by name; each takes its alpha and beta from those that are left."""
    alphas, betas, made = list(alphas), list(betas), []
    for name in names:
        if name not in _ACTIVATIONS:
            raise ModelError(f"recurrent layers have no activation '{name}'")
        takes = _TAKES.get(name, 0)
        given = {"alpha": alphas.pop(0)} if takes and alphas else {}
        given |= {"beta": betas.pop(0)} if takes == 2 and betas else {}
        made.append(_with(_ACTIVATIONS[name], given))
    return tuple(made)


def _with(function: Callable[..., Tensor], given: dict[str, float]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, **given)


def _recurrent(
    kind: _Kind, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, lengths: Tensor | None,
    state: tuple[Tensor | None, ...], *, plain: bool, activations: Sequence[str] | None, alpha: Sequence[float] | None,
    beta: Sequence[float] | None, direction: str, clip: float, layout: int, outputs: int,
    peephole: Tensor | None = None, flag: bool = False,
) -> Any:  # fmt: skip
    """Return the hidden states of all steps (steps, directions, batch, hidden) and the last states."""
    names = tuple(name.lower() for name in activations or kind.activations * w.shape[0])
    functions = _functions(names, alpha or (), beta or ())
    state = tuple(None if s is None else s.to(x.device) for s in state)  # zeros made of a shape lie on the CPU
    lengths = None if lengths is None else lengths.to(x.device)
    if layout:
        x = x.transpose(0, 1)
        state = tuple(None if s is None else s.transpose(0, 1) for s in state)
    call = _Call(kind, x, w, r, b, lengths, state, names, functions, direction, clip, peephole, flag)
    out, last = call.run_native() if call.native(plain=plain) else call.run_steps()
    out = out.unflatten(-1, (w.shape[0], r.shape[-1])).transpose(1, 2)
    if layout:
        out = out.permute(2, 0, 1, 3)
        last = tuple(s.transpose(0, 1) for s in last)
    return (out, *last)[:outputs] if outputs > 1 else out


def rnn(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, *, activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None, activation_beta: Sequence[float] | None = None, clip: float = 0.0,
    direction: str = "forward", hidden_size: int = 0, layout: int = 0, outputs: int = 1,
) -> Any:  # fmt: skip
    return _recurrent(
        _RNN, x, w, r, b, sequence_lens, (initial_h,), plain=True, activations=activations, alpha=activation_alpha,
        beta=activation_beta, direction=direction, clip=clip, layout=layout, outputs=outputs,
    )  # fmt: skip


def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, *, activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None, activation_beta: Sequence[float] | None = None, clip: float = 0.0,
    direction: str = "forward", hidden_size: int = 0, layout: int = 0, linear_before_reset: int = 0, outputs: int = 1,
) -> Any:  # fmt: skip
    return _recurrent(
        _GRU, x, w, r, b, sequence_lens, (initial_h,), plain=bool(linear_before_reset), activations=activations,
        alpha=activation_alpha, beta=activation_beta, direction=direction, clip=clip, layout=layout, outputs=outputs,
        flag=bool(linear_before_reset),
    )  # fmt: skip


def lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, initial_c: Tensor | None = None, p: Tensor | None = None, *,
    activations: Sequence[str] | None = None, activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None, clip: float = 0.0, direction: str = "forward",
    hidden_size: int = 0, input_forget: int = 0, layout: int = 0, outputs: int = 1,
) -> Any:  # fmt: skip
    return _recurrent(
        _LSTM, x, w, r, b, sequence_lens, (initial_h, initial_c), plain=not input_forget, activations=activations,
        alpha=activation_alpha, beta=activation_beta, direction=direction, clip=clip, layout=layout, outputs=outputs,
        peephole=p, flag=bool(input_forget),
    )  # fmt: skip


TABLE: Table = {"RNN": rnn, "GRU": gru, "LSTM": lstm}
