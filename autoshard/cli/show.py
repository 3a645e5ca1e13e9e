"""A plan as a person reads it, and as JSON: stages, blocks, parameters, costs, and what lost and why.

In: a graph, a plan of it, the cluster. Out: rich tables (`print_all`) or plain data (`View.data`). What is alike is one line: blocks of
one kind with the same strategies, parameters whose names differ in numbers alone. Nothing here imports torch.

>>> pattern("model.layers.17.mlp.up")
'model.layers.*.mlp.up'
>>> spans([0, 1, 2, 5, 7, 9])
'0–2, 5, 7, 9'
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..layout import local_shape
from ..plan.cluster import Cluster
from ..plan.merge import weights
from ..plan.microbatch import split_time
from ..plan.plan import Plan
from ..report import bytes_text, seconds_text
from ..trace.blocks import find_blocks, is_heavy
from ..trace.graph import ITEMSIZE, Graph

MAX_RUNNERS = 8
LEGEND = "dp, tp: S(d) is cut along dim d, P a sum still to be added up, R and I are whole on each rank; operands -> results"


def pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers, runs of three and more as first–last."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    texts = [f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return ", ".join(texts)


@dataclass
class BlockLine:
    """A block, or several that are alike: per heavy op what it is, and its strategy on each axis."""

    numbers: list[int]
    module: str
    ops: list[tuple[str, str, tuple[str, ...]]]
    stages: list[int] = field(default_factory=list)


@dataclass
class ParameterLine:
    """A parameter, or several that are alike. `bytes`: what a rank stores of all of them, wherever it has them."""

    path: str
    count: int
    tensor: str
    storage: tuple[str, ...]
    bytes: float


@dataclass
class View:
    """What is shown of a plan."""

    graph: Graph
    plan: Plan
    cluster: Cluster
    limit: float

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that strategies and layouts are given for."""
        return tuple(name for name in self.plan.mesh.names if name != "pp")

    @cached_property
    def blocks(self) -> list[BlockLine]:
        """Every block, in order."""
        split = split_time(self.graph, self.plan.microbatches)
        ops = {op.name: op for op in split.graph.ops}
        found = []
        for number, block in enumerate(find_blocks(split.graph, split.once | split.data)):
            heavy = [ops[name] for name in block.ops if is_heavy(ops[name])] or [ops[name] for name in block.ops][:1]
            lines = []
            for op in heavy:
                what = f"{op.target.split('.')[1]} {op.module.rpartition('.')[2]}".strip()
                lines.append((what, op.module, tuple(map(str, self.plan.ops[op.name]))))
            stage = sum(cut <= number for cut in self.plan.cuts) - 1
            found.append(BlockLine([number], _common([op.module for op in heavy]), lines, [stage]))
        return found

    def folded_blocks(self) -> list[BlockLine]:
        """Blocks alike as one line, where the first of them stands."""
        found: dict[Any, BlockLine] = {}
        for block in self.blocks:
            key = (pattern(block.module), tuple((what, pattern(module), strategy) for what, module, strategy in block.ops))
            line = found.setdefault(key, BlockLine([], pattern(block.module) if key in found else block.module, block.ops))
            line.numbers += block.numbers
            line.stages = sorted({*line.stages, *block.stages})
            line.module = pattern(block.module) if len(line.numbers) > 1 else block.module
        return list(found.values())

    @cached_property
    def parameters(self) -> list[ParameterLine]:
        """Every parameter, in order."""
        sizes = tuple(self.plan.mesh.size(axis) for axis in self.axes)
        found = []
        for v in self.graph.sources("param"):
            layout = self.plan.storage.get(v.name)
            if layout is None:
                continue  # nothing of the step reads it
            local = 1.0
            for n in local_shape(v.tensor.shape, layout, sizes, (0,) * len(sizes)):
                local *= n
            found.append(ParameterLine(v.path, 1, str(v.tensor), tuple(map(str, layout)), local * ITEMSIZE[v.tensor.dtype]))
        return found

    def folded_parameters(self) -> list[ParameterLine]:
        found: dict[Any, ParameterLine] = {}
        for p in self.parameters:
            line = found.setdefault((pattern(p.path), p.tensor, p.storage), ParameterLine(p.path, 0, p.tensor, p.storage, 0.0))
            line.count, line.bytes = line.count + 1, line.bytes + p.bytes
            line.path = pattern(p.path) if line.count > 1 else p.path
        return list(found.values())

    @cached_property
    def merged(self) -> dict[str, int]:
        """Weights that are one in a matmul → how often, those that are alike as one."""
        graph = split_time(self.graph, self.plan.microbatches).graph
        return dict(Counter(", ".join(map(pattern, group)) for group in weights(self.plan.merge, graph)))

    @cached_property
    def precision(self) -> dict[str, int]:
        """Recipe → how many linears."""
        return dict(Counter(self.plan.precision.values()))

    @property
    def memory(self) -> list[float]:
        found = self.plan.predicted.get("memory_bytes", [])
        return [float(m) for m in (found if isinstance(found, list) else [found])]

    def breakdown(self) -> list[tuple[str, Any]]:
        return list(dict(self.plan.predicted.get("breakdown", {})).items())

    def data(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        plan = self.plan
        return {
            "graph": plan.graph,
            "cluster": {"name": self.cluster.name, "ranks": self.cluster.ranks, "memory_bytes": self.limit},
            "mesh": dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
            "microbatches": plan.microbatches,
            "schedule": plan.schedule,
            "cuts": list(plan.cuts),
            "predicted": plan.predicted,
            "fits": all(m <= self.limit for m in self.memory),
            "precision": self.precision,
            "merged": [{"weights": names.split(", "), "count": count} for names, count in self.merged.items()],
            "buckets": list(plan.buckets),
            "bucket_bytes": plan.bucket_bytes,
            "overlap": plan.overlap,
            "notes": plan.notes,
            "runners_up": [{**r, "why": why_lost(plan, r)} for r in plan.runners_up],
            "blocks": [
                {"blocks": b.numbers, "stages": b.stages, "module": b.module,
                 "ops": [{"op": what, "strategies": dict(zip(self.axes, s, strict=False))} for what, _, s in b.ops]}
                for b in self.folded_blocks()
            ],
            "parameters": [
                {"path": p.path, "count": p.count, "tensor": p.tensor, "storage": dict(zip(self.axes, p.storage, strict=False)),
                 "bytes_a_rank": p.bytes}
                for p in self.folded_parameters()
            ],
        }  # fmt: skip


def why_lost(plan: Plan, runner: dict[str, Any]) -> str:
    """How a runner-up compares: time first, then memory."""
    best, mine = float(plan.predicted.get("step_seconds", 0.0)), runner.get("step_seconds")
    missing = runner.get("missing_bytes")
    if isinstance(missing, (int, float)) and missing > 0:
        return f"doesn't fit: {bytes_text(missing)} too much a rank"
    if not isinstance(mine, (int, float)) or not best:
        return str(runner.get("reason", ""))
    slower = mine - best
    if slower <= 0:
        return "as fast; the first found was taken"
    text = f"{seconds_text(slower)} slower (+{100 * slower / best:.1f} %)"
    memory, most = runner.get("memory_bytes"), plan.predicted.get("memory_bytes")
    if isinstance(memory, (int, float)) and isinstance(most, list) and most:
        more = memory - max(most)
        text += f", {bytes_text(abs(more))} {'more' if more > 0 else 'less'} memory" if abs(more) > 0.02 * max(most) else ""
    return text


# ---- tables ---------------------------------------------------------------------------------------------------------


def print_all(view: View, full: bool = False) -> None:
    """Every table, to stdout; wide enough to hold its lines where that isn't a terminal."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(tables(view, full))


def tables(view: View, full: bool = False) -> Group:
    shown: list[RenderableType] = [_summary(view), _stages(view), _blocks(view, full), _parameters(view, full)]
    if view.plan.runners_up:
        shown.append(_runners(view))
    shown += [Text(f"note: {note}") for note in view.plan.notes]
    shown.append(Text(LEGEND, style="dim"))
    return Group(*shown)


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _summary(view: View) -> RenderableType:
    plan = view.plan
    table = _table(f"plan for {view.cluster.name}", "what", "value")
    table.show_header = False
    table.add_row("mesh", " × ".join(f"{n}={s}" for n, s in zip(plan.mesh.names, plan.mesh.sizes, strict=True)))
    table.add_row("microbatches", f"{plan.microbatches}, schedule {plan.schedule}")
    table.add_row("step", seconds_text(plan.predicted["step_seconds"]) if "step_seconds" in plan.predicted else "–")
    for name, value in view.breakdown():  # parts of the step
        if not isinstance(value, (list, dict)):
            table.add_row(f"  {name.removesuffix('_seconds').removesuffix('_fraction').replace('_', ' ')}", _quantity(name, value))
    if view.memory:
        table.add_row("memory", f"{bytes_text(max(view.memory))} of {bytes_text(view.limit)} a rank")
    for names, count in view.merged.items():
        table.add_row("merged linears", names + (f" (×{count})" if count > 1 else ""))
    for recipe, count in view.precision.items():
        table.add_row("precision", f"{count} linear{'s' if count > 1 else ''} in {recipe}")
    if plan.mesh.size("dp") * plan.mesh.size("tp") > 1:
        size = f"up to {bytes_text(plan.bucket_bytes)} together" if plan.bucket_bytes else "each parameter alone"
        table.add_row("parameters travel", f"in {len(plan.buckets)} bucket{'s' if len(plan.buckets) > 1 else ''}, {size}")
        table.add_row("collectives", "beside matmuls" if plan.overlap else "waited for at once")
    return table


def _quantity(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if name.endswith("fraction"):
        return f"{100 * value:.1f} %"
    return bytes_text(value) if name.endswith("bytes") else seconds_text(value) if name.endswith("seconds") else f"{value:g}"


def _stages(view: View) -> RenderableType:
    plan = view.plan
    parts = [(name, value) for name, value in view.breakdown() if isinstance(value, list) and len(value) == plan.stages]
    names = [name.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ") for name, _ in parts]
    table = _table("stages", "stage", "ranks", "blocks", *names, "memory", "of a rank's", right=[*names, "memory", "of a rank's"])
    each = plan.mesh.ranks // max(plan.mesh.size("pp"), 1)
    ends = [*plan.cuts[1:], len(view.blocks)]
    for stage, (first, end) in enumerate(zip(plan.cuts, ends, strict=True)):
        memory = view.memory[stage] if stage < len(view.memory) else 0.0
        over = memory - view.limit
        share = f"{100 * memory / view.limit:.0f} %" + (f", {bytes_text(over)} too much" if over > 0 else "")
        cells = [_quantity(name, value[stage]) for name, value in parts]
        table.add_row(str(stage), f"{stage * each}–{(stage + 1) * each - 1}" if each > 1 else str(stage), spans(range(first, end)), *cells,
                      bytes_text(memory), share)  # fmt: skip
    return table


def _blocks(view: View, full: bool) -> RenderableType:
    table = _table("blocks", "blocks", "stage", "module", "op", *view.axes)
    for block in view.blocks if full else view.folded_blocks():
        count = f" (×{len(block.numbers)})" if len(block.numbers) > 1 else ""
        numbers = _short_spans(block.numbers) + count
        for i, (what, _, strategies) in enumerate(block.ops):
            head = (numbers, spans(block.stages), block.module) if i == 0 else ("", "", "")
            table.add_row(*head, what, *strategies)
    return table


def _short_spans(numbers: Sequence[int]) -> str:
    return spans(numbers) if len(numbers) <= 3 else f"{numbers[0]} … {numbers[-1]}"


def _parameters(view: View, full: bool) -> RenderableType:
    table = _table(
        "parameters, as stored between steps", "parameter", "×", "whole", *view.axes, "a rank holds", right=["×", "a rank holds"]
    )
    for p in view.parameters if full else view.folded_parameters():
        table.add_row(p.path, str(p.count), p.tensor, *p.storage, bytes_text(p.bytes))
    return table


def _runners(view: View) -> RenderableType:
    table = _table(
        "what else was looked at", "mesh", "microbatches", "step", "memory", "why it lost", right=["microbatches", "step", "memory"]
    )
    kinds = {fits: [r for r in view.plan.runners_up if r.get("fits", True) is fits] for fits in (True, None, False)}
    for r in [*kinds[True][:MAX_RUNNERS], *kinds[None][: MAX_RUNNERS // 2], *kinds[False][:MAX_RUNNERS]]:
        step, least, memory = r.get("step_seconds"), r.get("at_least_seconds"), r.get("memory_bytes")
        shown = seconds_text(step) if isinstance(step, (int, float)) else "–"
        shown = f"≥ {seconds_text(least)}" if isinstance(least, (int, float)) else shown
        held = bytes_text(memory) if isinstance(memory, (int, float)) else "–"
        table.add_row(str(r.get("mesh", "–")), str(r.get("microbatches", "–")), shown, held, why_lost(view.plan, r))
    return table


def _common(modules: Sequence[str]) -> str:
    """The module path that all share."""
    parts = [m.split(".") for m in modules]
    found = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        found.append(level[0])
    return ".".join(found)


@contextlib.contextmanager
def working(what: str, quiet: bool) -> Iterator[None]:
    """Say on stderr what takes a while, where a person looks."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
