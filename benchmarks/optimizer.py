"""The optimizer's step on the parameters of a model, and what belongs to it: the gradients' check, their norm, clipping. Ours and torch's.

    python -m benchmarks.optimizer                                              # six layers of an 8B Llama in bf16, each tensor its own
    python -m benchmarks.optimizer --layers 32 --only step,masters --vocab 128256
    python -m benchmarks.optimizer --only step --tune many.BLOCK=512,1024,2048 --tune many.WARPS=4,8 --tune many.CHUNK=16384,65536
    python -m benchmarks.optimizer --only masters --tune many.MASTER_BLOCK=512,1024,2048 --tune many.WARPS=4,8
    python -m benchmarks.optimizer --only check,norm,within,clipped --tune many.READ_BLOCK=1024,2048,4096,8192 --tune many.WARPS=4,8

device: milliseconds between two events around a call, nothing of it in the cache before. host: until the call returns, with an idle
device: what Python costs. `of copy`: the time that its bytes take at the speed of a copy in the same run, over its time. `waits`: whether
the host waits for the device (torch's own debug mode says so).

    check     whether all gradients are finite (torch: the largest element, by foreach)
    norm      the gradients' norm
    clipped   norm and scaling, where the norm is larger than allowed; within: where it isn't
    step      check and AdamW on the parameters as they are (torch: fused AdamW, no check)
    masters   check and AdamW on float32 masters (torch: what ours does without its kernels)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoshard.runtime.fused import Gradients, not_finite
from autoshard.runtime.optimizer import ShardedOptimizer

from . import harness, kernels

Call = Callable[[], Any]
CASES = ("check", "norm", "clipped", "within", "step", "masters")


def shapes(a: argparse.Namespace) -> list[tuple[int, ...]]:
    """Of a Llama: norms, attention, gated MLP; embedding and head."""
    e, h = a.hidden, a.head_dim
    layer = [(e,), (a.heads * h, e), (a.kv * h, e), (a.kv * h, e), (e, a.heads * h), (e,), (a.ffn, e), (a.ffn, e), (e, a.ffn)]
    return [*layer * a.layers, (a.vocab, e), (e,), (a.vocab, e)]


def parameters(a: argparse.Namespace, device: torch.device) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(s, device=device, dtype=getattr(torch, a.dtype)) * 0.02) for s in shapes(a)]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def cases(a: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, float, dict[str, Call]]]:
    """Name, bytes, implementations. Each makes what it needs, and it goes with the next."""
    wanted = [name for name in CASES if not a.only or name in a.only.split(",")]
    size = getattr(torch, a.dtype).itemsize
    n = float(sum(torch.Size(s).numel() for s in shapes(a)))
    options = {"lr": 1e-5, "weight_decay": 0.1}
    for name in wanted:
        params = parameters(a, device)
        grads = [p.grad for p in params if p.grad is not None]
        named = [(str(i), p) for i, p in enumerate(params)]
        if name in ("step", "masters"):
            moved = n * (7 * size if name == "step" else 2 * size + 6 * 4)
            ours = ShardedOptimizer(torch.optim.AdamW, named, masters=name == "masters", **options)
            calls: dict[str, Call] = {"ours": ours.step}
            yield name, moved, calls
            calls.clear()
            del ours
            harness.collect()
            if name == "step":
                calls["torch"] = torch.optim.AdamW(params, fused=device.type == "cuda", **options).step
            else:
                theirs = ShardedOptimizer(torch.optim.AdamW, named, **options)
                theirs.kernel = None
                calls["torch"] = theirs.step
                del theirs
            yield name, moved, calls
            calls.clear()
        else:
            yield name, n * size * (3 if name == "clipped" else 1), gradients(name, params, grads, named)
        del params, grads, named
        harness.collect()


def gradients(name: str, params: list[nn.Parameter], grads: list[Tensor], named: list[tuple[str, nn.Parameter]]) -> dict[str, Call]:
    read, device = Gradients(), grads[0].device
    optimizer = ShardedOptimizer(torch.optim.AdamW, named, masters=False)
    given = [(True, grad) for grad in grads]
    limit = 1e30 if name == "within" else 1.0 - 1e-6

    def check() -> None:
        launches = None if optimizer.kernel is None else optimizer.kernel.launches()
        assert launches is not None, "the kernels don't run here: is Triton installed?"
        not_finite(launches, torch.zeros((), device=device))

    def norm() -> tuple[Any, Tensor]:
        launches = read.launches(given)
        assert launches is not None
        return launches, read.squares(launches) ** 0.5

    def clip() -> None:
        launches, total = norm()
        read.scale_(launches, torch.clamp(limit / (total * 0 + 1), max=1.0))  # always the same: gradients aren't made anew

    def torchs() -> None:
        total = torch.nn.utils.get_total_norm(grads, 2.0, foreach=True)
        torch.ops.aten._foreach_mul_.Tensor(grads, torch.clamp(limit / (total * 0 + 1), max=1.0))

    return {
        "check": {"ours": check, "torch": lambda: torch.isfinite(torch.nn.utils.get_total_norm(grads, float("inf"), foreach=True))},
        "norm": {"ours": norm, "torch": lambda: torch.nn.utils.get_total_norm(grads, 2.0, foreach=True)},
    }.get(name, {"ours": clip, "torch": torchs})


def measure(call: Call, device: torch.device, moved: float, rate: float, rounds: int) -> dict[str, Any]:
    for _ in range(min(3, rounds)):
        call()
    seconds = harness.kernel(call, device)
    hosts = []
    for _ in range(rounds):
        harness.synchronize(device)
        start = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - start)
    return {"ms": seconds * 1e3, "host_ms": harness.median(hosts) * 1e3, "of_copy": moved / rate / seconds, "waits": waits(call, device)}


def waits(call: Call, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    harness.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    device = torch.device(a.device)
    rate = kernels.ceilings(device, torch.bfloat16, 10, device.type == "cpu")[0]
    count = sum(torch.Size(s).numel() for s in shapes(a))
    print(f"{len(shapes(a))} tensors, {count / 1e9:.3f} billion parameters, {a.dtype}, on {harness.machine(device)}")
    print(f"copy {rate / 1e9:.0f} GB/s\n{'':10}{'':8}{'device ms':>10}{'host ms':>9}{'of copy':>9}  waits", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name, moved, calls in cases(a, device):
        for who, call in calls.items():
            r = found.setdefault(name, {})[who] = measure(call, device, moved, rate, a.rounds)
            print(f"{name:10}{who:8}{r['ms']:10.3f}{r['host_ms']:9.3f}{r['of_copy']:9.2f}  {'yes' if r['waits'] else 'no'}", flush=True)
            if who == "ours" and a.tune:
                r["tuned"] = tuned(call, a, device)
    content = {"arguments": {**vars(a), "tune": [str(t) for t in a.tune]}, "copy_bytes_per_s": rate, "cases": found}
    if a.results:
        print(f"written to {harness.record('optimizer', content, device, Path(a.results))}")
    return content


def tuned(call: Call, a: argparse.Namespace, device: torch.device) -> dict[str, float]:
    found = {}
    for label in kernels.settings(a.tune):
        with suppress(Exception):  # more than a device has
            call()
            found[label] = harness.kernel(call, device) * 1e3
    for label, ms in sorted(found.items(), key=lambda item: item[1])[:8]:
        print(f"{'':18}{ms:10.3f}  {label}", flush=True)
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "hidden": 4096, "ffn": 14336, "heads": 32, "kv": 8, "head_dim": 128, "vocab": 32000}
    for name, size in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    p.add_argument("--only", default="", help=f"some of {', '.join(CASES)}")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=10, help="calls of which the host's time is taken")
    p.add_argument("--tune", type=kernels.constant, action="append", default=[], metavar="MODULE.NAME=VALUES", help="try all combinations")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    if a.only and not set(a.only.split(",")) <= set(CASES):
        p.error(f"--only {a.only}: expected some of {', '.join(CASES)}")
    return a


if __name__ == "__main__":
    main()
