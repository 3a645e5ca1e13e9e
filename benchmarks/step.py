"""One training step of a Llama shape: ours beside plain PyTorch, same weights, same data, one process.

    python -m benchmarks.step --layers 16 --hidden 2048 --ffn 8192 --heads 32 --kv 8 --vocab 128256 --seq 4096 --batch 2

A step is forward, backward, fused AdamW and zero_grad. Implementations: `ours` steps the model's own parameters, as plain PyTorch does;
`ours-masters` keeps float32 masters, autoshard's default; `plain-compile` and `plain-eager`. Each runs its first steps alone (losses, peak
memory, compile time); those that fit into memory together are then timed in turns. FLOPs are the model's, attention counted causally.
Exits with an error if the losses part, or if ours ran anything that wasn't compiled.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import harness
from .models import Shape, build

IMPLEMENTATIONS = ("ours", "ours-masters", "plain-compile", "plain-eager")


@dataclass
class Run:
    """One implementation, ready to step; and what was found of it."""

    name: str
    step: Callable[[Tensor], Tensor]
    ready: float = 0.0
    first: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    compiled: dict[str, Any] = field(default_factory=dict)
    sharded: Any = None

    def summary(self, shape: Shape, gpus: int) -> dict[str, Any]:
        median = harness.median(self.seconds)
        return {
            "ms": median * 1e3,
            "tflops_per_device": shape.flops / median / gpus / 1e12,
            "tokens_per_s_per_device": shape.batch * shape.seq / median / gpus,
            "peak_gib": self.peak / 2**30,
            "held_gib": self.held / 2**30,
            "ready_s": self.ready,
            "first_step_s": self.first,
            "losses": self.losses,
            "all_ms": [s * 1e3 for s in self.seconds],
            "compiled": self.compiled,
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    device = place(a.device)
    dtype = getattr(torch, a.dtype)
    shape = Shape(a.layers, a.hidden, a.ffn, a.heads, a.kv, a.vocab, a.seq, a.batch)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data = batches(shape, a.losses, device)
    say = print if rank == 0 else lambda *_, **__: None
    say(f"{a.model} {dtype} {asdict(shape)} on {harness.machine(device)}", flush=True)

    together: dict[str, Run] = {}
    runs: list[Run] = []
    for name in a.impl.split(","):
        run, memory = alone(name, a, shape, dtype, device, data)
        runs.append(run)
        say(f"{name}: ready {run.ready:.1f} s, first step {run.first:.1f} s, losses {[round(x, 4) for x in run.losses]}", flush=True)
        if memory.free() > 1.5 * run.peak:
            together[name] = run
        else:  # no room for a neighbour: time it now, and let it go
            run.seconds = harness.in_turns({name: functools.partial(run.step, data[0])}, a.steps, device)[name]
            release(run)
        del memory
    turns = harness.in_turns({n: functools.partial(r.step, data[0]) for n, r in together.items()}, a.steps, device)
    for name, seconds in turns.items():
        together[name].seconds = seconds
    found = report(a, shape, runs, world, say)
    if rank == 0 and a.results:
        say(f"written to {harness.record('step', found, device, Path(a.results))}")
    check(runs, dtype)
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Shape()
    for name in ("layers", "hidden", "ffn", "heads", "kv", "vocab", "seq", "batch"):
        p.add_argument(f"--{name}", type=int, default=getattr(default, name))
    p.add_argument("--model", choices=["plain", "hf"], default="plain")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--impl", default="ours,ours-masters,plain-compile", help=f"of {', '.join(IMPLEMENTATIONS)}")
    p.add_argument("--mesh", default="dp=1", help="ours alone: plain PyTorch is one device")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=8, help="timed steps")
    p.add_argument("--losses", type=int, default=4, help="first steps, whose losses are compared")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    for name in a.impl.split(","):
        if name not in IMPLEMENTATIONS:
            p.error(f"--impl {name}: expected some of {', '.join(IMPLEMENTATIONS)}")
    return a


def place(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def batches(shape: Shape, count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, shape.vocab, (shape.batch, shape.seq), generator=generator).to(device) for _ in range(max(1, count))]


# ---- the implementations --------------------------------------------------------------------------------------------


def alone(
    name: str, a: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device, data: list[Tensor]
) -> tuple[Run, harness.Memory]:
    """Make it, run its first steps, and look at what ran compiled."""
    harness.forget_counters()
    memory = harness.Memory(device)
    start = time.perf_counter()
    made = ours if name.startswith("ours") else plain
    run = made(name, a, shape, dtype, device, data[0])
    run.ready = time.perf_counter() - start
    losses: list[Tensor] = []
    run.first = harness.timed(lambda: losses.append(run.step(data[0])), device)
    run.held = memory.held()
    memory.restart()
    losses += [run.step(ids) for ids in data[1:]]
    run.losses = [float(x) for x in losses]
    harness.synchronize(device)
    if name.startswith("ours"):
        run.compiled = {**harness.compiled(), **uncompiled(run, data[0])}
    elif name == "plain-compile":
        run.compiled = harness.compiled()
    run.peak = memory.peak()
    return run, memory


def adamw(device: torch.device) -> dict[str, Any]:
    return {"lr": 1e-5, "fused": True} if device.type == "cuda" else {"lr": 1e-5}


def plain(name: str, a: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device, _: Tensor) -> Run:
    model = build(a.model, shape, dtype, device)
    call = torch.compile(model, dynamic=False) if name == "plain-compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), **adamw(device))

    def step(ids: Tensor) -> Tensor:
        out = call(input_ids=ids, labels=ids)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Run(name, step)


def ours(name: str, a: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device, ids: Tensor) -> Run:
    import autoshard

    model = build(a.model, shape, dtype, device)
    sharded = autoshard.parallelize(model, a.mesh, kwargs={"input_ids": ids, "labels": ids}, compile=True, device=device)
    model.to("meta")  # the shards are copies, and the whole weights aren't needed again
    optimizer = sharded.optimizer(torch.optim.AdamW, masters=name == "ours-masters", **adamw(device))

    def step(ids: Tensor) -> Tensor:
        loss = sharded.train_step(input_ids=ids, labels=ids)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Run(name, step, sharded=sharded)


# ---- what is said of them -------------------------------------------------------------------------------------------


def uncompiled(run: Run, ids: Tensor) -> dict[str, Any]:
    """What of ours has ops and ran as plain Python in one more step: nothing, if all is well."""
    from torch import fx

    bound: dict[fx.GraphModule, Any] = run.sharded.bound
    inner = {graph: getattr(call, "_torchdynamo_orig_callable", call) for graph, call in bound.items()}
    with_ops = {graph: fn for graph, fn in inner.items() if any(n.op.startswith("call") for n in graph.graph.nodes)}
    codes = {graph: getattr(fn, "__func__", fn).__code__ for graph, fn in with_ops.items()}
    with harness.frames(set(codes.values())) as ran:
        run.step(ids)
    return {
        "bound": len(bound),
        "with_ops": len(with_ops),
        "never_compiled": sum(1 for graph, fn in with_ops.items() if bound[graph] is fn),
        "ran_uncompiled": sum(1 for code in codes.values() if ran[code]),
    }


def release(run: Run) -> None:
    run.step, run.sharded = (lambda ids: ids), None
    harness.collect()


def report(a: argparse.Namespace, shape: Shape, runs: list[Run], gpus: int, say: Callable[..., Any]) -> dict[str, Any]:
    found = {run.name: run.summary(shape, gpus if run.name.startswith("ours") else 1) for run in runs}
    say(f"{'':14}{'ms':>9}{'TFLOP/s':>9}{'peak GiB':>10}{'held':>7}{'ready s':>9}{'first s':>9}")
    for name, r in found.items():
        say(
            f"{name:14}{r['ms']:9.1f}{r['tflops_per_device']:9.1f}{r['peak_gib']:10.2f}{r['held_gib']:7.2f}"
            f"{r['ready_s']:9.1f}{r['first_step_s']:9.1f}"
        )
    ratios = {
        f"{mine} / {theirs}": found[mine]["ms"] / found[theirs]["ms"]
        for mine in found for theirs in found if mine.startswith("ours") and theirs.startswith("plain")
    }  # fmt: skip
    for pair, ratio in ratios.items():
        say(f"time {pair}: {ratio:.3f}")
    for run in runs:
        if run.compiled:
            say(f"{run.name}: {run.compiled}")
    asked = {"shape": asdict(shape), "model": a.model, "dtype": a.dtype, "mesh": a.mesh, "flops": shape.flops}
    return {**asked, "runs": found, "ratios": ratios}


def check(runs: list[Run], dtype: torch.dtype) -> None:
    """Losses in step with each other; everything of ours compiled."""
    for run in runs:
        for i, (mine, first) in enumerate(zip(run.losses, runs[0].losses, strict=True)):
            # bf16 keeps 8 bits of an activation, and float32 sums in another order differ by 1e-5
            allowed = max(0.02, 0.01 * abs(first)) if dtype == torch.bfloat16 else 1e-3 * abs(first)
            assert abs(mine - first) <= allowed, f"step {i}: {run.name} has the loss {mine}, {runs[0].name} {first}"
        if run.sharded is not None or "ran_uncompiled" in run.compiled:
            c = run.compiled
            assert not c["graph_breaks"] and not c["ran_uncompiled"] and not c["never_compiled"], f"{run.name} ran uncompiled graphs: {c}"
            assert c["graphs"] >= c["with_ops"], f"{run.name}: {c['with_ops']} graphs have ops, but {c['graphs']} were compiled"


if __name__ == "__main__":
    main()
