"""capture(model, …) -> Captured: a plain model and an example batch become one Graph in normal form.

The model runs once, on fake tensors, with what it would do in training: forward and the loss. What comes out is a straight line of
functional ops of a small vocabulary (the rules of `normalise/` say which), every parameter, buffer and input named, every op with its line.

>>> import torch
>>> model = torch.nn.Linear(3, 2, bias=False)
>>> captured = capture(model, (torch.ones(4, 3),), loss=lambda y: y.square().mean())
>>> for op in captured.graph.ops:
...     print(op)
aten.linear.default(args_0, weight)
aten.square.default(linear)
aten.mean.dim(square, (0, 1), False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..errors import BatchError, CaptureError
from ..passes import run_passes
from .captured import Captured, InputSpec, path_text
from .export import export_step
from .legal import check_autocast, check_graph, check_model, verify, verify_normal
from .passes import PASSES
from .read import Reader, identifier

__all__ = ["Captured", "capture"]


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    *,
    times: dict[str, float] | None = None,
    dump: str | None = None,
) -> Captured:
    """Capture `model(*args, **kwargs)` and its loss.

    `loss(output)` makes a scalar of the model's output; without it the output itself, its `.loss` or its `["loss"]` is the loss.
    `batch_dims`: by argument (`labels`, `args.0`, `kwargs.cache.0`) the batch dim, or None for no batch. By default it is dim 0 of every
    tensor whose size there is that of the first tensor input's. `times` and `dump` go to the pass runner. Raises CaptureError.
    """
    check_model(model)
    check_autocast()
    found, tree = pytree.tree_flatten_with_path((tuple(args), dict(kwargs or {})))
    paths, leaves = [path_text(path) for path, _ in found], [leaf for _, leaf in found]
    names = _input_names(paths, leaves)
    dims = _batch_dims(paths, leaves, dict(batch_dims or {}))
    exported = export_step(model, leaves, tree, loss)
    owners, tied = _owners(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    inputs = [(n, p, d) for n, p, d in zip(names, paths, dims, strict=True) if n is not None]
    captured = Reader(exported.program, owners, trainable, exported.draws).read(inputs, exported.outputs, exported.opaque)
    captured.graph.tied = tied
    captured.graph.notes += exported.notes
    plain = tuple(None if n is not None else leaf for n, leaf in zip(names, leaves, strict=True))
    captured.spec = InputSpec(tree, tuple(paths), tuple(names), plain)
    verify(captured)
    captured = run_passes(captured, PASSES, verify=verify, times=times, dump=dump)
    check_graph(captured)
    verify_normal(captured)
    _check_loss(captured)
    return captured


def _check_loss(captured: Captured) -> None:
    graph = captured.graph
    if not graph.values[graph.loss].grad:
        raise CaptureError("the loss depends on no trainable parameter", hint="check requires_grad, no_grad and detach in the model")


def _input_names(paths: list[str], leaves: list[Any]) -> list[str | None]:
    """Value names: a keyword's own name; None for what isn't a tensor."""
    names: list[str | None] = []
    for path, leaf in zip(paths, leaves, strict=True):
        base = identifier(path.split(".", 1)[1] if path.startswith("kwargs.") else path)
        names.append((f"{base}_{len(names)}" if base in names else base) if isinstance(leaf, Tensor) else None)
    return names


def _batch_dims(paths: list[str], leaves: list[Any], given: dict[str, int | None]) -> list[int | None]:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise BatchError("no argument is a tensor", hint="pass the example batch as args= or kwargs=")
    size = tensors[0].shape[0] if tensors[0].ndim else None
    dims: list[int | None] = []
    for path, leaf in zip(paths, leaves, strict=True):
        default = 0 if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size else None
        key = next((k for k in (path, path.split(".", 1)[1]) if k in given), None)
        dim = given.pop(key) if key is not None else default
        if dim is not None and not (isinstance(leaf, Tensor) and -leaf.ndim <= dim < leaf.ndim):
            raise BatchError(f"batch dim {dim} of {path} is out of range", hint="give a dim of a tensor argument, or None")
        dims.append(dim % leaf.ndim if dim is not None else None)
    if given:
        raise BatchError(f"batch_dims names {sorted(given)}, which are not arguments", hint=f"the arguments are {paths}")
    return dims


def _owners(model: torch.nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Each parameter's and buffer's name → the first name of the same tensor; and those names that differ from it."""
    owners: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        first: dict[int, str] = {}
        for name, tensor in named(remove_duplicate=False):
            owners[name] = first.setdefault(id(tensor), name)
    return owners, {name: owner for name, owner in owners.items() if name != owner}
