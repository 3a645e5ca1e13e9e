"""The Plan: everything that the program depends on, as one small document.

A Plan prints to YAML and reads back equal. It names ops and values of the graph of one microbatch (`microbatch.split_time`), so a
graph and a plan together decide the program; `check` refuses a plan that was made for another graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import AutoshardError, PlanFileError, StalePlanError
from ..layout import Layout, Type
from ..mesh import Mesh
from ..trace.graph import Graph
from ..trace.ops.rule import Strategy
from . import schedules
from .strict_yaml import Faults, Marks, load_strict

VERSION = 1


def fingerprint(graph: Graph) -> str:
    """A hash of what a plan depends on: every op, shape and role of the graph."""
    lines = [f"{v.name} {v.tensor} {v.role} {v.path} {v.grad} {v.batch_dim}" for v in graph.values.values() if v.role != "value"]
    lines += [f"{op.outs} {op}" for op in graph.ops]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass
class Plan:
    """`cuts`: the first block of each stage. `ops`: op → one strategy per inner axis (dp, tp). `storage`: parameter value → where it
    is stored between steps. `inputs`: source value → layout. `instructions`: one list per stage. `merge`: linears that run as one matmul
    (`plan.merge`). `bucket_bytes`: what travels together is at most this large, as used; `buckets`: the first block of each bucket of
    parameters (`plan.buckets`). `kernels`: those that `lower` puts where it finds what they compute. `overlap`: whether collectives run
    beside matmuls. `precision`: linear → recipe (`plan.precision`); what isn't there computes in its own dtype. `predicted`: seconds and
    bytes.
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
    merge: list[tuple[str, ...]]
    bucket_bytes: int
    buckets: tuple[int, ...]
    kernels: list[str]
    overlap: bool = True
    precision: dict[str, str] = field(default_factory=dict)
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
            "merge": [" ".join(group) for group in self.merge],
            "bucket_bytes": self.bucket_bytes,
            "buckets": list(self.buckets),
            "kernels": self.kernels,
            "overlap": self.overlap,
            "precision": self.precision,
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
        faults = Faults(filename, PlanFileError)
        data, marks = load_strict(text, filename, PlanFileError, faults)
        expected = ["version", *(f.name for f in dataclasses.fields(cls))]
        if not isinstance(data, dict):
            faults.add(marks(()), f"expected a plan's keys ({', '.join(expected)})")
            faults.raise_any()
        for key in data:
            if key not in expected:
                faults.add(marks.key((key,)), f"unknown key {str(key)[:60]!r}; a plan has {', '.join(expected)}")
        for key in expected:
            if key not in data:
                faults.add(marks(()), f"the key {key!r} is missing")
        if data.get("version", VERSION) != VERSION:
            faults.add(marks(("version",)), f"a plan of version {data['version']!r}, expected {VERSION}")
        found = {key: _read(key, data[key], faults, marks) for key in expected[1:] if key in data}
        faults.raise_any()
        return cls(**found)


def _read(key: str, value: Any, faults: Faults, marks: Marks) -> Any:
    """A field from its YAML, by `_READERS`: one reader for a value, or one for each entry of a mapping. Faults go to `faults`."""
    read = _READERS[key]
    items = value if isinstance(read, _Each) and isinstance(value, dict) else None
    if isinstance(read, _Each) and items is None:
        faults.add(marks((key,)), f"{key}: expected a mapping, found {str(value)[:60]!r}")
        return {}
    found = {}
    for name, entry, at in ((n, e, (key, n)) for n, e in items.items()) if items is not None else ((key, value, (key,)),):
        try:
            found[name] = (read.read if isinstance(read, _Each) else read)(entry)
        except (AutoshardError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            faults.add(marks(at), f"{'.'.join(map(str, at))[:200]}: {str(error).splitlines()[0][:300] or type(error).__name__}")
    return found if items is not None else found.get(key)


def _layout_text(layout: Layout) -> str:
    return " ; ".join(map(str, layout))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PlanFileError(f"expected text, found {str(value)[:60]!r}")
    return value


def _list_of(kind: type) -> Callable[[Any], list[Any]]:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
            raise PlanFileError(f"expected a list of {'text' if kind is str else 'mappings'}, found {str(value)[:60]!r}")
        return value

    return read


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanFileError(f"expected a mapping, found {str(value)[:60]!r}")
    return value


def _layout(value: Any) -> Layout:
    return tuple(Type.parse(t) for t in _text(value).split(" ; "))


def _strategies(value: Any) -> tuple[Strategy, ...]:
    return tuple(Strategy.parse(s.strip()) for s in _text(value).split(" ; "))


def _positive(n: object) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise PlanFileError(f"expected an integer of at least 1, found {n!r}")
    return n


def _size(n: object) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise PlanFileError(f"expected a number of bytes, found {n!r}")
    return n


def _starts(cuts: list[int]) -> tuple[int, ...]:
    whole = isinstance(cuts, list) and all(type(c) is int for c in cuts)
    if not whole or cuts[:1] != [0] or any(a >= b for a, b in itertools.pairwise(cuts)):
        raise PlanFileError(f"cuts and buckets are blocks at which something starts, from 0 and rising, found {str(cuts)[:200]}")
    return tuple(cuts)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise PlanFileError(f"expected true or false, found {str(value)[:60]!r}")
    return value


@dataclass(frozen=True)
class _Each:
    """Reads the entries of a mapping, one by one."""

    read: Callable[[Any], Any]


_READERS: dict[str, Any] = {
    "graph": _text,
    "mesh": lambda value: Mesh.parse(_text(value)),
    "microbatches": _positive,
    "schedule": _text,
    "cuts": _starts,
    "merge": lambda value: [tuple(line.split()) for line in _list_of(str)(value)],
    "bucket_bytes": _size,
    "buckets": _starts,
    "kernels": _list_of(str),
    "overlap": _bool,
    "precision": _Each(_text),
    "ops": _Each(_strategies),
    "storage": _Each(_layout),
    "inputs": _Each(_layout),
    "instructions": lambda lines: schedules.parse("\n".join(_list_of(str)(lines))),
    "predicted": _mapping,
    "notes": _list_of(str),
    "runners_up": _list_of(dict),
}
