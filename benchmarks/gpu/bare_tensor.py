"""A stack of Llama-like blocks over several processes by `torch.distributed` alone, to hold `mode: tensor` against.

One process per rank. Each layer's first matrices are cut by columns, its last ones by rows and summed by all_reduce.
Rank 0 sends the tokens to the others and brings the last token's hidden state to the host, as the stage does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors import safe_open
from torch import nn

from benchmarks.gpu.models import set_up
from tests import models

__all__ = ["BareTensor"]

_BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_ROWS = ("o_proj", "down_proj")


class Reduced(nn.Module):
    """A layer whose weight is this rank's share of the columns that it multiplies with; the shares are summed."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        dist.all_reduce(y)
        return y


def cut(model: nn.Module, weights: Path, rank: int, world: int, device: str) -> nn.Module:
    """The model, built on the meta device, with this rank's share of the weights."""
    state: dict[str, torch.Tensor] = {}
    with safe_open(str(weights), "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            kind, part = name.split(".")[-2], file.get_slice(name)
            rows, *more = part.get_shape()
            if kind in _BY_COLUMNS:
                share = part[rank * rows // world : (rank + 1) * rows // world]
            elif kind in _BY_ROWS:
                share = part[:, rank * more[0] // world : (rank + 1) * more[0] // world]
            else:
                share = part[:]
            state[name] = share.to(device)
    if missing := dict(model.named_parameters()).keys() ^ state.keys():
        raise SystemExit(f"{weights} and the model differ in {', '.join(sorted(missing))}")
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    dtype = next(model.parameters()).dtype
    # What is never saved is made anew.
    for module in model.modules():
        if isinstance(module, models.Rotary):
            module.inv_freq = models.Rotary(2 * len(module.inv_freq)).inv_freq.to(device, dtype)
        for name, child in list(module.named_children()):
            if name in _BY_ROWS:
                setattr(module, name, Reduced(child))
    return model.eval().requires_grad_(False)


class _Rank:
    def __init__(self, rank: int, world: int, sizes: dict[str, Any], weights: Path, devices: list[str]) -> None:
        self.rank, self.device = rank, torch.device(devices[rank])
        set_up("eager", self.device.type)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with torch.device("meta"):
            model = models.LlamaModel(**sizes)
        self.model = cut(model, weights, rank, world, devices[rank])

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray | None, length: int) -> np.ndarray | None:
        given = torch.from_numpy(tokens)[None] if tokens is not None else torch.empty(1, length, dtype=torch.int64)
        sent = given.to(self.device)
        dist.broadcast(sent, 0)
        hidden = self.model(sent)[:, -1].float()
        return hidden.cpu().numpy() if self.rank == 0 else None


def _serve(rank: int, world: int, port: int, pipe: Connection, given: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sizes, weights, devices = given
    backend = "nccl" if devices[0].startswith("cuda") else "gloo"
    me = _Rank(rank, world, sizes, weights, devices)
    dist.init_process_group(backend, rank=rank, world_size=world)
    while (order := pipe.recv()) is not None:
        tokens, times = order
        results, spent = None, []
        for _ in range(times):
            started = time.perf_counter()
            results = me.forward(tokens if rank == 0 else None, len(tokens))
            spent.append((time.perf_counter() - started) * 1000)
        pipe.send((spent, results))
    dist.destroy_process_group()


class BareTensor:
    """The processes, for as long as a `with` block lasts; idle but for the calls.

    Args:
        sizes: of `tests.models.LlamaModel`.
        weights: its safetensors file, in the type in which it is computed.
        devices: one a rank.
    """

    def __init__(self, sizes: dict[str, Any], weights: Path, devices: list[str]) -> None:
        self._given = (sizes, weights, devices)

    def __enter__(self) -> BareTensor:
        context, world = multiprocessing.get_context("spawn"), len(self._given[2])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs, self._given), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *exception: Any) -> None:
        # All are told before any is waited for: NCCL's ranks leave their group together.
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()

    def hidden(self, tokens: np.ndarray) -> np.ndarray:
        """The last token's hidden state, [1, width]."""
        return np.asarray(self._call(tokens, 1)[1])

    def latency_ms(self, tokens: np.ndarray, seconds: float) -> float:
        """Median time of one forward after another, with the way of its tokens and its result."""
        (once, *_), _ = self._call(tokens, 3)
        spent, _ = self._call(tokens, max(3, round(seconds * 1000 / max(once, 0.1))))
        return statistics.median(spent)

    def _call(self, tokens: np.ndarray, times: int) -> tuple[list[float], Any]:
        for pipe in self._pipes:
            pipe.send((tokens, times))
        answers = [pipe.recv() for pipe in self._pipes]
        return answers[0]
