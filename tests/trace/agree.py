"""The invariant of capture: `Captured.run` equals the plain model in float64 — loss, every gradient, every buffer, the random stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoshard.trace.capture import Captured, capture
from autoshard.trace.export import loss_of
from autoshard.trace.promote import promote_float32


def bind(captured: Captured, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every source's tensor by value name: fresh leaves for parameters, copies of buffers, the inputs."""
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    tensors = {k: v.clone() for k, v in inputs.items()}
    for value in captured.graph.sources("param", "buffer"):
        tensors[value.name] = own[value.path].detach().clone().requires_grad_(value.role == "param" and value.grad)
    return tensors


def run_captured(captured: Captured, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss, gradients by parameter path, and updated buffers by path."""
    values = captured.run(bind(captured, model, inputs))
    trained = [v for v in captured.graph.sources("param") if v.grad]
    found = torch.autograd.grad(values[captured.graph.loss], [values[v.name] for v in trained], allow_unused=True)
    grads = {v.path: g for v, g in zip(trained, found, strict=True) if g is not None}
    return values[captured.graph.loss].detach(), grads, {path: values[name] for path, name in captured.graph.updates.items()}


def assert_agrees(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float = 1e-12,
) -> Captured:
    """Capture `model` (in float64) and compare one step of it with one step of the plain model."""
    kwargs = kwargs or {}
    with promote_float32():
        captured = capture(model, args, kwargs, loss)
        torch.manual_seed(7)
        found, grads, updates = run_captured(captured, model, captured.flatten(args, kwargs))
        state = torch.get_rng_state()
        before = {path: b.clone() for path, b in model.named_buffers()}
        model.zero_grad()
        torch.manual_seed(7)
        output = model(*args, **kwargs)
        expected = (loss or loss_of)(output)
        expected.backward()
    assert torch.equal(state, torch.get_rng_state()), "the random stream was left elsewhere"
    close("loss", found, expected.detach(), tolerance)
    plain = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in plain.values())
    for path in plain.keys() | grads.keys():
        zero = torch.zeros_like(plain.get(path, grads.get(path)))
        # a gradient that is zero but for rounding (a key bias under softmax) has no digits of its own
        close(path, grads.get(path, zero), plain.get(path, zero), tolerance, at_least=1e-3 * largest)
    changed = {path for path, b in model.named_buffers() if not torch.equal(b, before[path])}
    assert changed <= set(updates), f"updates missing: {changed - set(updates)}"
    for path, b in model.named_buffers():
        if path in updates:
            close(path, updates[path].detach(), b, tolerance)
    return captured


def close(name: str, found: Tensor, expected: Tensor, tolerance: float, at_least: float = 1e-300) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, (name, found.shape, expected.shape, found.dtype, expected.dtype)
    error = (found - expected).abs().max().item() / max(expected.abs().max().item(), at_least)
    assert error <= tolerance, f"{name} is off by {error:.2e} (relative)"
