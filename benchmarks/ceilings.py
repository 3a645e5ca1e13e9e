"""What this device can do at most, in the shapes of a work, and so how long a step of it takes at least.

    python -m benchmarks.ceilings --work llama-8b-layers

In: a work's `Parts`. Out: a `Floor`: seconds of its matmuls (forward and both gradients, projections of one input merged), of its
attentions by the fastest of torch's backends, and of the bytes that lie between them at the speed of a copy; one after another,
communication apart. All is measured here and now, as figures move from machine to machine. FP8 steps stand beside the same floor, of
half precision.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import harness
from .ranks import Ranks
from .tables import Table
from .works import WORKS, Attention, Matmul, Parts, find

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass
class Row:
    """One operation: seconds of its parts, all its calls in a step together, and what rate that is."""

    name: str
    seconds: dict[str, float]
    flops: float = 0.0
    detail: str = ""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Floor:
    rows: list[Row] = field(default_factory=list)
    copy: float = 0.0
    """Bytes a second, read and written."""

    @property
    def seconds(self) -> float:
        return sum(row.total for row in self.rows)

    def asdict(self) -> dict[str, Any]:
        rows = [{"name": r.name, "ms": {k: s * 1e3 for k, s in r.seconds.items()}, "flops": r.flops, "detail": r.detail} for r in self.rows]
        return {"ms": self.seconds * 1e3, "copy_bytes_per_s": self.copy, "rows": rows}

    def table(self, title: str) -> Table:
        table = Table(title, ["what", "ms a step", "TFLOP/s", "of these ms", "how"])
        for r in sorted(self.rows, key=lambda r: -r.total):
            parts = ", ".join(f"{k} {s * 1e3:.2f}" for k, s in r.seconds.items()) if len(r.seconds) > 1 else ""
            table.rows.append([r.name, r.total * 1e3, r.flops / r.total / 1e12 if r.flops and r.total else None, parts, r.detail])
        table.rows.append(["floor", self.seconds * 1e3, None, "", f"copies {self.copy / 1e12:.2f} TB/s"])
        return table


def measure(parts: Parts, device: torch.device, dtype: torch.dtype) -> Floor:
    rows = [matmul(m, device, dtype) for m in parts.matmuls]
    rows += [attention(a, device, dtype) for a in parts.attentions]
    rate = copies(device)
    rows += [Row(name, {name: size / rate}) for name, size in parts.bytes.items()]
    harness.collect()
    return Floor(rows, rate)


def matmul(m: Matmul, device: torch.device, dtype: torch.dtype) -> Row:
    x, w, grad = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((m.rows, m.inner), (m.columns, m.inner), (m.rows, m.columns))
    )
    calls: dict[str, Callable[[], Any]] = {"forward": lambda: F.linear(x, w), "input": lambda: grad @ w, "weight": lambda: grad.t() @ x}
    seconds = {name: harness.kernel(call, device) * m.times for name, call in calls.items()}
    return Row(m.name, seconds, m.flops, f"{m.rows} × {m.inner} → {m.columns}, {m.times:g} times")


def attention(a: Attention, device: torch.device, dtype: torch.dtype) -> Row:
    """The fastest backend forward and the fastest backward; they may differ."""
    best: dict[str, tuple[float, str]] = {}
    for backend in BACKENDS:
        try:
            found = _attention(a, backend, device, dtype)
        except RuntimeError:  # it doesn't take these shapes, or not here
            continue
        for part, seconds in found.items():
            best[part] = min(best.get(part, (math.inf, "")), (seconds, backend.name))
        if device.type == "cuda" and len(best) == 2 and backend == SDPBackend.FLASH_ATTENTION:
            break
    detail = ", ".join(dict.fromkeys(name.removesuffix("_ATTENTION").lower() for _, name in best.values()))
    shape = f"{a.batch} × {a.heads} ({a.kv}) heads × {a.seq} × {a.head_dim}{', causal' if a.causal else ''}"
    return Row("attention", {part: seconds * a.times for part, (seconds, _) in best.items()}, a.flops, f"{shape}: {detail}")


def _attention(a: Attention, backend: SDPBackend, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    def leaf(heads: int) -> torch.Tensor:
        return torch.randn(a.batch, heads, a.seq, a.head_dim, device=device, dtype=dtype, requires_grad=True)

    q, k, v = leaf(a.heads), leaf(a.kv), leaf(a.kv)
    with sdpa_kernel(backend):
        forward = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=a.causal, enable_gqa=a.kv != a.heads)
        out = forward()
        grad = torch.randn_like(out)
        backward = functools.partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
        return {"forward": harness.kernel(forward, device), "backward": harness.kernel(backward, device)}


def copies(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 1 << (30 if device.type == "cuda" else 22)
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / harness.kernel(lambda: a.copy_(b), device)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="llama-8b-layers", choices=WORKS, metavar="NAME", help=f"of {', '.join(WORKS)}")
    p.add_argument("--tiny", action="store_true", help="as small as it gets")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    ranks = Ranks.here(a.device)
    work = find(a.work, tiny=a.tiny)
    floor = measure(work.parts(), ranks.device, torch.bfloat16)
    floor.table(f"the floor of {work.name}, on one device").show(ranks.say)
    found = {"work": work.name, **floor.asdict()}
    if a.results:
        ranks.say(f"written to {harness.record(f'ceilings-{work.name}', found, ranks.device, Path(a.results))}")
    return found


if __name__ == "__main__":
    main()
