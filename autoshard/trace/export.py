"""Drive torch.export so that it means what the model means.

In: a model, the leaves of its example call and the user's loss. Out: an ExportedProgram of a functional graph in which nested regions are
inlined, gradients are cut where grad mode was off, custom autograd Functions and data-dependent regions are single opaque ops.

Everything runs on fake tensors: parameters are swapped for fakes while tracing, so nothing is allocated and meta models work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from .captured import Draw
from .checks import checks_pass
from .draws import number_draws
from .intercept import Watch, exact_sources, fake_like, first_line, no_checkpoint, quiet, same_attributes, same_parameters, whole_functions
from .order import canonical_order
from .provenance import source_of_error
from .regions import drop_assertions, fold_dynamic, inline_regions

# composite ops that the normal form or its passes name; every other composite op is decomposed by torch
KEPT = frozenset(
    """linear matmul einsum layer_norm scaled_dot_product_attention cross_entropy_loss softmax log_softmax embedding dropout pad
    type_as __and__ __or__ __xor__ stack chunk split unbind select reshape flatten unflatten expand_as reshape_as view_as to
    repeat_interleave tile nll_loss_nd rms_norm group_norm batch_norm movedim swapaxes narrow contiguous numpy_T broadcast_to
    outer square where rsub silu gelu nll_loss""".split()
)

MODEL = "model"  # the wrapper's name for the user's model; stripped from paths


class Step(torch.nn.Module):
    """The function that is exported: tensor leaves in, loss and other outputs out. `names` receives the outputs' names, `notes` remarks."""

    def __init__(
        self,
        model: torch.nn.Module,
        leaves: list[Any],
        tree: Any,
        loss: Callable[[Any], Tensor] | None,
        names: list[str],
        notes: list[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.call = (leaves, tree, loss)
        self.found = (names, notes)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, tree, loss_fn = self.call
        names, notes = self.found
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
        held, plain = held_buffers(self.model), plain_tensors(self.model)
        output = self.model(*args, **kwargs)
        write_back(held)
        notes[:] = [
            f"forward replaces the plain tensor {path}; each step starts from its value at capture (make it a buffer to carry it on)"
            for path, tensor in plain_tensors(self.model).items()
            if path in plain and plain[path] is not tensor
        ]
        loss = loss_fn(output) if loss_fn is not None else loss_of(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CaptureError(f"the loss is {found}; one floating number is expected", hint="pass loss=, a function of the model's output")
        others = {k: v for k, v in named_outputs(output).items() if v is not loss}
        names[:] = others
        return (loss.reshape(()), *others.values())


Held = list[tuple[str, dict[str, Tensor | None], str, Tensor]]


def held_buffers(model: torch.nn.Module) -> Held:
    """Every buffer of the model: its path, the table that holds it, its name there, and the tensor."""
    return [
        (f"{path}.{name}" if path else name, module._buffers, name, tensor)
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


def plain_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Tensors that are attributes of modules without being parameters or buffers, by path."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def write_back(held: Held) -> None:
    """Where forward put a new tensor into a buffer's place, copy it into the buffer, so that export sees the buffer change."""
    for path, table, name, old in held:
        new = table.get(name)
        if new is old:
            continue
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            found = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            was = f"{tuple(old.shape)} {old.dtype}"
            raise CaptureError(f"forward replaces buffer {path!r} of {was} by {found}", hint="keep its shape and dtype")
        with torch.no_grad():
            old.copy_(new)
        table[name] = old


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
    """The program, the names of its outputs besides the loss, opaque callables by key, random draws in order, and remarks for the user."""

    program: torch.export.ExportedProgram
    outputs: list[str]
    opaque: dict[str, Callable[..., Any]]
    draws: list[Draw]
    notes: list[str]


def export_step(model: torch.nn.Module, leaves: list[Any], tree: Any, loss: Callable[[Any], Tensor] | None) -> Exported:
    """Export, inline, functionalise, order, fold."""
    names: list[str] = []
    notes: list[str] = []
    checked: list[str] = []
    opaque: dict[str, Callable[..., Any]] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(same_attributes(model))
        stack.enter_context(_fake_parameters(model, mode))
        stack.enter_context(same_parameters(model))
        stack.enter_context(whole_functions(opaque))
        stack.enter_context(no_checkpoint())
        stack.enter_context(quiet())
        stack.enter_context(exact_sources(Step.forward.__code__))
        tensors = tuple(fake_like(leaf, mode) for leaf in leaves if isinstance(leaf, Tensor))
        try:
            with Watch(checked.append, opaque), checks_pass(checked.append):
                program = torch.export.export(Step(model, leaves, tree, loss, names, notes), tensors, strict=False)
            inline_regions(program.graph_module)
            draws = number_draws(program.graph)
            program = program.run_decompositions(_composites())
            drop_assertions(program.graph_module)
            draws = canonical_order(program, draws)
            fold_dynamic(program.graph_module, opaque)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the model can't be traced: {first_line(error)}", where=source_of_error(error), hint=_advice(error)
            ) from error
    notes += [f"the check on data at {place} is taken to pass" for place in dict.fromkeys(checked)]
    return Exported(program, names, opaque, draws, notes)


def _advice(error: BaseException) -> str:
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
        return "the code branches on, or makes a python number of, a tensor's contents; write it with torch.where or masks"
    if "numpy" in str(error):
        return "what leaves torch isn't in the graph: compute it with tensors, before the model or in its constructor"
    return "call the model plainly on this batch: if that works, the line above does what a graph of fixed shapes can't hold"


def _composites() -> dict[Any, Any]:
    """Decompositions for every composite op that is not KEPT."""
    from torch._export.utils import _collect_all_valid_cia_ops, _get_decomp_for_cia

    composites: Any = _collect_all_valid_cia_ops()
    return {op: _get_decomp_for_cia(op) for op in composites if op._schema.name.split("::")[1] not in KEPT}


@contextmanager
def _fake_parameters(model: torch.nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Swap every parameter and buffer of `model` for a fake; shared ones stay shared."""
    fakes: dict[int, Tensor] = {}
    saved: list[tuple[dict[str, Any], str, Tensor]] = []
    tables: list[dict[str, Any]] = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    try:
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = fake_like(tensor, mode)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    fakes[id(tensor)] = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                saved.append((table, name, tensor))
                table[name] = fakes[id(tensor)]
        yield
    finally:
        for table, name, tensor in saved:
            table[name] = tensor
