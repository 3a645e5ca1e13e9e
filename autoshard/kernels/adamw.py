"""AdamW on a flat shard, in place, in one launch: bf16 parameters with float32 masters, or with stochastic rounding, or float32.

g' = clip · g,   m ← β₁ m + (1 - β₁) g',   v ← β₂ v + (1 - β₂) g'²
p ← p - lr λ p - lr / (1 - β₁ᵗ) · m / (√(v / (1 - β₂ᵗ)) + ε)

What changes from step to step is on the device, so that nothing waits for the host and a CUDA graph can replay it: `lr`; `step`, the
number t of this step, counted from 1; `clip`, the coefficient of a clipped norm; `skip`: not 0 leaves everything as it was (a step whose
gradients aren't finite; then don't count it, `step.add_(skip == 0)`). With `master` the parameter is its rounding. `seed` (bf16 without
master): p is rounded up or down by chance, right on average, with other numbers for another seed; None: to nearest.

Tolerance: float32 throughout: a few ulp of the update and one rounding of p. float64 runs the reference. No gradient: it is an optimizer.
"""

# shapes: param, grad, exp_avg, exp_avg_sq, master [n], dense, of their own dtypes; lr, step, clip, skip, seed: one number each

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backend

BLOCK = 1024  # elements of a program: 16 bytes of bf16 for each of its threads
MASTER_BLOCK = 512  # with a master: 16 bytes of float32 for each, so that both lie in threads alike
WARPS = 4


@torch.no_grad()
def reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, lr: Tensor, step: Tensor,
    clip: Tensor | None, skip: Tensor | None, seed: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    whole = param if master is None else master
    wide = backend.work(whole.dtype)
    g, p, m, v = (x.to(wide) for x in (grad, whole, exp_avg, exp_avg_sq))
    g = g if clip is None else g * clip.to(wide)
    t, rate = step.double(), lr.to(wide)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    p = p - rate * weight_decay * p
    one, two = ((-torch.expm1(t * math.log(beta))).to(wide) if beta > 0 else torch.ones_like(rate) for beta in (beta1, beta2))
    p = p - rate / one * m / ((v / two).sqrt() + eps)
    stored = p if seed is None else _rounded_by_chance(p, seed)
    for old, new in ((exp_avg, m), (exp_avg_sq, v), (master, p), (param, stored)):
        if old is not None:
            new = new.to(old.dtype)
            old.copy_(new if skip is None else torch.where(skip != 0, old, new))


def _rounded_by_chance(p: Tensor, seed: Tensor) -> Tensor:
    generator = torch.Generator(p.device).manual_seed(int(seed))
    noise = torch.randint(0, 1 << 16, p.shape, generator=generator, device=p.device, dtype=torch.int32)
    return ((p.float().view(torch.int32) + noise) & -65536).view(torch.float32)


@torch.library.custom_op("autoshard::adamw", mutates_args=("param", "exp_avg", "exp_avg_sq", "master"))
def adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, lr: Tensor, step: Tensor,
    clip: Tensor | None, skip: Tensor | None, seed: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    _check(param, grad, exp_avg, exp_avg_sq, master, seed, (beta1, beta2))
    if not (backend.fused(param) and applies(param, grad, exp_avg, exp_avg_sq, master, lr, step, clip, skip, seed)):
        return reference(param, grad, exp_avg, exp_avg_sq, master, lr, step, clip, skip, seed, beta1, beta2, eps, weight_decay)
    from .device import adamw as device

    n, block = param.numel(), BLOCK if master is None else MASTER_BLOCK
    log1, log2 = (math.log(beta) if beta > 0 else -1e30 for beta in (beta1, beta2))
    device.update[(backend.blocks(n, block),)](
        param, grad, exp_avg, exp_avg_sq, master, lr, step, clip, skip, seed, n, beta1, beta2, 1 - beta1, 1 - beta2, log1, log2, eps,
        weight_decay, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


@adamw.register_fake
def _(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, lr: Tensor, step: Tensor,
    clip: Tensor | None, skip: Tensor | None, seed: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    return None


def _check(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, master: Tensor | None, seed: Tensor | None, betas: tuple[float, float]
) -> None:  # fmt: skip
    shapes = [tuple(x.shape) for x in (param, grad, m, v, master) if x is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"adamw: found a parameter, gradient, moments and master of {shapes}; expected one shape")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw: found betas {betas}; expected numbers from 0 to below 1")
    if seed is not None and (param.dtype != torch.bfloat16 or master is not None):
        raise ValueError(
            f"adamw: found a seed for stochastic rounding and a {param.dtype} parameter{' with a master' if master is not None else ''}; "
            "it is for bfloat16 without a master: leave the seed out"
        )


def applies(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    *_: object,
    capability: backend.Capability = None,
) -> bool:
    tensors = [x for x in (param, grad, exp_avg, exp_avg_sq, master) if x is not None]
    return (
        param.numel() > 0
        and all(x.is_contiguous() and x.dtype in (torch.float32, *backend.HALF) for x in tensors)
        and (master is None or master.dtype == torch.float32)
    )


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Reads the gradient; reads and writes the parameter, two float32 moments and, if there is one, a float32 master."""
    n = math.prod(shapes[0])
    states = 6 if len(shapes) > 4 and math.prod(shapes[4]) == n else 4
    return 15.0 * n, n * (3.0 * itemsize + 4.0 * states)
