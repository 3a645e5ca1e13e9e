"""`autoshard checkpoint inspect | verify | convert`: what a checkpoint holds, whether it is whole, and its weights for other libraries."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at, verify and convert checkpoints.",
    no_args_is_help=True,
    epilog="""[bold]Examples[/bold]

autoshard checkpoint inspect runs/gpt

autoshard checkpoint verify runs/gpt/step-00000100

autoshard checkpoint convert runs/llama exported --config config.json

autoshard checkpoint convert ~/models/my-llama runs/llama --to autoshard
""",
)


class Kind(StrEnum):
    """`convert.KINDS`, without importing what knows them."""

    hf = "hf"
    dcp = "dcp"
    autoshard = "autoshard"


Where = Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them (its newest).", show_default=False)]


@app.command()
def inspect(
    path: Where,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a checkpoint holds, without reading its tensors."""
    from ..runtime.checkpoint import inspect as look

    found = look(path)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, default=str) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    from ..report import bytes_text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    tensors = found.pop("tensors", {})
    facts = Table(title=f"checkpoint {found.pop('path', path)}", title_justify="left", show_header=False)
    for name, value in found.items():
        if name in ("bytes", "weights") and isinstance(value, (int, float)):
            value = bytes_text(value)
        elif name == "files":
            value = "\n".join(f"{file}  {bytes_text(size)}" for file, size in value.items())
        facts.add_row(name, str(value))
    table = Table("tensor", "dtype", "shape", "size", "pieces", title="tensors", title_justify="left")
    for name, t in tensors.items():
        table.add_row(name, t["dtype"], "×".join(map(str, t["shape"])) or "scalar", bytes_text(t["bytes"]), str(t["pieces"]))
    console.print(facts, table)


@app.command()
def verify(path: Where) -> None:
    """Read all of a checkpoint and compare every hash. Exit code 5, and the damaged file's name, where it isn't whole."""
    from ..runtime.checkpoint import verify as check

    check(path)
    typer.echo(f"{path} is whole")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="autoshard's checkpoints, a Hugging Face folder, or a DCP folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    to: Annotated[Kind, typer.Option(help="hf (Hugging Face), dcp (torch.distributed.checkpoint) or autoshard.")] = Kind.hf,
    config: Annotated[
        Path | None, typer.Option(help="With --to hf: the model's Hugging Face config.json, to write beside the weights.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="From or to a DCP folder: the prefix of the model's names, as model.")] = "",
    step: Annotated[int | None, typer.Option(min=0, help="With --to autoshard: the step that the checkpoint is of (0).")] = None,
) -> None:
    """Write weights as another library reads them. Optimizer state stays behind."""
    from ..runtime.convert import convert as write
    from ..runtime.convert import is_dcp

    useless = {
        "--config": config is not None and to is not Kind.hf,
        "--prefix": bool(prefix) and to is not Kind.dcp and not is_dcp(source),
        "--step": step is not None and to is not Kind.autoshard,
    }
    for option, none in useless.items():
        if none:
            raise typer.BadParameter(f"has no effect on {source} with --to {to.value}", param_hint=option)
    typer.echo(f"wrote {write(source, target, to.value, config=config, prefix=prefix, step=step or 0)}")
