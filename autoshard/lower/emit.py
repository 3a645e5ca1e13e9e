"""Emit: a rank's program as Python that a person can read.

Every distinct module is printed once as three functions, with shapes, and the model's own names and source lines where a routine
has them; then comes the step: the instruction list, and per block the call with the environment's names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from .program import Call, Module, Program, RankProgram


def source(program: Program, rank: int) -> str:
    """Readable Python of everything that `rank` runs."""
    own = program.ranks[rank]
    assert own is not None, f"rank {rank} wasn't built"
    lines = [f"# rank {rank} of {program.mesh}: stage {own.stage}, {program.microbatches} microbatches, schedule {program.plan.schedule}"]
    lines += [f"# stores {path}: {slot.tensor} as {', '.join(map(str, slot.layout))} on (dp, tp)" for path, slot in own.params.items()]
    lines += [f"# {name}: {', '.join(paths)} in one buffer" for name, paths in own.joined.items()]
    calls = [call for call in (*own.gathers, own.once, own.data, *own.blocks) if call]
    for module in {call.module.key: call.module for call in calls}.values():
        lines += ["", *_module(module)]
    return "\n".join([*lines, "", *_step(own)]) + "\n"


def _module(module: Module) -> Iterator[str]:
    for name in ("forward", "backward_input", "backward_weight"):
        graph = getattr(module, name)
        if graph is not None:
            yield from _function(graph, f"{module.key}_{name}")


def _function(graph: fx.GraphModule, name: str) -> Iterator[str]:
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    yield f"def {name}({', '.join(names)}):"
    where = ""
    for node in graph.graph.nodes:
        if node.op == "output":
            results = node.args[0]
            yield f"    return {', '.join(map(str, results))}" if results else "    return"
        elif node.op == "call_function":
            here = node.meta.get("stack_trace") or ""
            if here and here != where:
                yield f"    # {here}"
            where = here or where
            args = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
            yield f"    {node.name}{_shape(node)} = {str(node.target).removesuffix('.default')}({', '.join(args)})"
        elif node.op == "get_attr":
            yield f"    {node.name} = self.{node.target}"
    yield ""


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f": '{str(value.dtype).removeprefix('torch.')}{list(value.shape)}'"


def _step(own: RankProgram) -> Iterator[str]:
    def line(call: Call) -> str:
        return f"    {', '.join(call.outputs)} = {call.module.key}({', '.join(call.inputs)})  # {call.label}"

    for name, calls in (("P", own.gathers), ("D", [own.once]), ("F", [own.data, *own.blocks])):
        yield f"# {name}:"
        yield from (line(call) for call in calls if call)
    for (src, dst), values in own.edges.items():
        yield f"# stage {src} sends stage {dst}: {', '.join(values)}"
    yield "# instructions: " + " ".join(map(str, own.instructions))
