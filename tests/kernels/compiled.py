"""Compile every kernel for a GPU that needn't be there: `python -m tests.kernels.compiled [capability, as 90]`.

The interpreter takes what the compiler refuses (types that change in a loop, shapes that don't broadcast), so each operator is called as
on a device, in bf16 and float32, at the widths of real models, and each launch is compiled, down to machine code, instead of run. Prints
a line a kernel: registers' spills in bytes, shared memory, warps, the widest access in words, seconds. Ends with an error if one doesn't
compile, or if one of aligned tensors isn't compiled to accesses of 16 bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autoshard.kernels import backend, many, registry  # noqa: F401  (registers the operators)

Op = torch.ops.autoshard


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each operator, forward and backward: few rows, real widths."""

    def t(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    x, w = t(8, 4096), t(4096)
    for name, op, add, extra in (("rms_norm", Op.rms_norm, Op.add_rms_norm, 0), ("layer_norm", Op.layer_norm, Op.add_layer_norm, 1)):
        yield name, lambda op=op, extra=extra: op(x, w, *(w,) * extra, 1e-6)
        yield f"add_{name}", lambda add=add, extra=extra: add(x, x, w, *(w,) * extra, 1e-6, 1.0, True)
    yield "rms_norm of heads", lambda: Op.rms_norm(t(64, 8, 128), t(128), 1e-6)
    yield "rms_norm_backward", lambda: Op.rms_norm_backward(x, x, x, w, 1e-6, 0.0, True)
    yield "rms_norm_backward, wide", lambda: Op.rms_norm_backward(t(8, 16384), None, t(8, 16384), t(16384), 1e-6, 0.0, True)
    yield "layer_norm_backward", lambda: Op.layer_norm_backward(x, None, x, w, 1e-6, 1.0, [True, True])
    q, k, table = t(2, 8, 32, 128).transpose(1, 2), t(2, 8, 8, 128).transpose(1, 2), t(1, 8, 128)
    yield "rotary", lambda: Op.rotary(q, k, table, table)
    yield "rotary_one", lambda: Op.rotary_one(q, table, table)
    yield "rotary interleaved, part", lambda: Op.rotary(q, k, table[..., :32], table[..., :32], 64, True)
    yield "rotary_packed", lambda: Op.rotary_packed(t(2, 8, 48 * 128), table, table, 32, 8)
    yield "rotary_packed_backward", lambda: Op.rotary_packed_backward(q, k, k, table, table)
    for activation in ("silu", "gelu_tanh", "gelu", "relu2", "relu", "sigmoid"):
        yield f"gated_mlp {activation}", lambda a=activation: Op.gated_mlp_packed(t(8, 2 * 14336), a)
        yield f"gated_mlp_backward {activation}", lambda a=activation: Op.gated_mlp_packed_backward(t(8, 14336), t(8, 2 * 14336), a, True)
    labels, start = torch.zeros(8, dtype=torch.int64), torch.tensor(0)
    for cap in (0.0, 30.0):
        yield f"head_partials {cap}", lambda cap=cap: Op.head_partials(t(8, 64), t(32000, 64), labels, start, 1.0, cap)
        yield (
            f"linear_cross_entropy {cap}",
            lambda cap=cap: Op.linear_cross_entropy(t(8, 64), t(32000, 64), labels, torch.tensor(8.0), softcap=cap),
        )
    one, wide = torch.tensor(1.0), torch.zeros(5008)
    how = (0.9, 0.95, 1e-8, 0.1)
    p = torch.zeros(5008, dtype=dtype)
    yield "adamw, aligned, no master", lambda: Op.adamw(p, p.clone(), p.clone(), p.clone(), None, one, one, one, one, None, *how)
    yield "adamw, aligned", lambda: Op.adamw(p, p, wide, wide, wide.clone(), one, one, one, one, None, *how)
    if dtype == torch.bfloat16:
        yield "adamw, rounding by chance", lambda: Op.adamw(p, p, wide, wide, None, one, one, None, None, torch.tensor(3), *how)
    yield from of_many(dtype)
    experts = torch.zeros(64, 2, dtype=torch.int64)
    for score in ("softmax", "sigmoid"):
        yield f"moe_route {score}", lambda s=score: Op.moe_route(t(64, 128), None, 8, s, True)
        yield f"moe_route_backward {score}", lambda s=score: Op.moe_route_backward(t(64, 2), t(64, 128), experts, s, True, 1.0)
    position, ends = torch.zeros(64, 2, dtype=torch.int32), torch.full((8,), 128, dtype=torch.int32)
    yield "moe_permute", lambda: Op.moe_permute(t(64, 2048), experts, 8)
    yield "moe_order", lambda: Op.moe_order(experts.flatten(), 8)
    yield "moe_unpermute", lambda: Op.moe_unpermute(t(128, 2048), position, t(64, 2))
    yield "moe_unpermute_backward", lambda: Op.moe_unpermute_backward(t(64, 2048), t(128, 2048), position, t(64, 2))
    yield "grouped_matmul", lambda: Op.grouped_matmul(t(2048, 2048), t(8, 4096, 2048).transpose(1, 2), ends)
    yield "grouped_matmul_backward", lambda: Op.grouped_matmul_backward(t(2048, 512), t(2048, 2048), t(8, 2048, 512), ends, [True, True])
    seed, rows = torch.tensor(7), torch.arange(512)
    yield "keep_bits", lambda: Op.keep_bits(seed, rows, 1024, 0.1)
    yield "random_bits", lambda: Op.random_bits(seed, rows, 1024, 0)
    for e, s, causal, padding in ((64, 1024, True, False), (64, 512, False, True), (96, 197, False, False), (128, 1024, True, False)):
        q, k = t(2, 4, s, e), t(2, 2, s, e)
        places = torch.arange(2), torch.arange(4), torch.arange(s)
        mask = torch.ones(2, 1, 1, s, dtype=torch.bool) if padding else None
        drawn = (seed, *places)
        how = ([2, 4, s, s], 0.1, causal, 0.125)
        label = f"dropout_attention {e}{' causal' * causal}{' padding' * padding}"
        yield label, lambda a=(q, k, k, mask, *drawn, *how): Op.dropout_attention(*a)
        lse = torch.zeros(2, 4, s)
        yield f"{label} backward", lambda a=(q, q, k, k, mask, *drawn, q, lse, *how): Op.dropout_attention_backward(*a)
    if dtype == torch.bfloat16:
        for kind in ("e4m3", "e5m2"):
            yield f"quantise {kind}", lambda kind=kind: Op.quantise(t(256, 256), None, kind, True)
            for turn in (True, False):
                yield f"fp8_cast {kind} {turn}", lambda kind=kind, turn=turn: Op.fp8_cast(t(256, 256), torch.tensor(1.0), kind, turn)
            yield f"quantise {kind}, delayed", lambda kind=kind: Op.quantise(t(256, 256), torch.tensor(1.0), kind, False)


def of_many(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    one = torch.ones(())
    for n, how in ((4096, "aligned"), (4099, "odd")):
        x, master = torch.zeros(n, dtype=dtype), torch.zeros(n)
        (alone,) = many.Table().of([(0, (x, x, x, x, one, None))])
        yield f"not finite, {how}", lambda t=alone: many.not_finite([t], many.GRAD, one)
        yield f"squares, {how}", lambda t=alone: many.squares([t], many.GRAD)
        yield f"scale, {how}", lambda t=alone: many.scale_([t], many.GRAD, one)
        yield f"adam, {how}", lambda t=alone: many.adam_(t, many.Rates(0.1, 0.9, 0.99, 1e-8, 0.1, False), one)
        yield f"adamw, its rate there, {how}", lambda t=alone: many.adam_(t, many.Rates(one, 0.9, 0.99, 1e-8, 0.1, True), one)
        if dtype == torch.bfloat16:
            (both,) = many.Table().of([(0, (x, x, master, master, one, master))])
            yield f"adamw, masters, {how}", lambda t=both: many.adam_(t, many.Rates(0.1, 0.9, 0.99, 1e-8, 0.1, True), one)


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def spilled(cubin: bytes) -> int:
    """Bytes of local memory that a kernel's threads use."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        found = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True).stdout
    stack = re.search(r"STACK:(\d+)", found)
    return int(stack.group(1)) if stack else -1


def main(capability: int = 90) -> int:
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Driver(capability))
    backend.fused = lambda x: True  # type: ignore[assignment]
    compiled: dict[str, tuple[Any, float]] = {}

    def compile_only(self: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            begin = time.perf_counter()
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            compiled[kernel.hash] = kernel, time.perf_counter() - begin

        return launch

    JITFunction.__getitem__ = compile_only
    failures = 0
    for dtype in (torch.bfloat16, torch.float32):
        for name, call in calls(dtype):
            compiled.clear()
            try:
                call()
            except Exception as error:
                failures += 1
                print(f"{name} {dtype}: doesn't compile\n{type(error).__name__}: {error}", flush=True)
                continue
            for kernel, seconds in compiled.values():
                m = kernel.metadata
                width = max(map(int, re.findall(r"(?:ld|st)\.global[.\w:]*\.v([248])", kernel.asm["ptx"])), default=1)
                if "aligned" in name and width < 4:
                    failures += 1
                    print(f"{name} {dtype}: accesses of {4 * width} bytes, expected 16")
                print(f"{name:34} {str(dtype)[6:]:9} {m.name:16} spills {spilled(kernel.asm['cubin']):5d}  shared {m.shared:6d}  "
                      f"warps {m.num_warps:2d}  vectors of {width}  {seconds:5.1f} s", flush=True)  # fmt: skip
    print("all compiled" if not failures else f"{failures} failed")
    return failures


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
