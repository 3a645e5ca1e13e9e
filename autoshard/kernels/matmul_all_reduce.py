"""A matmul whose result is summed over a group, in pieces: while one piece of the rows is on the wire, the next is multiplied.

In: x [rows, k], w [k, n], a process group's name. Out: the group's sum of x @ w, [rows, n]. Pieces are runs of rows, written and reduced
where they lie, so nothing is copied; every piece is as plain as the whole. Runs on any backend that has an asynchronous all-reduce.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined,unused-ignore]


@torch.library.custom_op("autoshard::matmul_all_reduce", mutates_args=())
def matmul_all_reduce(x: Tensor, w: Tensor, count: int, group: str) -> Tensor:
    members = _resolve_process_group(group)  # type: ignore[arg-type,unused-ignore]
    out = x.new_empty(x.shape[0], w.shape[1])
    works = []
    for part, result in zip(x.tensor_split(count), out.tensor_split(count), strict=True):
        torch.mm(part, w, out=result)
        works.append(dist.all_reduce(result, group=members, async_op=True))
    for work in works:
        work.wait()
    return out


@matmul_all_reduce.register_fake
def _(x: Tensor, w: Tensor, count: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])
