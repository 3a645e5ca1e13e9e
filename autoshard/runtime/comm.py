"""Ranks that talk: process groups of a mesh's axes, point-to-point channels, and what all ranks must agree on.

On CUDA through NCCL, on CPU through gloo. `torch.distributed` is used as it stands if it is initialised, initialised from
torchrun's environment if there is one (`join`), and left alone by a program of one rank without either. Where several ranks run, a
watchdog names the one that the others wait for (`watchdog.py`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from .. import errors
from ..lower.program import Program
from ..trace.graph import Tensor as Spec
from .inputs import torch_dtype
from .requests import Meet, Receive, Request, Send
from .watchdog import ANSWER, STOP_AFTER, Playing, Watchdog, blame, keep_quiet, unfinished

T = TypeVar("T")
MAX_TEXT = 1 << 30
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def join(backend: str) -> None:
    """Become a rank of torchrun's job. Every restart meets in a generation of its own of the launcher's store: keys that the dead
    one left would otherwise send ranks to addresses where nobody listens (most restarts hang without it)."""
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, store=PrefixStore(generation(), store), rank=rank, world_size=size)


def generation() -> str:
    return f"generation {os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


_watchdogs: dict[Any, Watchdog | None] = {}
"""Default group → the one watchdog of this process, which has one main thread to look at."""


def watchdog(stop_after: float, device: torch.device) -> Watchdog | None:
    """This process's watchdog, which `stop_after` seconds are told to (0: none). None also where the store allows no second client."""
    world = dist.group.WORLD
    if not stop_after or dist.get_world_size() == 1:
        return None
    if world not in _watchdogs:
        for old in _watchdogs.values():
            if old is not None:
                old.close()
        _watchdogs.clear()
        store: Any = _get_default_store()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        made = None
        if hasattr(store, "clone"):
            mine = store.clone()
            mine.set_timeout(timedelta(seconds=ANSWER))
            named = PrefixStore(f"autoshard {generation()}", mine)
            made = Watchdog(named, dist.get_rank(), dist.get_world_size(), stop_after=stop_after, pending=_pending(device))
            keep_quiet(made)
        _watchdogs[world] = made
    return _watchdogs[world]


def _pending(device: torch.device) -> Callable[[], bool]:
    """Whether a device has work left, for the watchdog: a CPU's is done when a call returns."""
    if device.type != "cuda":
        return lambda: False
    return partial(unfinished, torch.cuda.current_stream(device))


class Comm:
    """This process among all ranks. Groups are made once, by all ranks in one order (`prepare`). `stop_after`: seconds of waiting for
    one rank after which all end; 0: no watchdog."""

    def __init__(self, device: torch.device, stop_after: float = STOP_AFTER) -> None:
        self.device = device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            join(self.backend)
        self.alone = not dist.is_initialized()
        self.watchdog = None if self.alone else watchdog(stop_after, device)
        self.rank, self.size = (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())
        self.groups: dict[tuple[Any, ...], Any] = {}
        self.axes: dict[str, tuple[int, ...]] = {}
        self.beside: Comm | None = None
        self.flying: deque[tuple[Any, Tensor]] = deque()
        if not self.alone:
            self.everyone = tuple(range(self.size))
            # the default group serves if it is of our backend
            same = dist.get_backend() == self.backend
            self.groups[self.everyone] = dist.group.WORLD if same else dist.new_group(list(self.everyone), backend=self.backend)

    def aside(self) -> Comm:
        """The same ranks through a gloo group of their own, for a thread beside the main one (made at the first call, a collective one)."""
        if self.alone:
            return self
        if self.beside is None:
            self.beside = copy.copy(self)
            self.beside.device, self.beside.backend, self.beside.watchdog = torch.device("cpu"), "gloo", None
            self.beside.groups = {self.everyone: dist.new_group(list(self.everyone), backend="gloo")}
        return self.beside

    def prepare(self, program: Program) -> dict[str, str]:
        """Make the groups of a program. Axis → the name of this rank's process group. Raises MeshError."""
        mesh = program.mesh
        if mesh.ranks != self.size:
            raise errors.MeshError(
                f"the plan's mesh {mesh} has {mesh.ranks} ranks, but {self.size} are running",
                hint="start as many processes as the mesh has",
            )
        if self.alone:
            return {}
        wanted: dict[tuple[Any, ...], list[int]] = {}
        for axis in mesh.names:
            for rank in range(self.size if mesh.size(axis) > 1 else 0):
                wanted.setdefault(tuple(mesh.group(rank, axis)), mesh.group(rank, axis))
        for r in program.ranks:
            for others in r.tied.values():
                wanted.setdefault(tuple(sorted({r.rank, *others})), sorted({r.rank, *others}))
            for source, destination in r.edges if self.backend == "nccl" else ():
                ends = [mesh.rank({**r.coords, "pp": stage}) for stage in (source, destination)]
                # one communicator for each direction: a pair that sends both ways through one waits for itself
                wanted.setdefault(("send", *ends), ends)
                wanted.setdefault(("send", *ends[::-1]), ends)
        for key, ranks in wanted.items():
            if key not in self.groups and len(ranks) > 1:
                self.groups[key] = dist.new_group(ranks, backend=self.backend)
        self.axes = {axis: tuple(mesh.group(self.rank, axis)) for axis in mesh.names}
        return {axis: self.group(ranks).group_name for axis, ranks in self.axes.items() if len(ranks) > 1}

    def group(self, key: tuple[Any, ...]) -> dist.ProcessGroup:
        found = self.groups[key]
        assert isinstance(found, dist.ProcessGroup), f"rank {self.rank} is not in group {key}"
        return found

    @contextlib.contextmanager
    def playing(self, step: Playing) -> Iterator[None]:
        """Around a step: what fails in it, or hangs, is told with its action."""
        watch = self.watchdog
        if watch is None:
            yield
            return
        watch.number, watch.playing = watch.number + 1, step
        try:
            with blame(watch):
                yield
        finally:
            watch.playing = None

    # ---- what the executor asks for ---------------------------------------------------------------------------------

    def answer(self, request: Request) -> Any:
        if isinstance(request, Send):
            return self.send(request.peer, request.tensors)
        if isinstance(request, Receive):
            return self.receive(request.peer, request.expected)
        return self.meet(request)

    def meet(self, request: Meet) -> Tensor:
        ranks = self.axes[request.group] if isinstance(request.group, str) else request.group
        if request.kind == "all_reduce":
            return self.all_reduce(request.tensor, request.detail[0], ranks)
        assert request.kind == "broadcast", f"the executor asks for {request.kind}"
        return self.broadcast(request.tensor, ranks[request.detail[0]], ranks)

    def send(self, peer: int, tensors: Sequence[Tensor]) -> None:
        """Start sending; the tensors are kept until they are gone."""
        while self.flying and self.flying[0][0].is_completed():
            self.flying.popleft()
        for tensor in tensors:
            wire = tensor.contiguous()
            if wire.numel():
                self.flying.append((dist.isend(wire, peer, group=self.channel(self.rank, peer)), wire))

    def receive(self, peer: int, expected: Sequence[Spec]) -> list[Tensor]:
        tensors = [torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=self.device) for spec in expected]
        works = [dist.irecv(t, peer, group=self.channel(peer, self.rank)) for t in tensors if t.numel()]
        for work in works:
            assert work is not None
            work.wait()
        return tensors

    def channel(self, source: int, destination: int) -> dist.ProcessGroup:
        # gloo matches by ends and order within any group
        return self.group(("send", source, destination) if self.backend == "nccl" else self.everyone)

    def land(self) -> None:
        """Wait for all sends (on CUDA: let the stream wait)."""
        while self.flying:
            self.flying.popleft()[0].wait()

    def all_reduce(self, tensor: Tensor, op: str, ranks: tuple[int, ...] | None = None) -> Tensor:
        """The group's sum, max or min, as a new tensor."""
        if self.alone:
            return tensor
        result = tensor.clone(memory_format=torch.contiguous_format)
        with blame(self.watchdog):
            dist.all_reduce(result, _REDUCE[op], group=self.group(ranks or self.everyone))
        return result

    def broadcast(self, tensor: Tensor, source: int, ranks: tuple[int, ...] | None = None) -> Tensor:
        """What the source rank gives (the others give a tensor like it, which may be overwritten)."""
        if self.alone:
            return tensor
        tensor = tensor.contiguous()
        with blame(self.watchdog):
            dist.broadcast(tensor, source, group=self.group(ranks or self.everyone))
        return tensor

    # ---- what all ranks must agree on -------------------------------------------------------------------------------

    def share(self, text: str, source: int = 0) -> str:
        """The source rank's text, on all ranks. (Bytes, not pickled objects: nothing that is received gets executed.)"""
        if self.alone:
            return text
        payload = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy()).to(self.device)
        size = int(self.broadcast(torch.tensor(payload.numel(), device=self.device), source))
        assert 0 <= size <= MAX_TEXT, f"rank {source} sends {size} bytes"
        if self.rank != source:
            payload = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.broadcast(payload, source).cpu().numpy().tobytes().decode() if size else ""

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank. If it fails on one, all raise the error of the first that failed."""
        error: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as caught:
            error = caught
        if self.alone:
            if error is not None:
                raise error
            return value
        mine = torch.tensor([self.size if error is None else self.rank], device=self.device)
        first = int(self.all_reduce(mine, "min"))
        if first == self.size:
            return value
        text = self.share(json.dumps([type(error).__name__, str(error)]), first)
        if self.rank == first and error is not None:
            raise error
        raise _rebuilt(first, *json.loads(text)) from error


def _rebuilt(rank: int, name: str, message: str) -> Exception:
    """The error of another rank: of the same class where it is one of ours."""
    cls = getattr(errors, name, None)
    if isinstance(cls, type) and issubclass(cls, errors.AutoshardError):
        made = cls(message)
        made.elsewhere = True
        return made
    return RuntimeError(f"rank {rank} failed with {name}: {message}")
