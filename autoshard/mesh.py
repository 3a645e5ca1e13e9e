"""Named axes and their sizes: "pp=2 dp=2 tp=4".

A mesh numbers its ranks row-major: the last axis is innermost, its ranks are neighbours.

>>> mesh = Mesh.parse("pp=2 tp=4")
>>> mesh.ranks, mesh.coords(5)
(8, {'pp': 1, 'tp': 1})
>>> mesh.group(5, "pp")
[1, 5]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import MeshError

AXES = ("pp", "dp", "tp")
"""The axes that a plan may have, outermost first."""


@dataclass(frozen=True)
class Mesh:
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise MeshError(f"mesh axes must have different names, found {', '.join(self.names)}")
        for name, size in zip(self.names, self.sizes, strict=True):
            if not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {name} has size {size!r}, expected an integer of at least 1")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read "dp=2 tp=4". Raises MeshError."""
        pairs = [part.partition("=") for part in text.replace(",", " ").split()]
        if not pairs or any(not sep or not size.isdigit() for _, sep, size in pairs):
            raise MeshError(f"{text!r} is not a mesh", hint='write names and sizes, outermost first: "dp=2 tp=4"')
        return cls(tuple(name for name, _, _ in pairs), tuple(int(size) for *_, size in pairs))

    @classmethod
    def of(cls, axes: Mapping[str, int]) -> Mesh:
        """The mesh with these axes, all of pp, dp and tp present (size 1 where not named), in that order. Raises MeshError."""
        unknown = [name for name in axes if name not in AXES]
        if unknown:
            raise MeshError(
                f"mesh axis {unknown[0]!r} is not one that a plan can use; expected some of {', '.join(AXES)}",
                hint="pp cuts layers into stages, dp the batch, tp everything inside a layer",
            )
        return cls(AXES, tuple(axes.get(name, 1) for name in AXES))

    def __str__(self) -> str:
        return " ".join(f"{n}={s}" for n, s in zip(self.names, self.sizes, strict=True))

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    def size(self, axis: str) -> int:
        return self.sizes[self.names.index(axis)] if axis in self.names else 1

    def stride(self, axis: str) -> int:
        """Distance, in ranks, between neighbours on the axis."""
        return math.prod(self.sizes[self.names.index(axis) + 1 :])

    def coords(self, rank: int) -> dict[str, int]:
        found = {}
        for name, size in zip(reversed(self.names), reversed(self.sizes), strict=True):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.names}

    def rank(self, coords: Mapping[str, int]) -> int:
        number = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            number = number * size + coords.get(name, 0)
        return number

    def group(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from `rank` on this axis alone, in order of their coordinate."""
        coords = self.coords(rank)
        return [self.rank({**coords, axis: i}) for i in range(self.size(axis))]
