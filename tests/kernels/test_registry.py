"""The table of kernels: what it refuses, and what every entry must keep."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

from autoshard.kernels import registry
from autoshard.kernels.measured import MEASURED, Measurement
from autoshard.kernels.registry import KERNELS, Kernel, Table


def kernel(name: str, op: str, *measured: Measurement) -> Kernel:
    return Kernel(name, op, lambda x: x, "… -> …", lambda *_, **__: True, lambda *_, **__: (0.0, 0.0), measured)


def test_a_second_of_a_name_or_of_an_operator_is_refused():
    for second in (kernel("one", "autoshard.b.default"), kernel("two", "autoshard.a.default")):
        with pytest.raises(ValueError, match="two kernels are called"):
            Table((kernel("one", "autoshard.a.default"), second))


def test_one_that_is_not_there():
    with pytest.raises(KeyError, match="there are rms_norm"):
        KERNELS["nonsense"]


def test_a_gain_chooses_and_a_loss_does_not():
    def gain(x: float) -> Measurement:
        return Measurement(x, "torch.compile", "8192 4096", "H100", "torch 2.11")

    assert not kernel("k", "o").chosen
    assert kernel("k", "o", gain(1.2)).chosen
    assert not kernel("k", "o", gain(1.2), gain(0.9)).chosen
    assert str(Table([kernel("k", "o", gain(1.2), gain(1.1))])).split() == ["k", "…", "->", "…", "1.10", "×"]
    assert len(str(KERNELS).splitlines()) == len(KERNELS)


def packet(entry: Kernel) -> torch._ops.OpOverload:
    space, name, overload = entry.op.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)


@pytest.mark.parametrize("entry", KERNELS, ids=lambda k: k.name)
def test_an_operator_and_its_reference_take_the_same(entry):
    schema = packet(entry)._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(entry.reference).parameters)
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    left, right = entry.rule.split("->")
    assert len(left.split(",")) == len(tensors), "the rule has a part for each tensor operand"
    assert len(right.split(",")) == len(schema.returns) or not (right.strip() or schema.returns)
    assert "capability" in inspect.signature(entry.applies).parameters
    assert "itemsize" in inspect.signature(entry.cost).parameters


def test_triton_is_imported_by_a_launch_alone():
    for path in Path(registry.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # of the module itself: functions may
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("triton") for name in node.names), path.name
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(name.name for name in node.names)]
                assert not any(name.split(".")[0] in ("device", "triton") for name in names), path.name


def test_what_was_measured_is_in_the_table():
    assert set(MEASURED) <= {k.name for k in KERNELS}
    assert KERNELS["adamw"].measured == MEASURED["adamw"]
