"""Plain PyTorch: the model as it is, eager or through torch.compile; replicated by DDP or sharded by FSDP2 on several devices."""

from __future__ import annotations

import dataclasses

import torch

from ..models import build
from ..works import Batch
from . import Absent, Made, Task, adamw, blocks, compiled, parts, stepper


def compile(task: Task) -> Made:
    return _alone(task, compiling=True)


def eager(task: Task) -> Made:
    return _alone(task, compiling=False)


def half(task: Task) -> Made:
    """A model with half the layers, whole on every device: what one of two stages does."""
    return _alone(dataclasses.replace(task, work=task.work.half()), compiling=True)


def _alone(task: Task, compiling: bool) -> Made:
    """The whole work, on each rank for itself."""
    count = task.work.count
    model = build(task.model, task.work.shape, task.dtype, task.device)
    call = compiled(model, task) if compiling else model
    optimizer = torch.optim.AdamW(model.parameters(), **adamw(task.device))
    return Made(stepper(call, optimizer, count), task.work, prepare=lambda batch: parts(batch, count))


def _divided(task: Task) -> None:
    if task.ranks.size == 1:
        raise Absent("needs several devices")
    if task.work.shape.batch % task.ranks.size:
        raise Absent(f"a batch of {task.work.shape.batch} doesn't divide by {task.ranks.size}")


def _rows(task: Task, batch: Batch) -> list[Batch]:
    return parts(batch, task.ranks.size, task.ranks.rank)


def ddp(task: Task) -> Made:
    from torch.nn.parallel import DistributedDataParallel

    _divided(task)
    model = build(task.model, task.work.shape, task.dtype, task.device)
    ids = [task.device.index] if task.device.type == "cuda" else None
    call = compiled(DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False), task)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw(task.device))
    return Made(stepper(call, optimizer), task.work, task.ranks.size, lambda batch: _rows(task, batch), shared=True)


def fsdp2(task: Task) -> Made:
    """Every layer sharded for itself and compiled, the rest in one more group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _divided(task)
    model = build(task.model, task.work.shape, task.dtype, task.device)
    mesh = init_device_mesh(task.device.type, (task.ranks.size,))
    for layer in blocks(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if task.options.get("compile", True):
        for layer in blocks(model):
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw(task.device))
    return Made(stepper(model, optimizer), task.work, task.ranks.size, lambda batch: _rows(task, batch), shared=True)
