"""The Plan: everything that the program depends on, as one small document.

A Plan prints to YAML and reads back equal. It names ops and values of the graph of one microbatch (`microbatch.split_time`), so a
graph and a plan together decide the program; `check` refuses a plan that was made for another graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import PlanFileError, StalePlanError
from ..layout import Layout, Type
from ..mesh import Mesh
from ..trace.graph import Graph
from ..trace.ops.rule import Strategy
from . import schedules
from .strict_yaml import load_strict

VERSION = 1


def fingerprint(graph: Graph) -> str:
    """A hash of what a plan depends on: every op, shape and role of the graph."""
    lines = [f"{v.name} {v.tensor} {v.role} {v.path} {v.grad} {v.batch_dim}" for v in graph.values.values() if v.role != "value"]
    lines += [f"{op.outs} {op}" for op in graph.ops]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass
class Plan:
    """`cuts`: the first block of each stage. `ops`: op → one strategy per inner axis (dp, tp). `storage`: parameter value → where it
    is stored between steps. `inputs`: source value → layout. `instructions`: one list per stage. `predicted`: seconds and bytes.
    `notes`: what was decided for a reason that a user may want to know. `runners_up`: what else was looked at, and its step time."""

    graph: str
    mesh: Mesh
    microbatches: int
    schedule: str
    cuts: tuple[int, ...]
    ops: dict[str, tuple[Strategy, ...]]
    storage: dict[str, Layout]
    inputs: dict[str, Layout]
    instructions: schedules.Lists
    predicted: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    runners_up: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stages(self) -> int:
        return len(self.cuts)

    def check(self, graph: Graph) -> None:
        """Raises StalePlanError if the plan was made for another graph."""
        found = fingerprint(graph)
        if found != self.graph:
            raise StalePlanError(
                f"this plan was made for graph {self.graph}, but the model now captures as graph {found}",
                hint="the model, its dtypes or its input shapes have changed; search for a plan again",
            )

    def to_yaml(self) -> str:
        data = {
            "version": VERSION,
            "graph": self.graph,
            "mesh": str(self.mesh),
            "microbatches": self.microbatches,
            "schedule": self.schedule,
            "cuts": list(self.cuts),
            "predicted": self.predicted,
            "notes": self.notes,
            "runners_up": self.runners_up,
            "inputs": {k: _layout_text(v) for k, v in self.inputs.items()},
            "storage": {k: _layout_text(v) for k, v in self.storage.items()},
            "ops": {k: " ; ".join(map(str, v)) for k, v in self.ops.items()},
            "instructions": schedules.to_text(self.instructions).splitlines(),
        }
        return yaml.safe_dump(data, sort_keys=False, width=1000, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan's file. Raises PlanFileError."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"can't read the plan {path}: {error}") from error
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, filename: str = "plan") -> Plan:
        """Read what `to_yaml` wrote. Raises PlanFileError."""
        data, mark_of = load_strict(text, filename)
        expected = {"version"} | {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != expected:
            odd = sorted(expected.symmetric_difference(data)) if isinstance(data, Mapping) else []
            raise PlanFileError(f"{filename} is not a plan: keys missing or unknown: {', '.join(odd) or 'all'}")
        if data["version"] != VERSION:
            raise PlanFileError(f"{filename} is a plan of version {data['version']}, expected {VERSION}", where=mark_of(("version",)))
        key = ""
        try:
            for key in ("microbatches", "cuts", "ops", "storage", "inputs", "instructions"):
                _READERS[key](data[key])
            return cls(
                graph=str(data["graph"]),
                mesh=Mesh.parse(data["mesh"]),
                schedule=str(data["schedule"]),
                predicted=data["predicted"],
                notes=list(data["notes"]),
                runners_up=list(data["runners_up"]),
                **{k: read(data[k]) for k, read in _READERS.items()},
            )
        except (PlanFileError, TypeError, ValueError, AttributeError) as error:
            raise PlanFileError(f"{filename} is not a plan: {error}", where=mark_of((key,)) if key else "") from error


def _layout_text(layout: Layout) -> str:
    return " ; ".join(map(str, layout))


def _layouts(data: Mapping[str, str]) -> dict[str, Layout]:
    return {k: tuple(Type.parse(t) for t in v.split(" ; ")) for k, v in data.items()}


def _positive(n: object) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise PlanFileError(f"expected an integer of at least 1, found {n!r}")
    return n


def _starts(cuts: list[int]) -> tuple[int, ...]:
    if not cuts or cuts[0] != 0 or any(not isinstance(c, int) for c in cuts) or any(a >= b for a, b in itertools.pairwise(cuts)):
        raise PlanFileError(f"cuts must be the first block of each stage, from 0 and rising, found {cuts}")
    return tuple(cuts)


_READERS: dict[str, Any] = {
    "microbatches": _positive,
    "cuts": _starts,
    "ops": lambda data: {k: tuple(Strategy.parse(s.strip()) for s in v.split(" ; ")) for k, v in data.items()},
    "storage": _layouts,
    "inputs": _layouts,
    "instructions": lambda lines: schedules.parse("\n".join(lines)),
}
