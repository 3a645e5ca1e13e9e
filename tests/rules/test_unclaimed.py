"""docs/rules.md lists every valid sharding that the table doesn't claim, and each has a reason."""

from __future__ import annotations

import pytest

from autoshard.trace.ops.rule import Strategy

from .reasons import DTENSOR, EXECUTION, INTRO, PAGE, found_by_dtensor, found_by_execution, section, version
from .samples import samples
from .test_claims import claims
from .unclaimed import gives, valid


def test_the_page_lists_what_execution_finds() -> None:
    assert PAGE.read_text().startswith(INTRO + section(EXECUTION, found_by_execution())), "write it anew: python -m tests.rules"


def test_the_page_lists_what_dtensor_has() -> None:
    if f"What torch {version()} has" not in PAGE.read_text():
        pytest.skip("the page was written with another torch")
    assert PAGE.read_text().endswith(section(DTENSOR.format(torch=version()), found_by_dtensor())), "write it anew: python -m tests.rules"


@pytest.mark.parametrize(
    "target, known", [("aten.mm.default", 5), ("aten.add.Tensor", 4), ("aten.softmax.int", 2), ("aten.embedding.default", 4)]
)
def test_the_search_finds_what_the_table_claims(target: str, known: int) -> None:
    """Of the claims that need no body: each gives something valid."""
    s = next(s for s in samples() if s.op.target == target)
    found = list(valid(s))
    plain = [c for c in claims(s, 2) if not c.body and "I" not in str(c) and any(t.kind != "R" for t in c.ins) and ":" not in str(c)]
    assert len(plain) == known
    assert all(any(gives(c, v) and gives(v, c) for v in found) for c in plain), [str(c) for c in plain]


def test_free_transitions() -> None:
    cut = Strategy.parse("S(0), R -> S(0)")
    assert gives(cut, Strategy.parse("R, R -> S(0)"))
    assert not gives(cut, Strategy.parse("S(1), R -> S(0)"))
    assert not gives(cut, Strategy.parse("S(0), R -> R"))
