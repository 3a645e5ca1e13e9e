"""Read an exported program's functional fx graph into a Graph, op by op, without changing what any op computes.

In: the ExportedProgram, names for its inputs and outputs. Out: a Captured whose ops still carry torch's own spelling (`aten.view`, …), but
plain arguments: lists become tuples, dtypes strings, devices and layouts go, assertions go.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.export.graph_signature import InputKind, OutputKind

from ..errors import CaptureError
from .build import drop_dead, dtype_name
from .captured import Captured, Draw
from .draws import RANDOM, draw_of
from .export import MODEL
from .graph import Graph, Op, Ref, Tensor
from .provenance import module_of, source_of

DROPOUTS = ("aten.native_dropout.default", "aten.scaled_dot_product_attention.default", *RANDOM)
_LIFTED = re.compile(r"lifted_tensor_?\d*$")
_DROPPED = ("device", "layout", "pin_memory", "non_blocking", "memory_format", "requires_grad")


class Reader:
    """One reading: `values` maps fx nodes to Refs (tuples of Refs for several outputs)."""

    def __init__(self, program: torch.export.ExportedProgram, owners: dict[str, str], trainable: set[str], draws: list[Draw]) -> None:
        self.program, self.owners, self.trainable, self.draws = program, owners, trainable, draws
        self.graph = Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.values: dict[fx.Node, Any] = {}
        self.names: set[str] = set()

    def read(self, inputs: list[tuple[str, str, int | None]], outputs: list[str], opaque: dict[str, Callable[..., Any]]) -> Captured:
        """`inputs`: value name, path and batch dim of each tensor input, in order."""
        signature = self.program.graph_signature
        given = dict(zip(signature.user_inputs, inputs, strict=True))
        specs = {s.arg.name: s for s in signature.input_specs}
        for node in self._sources(specs):
            self._source(node, specs[node.name], given)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._op(node)
        self._roots(outputs)
        drop_dead(self.graph)
        return Captured(self.graph, {k: v for k, v in self.constants.items() if k in self.graph.values}, opaque, None, self.draws)

    # -- sources

    def _sources(self, specs: dict[str, Any]) -> list[fx.Node]:
        """The placeholders: inputs as the call gives them, all others as ops first read them (a model may register parameters in any
        order); unused ones last, by name."""
        graph = self.program.graph
        used = dict.fromkeys(i for n in graph.nodes if n.op != "output" for i in n.all_input_nodes if i.op == "placeholder")
        given = [n for n in graph.find_nodes(op="placeholder") if specs[n.name].kind is InputKind.USER_INPUT]
        unused = sorted((n for n in graph.find_nodes(op="placeholder") if n not in used), key=lambda n: n.name)
        kinds = list(InputKind)
        others = sorted([*used, *unused], key=lambda n: kinds.index(specs[n.name].kind))
        return [n for n in others if n not in given] + given

    def _source(self, node: fx.Node, spec: Any, given: Any) -> None:
        value: Any = node.meta.get("val")
        path = (spec.target or "").removeprefix(MODEL + ".")
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            role = "param" if spec.kind is InputKind.PARAMETER else "buffer"
            owner = self.owners[path]
            self.values[node] = self._add_source(identifier(owner), value, role, owner, grad=owner in self.trainable)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            tensor = self.program.constants[spec.target]
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                raise CaptureError(
                    f"the plain tensor {path!r} has no data ({tensor.device.type} device)", hint="register it as a buffer of the model"
                )
            name = _LIFTED.sub("lifted_tensor", identifier(path.split(".")[-1]))  # torch numbers them in the program's order
            self.values[node] = self._add_source(name, value, "constant", "")
            self.constants[self.values[node].name] = tensor.detach().cpu()
        elif spec.kind is InputKind.USER_INPUT and isinstance(value, torch.Tensor):
            name, path, batch_dim = given[spec.arg.name]
            self.values[node] = self._add_source(name, value, "input", path)
            self.graph.values[self.values[node].name].batch_dim = batch_dim
        elif node.users:
            raise CaptureError(f"the model uses {spec.kind.name.lower()} {path!r}, which can't be captured")

    def _add_source(self, name: str, value: torch.Tensor, role: str, path: str, grad: bool = False) -> Ref:
        known = next((v for v in self.graph.values.values() if role in ("param", "buffer") and v.role == role and v.path == path), None)
        if known is not None:  # a tied parameter under its second name
            return Ref(known.name)
        name = self._fresh(name)
        self.graph.add_value(name, tensor_of(value), role=role, path=path, grad=grad, strides=tuple(value.stride()))
        return Ref(name)

    def _fresh(self, base: str) -> str:
        name, n = base, 0
        while name in self.names:
            n += 1
            name = f"{base}_{n}"
        self.names.add(name)
        return name

    # -- ops

    def _op(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source: Any
            source, index = node.args
            self.values[node] = self.values[source][index]
            return
        target = str(node.target)
        where = source_of(node)
        args = self._plain(tuple(node.args), where)
        kwargs = {k: self._plain(v, where) for k, v in node.kwargs.items() if k not in _DROPPED and v is not None}
        value = node.meta["val"]
        many = isinstance(value, (tuple, list))
        if (draw := draw_of(node)) is not None and target in DROPOUTS:
            kwargs["draw"] = draw
        name = self._fresh(node.name)
        outs = tuple(f"{name}.{i}" for i in range(len(value))) if many else (name,)
        op = Op(name, target, args, kwargs, outs, where, module_of(node, MODEL))
        grad = any(self.graph.values[n].grad for n in op.inputs) and target != "aten.detach.default"
        self.graph.add_op(op, [tensor_of(v) for v in (value if many else (value,))], grad=grad)
        for out, v in zip(outs, value if many else (value,), strict=True):
            self.graph.values[out].strides = tuple(v.stride())
        self.values[node] = tuple(map(Ref, outs)) if many else Ref(name)

    def _plain(self, tree: Any, where: str) -> Any:
        if isinstance(tree, fx.Node):
            return self.values[tree]
        if isinstance(tree, (tuple, list)):
            return tuple(self._plain(t, where) for t in tree)
        if isinstance(tree, torch.dtype):
            return str(tree)
        if tree is None or isinstance(tree, (bool, int, float, str)):
            return tree
        if isinstance(tree, (torch.device, torch.layout, torch.memory_format)):
            return None
        raise CaptureError(f"an op has the argument {tree!r} of {type(tree).__name__}, which can't be captured", where=where)

    # -- roots

    def _roots(self, outputs: list[str]) -> None:
        users = []
        results = next(iter(self.program.graph.find_nodes(op="output"))).args[0]
        for node, spec in zip(results, self.program.graph_signature.output_specs, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                users.append(self.values[node].name)
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                self.graph.updates[self.owners[spec.target.removeprefix(MODEL + ".")]] = self.values[node].name
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                self.graph.notes.append(f"the model writes into its input {spec.target}; the caller's tensor is left unchanged")
            else:
                raise CaptureError(
                    f"forward writes into {spec.kind.name.split('_')[0].lower()} {spec.target}",
                    hint="only buffers may change during forward; register it as one",
                )
        self.graph.loss, *others = users
        self.graph.outputs = dict(zip(outputs, others, strict=True))


def tensor_of(value: torch.Tensor) -> Tensor:
    assert isinstance(value, torch.Tensor), value
    return Tensor(tuple(_number(n) for n in value.shape), dtype_name(value.dtype))


def _number(n: int | torch.SymInt) -> int:
    """Some fakes have symbols for sizes that are numbers."""
    known = n.node.maybe_as_int() if isinstance(n, torch.SymInt) else int(n)
    assert known is not None, f"the size {n} isn't known"
    return int(known)


def identifier(path: str) -> str:
    """
    >>> identifier("model.layers.0.mlp.weight")
    'model_layers_0_mlp_weight'
    """
    name = "".join(c if c.isalnum() else "_" for c in path).strip("_") or "x"
    return f"_{name}" if name[0].isdigit() else name
