"""Adam and AdamW of all shards, and what is asked of all gradients, in a few launches: `kernels.many`, on torch's own state.

`FusedAdam` steps what an inner torch.optim.Adam or AdamW would: `state[p]` holds "step", "exp_avg" and "exp_avg_sq" as torch makes them
with fused=True (the step on the device, moments of the stepped tensor's dtype), so that state dicts, checkpoints and schedulers see no
difference, and a step of torch's may follow one of these. `Gradients` takes norms and scales. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from ..kernels import many

STEPPED = (optim.Adam, optim.AdamW)


def steps(cls: type[optim.Optimizer], params: Sequence[nn.Parameter], options: Mapping[str, Any]) -> bool:
    """Whether FusedAdam takes these on. What is said about torch's implementation stands: foreach, capturable, or fused=False."""
    said = options.get("foreach"), options.get("capturable"), options.get("differentiable"), options.get("fused") is False
    return cls in STEPPED and bool(params) and all(map(many.applies, params)) and not any(said)


class FusedAdam:
    """Steps in the place of `inner`. `low`: the parameter that each master (by id) stands for."""

    def __init__(self, inner: optim.Optimizer, low: Mapping[int, nn.Parameter]) -> None:
        self.inner, self.low = inner, low
        self.table = many.Table()
        self.counts: list[Tensor] = []

    def launches(self) -> list[many.Launch] | None:
        """Of what has a gradient; None where a group asks for what isn't computed here, or a gradient is of another kind."""
        given: list[tuple[Hashable, many.Row]] = []
        self.counts = []
        for i, group in enumerate(self.inner.param_groups):
            if not _plain(group):
                return None
            for stepped in group["params"]:
                param = self.low.get(id(stepped), stepped)
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    return None
                if not grad.is_contiguous():
                    param.grad = grad = grad.contiguous()
                state = self._state(stepped)
                self.counts.append(state["step"])
                master = None if stepped is param else stepped
                given.append((i, (param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], master)))
        return self.table.of(given)

    def _state(self, stepped: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.inner.state[stepped]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=stepped.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(stepped), torch.zeros_like(stepped)
        step = state["step"]
        if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device.type != stepped.device.type:  # another's
            state["step"] = torch.as_tensor(step, dtype=torch.float32).to(stepped.device, non_blocking=True)
        return state

    def step(self, launches: Sequence[many.Launch], skip: Tensor) -> None:
        """`skip`: 1 leaves all as it is, 0 doesn't."""
        if self.counts:
            torch._foreach_add_(self.counts, [1.0 - skip] * len(self.counts))  # a list: a number alone would be read
        for launch in launches:
            group = self.inner.param_groups[launch.kind]  # type: ignore[call-overload]
            many.adam_(launch, _rates(group, type(self.inner) is optim.AdamW), skip)


def _plain(group: Mapping[str, Any]) -> bool:
    odd = any(group.get(key) for key in ("amsgrad", "maximize", "capturable", "differentiable", "foreach"))
    return bool(group.get("fused")) and not odd and not any(isinstance(beta, Tensor) for beta in group["betas"])


def _rates(group: Mapping[str, Any], decoupled: bool) -> many.Rates:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":  # an argument of the launch
        lr = float(lr)
    decoupled = bool(group.get("decoupled_weight_decay", decoupled))
    return many.Rates(lr, float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]), decoupled)


class Gradients:
    """Sums and scales of many gradients."""

    def __init__(self) -> None:
        self.table = many.Table()

    def launches(self, grads: Sequence[tuple[bool, Tensor]]) -> list[many.Launch] | None:
        """None where the kernels don't apply to all of them, or nothing is in them. The flag tells them apart in `squares`."""
        if not grads or not all(many.applies(grad) for _, grad in grads):
            return None
        return self.table.of([(counts, (grad,)) for counts, grad in grads]) or None

    def squares(self, launches: Sequence[many.Launch]) -> Tensor:
        """The sum over those whose flag is set; of the others only whether they are finite: nan if they aren't."""
        sums = [total if launch.kind else total * 0.0 for launch, total in zip(launches, many.squares(launches, 0), strict=True)]
        return torch.stack(sums).sum()

    def scale_(self, launches: Sequence[many.Launch], coefficient: Tensor) -> None:
        many.scale_(launches, 0, coefficient)


def not_finite(launches: Sequence[many.Launch], found: Tensor) -> None:
    """`found` becomes 1 where a gradient of FusedAdam's launches isn't finite."""
    many.not_finite(launches, many.GRAD, found)
