"""CUDA C++ for what Triton doesn't bring to the ceiling: compiled by NVRTC, which every CUDA build of torch brings, at first use.

In: a source in this folder, the name of one of its functions. Out: that function, to be launched on torch's current stream. What was
compiled is kept in a folder (`AUTOSHARD_CACHE`, default ~/.cache/autoshard), by the content of the source, the options and the
architecture. Sources need no header. Raises Unavailable where something is missing: whoever asks has another way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17",)


class Unavailable(Exception):
    """CUDA C++ can't be compiled or run here; the message says why."""


def available(x: Tensor) -> bool:
    """Whether there is a device, a driver and a compiler for what holds x."""
    return x.device.type == "cuda" and torch.version.cuda is not None and _there()


@functools.cache
def _there() -> bool:
    try:
        _compiler(), _driver()
    except Unavailable:
        return False
    return True


def function(source: str, name: str, device: torch.device) -> Function:
    """`name` of `source` ("cast.cu"), on a device. Raises Unavailable."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _function(source, name, index)


@functools.cache
def _function(source: str, name: str, index: int) -> Function:
    handle = ctypes.c_void_p()
    module = _module(source, index)
    with torch.cuda.device(index):
        _check(_driver().cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"{source} has no {name}")
    return Function(handle, index)


@functools.cache
def _module(source: str, index: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(index)
    binary = compiled(source, f"sm_{major}{minor}")
    found = ctypes.c_void_p()
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # torch has made its context
        _check(_driver().cuModuleLoadData(ctypes.byref(found), binary), f"{source} can't be loaded")
    return found


class Function:
    """A function of a device. Tensors go as pointers, None as the null pointer; whole numbers are c_int unless they are ctypes' own."""

    def __init__(self, handle: ctypes.c_void_p, index: int) -> None:
        self.handle, self.index = handle, index

    def __call__(self, grid: tuple[int, int, int], threads: int, *args: Tensor | int | ctypes._SimpleCData[Any] | None) -> None:
        values = [_argument(a) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.index).cuda_stream)
        with torch.cuda.device(self.index):
            _check(_driver().cuLaunchKernel(self.handle, *grid, threads, 1, 1, 0, stream, pointers, None), "a launch failed")


def _argument(value: Tensor | int | ctypes._SimpleCData[Any] | None) -> ctypes._SimpleCData[Any]:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    return ctypes.c_int(value) if isinstance(value, int) else value


def _check(code: int, what: str) -> None:
    if code:
        raise Unavailable(f"{what} (the driver's error {code})")


# ---- compiling


def compiled(source: str, architecture: str) -> bytes:
    """The cubin of a source, from the cache or the compiler. Raises Unavailable with the compiler's words."""
    text = (FOLDER / source).read_bytes()
    options = [f"--gpu-architecture={architecture}", *OPTIONS]
    compiler = _compiler()
    key = hashlib.blake2b(b"\0".join([text, *(o.encode() for o in options), _version(compiler)]), digest_size=16).hexdigest()
    path = _cache() / f"{Path(source).stem}-{key}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    binary = _compile(compiler, text, source, options)
    with contextlib.suppress(OSError):  # a cache that can't be written costs time alone
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)
    return binary


def _cache() -> Path:
    return Path(os.environ.get("AUTOSHARD_CACHE") or Path.home() / ".cache" / "autoshard")


def _version(compiler: ctypes.CDLL) -> bytes:
    major, minor = ctypes.c_int(), ctypes.c_int()
    compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}".encode()


def _compile(compiler: ctypes.CDLL, text: bytes, name: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    compiler.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if compiler.nvrtcCompileProgram(program, len(options), given):
            log = _read(program, compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog)
            raise Unavailable(f"{name} doesn't compile:\n{log.decode(errors='replace')}")
        return _read(program, compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, size_of: Callable[..., int], read: Callable[..., int]) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


@functools.cache
def _compiler() -> ctypes.CDLL:
    """NVRTC: the one that torch has loaded or brought, else the system's."""
    cuda = (torch.version.cuda or "").partition(".")[0]
    versions = [cuda] if cuda else ["13", "12"]
    names = [f"libnvrtc.so.{v}" for v in versions] + [f"nvrtc64_{v}0_0.dll" for v in versions]
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    for folder in _site_folders():
        for path in sorted(folder.glob("libnvrtc.so.*")):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
    raise Unavailable(f"NVRTC isn't here: looked for {', '.join(names)}")


def _site_folders() -> list[Path]:
    """Where wheels put it, beside torch."""
    site = Path(torch.__file__).parent.parent / "nvidia"
    return [site / "cuda_nvrtc" / "lib", *sorted(site.glob("cu*/lib"))]


@functools.cache
def _driver() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise Unavailable("NVIDIA's driver isn't here")
