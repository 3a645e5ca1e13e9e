"""What may be captured, and what a captured graph looks like.

`check_model` refuses, by name, what export would drop in silence. `verify` asserts the normal form: it runs after every pass, and what it
finds is a bug of that pass. `check_graph` refuses what the user has to change (random ops that capture can't replay, operands that
don't fit).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..errors import CaptureError
from .captured import Captured
from .graph import Op, Ref

REMOVED = frozenset(
    """view _unsafe_view flatten unflatten unsqueeze squeeze t transpose movedim numpy_T narrow select chunk split unbind stack
    repeat repeat_interleave clone contiguous alias lift_fresh lift_fresh_copy to type_as addmm baddbmm addbmm addmv
    scaled_dot_product_attention cross_entropy_loss native_dropout dropout _native_batch_norm_legit_functional""".split()
)


# how many positional arguments the normal form gives
ARITY = {
    "aten.linear.default": 2, "aten.reshape.default": 2, "aten.permute.default": 2, "aten.expand.default": 2, "aten.slice.Tensor": 5,
    "aten.split_with_sizes.default": 3, "aten.cat.default": 2, "aten.sum.dim_IntList": 3, "aten.mean.dim": 3, "aten.amax.default": 3,
    "aten.amin.default": 3, "aten.softmax.int": 2, "aten.log_softmax.int": 2, "aten.layer_norm.default": 5, "aten.embedding.default": 2,
    "aten._to_copy.default": 1, "aten.einsum.default": 2, "autoshard.dropout_mask.default": 5,
    "autoshard.pick.default": 2, "autoshard.opaque.default": 2, "aten.slice_scatter.default": 6, "aten.arange.start_step": 3,
    "autoshard.experts.default": 3,
}  # fmt: skip


def check_model(model: torch.nn.Module) -> None:
    """Refuse hooks on gradients, which no captured graph would run; forward hooks are traced like any code."""
    for path, module in model.named_modules():
        for kind in ("_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, kind, None):
                hook = next(iter(getattr(module, kind).values()))
                raise CaptureError(
                    f"module {path or type(model).__name__!r} has the backward hook {_name(hook)}, which capture would drop",
                    hint="remove it before capture, or write it as a torch.autograd.Function in forward",
                )
    for path, p in itertools.chain(model.named_parameters(), model.named_buffers()):
        hooks = [*(p._backward_hooks or {}).values(), *(getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()]
        if hooks:
            raise CaptureError(f"parameter {path!r} has the gradient hook {_name(hooks[0])}, which capture would drop", hint="remove it")
    spaces = torch.nn.modules.module
    if spaces._global_backward_hooks or spaces._global_backward_pre_hooks:
        raise CaptureError("global module backward hooks are registered, which capture would drop", hint="remove them before capture")


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def check_autocast() -> None:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise CaptureError(
                f"capture was called under torch.autocast({device!r})",
                hint="capture outside of it: cast the model (model.to(torch.bfloat16)), or let the plan choose the precision",
            )


PRODUCTS = ("linear", "mm", "bmm", "matmul")


def check_graph(captured: Captured) -> None:
    """Refuse random ops whose results matter (dropout has become dropout_mask by now), and products of unlike dtypes, which fakes
    let pass."""
    values = captured.graph.values
    for op in captured.graph.ops:
        dtypes = [values[name].tensor.dtype for name in op.inputs]
        if op.target.split(".")[1] in PRODUCTS and len(set(dtypes)) > 1:
            raise CaptureError(
                f"{op.target.split('.')[1]} multiplies {' by '.join(dtypes)}",
                where=op.source,
                hint="the model refuses that by itself too: give the batch the model's dtype, or cast in forward",
            )
        if is_random(op.target):
            raise CaptureError(
                f"the random op {op.target} can't be captured", where=op.source, hint="use dropout, or pass the random tensor as an input"
            )


def is_random(target: str) -> bool:
    namespace, name, overload = target.split(".")
    if namespace == "autoshard":
        return False
    fn = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return torch.Tag.nondeterministic_seeded in fn.tags


def verify(captured: Captured) -> None:
    """Assert that the graph is well formed: each value defined once and before its use, arguments plain, roots present, sizes explicit."""
    graph = captured.graph
    known = {v.name for v in graph.sources("param", "buffer", "constant", "input")}
    for op in graph.ops:
        for name in op.inputs:
            assert name in known, f"{op.name} uses {name} before it is made"
        assert op.outs == (op.name,) or op.outs == tuple(f"{op.name}.{i}" for i in range(len(op.outs))), op.outs
        assert not known.intersection(op.outs), f"{op.name} is made twice"
        _check_arguments(op, (op.args, tuple(op.kwargs.values())))
        known.update(op.outs)
    for name in (*graph.roots, *graph.outputs.values()):
        assert name in known, f"root {name} is missing"
    for name in captured.constants:
        assert name in graph.values, f"constant {name} has no value"
    assert set(graph.values) == known, sorted(set(graph.values) ^ known)[:5]


def _check_arguments(op: Op, tree: Any) -> None:
    if isinstance(tree, tuple):
        for t in tree:
            _check_arguments(op, t)
    else:
        assert tree is None or isinstance(tree, (bool, int, float, str, Ref)), f"{op.name}: argument {tree!r}"


def verify_normal(captured: Captured) -> None:
    """Assert that no op is left that the normal form spells otherwise."""
    verify(captured)
    for op in captured.graph.ops:
        namespace, name, _ = op.target.split(".")
        assert namespace != "aten" or name not in REMOVED, f"{op.name}: {op.target} at {op.source} is not in normal form"
        assert "device" not in op.kwargs and "layout" not in op.kwargs, op
        arity = ARITY.get(op.target)
        assert op.target != "autoshard.attention.default" or len(op.args) in (6, 7), op
        assert arity is None or len(op.args) == arity, f"{op.name}: {op} has {len(op.args)} arguments, not {arity}"
        if op.target in ("aten.reshape.default", "aten.expand.default", "aten.permute.default"):
            assert all(isinstance(s, int) and s >= 0 for s in op.args[1]), op
