"""Pins: decisions that the user holds fixed. Checked once, before anything is searched; then the space is narrowed to them.

In: pins as text, the graph, the meshes to be tried. Out: nothing, or one PinError with every fault, near names, and what would be legal.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ..errors import AutoshardError, NoPlanError, PinError
from ..layout import Type
from ..mesh import Mesh
from ..trace.graph import Graph
from ..trace.ops.rule import Strategy
from .microbatch import TimeSplit
from .precision import RECIPES
from .schedules import KINDS
from .space import Pair, Space

PINS = ("schedule", "cuts", "zero", "storage", "ops", "divide", "merge", "buckets", "kernels", "overlap", "precision")
SHOWN = 12
"""Legal choices that an error lists."""

Trial = tuple[Mesh, TimeSplit]


def check(pins: Mapping[str, Any], graph: Graph, blocks: int, meshes: Sequence[Mesh], trials: Callable[[], Iterable[Trial]]) -> None:
    """Raises PinError. `blocks`: how many there are to cut; `trials`: a mesh and a split for each mesh that will be tried."""
    faults: list[str] = []
    for name in pins:
        if name not in PINS:
            faults.append(f"unknown pin {name!r}{_near(name, PINS) or '; pins are ' + ', '.join(PINS)}")
    schedule = pins.get("schedule")
    training = [kind for kind in KINDS if kind != "forward"]
    if schedule is not None and schedule not in training:
        faults.append(f"schedule: {schedule!r} is none; expected {' or '.join(training)}")
    if not isinstance(pins.get("overlap", True), bool):
        faults.append(f"overlap: expected true or false, found {pins['overlap']!r}")
    recipe = pins.get("precision")
    if recipe is not None and recipe not in RECIPES:
        faults.append(f"precision: {recipe!r} is no recipe; expected {' or '.join(RECIPES)}")
    if "cuts" in pins:
        faults += _cuts(pins["cuts"], blocks, meshes)
    faults += _merge(pins.get("merge"), graph)
    named = {(table, str(name)): text for table in ("storage", "ops") for name, text in dict(pins.get(table) or {}).items()}
    faults += _named(named, graph, trials) if named else []
    if faults:
        count = "a pin can't be held" if len(faults) == 1 else f"{len(faults)} pins can't be held"
        raise PinError(f"{count}:\n  " + "\n  ".join(faults), hint="names and strategies are as in a saved plan (--save, plan.to_yaml())")


def _merge(wanted: Any, graph: Graph) -> list[str]:
    if wanted is None or isinstance(wanted, bool):
        return []
    paths = [v.path for v in graph.sources("param")]
    odd = [path for group in wanted for path in group if path not in paths]
    return [f"merge: the model doesn't have parameter {path!r}{_near(path, paths)}" for path in odd]


def _cuts(cuts: Any, blocks: int, meshes: Sequence[Mesh]) -> list[str]:
    given = list(cuts)
    if not given or given[0] != 0 or given != sorted(set(given)) or given[-1] >= blocks:
        return [f"cuts: {given} aren't the first block of each stage, from 0 and rising, of {blocks} blocks"]
    if all(mesh.size("pp") != len(given) for mesh in meshes):
        found = sorted({mesh.size("pp") for mesh in meshes})
        return [f"cuts: {given} don't make {' or '.join(map(str, found[:SHOWN]))} stages, which is what pp may be here"]
    return []


def _named(named: Mapping[tuple[str, str], str], graph: Graph, trials: Callable[[], Iterable[Trial]]) -> list[str]:
    """Faults of the pins of single parameters and ops: names first, then texts, then whether any mesh allows them."""
    paths = [v.path for v in graph.sources("param")]
    faults, left = [], dict(named)
    seen: dict[str, None] = {}
    tried: dict[tuple[str, str], tuple[Mesh, list[str]]] = {}
    for (table, name), text in named.items():
        if table == "storage" and name not in paths:
            faults.append(f"storage.{name}: the model doesn't have parameter {name!r}{_near(name, paths)}")
            del left[table, name]
            continue
        try:
            (Type if table == "storage" else Strategy).parse(_tp(text))
        except (AutoshardError, ValueError, IndexError) as error:
            faults.append(
                f"{table}.{name}: {text!r} is not a {'type' if table == 'storage' else 'strategy'} ({str(error).splitlines()[0]})"
            )
            del left[table, name]
    for mesh, split in trials():
        if not left:
            break
        space = Space(split, (mesh.size("dp"), mesh.size("tp")))
        seen |= dict.fromkeys(space.domains)
        for (table, name), text in list(left.items()):
            if table == "ops" and name not in space.domains:
                continue
            legal = _legal(space, table, name)
            if any(_meant(text, choice) for choice in legal):
                del left[table, name]
            elif (table, name) not in tried or mesh.size("tp") > tried[table, name][0].size("tp"):
                tried[table, name] = (mesh, [str(choice[1]) for choice in legal])
    for (table, name), text in left.items():
        if (table, name) in tried:
            mesh, choices = tried[table, name]
            how = "be stored as" if table == "storage" else "run as"
            faults.append(f"{table}.{name}: can't {how} {text} on tp={mesh.size('tp')}; legal there: {_listed(choices)}")
        elif any(op.name == name for op in graph.ops):
            faults.append(f"ops.{name}: it depends on data alone, and isn't placed by the search")
        else:
            faults.append(f"ops.{name}: the graph doesn't have op {name!r}{_near(name, seen)}")
    return faults


def _legal(space: Space, table: str, name: str) -> Sequence[tuple[Any, ...]]:
    if table == "ops":
        return space.domains[name]
    value = next(v for v in space.split.graph.sources("param") if v.path == name)
    return space.storage[value.name]


def narrow(space: Space, pins: Mapping[str, Any]) -> None:
    """Leave only what the pins allow. Raises NoPlanError where this mesh allows nothing of the kind."""
    tp = space.sizes[1]
    for path, text in dict(pins.get("storage") or {}).items():
        value = next(v for v in space.split.graph.sources("param") if v.path == path)
        space.storage[value.name] = [s for s in space.storage[value.name] if _meant(text, s)]
        if not space.storage[value.name]:
            raise NoPlanError(f"parameter {path} can't be stored as {text} on tp={tp}")
    for name, text in dict(pins.get("ops") or {}).items():
        kept: list[Pair] = [pair for pair in space.domains.get(name, []) if _meant(text, pair)]
        if not kept:
            raise NoPlanError(f"op {name} can't run as {text} on tp={tp}")
        space.domains[name] = kept


def _tp(text: str) -> str:
    """What a pin says of tp: all of it, or the second part of what a saved plan says ("dp ; tp")."""
    return text.rpartition(";")[2].strip()


def _meant(text: str, choice: tuple[Any, ...]) -> bool:
    return _tp(text).replace(" ", "") == str(choice[1]).replace(" ", "")


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _listed(choices: Iterable[str]) -> str:
    each = list(dict.fromkeys(choices))
    return " | ".join(each[:SHOWN]) + (f" | and {len(each) - SHOWN} more" if len(each) > SHOWN else "")
