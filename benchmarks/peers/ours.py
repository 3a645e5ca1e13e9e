"""autoshard: `ours` steps the model's own parameters, as the peers do; `ours-masters` keeps float32 masters, autoshard's default;
`ours-fp8` is `ours` with linears in fp8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import autoshard

from .. import harness
from ..models import build
from . import Made, Task, adamw


def own(task: Task) -> Made:
    return _make(task, masters=False)


def masters(task: Task) -> Made:
    return _make(task, masters=True)


def fp8(task: Task) -> Made:
    pins = {"precision": "fp8", **task.options.get("pins", {})}
    return _make(replace(task, options={**task.options, "pins": pins}), masters=False)


def _make(task: Task, masters: bool) -> Made:
    work = task.work
    model = build(task.model, work.shape, task.dtype, task.device)
    example = work.batch(0, task.device, task.dtype)
    options: dict[str, Any] = {"compile": True, "microbatches": work.microbatches, **task.options}
    sharded = autoshard.parallelize(model, options.pop("mesh", work.mesh), kwargs=example, device=task.device, **options)
    model.to("meta")  # the shards are copies, and the whole weights aren't needed again
    optimizer = sharded.optimizer(torch.optim.AdamW, masters=masters, **adamw(task.device))

    def step(batch: dict[str, Any]) -> Tensor:
        loss = sharded.train_step(**batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Made(step, work, task.ranks.size, sharded=sharded, precise="fp8" not in str(task.options))


def uncompiled(made: Made, batch: Any) -> dict[str, Any]:
    """What has ops and ran as plain Python in one more step: nothing, if all is well."""
    from torch import fx

    bound: dict[fx.GraphModule, Any] = made.sharded.bound
    inner = {graph: getattr(call, "_torchdynamo_orig_callable", call) for graph, call in bound.items()}
    with_ops = {graph: fn for graph, fn in inner.items() if any(n.op.startswith("call") for n in graph.graph.nodes)}
    codes = {graph: getattr(fn, "__func__", fn).__code__ for graph, fn in with_ops.items()}
    with harness.frames(set(codes.values())) as ran:
        made.step(batch)
    return {
        "bound": len(bound),
        "with_ops": len(with_ops),
        "never_compiled": sum(1 for graph, fn in with_ops.items() if bound[graph] is fn),
        "ran_uncompiled": sum(1 for code in codes.values() if ran[code]),
    }
