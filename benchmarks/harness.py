"""What every benchmark needs: synchronised timing, peak memory, what was compiled, and a record of it all.

In: callables that run a step. Out: numbers, and a JSON file that says on which machine and with which versions they came about.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch

K = TypeVar("K")
RESULTS = Path(__file__).parent / "results"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(steps: Mapping[K, Callable[[], Any]], rounds: int, device: torch.device, warm: int = 2) -> dict[K, list[float]]:
    """Seconds of each call; every round times each of them once, so that a drift of the machine meets all alike."""
    found: dict[K, list[float]] = {name: [] for name in steps}
    for i in range(warm + rounds):
        for name, step in steps.items():
            seconds = timed(step, device)
            if i >= warm:
                found[name].append(seconds)
    return found


def kernel(work: Callable[[], Any], device: torch.device, budget: float = 0.15) -> float:
    """Median seconds that a call keeps the device busy, with nothing of the last one in its cache. `budget`: seconds to spend."""
    first = timed(work, device)
    if device.type != "cuda":
        return median([first, timed(work, device), timed(work, device)])
    rounds = max(8, min(200, int(budget / max(timed(work, device), 1e-6))))
    flushed = torch.empty(1 << 28, dtype=torch.int8, device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        flushed.zero_()
        start.record()
        work()
        end.record()
    synchronize(device)
    return median([start.elapsed_time(end) / 1e3 for start, end in marks])


def median(seconds: list[float]) -> float:
    return statistics.median(seconds) if seconds else float("nan")


def collect() -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Memory:
    """Device bytes beyond those that were held when it was made. On the CPU nothing is counted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = 0
        collect()
        if device.type == "cuda":
            self.base = torch.cuda.memory_allocated(device)
            self.restart()

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.base if self.device.type == "cuda" else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.base if self.device.type == "cuda" else 0

    def free(self) -> int:
        """What could be allocated, the caching allocator's own included."""
        if self.device.type != "cuda":
            return 1 << 62
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached


def compiled() -> dict[str, Any]:
    """Dynamo's and Inductor's counters since `forget_counters`, as far as they say what ran uncompiled."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "graph_breaks": {str(reason).splitlines()[0][:120]: count for reason, count in counters["graph_break"].items()},
        "frames_total": counters["frames"].get("total", 0),
        "frames_ok": counters["frames"].get("ok", 0),
        "unimplemented": {str(reason).splitlines()[0][:120]: count for reason, count in counters["unimplemented"].items()},
    }


def forget_counters() -> None:
    """Start counting anew. What is compiled stays."""
    from torch._dynamo.utils import counters

    counters.clear()


@contextmanager
def frames(codes: set[CodeType]) -> Iterator[dict[CodeType, int]]:
    """Counts how often Python itself runs any of these code objects. A function that Dynamo has compiled runs as another one."""
    ran: dict[CodeType, int] = dict.fromkeys(codes, 0)

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in ran:
            ran[frame.f_code] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield ran
    finally:
        sys.setprofile(before)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "triton", "transformers", "megatron-core", "transformer-engine"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["devices"] = torch.cuda.device_count()
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    else:
        found["device"], found["threads"] = platform.processor() or "cpu", torch.get_num_threads()
    found["commit"] = commit()
    found |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return found


SETTINGS = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables that change how fast things are."""


def commit() -> str:
    """Of this checkout; empty where there is no git."""
    root = Path(__file__).parents[1]
    # safe.directory: the checkout may be another user's
    asked = ["git", "-c", f"safe.directory={root}", "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def record(name: str, content: Mapping[str, Any], device: torch.device, folder: Path = RESULTS, path: Path | None = None) -> Path:
    """Write one JSON file; its name says what, where and when. `path`: an earlier one of this run, to be written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    where = machine(device)
    if path is None:
        kind = "".join(c if c.isalnum() else "-" for c in str(where["device"]).lower()).strip("-") if device.type == "cuda" else "cpu"
        path = folder / f"{name}-{kind}-{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(finite({"when": f"{now:%Y-%m-%dT%H:%M:%SZ}", "machine": where, **content}), indent=1) + "\n")
    return path


def finite(value: Any) -> Any:
    """What JSON can say: none for a number that isn't finite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
