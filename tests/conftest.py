"""One thread a process (the suite runs several), no network, and the marks that choose what runs here."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run also what takes minutes")


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in (config.option.markexpr or ""):  # ranks are forked here, which a process that has used CUDA can't do
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        _interpretable()


def _interpretable() -> None:
    """Import Triton so that its own library can be interpreted, which it decides then; kernels are where tests/kernels asks again."""
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if "gpu" in item.keywords and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
