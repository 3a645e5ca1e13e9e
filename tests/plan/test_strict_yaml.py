"""Strict YAML: what is read, what is refused, and where each fault is said to be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.errors import AutoshardError, ClusterFileError, PlanFileError
from autoshard.plan.strict_yaml import MAX_DEPTH, load_strict


def test_words() -> None:
    text = "{a: 1, b: -2.5, c: 1e-3, d: .5, e: 1., f: true, g: null, h: ~, i: no, j: 1:30, k: 0x10, l: 1_000, m: .inf, n: '1',"
    text += " o: 2026-01-01, p: +3}"
    data, _ = load_strict(text, "f")
    assert data == {
        "a": 1, "b": -2.5, "c": 0.001, "d": 0.5, "e": 1.0, "f": True, "g": None, "h": None, "i": "no", "j": "1:30", "k": "0x10",
        "l": "1_000", "m": ".inf", "n": "1", "o": "2026-01-01", "p": 3,
    }  # fmt: skip


def test_structure_and_marks() -> None:
    data, mark = load_strict("a:\n  - x\n  - {b: [1, [2]]}\nc: |\n  two\n  lines\n", "f.yaml")
    assert data == {"a": ["x", {"b": [1, [2]]}], "c": "two\nlines\n"}
    assert mark(("a", 1, "b", 1, 0)) == "f.yaml:3:14"
    assert mark.key(("a", 1, "b")) == "f.yaml:3:6"
    assert mark(("a", 1, "nothing", "here")) == "f.yaml:3:5"
    assert load_strict("", "f")[0] is None
    assert load_strict("3", "f")[0] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f:3:1: key 'a' a second time"),
        ("a: {b: 1, b: 2}", "f:1:11: key 'b' a second time"),
        ("a: &x 1", "f:1:4: anchors and aliases"),
        ("a: &x [1]\nb: *x", "f:2:4: anchors and aliases"),
        ("a: !!python/object:os.system 1", "tags are not allowed"),
        ("a: !x {}", "f:1:4: tags are not allowed"),
        ("? [1]\n: 2", "f:1:3: a key must be plain text"),
        ("? {a: 1}\n: 2", "a key must be plain text"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document"),
        ("a: 1e999", "f:1:4: 1e999 is too large"),
        ("[" * 100 + "]" * 100, f"nested deeper than {MAX_DEPTH}"),
        ("a: [1, 2", "f:1:"),
        ("a: b: c", "f:1:5"),
        ("a: \x00", "f"),
        ('a: "\\UFFFFFFFF"', "f"),
        ("\ta: 1", "f:1:1"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ClusterFileError) as caught:
        load_strict(text, "f", ClusterFileError)
    assert message in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(PlanFileError) as caught:
        load_strict("a: &x 1\nb: *x\na: !t 2\n", "f")
    assert str(caught.value).startswith("4 faults in f\n") and len(caught.value.args[0].splitlines()) == 5


@given(st.text(alphabet="ab:{}[]-\n ,'\"&*!#?|>1.e\t\\x%@`", max_size=60))
@settings(max_examples=400, deadline=None)
def test_no_other_error(text: str) -> None:
    try:
        load_strict(text, "f")
    except AutoshardError:
        pass
