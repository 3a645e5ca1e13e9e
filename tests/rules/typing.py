"""An independent typing of lowered graphs: what may be said of each value on one mesh axis without knowing the rule table.

`R`: the same on every rank. `V`: differs between ranks. `P`: a term of a pending sum, of which only linear functions may be taken.
`Z`: zeros, which are all of these. Inputs' types come from their layouts; collectives are the only way from V or P to R, and
summing what is the same everywhere, or handing on as whole what differs, is an error. It is coarser than layouts are: V may stand
for a shard or a term. Of a buffer in which several tensors travel, each part has its own type (`Flat`). `check` types a module's graphs
on each axis and raises `Untyped`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from autoshard.layout import Layout, Type, gradient
from autoshard.lower.program import Call, Module, RankProgram

AXES = ("dp", "tp")
MOVES = frozenset(
    """reshape view permute clone t transpose slice unsqueeze squeeze expand sum neg _to_copy constant_pad_nd split_with_sizes unbind
    getitem wait_tensor alias detach select slice_backward as_strided mean diagonal flip roll cumsum contiguous""".split()
)
"""Linear in their one tensor."""
TOGETHER = frozenset("add sub cat stack where index_copy index_add slice_scatter masked_fill".split())
"""Linear in all that may be pending together; the condition, and an index, may differ between ranks."""
PRODUCTS = frozenset("mul mm bmm matmul einsum div linear".split())
FIRST = frozenset("index_select gather embedding".split())
ZEROS = frozenset("zeros new_zeros zeros_like".split())


class Untyped(Exception):
    """A node that has no type, or another than was claimed."""


class Flat(str):
    """The types of a buffer's parts; for whom doesn't look into them, what they are together."""

    parts: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, str]]) -> Flat:
        types = {t for _, t in parts} - {"Z"}
        found = cls(types.pop() if len(types) == 1 else "V" if types else "Z")
        found.parts = tuple(parts)
        return found

    def cut(self, start: int, end: int) -> str:
        """The type of [start, end) of the last dim."""
        at, inside = 0, []
        for n, t in self.parts:
            if at < end and at + n > start:
                inside.append((n, t))
            at += n
        return str(Flat.of(inside))


def claimed(t: Type) -> str:
    return {"S": "V", "P": "P", "R": "R", "I": "R"}[t.kind]


def fits(found: str, t: Type) -> bool:
    """A shard of what is the same everywhere (a constant) is itself; a term of a pending sum isn't."""
    wanted = claimed(t)
    return found == "Z" or found == wanted or (wanted == "P" and found == "V") or (t.kind == "S" and found == "R")


def run(graph: fx.GraphModule, inputs: Sequence[str], axis: str) -> list[str]:
    """The types of a graph's outputs on one axis. Raises Untyped."""
    env: dict[fx.Node, str] = {}
    given = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = "R"
        elif node.op == "call_function":
            env[node] = _node(node, env, axis)
        else:
            return [env[r] if isinstance(r, fx.Node) else "Z" for r in node.args[0]]
    raise AssertionError("a graph has an output")


def _node(node: fx.Node, env: Mapping[fx.Node, str], axis: str) -> str:
    """The type of one call's result."""
    namespace, name = _name(node)
    types = [env[n] for n in node.all_input_nodes]
    if types and isinstance(flat := types[0], Flat):
        if name in ("reshape", "wait_tensor"):
            return flat
        if name == "slice" and node.args[1] == -1:
            return flat.cut(*node.args[2:4])  # type: ignore[arg-type]
        if namespace == "_c10d_functional":
            return Flat.of([(n, _collective(node, name, t) if axis in node.args else t) for n, t in flat.parts])
    if name == "cat" and node.args[1:] == (-1,) and all(map(_is_collective, _readers(node))):
        return Flat.of([(source.meta["val"].shape[-1], env[source]) for source in node.args[0]])  # type: ignore[union-attr]
    if namespace == "_c10d_functional" and name != "wait_tensor":
        return _collective(node, name, types[0]) if axis in node.args else _join(node, name, types, env)
    return _join(node, name, types, env)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a value, reshapes looked through."""
    return [r for user in node.users for r in (_readers(user) if _name(user)[1] == "reshape" else [user])]


def _is_collective(node: fx.Node) -> bool:
    return _name(node)[0] == "_c10d_functional"


def _name(node: fx.Node) -> tuple[str, str]:
    parts = str(node.target).split(".")
    return (parts[0], parts[1]) if len(parts) > 1 else ("", node.target.__name__)  # type: ignore[union-attr]


def _collective(node: fx.Node, name: str, t: str) -> str:
    gathers = name in ("all_gather_into_tensor", "all_to_all_single")
    if t == "R" and not gathers:  # a shard of a constant may be gathered, and looks the same everywhere
        raise Untyped(f"{node.format_node()}: {name} of what is the same on every rank")
    if t == "P" and gathers:
        raise Untyped(f"{node.format_node()}: {name} of a pending sum")
    return {"all_reduce": "R", "all_gather_into_tensor": "R", "reduce_scatter_tensor": "V", "all_to_all_single": "V"}[name]


def _join(node: fx.Node, name: str, types: list[str], env: Mapping[fx.Node, str]) -> str:
    if name in ZEROS or (name == "scalar_tensor" and node.args[0] == 0):
        return "Z"
    if "V" in types:
        return "V"  # a term may be in disguise, so what it meets can't be judged
    if "P" not in types:
        return "Z" if name in MOVES and types == ["Z"] else "R"
    first = env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    pending = [t for t in types if t != "Z"]
    if name in MOVES or _sums_elsewhere(node):
        return "P"
    if name in PRODUCTS and types.count("P") == 1 and _factors(node) == len(types) and (name != "div" or first == "P"):
        return "P"
    if name in TOGETHER and (set(pending) == {"P"} or (name in SELECTORS and _but_selectors(node, name, env) <= {"P", "Z"})):
        if not any(isinstance(a, (int, float)) and a for a in _addends(node, name)):
            return "P"
    if (name in FIRST or "backward" in name) and first == "P" and types.count("P") == 1:
        return "P"
    raise Untyped(f"{node.format_node()}: {name} of a pending sum with {types}")


def _sums_elsewhere(node: fx.Node) -> bool:
    """A collective of another axis is linear, unless it takes maxima."""
    return str(node.target).startswith("_c10d_functional") and "max" not in node.args


def _factors(node: fx.Node) -> int:
    """How many tensors the arguments are, repeats counted: x · x isn't linear in x."""
    flat = [b for a in node.args for b in (a if isinstance(a, (list, tuple)) else [a])]
    return sum(isinstance(a, fx.Node) for a in flat)


SELECTORS = ("where", "masked_fill", "index_copy")


def _but_selectors(node: fx.Node, name: str, env: Mapping[fx.Node, str]) -> set[str]:
    values = {"where": node.args[1:], "masked_fill": (node.args[0],), "index_copy": (node.args[0], node.args[-1])}[name]
    return {env[v] for v in values if isinstance(v, fx.Node)}


def _addends(node: fx.Node, name: str) -> Sequence[Any]:
    return node.args if name in ("add", "sub", "where") else node.args[2:] if name == "masked_fill" else ()


# ---- modules --------------------------------------------------------------------------------------------------------


def layout_of(env_name: str, rank: RankProgram) -> Layout | None:
    """A value's layout by its environment name; None for rank inputs."""
    if env_name.startswith("param:"):
        return rank.params[env_name.removeprefix("param:")].layout
    if env_name.startswith("buffer:"):
        return rank.buffers[env_name.removeprefix("buffer:")].layout
    if env_name.startswith("@"):
        return None
    _, _, text = env_name.partition("|")
    return tuple(Type.parse(t) for t in text.split(",")) if text else (Type("R"), Type("R"))


def calls(rank: RankProgram) -> list[Call]:
    return [c for c in (*rank.gathers, rank.once, rank.data, *rank.blocks) if c]


def check(rank: RankProgram, call: Call) -> None:
    """Type a call's graphs on both axes: outputs and gradients must be what their layouts claim."""
    for i, axis in enumerate(AXES):
        where = f"{call.label} {axis}"

        def of(name: str, i: int = i, axis: str = axis) -> str:
            layout = layout_of(name, rank)
            if layout is not None:
                return claimed(layout[i])
            spec = rank.rank_inputs[name]
            chains = spec.draw[4] if spec.kind == "dropout" else (spec.cuts,)
            return "V" if any(a == axis for chain in chains for a, _ in chain) else "R"

        def expect(found: str, t: Type, what: str, where: str = where) -> None:
            if not fits(found, t):
                raise Untyped(f"{where}: {what} is {found}, claimed {t}")

        _module(call, call.module, lambda name: layout_of(name, rank), of, expect, i, axis)


def _module(
    call: Call, m: Module, layout: Callable[[str], Layout | None], of: Callable[[str], str], expect: Callable[..., None], i: int, axis: str
) -> None:
    made = run(m.forward, [of(name) for name in call.inputs], axis)
    for name, found in zip(call.outputs, made[: m.outputs], strict=True):
        expect(found, layout(name)[i], f"output {name}")  # type: ignore[index]
    if m.backward_input is None:
        return
    tangents = [claimed(gradient(layout(call.outputs[k])[i])) for k in m.grad_outputs]  # type: ignore[index]
    results = run(m.backward_input, [*made[m.outputs :], *tangents], axis)
    for k, found in zip(m.grad_inputs, results, strict=False):
        expect(found, gradient(layout(call.inputs[k])[i]), f"gradient of {call.inputs[k]}")  # type: ignore[index]
    if m.backward is not None:
        for k, found in zip((*m.grad_inputs, *m.grad_params), run(m.backward, [*made[m.outputs :], *tangents], axis), strict=True):
            expect(found, gradient(layout(call.inputs[k])[i]), f"gradient of {call.inputs[k]}")  # type: ignore[index]
    if m.backward_weight is not None:
        for k, found in zip(m.grad_params, run(m.backward_weight, results[len(m.grad_inputs) :], axis), strict=True):
            expect(found, gradient(layout(call.inputs[k])[i]), f"gradient of {call.inputs[k]}")  # type: ignore[index]
