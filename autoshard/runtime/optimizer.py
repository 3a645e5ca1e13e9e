"""Optimizers on shards: any elementwise torch optimizer, with float32 masters for bfloat16 and float16 parameters.

In: an optimizer class, named local shards, options. Out: a `torch.optim.Optimizer` whose `param_groups` are the wrapped one's, so
that learning rate schedulers work on it. An optimizer that looks at a whole tensor (its rows, its norm, its inverse root) would
compute something else on shards, and is refused. A step whose gradients aren't finite on some rank is left out on all of them.
"""

from __future__ import annotations

import fnmatch
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from ..errors import OptimizerError

log = logging.getLogger("autoshard")

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
    `reduce`: (tensor, "max") over all ranks, which makes `step` a collective call."""

    def __init__(
        self,
        cls: type[optim.Optimizer],
        named: Sequence[tuple[str, nn.Parameter]],
        groups: Sequence[tuple[str, dict[str, Any]]] = (),
        names: Sequence[str] = (),
        masters: bool = True,
        reduce: Callable[[Tensor, str], Tensor] = lambda tensor, op: tensor,
        **options: Any,
    ) -> None:
        check_elementwise(cls)
        self.named, self.reduce = list(named), reduce
        low = [(name, p) for name, p in named if masters and p.dtype in (torch.bfloat16, torch.float16)]
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in low}
        if named and "fused" in inspect.signature(cls).parameters and all(p.is_cuda for _, p in named):
            # one kernel for all shards; anything said about it stands
            if not {"fused", "foreach", "capturable", "differentiable"} & options.keys():
                options["fused"] = True
        self.inner = cls(_groups(self.named, self.masters, groups, names), **options)
        for pattern, mine in groups:
            unknown = [key for key in mine if key not in self.inner.defaults]
            if unknown:
                raise OptimizerError(
                    f"{cls.__name__} has no {unknown[0]!r}, which the group {pattern!r} sets",
                    hint=f"it has {', '.join(self.inner.defaults)}",
                )
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.norm: Tensor | None = None
        """The gradients' norm over all ranks, if it was taken since they last changed."""
        self.skipped = 0
        """Steps that were left out because a gradient wasn't finite."""
        self.tells = True
        """Whether this process says so (one of them does)."""
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm, self.norm = self.norm, None
        if not (self._finite() if norm is None else bool(torch.isfinite(norm))):
            self.skipped += 1
            if self.tells:
                log.warning("a gradient isn't finite: the step is left out on every rank (%d so far)", self.skipped)
            return loss
        for name, param in self.named:
            if name in self.masters:
                self.masters[name].grad = None if param.grad is None else param.grad.float()
        self.inner.step()
        for name, param in self.named:
            if name in self.masters:
                param.copy_(self.masters[name])
                self.masters[name].grad = None
        return loss

    def _finite(self) -> bool:
        """Whether every gradient on every rank is: one pass that only reads them, and one number to agree on."""
        grads = [p.grad for _, p in self.named if p.grad is not None and p.grad.numel()]
        device = next((p.device for _, p in self.named), torch.device("cpu"))
        # the largest, as a sum of squares can overflow
        bad = torch.isfinite(torch.nn.utils.get_total_norm(grads, float("inf"))).logical_not() if grads else torch.zeros(())
        return not bool(self.reduce(bad.to(device, torch.int32), "max"))

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
        return {**self.inner.state_dict(), "masters": {name: m.detach() for name, m in self.masters.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        masters = state_dict.get("masters", {})
        if set(masters) != set(self.masters):
            raise OptimizerError(f"the state holds masters of {sorted(masters)[:5]}, expected {sorted(self.masters)[:5]}")
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != "masters"})
        for name, param in self.named:
            if name in self.masters:
                self.masters[name].copy_(masters[name])
                param.copy_(masters[name])
        self._share()


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
