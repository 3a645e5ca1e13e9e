"""Small models to try everything on: `case(name)` → Case. `LISTED` must work on every mesh; `FURTHER` is tried for breadth.

>>> case("plain_odd").build()[0].head.out_features
61
"""

from __future__ import annotations

from . import hf, plain, public, published, towers
from .case import Case

LISTED: tuple[str, ...] = (*hf.FAMILIES, *plain.CASES, *towers.FAMILIES)
FURTHER: tuple[str, ...] = (*hf.FURTHER, *hf.PADDED, *towers.FURTHER, *public.CASES, *published.CASES)
_OWN = plain.CASES | public.CASES | published.CASES


def case(name: str) -> Case:
    if name in _OWN:
        return _OWN[name]
    return towers.case(name) if name in towers.FAMILIES | towers.FURTHER else hf.case(name)


__all__ = ["FURTHER", "LISTED", "Case", "case"]
