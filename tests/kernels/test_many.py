"""Many tensors in one launch, in Triton's interpreter: the table, and what reads it; `tests/runtime/test_fused.py` has the optimizer."""

from __future__ import annotations

import numpy
import pytest
import torch

from autoshard.kernels import many

from .against import draw, relative

SIZES = (1, 16, 0, 123, 4096, many.CHUNK + 32, 2 * many.CHUNK + 5)


def tensors(dtype: torch.dtype, sizes=SIZES) -> list[torch.Tensor]:
    return [draw(n, dtype=dtype, seed=i) for i, n in enumerate(sizes)]


def launches(xs, kinds=None) -> list[many.Launch]:
    return many.Table().of([(kinds[i] if kinds else 0, (x,)) for i, x in enumerate(xs)])


@pytest.fixture(autouse=True)
def quiet():
    with numpy.errstate(all="ignore"):
        yield


def test_tensors_of_a_kind_share_a_launch():
    half, single = tensors(torch.bfloat16), tensors(torch.float32)
    made = launches([*half, *single])
    assert sorted((str(x.dtypes[0]), x.aligned, len(x.rows)) for x in made) == [
        ("torch.bfloat16", False, 3), ("torch.bfloat16", True, 3), ("torch.float32", False, 3), ("torch.float32", True, 3),
    ]  # fmt: skip
    assert len(launches([single[0], single[3]], kinds=["a", "b"])) == 2
    three = many.Table().of([(kind, (x, x)) for kind in range(3) for x in single])
    assert {x.rows.data_ptr() % 16 for x in three} == {three[0].rows.data_ptr() % 16}
    assert launches([torch.ones(0)]) == [] and launches([]) == []


def test_a_view_that_begins_anywhere_is_read_narrowly():
    buffer = draw(100, dtype=torch.bfloat16)
    assert [x.aligned for x in launches([buffer[16:48]])] == [True]
    assert [x.aligned for x in launches([buffer[3:35]])] == [False]


def test_the_table_is_made_anew_only_for_other_tensors():
    table, xs = many.Table(), tensors(torch.float32)
    first = table.of([(0, (x,)) for x in xs])
    assert table.of([(0, (x,)) for x in xs]) is first
    others = [x.clone() for x in xs]
    second = table.of([(0, (x,)) for x in others])
    assert second is not first and all(a.where is b.where for a, b in zip(first, second, strict=True))  # who does what is as it was
    assert table.of([(0, (x[: x.numel() // 2],)) for x in others]) is not second


def test_what_is_not_dense_is_refused():
    with pytest.raises(ValueError, match=r"found a torch.float32 tensor of \[4, 3\], strides \(1, 4\)"):
        launches([torch.zeros(3, 4).t()])
    with pytest.raises(ValueError, match=r"found a torch.float32 tensor of \[4\].*expected \[5\]"):
        many.Table().of([(0, (torch.zeros(5), torch.zeros(4)))])
    with pytest.raises(ValueError, match=r"found a torch.float64 tensor of \[2\]"):
        launches([torch.zeros(2, dtype=torch.float64)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_squares(triton, dtype):
    xs = tensors(dtype)
    expected = sum(x.double().square().sum() for x in xs)
    assert relative(sum(many.squares(launches(xs), 0)), expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_element_anywhere_is_found(triton, dtype, value):
    for which, at in ((0, 0), (4, 4095), (5, many.CHUNK), (6, -1)):
        xs = tensors(dtype)
        xs[5].fill_(torch.finfo(dtype).max)  # finite, though sums of it aren't
        found = torch.zeros(())
        many.not_finite(launches(xs), 0, found)
        assert found == 0
        xs[which][at] = value
        many.not_finite(launches(xs), 0, found)
        assert found == 1


@pytest.mark.parametrize("by", [0.5, 1.0, float("nan")])
def test_scaling(triton, by):
    xs = tensors(torch.float32)
    expected = [x * by for x in xs]
    many.scale_(launches(xs), 0, torch.tensor(by))
    for x, e in zip(xs, expected, strict=True):
        torch.testing.assert_close(x, e, rtol=0, atol=0, equal_nan=True)
