"""Execute one op of a Graph on real, fake or meta tensors.

In: an op's target (`aten.add.Tensor`, `autoshard.pick.default`) with its arguments, every Ref replaced by a tensor. Out: a tensor or a
tuple of tensors. The reference interpreter, the rule tests and the lowering all execute ops through `call`.

>>> import torch
>>> call("aten.add.Tensor", (torch.ones(2), 1), {})
tensor([2., 2.])
>>> call("aten.full.default", ((2,), 3), {"dtype": "torch.int64"}, device="cpu")
tensor([3, 3])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import primitives
from .experts import experts


@functools.cache
def resolve(target: str) -> Callable[..., Any]:
    """`aten.add.Tensor` -> torch.ops.aten.add.Tensor; `autoshard.pick.default` -> primitives.pick."""
    namespace, name, overload = target.split(".")
    if namespace == "autoshard":
        return {f.__name__: f for f in PRIMITIVES}[name]
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


PRIMITIVES = (primitives.attention, primitives.pick, primitives.dropout_mask, primitives.opaque, experts)


@functools.cache
def is_factory(target: str) -> bool:
    """Whether the op makes a tensor out of none, and so has to be told the device."""
    fn = resolve(target)
    if not isinstance(fn, torch._ops.OpOverload):
        return fn is primitives.dropout_mask
    arguments = fn._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


@functools.cache
def is_pointwise(target: str) -> bool:
    """Whether the op computes each output element from its inputs' elements at the same (broadcast) place alone."""
    fn = resolve(target)
    if not isinstance(fn, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in fn.tags:
        return False
    return torch.Tag.pointwise in fn.tags or target in UNTAGGED_POINTWISE


UNTAGGED_POINTWISE = frozenset(
    f"aten.{name}" for name in "_to_copy.default where.self where.Scalar where.ScalarSelf where.ScalarOther masked_fill.Scalar".split()
)


def call(
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device | str | None = None,
    opaque: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Run one op. `device`: where factory ops create. `opaque`: callables to use directly (without it the custom op looks the key up)."""
    args, options = _dtypes(args), _dtypes(dict(kwargs))
    if device is not None and is_factory(target):
        options["device"] = device
    if opaque is not None and target == "autoshard.opaque.default":
        return tuple(opaque[args[0]](*args[1]))
    found = resolve(target)(*args, **options)
    return tuple(found) if isinstance(found, (list, tuple)) else found


def _dtypes(tree: Any) -> Any:
    if isinstance(tree, str):
        return getattr(torch, tree[6:]) if tree.startswith("torch.") else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_dtypes(t) for t in tree)
    if isinstance(tree, dict):
        return {k: _dtypes(v) for k, v in tree.items()}
    return tree
