"""The fast path: a program whose modules run eagerly instead of being traced, so that a graph costs milliseconds.

Everything is the compiler's own (partition, binding, the executor, the player of all ranks in one process), but `differentiate`: a
routine's forward runs under autograd and keeps its graph, its backward is `torch.autograd.grad`. A routine that holds collectives
runs on a thread of its own, which hands control back wherever it comes to one; only one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from autoshard.lower import build, collectives
from autoshard.lower.routine import Routine
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.requests import Meet, Request

_here = threading.local()


class Abandoned(BaseException):
    """Raised in a thread whose run is given up."""


class Fiber:
    """A thread that runs one function at a time and stops at every collective until it is given the result."""

    idle: list[Fiber] = []

    def __init__(self) -> None:
        self.mine, self.theirs = threading.Lock(), threading.Lock()
        self.mine.acquire()
        self.theirs.acquire()
        self.request: Meet | None = None
        self.answer: Any = None
        self.abandoned = False
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        _here.fiber = self
        torch.set_num_threads(1)
        while True:
            self.mine.acquire()
            try:
                self.result, self.error = self.task(), None
            except BaseException as error:
                self.result, self.error = None, error
            del self.task
            self.theirs.release()

    def run(self, task: Callable[[], Any]) -> Generator[Request, Any, Any]:
        self.task = task
        self.switch()
        try:
            while self.request is not None:
                answer = yield self.request
                self.answer, self.request = answer, None
                self.switch()
        except GeneratorExit:
            self.abandoned, self.request = True, None
            while hasattr(self, "task"):
                self.switch()
            self.abandoned = False
            Fiber.idle.append(self)
            raise
        Fiber.idle.append(self)
        result, error = self.result, self.error
        self.result = self.error = None
        if error is not None:
            raise error
        return result

    def switch(self) -> None:
        self.mine.release()
        self.theirs.acquire()

    def meet(self, meet: Meet) -> Any:
        if self.abandoned:
            raise Abandoned
        self.request = meet
        self.theirs.release()
        self.mine.acquire()
        if self.abandoned:
            raise Abandoned
        return self.answer


class Rendezvous:
    """Stands for `torch.ops._c10d_functional` in `lower.collectives`: a call waits until its whole group has come."""

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def collective(tensor: Tensor, *detail: Any) -> Any:
            *rest, group = detail
            return _here.fiber.meet(Meet(kind, group, tensor.detach(), tuple(rest), "eager"))

        return collective

    def wait_tensor(self, tensor: Tensor) -> Tensor:
        return tensor


class Eager:
    """What `differentiate` makes, without tracing. What a graph would say beforehand is known after the first run; so gradients are reduced
    at G, and not before."""

    def __init__(self, routine: Routine, key: str = "") -> None:
        self.routine, self.key, self.outputs = routine, key, len(routine.outputs)
        self.wanted = [i for i, p in enumerate(routine.inputs) if p.grad]
        self.meets = any(step.text.startswith("move ") for step in routine.steps)
        self.grad_outputs: tuple[int, ...] = ()
        self.grad_inputs: tuple[int, ...] = ()
        self.grad_params: tuple[int, ...] = ()
        self.forward, self.backward_input, self.backward_weight, self.backward = self._forward, None, None, None
        self.backward_in_place = self.accumulate = None

    def _forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        wanted = set(self.wanted)
        leaves = [t.detach().requires_grad_(True) if i in wanted else t for i, t in enumerate(tensors)]
        with torch.enable_grad():
            outs = self.routine(*leaves)
        self.grad_outputs = tuple(i for i, o in enumerate(outs) if o.requires_grad)
        if not self.grad_outputs:
            return tuple(o.detach() for o in outs)
        self.backward_input = self.backward = self._backward  # type: ignore[assignment]
        self.backward_weight = self._weights  # type: ignore[assignment]
        return *(o.detach() for o in outs), ([outs[i] for i in self.grad_outputs], [leaves[i] for i in self.wanted])

    def _backward(self, saved: tuple[list[Tensor], list[Tensor]], *given: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(*saved, given, allow_unused=True)
        by_index = {i: g for i, g in zip(self.wanted, found, strict=True) if g is not None}
        params = {i for i in by_index if self.routine.inputs[i].param}
        self.grad_inputs = tuple(i for i in by_index if i not in params)
        self.grad_params = tuple(i for i in by_index if i in params)
        return tuple(by_index[i] for i in (*self.grad_inputs, *self.grad_params))

    def _weights(self, *kept: Tensor) -> tuple[Tensor, ...]:
        return kept


class EagerInProcess(InProcess):
    """All ranks of a program made under `eager`."""

    def _run(self, graph: Any, args: Sequence[Any]) -> Generator[Request, Any, tuple[Any, ...]]:
        if graph.__self__.meets and graph.__name__ != "_weights":
            fiber = Fiber.idle.pop() if Fiber.idle else Fiber()
            result = yield from fiber.run(lambda: graph(*args))
            return result
        return graph(*args)


@contextmanager
def eager() -> Iterator[None]:
    """`lower.compile` makes eager modules in here, and their collectives wait for one another."""
    # passes over graphs, of which there are none
    whole, late = patch.object(build, "coalesced", lambda module, limit: module), patch.object(build, "early", lambda module: module)
    with patch.object(build, "differentiate", Eager), whole, late, patch.object(collectives, "Op", Rendezvous()):
        yield
