"""Both ways in which a kernel runs on a CPU: Triton's interpreter, and plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from autoshard.kernels import backend


@dataclass
class Way:
    name: str
    launches: int = 0


@pytest.fixture(params=["triton", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Runs the test once in the interpreter, where it must launch something, and once without, where it mustn't."""
    found = Way(request.param)
    if found.name == "triton":
        if not backend.installed():
            pytest.skip("Triton isn't installed: pip install triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(self, *args, **kwargs):
            found.launches += 1
            return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)
    yield found
    if "silent" not in request.keywords:
        assert (found.launches > 0) == (found.name == "triton"), f"{found.launches} launches"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter alone."""
    if not backend.installed():
        pytest.skip("Triton isn't installed: pip install triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
