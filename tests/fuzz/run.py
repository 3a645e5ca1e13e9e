"""Run a case on its mesh and compare it with one device: the loss, every gradient, every buffer, in float64.

`trial(case)` says how they differ, or None. `check(text, mesh, …)` runs a case that was printed, and fails with the difference.
"""

from __future__ import annotations

import functools
import traceback
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from autoshard import lower
from autoshard.errors import NoPlanError
from autoshard.lower import bodies, build
from autoshard.plan import candidate, finish
from autoshard.plan.placement import Chooser
from autoshard.plan.search import random_plan
from autoshard.plan.solve import TooWide
from autoshard.plan.space import Space
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.inputs import mix
from autoshard.trace.graph import map_refs
from autoshard.trace.interpret import call

from .case import Case
from .eager import EagerInProcess, eager
from .generate import any_blocks

TOLERANCE = 1e-9
SMALL = 1e-4
"""A gradient is compared with its own largest element, or this part of the largest of all gradients (some are zero but for rounding)."""
FLOOR = 1e-4
"""Nothing is compared with less: values are near 1, and where they cancel (a sum of what has its mean subtracted) rounding is left."""
_draw, _mix = bodies.dropout_mask, mix  # the reference's own, whatever is patched later


@dataclass
class Outcome:
    """What a step gives: the loss, gradients by parameter, buffers after the step."""

    loss: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass
class Failure:
    """`kind`: "crash" (an exception) or what differs: "loss", "gradient", "buffer"."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Skipped(Exception):
    """No random plan of this shape exists (too few blocks for the stages, or too wide a problem)."""


def reference(case: Case) -> Outcome:
    """The same step on one device: the ops one by one under autograd."""
    graph = case.graph
    torch.manual_seed(case.data)
    values: dict[str, Tensor] = {v.name: case.tensor(v.name) for v in graph.sources("param", "buffer", "constant", "input")}
    params = [v for v in graph.sources("param") if v.grad]
    for v in params:
        values[v.name].requires_grad_(True)
    opaque = case.captured.opaque
    for op in graph.ops:
        if op.target == "autoshard.dropout_mask.default" and case.dropout == "philox":
            shape, p, _, order, _ = op.args
            outs: Any = _draw(torch.tensor(_mix(case.data, order)), [torch.arange(n) for n in shape], shape, p, torch.float64)
        else:
            args, kwargs = map_refs((op.args, op.kwargs), lambda r: values[r.name])
            outs = call(op.target, args, kwargs, "cpu", opaque)
        values.update(zip(op.outs, outs if isinstance(outs, tuple) else (outs,), strict=True))
    loss = values[graph.loss]
    found = torch.autograd.grad(loss, [values[v.name] for v in params], allow_unused=True)
    grads = {v.path: torch.zeros_like(values[v.name]) if g is None else g for v, g in zip(params, found, strict=True)}
    buffers = {v.path: values[graph.updates.get(v.path, v.name)].detach() for v in graph.sources("buffer")}
    return Outcome(loss.detach(), grads, buffers)


def sharded(case: Case, full: bool) -> Outcome:
    """The step by a random plan on the case's mesh. `full`: through differentiated fx graphs, else eagerly. Raises Skipped."""
    with ExitStack() as stack:
        if case.blocks == "any":
            for user in (candidate, finish, build):
                stack.enter_context(patch.object(user, "find_blocks", functools.partial(any_blocks, case.plan)))
        if case.blocks == "fold":
            stack.enter_context(patch.object(candidate, "Chooser", _Folded))
            stack.enter_context(patch.object(candidate, "thin", _thin_alike))
        return _run(case, full)


class _Folded(Chooser):
    """Folds random prices too, which it may where choices are alike by name alone."""

    def __init__(self, space: Space, prices: Any, blocks: Any, roots: Any, fold: bool) -> None:
        super().__init__(space, prices, blocks, roots, fold=True)


def _thin_alike(space: Space, seed: int) -> None:
    """Random strategies, the same for ops whose choices are the same, or blocks would never be alike."""
    for name, domain in space.domains.items():
        whole = [p for p in domain if all(t.kind in "IR" for s in p for t in (*s.ins, *s.outs))]
        mixed = sorted(domain, key=lambda p: zlib.crc32(f"{seed} {p}".encode()))
        space.domains[name] = list(dict.fromkeys([*whole[:4], *mixed]))[:14]


def _run(case: Case, full: bool) -> Outcome:
    axes = dict(zip(case.shape.names, case.shape.sizes, strict=True))
    try:
        plan = random_plan(case.graph, axes, case.microbatches, case.plan)
    except (NoPlanError, TooWide) as error:
        raise Skipped(str(error)) from error
    weights = {v.path: case.tensor(v.name) for v in case.graph.sources("param", "buffer")}
    batch = {v.name: case.tensor(v.name) for v in case.graph.sources("input")}
    if full:
        return _outcome(InProcess(lower.compile(case.captured, plan, dropout=case.dropout), weights), case, batch)
    with eager():
        return _outcome(EagerInProcess(lower.compile(case.captured, plan, dropout=case.dropout), weights), case, batch)


def _outcome(player: InProcess, case: Case, batch: Mapping[str, Tensor]) -> Outcome:
    player.manual_seed(case.data)
    torch.manual_seed(case.data)
    loss = player.train_step(**batch)
    grads, state = player.gradients(), player.state_dict()
    graph = case.graph
    whole = {v.path: grads.get(v.path, torch.zeros(v.tensor.shape, dtype=torch.float64)) for v in graph.sources("param") if v.grad}
    _check_replicas(player)
    return Outcome(loss, whole, {v.path: state[v.path] for v in graph.sources("buffer")})


def _check_replicas(player: InProcess) -> None:
    """Ranks that store the same shard must hold the same gradient of it: only one of them is looked at otherwise."""
    for path in player.holders["params"]:
        first: dict[tuple[int, ...], Tensor] = {}
        for state in player.states:
            param = state.params.get(path)
            if param is not None and param.grad is not None:
                slot = player.program.ranks[state.rank].params[path]
                key = tuple(c for t, c in zip(slot.layout, slot.coords, strict=True) if t.kind == "S")
                other = first.setdefault(key, param.grad)
                scale = max(float(other.abs().max()) if other.numel() else 0.0, 1e-9)
                difference = float((other - param.grad).abs().max()) / scale if other.numel() else 0.0
                assert difference < 1e-6, f"replicas of {path} have different gradients, by {difference:.1e}"


def trial(case: Case, full: bool = False, expected: Outcome | None = None) -> Failure | None:
    """How the case differs from one device, or None. Raises Skipped."""
    expected = expected or reference(case)
    try:
        found = sharded(case, full)
    except Skipped:
        raise
    except AssertionError as error:
        return Failure("gradient" if "replicas" in str(error) else "crash", f"{error!r} {_place(error)}")
    except Exception as error:
        return Failure("crash", f"{type(error).__name__}: {str(error)[:300]} {_place(error)}")
    return compare(found, expected)


def _place(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "autoshard" in f.filename]
    return f"at {frames[-1].filename.rsplit('autoshard/', 1)[-1]}:{frames[-1].lineno}" if frames else ""


def compare(found: Outcome, expected: Outcome) -> Failure | None:
    if wrong := _differs(found.loss, expected.loss, FLOOR):
        return Failure("loss", f"{found.loss.item():.12g}, expected {expected.loss.item():.12g} ({wrong})")
    largest = max((float(g.abs().max()) for g in expected.grads.values() if g.numel()), default=0.0)
    for path, grad in expected.grads.items():
        if wrong := _differs(found.grads[path], grad, SMALL * largest + FLOOR):
            return Failure("gradient", f"of {path}: {wrong}")
    for path, buffer in expected.buffers.items():
        if wrong := _differs(found.buffers[path], buffer, FLOOR):
            return Failure("buffer", f"{path}: {wrong}")
    return None


def _differs(found: Tensor, expected: Tensor, floor: float) -> str:
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return ""
    scale = max(float(expected.abs().max()), floor)
    worst = float((found - expected).abs().max()) / scale
    return "" if worst <= TOLERANCE else f"off by {worst:.2e} of its largest element"


def check(text: str, mesh: str, full: bool = False, **options: Any) -> None:
    """Run a printed case; AssertionError with the difference if there is one."""
    failure = trial(Case.parse(text, mesh, **options), full)
    assert failure is None, str(failure)
