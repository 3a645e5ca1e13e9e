"""CUDA C++: what there is without a device. (Numbers are compared on a GPU, `test_gpu.py`.)"""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import cuda


def test_nothing_is_available_for_the_cpu():
    assert not cuda.available(torch.zeros(1))


def test_a_compiled_source_is_kept_by_its_content(tmp_path, monkeypatch):
    built = []

    class Compiler:
        def nvrtcVersion(self, major, minor):
            major._obj.value, minor._obj.value = 13, 0

    def build(compiler, text, name, options):
        built.append((name, options))
        return b"binary of " + text[:2]

    monkeypatch.setenv("AUTOSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_compiler", Compiler)
    monkeypatch.setattr(cuda, "_compile", build)
    first = cuda.compiled("cast.cu", "sm_90")
    assert cuda.compiled("cast.cu", "sm_90") == first == b"binary of //"
    assert len(built) == 1 and "--gpu-architecture=sm_90" in built[0][1]
    cuda.compiled("cast.cu", "sm_100")
    assert len(built) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOSHARD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cuda, "_compiler", lambda: None)
    monkeypatch.setattr(cuda, "_version", lambda compiler: b"13.0")
    monkeypatch.setattr(cuda, "_compile", lambda *_: b"binary")
    assert cuda.compiled("cast.cu", "sm_90") == b"binary"


def test_sources_compile_for_hopper(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOSHARD_CACHE", str(tmp_path))
    try:
        cuda._compiler()
    except cuda.Unavailable as reason:
        pytest.skip(str(reason))
    for source in cuda.FOLDER.glob("*.cu"):
        for architecture in ("sm_89", "sm_90"):
            assert cuda.compiled(source.name, architecture).startswith(b"\x7fELF")
