"""Optimizers on shards: any elementwise torch optimizer, with float32 masters for bfloat16 and float16 parameters.

In: an optimizer class, named local shards, options. Out: a `torch.optim.Optimizer` whose `param_groups` are the wrapped one's, so
that learning rate schedulers work on it. An optimizer that looks at a whole tensor (its rows, its norm, its inverse root) would
compute something else on shards, and is refused. A step whose gradients aren't finite on some rank is left out on all of them: on the
device, where what steps can leave a step out there (`fused.FusedAdam`, and torch's fused optimizers); else the host waits for the answer.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from ..errors import OptimizerError
from . import fused
from .skipped import Skipped

ELEMENTWISE = (
    optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adamax, optim.NAdam, optim.RAdam, optim.Rprop, optim.ASGD,
    optim.Adadelta,
)  # fmt: skip
"""Optimizers in which an element's step depends on that element's own history alone."""

WHOLE = {
    "Adafactor": "keeps row and column means of whole matrices, and scales by the norm of a whole parameter",
    "LAMB": "scales each step by the norm of a whole parameter",
    "LARS": "scales each step by the norm of a whole parameter",
    "LBFGS": "takes inner products over all parameters",
    "Muon": "orthogonalises whole matrices",
    "Shampoo": "takes inverse roots of whole matrices",
    "SOAP": "rotates whole matrices into their eigenbasis",
    "SparseAdam": "expects sparse gradients",
}


HOW = ("fused", "foreach", "capturable")
"""Options that say how a step is computed, and nothing of what: a run's own, whatever a loaded state was computed by."""


def check_elementwise(cls: type[optim.Optimizer]) -> None:
    """Raise OptimizerError unless the class may run on shards: a subclass may do anything, so it has to say so itself."""
    if not isinstance(cls, type):
        raise OptimizerError(
            f"an optimizer's class is expected, found one of {type(cls).__name__}", hint="as optimizer(torch.optim.AdamW, lr=1e-3)"
        )
    if cls in ELEMENTWISE or cls.__dict__.get("elementwise") is True:
        return
    why = next((WHOLE[c.__name__] for c in cls.__mro__ if c.__name__ in WHOLE), None)
    raise OptimizerError(
        f"{cls.__name__} {why}, which a shard doesn't have" if why else f"{cls.__name__} is not known to work element by element",
        hint=f"use one of {', '.join(c.__name__ for c in ELEMENTWISE)}, or set `elementwise = True` on a class that is",
    )


class ShardedOptimizer(optim.Optimizer):
    """Steps local shards. `groups`: (name pattern, options) pairs; `names`: all of the model's names that a pattern may mean;
    `masters`: whether parameters of low precision are stepped in float32 (or as they are: less memory, and small steps get lost);
    `reduce`: (tensor, "max") over all ranks, which makes `step` a collective call; `device`: where it talks."""

    def __init__(
        self,
        cls: type[optim.Optimizer],
        named: Sequence[tuple[str, nn.Parameter]],
        groups: Sequence[tuple[str, dict[str, Any]]] = (),
        names: Sequence[str] = (),
        masters: bool = True,
        reduce: Callable[[Tensor, str], Tensor] = lambda tensor, op: tensor,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        check_elementwise(cls)
        self.named, self.reduce = list(named), reduce
        self.device = device or next((p.device for _, p in named), torch.device("cpu"))
        low = [(name, p) for name, p in named if masters and p.dtype in (torch.bfloat16, torch.float16)]
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in low}
        ours = fused.steps(cls, [p for _, p in named], options)
        if ours or _fusable(cls, [p for _, p in named], options):
            options["fused"] = True
        self.inner = cls(_groups(self.named, self.masters, groups, names), **options)
        for pattern, mine in groups:
            unknown = [key for key in mine if key not in self.inner.defaults]
            if unknown:
                raise OptimizerError(
                    f"{cls.__name__} has no {unknown[0]!r}, which the group {pattern!r} sets",
                    hint=f"it has {', '.join(self.inner.defaults)}",
                )
        self.kernel = fused.FusedAdam(self.inner, {id(self.masters[name]): p for name, p in low}) if ours else None
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.norm: Tensor | None = None
        """The gradients' norm over all ranks, if it was taken since they last changed."""
        self.left_out = Skipped()
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @property
    def skipped(self) -> int:
        """Steps that were left out because a gradient wasn't finite. (Waits for the device.)"""
        return self.left_out.total()

    @property
    def tells(self) -> bool:
        """Whether this process says so (one of them does)."""
        return self.left_out.tells

    @tells.setter
    def tells(self, tells: bool) -> None:
        self.left_out.tells = tells

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.left_out.look()
        norm, self.norm = self.norm, None
        launches = None if self.kernel is None else self.kernel.launches()
        skip = self._not_finite(launches) if norm is None else torch.isfinite(norm).logical_not().float()
        if self.kernel is not None and launches is not None:
            self.kernel.step(launches, skip)
            self.left_out.add(skip)
        elif self._leaves_out():
            self.inner.found_inf = skip  # type: ignore[attr-defined]
            try:
                self._step_inner()
            finally:
                del self.inner.found_inf  # type: ignore[attr-defined]
            self.left_out.add(skip)
        else:
            left_out = bool(skip)
            if not left_out:
                self._step_inner()
            self.left_out.add(left_out)
        return loss

    def _not_finite(self, launches: Sequence[Any] | None) -> Tensor:
        """1 where a gradient on some rank isn't finite, else 0: one pass that only reads them, and one number to agree on."""
        found = torch.zeros((), dtype=torch.float32, device=self.device)
        if launches is not None:
            fused.not_finite(launches, found)
        else:
            grads = [p.grad for _, p in self.named if p.grad is not None and p.grad.numel()]
            if grads:  # the largest, as a sum of squares can overflow
                found.copy_(torch.isfinite(torch.nn.utils.get_total_norm(grads, float("inf"))).logical_not())
        return self.reduce(found, "max")

    def _leaves_out(self) -> bool:
        """Whether torch's kernel takes a number on the device that says whether to step. (SGD's first step with momentum would leave
        buffers that nobody has written.)"""
        if not getattr(self.inner, "_step_supports_amp_scaling", False):
            return False
        state = self.inner.state

        def ready(group: dict[str, Any]) -> bool:
            new = group.get("momentum") and not any(state.get(p, {}).get("momentum_buffer") is not None for p in group["params"])
            return bool(group.get("fused")) and not (new and group["params"])

        return all(map(ready, self.inner.param_groups))

    def _step_inner(self) -> None:
        low = [(self.masters[name], param) for name, param in self.named if name in self.masters]
        for master, param in low:
            master.grad = None if param.grad is None else param.grad.float()
        self.inner.step()
        if low:
            torch._foreach_copy_([param for _, param in low], [master for master, _ in low])
        for master, _ in low:
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for _, param in self.named:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the parameters' values into the masters, after something else wrote the parameters."""
        for name, param in self.named:
            if name in self.masters:
                self.masters[name].copy_(param)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, of local shards, and the masters by name."""
        self.left_out.look()
        return {**self.inner.state_dict(), "masters": {name: m.detach() for name, m in self.masters.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        masters = state_dict.get("masters", {})
        if set(masters) != set(self.masters):
            raise OptimizerError(f"the state holds masters of {sorted(masters)[:5]}, expected {sorted(self.masters)[:5]}")
        saved = {k: v for k, v in state_dict.items() if k != "masters"}
        if len(saved["param_groups"]) == len(self.param_groups):
            pairs = zip(saved["param_groups"], self.param_groups, strict=True)
            saved["param_groups"] = [{**old, **{key: mine[key] for key in HOW if key in mine}} for old, mine in pairs]
        self.inner.load_state_dict(saved)
        for name, param in self.named:
            if name in self.masters:
                self.masters[name].copy_(masters[name])
                param.copy_(masters[name])
        self._share()


def _fusable(cls: type[optim.Optimizer], params: Sequence[nn.Parameter], options: dict[str, Any]) -> bool:
    """Whether torch has one kernel for all shards; anything said about how stands. (Adagrad's is one of the CPU alone.)"""
    known = "fused" in inspect.signature(cls).parameters and not issubclass(cls, optim.Adagrad)
    return known and bool(params) and all(p.is_cuda for p in params) and not {*HOW, "differentiable"} & options.keys()


def _groups(
    named: Sequence[tuple[str, nn.Parameter]],
    masters: dict[str, nn.Parameter],
    groups: Sequence[tuple[str, dict[str, Any]]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """torch param groups, one per pattern and one for the rest; the same on every rank, even where a rank has no parameter of it."""
    for pattern, _ in groups:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise OptimizerError(f"no parameter's name matches {pattern!r}", hint=f"names are like {', '.join(names[:3])}")
    made: list[dict[str, Any]] = [{"params": [], **options} for _, options in groups]
    rest: dict[str, Any] = {"params": []}
    for name, param in named:
        path = name.rpartition(":")[2]
        into = next((made[i] for i, (pattern, _) in enumerate(groups) if fnmatch.fnmatchcase(path, pattern)), rest)
        into["params"].append(masters.get(name, param))
    return [*made, rest]
