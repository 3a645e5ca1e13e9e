"""The cluster to plan for: device types and network levels, read from strict YAML or from the catalogue.

In: a YAML file, a catalogue name with a count ("h100x64", "cpux4"), or this machine. Out: a frozen `Cluster`.
Sizes are bytes, times seconds, rates per second, as plain SI numbers. `clusters/*.yaml` are the catalogue and show the format.

>>> cluster = Cluster.load("h100x64")
>>> cluster.ranks, cluster.device.name, [(level.name, level.ranks) for level in cluster.levels]
(64, 'h100', [('nvlink', 8), ('network', 64)])
>>> print(Cluster.load("cpu x4"))
cpux4: 4 × cpu (3.7 GiB), host 4 @ 1.5 GB/s
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ClusterFileError
from .strict_yaml import Faults, Marks, load_strict

CATALOGUE = Path(__file__).parent / "clusters"
MAX_RANKS = 1 << 20
MAX_FILE = 1 << 20
_NAME = re.compile(r"([a-z][a-z0-9_-]*?) ?x ?([0-9]{1,7})\Z", re.ASCII)

Rates = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class DeviceType:
    """What one device computes and holds.

    `peak`: dtype → FLOP/s on paper. `efficiency`: dtype → the part of it that the best large matmul reaches. `kernels`: kernel → the part
    of the peak that it reaches, where that isn't the matmul's. `tiles`: (rows, columns, part of `efficiency`) of the matmul kernels to
    choose from, on `units` multiprocessors; `ramp`: the k at which a tile spends half its time on prologue and epilogue.
    `launch`: the floor of one kernel. `reserved`: bytes that no tensor can have (context, workspaces, communication buffers).
    """

    name: str
    kind: str
    memory: float
    memory_bandwidth: float
    peak: Rates
    efficiency: Rates
    launch: float
    reserved: float = 0.0
    units: int = 1
    ramp: float = 0.0
    tiles: tuple[tuple[int, int, float], ...] = ()
    kernels: Rates = ()

    @property
    def usable(self) -> float:
        """Bytes that tensors can have."""
        return self.memory - self.reserved

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s on paper; a dtype that isn't listed runs at the slowest listed rate (a safe guess)."""
        return dict(self.peak).get(dtype, min(rate for _, rate in self.peak))

    def matmul_part(self, dtype: str) -> float:
        return dict(self.efficiency).get(dtype, min(part for _, part in self.efficiency))

    def kernel_part(self, kernel: str, dtype: str) -> float:
        """The part of the peak that `kernel` reaches; unlisted kernels do as matmuls do."""
        return dict(self.kernels).get(kernel, self.matmul_part(dtype))


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the network: every `ranks` consecutive ranks talk through it.

    `bandwidth`: bytes/s per direction and rank that a large collective reaches. `latency`: what a call costs to start. `hop`: what each
    step of a ring or tree adds. `reduction`: bytes/s at which the switch itself reduces (NVLS), 0 if it can't. `floor`: no call is
    shorter. `contention`: the part of a transfer's time that computation beside it loses.
    """

    name: str
    ranks: int
    bandwidth: float
    latency: float
    hop: float = 0.0
    reduction: float = 0.0
    floor: float = 0.0
    contention: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """`devices`: (type, how many) in rank order. `levels`: innermost first; the last holds all ranks."""

    name: str
    devices: tuple[tuple[DeviceType, int], ...]
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        # it is the key of caches on hot paths, and the hash of nested dataclasses is slow
        object.__setattr__(self, "_hash", hash((self.name, self.devices, self.levels)))

    def __hash__(self) -> int:
        return int(self.__dict__["_hash"])

    @property
    def ranks(self) -> int:
        return sum(count for _, count in self.devices)

    @property
    def device(self) -> DeviceType:
        """The device type; of mixed types, one that has the least of each (ranks that work in step wait for the slowest)."""
        types = [device for device, _ in self.devices]
        return types[0] if len(set(types)) == 1 else _weakest(types)

    def device_of(self, rank: int) -> DeviceType:
        assert 0 <= rank < self.ranks, rank
        for device, count in self.devices:
            if rank < count:
                return device
            rank -= count
        raise AssertionError

    def subset(self, ranks: int) -> Cluster:
        """The first `ranks` ranks."""
        if not 1 <= ranks <= self.ranks:
            raise ClusterFileError(f"{ranks} ranks of a cluster that has {self.ranks}")
        left, devices = ranks, []
        for device, count in self.devices:
            if left:
                devices.append((device, min(count, left)))
                left -= min(count, left)
        return Cluster(f"{self.name}[:{ranks}]", tuple(devices), _cover(self.levels, ranks))

    def __str__(self) -> str:
        parts = [f"{count} × {device.name} ({device.memory / 2**30:.1f} GiB)" for device, count in self.devices]
        parts += [f"{level.name} {level.ranks} @ {level.bandwidth / 1e9:g} GB/s" for level in self.levels]
        return f"{self.name}: {', '.join(parts)}"

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Cluster:
        """From a YAML file, or a catalogue name with a count such as "h100x64". Raises ClusterFileError."""
        text = os.fspath(source)
        named = _NAME.match(text.strip().lower())
        if named and not Path(text).exists():
            return _from_catalogue(*named.groups())
        path = Path(text)
        try:
            if path.stat().st_size > MAX_FILE:
                raise ClusterFileError(f"{path} has {path.stat().st_size} bytes; a cluster file has at most {MAX_FILE}")
            return cls.parse(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError, ValueError) as problem:
            if isinstance(problem, ClusterFileError):
                raise
            meant = _meant(text)
            raise ClusterFileError(
                f"can't read a cluster from {text!r}: {problem}" if meant is None else f"no cluster {text!r}; did you mean {meant}?",
                hint=f"give a YAML file, or one of {', '.join(catalogue())} with a count: h100x8",
            ) from problem

    @classmethod
    def parse(cls, text: str, filename: str = "cluster", ranks: int | None = None) -> Cluster:
        """From YAML text. `ranks` scales a file that leaves the count of its devices open, as the catalogue's do."""
        return _parse(text, filename, ranks)

    @classmethod
    def local(cls, ranks: int) -> Cluster:
        """`ranks` CPU ranks that share this machine's cores and memory."""
        cluster = _from_catalogue("cpu", str(ranks))
        cores = os.cpu_count() or 1
        try:
            memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, OSError, ValueError):
            memory = cluster.device.memory * cores
        share = cores / ranks
        device = dataclasses.replace(
            cluster.device,
            memory=memory / ranks,
            memory_bandwidth=cluster.device.memory_bandwidth * min(share, 4.0),  # a few cores saturate a memory controller
            peak=tuple((dtype, rate * share) for dtype, rate in cluster.device.peak),
        )
        return Cluster(f"localx{ranks}", ((device, ranks),), cluster.levels)


def catalogue() -> list[str]:
    """Names that `Cluster.load` knows."""
    return sorted(path.stem for path in CATALOGUE.glob("*.yaml"))


def _meant(text: str) -> str | None:
    """A name of the catalogue with a count, written otherwise: what it should be.

    >>> _meant("cpu4"), _meant("h100-8"), _meant("8xH100"), _meant("cluster.yaml")
    ('cpux4', 'h100x8', 'h100x8', None)
    """
    plain = re.sub(r"[^a-z0-9]", "", text.strip().lower())
    for name in catalogue():
        found = re.fullmatch(rf"{name}(?:x|gpus?|ranks?)?([0-9]{{1,7}})|([0-9]{{1,7}})(?:x|gpus?|ranks?)?{name}", plain, re.ASCII)
        if found and int(found[1] or found[2]) and len(Path(text).parts) == 1:
            return f"{name}x{int(found[1] or found[2])}"
    return None


def _from_catalogue(name: str, count: str) -> Cluster:
    if name not in catalogue():
        near = difflib.get_close_matches(name, catalogue(), n=1)
        also = f"; did you mean {near[0]}x{int(count)}?" if near else ""
        raise ClusterFileError(
            f"no cluster {name!r} in the catalogue{also}", hint=f"expected a YAML file, or one of {', '.join(catalogue())} with a count"
        )
    if not 1 <= int(count) <= MAX_RANKS:
        raise ClusterFileError(f"a cluster of {count} ranks", hint=f"expected 1 to {MAX_RANKS}")
    cluster = _parse((CATALOGUE / f"{name}.yaml").read_text("utf-8"), f"{name}.yaml", int(count))
    return dataclasses.replace(cluster, name=f"{name}x{int(count)}")


def _weakest(types: list[DeviceType]) -> DeviceType:
    first = types[0]

    def least(field: str) -> Rates:
        tables = [dict(getattr(device, field)) for device in types]
        return tuple(
            (key, min(table[key] for table in tables)) for key, _ in getattr(first, field) if all(key in table for table in tables)
        )

    peak = least("peak") or ((first.peak[0][0], min(rate for device in types for _, rate in device.peak)),)
    return dataclasses.replace(
        min(types, key=lambda device: device.peak_flops(peak[0][0])),
        name="+".join(dict.fromkeys(device.name for device in types)),
        memory=min(device.usable for device in types),
        reserved=0.0,
        memory_bandwidth=min(device.memory_bandwidth for device in types),
        peak=peak,
        efficiency=least("efficiency") or ((peak[0][0], min(part for device in types for _, part in device.efficiency)),),
        launch=max(device.launch for device in types),
        kernels=least("kernels"),
    )


def _cover(levels: tuple[Level, ...], ranks: int) -> tuple[Level, ...]:
    """The levels that `ranks` ranks need, the last of them holding all."""
    needed = []
    for level in levels:
        needed.append(level)
        if level.ranks >= ranks:
            break
    return tuple(needed)


# ---- reading -------------------------------------------------------------------------------------------------------

_TOP = {"name": True, "devices": True, "ranks": True, "levels": True}
_DEVICE = {
    "kind": True, "memory": True, "memory_bandwidth": True, "peak": True, "efficiency": True, "launch": True,
    "reserved": False, "units": False, "ramp": False, "tiles": False, "kernels": False,
}  # fmt: skip
_LEVEL = {
    "name": True,
    "bandwidth": True,
    "latency": True,
    "ranks": False,
    "hop": False,
    "reduction": False,
    "floor": False,
    "contention": False,
}
_RANKS = {"device": True, "count": False}
Where = tuple[str | int, ...]


def _parse(text: str, filename: str, ranks: int | None) -> Cluster:
    faults = Faults(filename, ClusterFileError)
    data, marks = load_strict(text, filename, ClusterFileError, faults)
    reader = _Reader(data, marks, faults)
    reader.mapping((), _TOP)
    name = reader.text(("name",))
    types = {key: _device(reader, ("devices", key), key) for key in reader.table(("devices",))}
    counts = [_count(reader, ("ranks", i), ranks, types) for i in range(reader.length(("ranks",)))]
    total = sum(count for _, count in counts)
    levels = _levels(reader, total)
    if total > MAX_RANKS:
        reader.fault(("ranks",), f"{total} ranks; at most {MAX_RANKS}")
    if ranks is not None and total != ranks:
        reader.fault(("ranks",), f"this cluster has {total} ranks, not the {ranks} asked for")
    reader.faults.raise_any()
    return Cluster(name, tuple((types[device], count) for device, count in counts), _cover(tuple(levels), total))


def _device(reader: _Reader, at: Where, name: str) -> DeviceType:
    reader.mapping(at, _DEVICE)
    kind = reader.text((*at, "kind"))
    if kind not in ("gpu", "cpu", ""):
        reader.fault((*at, "kind"), f"expected gpu or cpu, found {kind!r}")
    tiles = []
    for i in range(reader.length((*at, "tiles"), optional=True)):
        if reader.length((*at, "tiles", i)) != 3:
            reader.fault((*at, "tiles", i), "expected [rows, columns, part]")
            continue
        rows, columns = (int(reader.number((*at, "tiles", i, j), low=1, whole=True)) for j in (0, 1))
        tiles.append((rows, columns, reader.number((*at, "tiles", i, 2), high=1)))
    return DeviceType(
        name=name,
        kind=kind,
        memory=reader.number((*at, "memory"), positive=True),
        memory_bandwidth=reader.number((*at, "memory_bandwidth"), positive=True),
        peak=reader.rates((*at, "peak")),
        efficiency=reader.rates((*at, "efficiency"), high=1),
        launch=reader.number((*at, "launch")),
        reserved=reader.number((*at, "reserved"), default=0.0),
        units=int(reader.number((*at, "units"), default=1, low=1, whole=True)),
        ramp=reader.number((*at, "ramp"), default=0.0),
        tiles=tuple(tiles),
        kernels=reader.rates((*at, "kernels"), high=1, optional=True),
    )


def _count(reader: _Reader, at: Where, ranks: int | None, types: dict[str, DeviceType]) -> tuple[str, int]:
    reader.mapping(at, _RANKS)
    device = reader.text((*at, "device"))
    if device and device not in types:
        reader.fault((*at, "device"), f"no device {device!r}; expected one of {', '.join(types)}")
    if ranks is None and not reader.has((*at, "count")):
        reader.fault(at, "'count' is missing")
    return device, int(reader.number((*at, "count"), default=ranks or 1, low=1, whole=True))


def _levels(reader: _Reader, total: int) -> list[Level]:
    levels: list[Level] = []
    length = reader.length(("levels",))
    if not length:
        reader.fault(("levels",), "expected at least one level")
    for i in range(length):
        at: Where = ("levels", i)
        reader.mapping(at, _LEVEL)
        if i < length - 1 and not reader.has((*at, "ranks")):
            reader.fault(at, "'ranks' is missing; only the last level may leave it out, and then holds all ranks")
        size = int(reader.number((*at, "ranks"), default=max(total, levels[-1].ranks if levels else 1), low=1, whole=True))
        if levels and size < levels[-1].ranks:
            reader.fault((*at, "ranks"), f"{size} ranks in a level outside one of {levels[-1].ranks}")
        if levels and reader.has((*at, "ranks")) and size % levels[-1].ranks:
            reader.fault((*at, "ranks"), f"{size} ranks aren't whole groups of {levels[-1].ranks}")
        if i == length - 1 and size < total:
            reader.fault((*at, "ranks"), f"the last level holds {size} ranks of {total}")
        numbers = {key: reader.number((*at, key), default=0.0) for key in ("hop", "reduction", "floor")}
        levels.append(
            Level(
                name=reader.text((*at, "name")),
                ranks=size,
                bandwidth=reader.number((*at, "bandwidth"), positive=True),
                latency=reader.number((*at, "latency")),
                contention=reader.number((*at, "contention"), default=0.0, high=1),
                **numbers,
            )
        )
    return levels


class _Reader:
    """Typed look-ups in parsed YAML. Every fault is noted and a stand-in returned, so that one pass finds them all."""

    def __init__(self, data: Any, marks: Marks, faults: Faults) -> None:
        self.data, self.marks, self.faults = data, marks, faults

    def fault(self, at: Where, message: str) -> None:
        self.faults.add(self.marks(at), message)

    def has(self, at: Where) -> bool:
        return self.get(at) is not None

    def get(self, at: Where) -> Any:
        found = self.data
        for key in at:
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and isinstance(key, int) and key < len(found):
                found = found[key]
            else:
                return None
        return found

    def mapping(self, at: Where, known: dict[str, bool]) -> None:
        """Note unknown and missing keys."""
        found = self.get(at)
        if not isinstance(found, dict):
            self.fault(at, f"expected keys and values, found {_what(found)}")
            return
        for key in found:
            if key not in known:
                self.faults.add(self.marks.key((*at, key)), f"unknown key {key[:60]!r}; expected {', '.join(known)}")
        for key, required in known.items():
            if required and found.get(key) is None:
                self.fault((*at, key), f"{key!r} is missing")

    def table(self, at: Where) -> dict[str, Any]:
        found = self.get(at)
        if isinstance(found, dict) and found:
            return found
        if found is not None:
            self.fault(at, f"expected keys and values, found {_what(found)}")
        return {}

    def length(self, at: Where, optional: bool = False) -> int:
        found = self.get(at)
        if isinstance(found, list):
            return len(found)
        if found is not None or not optional:
            self.fault(at, f"expected a list, found {_what(found)}")
        return 0

    def text(self, at: Where) -> str:
        found = self.get(at)
        if isinstance(found, str):
            return found
        if found is not None:
            self.fault(at, f"expected text, found {_what(found)}")
        return ""

    def number(
        self, at: Where, *, default: float | None = None, low: float = 0.0, high: float = 1e30, positive: bool = False, whole: bool = False
    ) -> float:
        found = self.get(at)
        stand_in = default if default is not None else 1.0
        if found is None:
            return stand_in  # a required key that is missing was noted by `mapping`
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            self.fault(at, f"expected a number, found {_what(found)}")
        elif whole and not isinstance(found, int):
            self.fault(at, f"expected a whole number, found {found}")
        elif not low <= found <= high or (positive and not found):
            bound = f" and at most {high:g}" if high < 1e30 else ""
            self.fault(at, f"expected {'more than 0' if positive else f'at least {low:g}'}{bound}, found {found}")
        else:
            return found
        return stand_in

    def rates(self, at: Where, high: float = 1e30, optional: bool = False) -> Rates:
        """A table of positive numbers."""
        found = self.get(at)
        if found is None and optional:
            return ()
        return tuple((key, self.number((*at, key), positive=True, high=high)) for key in self.table(at)) or (("float32", 1.0),)


def _what(found: Any) -> str:
    kinds = {dict: "keys and values", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    shown = f" {found[:40]!r}" if isinstance(found, str) else f" {found}" if isinstance(found, bool) else ""
    return kinds.get(type(found), f"the number {found}") + shown
