"""Triton of `adamw`: one pass over a flat shard. Scalars that change from step to step are read from the device."""

# shapes: param, grad, m, v, master [n], dense; lr, step, clip, skip, seed: one number each

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def correction(x):
    """1 - exp(x) for x < 0, with float32's digits near 0 too."""
    near = -x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5))))
    return tl.where(x > -0.1, near, 1.0 - tl.exp(x))


@triton.jit
def update(
    param, grad, m, v, master, lr, step, clip, skip, seed, n, beta1, beta2, rest1, rest2, log1, log2, eps, decay, BLOCK: tl.constexpr
):  # fmt: skip
    if skip is not None:
        if tl.load(skip) != 0:
            return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < n
    rate = tl.load(lr).to(tl.float32)
    count = tl.load(step).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if clip is not None:
        g *= tl.load(clip).to(tl.float32)
    if master is not None:
        p = tl.load(master + at, mask=inside, other=0.0)
    else:
        p = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    first = beta1 * tl.load(m + at, mask=inside, other=0.0).to(tl.float32) + rest1 * g
    second = beta2 * tl.load(v + at, mask=inside, other=0.0).to(tl.float32) + rest2 * g * g
    p -= rate * decay * p
    size = rate / correction(count * log1)
    p -= size * first / (tl.sqrt(second / correction(count * log2)) + eps)
    tl.store(m + at, first.to(m.dtype.element_ty), mask=inside)
    tl.store(v + at, second.to(v.dtype.element_ty), mask=inside)
    if master is not None:
        tl.store(master + at, p, mask=inside)
    if seed is not None:  # round up with the probability of what would be cut off
        high = (start >> 31).to(tl.int32)
        noise = tl.randint(tl.load(seed) + high * 7919, (at & 0x7FFFFFFF).to(tl.int32)).to(tl.uint32, bitcast=True)
        bits = p.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
        p = (bits & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    tl.store(param + at, p.to(param.dtype.element_ty), mask=inside)
