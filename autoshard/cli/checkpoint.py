"""`autoshard checkpoint inspect | verify | convert`: what a checkpoint holds, whether it is whole, and its weights for Hugging Face."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at, verify and convert checkpoints.",
    no_args_is_help=True,
    epilog="""[bold]Examples[/bold]

autoshard checkpoint inspect runs/gpt

autoshard checkpoint verify runs/gpt/step-00000100

autoshard checkpoint convert runs/gpt exported --config config.json
""",
)
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
    path: Where,
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face files go.", show_default=False)],
    config: Annotated[Path | None, typer.Option(help="The model's Hugging Face config.json, copied beside the weights.")] = None,
) -> None:
    """Write a checkpoint's weights as Hugging Face reads them: safetensors files with an index, and the config."""
    from ..runtime.huggingface import export

    export(path, folder, config=config)
    typer.echo(f"wrote {folder}")
