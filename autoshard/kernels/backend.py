"""Where a kernel runs: in Triton on a CUDA device; on the CPU in Triton's interpreter if TRITON_INTERPRET=1 asks for it; else in plain
torch.

Triton is imported when a kernel is first launched (the modules in `device/`), and needn't be there. What every kernel's host
side needs stands here too: rows, block sizes, the dtype to compute in.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]
Capability = tuple[int, int] | None
"""A CUDA device's compute capability; None: not known, or not asked."""


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def fused(x: Tensor) -> bool:
    """Whether Triton can run on what holds x."""
    if x.device.type == "cuda":
        return installed()
    return x.device.type == "cpu" and interpreting() and installed()


def capability(x: Tensor) -> Capability:
    return torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def multiprocessors(x: Tensor) -> int:
    """Of the device that holds x; the interpreter plays two."""
    return _multiprocessors(x.device) if x.device.type == "cuda" else 2


def work(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(dtype: torch.dtype) -> Any:
    """`work`, as Triton names it."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def language(dtype: torch.dtype) -> Any:
    """The dtype, as Triton names it."""
    import triton.language as tl

    return {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def power(n: int) -> int:
    """The smallest power of two that holds n, at least 1.

    >>> [power(n) for n in (0, 1, 5, 8, 123)]
    [1, 1, 8, 8, 128]
    """
    return 1 << max(0, n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def rows(x: Tensor) -> Tensor:
    """x as a matrix of its last dim, which is dense; a view where the strides allow it."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.numel() == 0 else flat.contiguous()


PER_WARP = 512  # elements


def warps(elements: int) -> int:
    """For a program that holds so many elements of a few values in registers."""
    return max(1, min(16, elements // PER_WARP))


HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float64, torch.float32, *HALF)
