"""Ranks of a benchmark: started where it needs several, and agreeing on what each found.

In: a command's module and arguments, how many processes it needs. `launch` runs it again under torchrun unless it already does; `Ranks`
is this process among them, alone if nothing else was started.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autoshard.runtime.comm import join


def launch(module: str, argv: Sequence[str], count: int, kind: str) -> int | None:
    """Run `python -m module` in `count` processes, if that hasn't happened yet; its exit code. None: this process is to do the work.
    Raises SystemExit if there are fewer devices of the kind."""
    if count == 1 or "RANK" in os.environ:
        return None
    if kind == "cuda" and torch.cuda.device_count() < count:
        raise SystemExit(f"{module} needs {count} GPUs for this, {torch.cuda.device_count()} are here")
    # by address: a machine's own name needn't resolve
    where = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(count)]
    # a fixed seed: ranks that go through a set of words do it in one order
    return subprocess.run([*torchrun, "-m", module, *argv], env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ}).returncode


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class Ranks:
    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls, kind: str) -> Ranks:
        """Take this process's device, and join the others if torchrun started any."""
        size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        if size == 1:
            return cls(device)
        if not dist.is_initialized():
            join("nccl" if kind == "cuda" else "gloo")
        return cls(device, dist.get_rank(), size)

    @property
    def say(self) -> Callable[..., Any]:
        """print, on the first rank."""
        return self._print if self.rank == 0 else lambda *_, **__: None

    @staticmethod
    def _print(*text: Any) -> None:
        print(*text, flush=True)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks, entry by entry."""
        if self.size == 1 or not values:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def mean(self, value: float) -> float:
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return found.item() / self.size

    def all(self, value: bool) -> bool:
        return self.most([float(not value)])[0] == 0.0

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
