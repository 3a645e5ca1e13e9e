"""What the checkpoint tests train: a small model with a tied weight, a buffer and odd sizes, on any mesh, its ranks in one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoshard.lower import compile
from autoshard.lower.program import Module
from autoshard.plan.search import random_plan
from autoshard.runtime.checkpoint.state import stepped
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner - 1, bias=False)  # random plans merge it with `up`, or don't

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)) * F.pad(self.gate(x), (0, 1), value=1.0))


class Small(nn.Module):
    """Tokens, `blocks` blocks, the tied head. `scale` is a buffer, `unread` one that forward never reads."""

    def __init__(self, vocab: int = 11, hidden: int = 6, inner: int = 10, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, inner) for _ in range(blocks))
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(hidden))
        self.register_buffer("unread", torch.rand(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((self.head(x * self.scale)).flatten(0, 1), labels.flatten())


MESHES: tuple[dict[str, int], ...] = (
    {}, {"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 3}, {"tp": 3}, {"pp": 3}, {"dp": 4}, {"tp": 4}, {"pp": 4}, {"dp": 2, "tp": 2},
    {"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}, {"dp": 5}, {"tp": 5}, {"dp": 7}, {"dp": 2, "tp": 4}, {"dp": 4, "tp": 2},
    {"pp": 2, "dp": 2, "tp": 2}, {"tp": 8},
)  # fmt: skip
"""Twenty, of up to eight ranks."""


def name(mesh: Mapping[str, int]) -> str:
    return ".".join(f"{axis}{n}" for axis, n in mesh.items()) or "one"


@functools.cache
def subject(dtype: torch.dtype = torch.float32) -> tuple[Small, dict[str, Tensor], Any]:
    """(model, batch, what was captured)."""
    torch.manual_seed(0)
    model = Small().to(dtype)
    ids = torch.randint(0, 11, (8, 5))
    batch = {"ids": ids, "labels": ids.roll(1)}
    return model, batch, capture(model, kwargs=batch)


@functools.cache
def program(mesh: tuple[tuple[str, int], ...], dtype: torch.dtype = torch.float32, seed: int = 0, graphs: bool = True) -> Any:
    """A random plan's program. Without `graphs` it can store and step, but not run: tracing them takes most of the time."""
    captured = subject(dtype)[2]
    plan = random_plan(captured.graph, mesh=dict(mesh), microbatches=1, seed=seed)
    return compile(captured, plan) if graphs else without_graphs(captured, plan)


def without_graphs(captured: Any, plan: Any) -> Any:
    empty = fx.symbolic_trace(lambda: ())
    with mock.patch("autoshard.lower.build.differentiate", lambda routine, key: Module(empty, None, None, 0, (), (), (), key)):
        return compile(captured, plan)


def trainer(
    mesh: Mapping[str, int], dtype: torch.dtype = torch.float32, shift: float = 0.0, seed: int = 0, graphs: bool = True
) -> InProcess:
    """A run on this mesh; `shift` moves its weights away from the model's."""
    model = copy.deepcopy(subject(dtype)[0])
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict().values()}.values():
            tensor += shift
    return InProcess(program(tuple(mesh.items()), dtype, seed, graphs), model)


def train(run: InProcess, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(run.train_step(**subject(next(run.parameters()).dtype)[1]).item())
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return losses


def pretend(run: InProcess, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with random gradients, the same under every plan."""
    for _ in range(steps):
        for state in run.states:
            for path, param in state.params.items():
                slot = run.program.ranks[state.rank].params[path]
                g = torch.Generator().manual_seed(run.steps_taken * 1000 + sum(map(ord, path)))
                param.grad = slot.take(torch.randn(slot.tensor.shape, generator=g)).to(param.dtype)
        run.steps_taken += 1
        optimizer.step()
        optimizer.zero_grad()


def whole(run: InProcess) -> dict[str, Any]:
    """Everything that a checkpoint has to bring back: weights, buffers, optimizers' state and masters as whole tensors (what is one number
    on every rank as a list of the different ones), groups, seeds."""
    found: dict[str, Any] = dict(run.state_dict())
    for i, optimizer in enumerate(run.optimizers):
        found[f"{i}.groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        for path in run.holders["params"]:
            held = [state for state in run.states if path in state.params]
            ours = {s.rank: stepped(optimizer, s)[path][1] for s in held if path in stepped(optimizer, s)}
            if optimizer.masters:
                found[f"{i}.master.{path}"] = run._assemble("params", path, lambda s, path, ours=ours: ours[s.rank].detach())
            for what in optimizer.inner.state.get(next(iter(ours.values())), {}):
                values = {rank: optimizer.inner.state[param][what] for rank, param in ours.items()}
                if all(isinstance(v, Tensor) and v.shape == ours[rank].shape for rank, v in values.items()):
                    found[f"{i}.{what}.{path}"] = run._assemble("params", path, lambda s, path, values=values: values[s.rank])
                else:
                    found[f"{i}.{what}.{path}"] = list({repr(v): v for v in values.values()})
    found["seeds"] = (run.seed, run.steps_taken)
    return found


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], Tensor):
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key
