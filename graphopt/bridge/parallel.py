"""Data parallel training: processes that `torchrun` started, each with its part of every batch.

    torchrun --nproc-per-node 2 --no-python graphopt distill ...

Gradients are summed by gloo, weighted by rows, so that two processes take the steps of one with twice the batch, within
float noise.  Every process holds the same weights; only the first judges, writes and shows progress.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

LONGEST = timedelta(hours=12)
"""How long the others wait while the first judges; where a process dies, torchrun ends them all."""

STARTED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment."""


class Team:
    """The processes that train one model.

    Attributes:
        rank: number of this process, from 0.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def leads(self) -> bool:
        """Whether this process judges, writes and shows progress."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Any]) -> None:
        """Replace each tensor by its sum over all processes; the tensors are alike in all of them."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in tensors])
        distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def told(self, number: float) -> float:
        """Return the number that the first process has."""
        if self.world == 1:
            return number
        held = torch.tensor([number], dtype=torch.float64)
        distributed.broadcast(held, 0)
        return float(held)

    def any(self, flag: bool) -> bool:
        """Tell whether any process says yes."""
        held = torch.tensor([float(flag)])
        self.add_up([held])
        return bool(held)

    def wait(self) -> None:
        """Wait for all."""
        if self.world > 1:
            distributed.barrier()


def team() -> Team:
    """Return the processes that this one belongs to: itself, unless torchrun or the caller made a group."""
    if not distributed.is_available():
        return Team()
    if not distributed.is_initialized():
        if not all(name in os.environ for name in STARTED_BY) or int(os.environ["WORLD_SIZE"]) < 2:
            return Team()
        distributed.init_process_group("gloo", timeout=LONGEST)
        atexit.register(_leave)
    return Team(distributed.get_rank(), distributed.get_world_size())


def leads() -> bool:
    """Tell whether this process is the one that writes files and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
