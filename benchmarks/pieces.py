"""A matmul and the all-reduce of its result: one after the other, and in pieces beside each other.

    torchrun --nproc-per-node 2 -m benchmarks.pieces                         # an 8B layer's two on two GPUs
    torchrun --nproc-per-node 2 -m benchmarks.pieces --rows 256 --out 64 --inner 32 --device cpu

Prints, by the slowest rank, milliseconds of the matmul alone, of the all-reduce alone, of both in turn, and in 2, 4 and 8 pieces.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from autoshard.kernels.matmul_all_reduce import matmul_all_reduce


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--inner", type=int, nargs="*", default=[7168, 2048])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    device = torch.device(a.device, int(os.environ["LOCAL_RANK"])) if a.device == "cuda" else torch.device(a.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    for inner in a.inner:
        x = torch.randn(a.rows, inner, device=device, dtype=torch.bfloat16)
        w = torch.randn(a.out, inner, device=device, dtype=torch.bfloat16).t()
        y = torch.zeros_like(x @ w)  # summed again and again

        def turns(x: torch.Tensor = x, w: torch.Tensor = w) -> None:
            dist.all_reduce(x @ w)

        ways: dict[str, Callable[[], object]] = {
            "matmul": lambda x=x, w=w: x @ w,  # type: ignore[misc]
            "all-reduce": lambda y=y: dist.all_reduce(y),  # type: ignore[misc]
            "in turn": turns,
        }
        for count in (2, 4, 8):
            ways[f"{count} pieces"] = lambda x=x, w=w, n=count: matmul_all_reduce(x, w, n, group.group_name)  # type: ignore[misc]
        found = {name: measured(way, a.steps, device) for name, way in ways.items()}
        if dist.get_rank() == 0:
            print(f"{a.rows} × {inner} × {a.out}:", ", ".join(f"{name} {ms:.3f}" for name, ms in found.items()), flush=True)
    dist.destroy_process_group()


def measured(way: Callable[[], object], steps: int, device: torch.device) -> float:
    """The median, in milliseconds, of the slowest rank."""
    times = []
    for step in range(steps + 3):
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):  # so that a launch's time on the host is hidden
            way()
        _wait(device)
        if step >= 3:
            times.append((time.perf_counter() - start) * 100)
    slowest = torch.tensor([statistics.median(times)], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
