"""Tables and timelines for people, made from artifacts alone: plans, clusters, simulations.

In: an artifact. Out: a rich Table (print it on a rich console, or take its text from `render`), or plain text for a timeline.

>>> from autoshard.plan.schedules import build
>>> from autoshard.plan.simulate import simulate
>>> lists = build("1f1b", 2, 3, [(0, 1)])
>>> print(timeline(simulate(lists, {(s, k): t for s in (0, 1) for k, t in (("F", 1.0), ("B", 2.0))}), width=24))
rank 0 0011....aaaa22bbbb..cccc
rank 1 ..00aaaa11bbbb22cccc....
12 s, 25 % idle; a digit is a forward, a letter a backward of that microbatch (0 = a), . idle
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.table import Table

from .plan.cluster import Cluster
from .plan.costs.memory import StageMemory
from .plan.simulate import Simulation


@runtime_checkable
class PlanLike(Protocol):
    """What `plan_table` reads. Anything that is missing or empty shows as –."""

    mesh: Mapping[str, int]
    microbatches: int
    schedule: str
    cuts: Sequence[Any]
    predicted: Mapping[str, Any]


def render(table: RenderableType, width: int = 100) -> str:
    """A table's text, without colour."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


# ---- quantities ----------------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """
    >>> seconds_text(0.00123), seconds_text(2), seconds_text(0.0000452), seconds_text(0)
    ('1.23 ms', '2 s', '45.2 µs', '0 s')
    """
    if not seconds:
        return "0 s"
    units = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
    factor, unit = next((u for u in units if abs(seconds) * u[0] >= 0.9995), units[-1])
    return f"{_short(seconds * factor)} {unit}"


def bytes_text(size: float) -> str:
    """
    >>> bytes_text(5), bytes_text(2048), bytes_text(79.2 * 2**30)
    ('5 B', '2 KiB', '79.2 GiB')
    """
    power = 0
    while abs(size) >= 1023.5 and power < 5:
        size, power = size / 1024, power + 1
    return f"{_short(size)} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


# ---- timelines -----------------------------------------------------------------------------------------------------

_ENDS = {"P": "P", "D": "D", "G": "G", "L": "L", "U": "U"}


def timeline(simulation: Simulation, width: int = 100, rows: int = 64) -> str:
    """One line per rank, one column per slice of the step: what the rank computes in the middle of the slice."""
    step = simulation.step_seconds
    count = len(simulation.lists)
    if not step:
        return "nothing takes any time"
    lines = []
    digits = len(str(count - 1))
    for rank in range(min(count, rows)):
        cells = ["."] * width
        for action, start, end in zip(simulation.lists[rank], simulation.starts[rank], simulation.ends[rank], strict=True):
            mark = _mark(action.kind, action.mb)
            if mark and end > start:
                first, last = (round(t / step * width) for t in (start, end))
                cells[first:last] = mark * (last - first)
        lines.append(f"rank {rank:>{digits}} {''.join(cells)}")
    if count > rows:
        lines.append(f"… and {count - rows} more ranks")
    legend = "a digit is a forward, a letter a backward of that microbatch (0 = a), . idle"
    kinds = {action.kind for actions in simulation.lists for action in actions}
    if kinds & {"I", "W"}:
        legend += "; capitals: backward of the inputs, w: of the weights"
    return "\n".join([*lines, f"{seconds_text(step)}, {100 * simulation.bubble:.0f} % idle; {legend}"])


def _mark(kind: str, mb: int) -> str:
    if kind == "F":
        return str(mb % 10)
    if kind == "B":
        return chr(ord("a") + mb % 22)  # a to v: w is taken
    if kind == "I":
        return chr(ord("A") + mb % 26)
    return "w" if kind == "W" else _ENDS.get(kind, "")


# ---- tables --------------------------------------------------------------------------------------------------------


def plan_table(plan: PlanLike) -> Table:
    """What a plan decided and what it is predicted to cost."""
    predicted = getattr(plan, "predicted", None) or {}
    table = Table(title="plan", show_header=False, title_justify="left")
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value")
    mesh = getattr(plan, "mesh", None) or {}
    items = mesh.items() if isinstance(mesh, Mapping) else ()
    table.add_row("mesh", " ".join(f"{axis}={size}" for axis, size in items) or (str(mesh) if mesh else "–"))
    table.add_row("microbatches", str(getattr(plan, "microbatches", None) or "–"))
    table.add_row("schedule", str(getattr(plan, "schedule", None) or "–"))
    cuts = getattr(plan, "cuts", None)
    table.add_row("cuts", ", ".join(map(str, cuts)) if cuts else "–")
    if isinstance(predicted.get("step_seconds"), (int, float)):
        table.add_row("step", seconds_text(predicted["step_seconds"]))
    for label, value in _memory_rows(predicted.get("memory_bytes")):
        table.add_row(label, value)
    breakdown = predicted.get("breakdown")
    if isinstance(breakdown, Mapping) and breakdown:
        table.add_section()
        for label, value in _flat(breakdown):
            table.add_row(label, value)
    return table


def _memory_rows(memory: Any) -> list[tuple[str, str]]:
    """`memory_bytes` is one number, one per stage, or a table by stage."""
    if isinstance(memory, (int, float)):
        return [("memory", bytes_text(memory))]
    if isinstance(memory, Mapping):
        return [(f"memory, {stage}", bytes_text(size)) for stage, size in memory.items()]
    if isinstance(memory, Sequence) and not isinstance(memory, str):
        return [(f"memory, stage {stage}", bytes_text(size)) for stage, size in enumerate(memory)]
    return []


def _flat(breakdown: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables as dotted labels. Names that end in `bytes` hold bytes; other numbers are seconds."""
    rows: list[tuple[str, str]] = []
    for key, value in breakdown.items():
        label = f"{prefix}{key}".removesuffix("_seconds").removesuffix("_fraction").replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{label}.")
        elif isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
            rows += [(f"{label}, stage {i}", text) for i, v in enumerate(value) for _, text in _flat({key: v}, prefix)]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            rows.append((label, str(value)))
        elif key.endswith("fraction"):
            rows.append((label, f"{100 * value:.1f} %"))
        else:
            rows.append((label, bytes_text(value) if key.endswith("bytes") or prefix.endswith("bytes.") else seconds_text(value)))
    return rows


def memory_table(stages: Sequence[StageMemory], capacity: float | None = None) -> Table:
    """Peak memory by stage and by what holds it; with `capacity` (bytes), whether it fits."""
    table = Table(title="memory per device", title_justify="left")
    parts = list(StageMemory().breakdown())
    for column in ("stage", *parts, "total", *(["of device"] if capacity else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for number, stage in enumerate(stages):
        cells = [str(number), *(bytes_text(stage.breakdown()[part]) for part in parts), bytes_text(stage.total)]
        if capacity:
            share = f"{100 * stage.total / capacity:.0f} %"
            cells.append(share if stage.total <= capacity else f"{share}, too large")
        table.add_row(*cells)
    return table


def cluster_table(cluster: Cluster) -> Table:
    """Devices and network levels."""
    table = Table(title=f"cluster {cluster.name}: {cluster.ranks} ranks", title_justify="left")
    for column in ("part", "ranks", "capacity", "bandwidth", "latency"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for device, count in cluster.devices:
        table.add_row(
            device.name, str(count), bytes_text(device.memory), f"{_short(device.memory_bandwidth / 1e9)} GB/s", seconds_text(device.launch)
        )
    table.add_section()
    for level in cluster.levels:
        table.add_row(level.name, str(level.ranks), "–", f"{_short(level.bandwidth / 1e9)} GB/s", seconds_text(level.latency))
    return table
