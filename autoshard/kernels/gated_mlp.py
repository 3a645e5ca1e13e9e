"""The gated product of an MLP, from gate and up as two tensors, or packed as two halves of one.

forward:   y = act(g) · u
backward:  dg = dy · u · act'(g),   du = dy · act(g)          in one pass, the activation made again from g

act: silu, gelu_tanh, gelu (exact), relu2 (max(x, 0)²), relu, sigmoid. Packed, gate is the first half, or the second (`gate_first=False`).
Computed wide and rounded once; a model that multiplies in bf16 rounds act(g) before.

Tolerance: one rounding of the dtype, and of float32 a few operations and an exponential (2 ulp).
"""

# shapes: gate, up, y [… f];  packed [… 2f]

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend

TILE = 1024  # elements that a program holds
WARPS = 4

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    wide = backend.work(torch.promote_types(gate.dtype, up.dtype))
    return (_activation(activation)(gate.to(wide)) * up.to(wide)).to(torch.promote_types(gate.dtype, up.dtype))


def packed_reference(packed: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    return reference(*_halves(packed, gate_first), activation)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"gated_mlp: found the activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """gate and up, as views."""
    if packed.shape[-1] % 2:
        raise ValueError(f"gated_mlp: found {packed.shape[-1]} columns; expected an even number, gate and up side by side")
    one, two = packed.chunk(2, -1) if packed.shape[-1] else (packed, packed)
    return (one, two) if gate_first else (two, one)


def _slope(x: Tensor, name: str) -> Tensor:
    """act'(x)."""
    if name == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if name == "gelu_tanh":
        x, c = x.clamp(-40, 40), math.sqrt(8 / math.pi)  # beyond, its parts would be 0 · inf
        s = torch.sigmoid(c * (x + 0.044715 * x**3))
        return s + x * s * (1 - s) * c * (1 + 3 * 0.044715 * x * x)
    if name == "gelu":
        x = x.clamp(-40, 40)
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if name == "relu2":
        return 2 * F.relu(x)
    if name == "relu":
        return (x > 0).to(x.dtype)
    s = torch.sigmoid(x)
    return s * (1 - s)


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if not (backend.fused(gate) and applies(gate, up, activation)):
        return reference(gate, up, activation).contiguous()
    from .device import gated_mlp as device

    _activation(activation)
    g, u, f = backend.rows(gate), backend.rows(up), gate.shape[-1]
    y = gate.new_empty(gate.shape)
    count, cols, tile = g.shape[0], min(TILE, backend.power(f)), _rows(g.shape[0], f)
    device.forward[(backend.blocks(count, tile), backend.blocks(f, cols))](
        g,
        u,
        y,
        count,
        f,
        g.stride(0),
        u.stride(0),
        KIND=activation,
        ACC=backend.accumulator(gate.dtype),
        ROWS=tile,
        COLS=cols,
        num_warps=WARPS,
    )
    return y


def _backward(grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    """Write the gradients into `dgate` and `dup`: dense, or the halves of one tensor."""
    if not (backend.fused(gate) and applies(gate, up, activation)):
        wide = backend.work(gate.dtype)
        g, u, dy = gate.to(wide), up.to(wide), grad.to(wide)
        dgate.copy_(dy * u * _slope(g, activation))
        dup.copy_(dy * _activation(activation)(g))
        return
    from .device import gated_mlp as device

    dy, g, u, f = backend.rows(grad), backend.rows(gate), backend.rows(up), gate.shape[-1]
    count, cols, tile = g.shape[0], min(TILE, backend.power(f)), _rows(g.shape[0], f)
    out_row = dgate.stride(-2) if dgate.dim() > 1 else f
    device.backward[(backend.blocks(count, tile), backend.blocks(f, cols))](
        dy, g, u, dgate, dup, count, f, dy.stride(0), g.stride(0), u.stride(0), out_row, KIND=activation,
        ACC=backend.accumulator(gate.dtype), ROWS=tile, COLS=cols, num_warps=WARPS,
    )  # fmt: skip


def _rows(count: int, f: int) -> int:
    """Of a program's tile: several, where they are short."""
    return max(1, min(backend.power(count), TILE // backend.power(f)))


@torch.library.custom_op("autoshard::gated_mlp", mutates_args=())
def gated_mlp(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _forward(gate, up, activation)


@gated_mlp.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _activation(activation)
    return torch.empty_like(gate * up, memory_format=torch.contiguous_format)


@torch.library.custom_op("autoshard::gated_mlp_backward", mutates_args=())
def gated_mlp_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(grad.shape), up.new_empty(grad.shape)
    _backward(grad, gate, up, dgate, dup, activation)
    return dgate, dup


@gated_mlp_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(grad.shape), up.new_empty(grad.shape)


@torch.library.custom_op("autoshard::gated_mlp_packed", mutates_args=())
def gated_mlp_packed(packed: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    return _forward(*_halves(packed, gate_first), activation)


@gated_mlp_packed.register_fake
def _(packed: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    _activation(activation)
    return packed.new_empty(_halves(packed, gate_first)[0].shape)


@torch.library.custom_op("autoshard::gated_mlp_packed_backward", mutates_args=())
def gated_mlp_packed_backward(grad: Tensor, packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    out = packed.new_empty(packed.shape)
    _backward(grad, *_halves(packed, gate_first), *_halves(out, gate_first), activation)
    return out


@gated_mlp_packed_backward.register_fake
def _(grad: Tensor, packed: Tensor, activation: str, gate_first: bool) -> Tensor:
    return packed.new_empty(packed.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.autoshard.gated_mlp_backward(grad, gate, up, ctx.activation)
    return dgate.sum_to_size(gate.shape), dup.sum_to_size(up.shape), None


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, *ctx.how = inputs
    ctx.save_for_backward(packed)


def _packed_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.autoshard.gated_mlp_packed_backward(grad, *ctx.saved_tensors, *ctx.how), None, None


gated_mlp.register_autograd(_grad, setup_context=_context)
gated_mlp_packed.register_autograd(_packed_grad, setup_context=_packed_context)


def applies(gate: Tensor, up: Tensor, activation: str, capability: backend.Capability = None) -> bool:
    return (
        activation in ACTIVATIONS
        and gate.dtype == up.dtype
        and gate.dtype in backend.FLOATING
        and gate.shape == up.shape
        and gate.numel() > 0
    )


def packed_applies(packed: Tensor, activation: str, gate_first: bool = True, capability: backend.Capability = None) -> bool:
    return packed.shape[-1] % 2 == 0 and applies(*_halves(packed, gate_first), activation)


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Forward reads two and writes one, backward reads three and writes two."""
    elements = math.prod(shapes[0])
    return 25.0 * elements, 8.0 * elements * itemsize


def packed_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    flops, moved = cost(shapes[0], itemsize=itemsize)
    return flops / 2, moved / 2
