"""What stands between the model and torch while it is exported: each context manager keeps one meaning that export would drop.

`same_parameters`: modules keep their dtype. `whole_functions`: custom autograd Functions become one opaque op. `no_checkpoint`: recompute
is the plan's choice. `Watch`: decides python branches on uniform draws, and refuses gradient hooks. `same_attributes`: what forward assigns
to modules is undone. `exact_sources`: each node records the user's own line. `quiet`: no dumps.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
import torch.fx.proxy
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from . import primitives
from .checks import answer_here
from .order import Calls
from .provenance import is_users, source_here


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _device(tensor: Tensor) -> torch.device:
    """Fakes of meta tensors pose as CPU tensors, so that they mix with what the model creates."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_device(tensor))


@contextmanager
def same_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Put back, afterwards, what forward assigned to modules: fake tensors, and python state of a step that never happened."""
    saved = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep export from printing the whole partial graph, and torch from logging the op, when it fails; the error says enough."""
    space = vars(importlib.import_module("torch.export._trace"))
    space["print"] = lambda *args, **kwargs: None
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    before, noisy.disabled = noisy.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # torch's own, of its own copies
            yield
    finally:
        del space["print"]
        noisy.disabled = before


@contextmanager
def exact_sources(root: CodeType) -> Iterator[None]:
    """Record on each node the innermost of the user's frames, helper functions included; export keeps those named `forward` only.
    In the place of its function's name stand the calls and loops that it runs in, below the frame of `root`."""
    calls = Calls(root)
    tracer: Any = torch.fx.proxy.TracerBase
    usual = tracer._filter_traceback_frames

    def innermost_frame(self: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        start = max((i for i, f in enumerate(frames) if f.name == root.co_name and f.filename == root.co_filename), default=-1)
        users = [f for f in frames[start + 1 :] if is_users(f.filename)][-1:]
        return traceback.StackSummary.from_list([(f.filename, f.lineno or 0, f"in {calls.scopes_here()}", f.line) for f in users])

    tracer._filter_traceback_frames = innermost_frame
    try:
        yield
    finally:
        tracer._filter_traceback_frames = usual


# ---- Module.to


@contextmanager
def same_parameters(model: torch.nn.Module) -> Iterator[None]:
    """While active, `.to(…)`, `.float()` and kin on a module do nothing where they would change nothing, and are refused elsewhere."""
    usual = torch.nn.Module._apply
    paths = {id(module): path for path, module in model.named_modules()}

    def apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> torch.nn.Module:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            with _disable_current_modes(), torch.no_grad():
                probe = torch.empty((1,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)
                found = fn(probe)
            if (found.dtype, found.device) != (probe.dtype, probe.device):
                path = paths.get(id(self), type(self).__name__)
                raise CaptureError(
                    f"forward casts module {path!r}: {name} from {probe.dtype} on {probe.device} to {found.dtype} on {found.device}",
                    where=source_here(),
                    hint="cast it once, before capture; or cast what it is given and what it returns",
                )
        return self

    torch.nn.Module._apply = apply  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module._apply = usual  # type: ignore[method-assign]


# ---- torch.autograd.Function


@contextmanager
def whole_functions(opaque: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """While active, a custom autograd Function is traced as one opaque op, with its own backward."""
    # Function.apply ends in super().apply, which this shadows; so references to a bound `F.apply` made earlier are caught too
    base = torch.autograd.function._SingleLevelFunction
    aside: list[type] = []  # Functions that run now only to learn what they return

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if aside or cls.__module__.split(".")[0] == "torch" or not any(isinstance(a, Tensor) for a in args):
            return super(base, cls).apply(*args, **kwargs)  # type: ignore[misc]
        aside.append(cls)
        try:
            key, tensors, rebuild = _describe_function(cls, args, opaque)
        finally:
            aside.pop()
        return rebuild(torch.ops.autoshard.opaque(key, tensors))

    base.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del base.apply  # type: ignore[attr-defined]


def _describe_function(
    cls: type, args: tuple[Any, ...], opaque: dict[str, Callable[..., Any]]
) -> tuple[str, list[Tensor], Callable[[list[Tensor]], Any]]:
    """Register the call. Returns its key, its tensor arguments, and how to make the Function's own result of the opaque op's."""
    _check_arguments(cls, args)
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    plain = [None if isinstance(a, Tensor) else a for a in args]

    def whole(*tensors: Tensor) -> Any:
        given: list[Any] = list(plain)
        for i, t in zip(at, tensors, strict=True):
            given[i] = t
        return cls.apply(*given)  # type: ignore[attr-defined]

    def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = whole(*tensors)
        return tuple(t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))

    tensors = [args[i] for i in at]
    result = _run_aside(cls, whole, tensors)
    flat = result if isinstance(result, tuple) else (result,)
    outs = [t for t in flat if isinstance(t, Tensor)]
    specs = "".join(f"{tuple(t.shape)}{t.dtype}" for t in (*tensors, *outs))
    text = f"{cls.__module__}.{cls.__qualname__}{plain!r}{at}{specs}"
    entry = primitives.Opaque((cls, plain, at), fn, tuple(tuple(o.shape) for o in outs), tuple(o.dtype for o in outs))
    key = primitives.register_opaque(f"{cls.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:12]}", entry)
    opaque[key] = fn

    def rebuild(traced: list[Tensor]) -> Any:
        given = iter(traced)
        parts = tuple(_unless_cut(next(given), f) if isinstance(f, Tensor) else f for f in flat)
        return parts if isinstance(result, tuple) else parts[0]

    return key, tensors, rebuild


def _check_arguments(cls: type, args: tuple[Any, ...]) -> None:
    """Tensors inside of other arguments would be frozen at their contents now."""
    for a in args:
        inside = [] if isinstance(a, Tensor) else pytree.tree_leaves(a)
        if any(isinstance(leaf, (Tensor, torch.nn.Module)) for leaf in inside):
            raise CaptureError(
                f"the autograd Function {cls.__qualname__} takes tensors inside of a {type(a).__name__}",
                where=source_here(),
                hint="pass each tensor as an argument of its own",
            )


def _unless_cut(traced: Tensor, probe: Tensor) -> Tensor:
    return traced if probe.requires_grad or not probe.is_floating_point() else traced.detach()


def _run_aside(cls: type, fn: Callable[..., Any], tensors: list[Tensor]) -> Any:
    """Run the Function on fresh fakes that require gradients, outside of the trace, for its outputs' shapes and differentiability."""
    with _disable_current_modes(), torch.enable_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        probes = [fake_like(t, mode).requires_grad_(t.is_floating_point()) for t in tensors]
        inputs = [p.clone() for p in probes]  # not leaves: an in-place Function would fail on those for another reason
        versions = [p._version for p in inputs]
        with mode:
            try:
                outs = fn(*inputs)
            except Exception as error:
                raise CaptureError(
                    f"the autograd Function {cls.__qualname__} can't run on fake tensors: {first_line(error)}",
                    where=source_here(),
                    hint="wrap its kernel as a torch.library.custom_op with a registered fake",
                ) from error
        if [p._version for p in inputs] != versions:
            raise CaptureError(
                f"the autograd Function {cls.__qualname__} writes into its inputs", where=source_here(), hint="return new tensors"
            )
        return outs


# ---- torch's own functions of which export sees too much


def _losses(z: Tensor, y: Tensor, sizes: Any, lengths: Any, blank: int = 0, reduction: str | int = "mean", *_: Any, **__: Any) -> Shapes:
    """ctc_loss: a loss for each row, or one number."""
    return ((z.shape[1],) if reduction in (0, "none") and z.ndim == 3 else (),)


Shapes = tuple[tuple[int, ...], ...]
WHOLE: dict[Callable[..., Any], Callable[..., Shapes]] = {torch.ctc_loss: _losses, torch.nn.functional.ctc_loss: _losses}
"""Functions that compute values of sizes that depend on data on the way to results of fixed shapes: those shapes, by the arguments."""


def whole_call(func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], opaque: dict[str, Callable[..., Any]]) -> Any:
    """A call of one of them (with tensors among its positional arguments), as one opaque op. Its results have its first tensor's dtype."""
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    plain = [None if isinstance(a, Tensor) else a for a in args]

    def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(plain)
        for i, t in zip(at, tensors, strict=True):
            given[i] = t
        out = func(*given, **options)
        return out if isinstance(out, tuple) else (out,)

    tensors, shapes = [args[i] for i in at], WHOLE[func](*args, **options)
    name = func.__name__
    text = f"{name}{plain!r}{options!r}{at}{[(tuple(t.shape), t.dtype) for t in tensors]}"
    entry = primitives.Opaque((name, plain, options, at), fn, shapes, (tensors[0].dtype,) * len(shapes))
    key = primitives.register_opaque(f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}", entry)
    opaque[key] = fn
    outs = torch.ops.autoshard.opaque(key, tensors)
    return outs[0] if len(outs) == 1 else tuple(outs)


# ---- gradient checkpointing: recompute is the plan's choice, so the wrapper captures as if absent


@contextmanager
def no_checkpoint() -> Iterator[None]:
    space = torch.utils.checkpoint

    class Direct:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    saved = {name: getattr(space, name) for name in ("CheckpointFunction", "_checkpoint_without_reentrant_generator")}
    space.CheckpointFunction = Direct  # type: ignore[assignment,misc]
    space._checkpoint_without_reentrant_generator = nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(space, name, value)


# ---- python that looks at tensors


class Watch(TorchFunctionMode):
    """Sees the model's calls into torch: decides checks and branches on uniform draws that have one outcome, refuses hooks and inner
    backward. `taken` is told where a check was taken to hold; `opaque` receives what is kept whole.

    A value in [0, 1) compared with a number outside decides the comparison: `torch.rand([]) < 0.0` is False whatever is drawn.
    """

    def __init__(self, taken: Callable[[str], None], opaque: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.taken, self.opaque = taken, opaque
        self.bounds: dict[int, tuple[Tensor, float, float]] = {}
        self.known: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            raise CaptureError(f"forward calls Tensor.{name}, which capture would drop", where=source_here(), hint="remove the hook")
        if name in ("__bool__", "item") and args and id(args[0]) in self.known:
            return self.known[id(args[0])][1]
        if func in WHOLE:
            return whole_call(func, args, kwargs, self.opaque)
        if func is torch._assert and isinstance(args[0], Tensor):
            self.taken(source_here())
            return None
        if name == "__bool__" and isinstance(args[0], torch._subclasses.FakeTensor) and (answer := answer_here()) is not None:
            self.taken(source_here())
            return answer
        if func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward):
            raise CaptureError(f"forward calls {name}, which can't be captured", where=source_here(), hint="write that gradient as ops")
        out = func(*args, **kwargs)
        if name in ("rand", "rand_like"):
            self.bounds[id(out)] = (out, 0.0, 1.0)
        elif name == "uniform_":
            low = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
            self.bounds[id(out)] = (out, float(low), float(args[2] if len(args) > 2 else kwargs.get("to", 1.0)))
        elif name in _OUTCOMES and len(args) == 2 and not kwargs and id(args[0]) in self.bounds and isinstance(args[1], (int, float)):
            _, low, high = self.bounds[id(args[0])]
            outcome = _OUTCOMES[name](low, high, args[1])
            if outcome is not None:
                self.known[id(out)] = (out, outcome)
        return out


def _below(low: float, high: float, x: float) -> bool | None:
    return False if x <= low else True if x >= high else None


def _at_most(low: float, high: float, x: float) -> bool | None:
    return False if x < low else True if x >= high else None


def _not(outcome: bool | None) -> bool | None:
    return None if outcome is None else not outcome


# whether every, or no, value of [low, high) stands in the relation to x
_OUTCOMES: dict[str, Callable[[float, float, float], bool | None]] = {
    "__lt__": _below, "lt": _below, "less": _below,
    "__le__": _at_most, "le": _at_most, "less_equal": _at_most,
    "__ge__": lambda low, high, x: _not(_below(low, high, x)), "ge": lambda low, high, x: _not(_below(low, high, x)),
    "__gt__": lambda low, high, x: _not(_at_most(low, high, x)), "gt": lambda low, high, x: _not(_at_most(low, high, x)),
}  # fmt: skip
