"""Seconds of computation on one device: matmuls, memory-bound ops, kernels.

In: a `DeviceType` and sizes (numbers or numpy arrays, broadcast together). Out: seconds, of the same shape. All are monotone in every size.

    matmul    launch + max(FLOPs of whole waves of whole tiles / rate + part of the writes, bytes / bandwidth), the best tile
    memory    launch + bytes / bandwidth
    op        launch + max(FLOPs / rate of its kernel, bytes / bandwidth)

>>> from autoshard.plan.cluster import Cluster
>>> h100 = Cluster.load("h100x1").device
>>> print(f"{matmul_seconds(h100, 8192, 4096, 14336) * 1e3:.2f} ms")
1.31 ms
>>> print(f"{memory_seconds(h100, 3e9) * 1e3:.2f} ms")
1.00 ms
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...trace.graph import ITEMSIZE
from ..cluster import DeviceType


def matmul_seconds(device: DeviceType, m: Any, n: Any, k: Any, batch: Any = 1, dtype: str = "bfloat16") -> Any:
    """`batch` products of [m, k] and [k, n].

    On GPUs the result is cut into tiles, and tiles run in waves over the multiprocessors: a wave that isn't full takes as long as a full
    one. Kernels with smaller tiles fill waves better and run at a smaller part of the peak; k may be split too where tiles are few. The
    best is what cuBLAS's heuristics are taken to find.
    """
    m, n, k, batch = (np.maximum(np.asarray(x, float), 0.0) for x in (m, n, k, batch))
    size = ITEMSIZE.get(dtype, 4)
    out_size = max(size, 2)  # results of fp8 matmuls are bf16
    written = batch * out_size * m * n / device.memory_bandwidth
    moved = batch * size * (m * k + k * n) / device.memory_bandwidth + written
    # half of the result's writes are taken to hide under the next tile (fitted to k = 512 … 2048 of DeepGEMM's table)
    seconds = device.launch + np.maximum(_tiled(device, m, n, k, batch, dtype) + 0.5 * written, moved)
    return _plain(seconds)


def _tiled(device: DeviceType, m: Any, n: Any, k: Any, batch: Any, dtype: str) -> Any:
    """Seconds in the multiprocessors under the best tile."""
    rate = device.peak_flops(dtype) * device.matmul_part(dtype)
    if not device.tiles:
        return 2.0 * batch * m * n * k / rate
    best = np.full(np.broadcast_shapes(m.shape, n.shape, k.shape, batch.shape), np.inf)
    per_unit = rate / device.units
    ramp = device.ramp * 2 / ITEMSIZE.get(dtype, 4)  # the pipeline's depth is one of bytes
    for rows, columns, part in device.tiles:
        # tiles may lie either way round
        tiles = batch * np.minimum(np.ceil(m / rows) * np.ceil(n / columns), np.ceil(m / columns) * np.ceil(n / rows))
        work = 2.0 * rows * columns / (per_unit * part)
        for split in (1, 2, 4, 8):
            # the parts of a split k are added up by one more pass over the result, in float32
            waves = np.ceil(tiles * split / device.units)
            extra = 0.0 if split == 1 else batch * m * n * 4.0 * (split + 1) / device.memory_bandwidth
            best = np.minimum(best, waves * work * (k / split + ramp) + extra)
    return best


def memory_seconds(device: DeviceType, bytes: Any) -> Any:
    """An op that only moves `bytes` (read and written together)."""
    return _plain(device.launch + np.maximum(np.asarray(bytes, float), 0.0) / device.memory_bandwidth)


def op_seconds(device: DeviceType, flops: Any, bytes: Any, dtype: str = "bfloat16", kernel: str = "") -> Any:
    """Roofline of any other op. `kernel` names an entry of the device's `kernels`; unlisted ones run as matmuls do."""
    rate = device.peak_flops(dtype) * device.kernel_part(kernel, dtype)
    work = np.maximum(np.asarray(flops, float), 0.0) / rate
    moved = np.maximum(np.asarray(bytes, float), 0.0) / device.memory_bandwidth
    return _plain(device.launch + np.maximum(work, moved))


def _plain(seconds: Any) -> Any:
    """A python float where everything that came in was a number."""
    return float(seconds) if np.ndim(seconds) == 0 else seconds
