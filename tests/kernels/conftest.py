"""Both ways in which a kernel runs on a CPU: Triton's interpreter, and plain torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import pytest
import torch

from autoshard.kernels import backend


def loop(x, n):
    for i in range(n):
        x += i


@functools.cache
def lacking() -> str:
    """Why kernels can't be interpreted here; "" where they can."""
    if not backend.installed():
        return "Triton isn't installed: pip install triton"
    import triton

    assert os.environ.get("TRITON_INTERPRET") == "1"
    try:
        triton.jit(loop)[(1,)](torch.zeros(1), 2)
    except Exception as error:
        return f"the interpreter of triton {triton.__version__} can't loop with numpy {numpy.__version__}; take a later one: {error!r}"
    return ""


@dataclass
class Way:
    name: str
    launches: int = 0


@pytest.fixture(params=["triton", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Runs the test once in the interpreter, where it must launch something, and once without, where it mustn't."""
    found = Way(request.param)
    if found.name == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if lacking():
            pytest.skip(lacking())
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(self, *args, **kwargs):
            found.launches += 1
            return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)
    with numpy.errstate(all="ignore"):  # lanes that are masked compute what nobody reads
        yield found
    if "silent" not in request.keywords:
        assert (found.launches > 0) == (found.name == "triton"), f"{found.launches} launches"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter alone."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if lacking():
        pytest.skip(lacking())
