"""Small models to try everything on: `case(name)` → Case. `LISTED` must work on every mesh; `FURTHER` is tried for breadth.

>>> case("plain_odd").build()[0].head.out_features
61
"""

from __future__ import annotations

from . import hf, plain
from .case import Case

LISTED: tuple[str, ...] = (*hf.FAMILIES, *plain.CASES)
FURTHER: tuple[str, ...] = (*hf.FURTHER, *hf.PADDED)


def case(name: str) -> Case:
    return plain.CASES[name] if name in plain.CASES else hf.case(name)


__all__ = ["FURTHER", "LISTED", "Case", "case"]
