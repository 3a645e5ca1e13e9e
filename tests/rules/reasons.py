"""Why a valid sharding isn't claimed, and the page that says so: `python -m tests.rules` writes docs/rules.md."""

from __future__ import annotations

from pathlib import Path

import torch

from autoshard.layout import PMAX, P, R, S
from autoshard.trace.ops.rule import Strategy

from .dtensor import fake_mesh, rules
from .sample import Sample
from .samples import samples
from .test_claims import claims
from .unclaimed import gives, unclaimed

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"

INTRO = """# Shardings that hold and aren't claimed

An op's entry in `autoshard/trace/ops/table.py` claims shardings; `tests/rules` runs each of them. The other way round, this page lists
every sharding of the tests' sample calls that holds and that the table neither claims nor gives with free transitions (slicing a whole
value, masking it to a term), with the reason. It is written by `python -m tests.rules` and checked by `tests/rules/test_unclaimed.py`.

`S(d)`: cut along dim d. `P`: terms of a pending sum, `P(max)` of a maximum. `R`: whole. Operands, then outputs.
"""
EXECUTION = (
    "\n## Found by execution\n\nEvery way to cut, keep or leave pending each operand is run on two ranks, on two draws of the data.\n"
)
DTENSOR = """
## Claimed by torch's DTensor

What torch {torch} has for the same calls beyond the table and the list above (averages, minima and masked terms left out).
"""


def reason(s: Sample, t: Strategy) -> str:
    """Raises KeyError for what nobody has thought about."""
    name = s.op.target.split(".")[1]
    if name in ("cumsum", "cumprod", "logcumsumexp"):
        return "Not so: DTensor's own rule doesn't count a negative dim from the end; along its dim the op runs over all elements."
    if name == "gather" and t.ins == (S(0), S(0)):
        return "Not so where the index has fewer rows than the table: each sharded by its own rows, they don't match."
    if PMAX in t.outs and name == "amax":
        return "Claimed without a gradient; with one, each rank's own maximum would get a gradient."
    if PMAX in t.ins:
        return "A pending maximum has no gradient and is completed where it is made; monotone functions of it would save nothing."
    if name in ("any", "all"):
        return "A pending sum of bools is none of our types: collectives don't add bools."
    if P in t.ins and any(not v.tensor.floating for v, i in zip(s.operands(), t.ins, strict=True) if i == P):
        return "Pending sums of integers (counts of labels) are completed where they are made: they are scalars, and depend on data alone."
    if P in t.ins and t.outs == (R,):
        return "The result doesn't depend on the operand's values, or on terms that are finite: a constant. Nothing need be pending for it."
    if "norm" in name and t.ins[0] == R:
        return "Linear in its weights, but parameters are stored, never pending."
    if name == "polar":
        return "Linear in the radius, but torch's backward takes it to be positive, which a term needn't be."
    if name == "slice":
        return "Holds only where a window or a step happens to cut each rank's part alike; cuts that neighbours name are followed."
    if name == "attention" and S(3) in t.ins:
        return "Every rank would compute all scores again for its part of the values' features; cutting heads doesn't."
    if name.startswith("conv") and len(s.operands()[0].tensor.shape) != len(s.operands()[1].tensor.shape):
        return "One example without a batch dim: batches are what training has."
    if name.startswith("conv") and t.ins[-1] == P:
        return "Input channels cut and a bias pending: parameters never are, and a whole bias would be added on every rank."
    if name in ("im2col", "col2im") and s.name.endswith("one example"):
        return "One example without a batch dim: batches are what training has."
    if name in ("scatter_add", "index_add") and t.ins[0] == P:
        return "What is added to would be pending while its addends are cut, and a factor can say only that it is whole."
    if "pool" in name:
        return "Holds only where no window spans two ranks' parts, which its size, stride and padding decide."
    if name == "index" and s.name.endswith("scattered"):
        return "Index tensors that aren't next to each other put their dims first: an order that the rule doesn't follow."
    raise KeyError(f"{s.name}: {t} holds and isn't claimed: claim it, or say here why not")


def found_by_execution() -> dict[str, dict[str, list[str]]]:
    """Reason → op → shardings."""
    found: dict[str, dict[str, list[str]]] = {}
    for s in samples():
        for t in unclaimed(s, claims(s, 2)):
            _add(found, s, t)
    return found


def found_by_dtensor() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    with fake_mesh() as mesh:
        for s in samples():
            known = claims(s, 2)
            for t in sorted(rules(s, mesh), key=str):
                if not any(gives(c, t) for c in known) and not any(gives(c, t) for c in (unclaimed(s, known))):
                    _add(found, s, t)
    return found


def _add(found: dict[str, dict[str, list[str]]], s: Sample, t: Strategy) -> None:
    lines = found.setdefault(reason(s, t), {}).setdefault(s.op.target, [])
    if str(t) not in lines:
        lines.append(str(t))


def section(title: str, found: dict[str, dict[str, list[str]]]) -> str:
    text = title
    for why, ops in sorted(found.items()):
        text += f"\n{why}\n\n"
        by_lines: dict[str, list[str]] = {}
        for op, lines in sorted(ops.items()):
            by_lines.setdefault("; ".join(f"`{line}`" for line in sorted(lines)), []).append(f"`{op}`")
        text += "".join(f"- {', '.join(names)}: {lines}\n" for lines, names in sorted(by_lines.items(), key=lambda item: item[1]))
    return text


def version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def page() -> str:
    return INTRO + section(EXECUTION, found_by_execution()) + section(DTENSOR.format(torch=version()), found_by_dtensor())
