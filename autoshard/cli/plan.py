"""`autoshard plan`: MODEL and a cluster → the plan that was chosen, what it costs, and what lost.

From a saved graph nothing of torch is imported. The tables are made in `show.py`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from ..trace.captured import Captured
    from ..trace.graph import Graph

EXAMPLES = """[bold]Examples[/bold]

autoshard plan llama3-8b --cluster h100x64 --batch 64 --seq 4096

autoshard plan examples/gpt.py:build --cluster cpux4 --batch 16 --seq 128 --save plan.yaml

autoshard plan ~/models/my-llama --cluster my-cluster.yaml --batch 8 --seq 2048 --save-graph llama.json

autoshard plan llama.json --cluster h100x8 --mesh "dp=2 tp=4" --pin zero=false --json
"""

Model = Annotated[
    str,
    typer.Argument(
        help="file.py:function, a Hugging Face config.json or its folder, a saved graph, or a preset "
        "(llama3-8b, llama3-70b, llama3-405b, mixtral-8x7b, deepseek-v3).",
        show_default=False,
    ),
]


def plan(
    model: Model,
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="A YAML file, or a catalogue name with a count (h100x64, cpux4).")],
    batch: Annotated[int | None, typer.Option("--batch", "-b", min=1, help="Sequences in the global batch.", show_default=False)] = None,
    seq: Annotated[int | None, typer.Option("--seq", "-s", min=1, help="Tokens in a sequence.", show_default=False)] = None,
    mesh: Annotated[str | None, typer.Option(help='The degrees, as "dp=8 tp=8" (an axis not named is 1); otherwise all are tried.')] = None,
    microbatches: Annotated[int | None, typer.Option(min=1, help="Their count; otherwise several are tried.")] = None,
    memory: Annotated[str | None, typer.Option(help="What a rank may hold, as 64GiB; otherwise what its device has.")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="A decision to hold fixed, as key=value; may be given again. zero=false, schedule=gpipe, cuts=[0,4], "
                     "storage.PARAMETER=S(0), ops.OP=STRATEGY (names and strategies as in a saved plan)."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan here (YAML; train with it as parallel.plan).")] = None,
    save_graph: Annotated[Path | None, typer.Option(help="Write the captured graph here (JSON; plan from it without torch).")] = None,
    lower_rank: Annotated[int | None, typer.Option(min=0, help="Also print what this rank runs, as Python.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every block and parameter on its own; otherwise those alike are one line.")] = False,
) -> None:  # fmt: skip
    """Find the fastest way to train MODEL on a cluster, and show what was chosen, what it costs, and what lost.

    The model is built on the meta device: nothing is allocated, and no accelerator is needed.
    """
    from ..config import bytes_of
    from ..errors import MeshError
    from ..mesh import Mesh
    from ..plan.cluster import Cluster
    from ..plan.search import search
    from . import show

    machine = Cluster.load(cluster)
    degrees = Mesh.parse(mesh) if mesh is not None else None
    if degrees is not None and degrees.ranks > machine.ranks:
        raise MeshError(f"--mesh {mesh} has {degrees.ranks} ranks, but {cluster} has {machine.ranks}", hint="an axis that isn't named is 1")
    limit = None if memory is None else bytes_of(memory)
    pins = pins_of(pin or [])
    captured, graph = _graph(model, batch, seq, lower_rank)
    if save_graph is not None:
        with _writing(save_graph):
            graph.save(save_graph)
    with show.working("searching", quiet=as_json):
        found = search(graph, machine, degrees, microbatches, pins, limit)
    if save is not None:
        with _writing(save):
            found.save(save)
    source = None if lower_rank is None else _source(captured, found, lower_rank)
    view = show.View(graph, found, machine, limit or machine.device.usable)
    if as_json:
        data = view.data() | ({} if source is None else {"source": source})
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
        return
    show.print_all(view, full)
    for path in (save, save_graph):
        if path is not None:
            sys.stdout.write(f"wrote {path}\n")
    if source is not None:
        sys.stdout.write("\n" + source)


def _graph(model: str, batch: int | None, seq: int | None, lower_rank: int | None) -> tuple[Captured | None, Graph]:
    from ..errors import ConfigError
    from ..models import find
    from . import show

    source = find(model)
    if source.kind == "graph":
        if lower_rank is not None:
            raise ConfigError("a saved graph can't be lowered: it holds no constants", hint="give the model that it was made from")
        for name, value in (("--batch", batch), ("--seq", seq)):
            if value is not None:
                _usage("a saved graph has its batch and sequence length already; for others, capture the model again", name)
        return None, source.load_graph()
    for name, value in (("--batch", batch), ("--seq", seq)):
        if value is None:
            _usage(f"a model needs {name} (only a saved graph doesn't)", name)
    assert batch is not None and seq is not None
    with show.working(f"capturing {model}", quiet=False):
        captured = source.capture(batch, seq)
    return captured, captured.graph


def _source(captured: Captured | None, found: Any, rank: int) -> str:
    """What one rank runs, as Python."""
    from ..errors import ConfigError
    from ..lower import compile as lower

    assert captured is not None
    if rank >= found.mesh.ranks:
        raise ConfigError(f"there is no rank {rank}: the plan has {found.mesh.ranks}", hint=f"--lower-rank 0 to {found.mesh.ranks - 1}")
    return lower(captured, found, ranks=[rank]).source(rank)


def pins_of(given: Sequence[str]) -> dict[str, Any]:
    """key=value pairs as `plan.search` takes them. Raises ConfigError.

    >>> pins_of(["zero=false", "cuts=[0, 4]", "storage.head.weight=S(0)"])
    {'zero': False, 'cuts': [0, 4], 'storage': {'head.weight': 'S(0)'}}
    """
    from ..config import check_pins, value_of

    pins: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            _usage(f"{text!r} is not key=value", "--pin")
        table, dot, name = key.partition(".")
        # a strategy's text ("R, S(0) -> S(2)") is not YAML's business
        if dot:
            pins.setdefault(table, {})
            if isinstance(pins[table], dict):
                pins[table][name] = value
        else:
            pins[key] = value_of(value, f"--pin {text}")
    check_pins(pins, "--pin")
    return pins


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    from ..errors import ConfigError

    try:
        yield
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror or error}") from error


def _usage(message: str, option: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=option)
