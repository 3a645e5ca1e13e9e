"""Drive torch.export so that it means what the model means.

In: a model, the leaves of its example call and the user's loss. Out: an ExportedProgram of a functional graph in which nested regions are
inlined, gradients are cut where grad mode was off, custom autograd Functions and data-dependent regions are single opaque ops.

Everything runs on fake tensors: parameters are swapped for fakes while tracing, so nothing is allocated and meta models work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from . import primitives
from .captured import Draw
from .draws import number_draws
from .provenance import source_here, source_of_error
from .regions import fold_dynamic, inline_regions

# composite ops that the normal form or its passes name; every other composite op is decomposed by torch
KEPT = frozenset(
    """linear matmul einsum layer_norm scaled_dot_product_attention cross_entropy_loss softmax log_softmax embedding dropout pad
    type_as __and__ __or__ __xor__ stack chunk split unbind select reshape flatten unflatten expand_as reshape_as view_as to
    repeat_interleave tile nll_loss_nd rms_norm group_norm batch_norm movedim swapaxes narrow contiguous numpy_T broadcast_to
    outer square where rsub silu gelu nll_loss""".split()
)

MODEL = "model"  # the wrapper's name for the user's model; stripped from paths


class Step(torch.nn.Module):
    """The function that is exported: tensor leaves in, loss and other outputs out. `names` receives the outputs' names."""

    def __init__(
        self, model: torch.nn.Module, leaves: list[Any], tree: Any, loss: Callable[[Any], Tensor] | None, names: list[str]
    ) -> None:
        super().__init__()
        self.model = model
        self.call = (leaves, tree, loss, names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, tree, loss_fn, names = self.call
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
        output = self.model(*args, **kwargs)
        loss = loss_fn(output) if loss_fn is not None else loss_of(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CaptureError(f"the loss is {found}; one floating number is expected", hint="pass loss=, a function of the model's output")
        others = {k: v for k, v in named_outputs(output).items() if v is not loss}
        names[:] = others
        return (loss.reshape(()), *others.values())


def loss_of(output: Any) -> Any:
    """The model's scalar output, its .loss, or its ["loss"]."""
    if isinstance(output, Tensor):
        return output
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None:
        raise CaptureError(
            f"the model's output ({type(output).__name__}) has no loss", hint="pass labels so that it has one, or pass loss="
        )
    return found


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Tensor leaves by dotted name; a lone tensor is `output`."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    keys = {".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in p) or "output": v for p, v in leaves}
    return {k: v for k, v in keys.items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class Exported:
    """The program, the names of its outputs besides the loss, the opaque callables by key, and the random draws in order."""

    program: torch.export.ExportedProgram
    outputs: list[str]
    opaque: dict[str, Callable[..., Any]]
    draws: list[Draw]


def export_step(
    model: torch.nn.Module, leaves: list[Any], tree: Any, loss: Callable[[Any], Tensor] | None
) -> Exported:
    """Export, inline, functionalise, fold."""
    names: list[str] = []
    opaque: dict[str, Callable[..., Any]] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_fake_parameters(model, mode))
        stack.enter_context(_whole_functions(opaque))
        stack.enter_context(_no_checkpoint())
        stack.enter_context(_Watch())
        tensors = tuple(_fake(leaf, mode) for leaf in leaves if isinstance(leaf, Tensor))
        try:
            program = torch.export.export(Step(model, leaves, tree, loss, names), tensors, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the model can't be traced: {_first_line(error)}", where=source_of_error(error), hint=_advice(error)
            ) from error
        inline_regions(program.graph_module)
        draws = number_draws(program.graph)
        program = program.run_decompositions(_composites())
        fold_dynamic(program.graph_module, opaque)
    return Exported(program, names, opaque, draws)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _advice(error: BaseException) -> str:
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
        return "the code branches on, or makes a python number of, a tensor's contents; write it with torch.where or masks"
    return ""


def _composites() -> dict[Any, Any]:
    """Decompositions for every composite op that is not KEPT."""
    from torch._export.utils import _collect_all_valid_cia_ops, _get_decomp_for_cia

    return {op: _get_decomp_for_cia(op) for op in _collect_all_valid_cia_ops() if op._schema.name.split("::")[1] not in KEPT}


def _device(tensor: Tensor) -> torch.device:
    """Fakes of meta tensors pose as CPU tensors, so that they mix with what the model creates."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_device(tensor))


@contextmanager
def _fake_parameters(model: torch.nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Swap every parameter and buffer of `model` for a fake; shared ones stay shared."""
    fakes: dict[int, Tensor] = {}
    saved: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        fake = _fake(tensor, mode)
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        fakes[id(tensor)] = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                    saved.append((table, name, tensor))
                    table[name] = fakes[id(tensor)]
        yield
    finally:
        for table, name, tensor in saved:
            table[name] = tensor


# ---- torch.autograd.Function


@contextmanager
def _whole_functions(opaque: dict[str, Callable[..., Any]]) -> Iterator[None]:
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

    base.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        del base.apply


def _describe_function(
    cls: type, args: tuple[Any, ...], opaque: dict[str, Callable[..., Any]]
) -> tuple[str, list[Tensor], Callable[[list[Tensor]], Any]]:
    """Register the call. Returns its key, its tensor arguments, and how to make the Function's own result of the opaque op's."""
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
    entry = primitives.Opaque(fn, tuple(tuple(o.shape) for o in outs), tuple(o.dtype for o in outs))
    key = primitives.register_opaque(f"{cls.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:12]}", entry)
    opaque[key] = fn

    def rebuild(traced: list[Tensor]) -> Any:
        given = iter(traced)
        parts = tuple(_unless_cut(next(given), f) if isinstance(f, Tensor) else f for f in flat)
        return parts if isinstance(result, tuple) else parts[0]

    return key, tensors, rebuild


def _unless_cut(traced: Tensor, probe: Tensor) -> Tensor:
    return traced if probe.requires_grad or not probe.is_floating_point() else traced.detach()


def _run_aside(cls: type, fn: Callable[..., Any], tensors: list[Tensor]) -> Any:
    """Run the Function on fresh fakes that require gradients, outside of the trace, for its outputs' shapes and differentiability."""
    with _disable_current_modes(), torch.enable_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        probes = [_fake(t, mode).requires_grad_(t.is_floating_point()) for t in tensors]
        inputs = [p.view_as(p) for p in probes]  # not leaves: an in-place Function would fail on those for another reason
        versions = [p._version for p in inputs]
        with mode:
            try:
                outs = fn(*inputs)
            except Exception as error:
                raise CaptureError(
                    f"the autograd Function {cls.__qualname__} can't run on fake tensors: {_first_line(error)}",
                    where=source_here(),
                    hint="wrap its kernel as a torch.library.custom_op with a registered fake",
                ) from error
        if [p._version for p in inputs] != versions:
            raise CaptureError(f"the autograd Function {cls.__qualname__} writes into its inputs", where=source_here(), hint="return new tensors")
        return outs


# ---- gradient checkpointing: recompute is the plan's choice, so the wrapper captures as if absent


@contextmanager
def _no_checkpoint() -> Iterator[None]:
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


class _Watch(TorchFunctionMode):
    """Sees the model's calls into torch: decides branches on uniform draws that have one outcome, and refuses gradient hooks.

    A value in [0, 1) compared with a number outside decides the comparison: `torch.rand([]) < 0.0` is False whatever is drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bounds: dict[int, tuple[Tensor, float, float]] = {}
        self.known: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            raise CaptureError(f"Tensor.{name} is called in forward, and capture would drop it", where=source_here(), hint="remove the hook")
        if name in ("__bool__", "item") and args and id(args[0]) in self.known:
            return self.known[id(args[0])][1]
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
