"""Turn an fx module into a generator function that pauses at every collective.

In: a GraphModule of functional ops and `torch.ops._c10d_functional` calls. Out: a Python generator function of the same
arguments, that yields a `Meet` where the graph has a collective, goes on with what is sent back, and returns the tuple of
outputs. So one process can run many ranks in turns. Each value is deleted after its last use.

>>> from torch import fx
>>> graph = fx.Graph()
>>> x = graph.placeholder("x")
>>> y = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "tp"))
>>> z = graph.call_function(torch.add, (y, y))
>>> _ = graph.output((z,))
>>> print(source(fx.GraphModule({}, graph))[0])
def run(x):
    all_reduce_default = yield Meet('all_reduce', 'tp', x, ('sum',), 'all_reduce_default')
    del x
    add = f0(all_reduce_default, all_reduce_default)
    del all_reduce_default
    return (add,)
    yield
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import fx

from .requests import Meet

Coroutine = Callable[..., Generator[Meet, torch.Tensor, tuple[Any, ...]]]


def coroutine(module: fx.GraphModule) -> Coroutine:
    """The generator function of a module (see the module docstring)."""
    text, names = source(module)
    exec(compile(text, f"<coroutine of {getattr(module, 'key', '') or 'a module'}>", "exec"), names)
    return names["run"]


def source(module: fx.GraphModule) -> tuple[str, dict[str, Any]]:
    """Python text, and the global names (functions, dtypes, attributes) that it speaks of."""
    writer = _Writer(module)
    return "\n".join(writer.lines()), writer.names


class _Writer:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.names: dict[str, Any] = {"Meet": Meet}
        self.known: dict[int, str] = {}
        self.last: dict[fx.Node, fx.Node] = {}
        for node in module.graph.nodes:
            for used in (node, *node.all_input_nodes):
                self.last[used] = node

    def lines(self) -> list[str]:
        inputs = [n.name for n in self.module.graph.nodes if n.op == "placeholder"]
        out = [f"def run({', '.join(inputs)}):"]
        for node in self.module.graph.nodes:
            if node.op == "output":
                results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
                # the unreachable yield makes a generator of a module without collectives
                return [*out, f"    return {self.text(tuple(results))}", "    yield"]
            if node.op != "placeholder":
                out.append(f"    {node.name} = {self.statement(node)}")
            dead = [n.name for n in dict.fromkeys((*node.all_input_nodes, node)) if self.last[n] is node and node.op != "placeholder"]
            if dead:
                out.append(f"    del {', '.join(dead)}")
        raise AssertionError("a graph without an output")

    def statement(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self.constant(operator.attrgetter(str(node.target))(self.module))
        args = [self.text(a) for a in node.args] + [f"{k}={self.text(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        assert node.op == "call_function", f"{node.op} {node.target} can't be interpreted"
        space, _, name = str(node.target).removesuffix(".default").partition(".")
        if space == "_c10d_functional":
            if name == "wait_tensor":
                return args[0]
            tensor, *detail, group = node.args
            return f"yield Meet({name!r}, {group!r}, {self.text(tensor)}, {self.text(tuple(detail))}, {node.name!r})"
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        return f"{self.constant(node.target)}({', '.join(args)})"

    def text(self, value: Any) -> str:
        """An argument as Python text: nodes by name, plain values as they are written, the rest as a global."""
        if isinstance(value, fx.Node):
            return value.name
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self.text, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.text(v)}" for k, v in value.items()) + "}"
        return self.constant(value)

    def constant(self, value: Any) -> str:
        name = self.known.get(id(value))
        if name is None:
            name = self.known[id(value)] = f"f{len(self.known)}"
            self.names[name] = value
        return name
