"""Every listed family captures to the normal form and agrees with the plain model, eager attention and padding included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.zoo import hf, plain

from .agree import assert_agrees

# one of each mechanism; `--slow` tries them all
FAST = {"gpt2", "opt", "bloom", "llama", "mixtral", "bert"}
EAGER = {"llama"}
REPEATED = {"plain_split", "plain_odd", "plain_ignored", "plain_patches", "plain_llama"}  # what others here show too


def some(names: Iterable[str], fast: set[str]) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(plain.CASES, set(plain.CASES) - REPEATED))
def test_plain_models_agree(name: str) -> None:
    case = plain.CASES[name]
    model, kwargs = case.double()
    assert_agrees(model, (), kwargs, case.loss)


@pytest.mark.parametrize("name", some(hf.FAMILIES, FAST))
def test_hugging_face_families_agree(name: str) -> None:
    pytest.importorskip("transformers")
    model, kwargs = hf.case(name).double()
    captured = assert_agrees(model, (), kwargs)
    assert not any(op.target.startswith("aten.index") and "mask" in op.source for op in captured.graph.ops)


@pytest.mark.parametrize("name", some(hf.FAMILIES, EAGER))
def test_eager_attention_and_padding_agree(name: str) -> None:
    pytest.importorskip("transformers")
    model, kwargs = hf.build(name, padded=True)
    model.set_attn_implementation("eager")
    assert_agrees(model.double(), (), kwargs)


def test_padding_is_what_is_left_of_a_causal_mask() -> None:
    pytest.importorskip("transformers")
    model, kwargs = hf.build("llama", padded=True)
    graph = assert_agrees(model.double(), (), kwargs).graph
    attention = [op for op in graph.ops if op.target == "autoshard.attention.default"]
    assert len(attention) == 2
    for op in attention:
        assert op.args[4] is True
        assert graph.values[op.args[3].name].tensor.shape == (8, 1, 1, 12)
