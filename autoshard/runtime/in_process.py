"""All ranks of a program in one process: uncompiled graphs as coroutines, collectives as functions of lists of tensors.

In: a Program and the whole model's weights. Out: the same steps that real ranks would take, so that thousands of programs can be
run and compared without a process group. A rank that comes to a collective with something else than its group, or a state in
which nobody can go on, raises DeadlockError and names the ranks and the nodes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import DeadlockError
from ..lower.program import Program, Slot
from ..mesh import Mesh
from .coroutine import Coroutine, coroutine
from .executor import Step
from .requests import Meet, Receive, Request, Send
from .trainable import Trainable, Weights

# ---- collectives on lists: tensors of a group's ranks in order → their results --------------------------------------


def _reduced(tensors: Sequence[Tensor], op: str) -> Tensor:
    if op in ("sum", "avg"):
        total = functools.reduce(torch.add, tensors)
        return total / len(tensors) if op == "avg" else total
    return functools.reduce({"max": torch.maximum, "min": torch.minimum, "product": torch.mul}[op], tensors)


def all_reduce(tensors: Sequence[Tensor], op: str) -> list[Tensor]:
    total = _reduced(tensors, op)
    return [total, *(total.clone() for _ in tensors[1:])]


def all_gather_into_tensor(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    return [torch.cat(list(tensors)) for _ in tensors]


def reduce_scatter_tensor(tensors: Sequence[Tensor], op: str, size: int) -> list[Tensor]:
    return [chunk.contiguous().clone() for chunk in _reduced(tensors, op).chunk(size)]


def all_to_all_single(tensors: Sequence[Tensor], received: Sequence[Sequence[int]], sent: Sequence[Sequence[int]]) -> list[Tensor]:
    pieces = [t.split(list(sizes)) for t, sizes in zip(tensors, sent, strict=True)]
    return [torch.cat([piece[i] for piece in pieces]) for i in range(len(tensors))]


def broadcast(tensors: Sequence[Tensor], source: int) -> list[Tensor]:
    return [t if i == source else tensors[source].clone() for i, t in enumerate(tensors)]


COLLECTIVES: dict[str, Callable[..., list[Tensor]]] = {
    f.__name__: f for f in (all_reduce, all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single, broadcast)
}


# ---- the player -----------------------------------------------------------------------------------------------------


class Player:
    """Runs the generators of all ranks in turns, each as far as it goes. `where(rank)` says where a rank stands, for messages."""

    def __init__(self, mesh: Mesh, generators: Sequence[Generator[Request, Any, Any]], where: Callable[[int], str]) -> None:
        self.mesh, self.generators, self.where = mesh, generators, where
        self.ready: deque[tuple[int, Any]] = deque((rank, None) for rank in range(len(generators)))
        self.waiting: dict[int, Request] = {}
        self.arrived: dict[tuple[int, ...], dict[int, Meet]] = {}
        self.channels: dict[tuple[int, int], deque[Send]] = {}
        self.results: dict[int, Any] = {}

    def play(self) -> list[Any]:
        while self.ready:
            rank, answer = self.ready.popleft()
            self.advance(rank, answer)
        if self.waiting:
            self.fail("no rank can go on", sorted(self.waiting))
        unread = [(pair, channel) for pair, channel in self.channels.items() if channel]
        assert not unread, f"sent from rank {unread[0][0][0]} to {unread[0][0][1]} and never received: {unread[0][1][0].where}"
        return [self.results[rank] for rank in range(len(self.generators))]

    def advance(self, rank: int, answer: Any) -> None:
        """Run one rank until it has to wait."""
        generator = self.generators[rank]
        while True:
            try:
                request = generator.send(answer)
            except StopIteration as stop:
                self.results[rank] = stop.value
                return
            except Exception as error:
                error.add_note(f"on rank {rank}, at {self.where(rank)}")
                raise
            if isinstance(request, Send):
                self.send(rank, request)
                answer = None
                continue
            self.waiting[rank] = request
            if isinstance(request, Receive):
                self.receive(rank)
            else:
                self.meet(rank, request)
            return

    def resume(self, rank: int, answer: Any) -> None:
        del self.waiting[rank]
        self.ready.append((rank, answer))

    def send(self, rank: int, request: Send) -> None:
        self.channels.setdefault((rank, request.peer), deque()).append(request)
        if isinstance(waiting := self.waiting.get(request.peer), Receive) and waiting.peer == rank:
            self.receive(request.peer)

    def receive(self, rank: int) -> None:
        request = self.waiting[rank]
        assert isinstance(request, Receive)
        channel = self.channels.get((request.peer, rank))
        if not channel:
            return
        sent = channel.popleft()
        found = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in sent.tensors]
        expected = [(t.shape, t.dtype) for t in request.expected]
        if found != expected or sent.where[1:] != request.where[1:]:
            raise DeadlockError(
                f"rank {rank} at {request.where} expects {expected} from rank {request.peer}, which sent {found} at {sent.where}"
            )
        self.resume(rank, sent.tensors)

    def meet(self, rank: int, request: Meet) -> None:
        group = tuple(self.mesh.group(rank, request.group)) if isinstance(request.group, str) else request.group
        here = self.arrived.setdefault(group, {})
        here[rank] = request
        first_rank, first = next(iter(here.items()))
        if not _agree(first, request):
            self.fail("ranks of one group come to different collectives", [first_rank, rank])
        if len(here) < len(group):
            return
        del self.arrived[group]
        tensors = [here[r].tensor for r in group]
        if request.kind not in COLLECTIVES:
            raise NotImplementedError(f"collective {request.kind} can't be played in one process; expected one of {', '.join(COLLECTIVES)}")
        if request.kind == "all_to_all_single":
            received, sent = ([here[r].detail[i] for r in group] for i in (0, 1))
            if any(sent[a][b] != received[b][a] for a in range(len(group)) for b in range(len(group))):
                self.fail("all_to_all_single splits don't match", list(group))
            results = all_to_all_single(tensors, received, sent)
        else:
            results = COLLECTIVES[request.kind](tensors, *request.detail)
        for r, result in zip(group, results, strict=True):
            self.resume(r, result)

    def fail(self, message: str, ranks: list[int]) -> None:
        lines = [f"  rank {r} at {self.where(r)} {_describe(self.waiting[r])}" for r in ranks[:16]]
        done = [r for r in self.results if r not in ranks]
        if done:
            lines.append(f"  ranks {', '.join(map(str, sorted(done)[:16]))} are at the end")
        raise DeadlockError("\n".join([message, *lines]), hint="a program's ranks must run the same collectives in the same order")


def _agree(a: Meet, b: Meet) -> bool:
    if (a.kind, a.group, a.tensor.dtype) != (b.kind, b.group, b.tensor.dtype):
        return False
    return a.kind == "all_to_all_single" or (a.tensor.shape == b.tensor.shape and a.detail == b.detail)


def _describe(request: Request) -> str:
    if isinstance(request, Meet):
        dtype = str(request.tensor.dtype).removeprefix("torch.")
        shape = ", ".join(map(str, request.tensor.shape))
        detail = "".join(f", {d}" for d in request.detail)
        return f"waits in {request.kind}({dtype}[{shape}]{detail}) on {request.group!r}, node {request.where}"
    return f"waits for rank {request.peer}"


# ---- the trainer ----------------------------------------------------------------------------------------------------


class InProcess(Trainable):
    """All ranks of a program. `weights`: the model, or its whole tensors by name."""

    def __init__(self, program: Program, weights: nn.Module | Weights, captured: Any = None, **options: Any) -> None:
        self.graphs: dict[fx.GraphModule, Coroutine] = {}
        super().__init__(program, weights, captured, ranks=range(len(program.ranks)), device=torch.device("cpu"), **options)

    def _run(self, graph: fx.GraphModule, args: Sequence[Tensor]) -> Generator[Request, Any, tuple[Any, ...]]:
        if graph not in self.graphs:
            self.graphs[graph] = coroutine(graph)
        return self.graphs[graph](*args)

    def _play(self, steps: list[Step]) -> list[Tensor]:
        mesh = steps[0].x.program.mesh
        return Player(mesh, [step.run() for step in steps], lambda rank: steps[rank].at).play()

    def _reduce(self, tensor: Tensor, op: str) -> Tensor:
        return tensor

    def _fetch(self, rank: int, shard: Tensor | None, slot: Slot) -> Tensor:
        assert shard is not None
        return shard
