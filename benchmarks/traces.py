"""Where the time on a device goes, from a chrome trace of torch.profiler.

In: the trace's events. Out: a `Breakdown`: seconds by kind of kernel, communication hidden behind computation and not, idle time; they add
up to the span. A kernel counts for the time in which no computation that started before it still runs, so that what overlaps counts once.

>>> found = breakdown([Kernel("gemm", 0, 3), Kernel("ncclDevKernel_AllReduce", 2, 3), Kernel("triton_poi_fused", 6, 1)])
>>> {k: v for k, v in found.seconds.items() if v}
{'matmul': 3.0, 'pointwise': 1.0, 'communication, exposed': 2.0, 'idle': 1.0}
>>> found.hidden, found.span
(1.0, 7.0)
"""

from __future__ import annotations

import bisect
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_FUSED = r"triton_(?:poi|red|per|mix|for)_"
KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|multimem|symm_mem|c10d|gloo"),
    ("embedding and loss", rf"{_FUSED}\w*(?:embedding|nll|cross_entropy|log_softmax|logsumexp)"),
    ("pointwise", _FUSED),  # its name lists all that it was fused of
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated"),
    ("optimizer", r"multi_tensor_apply|fused_?adam|foreach|adamw|optimizer|^many_"),
    ("matmul", r"triton_tem|gemm|gemv|nvjet|cutlass|xmma|wgmma|cublas|split_?k|(?:^|:)(?:addmm|baddbmm|bmm|mm|linear|matmul)(?:$|_|\b)"),
    ("quantising", r"cast_transpose|quantiz|amax|fp8|scale_inv"),
    ("embedding and loss", r"embedding|nll|cross_?entropy|log_?softmax|logsumexp"),
    ("routing", r"permute|sort|topk|histogram|cumsum|scan|gather|scatter|index_(?:add|put|select)"),
    ("copies", r"memcpy|memset|copy|CatArrayBatched|transpose|contiguous|fill"),
    (
        "pointwise",
        r"norm|elementwise|vectorized|reduce|softmax|rope|rotary|silu|swiglu|gelu|gated|act|dropout|aten::|transformer_engine|triton|fused",
    ),
)
"""Kind → what a kernel's name has (any case); the first that matches. The rest is "other"."""
_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KINDS)
EXPOSED, IDLE, OTHER = "communication, exposed", "idle", "other"
ORDER = ("matmul", "attention", "pointwise", "embedding and loss", "routing", "quantising", "optimizer", "copies", OTHER, EXPOSED, IDLE)


class Kernel(NamedTuple):
    """Something that a device did: `start` and `seconds` in one clock."""

    name: str
    start: float
    seconds: float


@dataclass
class Breakdown:
    """`seconds`: kind → its part of the span. `hidden`: communication behind computation. `busiest`: (kernel, kind, seconds, calls)."""

    seconds: dict[str, float]
    hidden: float
    span: float
    busiest: list[tuple[str, str, float, int]]

    def per(self, steps: int) -> Breakdown:
        seconds = {kind: s / steps for kind, s in self.seconds.items()}
        return Breakdown(seconds, self.hidden / steps, self.span / steps, [(n, k, s / steps, c // steps) for n, k, s, c in self.busiest])


def kind_of(name: str) -> str:
    """
    >>> [kind_of(n) for n in ("nvjet_hsh_256x128", "void at::native::elementwise_kernel", "Memcpy DtoD", "aten::mm", "??")]
    ['matmul', 'pointwise', 'copies', 'matmul', 'other']
    >>> kind_of("triton_poi_fused__scaled_dot_product_flash_attention__to_copy_2"), kind_of("triton_red_fused_nll_loss_forward_1")
    ('pointwise', 'embedding and loss')
    >>> kind_of("many_adam"), kind_of("many_not_finite")
    ('optimizer', 'optimizer')
    """
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), OTHER)


def kernels(trace: Mapping[str, Any]) -> list[Kernel]:
    """What ran on the device; of a trace without a device, the operators, each without those that it calls."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    on_device = [e for e in events if str(e.get("cat", "")).lower() in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device:
        return sorted((Kernel(e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in on_device), key=lambda k: k.start)
    threads: dict[Any, list[Kernel]] = {}
    for e in events:
        if e.get("cat") == "cpu_op":
            threads.setdefault(e.get("tid"), []).append(Kernel(e["name"], e["ts"] / 1e6, e["dur"] / 1e6))
    return sorted((k for calls in threads.values() for k in _own(calls)), key=lambda k: k.start)


def _own(calls: Sequence[Kernel]) -> list[Kernel]:
    """The pieces of time in which a call of one thread is the innermost.

    >>> _own([Kernel("outer", 0, 5), Kernel("inner", 1, 2)])
    [Kernel(name='outer', start=0, seconds=1), Kernel(name='inner', start=1, seconds=2), Kernel(name='outer', start=3, seconds=2)]
    """
    found: list[Kernel] = []
    open_calls: list[Kernel] = []
    now = 0.0

    def until(end: float) -> None:
        nonlocal now
        while open_calls and now < end:
            call = open_calls[-1]
            stop = min(end, call.start + call.seconds)
            if stop > now:
                found.append(Kernel(call.name, now, stop - now))
                now = stop
            if stop < end:
                open_calls.pop()

    for call in sorted(calls, key=lambda k: (k.start, -k.seconds)):
        until(call.start)
        now = call.start
        open_calls.append(call)
    until(float("inf"))
    return found


def load(path: Path) -> list[Kernel]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return kernels(json.load(file))


def breakdown(ran: Sequence[Kernel]) -> Breakdown:
    """Every moment of the span counts once: for the computation that started first, else for communication, else as idle."""
    seconds = dict.fromkeys(ORDER, 0.0)
    if not ran:
        return Breakdown(seconds, 0.0, 0.0, [])
    end = -float("inf")
    computing: list[tuple[float, float]] = []
    totals: dict[str, tuple[float, int]] = {}
    for k in sorted(ran, key=lambda k: k.start):
        kind, (total, calls) = kind_of(k.name), totals.get(k.name, (0.0, 0))
        totals[k.name] = total + k.seconds, calls + 1
        if kind == "communication":
            continue
        new = k.start + k.seconds - max(k.start, end)
        if new > 0:
            seconds[kind] += new
            computing.append((max(k.start, end), k.start + k.seconds))
            end = k.start + k.seconds
    talking = _union((k.start, k.start + k.seconds) for k in ran if kind_of(k.name) == "communication")
    hidden = _common(talking, computing)
    seconds[EXPOSED] = sum(b - a for a, b in talking) - hidden
    span = max(k.start + k.seconds for k in ran) - min(k.start for k in ran)
    seconds[IDLE] = max(0.0, span - sum(seconds.values()))
    busiest = sorted(((n, kind_of(n), s, c) for n, (s, c) in totals.items()), key=lambda row: -row[2])
    return Breakdown({k: float(s) for k, s in seconds.items()}, float(hidden), float(span), busiest[:40])


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(b, found[-1][1]))
        else:
            found.append((a, b))
    return found


def _common(talking: Sequence[tuple[float, float]], computing: Sequence[tuple[float, float]]) -> float:
    """Both are sorted and don't overlap in themselves."""
    ends, total = [b for _, b in computing], 0.0
    for a, b in talking:
        i = bisect.bisect_right(ends, a)
        while i < len(computing) and computing[i][0] < b:
            total += min(b, computing[i][1]) - max(a, computing[i][0])
            i += 1
    return total
